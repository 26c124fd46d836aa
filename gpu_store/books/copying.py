"""Core of how copies are made: between the host and the devices, between devices, to and from disk; one job for each.

Theory of operation. A copy that is wanted somewhere is a `Making`: it waits in the queue of its arena for a place, and then
starts from the best copy in memory. What is only on disk is read into the host store; if it is wanted on a device, its place
there is kept while the copy in the host store is made, as a making of its own, whose `child` it is. There is at most one
making of a part for an arena, and whoever else wants it joins. To leave a device, a part has a copy made in the host store;
to leave the host store, it is written to a file together with others; when that is done the copy that was to leave is closed
and freed, unless somebody pinned it meanwhile: then it stays, and needs no copying the next time.

Each job is reported `finished` exactly once, or ends with an arena that it reads or writes. A job that failed is tried again,
from another copy if there is one, at most `MAX_ATTEMPTS` times for one making. A piece on disk that turned out unreadable or
corrupt is given up at once: it would be as bad the next time.
"""

from __future__ import annotations

from collections.abc import Sequence

from afield.gpu_store.books.arena_books import ArenaBooks
from afield.gpu_store.books.catalogue import Catalogue
from afield.gpu_store.books.disk_books import MAX_FILE_BYTES, MAX_FILE_PARTS, padded
from afield.gpu_store.books.lives import MAKING
from afield.gpu_store.books.records import LAST, Copy, Job, Key, Making, Need, Part
from afield.gpu_store.tiers import DISK, HOST, PREFETCH, Move, ReadFile, WriteFile

MAX_ATTEMPTS = 3
#: An error that begins like this tells nothing about what was to be read: whoever was to read it ended, say.
UNTRIED = "failed:"


