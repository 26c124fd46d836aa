"""Free-space manager of one slab: which byte ranges are free, and where the next one goes.

Theory of operation. A slab of `capacity` bytes is counted in units of `alignment`. Below `high_water` every unit is
either allocated or part of exactly one free block; free blocks never touch (they coalesce at once). Above
`high_water` lies the wilderness: units that nobody has ever held. Allocated ranges are not recorded at all, so that a
caller may take one large chunk and give pieces of it back in any order.

Two indexes over the free blocks answer every question:

- `_starts`, the start of every block in order. The last block that starts before the end of a range being freed tells
  whether the range overlaps free space (a double free) and whether it touches its neighbour.
- `_sizes` with `_by_size`, one bin per size. The smallest non-empty bin that is large enough is the best fit.

Both are trees of bitmaps searched with find-first-set, as the two-level segregated fit allocator does with its two
levels (M. Masmano, I. Ripoll, A. Crespo, J. Real, "TLSF: a new dynamic memory allocator for real-time systems", ECRTS
2004). Python integers make wide words cheap, so here a third level buys exact sizes: unlike TLSF's ranges of sizes, a
request never fails while a block that could hold it is free. Each operation touches a constant number of words (three
levels of 1024 bits cover 64 GiB at 64 bytes).

The first touch of fresh shared-memory pages costs ten times a copy. So the wilderness is used only when no block
below `high_water` fits, and then the free block that ends at `high_water`, if there is one, is used up first. Within
one size the block freed last is taken first: its pages are the likeliest to be in a cache.
"""

from __future__ import annotations

from collections.abc import Iterator

_WORD_BITS = 10
_WORD_MASK = (1 << _WORD_BITS) - 1
_BITS = tuple(1 << i for i in range(1 << _WORD_BITS))


class ExtentError(AssertionError):
    """A caller asked for something impossible (a double free, a range outside the slab): a bug of the caller."""


