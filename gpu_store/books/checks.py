"""Core of what must hold in the books whenever no event is being handled: said in sentences, for tests and for `afield stack`.

At most `CHECKED` things of a kind are looked at, and of more than that no sums are made: the daemon may be asked at work.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from afield.gpu_store.books.arena_books import ArenaBooks
from afield.gpu_store.books.catalogue import Catalogue
from afield.gpu_store.books.copying import Copying
from afield.gpu_store.books.disk_books import padded
from afield.gpu_store.books.records import Copy, Making, StoredObject

CHECKED = 2000


def complaints(catalogue: Catalogue, copying: Copying) -> list[str]:
    """Return what is wrong with the books of all tiers, none if all is well."""
    found: list[str] = []
    voids = [job.making for job in copying.jobs.values() if job.making is not None and job.making.state == "void"]
    for books in catalogue.arenas.values():
        there = [making for making in voids if making.arena == books.number]
        found += [f"arena {books.number}: {complaint}" for complaint in _of_arena(books, there)]
    for stored in islice(catalogue.objects.values(), CHECKED):
        found += [f"object {stored.id.hex()} {complaint}" for complaint in _of_object(catalogue, stored)]
    for job in islice(copying.jobs.values(), CHECKED):
        if any(not copy.busy for copy in job.sources):
            found.append(f"job {job.number} reads a copy that is not busy")
        if job.making is not None and job.making.state not in ("running", "void"):
            found.append(f"job {job.number} is to make a copy that is {job.making.state}")
    if catalogue.ready or catalogue.rewanted or catalogue.failed:
        found.append("needs are left that something follows for")
    return found + _of_disk(catalogue)


def _of_arena(books: ArenaBooks, voids: list[Making]) -> Iterator[str]:
    used, capacity = books.extents.used, books.capacity
    if not used == books.leased_bytes + books.sealed_bytes + books.moving_bytes <= capacity:
        yield (
            f"{used} of {capacity} bytes are used, {books.leased_bytes} leased, {books.sealed_bytes} sealed, "
            f"{books.moving_bytes} moving"
        )
    if books.leased_bytes != sum(ranges.size for ranges in books.leased.values()):
        yield "what processes have leased does not add up"
    for making in islice(books.makings, CHECKED):
        has_place = making.state in ("placed", "running")
        if not making.current or making.part.making(books.number) is not making or has_place != (making.offset >= 0):
            yield f"a copy of part {making.part.index} in the making is {making.state}, at {making.offset}"
    copies = books.copies()
    if len(copies) > CHECKED:
        return
    for copy in copies:
        yield from _of_copy(books, copy)
    if books.sealed_bytes != sum(copy.room for copy in copies if not copy.dead):
        yield "the copies of living objects do not add up"
    if books.leaving_bytes != sum(copy.room for copy in books.leaving):
        yield "what is leaving does not add up"
    making_bytes = sum(making.room for making in (*books.makings, *voids) if making.offset >= 0)
    if books.moving_bytes != making_bytes + sum(copy.room for copy in copies if copy.dead):
        yield "the places of what is being made, and of what dies, do not add up"


def _of_copy(books: ArenaBooks, copy: Copy) -> Iterator[str]:
    what = f"the copy of part {copy.part.index} of {copy.part.object.id.hex()} at {copy.offset} is {copy.state}"
    if copy.shelf is None or copy not in copy.shelf or copy.state == "over":
        yield f"{what}, and on no shelf of its own"
    elif ((copy.shelf is books.leaving), (copy.shelf is books.dying)) != (
        copy.state in ("leaving", "dying_leaving"),
        copy.state == "dying",
    ):
        yield f"{what}, and on another shelf"
    elif copy.shelf is books.spares and not copy.part.object.spare:
        yield f"{what}, and is thought to be needed by lineage alone"
    elif copy.dead and not copy.in_use:
        yield f"{what}, and nobody needs it"


def _of_object(catalogue: Catalogue, stored: StoredObject) -> Iterator[str]:
    for part in stored.parts:
        if bool(part.lost) == bool(part.copies or part.disk is not None):
            yield f"has {len(part.copies)} copies of part {part.index}, which is {'lost' if part.lost else 'not lost'}"
        for arena, copy in part.copies.items():
            if copy.arena != arena or arena not in catalogue.arenas or copy.dead:
                yield f"has a {copy.state} copy of part {part.index} in arena {copy.arena}, listed for {arena}"
    for need in stored.needs or ():
        if need.state not in ("waiting", "extended") or not need.missing:
            yield f"is needed by {need.client.hex()}, which is {need.state} and misses {len(need.missing)}"


def _of_disk(catalogue: Catalogue) -> list[str]:
    disk = catalogue.disk
    if len(disk.files) > CHECKED:
        return []
    pieces = [piece for file in disk.files.values() for piece in file.pieces.values()]
    found = []
    if disk.used != sum(file.size for file in disk.files.values()):
        found.append("the spill files do not add up")
    if disk.live_bytes != sum(padded(piece.part.size) for piece in pieces):
        found.append("what is needed of the spill files does not add up")
    if any(piece.part.disk is not piece for piece in pieces):
        found.append("a spill file has a piece that its part does not know")
    return found