class Copying:
    """The makings and jobs of a node; `moved_bytes` counts what was completed, by kind of movement."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._arenas = catalogue.arenas
        self.jobs: dict[int, Job] = {}
        self.writes = 0  # jobs that write
        self.prefetches: dict[Making, None] = {}
        self.moved_bytes = dict.fromkeys(("device_to_host", "host_to_device", "peer", "disk_write", "disk_read"), 0)
        self._next_job = 1
        self._left: list[Copy] = []  # copied below by jobs that have just finished

    # -- what is wanted -------------------------------------------------------------------------------------------

    def want(self, part: Part, arena: int, key: Key) -> Making:
        """Return the making of this part for this arena, in which there is no copy of it: a new one, or one to join."""
        making = part.making(arena)
        if making is None:
            making = self._new_making(key, part, arena)
            self._arenas[arena].queue.add(making)
        else:
            self._hurry(making, key)
        return making

    def prefetch(self, part: Part, arena: int, key: Key) -> None:
        """Make a copy that nobody waits for, when there is room to spare."""
        making = self.want(part, arena, key)
        making.prefetch = True
        self.prefetches[making] = None

    def spill(self, copy: Copy, key: Key, may_wait: bool) -> bool:
        """Have a device's copy, the only one of its part, leave for the host store; False: there is no room for it there.

        `may_wait`: it may wait in the host store's queue, in the place of who it makes room for.
        """
        part, host = copy.part, self._arenas[HOST]
        room = host.extents.rounded(part.size)
        if room > host.capacity:
            return False
        making = part.making(HOST)
        offset: int | None = None
        if making is None:
            if not host.queue.keeps_waiting(key):
                offset = host.reserve_place(room)
            if offset is None and not may_wait:
                return False
            making = self._new_making(key, part, HOST)
            if offset is None:
                host.queue.add(making)
        elif making.leaving is not None:
            return False
        else:
            self._hurry(making, key)
        making.leaving = copy
        self._arenas[copy.arena].start_leaving(copy)
        if offset is not None:
            self.place(making, offset)
        return True

    def write(self, copies: Sequence[Copy], files: int) -> int:
        """Have copies in the host store, the only ones of their parts, leave for the disk in at most so many files.

        Returns how many do.
        """
        started = 0
        while started < len(copies) and files:
            files -= 1
            batch: list[Copy] = []
            size = 0
            for copy in copies[started : started + MAX_FILE_PARTS]:
                size += padded(copy.part.size)
                if batch and size > MAX_FILE_BYTES:
                    break
                batch.append(copy)
            if not self._write_file(batch):
                break
            started += len(batch)
        return started

    def _write_file(self, batch: list[Copy]) -> bool:
        file = self._catalogue.disk.new_file(copy.part.size for copy in batch)
        if file is None:
            return False
        number, offsets = file
        size = sum(copy.part.size for copy in batch)
        job = self._start_job("disk_write", batch, size, (HOST, DISK))
        job.file, job.offsets = number, offsets
        self.writes += 1
        for copy in batch:
            self._arenas[HOST].start_leaving(copy)
        pieces = [(copy.offset, copy.part.size, at) for copy, at in zip(batch, offsets, strict=True)]
        self._catalogue.effects.append(WriteFile(job.number, number, pieces))
        return True

    def leave(self, making: Making, need: Need) -> None:
        """A need does not want the copy any more."""
        making.needs.pop(need, None)
        self._cancel_unwanted(making)

    def stop_spills(self, arena: int) -> None:
        """Nobody waits for room in the arena any more: forget the spills out of it that still wait for room themselves."""
        for copy in list(self._arenas[arena].leaving):
            making = copy.part.making(HOST)
            if making is not None and making.leaving is copy and making.state == "queued" and making.only_spills:
                making.leaving = None
                self._arenas[arena].stop_leaving(copy)
                self._cancel_unwanted(making)

    # -- the life of a making -------------------------------------------------------------------------------------

    def place(self, making: Making, offset: int) -> None:
        """There is room for it at `offset` of its arena."""
        making.offset = offset
        self._go(making, "place")
        self._start(making)

    def _start(self, making: Making) -> None:
        """Start it from the best source, or have one brought to the host store first."""
        part, arena = making.part, making.arena
        sources = sorted(part.copies.values(), key=_preference)
        if sources:
            source = sources[making.attempts % len(sources)]
            kind = "device_to_host" if arena == HOST else "host_to_device" if source.arena == HOST else "peer"
            job = self._start_job(kind, [source], part.size, (source.arena, arena))
            move = Move(job.number, (source.arena, source.offset), (arena, making.offset), part.size)
            self._catalogue.effects.append(move)
        elif part.disk is None:
            self.fail(making, "lost", part.lost or "no copy of it is left")
            return
        elif arena != HOST:
            self._start_from_host(making)
            return
        else:
            piece = part.disk
            job = self._start_job("disk_read", [], part.size, (DISK, HOST))
            job.piece = piece
            self._catalogue.disk.use(piece.file)
            read = ReadFile(job.number, piece.file, piece.offset, part.size, making.offset)
            self._catalogue.effects.append(read)
        job.making = making
        self._go(making, "run")

    def _start_from_host(self, making: Making) -> None:
        part, host = making.part, self._arenas[HOST]
        if making.key[0] >= PREFETCH and part.making(HOST) is None:
            room = host.extents.rounded(part.size)
            if host.queue or not host.admits_prefetch(room):  # no reason to keep room on the device for long
                self.fail(making, "full", "it was only a prefetch")
                return
        parent = making.parent = self.want(part, HOST, making.key)
        parent.children[making] = None

    def fail(self, making: Making, kind: str, reason: str) -> None:
        """Nothing comes of it: tell all who want it."""
        self._give_up(making)
        catalogue = self._catalogue
        catalogue.failed.extend((need, kind, reason) for need in making.needs)
        making.needs = {}
        for child in list(making.children):
            child.parent = None
            self.fail(child, kind, reason)
        leaving, making.leaving = making.leaving, None
        if leaving is not None and leaving.arena in self._arenas:
            self._arenas[leaving.arena].stop_leaving(leaving)
            self._arenas[leaving.arena].block()  # not again at once

    def object_freed(self, parts: Sequence[Part]) -> None:
        """Forget the makings of these parts; those that run come to nothing."""
        for part in parts:
            for making in list(part.makings.values()) if part.makings else []:
                if making.current:  # else it was given up with the one that it was made for
                    self._void(making)

    def _void(self, making: Making) -> None:
        """Its job, if there is one, may end as it likes."""
        making.needs = {}
        making.children = {}
        leaving, making.leaving = making.leaving, None
        if leaving is not None and leaving.arena in self._arenas:
            self._arenas[leaving.arena].stop_leaving(leaving)
        if making.state == "running":
            self._forget(making)
            self._go(making, "make_void")
        else:
            self._give_up(making)

    def _give_up(self, making: Making) -> None:
        """Nothing comes of it, and no job is to be waited for."""
        self._forget(making)
        self._give_up_place(making)
        self._go(making, "give_up")

    def _go(self, making: Making, event: str) -> None:
        key = (making.part.object.id, making.part.index, making.arena)
        making.state = MAKING.after(making.state, event, key, self._catalogue.recorder)

    def _give_up_place(self, making: Making) -> None:
        books = self._arenas.get(making.arena)
        if books is None:
            return
        if making.offset >= 0:
            books.free_place(making.offset, making.room)
            making.offset = -1
        else:
            books.queue.discard(making)

    def _forget(self, making: Making) -> None:
        """It is not to be joined any more."""
        makings = making.part.makings
        if makings and makings.get(making.arena) is making:
            del makings[making.arena]
        books = self._arenas.get(making.arena)
        if books is not None:
            books.makings.pop(making, None)
        self.prefetches.pop(making, None)
        parent, making.parent = making.parent, None
        if parent is not None:
            parent.children.pop(making, None)
            self._cancel_unwanted(parent)

    def _cancel_unwanted(self, making: Making) -> None:
        if not making.wanted and making.state in ("queued", "placed"):
            self._give_up(making)

    def _new_making(self, key: Key, part: Part, arena: int) -> Making:
        books = self._arenas[arena]
        making = Making(key, books.extents.rounded(part.size), part, arena)
        if part.makings is None:
            part.makings = {}
        part.makings[arena] = making
        books.makings[making] = None
        return making

    def _hurry(self, making: Making, key: Key) -> None:
        """Somebody more urgent wants it too."""
        if key < making.key:
            if making.state == "queued":
                queue = self._arenas[making.arena].queue
                queue.discard(making)
                making.key = key
                queue.add(making)
            making.key = key
            if making.parent is not None:
                self._hurry(making.parent, key)

    # -- jobs -----------------------------------------------------------------------------------------------------

    def _start_job(self, kind: str, sources: list[Copy], size: int, arenas: tuple[int, ...]) -> Job:
        job = Job(self._next_job, kind, sources, size, arenas)
        self._next_job += 1
        self.jobs[job.number] = job
        for copy in sources:
            copy.busy += 1
        return job

    def finished(self, number: int, error: str) -> bool:
        """A job is done, or failed; returns False for one that ended before, with its arena."""
        job = self.jobs.pop(number, None)
        if job is None:
            return False
        for copy in job.sources:
            copy.busy -= 1
        if not error:
            self.moved_bytes[job.kind] += job.size
        if job.making is None:
            self._written(job, error)
        else:
            self._made(job, job.making, error)
        for copy in job.sources:
            self._catalogue.bury_if_unused(copy)
        return True

    def _written(self, job: Job, error: str) -> None:
        host, disk = self._arenas[HOST], self._catalogue.disk
        self.writes -= 1
        for copy in job.sources:
            host.stop_leaving(copy)
        if error:
            disk.rest(job.file)
            disk.fail(error)
            return
        disk.written()
        live = []
        for copy, offset in zip(job.sources, job.offsets, strict=True):
            if not copy.dead:
                disk.add(copy.part, job.file, offset)
                live.append(copy)
        disk.rest(job.file)
        self._left += live

    def _made(self, job: Job, making: Making, error: str) -> None:
        catalogue, part = self._catalogue, making.part
        if job.piece is not None:
            catalogue.disk.rest(job.piece.file)
        if making.state == "void":
            self._give_up_place(making)
            self._go(making, "job_ended")
            return
        if error:
            self._go(making, "job_ended")
            self._made_nothing(job, making, error)
            return
        copy = catalogue.add_copy(part, making.arena, making.offset, making.room)
        children, making.children = making.children, {}
        leaving, making.leaving = making.leaving, None
        self._forget(making)
        self._go(making, "complete")
        needs, making.needs = making.needs, {}
        for need in needs:
            catalogue.hold(need, (part.index, making.arena), copy)
        for child in children:
            child.parent = None
            self._start(child)
        if leaving is not None:
            self._arenas[leaving.arena].stop_leaving(leaving)
            self._left.append(leaving)

    def drop_what_left(self) -> None:
        """Free the copies of which one was made below, unless they are in use by now: all at once, as closing has its price."""
        left, self._left = self._left, []
        gone = [copy for copy in left if copy.may_leave(LAST)]
        if gone:
            self._catalogue.drop(gone)

    def _made_nothing(self, job: Job, making: Making, error: str) -> None:
        part, disk = making.part, self._catalogue.disk
        if job.piece is not None and part.disk is job.piece and not error.startswith(UNTRIED):
            disk.remove(part)
            if not part.copies:
                self.lose(part, error)
                return
        making.attempts += 1
        if making.only_spills or making.attempts >= MAX_ATTEMPTS:
            self.fail(making, "failed", f"part {part.index} could not be moved: {error}")
        else:
            self._start(making)

    # -- losses ---------------------------------------------------------------------------------------------------

    def lose(self, part: Part, cause: str) -> None:
        """No copy of the part is left."""
        self._catalogue.note_lost(part, cause)
        for making in list(part.makings.values()) if part.makings else []:
            if making.current:
                self._lose_making(making, cause)

    def _lose_making(self, making: Making, cause: str) -> None:
        reason = f"no copy of part {making.part.index} is left: {cause}"
        if making.state != "running":
            self.fail(making, "lost", reason)
            return
        self._catalogue.failed.extend((need, "lost", reason) for need in making.needs)
        children = list(making.children)
        self._void(making)
        for child in children:
            child.parent = None
            self.fail(child, "lost", reason)

    def arena_lost(self, books: ArenaBooks, cause: str) -> None:
        """A device is gone; its books are out of `arenas` already, and what it was part of is not reported any more."""
        catalogue, arena = self._catalogue, books.number
        for making in list(books.makings):
            if making.current:
                self.fail(making, "device_lost", cause)
        restarted = self._end_jobs(arena)
        copies = books.copies()
        for copy in copies:
            waiting = copy.part.making(HOST) if copy.state == "leaving" else None
            if waiting is not None and waiting.leaving is copy:
                waiting.leaving = None
            catalogue.lose_copy(copy, books)
        for part in {copy.part: None for copy in copies}:
            if not part.copies and part.disk is None and not part.lost and part.object.id in catalogue.objects:
                self.lose(part, cause)
        for making in restarted:
            if making.current and making.wanted:
                self._start(making)
            elif making.current:
                self._cancel_unwanted(making)

    def _end_jobs(self, arena: int) -> list[Making]:
        """Nobody reports the jobs from or to this arena any more; return the makings elsewhere that were to come of them."""
        restarted = []
        for job in [job for job in self.jobs.values() if arena in job.arenas]:
            del self.jobs[job.number]
            for copy in job.sources:
                copy.busy -= 1
                self._catalogue.bury_if_unused(copy)
            making = job.making
            if making is None or making.state == "over":  # it went with the device that it was to come to
                continue
            if making.state == "void":
                self._give_up_place(making)
            else:
                restarted.append(making)
            self._go(making, "job_ended")
        return restarted


def _preference(copy: Copy) -> tuple[bool, bool, int]:
    """A device before the host, home before other devices."""
    return copy.arena == HOST, copy.arena != copy.part.home, copy.arena
