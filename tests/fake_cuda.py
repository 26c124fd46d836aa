"""A CUDA runtime and an NVML that are not there: enough of both to run gpu_store/backends/cuda.py where no GPU is.

Theory of operation. `cuda.py` is handed the two modules it drives; these objects have the functions it calls, with CuPy's and
pynvml's signatures. Device memory is a memory file, so that its "IPC handle" works between processes. Streams do their work
at once: what is tested here is what `cuda.py` says to the driver and what it makes of the answers, not the driver.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from types import SimpleNamespace
from typing import Any

from afield.gpu_store.backends.cuda import Libraries

GIB = 2**30


class CUDARuntimeError(RuntimeError):
    """As CuPy's."""

    def __init__(self, status: int) -> None:
        super().__init__(f"cuda error {status}")
        self.status = status


class NVMLError(Exception):
    """As pynvml's."""

    def __init__(self, value: int) -> None:
        super().__init__(f"nvml error {value}")
        self.value = value


class FakeRuntime:
    """`cupy.cuda.runtime` for devices that CUDA numbers in the reverse of NVML's order."""

    CUDARuntimeError = CUDARuntimeError
    memcpyHostToDevice, memcpyDeviceToHost, memcpyDeviceToDevice = 1, 2, 3  # noqa: N815
    streamNonBlocking, eventDisableTiming = 1, 2  # noqa: N815

    def __init__(self, count: int, memory_bytes: int) -> None:
        self.count = count
        self.memory_bytes = memory_bytes
        self.current = 0
        self.fail_next: int = 0  # the status of the next call
        self.calls: list[str] = []
        self._memory: dict[
            int, tuple[mmap.mmap, int, int]
        ] = {}  # address -> (memory, its descriptor, device; -1 of others)
        self._pinned: set[int] = set()
        self._peers: set[tuple[int, int]] = set()
        self._next = 1

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name.startswith("_") or name in ("getDevice", "setDevice", "CUDARuntimeError") or not callable(value):
            return value

        def call(*args: Any) -> Any:
            self.calls.append(name)
            if self.fail_next:
                status, self.fail_next = self.fail_next, 0
                raise CUDARuntimeError(status)
            return value(*args)

        return call

    def getDevice(self) -> int:  # noqa: N802
        return self.current

    def setDevice(self, device: int) -> None:  # noqa: N802
        self.current = device

    def deviceGetByPCIBusId(self, address: str) -> int:  # noqa: N802
        number = self.count - 1 - int(address[5:7], 16)
        if number < 0:
            raise CUDARuntimeError(101)
        return number

    def _map(self, fd: int, device: int) -> int:
        memory = mmap.mmap(fd, os.fstat(fd).st_size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._memory[address] = (memory, fd, device)
        return address

    def malloc(self, size: int) -> int:
        if self.memGetInfo()[0] < size:
            raise CUDARuntimeError(2)
        fd = os.memfd_create("fake-cuda")
        os.ftruncate(fd, size)
        return self._map(fd, self.current)

    def free(self, address: int) -> None:
        _, fd, _ = self._memory.pop(address)
        os.close(fd)

    def memGetInfo(self) -> tuple[int, int]:  # noqa: N802
        used = sum(len(memory) for memory, _, device in self._memory.values() if device == self.current)
        return self.memory_bytes - used, self.memory_bytes

    def ipcGetMemHandle(self, address: int) -> bytes:  # noqa: N802
        return struct.pack("<QQ", os.getpid(), self._memory[address][1]).ljust(64, b"\0")

    def ipcOpenMemHandle(self, handle: bytes) -> int:  # noqa: N802
        pid, fd = struct.unpack_from("<QQ", handle)
        try:
            return self._map(os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR), -1)
        except OSError:
            raise CUDARuntimeError(201) from None

    ipcCloseMemHandle = free  # noqa: N815

    def memcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> None:  # noqa: N802
        ctypes.memmove(target, source, size)

    def memcpyPeerAsync(self, target: int, to: int, source: int, of: int, size: int, stream: int) -> None:  # noqa: N802
        assert to == self.current != of
        ctypes.memmove(target, source, size)

    def deviceCanAccessPeer(self, device: int, peer: int) -> int:  # noqa: N802
        return 1

    def deviceEnablePeerAccess(self, peer: int) -> None:  # noqa: N802
        if (self.current, peer) in self._peers:
            raise CUDARuntimeError(704)
        self._peers.add((self.current, peer))

    def hostRegister(self, address: int, size: int, flags: int) -> None:  # noqa: N802
        if address in self._pinned:
            raise CUDARuntimeError(712)
        self._pinned.add(address)

    def hostUnregister(self, address: int) -> None:  # noqa: N802
        if address not in self._pinned:
            raise CUDARuntimeError(713)
        self._pinned.discard(address)

    def _new(self, flags: int) -> int:
        self._next += 1
        return self._next

    def streamCreateWithFlags(self, flags: int) -> int:  # noqa: N802
        return self._new(flags)

    def eventCreateWithFlags(self, flags: int) -> int:  # noqa: N802
        return self._new(flags)

    def eventQuery(self, event: int) -> int:  # noqa: N802
        return 0

    def _nothing(self, *args: int) -> None:
        """Everything has happened already."""

    deviceSynchronize = streamSynchronize = streamDestroy = streamWaitEvent = _nothing  # noqa: N815
    eventRecord = eventSynchronize = eventDestroy = _nothing  # noqa: N815


