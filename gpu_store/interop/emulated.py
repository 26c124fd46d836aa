"""Emulated device arrays: their adapter, and the array module that allocates from arenas.

Theory of operation. The memory of an emulated device is host memory that both this process and NumPy can see, so an array
over a part is an `array_over` the slab's bytes, read-only, and a scattered array is copied together by NumPy. Every
operation is complete when it returns; there is no stream to wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from afield.errors import NoDeviceError
from afield.gpu_store.arena import DeviceArena
from afield.gpu_store.backends.base import DeviceUsageError, Slab
from afield.gpu_store.backends.emulated import EmulatedDevice, EmulatedSlab
from afield.gpu_store.blocks import Block
from afield.gpu_store.emulated_arrays import EmulatedArray, EmulatedModule, inner_array, make_module
from afield.gpu_store.emulated_arrays.array import array_over
from afield.gpu_store.emulated_arrays.devices import DeviceMemory, holder_of, process_devices
from afield.gpu_store.interop.places import Adapter, Description, DevicePlace, Layout, c_strides, host_dtype


class ArenaAllocator:
    """An emulated device's memory comes from an arena; see `emulated_arrays.devices.Allocator`."""

    #: It has the arithmetic, and names the largest holders.
    knows_the_limit = True

    def __init__(self, arena: DeviceArena) -> None:
        self._arena = arena
        self._memory = memoryview(cast(Any, _emulated(arena).memory))

    def allocate(self, nbytes: int) -> tuple[memoryview, object]:
        cast(EmulatedDevice, self._arena.device).count_allocation(nbytes)
        block = self._arena.allocate(nbytes)
        return self._memory[block.offset : block.offset + nbytes], block


def emulated_module(
    arenas: Sequence[DeviceArena], current_device: Callable[[], int] | None = None, *, name: str = "cupy"
) -> EmulatedModule:
    """Return an array module whose devices are those of the arenas, in their order, and whose memory is theirs.

    `current_device()` gives the number of the device of a thread that chose none. Raises NoDeviceError without arenas.
    """
    of_device = {arena.device.info.uuid: arena for arena in arenas}
    infos = [arena.device.info for arena in arenas]
    module = make_module(infos, lambda info: ArenaAllocator(of_device[info.uuid]), current_device, name=name)
    memories: Sequence[DeviceMemory] = module._devices.devices
    for memory in memories:
        memory.on_use = of_device[memory.uuid].check
    return module


class EmulatedAdapter(Adapter):
    """`EmulatedArray`, by whatever name its module goes."""

    kind = "emulated"
    takes_all = True

    def describe(self, array: EmulatedArray) -> Description:
        inner = inner_array(array)
        holder = holder_of(inner)
        assert holder is not None, "device arrays lie in device memory"
        dtype, owner = inner.dtype, holder.owner
        return Description(
            holder.device.uuid,
            inner.__array_interface__["data"][0],
            inner.shape,
            inner.strides,
            dtype.str,
            dtype.itemsize,
            owner if type(owner) is Block else None,
        )

    def build(self, place: DevicePlace, layout: Layout) -> EmulatedArray:
        home, dtype = self._home(place.arena), host_dtype(layout.dtype)
        if layout.is_empty:
            return EmulatedArray._hold(home.empty(layout.shape, dtype), home)
        return array_over(home, place.memory, place, layout.shape, dtype, layout.strides, layout.offset)

    def _home(self, arena: DeviceArena) -> DeviceMemory:
        uuid = arena.device.info.uuid
        home = process_devices().by_uuid(uuid)
        if home is None:
            raise NoDeviceError(f"this process has no array module for device {uuid}: see set_process_devices")
        return home

    def foreign(self, arena: DeviceArena, address: int, size: int) -> Slab:
        memory = _over(address, (size,), (1,), np.dtype(np.uint8))
        return replace(_emulated(arena), address=address, size_bytes=size, imported=True, memory=memory)

    def gather(self, description: Description, arena: DeviceArena, target_offset: int) -> None:
        shape, dtype = description.shape, host_dtype(description.dtype)
        target = _over(arena.slab.address + target_offset, shape, c_strides(shape, dtype.itemsize), dtype)
        np.copyto(target, _over(description.address, shape, description.strides, dtype))


class _Address:
    """Lets NumPy see memory by its address."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface


def _over(address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    interface = {"version": 3, "data": (address, False), "shape": shape, "strides": strides, "typestr": dtype.str}
    return np.asarray(_Address(interface))


def _emulated(arena: DeviceArena) -> EmulatedSlab:
    if not isinstance(arena.slab, EmulatedSlab):
        raise DeviceUsageError(f"device {arena.slab.device_uuid} is not emulated: its arrays are CuPy's")
    return arena.slab
