"""`cuda` of the emulated array module: what pipelines touch, complete or refused.

Theory of operation. Devices, the current device, memory in use and limits are real: they are those of the `DeviceSet`.
Streams, events and the calls of `cuda.runtime` are in modules of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from afield.gpu_store.emulated_arrays.devices import DeviceMemory, DeviceSet
from afield.gpu_store.emulated_arrays.pointers import BaseMemory, MemoryPointer, allocated, unowned
from afield.gpu_store.emulated_arrays.runtime_calls import CUDA_VERSION


class MemoryPool:
    """The memory pool of the current device; nothing is cached, so what is not used is free."""

    def __init__(self, devices: DeviceSet) -> None:
        self._devices = devices

    @property
    def _memory(self) -> DeviceMemory:
        return self._devices.current

    def used_bytes(self) -> int:
        return self._memory.account.used_bytes

    def total_bytes(self) -> int:
        return self.used_bytes()

    def free_bytes(self) -> int:
        return 0

    def n_free_blocks(self) -> int:
        return 0

    def free_all_blocks(self, stream: Any = None) -> None:
        """There are no cached blocks."""

    def set_limit(self, size: int | None = None, fraction: float | None = None) -> None:
        """Limit the current device's arrays to so many bytes, or to a fraction of its memory; 0 takes the limit away."""
        total = self._memory.memory_bytes
        if (size is None) == (fraction is None):
            raise ValueError("set_limit takes either size or fraction")
        limit = int(total * fraction) if fraction is not None else int(size or 0)
        self._memory.account.limit_bytes = limit or self._memory.limit_bytes

    def get_limit(self) -> int:
        limit = self._memory.account.limit_bytes
        return 0 if limit == self._memory.limit_bytes else limit

    def malloc(self, size: int) -> MemoryPointer:
        """Return memory of the current device; raises OutOfDeviceMemoryError."""
        return allocated(size, self._memory)

    def free_all_free(self) -> None:
        """There are no cached blocks."""


class PinnedMemoryPool:
    """Page-locked host memory; an emulated device has no use for it."""

    def n_free_blocks(self) -> int:
        return 0

    def free_all_blocks(self) -> None:
        """There are no cached blocks."""

    def malloc(self, size: int) -> Any:
        raise NotImplementedError("page-locked memory is not emulated; use numpy.empty")


def set_allocator(allocator: Callable[..., Any] | None = None) -> None:
    """Accept the allocators that there are; raises NotImplementedError for any other."""
    pool = getattr(allocator, "__self__", None)
    if allocator is not None and not isinstance(pool, MemoryPool | PinnedMemoryPool):
        raise NotImplementedError("emulated arrays take their memory from their device's allocator and from no other")


def memory_names(devices: DeviceSet) -> dict[str, Any]:
    """What `cuda` and `cuda.memory` share."""
    pool = MemoryPool(devices)

    def make_pool(allocator: Any = None) -> MemoryPool:
        return MemoryPool(devices)

    def unowned_memory(ptr: int, size: int, owner: object, device_id: int = -1) -> BaseMemory:
        return unowned(ptr, size, owner, devices.current if device_id < 0 else devices[device_id])

    return {
        "MemoryPool": make_pool,
        "MemoryPointer": MemoryPointer,
        "BaseMemory": BaseMemory,
        "UnownedMemory": unowned_memory,
        "alloc": pool.malloc,
        "set_allocator": set_allocator,
        "get_allocator": lambda: pool.malloc,
    }


def cuda_names(devices: DeviceSet, streams: dict[str, Any]) -> dict[str, Any]:
    """`cuda` itself, without its submodules."""
    return {
        **memory_names(devices),
        **streams,
        "PinnedMemoryPool": PinnedMemoryPool,
        "Device": devices.handle_type,
        "get_device_id": lambda: devices.current.id,
        "get_local_runtime_version": lambda: CUDA_VERSION,
        "is_available": lambda: True,
        "set_pinned_memory_allocator": set_allocator,
    }
