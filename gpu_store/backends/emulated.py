"""Emulated devices: a complete implementation of `base` on shared memory and threads, for machines without a GPU.

Theory of operation. The machine is a `Board` that all processes share; one process creates it, the others attach by its
address. A slab is an anonymous memory file that its maker maps and others open through `/proc`, so nothing is copied between
processes and the kernel takes the memory back however they end. Capacity is counted on the board over all processes and is
hard; memory is taken from the host only as far as it is touched. A freed slab, and the memory of a lost or reset device, is
given back at once: an importer that reads it all the same sees zeros, where a real device would show it anything.

Copies run in the threads of `streams`, over one `Wire` per link. Work that runs when the device's life ends fails.
Every call passes through `_enter`: wrong process, closed, life over, context broken, and then the fault plan.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakMethod

import msgspec
import numpy as np

from afield.clock import Clock, monotonic
from afield.errors import AfieldError, DeviceLostError, OutOfDeviceMemoryError
from afield.gpu_store import shared_memory
from afield.gpu_store.backends import base
from afield.gpu_store.backends.base import (
    HOST,
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
from afield.gpu_store.backends.board import Board, open_foreign, wipe
from afield.gpu_store.backends.faults import Call, Fault, FaultKind, inject, strike
from afield.gpu_store.backends.health import STICKY_CODES
from afield.gpu_store.backends.opened import OpenDevices
from afield.gpu_store.backends.streams import Bytes, EmulatedStream, Lane, Wire

Check = Callable[[], None]


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """What a link of an emulated machine carries, in one direction."""

    bandwidth_bytes_per_s: float = math.inf
    latency_s: float = 0.0


UNLIMITED = LinkSpeed()


@dataclass(slots=True, eq=False)
class EmulatedSlab(Slab):
    """A slab whose memory the host can see: `memory` is all of it."""

    memory: Bytes
    serial: int
    #: The memory file, of its maker only.
    fd: int


class _Handle(msgspec.Struct, array_like=True):
    """What stands in `SlabExport.handle`."""

    pid: int
    fd: int
    inode: int
    serial: int


class EmulatedBackend:
    """A machine with emulated devices; see `base.DeviceBackend`."""

    def __init__(
        self,
        board: Board,
        *,
        clock: Clock = monotonic,
        sleep: Callable[[float], Any] = time.sleep,
        lazy_streams: bool = False,
    ) -> None:
        """Use the machine on `board`; see `create` and `attach` for where it comes from.

        Limited links take their time from `clock` and `sleep`. With `lazy_streams` work starts as late as it may, so
        that a missing synchronisation shows every time.
        """
        self.board = board
        self.lazy_streams = lazy_streams
        self._wires = {
            (link.source, link.target): Wire(link, clock, sleep, self._slowness(link)) for link in board.links
        }
        self._opened: OpenDevices[EmulatedDevice] = OpenDevices()
        self._poisoned: dict[tuple[str, int], PoisonedContextError] = {}
        # Who attaches wants the news from then on.
        self._seen = [board.events(index, 0)[1] for index in range(len(board.devices))]

    @classmethod
    def create(
        cls,
        devices: Sequence[DeviceInfo],
        *,
        host_link: LinkSpeed = UNLIMITED,
        peer_link: LinkSpeed = UNLIMITED,
        faults: Sequence[Fault] = (),
        **options: Any,
    ) -> EmulatedBackend:
        """Make a machine with these devices, linked to the host and to each other; options as for the constructor."""
        for info in devices:
            if info.memory_bytes < base.SLAB_GRANULE_BYTES:
                raise DeviceUsageError(f"device {info.uuid} has no room for a slab: {info.memory_bytes} bytes")
        board = Board.create(devices, list(_links(devices, host_link, peer_link)))
        for fault in faults:
            inject(board, fault)
        return cls(board, **options)

    @classmethod
    def attach(cls, address: str, **options: Any) -> EmulatedBackend:
        """Use the machine that another process of this user made; raises NoDeviceError where it is gone."""
        return cls(Board.attach(address), **options)

    @property
    def address(self) -> str:
        """What `attach` needs in another process."""
        return self.board.address

    def inject(self, fault: Fault) -> None:
        """Let a fault happen to the machine, for all processes; see `faults`."""
        inject(self.board, fault)

    def inventory(self) -> Sequence[DeviceInfo]:
        return self.board.devices

    def links(self) -> Sequence[Link]:
        return self.board.links

    def epoch(self, uuid: str) -> int:
        return self.board.epoch(self.board.index(uuid))

    def open(self, uuid: str) -> EmulatedDevice:
        self.board.check_process()
        index = self.board.index(uuid)
        with self._opened.lock:
            epoch = self.board.epoch(index)
            if self.board.lost(index):
                raise lost_error(self.board, index)
            return self._opened.get(uuid, epoch, lambda: EmulatedDevice(self, index, epoch, self._poisoned))

    def reset(self, uuid: str) -> None:
        index = self.board.index(uuid)
        with self.board.locked():
            self.board.announce(index, "reset", 0, fatal=True)
            self.board.end_life(index, lost=False)

    def poll_health(self) -> list[HealthEvent]:
        news: list[HealthEvent] = []
        for index, seen in enumerate(self._seen):
            events, self._seen[index] = self.board.events(index, seen)
            news += events
        return news

    def close(self) -> None:
        self._opened.close()
        self.board.close()

    def wire(self, source: str, target: str) -> Wire:
        """Return this process's use of a link."""
        return self._wires[source, target]

    def _slowness(self, link: Link) -> Callable[[], float]:
        ends = [self.board.index(end) for end in (link.source, link.target) if end != HOST]
        return lambda: max(map(self.board.slowness, ends))


