"""What a device is to the rest of afield: memory in slabs, copies in streams, and news about its health.

Theory of operation. A `DeviceBackend` knows the machine's devices without starting any of them: what there is, how they
are linked, how many lives each has had (its epoch), what happened to them. `open` starts a device in this process and
returns a `Device`, which is this process's hold on **one life** of it. When the device is lost or reset its epoch grows;
from then on every call through the old `Device` raises, and so does every use of a slab or descriptor of the old life.
Open it again for the new one.

Memory comes in slabs, multiples of 2 MiB, exported and imported whole; who divides a slab is above this interface, as is
every other policy (caching imports, retrying, spilling, counting). A copy is named by (slab, offset) and put into a
stream: it has happened when the stream was synchronised, or an event recorded after it has, and until then source and
target belong to it. That is true of host memory as well: a backend keeps the buffer alive, but what is in it is the
caller's care.

Errors of whatever lies below are translated once, here at the edge, into the errors of this module and `afield.errors`:

- `OutOfDeviceMemoryError`: no room; nothing happened, and the device goes on.
- `PoisonedContextError`: this process can do nothing more on the device, and must end. The device is fine.
- `DeviceLostError`, and `StaleEpochError` below it: this life of the device is over for every process.
- `SlabImportError`: this slab cannot be mapped here; the rest goes on.
- `DeviceUsageError`: a call that is wrong on any backend; `DeviceCallError`: anything else that the driver said.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import msgspec

from afield.errors import AfieldError, DeviceLostError, LossError, NoDeviceError, UsageError
from afield.units import format_bytes

#: CUDA hands out small allocations from shared blocks of this size and exports the whole block.
SLAB_GRANULE_BYTES = 2 << 20

#: The end of a link that is not a device.
HOST = "host"


class PoisonedContextError(LossError):
    """This process's context on a device is broken (a sticky error): the process must end, the device is fine."""


class StaleEpochError(DeviceLostError):
    """A slab, descriptor or open device is from before the device was lost or reset; open or export it again."""


class SlabImportError(LossError):
    """A slab of another process cannot be mapped here: its process is gone, or the driver refused."""


class DeviceUsageError(UsageError, ValueError):
    """A call on a device that is wrong on any backend; the message names what is out of place."""


class DeviceCallError(AfieldError):
    """The driver refused a call for a reason that nothing here knows; `code` is the driver's, 0 where it has none."""

    code: int = 0


class DeviceInfo(msgspec.Struct, frozen=True):
    """One device, known without starting it; `index` is for people only, `kind` is the backend's name."""

    uuid: str
    index: int
    name: str
    memory_bytes: int
    kind: str
    #: As the kernel writes it ("0000:3b:00.0"); empty where there is no such thing.
    pci_address: str = ""
    #: None where the machine does not say.
    numa_node: int | None = None


class Link(msgspec.Struct, frozen=True):
    """How bytes get from `source` to `target`, each a device's UUID or `HOST`; every direction is a link of its own.

    The figures are nominal, for placement before anything was measured; an unlimited link has an infinite bandwidth.
    """

    source: str
    target: str
    #: "nvlink", "pcie" (peer to peer), "host" (a host link, or a peer copy that goes through the host), "emulated".
    kind: str
    bandwidth_bytes_per_s: float
    latency_s: float = 0.0


class SlabExport(msgspec.Struct, frozen=True):
    """What another process of this user on this machine needs to map a slab; `handle` means something to its backend only."""

    device_uuid: str
    epoch: int
    size_bytes: int
    handle: bytes


HealthKind = Literal["xid", "ecc", "recovery", "lost", "reset", "suspect"]


class HealthEvent(msgspec.Struct, frozen=True):
    """Something that happened to a device; `fatal` means that this life of the device is over.

    `code` is the Xid, the recovery action or the NVML error, after `kind`. "suspect" says that the source of news failed:
    look at the device.
    """

    device_uuid: str
    epoch: int
    kind: HealthKind
    code: int
    fatal: bool
    text: str


@dataclass(slots=True, eq=False, weakref_slot=True)
class Slab:
    """A region of device memory mapped in this process; `address` is what the device's array library calls a pointer."""

    device_uuid: str
    epoch: int
    size_bytes: int
    address: int
    #: Mapped from another process: freeing it here only closes the mapping.
    imported: bool
    #: False once it was freed here.
    mapped: bool


AnySlab = TypeVar("AnySlab", bound=Slab)


class Event(Protocol):
    """A mark in a stream."""

    def query(self) -> bool:
        """Tell, without blocking, whether all that was put into the stream before the mark has happened.

        Raises what that work raised.
        """

    def synchronize(self) -> None:
        """Block until then; raises what that work raised."""


