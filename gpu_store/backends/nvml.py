"""What NVML tells about CUDA devices without starting them: inventory, links, health.

Theory of operation. `Nvml` is handed the module `pynvml` (only `cuda.py` imports it) and asks it about devices by handle.
Much that can be asked is not answered everywhere (virtual machines, older boards, missing rights): such a question has a
default. That a device is lost is told by the inventory, which leaves it out, and by `poll`, not by an error of a question
about its links.

Health comes as events of one event set that covers all devices, polled without blocking. `classify` turns one into a
`HealthEvent`; it is a function of plain numbers. If waiting itself fails, no news is no longer good news: every device
becomes suspect and is asked directly whether it still answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from afield.errors import DeviceLostError
from afield.gpu_store.backends import health
from afield.gpu_store.backends.base import HOST, DeviceCallError, DeviceInfo, HealthEvent, Link
from afield.gpu_store.backends.health import Verdict

#: NVML's bits for kinds of events.
XID = 0x8
DOUBLE_BIT_ECC = 0x2
FATAL_POISON = 0x2000
UNAVAILABLE = 0x4000
RECOVERY_ACTION = 0x8000
EVENTS = XID | DOUBLE_BIT_ECC | FATAL_POISON | UNAVAILABLE | RECOVERY_ACTION

_FIELD_RECOVERY_ACTION = 230
_TIMEOUT = 10
# Written here because pynvml 13 has the first of them as a tuple.
_P2P_READ, _P2P_NVLINK, _P2P_OK = 0, 2, 0
_ACTIVE = 1

#: A storm of events must not keep the poller from its other work; the rest comes with the next poll.
MAX_EVENTS_PER_POLL = 64

#: Payload of one lane and direction, in bytes per second, by PCIe generation.
_PCIE_LANE = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
#: One NVLink and direction, by NVLink generation; 25 GB/s where it is not known.
_NVLINK = {1: 20e9, 5: 50e9}
_NVLINK_USUAL = 25e9


def classify(event_type: int, data: int, uuid: str, epoch: int) -> HealthEvent:
    """Return what an NVML event means; `data` is the Xid, or for RECOVERY_ACTION the action that is asked for."""
    if event_type & XID:
        verdict, meaning = health.judge_xid(data)
        return HealthEvent(uuid, epoch, "xid", data, verdict is Verdict.DEVICE, f"Xid {data}: {meaning}")
    if event_type & (DOUBLE_BIT_ECC | FATAL_POISON):
        text = "double-bit ECC error" if event_type & DOUBLE_BIT_ECC else "fatal poison error"
        return HealthEvent(uuid, epoch, "ecc", event_type, True, text)
    if event_type & UNAVAILABLE:
        return HealthEvent(uuid, epoch, "lost", event_type, True, "the driver says that the device is unavailable")
    if event_type & RECOVERY_ACTION:
        verdict, meaning = health.judge_recovery(data)
        return HealthEvent(uuid, epoch, "recovery", data, verdict is Verdict.DEVICE, f"the driver wants: {meaning}")
    return HealthEvent(uuid, epoch, "suspect", event_type, False, f"an event of an unknown kind ({event_type:#x})")


class Nvml:
    """Questions to NVML, which has been started."""

    def __init__(self, library: Any) -> None:
        self._nvml = library
        self._handles: dict[str, Any] = {}
        self._events: Any = None

    def inventory(self) -> list[DeviceInfo]:
        """Return the devices in NVML's order, that of the PCI bus."""
        nvml = self._nvml
        found = []
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                address = pci_address(_text(nvml.nvmlDeviceGetPciInfo(handle).busId))
                uuid, name = _text(nvml.nvmlDeviceGetUUID(handle)), _text(nvml.nvmlDeviceGetName(handle))
                total = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
            except nvml.NVMLError as error:
                if _is_loss(error):  # the others are as good as ever
                    continue
                raise DeviceCallError(f"NVML does not describe device {index}: {error}") from error
            found.append(DeviceInfo(uuid, index, name, total, "cuda", address, numa_node(address)))
            self._handles[uuid] = handle
        return found

    def links(self, infos: Sequence[DeviceInfo]) -> list[Link]:
        """Return the links with their nominal bandwidths."""
        return list(self._links(infos))

    def _links(self, infos: Sequence[DeviceInfo]) -> Iterator[Link]:
        for info in infos:
            bandwidth = self._pcie_bandwidth(info)
            yield Link(HOST, info.uuid, "host", bandwidth)
            yield Link(info.uuid, HOST, "host", bandwidth)
            for other in infos:
                if other is not info:
                    yield self._peer_link(info, other)

    def _peer_link(self, source: DeviceInfo, target: DeviceInfo) -> Link:
        pcie = min(self._pcie_bandwidth(source), self._pcie_bandwidth(target))
        if self._p2p(source, target, _P2P_NVLINK):
            return Link(source.uuid, target.uuid, "nvlink", self._nvlink_bandwidth(source, target) or pcie)
        kind = "pcie" if self._p2p(source, target, _P2P_READ) else "host"
        return Link(source.uuid, target.uuid, kind, pcie)

    def _p2p(self, source: DeviceInfo, target: DeviceInfo, what: int) -> bool:
        handles = self._handles[source.uuid], self._handles[target.uuid]
        return bool(self._ask(None, self._nvml.nvmlDeviceGetP2PStatus, *handles, what) == _P2P_OK)

    def _pcie_bandwidth(self, info: DeviceInfo) -> float:
        handle = self._handles[info.uuid]
        generation = int(self._ask(4, self._nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle))
        width = int(self._ask(16, self._nvml.nvmlDeviceGetMaxPcieLinkWidth, handle))
        return _PCIE_LANE.get(generation, _PCIE_LANE[max(_PCIE_LANE)]) * width

    def _nvlink_bandwidth(self, source: DeviceInfo, target: DeviceInfo) -> float:
        """Sum the links that end at `target`, or all of them where they end at a switch; 0 where NVML does not tell."""
        handle = self._handles[source.uuid]
        direct = others = 0.0
        for number in range(self._nvml.NVML_NVLINK_MAX_LINKS):
            if self._ask(0, self._nvml.nvmlDeviceGetNvLinkState, handle, number) != _ACTIVE:
                continue
            version = int(self._ask(0, self._nvml.nvmlDeviceGetNvLinkVersion, handle, number))
            end = self._ask(None, self._nvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, number)
            if end is not None and pci_address(_text(end.busId)) == target.pci_address:
                direct += _NVLINK.get(version, _NVLINK_USUAL)
            else:
                others += _NVLINK.get(version, _NVLINK_USUAL)
        return direct or others

    def holders(self, uuid: str) -> list[tuple[str, int]]:
        """Return (process, bytes) of those that use the device, as far as the driver tells."""
        running = self._ask((), self._nvml.nvmlDeviceGetComputeRunningProcesses, self._handles[uuid])
        return [(f"process {one.pid}", int(one.usedGpuMemory)) for one in running if one.usedGpuMemory]

    def check_alive(self, uuid: str) -> None:
        """Raise DeviceLostError unless the device answers."""
        try:
            self._nvml.nvmlDeviceGetMemoryInfo(self._handles[uuid])
        except self._nvml.NVMLError as error:
            raise DeviceLostError(f"device {uuid} does not answer: {error}") from error

    def poll(self, epochs: Mapping[str, int]) -> list[HealthEvent]:
        """Return what happened since the last call, without blocking; the first call starts to listen."""
        try:
            if self._events is None:
                self._listen()
            return list(self._news(epochs))
        except self._nvml.NVMLError as error:
            self.close()
            return [self._examine(uuid, epoch, error) for uuid, epoch in epochs.items()]

    def close(self) -> None:
        """Stop listening."""
        if self._events is not None:
            with suppress(self._nvml.NVMLError):
                self._nvml.nvmlEventSetFree(self._events)
            self._events = None

    def _listen(self) -> None:
        nvml = self._nvml
        self._events = nvml.nvmlEventSetCreate()
        for handle in self._handles.values():
            supported = int(self._ask(0, nvml.nvmlDeviceGetSupportedEventTypes, handle))
            try:
                nvml.nvmlDeviceRegisterEvents(handle, EVENTS & supported, self._events)
            except nvml.NVMLError as error:
                if _is_loss(error):
                    raise

    def _news(self, epochs: Mapping[str, int]) -> Iterator[HealthEvent]:
        for _ in range(MAX_EVENTS_PER_POLL):
            try:
                event = self._nvml.nvmlEventSetWait_v2(self._events, 0)
            except self._nvml.NVMLError as error:
                if error.value == _TIMEOUT:
                    return
                raise
            uuid, kind = _text(self._nvml.nvmlDeviceGetUUID(event.device)), int(event.eventType)
            data = self._recovery_action(uuid) if kind & RECOVERY_ACTION else int(event.eventData)
            yield classify(kind, data, uuid, epochs[uuid])

    def _recovery_action(self, uuid: str) -> int:
        values = self._ask(None, self._nvml.nvmlDeviceGetFieldValues, self._handles[uuid], [_FIELD_RECOVERY_ACTION])
        return 0 if values is None or values[0].nvmlReturn else int(values[0].value.uiVal)

    def _examine(self, uuid: str, epoch: int, why: Any) -> HealthEvent:
        try:
            self._nvml.nvmlDeviceGetMemoryInfo(self._handles[uuid])
        except self._nvml.NVMLError as error:
            verdict, meaning = health.judge_nvml(int(error.value))
            if verdict is Verdict.DEVICE:
                return HealthEvent(uuid, epoch, "lost", int(error.value), True, meaning)
        return HealthEvent(uuid, epoch, "suspect", int(why.value), False, f"listening for events failed: {why}")

    def _ask(self, default: Any, question: Callable[..., Any], *args: Any) -> Any:
        try:
            return question(*args)
        except self._nvml.NVMLError:
            return default


def pci_address(nvml_form: str) -> str:
    """Return NVML's "00000000:3B:00.0" as the kernel writes it: "0000:3b:00.0"."""
    domain, _, rest = nvml_form.lower().partition(":")
    return f"{int(domain, 16):04x}:{rest}"


def numa_node(address: str) -> int | None:
    """Return the NUMA node of a PCI device, or None where the machine does not say."""
    try:
        with open(f"/sys/bus/pci/devices/{address}/numa_node", encoding="ascii") as file:
            node = int(file.read())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def _is_loss(error: Any) -> bool:
    return health.judge_nvml(int(error.value))[0] is Verdict.DEVICE


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
