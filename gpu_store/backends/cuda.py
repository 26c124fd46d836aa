"""CUDA devices: `base` over the CUDA runtime (through CuPy) and NVML (through pynvml).

Theory of operation. This is the one file that imports CuPy and pynvml, and it does so when a backend is asked for, or pynvml
alone when only the inventory is (`find_devices`); where they, the driver or a device are missing, that is NoDeviceError with
the remedy. Importing the file is free.

What can be known without starting a device (inventory, links, health) comes from NVML, which lists devices in another order
than CUDA and sees those that CUDA_VISIBLE_DEVICES hides. So devices are named by UUID, and `open` finds CUDA's number for
one by its PCI address. Slabs are plain `cudaMalloc` memory, the only kind that legacy IPC can export; a handle stands for a
whole slab. Every call makes its device current for the thread and puts back what was current before: the thread is the
user's.

The driver counts no lives. The epoch of a device begins with what the runtime hands in and grows in this backend when
NVML or a failed call says that the device is lost, or on `reset`; a hardware reset is the administrator's, and needs the
device unused. A sticky error is remembered for the process: its context stays broken whatever is closed and opened.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from afield.errors import AfieldError, DeviceLostError, NoDeviceError, OutOfDeviceMemoryError
from afield.gpu_store.backends import base, health, nvml
from afield.gpu_store.backends.base import (
    DeviceCallError,
    DeviceInfo,
    DeviceUsageError,
    HealthEvent,
    Link,
    PoisonedContextError,
    Slab,
    SlabExport,
    SlabImportError,
    Stream,
)
from afield.gpu_store.backends.cuda_streams import CudaStream
from afield.gpu_store.backends.health import Verdict
from afield.gpu_store.backends.opened import OpenDevices

_PEER_ACCESS_ALREADY_ENABLED = 704
_USAGE_CODES = {712: "this host memory is page-locked already", 713: "this host memory is not page-locked"}
#: Pinned for the contexts of all devices.
_HOST_REGISTER_PORTABLE = 1

_REMEDY = (
    "install afield[cuda12] or afield[cuda13] on a machine with an NVIDIA driver, or use emulated devices: "
    'devices="emulated:2" or AFIELD_DEVICES=emulated:2'
)


@dataclass(frozen=True, slots=True)
class Libraries:
    """The modules that this backend drives; a test hands in its own."""

    runtime: Any  # cupy.cuda.runtime
    nvml: Any  # pynvml


def load_libraries() -> Libraries:
    """Import CuPy and pynvml and start NVML; raises NoDeviceError with the remedy where that cannot be."""
    try:
        from cupy.cuda import runtime
    except Exception as error:  # CuPy raises more than ImportError where CUDA's libraries are missing or do not fit
        raise NoDeviceError(f"CUDA devices need CuPy ({error}): {_REMEDY}") from error
    return Libraries(runtime, _load_nvml())


def _load_nvml() -> Any:
    try:
        import pynvml
    except ImportError as error:
        raise NoDeviceError(f"CUDA devices need nvidia-ml-py ({error}): {_REMEDY}") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NoDeviceError(f"there is no NVIDIA driver here ({error}): {_REMEDY}") from error
    return pynvml


def find_devices() -> list[DeviceInfo]:
    """Return the machine's CUDA devices in the order of the PCI bus, by NVML alone: CUDA is not started, CuPy not imported.

    Raises NoDeviceError where a package, the driver or any device is missing.
    """
    library = _load_nvml()
    try:
        infos = nvml.Nvml(library).inventory()
    finally:
        library.nvmlShutdown()
    if not infos:
        raise NoDeviceError(f"the NVIDIA driver knows no device here: {_REMEDY}")
    if find_spec("cupy") is None:
        raise NoDeviceError(f"there are {len(infos)} CUDA devices, but CuPy is not installed: {_REMEDY}")
    return infos


@dataclass(slots=True, eq=False)
class CudaSlab(Slab):
    """A slab; `ordinal` is CUDA's number of its device in this process."""

    ordinal: int


