"""`cuda` of the emulated array module: what pipelines touch, complete or refused.

Theory of operation. Devices, the current device, memory in use and limits are real: they are those of the `DeviceSet`.
Streams and events exist so that code which uses them runs; all work on emulated arrays is complete when the call returns,
so there is nothing to wait for here. (The device backend's streams, on which the store copies, are another matter.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from afield.clock import monotonic
from afield.errors import NoDeviceError, OutOfDeviceMemoryError
from afield.gpu_store.emulated_arrays.devices import DeviceMemory, DeviceSet


class Event:
    """A point in a stream; `get_elapsed_time` tells the milliseconds between two."""

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        self.at_s: float | None = None

    @property
    def done(self) -> bool:
        return True

    def record(self, stream: Any = None) -> None:
        self.at_s = monotonic()

    def synchronize(self) -> None:
        """Everything before the event is done already."""


class Stream:
    """An order of work; every piece of work is done at once."""

    null: ClassVar[Stream]
    ptds: ClassVar[Stream]
    ptr = 0

    def __init__(
        self, null: bool = False, non_blocking: bool = False, ptds: bool = False, priority: Any = None
    ) -> None:
        self.non_blocking = non_blocking

    @property
    def done(self) -> bool:
        return True

    def use(self) -> Stream:
        return self

    def synchronize(self) -> None:
        """Everything in the stream is done already."""

    def record(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        """Whatever the event stands for is done already."""

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


Stream.null = Stream(null=True)
Stream.ptds = Stream(ptds=True)


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    """Return the milliseconds between two recorded events."""
    if start_event.at_s is None or end_event.at_s is None:
        raise ValueError("both events must have been recorded")
    return (end_event.at_s - start_event.at_s) * 1e3


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

    def malloc(self, size: int) -> Any:
        raise NotImplementedError(
            "raw device memory cannot be allocated on an emulated device; use empty(n, dtype=uint8)"
        )


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


def runtime_names(devices: DeviceSet) -> dict[str, Any]:
    """`cuda.runtime`: the questions about devices, and waiting for them."""

    def get_device_properties(device: int) -> dict[str, Any]:
        memory = devices[device]
        return {
            "name": memory.name.encode(),
            "totalGlobalMem": memory.memory_bytes,
            "uuid": memory.uuid.encode(),
            "multiProcessorCount": 1,
            "major": 0,
            "minor": 0,
        }

    def mem_get_info() -> tuple[int, int]:
        return devices.handle_type().mem_info

    def get_device() -> int:
        return devices.current.id

    return {
        "getDeviceCount": lambda: len(devices.devices),
        "getDevice": get_device,
        "setDevice": lambda device: devices.handle_type(device).use(),
        "deviceSynchronize": lambda: None,
        "streamSynchronize": lambda stream: None,
        "memGetInfo": mem_get_info,
        "getDeviceProperties": get_device_properties,
        "deviceCanAccessPeer": lambda device, peer: 0,
        "is_hip": False,
        "CUDARuntimeError": NoDeviceError,
    }


def memory_names(devices: DeviceSet) -> dict[str, Any]:
    """`cuda.memory`."""
    pool = MemoryPool(devices)

    def make_pool(allocator: Any = None) -> MemoryPool:
        return MemoryPool(devices)

    return {
        "OutOfMemoryError": OutOfDeviceMemoryError,
        "MemoryPool": make_pool,
        "PinnedMemoryPool": PinnedMemoryPool,
        "set_allocator": set_allocator,
        "get_allocator": lambda: pool.malloc,
    }


def cuda_names(devices: DeviceSet) -> dict[str, Any]:
    """`cuda` itself, without its submodules."""
    return {
        **memory_names(devices),
        "Device": devices.handle_type,
        "Event": Event,
        "Stream": Stream,
        "get_current_stream": lambda device_id=-1: Stream.null,
        "get_device_id": lambda: devices.current.id,
        "get_elapsed_time": get_elapsed_time,
        "is_available": lambda: True,
        "set_pinned_memory_allocator": set_allocator,
    }
