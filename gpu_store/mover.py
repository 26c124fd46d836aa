"""Movers: what a store process does with memory, in the background, and how its loop hears of it.

Theory of operation. A mover takes jobs by number and never blocks its caller. Each job ends in exactly one completion,
(job, kind, text): kind is empty when all went well, else it says what failed ("device_lost", "poisoned", "import",
"disk_full", "unreadable", "corrupt", "failed") and `text` in words. Completions lie in a queue, and an event descriptor
can be read while there are any, so that an event loop picks them up.

*A device's mover* owns the device's slab, all of it, for one life of the device. It has a thread and a stream for each
direction, so that a spill and a restore run beside each other: "out" (to the host), "in" (from the host), "peer" (from
another device's slab, which it imports once). Within a direction jobs run in the order in which they came; those that wait
when one ends are begun together and waited for together, as that costs more than a small copy. A job is cut into
chunks at fixed places of the host memory, and each such granule is page-locked when it is first used, so that copies run at
the link's full speed; where that is refused, they are slower. What is page-locked must stay part of the memory file: nobody
may punch it out. A job is done when its stream is synchronised.

*The disk's mover* writes, reads and deletes spill files in two threads.

A job that fails leaves the mover usable, with a new stream. Whose fault a lost device is needs care in copies between two:
the device that executes is lost if it says so when it is asked by itself; otherwise it was the other one ("import").
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from afield.errors import AfieldError, DeviceLostError, OutOfDeviceMemoryError, SpillError
from afield.gpu_store.backends.base import (
    SLAB_GRANULE_BYTES,
    Device,
    DeviceBackend,
    PoisonedContextError,
    Slab,
    SlabExport,
    SlabImportError,
    Stream,
    out_of_memory,
)
from afield.gpu_store.spill_files import SpillFiles

#: Copied at a time, and page-locked at a time.
CHUNK_BYTES = 16 << 20
#: The disk's mover has so many threads: one waits for the disk while the other computes checksums.
DISK_THREADS = 2

#: So many jobs of a device are begun at most before they are waited for.
MAX_TOGETHER = 256

#: (job, kind, text)
Completion = tuple[int, str, str]
#: (job, or None if nobody is to be told; what it does)
_Item = tuple[int | None, Callable[[], None]]


class Completions:
    """The queue between movers and the loop of their process; `fileno()` can be read while something is in it."""

    def __init__(self) -> None:
        self._done: deque[Completion] = deque()
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """Return the descriptor to wait for."""
        return self._fd

    def add(self, *done: Completion) -> None:
        """Jobs are done; called from any thread."""
        self._done.extend(done)
        os.eventfd_write(self._fd, 1)

    def take(self) -> list[Completion]:
        """Return what is done, oldest first; does not block."""
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            return []
        return [self._done.popleft() for _ in range(len(self._done))]

    def close(self) -> None:
        """Release the descriptor, after the movers were closed."""
        os.close(self._fd)


def describe(error: BaseException) -> tuple[str, str]:
    """Return a failed job's kind and words."""
    if isinstance(error, PoisonedContextError):
        return "poisoned", str(error)
    if isinstance(error, DeviceLostError):
        return "device_lost", str(error)
    if isinstance(error, SlabImportError):
        return "import", str(error)
    if isinstance(error, SpillError):
        return error.kind, str(error)
    if isinstance(error, AfieldError):
        return "failed", str(error)
    return "failed", f"{type(error).__name__}: {error}"


