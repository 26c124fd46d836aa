"""numba's device arrays, and numba's memory from arenas.

Theory of operation. numba asks an external memory manager for device memory, a class that it finds by a module's name.
`install_numba` names this module, if numba was not imported yet, and `_numba_memory_manager` is made when numba looks for
it; so a process that never uses numba does not import it. The manager's pointers have the arena's block as their owner,
and numba hands the owner on to every view: that keeps the block alive, and is how `describe` finds it.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Sequence
from typing import Any

from afield.errors import NoDeviceError
from afield.gpu_store.arena import DeviceArena
from afield.gpu_store.blocks import Block
from afield.gpu_store.interop.interop_cupy import CudaAdapter, interface_at, ordinal_of
from afield.gpu_store.interop.places import Description, DevicePlace, Layout, c_strides

_VARIABLE = "NUMBA_CUDA_MEMORY_MANAGER"
#: numba makes managers by itself, without arguments of ours: the arenas of this process by CUDA's number.
_arenas: dict[int, DeviceArena] = {}


def install_numba(arenas: Sequence[DeviceArena]) -> None:
    """Make numba take memory of these arenas' devices from them; has to come before numba's first use of a device."""
    _arenas.clear()
    _arenas.update({ordinal_of(arena): arena for arena in arenas})
    os.environ[_VARIABLE] = __name__
    if "numba.cuda" in sys.modules:  # it has read the variable already
        from numba import cuda

        cuda.set_memory_manager(memory_manager())


def memory_manager() -> type:
    """Return the manager's class; numba makes one for each device that it uses."""
    from numba import cuda
    from numba.cuda.cudadrv import driver

    class ArenaMemoryManager(driver.GetIpcHandleMixin, cuda.HostOnlyCUDAMemoryManager):  # type: ignore[misc]
        """Device memory from the arena of the context's device; host memory as numba does it."""

        interface_version = 1

        def initialize(self) -> None:
            """Nothing to do: the arena was there before."""

        def memalloc(self, size: int) -> Any:
            number = int(self.context.device.id)
            if number not in _arenas:
                raise NoDeviceError(f"this process leases no memory of CUDA device {number}; it leases: {[*_arenas]}")
            block = _arenas[number].allocate(size)
            address = ctypes.c_void_p(block.address)
            return driver.MemoryPointer(weakref.proxy(self.context), address, size, owner=block)

        def get_memory_info(self) -> Any:
            free, total = _arenas[int(self.context.device.id)].device.memory_info()
            return cuda.MemoryInfo(free=free, total=total)

    return ArenaMemoryManager


def __getattr__(name: str) -> Any:
    # Looked up by numba, in the module that the variable names.
    if name == "_numba_memory_manager":
        return memory_manager()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class NumbaAdapter(CudaAdapter):
    """numba's `DeviceNDArray`; records are left to numba, since their fields have no name in NumPy's short form."""

    kind = "numba"

    def describe(self, array: Any) -> Description | None:
        dtype = array.dtype
        if dtype.kind not in "biufc":
            return None
        memory = array.gpu_data
        owner = getattr(memory, "owner", None)
        number = int(memory.context.device.id)
        address = int(array.__cuda_array_interface__["data"][0])
        strides = tuple(array.strides) if array.size else c_strides(tuple(array.shape), dtype.itemsize)
        block = owner if type(owner) is Block else None
        return Description(number, address, tuple(array.shape), strides, dtype.str, dtype.itemsize, block)

    def build(self, place: DevicePlace, layout: Layout) -> Any:
        from numba import cuda

        with cuda.gpus[ordinal_of(place.arena)]:
            if layout.is_empty:
                return cuda.device_array(layout.shape, layout.dtype)
            return cuda.from_cuda_array_interface(interface_at(place, layout, layout.dtype), owner=place)
