"""CuPy's arrays, those of any library that speaks CUDA's array interface or DLPack, and CuPy's memory from arenas.

Theory of operation. CuPy is the array library of the CUDA backend, so wherever there is a CUDA device it is there; it is
imported inside functions only. An array of another library is seen through CuPy, without a copy. It comes back as the
type it was if its namespace has `from_dlpack` (`__array_namespace__` names it), else as a CuPy array. CuPy has no
read-only arrays: who writes to a stored one breaks the promise that objects are immutable.

`install_cupy` makes CuPy allocate from arenas: its memory object then refers to the arena's block, which is how
`describe` finds it.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

from afield.gpu_store.arena import DeviceArena
from afield.gpu_store.blocks import Block
from afield.gpu_store.interop.places import Adapter, Description, DevicePlace, Layout, c_strides, host_dtype

_PER_THREAD_DEFAULT_STREAM = 2
#: DLPack's numbers for CUDA memory: of a device, and managed.
_DLPACK_CUDA = (2, 13)


def ordinal_of(arena: DeviceArena) -> int:
    """Return CUDA's number, in this process, of the device of an arena."""
    ordinal: int = getattr(arena.slab, "ordinal", -1)
    return ordinal


def cupy_module() -> Any:
    """Return CuPy, for whoever may not import it."""
    import cupy

    return cupy


def cupy_stream() -> int:
    """Return a number for this thread's current stream, for `DeviceArena(current_stream=...)`."""
    import cupy

    pointer: int = cupy.cuda.get_current_stream().ptr
    # One number stands for a stream of its own in each thread.
    return -threading.get_ident() if pointer == _PER_THREAD_DEFAULT_STREAM else pointer


def install_cupy(arenas: Sequence[DeviceArena]) -> Callable[..., Any]:
    """Make CuPy take memory of these arenas' devices from them, for the whole process; return the allocator before.

    A device without an arena keeps the allocator that there was.
    """
    import cupy

    before: Callable[..., Any] = cupy.cuda.get_allocator()
    of_device = {ordinal_of(arena): arena for arena in arenas}
    get_device = cupy.cuda.runtime.getDevice
    memory, pointer = cupy.cuda.UnownedMemory, cupy.cuda.MemoryPointer

    def allocate(size: int) -> Any:
        ordinal = get_device()
        arena = of_device.get(ordinal)
        if arena is None:
            return before(size)
        if size == 0:
            return pointer(memory(0, 0, None, ordinal), 0)
        block = arena.allocate(size)
        return pointer(memory(block.address, size, block, ordinal), 0)

    cupy.cuda.set_allocator(allocate)
    return before


def described(array: Any) -> Description:
    """Describe a CuPy array."""
    pointer, dtype = array.data, array.dtype
    owner = getattr(pointer.mem, "_owner", None)
    block = owner if type(owner) is Block else None
    strides = tuple(array.strides)
    return Description(
        int(pointer.device_id), int(pointer.ptr), tuple(array.shape), strides, dtype.str, dtype.itemsize, block
    )


def array_at(place: DevicePlace, layout: Layout) -> Any:
    """Return a CuPy array over memory of a device, which it keeps alive."""
    import cupy

    ordinal, dtype = ordinal_of(place.arena), host_dtype(layout.dtype)
    if layout.is_empty:
        with cupy.cuda.Device(ordinal):
            return cupy.empty(layout.shape, dtype)
    memory = cupy.cuda.UnownedMemory(place.address, place.size, place, ordinal)
    pointer = cupy.cuda.MemoryPointer(memory, layout.offset)
    return cupy.ndarray(layout.shape, dtype, memptr=pointer, strides=layout.strides)


def interface_at(place: DevicePlace, layout: Layout, typestr: str) -> dict[str, Any]:
    """Return the `__cuda_array_interface__` of stored memory, not marked read-only, which torch refuses."""
    data = place.address + layout.offset, False
    return {"shape": layout.shape, "strides": layout.strides, "typestr": typestr, "data": data, "version": 3}


class CudaAdapter(Adapter):
    """What the arrays of all CUDA libraries have in common."""

    def build(self, place: DevicePlace, layout: Layout) -> Any:
        """Return a CuPy array over stored memory."""
        return array_at(place, layout)

    def gather(self, description: Description, arena: DeviceArena, target_offset: int) -> None:
        import cupy

        first, end = description.span
        shape, dtype = description.shape, description.dtype
        spread = DevicePlace(arena, first - arena.slab.address, end - first)  # where it is, in the slab or not
        source = array_at(spread, Layout(shape, description.strides, dtype, description.address - first))
        dense = DevicePlace(arena, target_offset, description.nbytes)
        target = array_at(dense, Layout(shape, c_strides(shape, description.itemsize), dtype))
        with cupy.cuda.Device(ordinal_of(arena)):
            cupy.copyto(target, source)
            cupy.cuda.get_current_stream().synchronize()


class CupyAdapter(CudaAdapter):
    """`cupy.ndarray`."""

    kind = "cupy"
    takes_all = True

    def describe(self, array: Any) -> Description:
        return described(array)


class InterfaceAdapter(CudaAdapter):
    """Any type with `__cuda_array_interface__`."""

    kind = "cuda"

    def describe(self, array: Any) -> Description | None:
        # Many types have the attribute for all of their arrays, and an AttributeError for those in host memory.
        if getattr(array, "__cuda_array_interface__", None) is None:
            return None
        import cupy

        return described(cupy.asarray(array))  # waits for the stream that the interface names

    def kind_of(self, array: Any) -> str:
        namespace = getattr(array, "__array_namespace__", None)
        name = getattr(namespace(), "__name__", "") if namespace is not None else ""
        return f"{self.kind}:{name}" if name else self.kind

    def build(self, place: DevicePlace, layout: Layout) -> Any:
        array = super().build(place, layout)
        name = layout.kind.partition(":")[2]
        take = getattr(importlib.import_module(name), "from_dlpack", None) if name else None
        return array if take is None else take(array)


class DlpackAdapter(InterfaceAdapter):
    """Any type with `__dlpack__` whose memory is a CUDA device's."""

    def describe(self, array: Any) -> Description | None:
        if int(array.__dlpack_device__()[0]) not in _DLPACK_CUDA:
            return None
        import cupy

        return described(cupy.from_dlpack(array))
