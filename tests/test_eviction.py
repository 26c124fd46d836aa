"""What goes when room is short: in one piece, what lineage alone needs first, and what a refusal says of the rest."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afield.gpu_store.books import eviction, windows
from afield.gpu_store.tiers import HOST, SPARE, Granted, Lost, Move, Refused, WriteFile
from tests.store_books import GPU, KIB, OWNER, A, B, Books, granted, only, refused


def names(count: int) -> list[bytes]:
    return [b"%d" % i for i in range(count)]


def filled(count: int, **options: int) -> Books:
    """Return books whose device is full of parts of 4 KiB each, b"0" first and the longest unused."""
    store = Books(1 << 20, gpu=count * 4 * KIB, **options)
    for name in names(count):
        store.store(name, (GPU, 4 * KIB))
    return store


def spilled(store: Books, count: int) -> list[bytes]:
    return [name for name in names(count) if store.parts(name) is not None and store.where(name) == [HOST]]


def test_what_leaves_lies_side_by_side() -> None:
    store = filled(8)
    store.pin(b"0")
    store.pin(b"2")
    effects = store.finish(store.lease(B, 1, GPU, 8 * KIB))
    assert only(Granted, effects).size == 8 * KIB
    assert spilled(store, 8) == [b"1", b"3", b"4"]  # the two used longest ago, and what one of them lacks a neighbour


def test_enough_that_lies_in_pieces_is_made_whole_by_the_cheapest_move() -> None:
    store = filled(8)
    for name in (b"2", b"5"):
        store.finish(store.free(name))
    store.pin(b"1")
    effects = store.finish(store.lease(B, 1, GPU, 8 * KIB))
    assert only(Granted, effects).offset == 8 * KIB  # where 2 was, and 3
    assert spilled(store, 8) == [b"3"]


def test_a_window_passes_by_what_is_pinned_without_moving_anything_beside_it() -> None:
    store = filled(8)
    for name in (b"0", b"3", b"6"):
        store.finish(store.free(name))
    for name in (b"2", b"4", b"7"):
        store.pin(name)
    effects = store.finish(store.lease(B, 1, GPU, 8 * KIB))
    assert only(Granted, effects).offset == 0 and spilled(store, 8) == [b"1"]
    waits = store.finish(store.lease(B, 2, GPU, 8 * KIB, deadline=1.0))
    assert waits and isinstance(waits[-1], Granted) and spilled(store, 8) == [b"1", b"5"]
    assert store.finish(store.lease(B, 3, GPU, 8 * KIB, deadline=2.0))[:-1] == []


def test_what_has_another_copy_is_the_cheapest_neighbour() -> None:
    store = filled(8)
    found = store.finish(store.need(B, 1, b"5", [(0, HOST)]))
    assert found
    store.mapped(B, 1)
    for name in (b"0", b"4", b"7"):
        store.finish(store.free(name))
    effects = store.finish(store.lease(B, 2, GPU, 8 * KIB))
    assert not [effect for effect in effects if isinstance(effect, Move)]
    assert only(Granted, effects).offset == 16 * KIB


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=14),
    states=st.lists(st.sampled_from(["kept", "kept", "pinned", "freed"]), min_size=14, max_size=14),
    asked=st.integers(1, 16),
)
def test_what_could_be_met_by_moving_is_met(sizes: list[int], states: list[str], asked: int) -> None:
    store = Books(1 << 20, gpu=sum(sizes) * KIB)
    for i, size in enumerate(sizes):
        store.store(b"%d" % i, (GPU, size * KIB))
    runs, run = [0], 0
    for i, (size, state) in enumerate(zip(sizes, states, strict=False)):
        if state == "pinned":
            store.pin(b"%d" % i)
            run = 0
        elif state == "freed":
            store.finish(store.free(b"%d" % i))
        run += size if state != "pinned" else 0
        runs.append(run)
    effects = store.finish(store.lease(B, 1, GPU, asked * KIB, deadline=9.0))
    assert bool([effect for effect in effects if isinstance(effect, Granted)]) == (asked <= max(runs))
    assert store.validate() == []
    if asked > max(runs):
        effects += store.expire(9.0)
        assert isinstance(effects[-1], Refused)


def test_of_very_many_copies_those_used_longest_ago_go_until_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "LOOKED_AT", 3)
    store = filled(16)
    for name in (b"9", b"12"):
        store.finish(store.free(name))
    for name in (b"0", b"2"):
        store.pin(name)
    effects = store.finish(store.lease(B, 1, GPU, 12 * KIB))
    assert only(Granted, effects).size == 12 * KIB and store.validate() == []


# -- what only lineage needs ----------------------------------------------------------------------------------------------


def test_what_only_lineage_needs_goes_before_anything_moves() -> None:
    store = Books(16 * KIB)
    for name in names(4):
        store.store(name, (HOST, 4 * KIB))
    assert store.set_spare(OWNER, [b"2"], True) == []
    grant, lost = store.lease(B, 1, HOST, 4 * KIB)
    assert lost == Lost(OWNER, [b"2"], "memory was short, and nothing but lineage needed it", SPARE)
    assert isinstance(grant, Granted)
    assert only(WriteFile, store.lease(B, 2, HOST, 4 * KIB)).pieces[0][0] == 0  # then what was used longest ago
    assert store.free(b"2") == [] and store.validate() == []


def test_all_copies_of_what_only_lineage_needs_go() -> None:
    store = Books(16 * KIB, gpu=8 * KIB)
    store.store(b"x", (HOST, 4 * KIB), (HOST, 4 * KIB))
    store.finish(store.need(B, 1, b"x", [(0, GPU)]))
    store.mapped(B, 1)
    store.set_spare(OWNER, [b"x"], True)
    _, lost = store.lease(B, 2, GPU, 8 * KIB)
    assert isinstance(lost, Lost) and lost.object_ids == [b"x"]
    assert store.usage(HOST).used == 0 and store.validate() == []


def test_what_somebody_reads_or_needs_again_is_not_let_go() -> None:
    store = Books(8 * KIB)
    for name in names(2):
        store.store(name, (HOST, 4 * KIB))
    store.set_spare(OWNER, names(2), True)
    store.pin(b"0")
    store.set_spare(OWNER, [b"1"], False)
    assert only(WriteFile, store.lease(B, 1, HOST, 4 * KIB, deadline=1.0)).pieces[0][0] == 4 * KIB
    assert store.where(b"0") == [HOST] and store.validate() == []


def test_only_the_owner_says_what_lineage_needs() -> None:
    store = Books(4 * KIB)
    store.store(b"x", (HOST, 4 * KIB))
    store.set_spare(b"somebody", [b"x", b"unknown"], True)
    assert only(WriteFile, store.lease(B, 1, HOST, 4 * KIB))


# -- what a refusal says ---------------------------------------------------------------------------------------------------


def test_a_refusal_names_who_has_pinned_how_much() -> None:
    store = filled(4)
    for name in (b"0", b"2"):
        store.pin(name)
    store.lease(A, 1, HOST, KIB)
    text = refused(store.lease(B, 1, GPU, 12 * KIB, block=False)[-1:]).reason
    assert "Arrays in use, which must stay where they are: process #1: 8 KiB in 2 parts." in text


def test_a_refusal_says_what_lies_in_pieces_and_what_is_spare() -> None:
    store = filled(8)
    for name in (b"1", b"3", b"5"):
        store.finish(store.free(name))
    for name in (b"0", b"2", b"4", b"6"):
        store.pin(name)
    store.set_spare(OWNER, [b"2"], True)
    text = refused(store.lease(B, 1, GPU, 12 * KIB, block=False)[-1:]).reason
    for words in (
        "does not fit in one piece in device GPU-1 now",
        "free 12 KiB, largest free piece 4 KiB",
        "4 KiB of the objects are kept for lineage alone",
        "process #1: 16 KiB in 4 parts",
    ):
        assert words in text, text


def test_a_refusal_names_what_never_moves() -> None:
    store = Books(8 * KIB)
    store.store(b"x", (HOST, 8 * KIB), slots=False)
    assert "what never moves: 8 KiB in 1 parts" in refused(store.lease(B, 1, HOST, KIB, block=False)).reason


def test_a_granted_lease_needs_no_window() -> None:
    store = filled(2)
    store.finish(store.free(b"0"))
    assert granted(store.lease(B, 1, GPU, 4 * KIB)).offset == 0


# -- many small copies -----------------------------------------------------------------------------------------------------


def test_small_copies_leave_a_device_together_and_large_ones_few_at_a_time() -> None:
    store = Books(256 << 20, gpu=64 << 20, high=0.5, low=0.25)
    for name in names(16):
        moves = store.store(name, (GPU, 2 << 20))
    moves = [*moves, *store.store(b"last", (GPU, 2 << 20))]
    assert len(moves) == eviction.MAX_SPILLS
    store = Books(16 << 20, gpu=1024 * 4 * KIB, high=0.5, low=0.25)
    for name in names(513):
        moves = store.store(name, (GPU, 4 * KIB))
    assert len(moves) == 257 and all(isinstance(move, Move) for move in moves)


def test_what_has_left_together_is_closed_together() -> None:
    store = Books(16 << 20, gpu=1024 * 4 * KIB, high=0.5, low=0.25)
    for name in names(513):
        moves = store.store(name, (GPU, 4 * KIB))
    barriers = store.pins.barriers
    jobs = [move.job for move in moves if isinstance(move, Move)]
    store.pin(b"0")
    more = store.finished_all([(job, "failed: x" if at == 1 else "") for at, job in enumerate(jobs)])
    assert len(more) == 2  # in the place of those two that have not gone, closed once more together
    assert store.pins.barriers == barriers + 2 and store.validate() == []
    assert [name for name in names(4) if store.where(name) == [GPU]] == [b"0", b"1"]
    assert store.usage(GPU).used == (513 - 255) * 4 * KIB