class Stream(Protocol):
    """A queue of work on one device: first in, first out, and without order towards other streams."""

    def synchronize(self) -> None:
        """Block until everything put into the stream so far has happened; raises what that work raised."""

    def record(self) -> Event:
        """Mark this point of the stream."""

    def wait(self, event: Event) -> None:
        """Let what is put into this stream from now on happen after `event`; does not block."""

    def close(self) -> None:
        """Finish what is in the stream and give it up; until then it is the device's. Twice is allowed, nothing is raised."""


class Device(Protocol):
    """This process's hold on one life of a device; usable from any thread.

    Any call may raise DeviceLostError, StaleEpochError, PoisonedContextError or DeviceCallError. Wrong arguments (a range
    outside the slab, a slab or stream of another device, use after `free_slab` or `close`) raise DeviceUsageError.
    """

    @property
    def info(self) -> DeviceInfo: ...

    @property
    def epoch(self) -> int:
        """The life that this is a hold on."""

    def allocate_slab(self, size_bytes: int) -> Slab:
        """Take `size_bytes`, a positive multiple of SLAB_GRANULE_BYTES; what is in them is undefined.

        Raises OutOfDeviceMemoryError with what was asked for, what there is, and who holds the most.
        """

    def free_slab(self, slab: Slab) -> None:
        """Give a slab back, or close the mapping of an imported one, after all work of this process on the device.

        A slab of an old epoch is let go without an error. Close all imports first: what an importer reads afterwards is
        undefined.
        """

    def export_slab(self, slab: Slab) -> SlabExport:
        """Return what another process needs to map a slab that this process allocated."""

    def import_slab(self, export: SlabExport) -> Slab:
        """Map a slab of another process; importing in the process that allocated it is refused, as CUDA does.

        Raises StaleEpochError for an export of another epoch and SlabImportError where it cannot be mapped.
        """

    def copy_to_host(self, slab: Slab, offset: int, target: memoryview, stream: Stream) -> None:
        """Copy `target.nbytes` bytes at `offset` to writable, contiguous host memory."""

    def copy_from_host(self, slab: Slab, offset: int, source: memoryview, stream: Stream) -> None:
        """Copy contiguous host memory into the slab at `offset`."""

    def copy_within(
        self, source: Slab, source_offset: int, target: Slab, target_offset: int, size_bytes: int, stream: Stream
    ) -> None:
        """Copy between two slabs of this device, or two ranges of one that do not overlap."""

    def copy_from_peer(
        self, slab: Slab, offset: int, peer: Slab, peer_offset: int, size_bytes: int, stream: Stream
    ) -> None:
        """Copy from a slab of another device that is open in this process, in a stream of this one."""

    def new_stream(self) -> Stream:
        """Return a new stream, in order with no other."""

    def synchronize(self) -> None:
        """Block until everything that this process put into any stream of the device has happened."""

    def memory_info(self) -> tuple[int, int]:
        """Return (free, total) bytes of the device, over all processes."""

    def pin_host(self, memory: memoryview) -> None:
        """Page-lock host memory, so that copies to and from it run at full speed and beside the host's own work."""

    def unpin_host(self, memory: memoryview) -> None:
        """Undo `pin_host`, for the same memory."""

    def close(self) -> None:
        """Free and close everything of this process on the device; closing twice is allowed, and nothing is raised."""


class DeviceBackend(Protocol):
    """The machine's devices of one kind. Nothing here starts a device, but `open`."""

    def inventory(self) -> Sequence[DeviceInfo]:
        """Return the devices in the order of their index."""

    def links(self) -> Sequence[Link]:
        """Return the links between the host and each device, and between each pair of devices."""

    def epoch(self, uuid: str) -> int:
        """Return how many lives the device has had, this one included."""

    def open(self, uuid: str) -> Device:
        """Start a device in this process, or return the one started before.

        Raises NoDeviceError for a device that there is not, or that this process is not allowed to see, and
        DeviceLostError for one that was lost and not reset.
        """

    def reset(self, uuid: str) -> None:
        """Begin a new life of a device: all of its memory is gone, its epoch grows, `open` works again.

        Raises DeviceLostError where the device does not come back.
        """

    def poll_health(self) -> list[HealthEvent]:
        """Return what happened since the last call, oldest first, without blocking."""

    def close(self) -> None:
        """Close every open device and everything else that the backend holds in this process."""


# ---- what every backend checks in the same way ----------------------------------------------------------------------


def check_slab_size(size_bytes: int) -> None:
    """Raise DeviceUsageError unless a slab can have this size."""
    if size_bytes <= 0 or size_bytes % SLAB_GRANULE_BYTES:
        granule = format_bytes(SLAB_GRANULE_BYTES)
        raise DeviceUsageError(f"a slab of {size_bytes} bytes: slabs are positive multiples of {granule}")