class FakeNvml:
    """`pynvml` for as many devices, whose handles are their numbers."""

    NVMLError = NVMLError
    NVML_NVLINK_MAX_LINKS = 18

    def __init__(self, count: int, memory_bytes: int) -> None:
        self.count = count
        self.memory_bytes = memory_bytes
        self.events: list[Any] = []  # what the next waits give: (device, type, data), or the code of an error
        self.lost: set[int] = set()
        self.recovery_action = 0
        self.listening = 0

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index in self.lost:
            raise NVMLError(15)
        return index

    def nvmlDeviceGetPciInfo(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(busId=f"00000000:{handle:02X}:00.0")

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return f"GPU-{handle:04d}"

    def nvmlDeviceGetName(self, handle: int) -> bytes:  # noqa: N802
        return b"Fake GPU"  # older versions of pynvml give bytes

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        if handle in self.lost:
            raise NVMLError(15)
        return SimpleNamespace(total=self.memory_bytes)

    def nvmlDeviceGetP2PStatus(self, first: int, second: int, what: int) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: int) -> int:  # noqa: N802
        return 5

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: int) -> int:  # noqa: N802
        raise NVMLError(3)

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:  # noqa: N802
        return int(link < 6)

    def nvmlDeviceGetNvLinkVersion(self, handle: int, link: int) -> int:  # noqa: N802
        return 4

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: int, link: int) -> Any:  # noqa: N802
        if link >= 4:
            raise NVMLError(3)
        return SimpleNamespace(busId=b"00000000:%02X:00.0" % (1 - handle))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=12, usedGpuMemory=2**20), SimpleNamespace(pid=13, usedGpuMemory=None)]

    def nvmlEventSetCreate(self) -> object:  # noqa: N802
        self.listening += 1
        return object()

    def nvmlEventSetFree(self, events: object) -> None:  # noqa: N802
        self.listening -= 1

    def nvmlDeviceGetSupportedEventTypes(self, handle: int) -> int:  # noqa: N802
        return 0x8

    def nvmlDeviceRegisterEvents(self, handle: int, mask: int, events: object) -> None:  # noqa: N802
        assert mask == 0x8

    def nvmlEventSetWait_v2(self, events: object, timeout_ms: int) -> Any:  # noqa: N802
        assert timeout_ms == 0
        event = self.events.pop(0) if self.events else 10
        if isinstance(event, int):
            raise NVMLError(event)
        return SimpleNamespace(device=event[0], eventType=event[1], eventData=event[2])

    def nvmlDeviceGetFieldValues(self, handle: int, fields: list[int]) -> list[Any]:  # noqa: N802
        assert fields == [230]
        return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=self.recovery_action))]


def libraries(count: int = 2, memory_bytes: int = GIB) -> Libraries:
    """Return the two modules for `CudaBackend(libraries=...)`."""
    return Libraries(FakeRuntime(count, memory_bytes), FakeNvml(count, memory_bytes))
