"""`cuda.runtime` of the emulated devices: CUDA's C functions, by addresses and handles.

Theory of operation. Device memory is host memory, so a copy is a copy of bytes; what is copied, and where to, is looked up in
this process's memory map first, since an address that is not there, or may not be written, would end the process where CUDA
reports an error. Memory, streams and events that are made here live until they are freed or destroyed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from afield.gpu_store.emulated_arrays.devices import ATTRIBUTES, Array, CUDARuntimeError, DeviceSet
from afield.gpu_store.emulated_arrays.streams import Event, StreamBase, found, get_elapsed_time

#: The CUDA whose names are emulated, in CUDA's own way of counting: 12.0.
CUDA_VERSION = 12000

#: CUDA's flags of streams and events, and its own handles.
FLAGS = {
    "streamDefault": 0,
    "streamNonBlocking": 1,
    "streamLegacy": 1,
    "streamPerThread": 2,
    "eventDefault": 0,
    "eventBlockingSync": 1,
    "eventDisableTiming": 2,
    "eventInterprocess": 4,
}

COPY_KINDS = {
    "memcpyHostToHost": 0,
    "memcpyHostToDevice": 1,
    "memcpyDeviceToHost": 2,
    "memcpyDeviceToDevice": 3,
    "memcpyDefault": 4,
}


def _refused(what: str) -> CUDARuntimeError:
    return CUDARuntimeError(f"cudaErrorInvalidValue: {what}")


def check_range(address: int, size: int, write: bool) -> None:
    """Raise CUDARuntimeError unless all these bytes are memory of this process that may be read, or written."""
    at, end = address, address + size
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights = line.split(maxsplit=2)[:2]
        low, high = (int(edge, 16) for edge in span.split("-"))
        if low <= at < high:
            if rights[1 if write else 0] == "-":
                break
            at = high
            if at >= end:
                return
    if size:
        raise _refused(f"{size} bytes at {address:#x} are no memory that may be {'written' if write else 'read'}")


class RuntimeCalls:
    """The functions, and what they made and nobody freed yet."""

    def __init__(self, devices: DeviceSet, streams: dict[str, Any]) -> None:
        self._devices = devices
        self._streams = streams
        self._memory: dict[int, Array] = {}
        self._made: dict[int, Any] = {}

    def names(self) -> dict[str, Any]:
        """By CUDA's names."""
        return {**self._of_devices(), **self._of_memory(), **self._of_streams(), **COPY_KINDS, **FLAGS} | {
            f"cudaDevAttr{name}": number for name, (number, _) in ATTRIBUTES.items()
        }

    # ---- devices ------------------------------------------------------------------------------------------------

    def _of_devices(self) -> dict[str, Any]:
        devices = self._devices
        by_number = dict(ATTRIBUTES.values())

        def get_device_properties(device: int) -> dict[str, Any]:
            memory = devices[device]
            return {
                "name": memory.name.encode(),
                "totalGlobalMem": memory.memory_bytes,
                "uuid": memory.uuid.encode(),
                "multiProcessorCount": 1,
                "major": 0,
                "minor": 0,
                "warpSize": 32,
                "maxThreadsPerBlock": 1024,
            }

        def get_attribute(attrib: int, device: int) -> int:
            devices[device]
            if attrib not in by_number:
                raise _refused(f"attribute {attrib} is not known of an emulated device")
            return by_number[attrib]

        return {
            "getDeviceCount": lambda: len(devices.devices),
            "getDevice": lambda: devices.current.id,
            "setDevice": lambda device: devices.handle_type(device).use(),
            "deviceSynchronize": lambda: None,
            "memGetInfo": lambda: devices.handle_type().mem_info,
            "getDeviceProperties": get_device_properties,
            "deviceGetAttribute": get_attribute,
            "deviceGetPCIBusId": lambda device: devices.handle_type(device).pci_bus_id,
            "deviceGetByPCIBusId": lambda bus_id: devices.handle_type.from_pci_bus_id(bus_id).id,
            "deviceCanAccessPeer": lambda device, peer: 0,
            "driverGetVersion": lambda: CUDA_VERSION,
            "runtimeGetVersion": lambda: CUDA_VERSION,
            "profilerStart": lambda: None,
            "profilerStop": lambda: None,
            "is_hip": False,
            "CUDARuntimeError": CUDARuntimeError,
        }

    # ---- memory -------------------------------------------------------------------------------------------------

    def _of_memory(self) -> dict[str, Callable[..., Any]]:
        def malloc(size: int) -> int:
            made = self._devices.current.empty((int(size),), np.uint8)
            address: int = made.__array_interface__["data"][0]
            if size:
                self._memory[address] = made
            return address if size else 0

        def free(ptr: int) -> None:
            if ptr and self._memory.pop(int(ptr), None) is None:
                raise _refused(f"{ptr:#x} was not allocated by malloc, or is free already")

        def memcpy(dst: int, src: int, size: int, kind: int) -> None:
            if kind not in COPY_KINDS.values():
                raise CUDARuntimeError(f"cudaErrorInvalidMemcpyDirection: {kind} is no direction of a copy")
            check_range(int(src), int(size), write=False)
            check_range(int(dst), int(size), write=True)
            self._devices.current.touch()
            ctypes.memmove(int(dst), int(src), int(size))

        def memset(ptr: int, value: int, size: int) -> None:
            check_range(int(ptr), int(size), write=True)
            self._devices.current.touch()
            ctypes.memset(int(ptr), int(value) & 0xFF, int(size))

        return {
            "malloc": malloc,
            "free": free,
            "mallocAsync": lambda size, stream: malloc(size),
            "freeAsync": lambda ptr, stream: free(ptr),
            "memcpy": memcpy,
            "memcpyAsync": lambda dst, src, size, kind, stream: memcpy(dst, src, size, kind),
            "memcpyPeer": lambda dst, dst_device, src, src_device, size: memcpy(dst, src, size, 3),
            "memcpyPeerAsync": lambda dst, dst_device, src, src_device, size, stream: memcpy(dst, src, size, 3),
            "memset": memset,
            "memsetAsync": lambda ptr, value, size, stream: memset(ptr, value, size),
        }

    # ---- streams and events -------------------------------------------------------------------------------------

    def _of_streams(self) -> dict[str, Any]:
        def keep(made: Any) -> int:
            self._made[made.ptr] = made
            handle: int = made.ptr
            return handle

        def destroy(handle: int) -> None:
            if self._made.pop(int(handle), None) is None:
                raise self._no_handle(handle)

        def create_stream(flags: int = 0, priority: int = 0) -> int:
            return keep(self._streams["Stream"](non_blocking=bool(flags & 1), priority=priority))

        def create_event(flags: int = 0) -> int:
            return keep(Event(disable_timing=bool(flags & 2)))

        def stream(handle: int, *_: Any) -> None:
            found(handle, StreamBase)

        def event(handle: int, *_: Any) -> Event:
            known: Event = found(handle, Event)
            return known

        def record(handle: int, stream_handle: int) -> None:
            stream(stream_handle)
            event(handle).record()

        def wait(stream_handle: int, handle: int, flags: int = 0) -> None:
            stream(stream_handle)
            event(handle)

        def done(handle: int) -> int:
            stream(handle)
            return 0

        def event_synchronize(handle: int) -> None:
            event(handle)

        def event_done(handle: int) -> int:
            event(handle)
            return 0

        return {
            "streamCreate": lambda: create_stream(),
            "streamCreateWithFlags": lambda flags: create_stream(flags),
            "streamCreateWithPriority": lambda flags, priority: create_stream(flags, priority),
            "streamDestroy": destroy,
            "streamSynchronize": stream,
            "streamQuery": done,
            "streamWaitEvent": wait,
            "eventCreate": lambda: create_event(),
            "eventCreateWithFlags": create_event,
            "eventDestroy": destroy,
            "eventRecord": record,
            "eventSynchronize": event_synchronize,
            "eventQuery": event_done,
            "eventElapsedTime": lambda start, end: get_elapsed_time(event(start), event(end)),
        }

    @staticmethod
    def _no_handle(handle: int) -> CUDARuntimeError:
        return CUDARuntimeError(
            f"cudaErrorInvalidResourceHandle: {handle:#x} was not created here, or is destroyed already"
        )
