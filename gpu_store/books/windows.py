"""Core of room in one piece: which copies have to go so that what becomes free lies side by side.

Theory of operation. An arena may have enough bytes free and yet no piece that is large enough, since parts do not move within
it. What is free and what may go, in the order of the offsets, makes runs; between two runs lies what has to stay (leased to a
process that writes, in a move, pinned). A *window* is a stretch of one run that is at least as long as what is asked for.
For each end there is one shortest window, so that one pass with two ends finds the cheapest of all.

The price of a copy is what it takes to let it go: its bytes, and for the one used last twice as much as for the one used
longest ago; what has another copy, or is kept for lineage alone, goes for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from afield.gpu_store.books.arena_books import ArenaBooks
from afield.gpu_store.books.records import Copy, Key
from afield.gpu_store.tiers import Pins

#: Of each shelf so many copies are looked at, those used longest ago: this takes about 20 ms.
LOOKED_AT = 8192

#: (offset, size, price, what is there: None if it is free)
Stretch = tuple[int, int, int, Copy | None]


def cheapest_window(stretches: Iterable[Stretch], room: int) -> list[Copy] | None:
    """Return the copies in the cheapest window of `room` bytes; None if there is no such window."""
    ordered = sorted(stretches, key=lambda stretch: stretch[0])
    best: tuple[int, int, int] | None = None
    first = size = price = 0
    end = -1
    for last, (offset, length, cost, _) in enumerate(ordered):
        if offset != end:
            first, size, price = last, 0, 0
        end = offset + length
        size += length
        price += cost
        while size - ordered[first][1] >= room:
            size -= ordered[first][1]
            price -= ordered[first][2]
            first += 1
        if size >= room and (best is None or price < best[0]):
            best = price, first, last + 1
    if best is None:
        return None
    return [copy for _, _, _, copy in ordered[best[1] : best[2]] if copy is not None]


def stretches_of(books: ArenaBooks, pins: Pins, key: Key, largest: int) -> list[Stretch]:
    """Return what is free in an arena, and what may go for somebody with this key.

    What has no other copy can go only if it is not larger than `largest`. Who has pinned what is read off the board: it may be
    different in the next moment, and only closing the copies tells.
    """
    free = [
        copy for shelf in (books.spares, books.secondaries) for copy in islice(shelf, LOOKED_AT) if copy.may_leave(key)
    ]
    dear = [
        copy
        for copy in islice(books.primaries, LOOKED_AT)
        if copy.may_leave(key) and (copy.part.backed or copy.room <= largest)
    ]
    copies = [*free, *dear]
    count = len(dear)
    prices = [0] * len(free) + [0 if copy.part.backed else copy.room * (count + i) for i, copy in enumerate(dear)]
    stays = pinned_by_anyone(pins, copies)
    found: list[Stretch] = [(offset, size, 0, None) for offset, size in books.extents.free_blocks()]
    found += [
        (copy.offset, copy.room, price, copy)
        for copy, price, stay in zip(copies, prices, stays, strict=True)
        if not stay
    ]
    return found


def looks_at_all(books: ArenaBooks) -> bool:
    """Tell whether there are so few copies that what is not found is not there."""
    return max(len(books.primaries), len(books.secondaries), len(books.spares)) <= LOOKED_AT


def pinned_by_anyone(pins: Pins, copies: Sequence[Copy]) -> list[bool]:
    """Tell of each copy whether a process has pinned it, as far as the board shows it now."""
    holders = pins.holders([copy.slot for copy in copies])
    return [any(held) for held in zip(*holders.values(), strict=True)] if holders else [False] * len(copies)
