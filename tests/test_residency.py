"""The books of all tiers, case by case: leases and their queue, seals, early frees, owners, wrong use."""

from __future__ import annotations

import pytest

from afield.gpu_store.books import catalogue, eviction, refusals
from afield.gpu_store.books.disk_books import DiskBooks
from afield.gpu_store.tiers import DISK, GET, HOST, PREFETCH, Granted, PartCopy, Refused, StoreUsageError, Trim
from tests.store_books import GPU, KIB, OTHER, OWNER, A, B, Books, C, granted, host_part, refused, sealed_store

# ---- leases and seals -----------------------------------------------------------------------------------------------


def test_chunk_is_cut_into_objects_and_its_tail_given_back() -> None:
    store = Books(64 * KIB)
    chunk = granted(store.lease(A, 1, HOST, 32 * KIB - 1))
    assert (chunk.client, chunk.request_id, chunk.offset, chunk.size) == (A, 1, 0, 32 * KIB)
    assert store.seal(A, b"x", OWNER, [*host_part(0, 100), *host_part(KIB, KIB)]) == []
    assert store.seal(A, b"y", OTHER, host_part(128, 64)) == []
    assert store.give_back(A, HOST, 16 * KIB, 16 * KIB) == []
    assert list(store.objects()) == [(b"x", OWNER, {HOST: 128 + KIB}), (b"y", OTHER, {HOST: 64})]
    assert store.parts(b"x") == [*host_part(0, 100), *host_part(KIB, KIB)]
    assert store.parts(b"z") is None
    usage = store.usage(HOST)
    assert usage.sealed == 128 + KIB + 64
    assert (usage.used, usage.leased) == (16 * KIB, 16 * KIB - usage.sealed)
    store.free(b"x")
    store.free(b"y")
    store.client_died(A)
    usage = store.usage(HOST)
    assert (usage.used, usage.sealed, list(store.objects())) == (0, 0, [])
    assert usage.high_water == 32 * KIB