class EmulatedDevice:
    """One life of an emulated device in this process; see `base.Device`."""

    def __init__(
        self,
        backend: EmulatedBackend,
        index: int,
        epoch: int,
        poisoned: dict[tuple[str, int], PoisonedContextError],
    ) -> None:
        self.info = backend.board.devices[index]
        self.epoch = epoch
        self.closed = False
        self._backend = backend
        self._board = backend.board
        self._index = index
        # Of the process, not of this object: closing the device does not mend its context.
        self._poisoned = poisoned
        self._lock = threading.Lock()
        self._lanes: list[Lane] = []
        self._slabs: set[EmulatedSlab] = set()
        self._pinned: dict[int, memoryview] = {}

    # ---- slabs -------------------------------------------------------------------------------------------------

    def allocate_slab(self, size_bytes: int) -> EmulatedSlab:
        base.check_slab_size(size_bytes)
        self._enter(Call.ALLOCATE, size_bytes)
        fd = shared_memory.create(f"afield-{self.info.uuid}", size_bytes)
        try:
            serial = self._board.reserve(self._index, size_bytes, fd, os.fstat(fd).st_ino)
            if serial is None:
                raise self._out_of_memory(size_bytes)
            return self._map(fd, size_bytes, serial, imported=False)
        except BaseException:
            os.close(fd)
            raise

    def count_allocation(self, size_bytes: int) -> None:
        """Somebody divides a slab: let the fault plan have its say, as for the allocation of a slab."""
        if self._board.armed(self._index) and self._board.epoch(self._index) == self.epoch:
            self._enter(Call.ALLOCATE, size_bytes)

    def free_slab(self, slab: Slab) -> None:
        mine = base.own(slab, EmulatedSlab, self.info)
        if mine.epoch == self._board.epoch(self._index):
            self._enter(Call.OTHER)
            base.check_slab(mine, self.info, self.epoch)
            self._drain()
        self._let_go(mine)

    def export_slab(self, slab: Slab) -> SlabExport:
        self._enter(Call.OTHER)
        mine = self._usable(slab)
        base.check_exportable(mine)
        handle = _Handle(os.getpid(), mine.fd, os.fstat(mine.fd).st_ino, mine.serial)
        return SlabExport(self.info.uuid, self.epoch, mine.size_bytes, msgspec.msgpack.encode(handle))

    def import_slab(self, export: SlabExport) -> EmulatedSlab:
        self._enter(Call.IMPORT)
        base.check_export(export, self.info, self.epoch)
        try:
            handle = msgspec.msgpack.decode(export.handle, type=_Handle)
            base.check_foreign(handle.pid == os.getpid())
            fd = open_foreign(handle.pid, handle.fd, handle.inode)
        except (msgspec.MsgspecError, OSError) as error:
            raise SlabImportError(f"a slab of device {self.info.uuid} cannot be mapped: {error}") from error
        try:
            freed = not self._board.holds(self._index, handle.serial)
            if freed:
                self._check_life()  # it may have gone with the device
            if freed or os.fstat(fd).st_size != export.size_bytes:
                raise SlabImportError(f"a slab of device {self.info.uuid} cannot be mapped: it was freed")
            return self._map(fd, export.size_bytes, handle.serial, imported=True)
        finally:
            os.close(fd)

    def _map(self, fd: int, size_bytes: int, serial: int, *, imported: bool) -> EmulatedSlab:
        memory = np.frombuffer(shared_memory.mapped(fd, size_bytes), np.uint8)
        address: int = memory.__array_interface__["data"][0]
        slab = EmulatedSlab(
            self.info.uuid, self.epoch, size_bytes, address, imported, True, memory, serial, -1 if imported else fd
        )
        with self._lock:
            self._slabs.add(slab)
        return slab

    def _let_go(self, slab: EmulatedSlab) -> None:
        with self._lock:
            if not slab.mapped:
                return
            slab.mapped = False
            self._slabs.discard(slab)
        # The pages stay mapped for as long as an array uses them; what is in them does not.
        slab.memory = slab.memory[:0]
        if not slab.imported:
            wipe(slab.fd)
            self._board.release(self._index, slab.serial)
            os.close(slab.fd)

    # ---- copies ------------------------------------------------------------------------------------------------

    def copy_to_host(self, slab: Slab, offset: int, target: memoryview, stream: Stream) -> None:
        base.check_host(target, writable=True)
        source = self._range(slab, offset, target.nbytes)
        self._copy(_bytes(target), source, self._backend.wire(self.info.uuid, HOST), stream)

    def copy_from_host(self, slab: Slab, offset: int, source: memoryview, stream: Stream) -> None:
        base.check_host(source, writable=False)
        target = self._range(slab, offset, source.nbytes)
        self._copy(target, _bytes(source), self._backend.wire(HOST, self.info.uuid), stream)

    def copy_within(
        self, source: Slab, source_offset: int, target: Slab, target_offset: int, size_bytes: int, stream: Stream
    ) -> None:
        from_bytes = self._range(source, source_offset, size_bytes)
        to_bytes = self._range(target, target_offset, size_bytes)
        base.check_apart(source, source_offset, target, target_offset, size_bytes)
        self._copy(to_bytes, from_bytes, None, stream)

    def copy_from_peer(
        self, slab: Slab, offset: int, peer: Slab, peer_offset: int, size_bytes: int, stream: Stream
    ) -> None:
        target = self._range(slab, offset, size_bytes)
        theirs = base.peer_of(peer, EmulatedSlab, self.info)
        index = self._board.index(theirs.device_uuid)

        def check_peer() -> None:
            base.check_slab(theirs, self._board.devices[index], self._board.epoch(index))

        check_peer()
        base.check_range(theirs, peer_offset, size_bytes)
        source = theirs.memory[peer_offset : peer_offset + size_bytes]
        self._copy(target, source, self._backend.wire(theirs.device_uuid, self.info.uuid), stream, check_peer)

    def _range(self, slab: Slab, offset: int, size_bytes: int) -> Bytes:
        mine = self._usable(slab)
        base.check_range(mine, offset, size_bytes)
        return mine.memory[offset : offset + size_bytes]

    def _copy(
        self, target: Bytes, source: Bytes, wire: Wire | None, stream: Stream, check_after: Check = lambda: None
    ) -> None:
        self._enter(Call.OTHER)
        lane = stream.lane if isinstance(stream, EmulatedStream) else None
        if lane is None or lane.device_uuid != self.info.uuid:
            raise DeviceUsageError(f"a copy of device {self.info.uuid} was put into a stream of something else")

        def copy() -> None:
            if wire is not None:
                wire.carry(target, source, self._check_life)
            else:
                self._check_life()
                np.copyto(target, source)
            check_after()  # what was wiped meanwhile must not pass for data

        lane.submit(copy)

    # ---- streams, and the rest ---------------------------------------------------------------------------------

    def new_stream(self) -> EmulatedStream:
        self._enter(Call.OTHER)
        lane = Lane(self.info.uuid, lazy=self._backend.lazy_streams, on_failure=WeakMethod(self._failed))
        with self._lock:
            self._lanes = [one for one in self._lanes if not one.stopped]
            self._lanes.append(lane)
        return EmulatedStream(lane, self._check)

    def synchronize(self) -> None:
        self._enter(Call.OTHER)
        self._drain()
        self._check()

    def memory_info(self) -> tuple[int, int]:
        self._enter(Call.OTHER)
        total = self.info.memory_bytes
        return total - sum(self._board.holders(self._index).values()), total

    def pin_host(self, memory: memoryview) -> None:
        self._enter(Call.OTHER)
        base.check_host(memory, writable=False)
        address: int = _bytes(memory).__array_interface__["data"][0]
        with self._lock:
            if address in self._pinned:
                raise DeviceUsageError("this host memory is page-locked already")
            self._pinned[address] = memory

    def unpin_host(self, memory: memoryview) -> None:
        self._enter(Call.OTHER)
        address: int = _bytes(memory).__array_interface__["data"][0]
        with self._lock:
            if self._pinned.pop(address, None) is None:
                raise DeviceUsageError("this host memory is not page-locked")

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        with suppress(DeviceUsageError):  # in a forked child nothing of this is its own
            self._board.check_process()
            for lane in self._lanes:
                lane.stop()
            for lane in self._lanes:
                lane.join()
            for slab in list(self._slabs):
                self._let_go(slab)
            self._pinned.clear()

    def _drain(self) -> None:
        with self._lock:
            lanes = list(self._lanes)
        for lane in lanes:
            lane.reach(quietly=True)

    # ---- what every call passes --------------------------------------------------------------------------------

    def _enter(self, call: Call, size_bytes: int = 0) -> None:
        self._check()
        for kind, code in strike(self._board, self._index, call):
            if kind == FaultKind.STICKY_ERROR:
                what = f"device {self.info.uuid}: {STICKY_CODES[code]} ({code})"
                self._failed(PoisonedContextError(f"{what}; this process can do nothing more on the device"))
            elif kind == FaultKind.FAILED_IMPORT:
                raise SlabImportError(f"a slab of device {self.info.uuid} cannot be mapped: the driver refused")
            else:
                raise self._out_of_memory(size_bytes)
        self._check()  # again: the plan may have ended the device's life at this call

    def _check(self) -> None:
        self._board.check_process()
        self._check_life()
        error = self._poisoned.get((self.info.uuid, self.epoch))
        if error is not None:
            raise type(error)(*error.args) from error
        if self.closed:
            raise DeviceUsageError(f"device {self.info.uuid} was used after it was closed")

    def _check_life(self) -> None:
        epoch = self._board.epoch(self._index)
        if epoch != self.epoch:
            if self._board.lost(self._index):
                raise lost_error(self._board, self._index)
            raise base.stale(self.info.uuid, self.epoch, epoch)

    def _failed(self, error: AfieldError) -> None:
        if isinstance(error, PoisonedContextError):
            self._poisoned.setdefault((self.info.uuid, self.epoch), error)

    def _usable(self, slab: Slab) -> EmulatedSlab:
        mine = base.own(slab, EmulatedSlab, self.info)
        base.check_slab(mine, self.info, self._board.epoch(self._index))
        return mine

    def _out_of_memory(self, size_bytes: int) -> OutOfDeviceMemoryError:
        held = self._board.holders(self._index)
        total = self.info.memory_bytes
        holders = [(f"process {pid}", size) for pid, size in held.items()]
        return OutOfDeviceMemoryError(
            base.out_of_memory(self.info, size_bytes, total - sum(held.values()), total, holders)
        )


def lost_error(board: Board, index: int) -> DeviceLostError:
    """Return the error for a lost device, with the cause."""
    info = board.devices[index]
    return DeviceLostError(
        f"device {info.uuid} ({info.name}) is gone, and its memory with it: {board.last_fatal(index)}"
    )


def _links(devices: Sequence[DeviceInfo], host: LinkSpeed, peer: LinkSpeed) -> Iterator[Link]:
    ends = [HOST, *(info.uuid for info in devices)]
    for source in ends:
        for target in ends:
            if source != target:
                speed = host if HOST in (source, target) else peer
                yield Link(source, target, "emulated", speed.bandwidth_bytes_per_s, speed.latency_s)


def _bytes(memory: memoryview) -> Bytes:
    return np.frombuffer(memory, np.uint8)
