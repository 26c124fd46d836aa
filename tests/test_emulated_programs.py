"""What programs for CuPy do besides computing: streams, pointers, CUDA's calls, views, and indices that lie outside."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from afield.gpu_store.emulated_arrays import make_module
from afield.scheduler.devices import parse_devices


@pytest.fixture
def cp() -> Any:
    return make_module(parse_devices("emulated:2:64MiB"))


def test_the_current_stream_is_that_of_the_block(cp: Any) -> None:
    current = cp.cuda.get_current_stream
    outer, inner = cp.cuda.Stream(), cp.cuda.Stream(non_blocking=True)
    seen = []
    with outer:
        with inner:
            assert current() is inner
            thread = threading.Thread(target=lambda: seen.append(current()))
            thread.start()
            thread.join()
        assert current() is outer
    assert current() is cp.cuda.Stream.null is seen[0]
    assert inner.use() is current() and inner != outer


def test_indices_that_lie_outside_wrap(cp: Any) -> None:
    x = cp.arange(3)
    assert x.take(cp.array([4, -5])).tolist() == cp.take(x, cp.array([4, -5])).tolist() == [1, 1]
    assert x[cp.array([5])].tolist() == [2]
    x[[3]] = 9
    assert x.tolist() == [9, 1, 2]
    with pytest.raises(IndexError):
        x[3]


def test_views_and_scatter(cp: Any) -> None:
    x = cp.arange(6.0)
    tricks = cp.lib.stride_tricks
    assert tricks.as_strided(x, (2, 3), (8, 16)).tolist() == [[0, 2, 4], [1, 3, 5]]
    with pytest.raises(ValueError):
        tricks.as_strided(x, (7,), (8,))
    assert tricks.sliding_window_view(x, 5).shape == (2, 5)
    x.scatter_add(cp.array([0, 0]), 2)
    x.flat[1] = 7
    assert x.tolist() == [4, 7, 2, 3, 4, 5] and [float(item) for item in x.flat] == x.tolist()
    shared = cp.ndarray((2,), x.dtype, memptr=x.data + 8)
    shared[...] = 0
    assert x.tolist() == [4, 0, 0, 3, 4, 5]


def test_calls_of_the_runtime(cp: Any) -> None:
    runtime, host = cp.cuda.runtime, np.zeros(4, np.uint8)
    ptr = runtime.malloc(4)
    runtime.memset(ptr, 7, 4)
    runtime.memcpy(host.ctypes.data, ptr, 4, runtime.memcpyDeviceToHost)
    assert host.tolist() == [7, 7, 7, 7]
    runtime.free(ptr)
    for wrong in (lambda: runtime.free(ptr), lambda: runtime.memcpy(8, host.ctypes.data, 4, 1)):
        with pytest.raises(runtime.CUDARuntimeError):
            wrong()
    stream, start, end = runtime.streamCreate(), runtime.eventCreate(), runtime.eventCreate()
    runtime.eventRecord(start, stream)
    runtime.eventRecord(end, 0)
    assert runtime.eventElapsedTime(start, end) >= 0
    runtime.streamDestroy(stream)