class JobQueue:
    """A queue of jobs and the threads that run them, which start with the first.

    Args:
        completions: where to tell of jobs that are done.
        threads: how many.
        finish: waits for what the jobs have begun; they are done after it. Several jobs may be begun before it is called.
    """

    def __init__(
        self, name: str, completions: Completions, threads: int = 1, finish: Callable[[], None] | None = None
    ) -> None:
        self._name = name
        self._completions = completions
        self._finish = finish
        self._jobs: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._count = threads
        self._threads: list[threading.Thread] = []

    def put(self, job: int | None, work: Callable[[], None]) -> None:
        """Run `work` after what is in the queue; without a job, nobody is told."""
        self._jobs.put((job, work))
        if not self._threads:
            self._threads = [
                threading.Thread(target=self._run, name=f"{self._name} {number}", daemon=True)
                for number in range(self._count)
            ]
            for thread in self._threads:
                thread.start()

    def close(self) -> None:
        """Run what is in the queue, and end."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            batch = [item]
            if self._finish is not None:
                batch += self._more()
            if len(batch) > 1 and self._succeed(batch):
                self._completions.add(*((job, "", "") for job, _ in batch if job is not None))
                continue
            for job, work in batch:  # one by one, also to find out which of them it was that failed
                kind, text = "", ""
                try:
                    work()
                    if self._finish is not None:
                        self._finish()
                except BaseException as error:
                    kind, text = describe(error)
                    if not isinstance(error, AfieldError):
                        traceback.print_exc()
                    elif job is None:
                        print(text, file=sys.stderr)
                if job is not None:
                    self._completions.add((job, kind, text))

    def _more(self) -> list[_Item]:
        """Return what waits behind the first job, as far as it is to be begun together with that."""
        found: list[_Item] = []
        while len(found) < MAX_TOGETHER - 1:
            try:
                item = self._jobs.get_nowait()
            except queue.Empty:
                break
            if item is None:  # `close`
                self._jobs.put(None)
                break
            found.append(item)
        return found

    def _succeed(self, batch: list[_Item]) -> bool:
        """Run several jobs and wait for them together; tell whether all went well. What failed can be done again."""
        assert self._finish is not None
        try:
            for _, work in batch:
                work()
            self._finish()
        except Exception:
            return False
        return True


class DeviceMover:
    """One life of a device: its slab, and what goes in and out of it."""

    def __init__(
        self,
        backend: DeviceBackend,
        uuid: str,
        host: memoryview,
        completions: Completions,
        *,
        share: float = 1.0,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """Open the device and take `share` of its free memory as one slab; `host` is the host store, writable.

        Raises whatever `DeviceBackend.open` and `Device.allocate_slab` raise.
        """
        self.backend = backend
        self.device: Device = backend.open(uuid)
        self.slab = self.device.allocate_slab(_slab_bytes(self.device, share))
        self.export: SlabExport = self.device.export_slab(self.slab)
        self._host = host
        self._chunk_bytes = chunk_bytes
        self._queues = {
            way: JobQueue(f"{way} {uuid}", completions, finish=functools.partial(self._finish, way))
            for way in ("in", "out", "peer")
        }
        self._streams: dict[str, Stream] = {}
        self._peers: dict[str, tuple[SlabExport, Slab]] = {}
        self._page_locking = threading.Lock()
        self._page_locked: set[int] = set()
        self._can_page_lock = True

    @property
    def capacity(self) -> int:
        """Bytes of the slab."""
        return self.slab.size_bytes

    def to_host(self, job: int, offset: int, host_offset: int, size: int) -> None:
        """Copy from the slab to the host store."""

        def work(stream: Stream) -> None:
            for start, end in self._chunks(host_offset, size):
                part = self._host[start:end]
                self.device.copy_to_host(self.slab, offset + start - host_offset, part, stream)

        self._put("out", job, work)

    def from_host(self, job: int, host_offset: int, offset: int, size: int) -> None:
        """Copy from the host store into the slab."""

        def work(stream: Stream) -> None:
            for start, end in self._chunks(host_offset, size):
                part = self._host[start:end].toreadonly()
                self.device.copy_from_host(self.slab, offset + start - host_offset, part, stream)

        self._put("in", job, work)

    def from_peer(self, job: int, export: SlabExport, peer_offset: int, offset: int, size: int) -> None:
        """Copy from the slab of another device's store."""

        def work(stream: Stream) -> None:
            try:
                peer = self._peer(export)
                self.device.copy_from_peer(self.slab, offset, peer, peer_offset, size, stream)
                stream.synchronize()
            except DeviceLostError as error:
                self.device.memory_info()  # raises where this device is the lost one
                raise SlabImportError(
                    f"device {export.device_uuid}, where it was to be copied from: {error}"
                ) from error

        self._put("peer", job, work)

    def close(self) -> None:
        """Finish what was begun, and let go of the device."""
        for jobs in self._queues.values():
            jobs.close()
        self.device.close()

    def _put(self, way: str, job: int, work: Callable[[Stream], None]) -> None:
        def run() -> None:
            with self._stream(way) as stream:
                work(stream)

        self._queues[way].put(job, run)

    def _finish(self, way: str) -> None:
        with self._stream(way) as stream:
            stream.synchronize()

    @contextlib.contextmanager
    def _stream(self, way: str) -> Iterator[Stream]:
        """Give the stream of a direction; after an error it is another one."""
        try:
            stream = self._streams.get(way)
            if stream is None:
                stream = self._streams[way] = self.device.new_stream()
            yield stream
        except BaseException:
            broken = self._streams.pop(way, None)
            if broken is not None:
                broken.close()
            raise

    def _chunks(self, host_offset: int, size: int) -> Iterator[tuple[int, int]]:
        """Cut a range of the host store where page-locked granules end."""
        end = host_offset + size
        while host_offset < end:
            granule = host_offset // self._chunk_bytes
            cut = min(end, (granule + 1) * self._chunk_bytes)
            self._page_lock(granule)
            yield host_offset, cut
            host_offset = cut

    def _page_lock(self, granule: int) -> None:
        """Page-lock a granule of the host store when it is first used; without that, copies are only slower."""
        with self._page_locking:
            if granule in self._page_locked or not self._can_page_lock:
                return
            self._page_locked.add(granule)
            start = granule * self._chunk_bytes
            try:
                self.device.pin_host(self._host[start : start + self._chunk_bytes])
            except (DeviceLostError, PoisonedContextError):
                raise
            except AfieldError as error:
                self._can_page_lock = False
                print(f"host memory could not be page-locked, copies will be slower: {error}", file=sys.stderr)

    def _peer(self, export: SlabExport) -> Slab:
        """Return another store's slab, mapped once for each of its lives."""
        known = self._peers.get(export.device_uuid)
        if known is not None and known[0] == export:
            return known[1]
        device = self.backend.open(export.device_uuid)
        if known is not None:
            del self._peers[export.device_uuid]
            try:
                device.free_slab(known[1])
            except AfieldError:
                pass  # it is of a life that is over
        slab = device.import_slab(export)
        self._peers[export.device_uuid] = export, slab
        return slab