class CudaBackend:
    """The CUDA devices of this machine; see `base.DeviceBackend`."""

    def __init__(self, libraries: Libraries | None = None, epochs: Mapping[str, int] | None = None) -> None:
        """Find the devices; `epochs` are the lives that the runtime knows of, 1 for a device that is not in it.

        Raises NoDeviceError where CuPy, pynvml, the driver or any device is missing.
        """
        self.libraries = libraries or load_libraries()
        self._pid = os.getpid()
        self._nvml = nvml.Nvml(self.libraries.nvml)
        self._infos = self._nvml.inventory()
        if not self._infos:
            raise NoDeviceError(f"the NVIDIA driver knows no device here: {_REMEDY}")
        self._epochs = {info.uuid: (epochs or {}).get(info.uuid, 1) for info in self._infos}
        self._lost: dict[str, str] = {}
        self._opened: OpenDevices[CudaDevice] = OpenDevices()
        self.poisoned: dict[tuple[str, int], str] = {}

    def inventory(self) -> Sequence[DeviceInfo]:
        return self._infos

    def links(self) -> Sequence[Link]:
        return self._nvml.links(self._infos)

    def epoch(self, uuid: str) -> int:
        return self._epochs[self._info(uuid).uuid]

    def open(self, uuid: str) -> CudaDevice:
        self.check_process()
        info = self._info(uuid)
        with self._opened.lock:
            epoch = self._epochs[uuid]
            self.check_life(uuid, epoch)
            return self._opened.get(uuid, epoch, lambda: CudaDevice(self, info, epoch, self._ordinal(info)))

    def reset(self, uuid: str) -> None:
        self._info(uuid)
        with self._opened.lock:
            if (uuid, self._epochs[uuid]) in self.poisoned:
                raise PoisonedContextError(f"device {uuid}: a broken context is mended by the end of its process only")
            self._nvml.check_alive(uuid)
            self._opened.close(uuid)
            self._lost.pop(uuid, None)
            self._epochs[uuid] += 1

    def poll_health(self) -> list[HealthEvent]:
        news = self._nvml.poll(self._epochs)
        for event in news:
            if event.fatal:
                self.lose(event.device_uuid, event.text)
        return news

    def close(self) -> None:
        self._opened.close()
        self._nvml.close()

    def lose(self, uuid: str, cause: str) -> None:
        """End a device's life, once: whatever more is heard about a lost device changes nothing."""
        with self._opened.lock:
            if uuid not in self._lost:
                self._lost[uuid] = cause
                self._epochs[uuid] += 1

    def check_life(self, uuid: str, epoch: int) -> None:
        """Raise DeviceLostError or StaleEpochError unless the device is in this epoch and alive."""
        if uuid in self._lost:
            raise DeviceLostError(f"device {uuid} is gone, and its memory with it: {self._lost[uuid]}")
        if self._epochs[uuid] != epoch:
            raise base.stale(uuid, epoch, self._epochs[uuid])

    def check_process(self) -> None:
        """Raise DeviceUsageError in a child of the process that made the backend."""
        base.check_process(self._pid)

    def holders(self, uuid: str) -> list[tuple[str, int]]:
        """Return (process, bytes) as far as the driver tells."""
        return self._nvml.holders(uuid)

    def _info(self, uuid: str) -> DeviceInfo:
        for info in self._infos:
            if info.uuid == uuid:
                return info
        raise base.unknown_device(uuid, [info.uuid for info in self._infos])

    def _ordinal(self, info: DeviceInfo) -> int:
        runtime = self.libraries.runtime
        try:
            return int(runtime.deviceGetByPCIBusId(info.pci_address))
        except runtime.CUDARuntimeError as error:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            raise NoDeviceError(
                f"CUDA does not show device {info.uuid} to this process ({error}); CUDA_VISIBLE_DEVICES is {visible!r}"
            ) from error