def test_what_lies_across_two_chunks_that_touch_can_be_sealed_and_given_back() -> None:
    """A process coalesces what it has free, whichever lease it came with."""
    store = Books(64 * KIB)
    offsets = [granted(store.lease(A, request, HOST, KIB)).offset for request in range(4)]
    assert offsets == [0, KIB, 2 * KIB, 3 * KIB]
    store.seal(A, b"x", OWNER, host_part(KIB // 2, KIB))
    store.give_back(A, HOST, 2 * KIB, 2 * KIB)
    usage = store.usage(HOST)
    assert (usage.used, usage.sealed, usage.leased) == (2 * KIB, KIB, KIB)
    # A hole between two ranges is filled, and all three are one.
    assert granted(store.lease(A, 4, HOST, KIB)).offset == 2 * KIB
    store.seal(A, b"y", OWNER, host_part(KIB + KIB // 2, KIB + KIB // 2))
    store.client_died(A)
    assert store.usage(HOST).used == store.usage(HOST).sealed == 2 * KIB + KIB // 2


def test_waiting_is_strictly_first_in_first_out() -> None:
    store = sealed_store(4 * KIB, KIB, KIB, KIB)
    assert store.lease(B, 1, HOST, 3 * KIB) == []
    assert store.lease(C, 2, HOST, 64) == []
    assert "may not be overtaken" in refused(store.lease(C, 3, HOST, 64, block=False)).reason
    assert store.usage(HOST).waiting == 2
    assert store.free(b"1") == []
    effects = store.free(b"0") + store.free(b"2")
    assert [(e.client, e.request_id) for e in effects if isinstance(e, Granted)] == [(B, 1), (C, 2)]
    assert store.usage(HOST).waiting == 0


def test_who_needs_a_little_more_to_finish_overtakes_those_who_wait_for_him() -> None:
    store = Books(64 * KIB)
    granted(store.lease(A, 1, HOST, 40 * KIB))
    assert store.lease(B, 1, HOST, 40 * KIB, priority=GET) == [Trim(HOST)]
    assert store.lease(C, 1, HOST, KIB) == [], "C has nothing that anybody could wait for"
    assert store.lease(A, 2, HOST, KIB + 64) == [], "this is not little"
    assert granted(store.lease(A, 3, HOST, KIB)).client == A
    granted(store.lease(A, 4, HOST, 64, block=False))
    effects = store.client_died(A)
    assert [(e.client, e.request_id) for e in effects if isinstance(e, Granted)] == [(B, 1), (C, 1)]


def test_the_more_urgent_is_served_first() -> None:
    store = sealed_store(4 * KIB, 4 * KIB)
    for request, priority in ((1, PREFETCH), (2, 1), (3, GET), (4, GET)):
        assert store.lease(B, request, HOST, KIB, priority=priority) == []
    effects = store.free(b"0")
    assert [e.request_id for e in effects if isinstance(e, Granted)] == [3, 4, 2, 1]


def test_what_can_never_fit_is_refused_with_the_arithmetic() -> None:
    store = sealed_store(64 * KIB, 8 * KIB, KIB)
    effect = refused(store.lease(B, 7, HOST, 64 * KIB + 1, deadline=99.0))
    assert effect.never_fits
    assert (effect.client, effect.request_id, effect.arena) == (B, 7, HOST)
    for text in ("65537 bytes", "64 KiB", "9 KiB in 2 parts", "largest free piece 55 KiB", OWNER.hex(), "host_memory"):
        assert text in effect.reason, effect.reason


def test_refusal_says_who_holds_what_in_every_tier() -> None:
    store = Books(64 * KIB, gpu=32 * KIB)
    store.store(b"x", (GPU, 16 * KIB), slots=False)
    store.lease(B, 1, GPU, 8 * KIB)
    store.lease(C, 1, HOST, 32 * KIB)
    effect = refused(store.lease(B, 2, GPU, 16 * KIB, block=False)[1:])
    assert not effect.never_fits
    for text in (
        "device GPU-1",
        f"owner {OWNER.hex()}: 16 KiB in 1 parts",
        f"process {B.hex()} (being written): 8 KiB",
        "32 KiB of the 64 KiB of the host store are used",
        "the disk holds 0 B in 0 files",
    ):
        assert text in effect.reason, effect.reason


def test_top_holders_are_bounded() -> None:
    store = Books(64 * KIB)
    for i in range(40):
        store.store(b"%d" % i, (HOST, 64 * (i + 1)), owner=b"owner%02d" % i)
    text = store.describe_full(HOST, 10**9)
    assert text.count("parts;") == refusals.TOP_HOLDERS - 1
    assert b"owner39".hex() in text


def test_deadlines() -> None:
    store = sealed_store(4 * KIB, 4 * KIB)
    assert store.next_deadline() is None
    store.lease(A, 1, HOST, 3 * KIB, deadline=5.0)
    store.lease(B, 2, HOST, KIB)
    store.lease(C, 3, HOST, KIB, deadline=4.0)
    assert store.next_deadline() == 4.0
    assert store.expire(3.9) == []
    effect = refused(store.expire(4.0))
    assert (effect.client, effect.never_fits) == (C, False)
    assert store.next_deadline() == 5.0


def test_expiry_of_a_big_request_lets_the_small_ones_behind_it_through() -> None:
    store = sealed_store(4 * KIB, 2 * KIB)
    store.lease(A, 1, HOST, 3 * KIB, deadline=1.0)
    store.lease(B, 2, HOST, KIB)
    first, second = store.expire(2.0)
    assert isinstance(first, Refused)
    assert isinstance(second, Granted)
    assert (first.client, second.client) == (A, B)


def test_free_before_seal_takes_effect_at_the_seal() -> None:
    store = Books(4 * KIB)
    granted(store.lease(A, 1, HOST, 4 * KIB))
    assert store.lease(B, 2, HOST, 2 * KIB) == [Trim(HOST)]
    assert store.free(b"x") == []
    assert granted(store.seal(A, b"x", OWNER, host_part(0, 2 * KIB))).client == B
    assert list(store.objects()) == []
    assert store.usage(HOST).sealed == 0
    store.seal(A, b"x", OWNER, host_part(2 * KIB, KIB))
    assert list(store.objects()) == [(b"x", OWNER, {HOST: KIB})]


def test_early_free_that_names_its_sealer_spares_a_later_execution() -> None:
    store = Books(4 * KIB)
    granted(store.lease(A, 1, HOST, KIB))
    again = granted(store.lease(B, 1, HOST, KIB))
    store.free(b"x", sealer=A)
    store.seal(B, b"x", OWNER, host_part(again.offset, KIB))
    assert store.parts(b"x") == host_part(again.offset, KIB)
    store.free(b"y", sealer=A)
    store.client_died(A)
    granted(store.lease(A, 2, HOST, KIB))
    store.seal(A, b"y", OWNER, host_part(0, KIB))
    assert store.parts(b"y") == host_part(0, KIB)


def test_free_that_names_its_sealer_spares_what_somebody_else_has_sealed_since() -> None:
    store = Books(4 * KIB)
    granted(store.lease(A, 1, HOST, KIB))
    again = granted(store.lease(B, 1, HOST, KIB))
    store.seal(A, b"x", OWNER, host_part(0, KIB))
    store.seal(B, b"x", OWNER, host_part(again.offset, KIB))
    store.free(b"x", sealer=A)
    assert store.usage(HOST).sealed == 2 * KIB
    store.free(b"x", sealer=B)
    assert store.usage(HOST).sealed == 0


def test_early_frees_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "MAX_EARLY_FREES", 2)
    store = Books(4 * KIB)
    granted(store.lease(A, 1, HOST, 4 * KIB))
    for object_id in (b"x", b"y", b"z"):
        store.free(object_id)
    for i, object_id in enumerate((b"x", b"y", b"z")):
        store.seal(A, object_id, OWNER, host_part(i * KIB, KIB))
    assert [object_id for object_id, _, _ in store.objects()] == [b"x"]


def test_second_seal_of_a_whole_object_keeps_both_copies_until_the_free() -> None:
    store = sealed_store(4 * KIB, KIB)
    chunk = granted(store.lease(B, 1, HOST, KIB))
    store.seal(B, b"0", OTHER, host_part(chunk.offset, KIB))
    assert list(store.objects()) == [(b"0", OTHER, {HOST: 2 * KIB})]
    assert store.owner_died(OWNER) == []
    store.free(b"0")
    assert store.usage(HOST).used == 0


def test_death_of_a_client_frees_what_it_did_not_seal() -> None:
    store = Books(4 * KIB)
    granted(store.lease(A, 1, HOST, 3 * KIB))
    store.seal(A, b"x", OWNER, host_part(KIB, KIB))
    assert store.lease(A, 2, HOST, 2 * KIB) == [Trim(HOST)]
    assert store.lease(B, 3, HOST, 2 * KIB) == []
    effect = granted(store.client_died(A))
    assert (effect.client, effect.request_id, effect.offset) == (B, 3, 2 * KIB)
    assert list(store.objects()) == [(b"x", OWNER, {HOST: KIB})]
    assert store.client_died(A) == []


def test_owners() -> None:
    store = sealed_store(4 * KIB, KIB, KIB)
    assert store.store(b"1", (HOST, KIB), owner=OTHER, slots=False) == []  # its task ran again, for another process
    assert store.owner_died(OWNER) == [b"0"]
    assert store.owner_died(OTHER) == [b"1"]
    store.free(b"1")
    assert store.owner_died(OTHER) == []


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [(0, 0)],
        [(0, -64)],
        [(32, 64)],
        [(KIB, 64)],
        [(KIB - 64, 128)],
        [(0, 128), (64, 64)],
        [(128, 64)],
        [(-64, 64)],
    ],
)
def test_seal_of_space_that_is_not_leased_changes_nothing(pieces: list[tuple[int, int]]) -> None:
    store = Books(4 * KIB)
    granted(store.lease(A, 1, HOST, KIB))
    granted(store.lease(B, 1, HOST, KIB))
    store.seal(A, b"x", OWNER, host_part(128, 64))
    before = (store.usage(HOST), list(store.objects()))
    with pytest.raises(StoreUsageError):
        store.seal(A, b"y", OWNER, [PartCopy(HOST, offset, size) for offset, size in pieces])
    assert (store.usage(HOST), list(store.objects())) == before


def test_other_wrong_use() -> None:
    store = sealed_store(4 * KIB, 4 * KIB)
    with pytest.raises(StoreUsageError):
        store.give_back(A, HOST, 0, KIB)
    with pytest.raises(StoreUsageError):
        store.give_back(A, GPU, 0, KIB)
    with pytest.raises(StoreUsageError):
        store.seal(A, b"x", OWNER, [PartCopy(GPU, 0, KIB)])
    with pytest.raises(StoreUsageError):
        store.lease(A, 1, HOST, 0)
    store.lease(A, 1, HOST, KIB)
    with pytest.raises(StoreUsageError):
        store.lease(A, 1, HOST, KIB)
    for wants in ([], [(0, DISK)]):
        with pytest.raises(StoreUsageError):
            store.need(A, 2, b"0", wants)
    with pytest.raises(StoreUsageError):
        store.remove_arena(HOST, "no")
    assert "no arena 7" in refused(store.lease(A, 3, 7, KIB)).reason
    assert store.finished(99) == []


def test_trim_is_asked_for_again_while_somebody_waits() -> None:
    store = Books(4 * KIB)
    granted(store.lease(A, 1, HOST, 4 * KIB))
    assert store.lease(B, 1, HOST, 2 * KIB) == [Trim(HOST)]
    assert store.expire(0.0) == []
    assert store.next_deadline() == eviction.RETRY_S
    assert store.expire(1.0) == [Trim(HOST)], "what A had in use may be free by now"
    assert store.expire(1.0 + eviction.RETRY_S / 2) == []
    assert store.give_back(A, HOST, 0, KIB) == []
    assert store.expire(3.0) == [Trim(HOST)]
    assert granted(store.give_back(A, HOST, KIB, KIB)).client == B


def test_a_write_that_was_begun_before_one_that_failed_does_not_hide_the_error() -> None:
    disk = DiskBooks(None)
    first, second = disk.new_file([KIB]), disk.new_file([KIB])
    assert first is not None and second is not None
    disk.fail("no space left")
    disk.written()
    assert "cannot be written to now: no space left" in disk.describe()
    disk.expire(0.0)
    disk.expire(100.0)
    disk.written()
    assert "cannot be written" not in disk.describe() and not disk.error