class _IntSet:
    """An ordered set of integers in [0, universe): a sparse tree of bitmaps, one dict of words per level."""

    __slots__ = ("_levels",)

    def __init__(self, universe: int) -> None:
        depth = max(1, -(-(universe - 1).bit_length() // _WORD_BITS))
        self._levels: list[dict[int, int]] = [{} for _ in range(depth)]

    def add(self, item: int) -> None:
        for level in self._levels:
            word = item >> _WORD_BITS
            bits = level.get(word, 0)
            level[word] = bits | _BITS[item & _WORD_MASK]
            if bits:
                return
            item = word

    def remove(self, item: int) -> None:
        for level in self._levels:
            word = item >> _WORD_BITS
            bits = level[word] ^ _BITS[item & _WORD_MASK]
            if bits:
                level[word] = bits
                return
            del level[word]
            item = word

    def floor(self, item: int) -> int:
        """Return the largest member that is <= item, or -1."""
        below = (_BITS[item & _WORD_MASK] << 1) - 1
        for depth, level in enumerate(self._levels):
            word = item >> _WORD_BITS
            bits = level.get(word, 0) & below
            if bits:
                found = word << _WORD_BITS | bits.bit_length() - 1
                for lower in self._levels[:depth][::-1]:
                    found = found << _WORD_BITS | lower[found].bit_length() - 1
                return found
            item = word
            below = _BITS[item & _WORD_MASK] - 1
        return -1

    def ceil(self, item: int) -> int:
        """Return the smallest member that is >= item, or -1."""
        for depth, level in enumerate(self._levels):
            bits = level.get(item >> _WORD_BITS, 0) >> (item & _WORD_MASK)
            if bits:
                found = item + (bits & -bits).bit_length() - 1
                for lower in self._levels[:depth][::-1]:
                    bits = lower[found]
                    found = found << _WORD_BITS | (bits & -bits).bit_length() - 1
                return found
            item = (item >> _WORD_BITS) + 1
        return -1

    def last(self) -> int:
        """Return the largest member, or -1."""
        return self.floor((1 << _WORD_BITS * len(self._levels)) - 1)


class ExtentAllocator:
    """Hands out and takes back extents of one slab; offsets and sizes in bytes."""

    __slots__ = ("_by_size", "_high", "_shift", "_size_at", "_sizes", "_starts", "_units", "_used")

    def __init__(self, capacity: int, alignment: int = 64) -> None:
        """Manage [0, capacity); `alignment` is a power of two, and a capacity between two multiples is rounded down."""
        if alignment <= 0 or alignment & (alignment - 1):
            raise ExtentError(f"alignment {alignment} is not a power of two")
        if capacity < 0:
            raise ExtentError(f"capacity {capacity} is negative")
        self._shift = alignment.bit_length() - 1
        self._units = capacity >> self._shift
        self._high = 0
        self._used = 0
        self._size_at: dict[int, int] = {}
        self._by_size: dict[int, dict[int, None]] = {}
        self._starts = _IntSet(self._units + 1)
        self._sizes = _IntSet(self._units + 1)

    @property
    def capacity(self) -> int:
        """Bytes managed: a multiple of the alignment."""
        return self._units << self._shift

    @property
    def alignment(self) -> int:
        """Bytes to which offsets and sizes are rounded."""
        return 1 << self._shift

    @property
    def used(self) -> int:
        """Bytes handed out and not yet freed, rounding included."""
        return self._used << self._shift

    @property
    def free_bytes(self) -> int:
        """Bytes that are free, in however many pieces."""
        return (self._units - self._used) << self._shift

    @property
    def largest_free(self) -> int:
        """The largest size that `allocate` would grant now, in bytes."""
        return max(self._sizes.last(), self._units - self._warm_tail()) << self._shift

    @property
    def high_water(self) -> int:
        """One past the highest byte that was ever handed out: pages from here on were never touched."""
        return self._high << self._shift

    def free_blocks(self) -> Iterator[tuple[int, int]]:
        """Yield (offset, size) of all that is free, in no order; what was never handed out comes last."""
        for start, units in self._size_at.items():
            yield start << self._shift, units << self._shift
        if self._high < self._units:
            yield self._high << self._shift, (self._units - self._high) << self._shift

    def rounded(self, size: int) -> int:
        """Return the bytes that an allocation of `size` bytes takes."""
        return -(-size >> self._shift) << self._shift

    def allocate(self, size: int) -> int | None:
        """Take `size` bytes (rounded up) and return their offset, or None when no free block can hold them."""
        if size <= 0:
            raise ExtentError(f"cannot allocate {size} bytes")
        units = -(-size >> self._shift)
        if units > self._units - self._used:
            return None
        fit = self._sizes.ceil(units)
        if fit >= 0:
            start = next(reversed(self._by_size[fit]))
            self._remove(start)
            if fit > units:
                self._insert(start + units, fit - units)
        else:
            start = self._warm_tail()
            if start + units > self._units:
                return None
            if start < self._high:
                self._remove(start)
            self._high = start + units
        self._used += units
        return start << self._shift

    def free(self, offset: int, size: int) -> None:
        """Give back [offset, offset + size): all of an allocation or any part of it that starts on the alignment.

        Raises ExtentError, and changes nothing, when a byte of the range is not allocated.
        """
        shift = self._shift
        start = offset >> shift
        units = -(-size >> shift)
        end = start + units
        if size <= 0 or offset < 0 or start << shift != offset or end > self._high:
            raise ExtentError(
                f"free of [{offset}, +{size}) is not aligned to {1 << shift} or outside of [0, {self.high_water})"
            )
        before = self._starts.floor(end - 1)
        size_before = self._size_at[before] if before >= 0 else 0
        if before + size_before > start:
            raise ExtentError(
                f"free of [{offset}, +{size}), but [{before << shift}, +{size_before << shift}) is free already"
            )
        self._used -= units
        if size_before and before + size_before == start:
            self._remove(before)
            start = before
        after = self._size_at.get(end)
        if after is not None:
            self._remove(end)
            end += after
        self._insert(start, end - start)

    def _warm_tail(self) -> int:
        """Return the unit from which everything up to the end of the slab is free."""
        last = self._starts.last()
        if last >= 0 and last + self._size_at[last] == self._high:
            return last
        return self._high

    def _insert(self, start: int, units: int) -> None:
        self._size_at[start] = units
        self._starts.add(start)
        peers = self._by_size.get(units)
        if peers is None:
            self._by_size[units] = {start: None}
            self._sizes.add(units)
        else:
            peers[start] = None

    def _remove(self, start: int) -> None:
        units = self._size_at.pop(start)
        self._starts.remove(start)
        peers = self._by_size[units]
        if len(peers) == 1:
            del self._by_size[units]
            self._sizes.remove(units)
        else:
            del peers[start]