class CudaDevice:
    """One life of a CUDA device in this process; see `base.Device`."""

    def __init__(self, backend: CudaBackend, info: DeviceInfo, epoch: int, ordinal: int) -> None:
        self.info = info
        self.epoch = epoch
        self.closed = False
        self.runtime = backend.libraries.runtime
        self._backend = backend
        self._ordinal = ordinal
        self._lock = threading.Lock()
        self._slabs: set[CudaSlab] = set()
        self._exported: set[bytes] = set()
        self._streams: set[CudaStream] = set()
        self._peers: set[int] = set()

    # ---- slabs -------------------------------------------------------------------------------------------------

    def allocate_slab(self, size_bytes: int) -> CudaSlab:
        base.check_slab_size(size_bytes)
        try:
            return self._keep(size_bytes, self.call(self.runtime.malloc, size_bytes), imported=False)
        except _NoRoomError as error:
            free, total = self.memory_info()
            holders = self._backend.holders(self.info.uuid)
            text = base.out_of_memory(self.info, size_bytes, free, total, holders)
            raise OutOfDeviceMemoryError(text) from error

    def free_slab(self, slab: Slab) -> None:
        mine = base.own(slab, CudaSlab, self.info)
        if mine.epoch == self._backend.epoch(self.info.uuid):
            self._usable(slab)
            self.call(self.runtime.deviceSynchronize)
            self.call(self.runtime.ipcCloseMemHandle if mine.imported else self.runtime.free, mine.address)
        mine.mapped = False
        with self._lock:
            self._slabs.discard(mine)

    def export_slab(self, slab: Slab) -> SlabExport:
        mine = self._usable(slab)
        base.check_exportable(mine)
        handle = bytes(self.call(self.runtime.ipcGetMemHandle, mine.address))
        self._exported.add(handle)
        return SlabExport(self.info.uuid, self.epoch, mine.size_bytes, handle)

    def import_slab(self, export: SlabExport) -> CudaSlab:
        self.check()
        base.check_export(export, self.info, self.epoch)
        base.check_foreign(export.handle in self._exported)
        try:
            address = self.call(self.runtime.ipcOpenMemHandle, export.handle)
        except (DeviceCallError, _NoRoomError) as error:
            raise SlabImportError(f"a slab of device {self.info.uuid} cannot be mapped: {error}") from error
        return self._keep(export.size_bytes, address, imported=True)

    def _keep(self, size_bytes: int, address: int, *, imported: bool) -> CudaSlab:
        slab = CudaSlab(self.info.uuid, self.epoch, size_bytes, int(address), imported, True, self._ordinal)
        with self._lock:
            self._slabs.add(slab)
        return slab

    # ---- copies ------------------------------------------------------------------------------------------------

    def copy_to_host(self, slab: Slab, offset: int, target: memoryview, stream: Stream) -> None:
        base.check_host(target, writable=True)
        source = self._range(slab, offset, target.nbytes)
        self._copy_host(_address(target), source, target, self.runtime.memcpyDeviceToHost, stream)

    def copy_from_host(self, slab: Slab, offset: int, source: memoryview, stream: Stream) -> None:
        base.check_host(source, writable=False)
        target = self._range(slab, offset, source.nbytes)
        self._copy_host(target, _address(source), source, self.runtime.memcpyHostToDevice, stream)

    def _copy_host(self, target: int, source: int, memory: memoryview, kind: int, stream: Stream) -> None:
        mine = self._stream(stream)
        if memory.nbytes:
            self.call(self.runtime.memcpyAsync, target, source, memory.nbytes, kind, mine.handle)
            mine.hold(memory)

    def copy_within(
        self, source: Slab, source_offset: int, target: Slab, target_offset: int, size_bytes: int, stream: Stream
    ) -> None:
        from_address = self._range(source, source_offset, size_bytes)
        to_address = self._range(target, target_offset, size_bytes)
        base.check_apart(source, source_offset, target, target_offset, size_bytes)
        mine, kind = self._stream(stream), self.runtime.memcpyDeviceToDevice
        if size_bytes:
            self.call(self.runtime.memcpyAsync, to_address, from_address, size_bytes, kind, mine.handle)

    def copy_from_peer(
        self, slab: Slab, offset: int, peer: Slab, peer_offset: int, size_bytes: int, stream: Stream
    ) -> None:
        target = self._range(slab, offset, size_bytes)
        theirs = base.peer_of(peer, CudaSlab, self.info)
        other = self._backend.open(theirs.device_uuid)
        base.check_slab(theirs, other.info, other.epoch)
        base.check_range(theirs, peer_offset, size_bytes)
        mine = self._stream(stream)
        self._enable_peer(theirs.ordinal)
        if size_bytes:
            source = theirs.address + peer_offset
            copy = self.runtime.memcpyPeerAsync
            self.call(copy, target, self._ordinal, source, theirs.ordinal, size_bytes, mine.handle)

    def _enable_peer(self, ordinal: int) -> None:
        """Let copies from a peer take the direct way where there is one; without it the driver goes through the host."""
        if ordinal in self._peers:
            return
        if self.call(self.runtime.deviceCanAccessPeer, self._ordinal, ordinal):
            try:
                self.call(self.runtime.deviceEnablePeerAccess, ordinal)
            except DeviceCallError as error:
                if error.code != _PEER_ACCESS_ALREADY_ENABLED:
                    raise
        self._peers.add(ordinal)

    # ---- streams, and the rest ---------------------------------------------------------------------------------

    def new_stream(self) -> CudaStream:
        handle = self.call(self.runtime.streamCreateWithFlags, self.runtime.streamNonBlocking)
        stream = CudaStream(self, handle)
        with self._lock:
            self._streams = {one for one in self._streams if not one.closed} | {stream}
        return stream

    def synchronize(self) -> None:
        self.call(self.runtime.deviceSynchronize)

    def memory_info(self) -> tuple[int, int]:
        free, total = self.call(self.runtime.memGetInfo)
        return int(free), int(total)

    def pin_host(self, memory: memoryview) -> None:
        base.check_host(memory, writable=False)
        self.call(self.runtime.hostRegister, _address(memory), memory.nbytes, _HOST_REGISTER_PORTABLE)

    def unpin_host(self, memory: memoryview) -> None:
        self.call(self.runtime.hostUnregister, _address(memory))

    def close(self) -> None:
        if self.closed:
            return
        for stream in list(self._streams):
            stream.close()
        for slab in list(self._slabs):
            with suppress(AfieldError):  # the context is broken or the device gone: the driver takes it all back
                self.free_slab(slab)
        self.closed = True

    # ---- what every call passes --------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise what stands against any call on this device."""
        self._backend.check_process()
        self._backend.check_life(self.info.uuid, self.epoch)
        cause = self._backend.poisoned.get((self.info.uuid, self.epoch))
        if cause is not None:
            raise PoisonedContextError(cause)
        if self.closed:
            raise DeviceUsageError(f"device {self.info.uuid} was used after it was closed")

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call the CUDA runtime with this device current; errors are translated."""
        self.check()
        with self._current():
            try:
                return function(*args)
            except self.runtime.CUDARuntimeError as error:
                raise self.translate(int(error.status), str(error)) from error

    @contextmanager
    def _current(self) -> Iterator[None]:
        before = self.runtime.getDevice()
        if before == self._ordinal:
            yield
            return
        self.runtime.setDevice(self._ordinal)
        try:
            yield
        finally:
            self.runtime.setDevice(before)

    def translate(self, code: int, text: str) -> AfieldError:
        """Return the error for a failed call, and remember what it means for later ones."""
        what = f"device {self.info.uuid} ({self.info.name}): {text}"
        verdict, meaning = health.judge_code(code)
        if verdict is Verdict.PROCESS:
            cause = f"{what}: {meaning}; this process can do nothing more on the device"
            self._backend.poisoned.setdefault((self.info.uuid, self.epoch), cause)
            return PoisonedContextError(cause)
        if verdict is Verdict.DEVICE:
            self._backend.lose(self.info.uuid, meaning)
            return DeviceLostError(f"{what}: {meaning}; its memory is gone")
        if code == health.OUT_OF_MEMORY_CODE:
            return _NoRoomError(what)
        if code in health.NO_DEVICE_CODES:
            return NoDeviceError(f"{what}: {health.NO_DEVICE_CODES[code]}: {_REMEDY}")
        if code in _USAGE_CODES:
            return DeviceUsageError(_USAGE_CODES[code])
        error = DeviceCallError(what)
        error.code = code
        return error

    def _usable(self, slab: Slab) -> CudaSlab:
        self.check()
        mine = base.own(slab, CudaSlab, self.info)
        base.check_slab(mine, self.info, self.epoch)
        return mine

    def _range(self, slab: Slab, offset: int, size_bytes: int) -> int:
        mine = self._usable(slab)
        base.check_range(mine, offset, size_bytes)
        return mine.address + offset

    def _stream(self, stream: Stream) -> CudaStream:
        if not isinstance(stream, CudaStream) or stream.device is not self:
            raise DeviceUsageError(f"a copy of device {self.info.uuid} was put into a stream of something else")
        stream.check_open()
        return stream


class _NoRoomError(OutOfDeviceMemoryError):
    """A call found no room; `allocate_slab` adds the arithmetic."""


def _address(memory: memoryview) -> int:
    address: int = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
    return address
