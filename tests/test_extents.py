"""The extent allocator against a naive map of units, and the promises about warm space."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from afield.gpu_store.extents import ExtentAllocator, ExtentError, _IntSet

MIB = 2**20


def free_ranges(extents: ExtentAllocator) -> Iterator[tuple[int, int]]:
    """Yield the (offset, size) of every free block below `high_water`, in no order."""
    for start, units in extents._size_at.items():
        yield start << extents._shift, units << extents._shift


def test_sizes_are_rounded_and_offsets_aligned() -> None:
    extents = ExtentAllocator(MIB)
    assert extents.rounded(1) == 64
    assert extents.rounded(64) == 64
    assert extents.rounded(65) == 128
    first, second = extents.allocate(1), extents.allocate(65)
    assert (first, second) == (0, 64)
    assert extents.used == 64 + 128
    assert extents.free_bytes == MIB - extents.used
    extents.free(64, 65)
    extents.free(0, 1)
    assert extents.used == 0
    assert extents.largest_free == MIB


def test_a_full_slab_says_none_and_keeps_working() -> None:
    extents = ExtentAllocator(256)
    assert extents.allocate(257) is None
    assert extents.allocate(256) == 0
    assert extents.allocate(1) is None
    assert extents.largest_free == 0
    extents.free(64, 64)
    assert extents.allocate(128) is None
    assert extents.allocate(64) == 64


def test_empty_and_odd_capacities() -> None:
    assert ExtentAllocator(0).allocate(1) is None
    assert ExtentAllocator(63).capacity == 0
    assert ExtentAllocator(100, alignment=1).allocate(100) == 0
    assert ExtentAllocator(3 * 512 + 1, alignment=512).capacity == 3 * 512


def test_pieces_of_one_chunk_are_freed_in_any_order_and_coalesce() -> None:
    extents = ExtentAllocator(64 * MIB)
    base = extents.allocate(32 * MIB)
    assert base == 0
    for piece in (3, 1, 7, 0, 2, 6, 4, 5):
        extents.free(piece * 4 * MIB, 4 * MIB)
    assert list(free_ranges(extents)) == [(0, 32 * MIB)]
    assert extents.allocate(32 * MIB) == 0


def test_warm_space_comes_before_the_wilderness() -> None:
    extents = ExtentAllocator(64 * MIB)
    chunks = [extents.allocate(MIB) for _ in range(4)]
    assert extents.high_water == 4 * MIB
    for offset in (chunks[1], chunks[2]):
        assert offset is not None
        extents.free(offset, MIB)
    assert extents.allocate(2 * MIB) == MIB
    assert extents.high_water == 4 * MIB


def test_the_wilderness_is_entered_through_the_free_block_before_it() -> None:
    extents = ExtentAllocator(8 * MIB)
    extents.allocate(MIB)
    extents.allocate(MIB)
    extents.free(MIB, MIB)
    assert extents.largest_free == 7 * MIB
    assert extents.allocate(7 * MIB) == MIB
    assert extents.high_water == 8 * MIB


def test_best_fit_and_last_freed_first() -> None:
    extents = ExtentAllocator(MIB)
    sizes = [256, 64, 128, 64, 128, 64]
    offsets = [extents.allocate(size) for size in sizes]
    for i in (0, 2, 4):
        offset = offsets[i]
        assert offset is not None
        extents.free(offset, sizes[i])
    assert extents.allocate(128) == offsets[4]
    assert extents.allocate(100) == offsets[2]
    assert extents.allocate(128) == offsets[0]


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 0), (0, -64), (-64, 64), (32, 64), (1024, 64), (960, 128), (128, 64), (64, 128), (64, 192), (192, 1)],
)
def test_impossible_frees_raise_and_change_nothing(offset: int, size: int) -> None:
    extents = ExtentAllocator(MIB)
    extents.allocate(1024)
    extents.free(128, 128)
    with pytest.raises(ExtentError):
        extents.free(offset, size)
    assert (extents.used, list(free_ranges(extents))) == (896, [(128, 128)])


@pytest.mark.parametrize("size", [0, -1])
def test_impossible_allocations_raise(size: int) -> None:
    with pytest.raises(ExtentError):
        ExtentAllocator(MIB).allocate(size)


@pytest.mark.parametrize(("capacity", "alignment"), [(-1, 64), (1, 0), (1, 48), (1, -64)])
def test_impossible_slabs_raise(capacity: int, alignment: int) -> None:
    with pytest.raises(ExtentError):
        ExtentAllocator(capacity, alignment)


def test_a_huge_slab_costs_nothing() -> None:
    extents = ExtentAllocator(2**50)
    assert extents.allocate(2**49) == 0
    far = extents.allocate(2**20)
    assert far == 2**49
    extents.free(0, 2**49)
    assert extents.largest_free == 2**49
    assert extents.allocate(2**49) == 0


SPARSE = st.one_of(
    st.integers(0, 2**30 - 1), st.integers(0, 40).map(lambda i: i * 2**20 + i % 3), st.integers(1000, 1050)
)


@given(st.sets(SPARSE, max_size=40), st.sets(SPARSE, max_size=40), st.lists(SPARSE, max_size=20))
def test_the_ordered_set_over_several_levels(members: set[int], removed: set[int], probes: list[int]) -> None:
    tree = _IntSet(2**30)
    for item in [*members, *members]:
        tree.add(item)
    for item in members & removed:
        tree.remove(item)
    rest = sorted(members - removed)
    assert tree.last() == (rest[-1] if rest else -1)
    for probe in [*probes, *members, 0, 2**30 - 1]:
        at = bisect_right(rest, probe)
        assert tree.floor(probe) == (rest[at - 1] if at else -1)
        at = bisect_left(rest, probe)
        assert tree.ceil(probe) == (rest[at] if at < len(rest) else -1)


UNITS = 200


class AllocatorAgainstNaiveMap(RuleBasedStateMachine):
    """The model is one flag per unit; allocations may be freed whole or in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.extents = ExtentAllocator(UNITS * 64)
        self.taken = [False] * UNITS
        self.highest = 0
        self.held: list[tuple[int, int]] = []

    def runs(self) -> list[tuple[int, int]]:
        """Return the maximal free (start, units) runs of the model."""
        runs: list[tuple[int, int]] = []
        start: int | None = None
        for unit, taken in enumerate([*self.taken, True]):
            if taken and start is not None:
                runs.append((start, unit - start))
                start = None
            elif not taken and start is None:
                start = unit
        return runs

    def mark(self, start: int, units: int, taken: bool) -> None:
        for unit in range(start, start + units):
            assert self.taken[unit] is not taken, "overlap"
            self.taken[unit] = taken

    @rule(size=st.one_of(st.integers(1, 640), st.integers(1, UNITS * 64 + 64)))
    def allocate(self, size: int) -> None:
        units = -(-size // 64)
        runs = self.runs()
        warm = [min(start + length, self.highest) - start for start, length in runs]
        offset = self.extents.allocate(size)
        if offset is None:
            assert all(length < units for _, length in runs)
            return
        start = offset // 64
        self.mark(start, units, True)
        if any(length >= units for length in warm):
            fitting = [length for length in warm if length >= units]
            assert start + units <= self.highest, "warm space was free"
            assert min(fitting) == next(w for (s, _), w in zip(runs, warm, strict=True) if s == start), "best fit"
        self.highest = max(self.highest, start + units)
        self.held.append((start, units))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free_part(self, data: st.DataObject) -> None:
        start, units = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        first = data.draw(st.integers(0, units - 1))
        last = data.draw(st.integers(first + 1, units))
        slack = data.draw(st.integers(0, 63))
        self.extents.free((start + first) * 64, (last - first) * 64 - slack)
        self.mark(start + first, last - first, False)
        self.held += [(s, u) for s, u in ((start, first), (start + last, units - last)) if u]

    @rule(start=st.integers(0, UNITS - 1), units=st.integers(1, 8))
    def free_what_is_not_held(self, start: int, units: int) -> None:
        if start + units > UNITS or not all(self.taken[start : start + units]):
            with pytest.raises(ExtentError):
                self.extents.free(start * 64, units * 64)

    @precondition(lambda self: self.held)
    @rule()
    def free_everything(self) -> None:
        for start, units in self.held:
            self.extents.free(start * 64, units * 64)
            self.mark(start, units, False)
        self.held.clear()
        assert self.extents.largest_free == UNITS * 64

    @invariant()
    def agrees(self) -> None:
        extents = self.extents
        assert extents.used == sum(self.taken) * 64
        assert extents.used + extents.free_bytes == extents.capacity
        assert extents.high_water == self.highest * 64
        runs = self.runs()
        assert extents.largest_free == max((length for _, length in runs), default=0) * 64
        warm = {(s * 64, (min(s + n, self.highest) - s) * 64) for s, n in runs if s < self.highest}
        assert set(free_ranges(extents)) == warm


TestAllocatorAgainstNaiveMap = pytest.mark.slow(AllocatorAgainstNaiveMap.TestCase)
TestAllocatorAgainstNaiveMap.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