def check_slab(slab: Slab, info: DeviceInfo, epoch: int) -> None:
    """Raise DeviceUsageError or StaleEpochError unless `slab` is mapped memory of this life of the device."""
    if slab.device_uuid != info.uuid:
        raise DeviceUsageError(f"a slab of device {slab.device_uuid} was given to device {info.uuid}")
    if slab.epoch != epoch:
        raise stale(info.uuid, slab.epoch, epoch)
    if not slab.mapped:
        raise DeviceUsageError(f"a slab of device {info.uuid} was used after it was freed")


def own(slab: Slab, kind: type[AnySlab], info: DeviceInfo) -> AnySlab:
    """Return `slab` as the backend's own kind; raises DeviceUsageError for one of something else."""
    if not isinstance(slab, kind) or slab.device_uuid != info.uuid:
        raise DeviceUsageError(f"a slab of something else was given to device {info.uuid}")
    return slab


def peer_of(slab: Slab, kind: type[AnySlab], info: DeviceInfo) -> AnySlab:
    """Return the slab of a peer as the backend's own kind; raises DeviceUsageError for anything else."""
    if not isinstance(slab, kind) or slab.device_uuid == info.uuid:
        raise DeviceUsageError("a peer's slab is one of another device of this machine; use copy_within on the same")
    return slab


def check_exportable(slab: Slab) -> None:
    """Raise DeviceUsageError for a slab of another process."""
    if slab.imported:
        raise DeviceUsageError("a slab is exported by the process that allocated it: hand on the export that it made")


def check_foreign(is_ours: bool) -> None:
    """Raise SlabImportError for an export of this process itself, as CUDA does."""
    if is_ours:
        raise SlabImportError("a slab cannot be imported by the process that allocated it: use the slab itself")


def check_process(pid: int) -> None:
    """Raise DeviceUsageError unless this is the process that began to use the devices."""
    if pid != os.getpid():
        raise DeviceUsageError("devices do not survive a fork: open them in the process that uses them")


def unknown_device(uuid: str, known: Iterable[str]) -> NoDeviceError:
    """Return the error for a device that there is not."""
    return NoDeviceError(f"there is no device {uuid} here; there are: {', '.join(known) or 'none'}")


def check_range(slab: Slab, offset: int, size_bytes: int) -> None:
    """Raise DeviceUsageError unless `size_bytes` at `offset` lie in the slab."""
    if offset < 0 or size_bytes < 0 or offset + size_bytes > slab.size_bytes:
        raise DeviceUsageError(
            f"{size_bytes} bytes at offset {offset} do not lie in a slab of {slab.size_bytes} bytes on {slab.device_uuid}"
        )


def check_apart(source: Slab, source_offset: int, target: Slab, target_offset: int, size_bytes: int) -> None:
    """Raise DeviceUsageError if the two ranges overlap: a copy of that kind is undefined on a device."""
    same = source.address == target.address
    if same and source_offset < target_offset + size_bytes and target_offset < source_offset + size_bytes:
        raise DeviceUsageError(
            f"{size_bytes} bytes at offsets {source_offset} and {target_offset} of one slab overlap; copy in pieces"
        )


def check_export(export: SlabExport, info: DeviceInfo, epoch: int) -> None:
    """Raise DeviceUsageError or StaleEpochError unless the export is of this life of the device."""
    if export.device_uuid != info.uuid:
        raise DeviceUsageError(f"a slab of device {export.device_uuid} was given to device {info.uuid} to import")
    if export.epoch != epoch:
        raise stale(info.uuid, export.epoch, epoch)
    check_slab_size(export.size_bytes)


def check_host(memory: memoryview, *, writable: bool) -> None:
    """Raise DeviceUsageError unless the host memory is contiguous and, where it is written to, writable."""
    if not memory.c_contiguous:
        raise DeviceUsageError("host memory has to be contiguous: copy rows one by one, or pack them first")
    if writable and memory.readonly:
        raise DeviceUsageError("the host memory to copy to is read-only")


def stale(uuid: str, had: int, has: int) -> StaleEpochError:
    """Return the error for something of epoch `had` on a device that is in epoch `has`."""
    return StaleEpochError(
        f"device {uuid} was lost or reset: this is of its epoch {had}, and it is in epoch {has}; its memory is gone"
    )


def out_of_memory(
    info: DeviceInfo, asked_bytes: int, free_bytes: int, total_bytes: int, holders: Sequence[tuple[str, int]]
) -> str:
    """Return the text of OutOfDeviceMemoryError; `holders` are (who, bytes), of which the three largest are named."""
    text = (
        f"device {info.uuid} ({info.name}): {format_bytes(asked_bytes)} asked for, "
        f"{format_bytes(free_bytes)} free of {format_bytes(total_bytes)}"
    )
    if asked_bytes > total_bytes:
        return f"{text}; this can never fit"
    largest = sorted(holders, key=lambda holder: -holder[1])[:3]
    if largest:
        text += "; largest holders: " + ", ".join(f"{who} {format_bytes(size)}" for who, size in largest)
    return text