def _slab_bytes(device: Device, share: float) -> int:
    free, total = device.memory_info()
    size = int(free * share) // SLAB_GRANULE_BYTES * SLAB_GRANULE_BYTES
    if not size:
        raise OutOfDeviceMemoryError(out_of_memory(device.info, SLAB_GRANULE_BYTES, free, total, []))
    return size


class DiskMover:
    """The disk: spill files written from the host store, and read back into it."""

    def __init__(self, files: SpillFiles, host: memoryview, completions: Completions) -> None:
        """Use `files`; `host` is the host store, writable."""
        self.files = files
        self._host = host
        self._queue = JobQueue("disk", completions, DISK_THREADS)

    def write(self, job: int, file: int, pieces: Sequence[tuple[int, int, int]]) -> None:
        """Write pieces of the host store, each (offset there, size, offset in the file), as one new file."""
        self._queue.put(job, lambda: self.files.write(file, pieces, self._host))

    def read(self, job: int, file: int, file_offset: int, size: int, host_offset: int) -> None:
        """Read one piece back, whole, into the host store."""
        target = self._host[host_offset : host_offset + size]
        self._queue.put(job, lambda: self.files.read(file, file_offset, target))

    def delete(self, file: int) -> None:
        """Delete a file that no job uses."""
        self._queue.put(None, lambda: self.files.delete(file))

    def close(self) -> None:
        """Finish what was begun."""
        self._queue.close()
