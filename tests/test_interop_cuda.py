"""The arrays of CUDA's libraries inside values, where neither a GPU nor those libraries are.

They are played by small fakes over the fake driver, whose device memory is host memory: what is tested is what the adapters
say to a library and what they make of its arrays.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from afield.errors import SerializationError
from afield.gpu_store.backends.cuda import CudaBackend
from afield.gpu_store.blocks import Block
from afield.gpu_store.interop import DevicePacker, DevicePlace
from afield.gpu_store.interop.interop_cupy import cupy_stream, install_cupy
from afield.gpu_store.interop.interop_numba import NumbaAdapter, install_numba, memory_manager
from afield.gpu_store.interop.interop_torch import TorchAdapter
from tests.fake_cuda import libraries
from tests.test_interop import MEMORY, World


class Memory:
    """`cupy.cuda.UnownedMemory`."""

    def __init__(self, ptr: int, size: int, owner: object, device_id: int) -> None:
        self.ptr, self.size, self._owner, self.device_id = ptr, size, owner, device_id


class Pointer:
    """`cupy.cuda.MemoryPointer`."""

    def __init__(self, mem: Memory, offset: int) -> None:
        self.mem, self.ptr, self.device_id = mem, mem.ptr + offset, mem.device_id


class Array:
    """`cupy.ndarray`: a NumPy array beside a pointer."""

    def __init__(self, shape: Any, dtype: Any = float, memptr: Any = None, strides: Any = None) -> None:
        self.data = memptr
        interface = {"shape": shape, "typestr": np.dtype(dtype).str, "strides": strides, "version": 3}
        self.host = np.asarray(SimpleNamespace(__array_interface__={**interface, "data": (memptr.ptr, False)}))

    shape = property(lambda self: self.host.shape)
    strides = property(lambda self: self.host.strides)
    dtype = property(lambda self: self.host.dtype)

    def __getitem__(self, key: Any) -> Array:
        host = self.host[key]
        offset = host.__array_interface__["data"][0] - self.data.mem.ptr
        return Array(host.shape, host.dtype, Pointer(self.data.mem, offset), host.strides)


Array.__module__, Array.__name__, Array.__qualname__ = "cupy", "ndarray", "ndarray"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A process with CuPy, CUDA devices (of which the first is CUDA's number 1) and arenas on both; `cuda.world`."""
    backend = CudaBackend(libraries(2, 2 * MEMORY))
    runtime = backend.libraries.runtime
    before = object()
    state = SimpleNamespace(allocator=before, stream=0)
    cupy = ModuleType("cupy")
    cupy.__dict__.update(
        ndarray=Array,
        copyto=lambda target, source: np.copyto(target.host, source.host),
        asarray=lambda other: other.array,
        from_dlpack=lambda other: other.array,
        empty=lambda shape, dtype: Array(shape, dtype, state.allocator(0)),
        cuda=SimpleNamespace(
            UnownedMemory=Memory,
            MemoryPointer=Pointer,
            Device=lambda number: ExitStack(),
            runtime=runtime,
            get_allocator=lambda: state.allocator,
            set_allocator=lambda allocator: setattr(state, "allocator", allocator),
            get_current_stream=lambda: SimpleNamespace(ptr=state.stream, synchronize=lambda: None),
        ),
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    world = World(backend, MEMORY, current_stream=cupy_stream)
    assert install_cupy(list(world.arenas.values())) is before
    runtime.setDevice(1)

    def arange(count: int, dtype: str = "f4") -> Array:
        array = Array((count,), dtype, state.allocator(count * np.dtype(dtype).itemsize))
        array.host[:] = np.arange(count)
        return array

    yield SimpleNamespace(world=world, arange=arange, state=state, runtime=runtime)
    backend.close()


def test_cupy_allocates_from_the_arena_and_its_arrays_are_kept(cuda: Any) -> None:
    stored = cuda.world.store([[cuda.arange(1000)[100:]]])
    assert stored.parts[0][0] == 1
    assert stored.copied == 0
    (loaded,) = stored.load()
    assert type(loaded) is Array
    assert (loaded.host == np.arange(100, 1000)).all()
    assert type(loaded.data.mem._owner) is DevicePlace
    assert "deviceSynchronize" in cuda.runtime.calls


def test_cupy_arrays_that_somebody_keeps_or_that_are_scattered(cuda: Any) -> None:
    array = cuda.arange(1000)
    stored = cuda.world.store([[array[:50], array[::10]]])
    assert (stored.born, stored.copied) == (0, 600)
    some, scattered = stored.load()
    array.host[:] = 0
    assert (some.host == np.arange(50)).all()
    assert (scattered.host == np.arange(0, 1000, 10)).all()
    assert scattered.strides == (4,)
    assert (stored.load(host=True)[1] == scattered.host).all()


def test_cupy_on_a_device_without_an_arena_and_empty(cuda: Any) -> None:
    cuda.world.arenas.pop(next(reversed(cuda.world.arenas)))
    cuda.runtime.setDevice(0)  # the second device
    array = cuda.arange(10)
    with pytest.raises(SerializationError, match="number 0"):
        cuda.world.store([array])
    cuda.runtime.setDevice(1)
    assert cuda.world.store([cuda.arange(0)]).load().shape == (0,)


def test_memory_of_another_allocator_is_copied(cuda: Any) -> None:
    address = cuda.runtime.malloc(4096)
    array = Array((8,), "f4", Pointer(Memory(address, 4096, None, 1), 8))
    array.host[:] = 3
    stored = cuda.world.store([array])
    assert stored.copied == 32
    assert stored.load().host.tolist() == [3] * 8
    cuda.runtime.free(address)


class Foreign:
    """An array of a library that speaks CUDA's interface."""

    def __init__(self, array: Any) -> None:
        self.array = array

    @property
    def __cuda_array_interface__(self) -> Any:
        if self.array is None:
            raise AttributeError("in host memory")
        return {}


class Exchanged:
    """An array of a library that follows the array API standard, and speaks DLPack only."""

    def __init__(self, array: Any, device: tuple[int, int] = (2, 1)) -> None:
        self.array, self.device = array, device

    def __dlpack__(self) -> None: ...

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __array_namespace__(self) -> Any:
        return sys.modules[__name__]


def from_dlpack(array: Any) -> Exchanged:
    return Exchanged(array)


def test_other_libraries_through_cupy(cuda: Any) -> None:
    stored = cuda.world.store([[Foreign(cuda.arange(5)), Exchanged(cuda.arange(6))]])
    plain, exchanged = stored.load()
    assert type(plain) is Array
    assert type(exchanged) is Exchanged
    assert exchanged.array.host.tolist() == [0, 1, 2, 3, 4, 5]
    assert DevicePacker().reduce(Foreign(None)) is None
    assert DevicePacker().reduce(Exchanged(None, (1, 0))) is None


class Tensor:
    """As much of a torch tensor as the adapter asks for."""

    is_cuda, is_quantized, requires_grad, is_leaf, layout = True, False, False, True, "torch.strided"

    def __init__(self, shape: tuple[int, ...], stride: tuple[int, ...], dtype: str, address: int) -> None:
        self.shape, self.steps, self.dtype, self.address = shape, stride, f"torch.{dtype}", address

    def view(self, dtype: str) -> Tensor:
        self.dtype = f"torch.{dtype}"
        return self

    def requires_grad_(self) -> Tensor:
        self.requires_grad = True
        return self

    def stride(self) -> tuple[int, ...]:
        return self.steps

    element_size = staticmethod(lambda: 2)
    get_device = staticmethod(lambda: 1)
    is_conj = is_neg = staticmethod(lambda: False)
    data_ptr = property(lambda self: lambda: self.address)


Tensor.__module__ = "torch"


def test_torch_tensors(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_tensor(exporter: Any, device: str) -> Tensor:
        interface = exporter.__cuda_array_interface__
        assert (device, interface["typestr"]) == ("cuda:1", "<i2")
        steps = tuple(step // 2 for step in interface["strides"])
        return Tensor(interface["shape"], steps, "int16", interface["data"][0])

    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(as_tensor=as_tensor, bfloat16="bfloat16"))
    source = cuda.arange(100, "u2")
    tensor = Tensor((10, 5), (10, 1), "bfloat16", source.data.ptr)
    tensor.requires_grad = True
    loaded = cuda.world.store([tensor]).load()
    assert (loaded.shape, loaded.steps, loaded.dtype, loaded.requires_grad) == (
        (10, 5),
        (10, 1),
        "torch.bfloat16",
        True,
    )
    interface = {"shape": (95,), "typestr": "<u2", "version": 3, "data": (loaded.address, False)}
    assert np.asarray(SimpleNamespace(__array_interface__=interface)).tolist() == list(range(95))
    assert TorchAdapter().describe(Tensor((1,), (1,), "float16", 0)).dtype == "<f2"  # type: ignore[union-attr]
    for left_alone in ({"is_cuda": False}, {"layout": "torch.sparse_coo"}, {"requires_grad": True, "is_leaf": False}):
        other = Tensor((1,), (1,), "float16", 0)
        other.__dict__.update(left_alone)
        assert DevicePacker().reduce(other) is None


class Managed:
    """numba's `MemoryPointer`."""

    def __init__(self, context: Any, pointer: Any, size: int, owner: Any = None) -> None:
        self.context, self.pointer, self.size, self.owner = context, pointer, size, owner


class Manager:
    """numba's `HostOnlyCUDAMemoryManager`."""

    def __init__(self, context: Any) -> None:
        self.context = context


class DeviceNDArray:
    """As much of numba's array as the adapter asks for."""

    def __init__(self, count: int, dtype: str, gpu_data: Managed) -> None:
        self.shape, self.strides, self.size = (count,), (np.dtype(dtype).itemsize,), count
        self.dtype, self.gpu_data = np.dtype(dtype), gpu_data

    @property
    def __cuda_array_interface__(self) -> Mapping[str, Any]:
        return {"data": (self.gpu_data.pointer.value, False)}


DeviceNDArray.__module__ = "numba.cuda.cudadrv.devicearray"


def test_numba_allocates_from_the_arena_and_its_arrays_are_kept(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = SimpleNamespace(GetIpcHandleMixin=type("GetIpcHandleMixin", (), {}), MemoryPointer=Managed)
    chosen: list[type] = []
    built: list[tuple[Any, Any]] = []
    numba_cuda = SimpleNamespace(
        HostOnlyCUDAMemoryManager=Manager,
        MemoryInfo=lambda free, total: (free, total),
        set_memory_manager=chosen.append,
        gpus={1: ExitStack()},
        from_cuda_array_interface=lambda interface, owner: built.append((interface, owner)),
        cudadrv=SimpleNamespace(driver=driver),
    )
    modules: Sequence[tuple[str, Any]] = [
        ("numba", SimpleNamespace(cuda=numba_cuda)),
        ("numba.cuda", numba_cuda),
        ("numba.cuda.cudadrv", numba_cuda.cudadrv),
    ]
    for name, module in modules:
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("NUMBA_CUDA_MEMORY_MANAGER", "")
    install_numba(list(cuda.world.arenas.values()))
    context = type("Context", (), {"device": SimpleNamespace(id=1)})()
    manager: Any = chosen[0](context=context)
    assert manager.interface_version == memory_manager()(context=None).interface_version == 1
    assert manager.get_memory_info() == (MEMORY, 2 * MEMORY)
    holder = [DeviceNDArray(100, "f8", manager.memalloc(800))]
    assert type(holder[0].gpu_data.owner) is Block
    stored = cuda.world.store(holder)
    assert (stored.parts[0][2], stored.copied) == (800, 0)
    stored.load()
    assert built[0][0]["typestr"] == "<f8"
    assert type(built[0][1]) is DevicePlace
    assert NumbaAdapter().describe(SimpleNamespace(dtype=np.dtype([("a", "f4")]))) is None
