"""What the bytes of an emulated device may be read as: only what a device array can have, on every way to an array."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from afield.gpu_store.emulated_arrays import array_over, inner_array, make_module
from afield.scheduler.devices import parse_devices


@pytest.fixture
def cp() -> Any:
    return make_module(parse_devices("emulated:1:64MiB"))


@pytest.mark.parametrize("dtype", [object, str, "S4", "M8[s]", "m8[s]", np.longdouble, [("a", "i4")], "V8"])
def test_no_view_has_a_dtype_that_no_device_array_has(dtype: Any, cp: Any) -> None:
    for view in (lambda x: x.view(dtype), lambda x: x.view(dtype=dtype), lambda x: x[16:].view(dtype)):
        with pytest.raises(ValueError, match="Unsupported dtype"):
            view(cp.zeros(32, "u1"))


@pytest.mark.parametrize("dtype", [">i4", ">f8", ">u2"])
def test_bytes_on_a_device_are_in_the_byte_order_of_the_machine(dtype: str, cp: Any) -> None:
    ways: list[Callable[[Any], Any]] = [
        lambda x: x.view(dtype),
        lambda x: x[1:].view(dtype),
        lambda x: x.T.view(dtype=dtype),
        lambda x: array_over(cp._devices.current, memoryview(bytearray(64)), inner_array(x), (2,), dtype),
    ]
    for way in ways:
        with pytest.raises(ValueError, match="byte order"):
            way(cp.zeros(16, "i8"))
    # What copies converts the values instead.
    assert cp.arange(3).astype(dtype).tolist() == [0, 1, 2]
    assert cp.asarray(np.arange(3, dtype=dtype)).tolist() == [0, 1, 2]
    assert cp.frombuffer(np.arange(3, dtype=dtype).tobytes(), dtype).tolist() == [0, 1, 2]


def test_a_device_array_is_not_viewed_as_a_host_array(cp: Any) -> None:
    for kind in (np.ndarray, np.recarray, np.matrix):
        with pytest.raises(TypeError, match="host array"):
            cp.zeros(4).view(kind)
    x = cp.arange(4, dtype="i4")
    assert x.view().data.ptr == x.view("u1").data.ptr == x.data.ptr
    assert x.view("u1").tolist() == np.arange(4, dtype="i4").view("u1").tolist()
