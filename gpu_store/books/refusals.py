"""Core of what a refusal says: how much was asked for, why it is not to be had, and who holds what of which tier.

The books know processes by their ids, and the pin board by their rows: `owner <id>`, `process <id>` and `process #<row>` are
given names by the shell (`runtime/node/tiers.py`).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from itertools import chain, islice

from afield.gpu_store.books.arena_books import ArenaBooks
from afield.gpu_store.books.catalogue import Catalogue
from afield.gpu_store.tiers import HOST, Pins
from afield.units import format_bytes

#: An error message names the few holders that matter.
TOP_HOLDERS = 5
#: Whether somebody has pinned them is looked up for so many copies at most, those used last: a refusal must not take long.
MOST_LOOKED_AT = 1 << 16


def describe_full(catalogue: Catalogue, arena: int, asked: int) -> str:
    """Return what tells a user why `asked` bytes were not to be had in an arena; names each tier below it."""
    books = catalogue.arenas.get(arena)
    if books is None:
        return f"there is no arena {arena}: {catalogue.gone.get(arena, 'its device is not in use')}"
    below = [catalogue.disk.describe()]
    if arena != HOST:
        host = catalogue.arenas[HOST].usage()
        below.insert(
            0,
            f"{format_bytes(host.used)} of the {format_bytes(host.capacity)} of {host.label} are used "
            f"({format_bytes(host.leased)} leased to processes)",
        )
    sentences = (
        f"{format_bytes(asked)} ({asked} bytes) {_verdict(books, asked)}.",
        _arithmetic(books),
        _pinned(books, catalogue.pins),
        _top_holders(books),
        f"What no process holds an array of can go to a lower tier: {'; '.join(below)}.",
    )
    return " ".join(sentences)


def _verdict(books: ArenaBooks, asked: int) -> str:
    extents, where = books.extents, books.label
    raise_it = "raise host_memory= in afield.init()" if books.number == HOST else "use a device with more memory"
    room = extents.rounded(asked)
    if room > extents.capacity:
        return f"is larger than all of {where} and can never fit; {raise_it}, or make the value in smaller pieces"
    if room <= extents.largest_free:
        return f"would fit in {where}, but larger requests wait before it and may not be overtaken"
    if room <= extents.free_bytes:
        return (
            f"does not fit in one piece in {where} now: so much is free, but between the free pieces lies what is in use; "
            f"let go of arrays that were made between others, or {raise_it}"
        )
    return f"does not fit in {where} now; hold fewer large arrays at a time, or {raise_it}"


def _arithmetic(books: ArenaBooks) -> str:
    extents = books.extents
    parts = sum(held.count for held in books.owners.values())
    held = [
        f"{format_bytes(books.sealed_bytes)} in {parts} parts of objects",
        f"{format_bytes(books.leased_bytes)} leased to processes that write",
    ]
    if books.moving_bytes:
        held.append(f"{format_bytes(books.moving_bytes)} in moves under way")
    spare = sum(copy.room for copy in books.spares)
    of_them = f"; {format_bytes(spare)} of the objects are kept for lineage alone" if spare else ""
    reserved = f", {format_bytes(books.reserved)} reserved by gpu_memory=" if books.reserved else ""
    return (
        f"Capacity {format_bytes(extents.capacity)}, used {format_bytes(extents.used)} ({', '.join(held)}{of_them}){reserved}, "
        f"free {format_bytes(extents.free_bytes)}, largest free piece {format_bytes(extents.largest_free)}, "
        f"{len(books.queue)} requests waiting."
    )


def _pinned(books: ArenaBooks, pins: Pins) -> str:
    """Say which process has pinned how much: it maps these arrays, so they can neither move nor go."""
    shelves = (books.primaries, books.secondaries, books.leaving, books.spares)
    copies = list(islice(chain.from_iterable(reversed(shelf) for shelf in shelves), MOST_LOOKED_AT))
    copies = [copy for copy in copies if copy.slot]
    found = []
    for index, held in pins.holders([copy.slot for copy in copies]).items():
        sizes = [copy.room for copy, is_held in zip(copies, held, strict=True) if is_held]
        found.append((sum(sizes), f"process #{index}", len(sizes)))
    fixed = sum(copy.room for copy in books.fixed)
    if fixed:
        found.append((fixed, "what never moves", len(books.fixed)))
    return f"Arrays in use, which must stay where they are: {_largest(found)}."


def _top_holders(books: ArenaBooks) -> str:
    holders = [(held.size, f"owner {o.hex()[:16]}", held.count) for o, held in books.owners.items()]
    holders += [(r.size, f"process {c.hex()[:16]} (being written)", 0) for c, r in books.leased.items()]
    return f"Top holders: {_largest(holders)}."


def _largest(holders: Iterable[tuple[int, str, int]]) -> str:
    """Name the largest of holders, each (bytes, name, number of parts)."""
    holders = list(holders)
    named = [
        f"{who}: {format_bytes(size)}" + (f" in {count} parts" if count else "")
        for size, who, count in heapq.nlargest(TOP_HOLDERS, holders, key=lambda holder: holder[:2])
    ]
    more = f", and {len(holders) - TOP_HOLDERS} more" if len(holders) > TOP_HOLDERS else ""
    return "; ".join(named) + more if named else "none"
