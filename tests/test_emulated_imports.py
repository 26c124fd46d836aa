"""`import cupy` and `import cupyx` on emulated devices, and modules and functions in pickles."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import cloudpickle
import numpy as np
import pytest

from afield.gpu_store.emulated_arrays import (
    CappedAllocator,
    DeviceMemory,
    DeviceSet,
    installed_as_import,
    set_process_devices,
)
from afield.gpu_store.emulated_arrays.module import module_of
from afield.scheduler.devices import parse_devices
from tests.device_helpers import module_with

MIB = 1 << 20


@pytest.fixture
def cp() -> Any:
    return module_with()


@pytest.fixture
def imported(cp: Any) -> Iterator[Any]:
    names = [name for name in sys.modules if name.split(".")[0] in ("cupy", "cupyx")]
    saved = {name: sys.modules.pop(name) for name in names}
    with installed_as_import(cp):
        yield cp
    assert "cupy" not in sys.modules
    sys.modules.update(saved)


def test_import_cupy(imported: Any) -> None:
    assert importlib.import_module("cupy") is imported
    importlib.import_module("cupy.cuda.runtime")
    assert importlib.util.find_spec("cupy") is not None and importlib.util.find_spec("cupy.linalg") is not None
    exec("from cupy.random import rand\nfrom cupy.cuda import Device\nimport cupy.linalg as la", {})
    exec("from cupy import RawKernel, zeros", {})
    extras = importlib.import_module("cupyx")
    assert importlib.import_module("cupyx.scipy") is extras.scipy
    exec("from cupyx import scatter_add\nfrom cupyx import profiler", {})
    for absent in ("cupyx.profiler", "cupyx.scipy.special", "cupyx.scipy.sparse", "cupy.cutensor"):
        with pytest.raises(ModuleNotFoundError, match="emulated by afield"):
            importlib.import_module(absent)


def test_what_cupyx_has(imported: Any) -> None:
    cupyx = importlib.import_module("cupyx")
    x = imported.zeros(4, "f4")
    cupyx.scatter_add(x, imported.array([0, 0, 3]), 2)
    cupyx.scatter_max(x, imported.array([1, 1]), imported.array([5, 1], "f4"))
    cupyx.scatter_min(x, 3, -1)
    assert x.tolist() == [4, 5, 0, -1]
    assert cupyx.rsqrt(imported.array([4.0, 16.0])).tolist() == [0.5, 0.25]
    assert cupyx.rsqrt(imported.array([4])).dtype == "f8"
    for made in (cupyx.zeros_pinned((2, 3), "i4"), cupyx.zeros_like_pinned(imported.ones((2, 3), "i4"))):
        assert type(made) is np.ndarray and made.shape == (2, 3) and made.dtype == "i4" and not made.any()
    pinned = cupyx.empty_pinned(4, "f4")
    assert x.get(out=pinned) is pinned and pinned[1] == 5
    assert cupyx.empty_like_pinned(pinned, shape=(3,)).shape == (3,)
    assert cupyx.scipy.get_array_module(x) is cupyx.scipy
    for lacking in (cupyx.profiler, cupyx.GeneralizedUFunc, cupyx.errstate, cupyx.scipy.sparse):
        with pytest.raises(NotImplementedError, match="emulated devices"):
            lacking()
    with pytest.raises(AttributeError):
        _ = cupyx.scatter_mul
    assert pickle.loads(pickle.dumps(cupyx.scipy)) is cupyx.scipy


def test_modules_and_functions_are_pickled_by_name(imported: Any) -> None:
    assert pickle.loads(pickle.dumps(imported)) is imported
    assert pickle.loads(pickle.dumps(imported.exp)) is imported.exp
    assert cloudpickle.loads(cloudpickle.dumps(lambda: imported.linalg))() is imported.linalg
    x = imported.ones(2)
    assert pickle.loads(pickle.dumps(x)).device == x.device


def test_a_module_without_an_import_is_made_where_it_arrives() -> None:
    module = module_of(
        DeviceSet([DeviceMemory(0, parse_devices("emulated:1")[0], CappedAllocator(MIB))]), "no_such_cupy"
    )
    assert "no_such_cupy" not in sys.modules
    before = set_process_devices(None)
    try:
        there = pickle.loads(pickle.dumps((module, module.linalg)))
        assert there[0] is not module and there[0].linalg is there[1]
        assert there[0].ones(2).tolist() == [1, 1]
    finally:
        set_process_devices(before)
