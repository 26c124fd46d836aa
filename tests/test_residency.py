"""The host store core: leases, the queue, seals that come late, deaths, and a model that watches every byte."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from afield.gpu_store import residency
from afield.gpu_store.residency import Effect, Granted, HostStoreCore, Refused, StoreUsageError

KIB = 1024
A, B, C = b"client-a", b"client-b", b"client-c"
OWNER, OTHER = b"owner-1", b"owner-2"


def granted(effects: list[Effect]) -> Granted:
    (effect,) = effects
    assert isinstance(effect, Granted)
    return effect


def refused(effects: list[Effect]) -> Refused:
    (effect,) = effects
    assert isinstance(effect, Refused)
    return effect


def sealed_store(capacity: int, *sizes: int) -> HostStoreCore:
    """Return a store in which client A sealed objects b"0", b"1", ... of these sizes for OWNER."""
    store = HostStoreCore(capacity)
    for i, size in enumerate(sizes):
        chunk = granted(store.lease(A, 1000 + i, size, block=False))
        assert store.seal(A, b"%d" % i, OWNER, [(chunk.offset, size)]) == []
    return store


def test_chunk_is_cut_into_objects_and_its_tail_given_back() -> None:
    store = HostStoreCore(64 * KIB)
    chunk = granted(store.lease(A, 1, 32 * KIB - 1, block=True))
    assert (chunk.client, chunk.request_id, chunk.offset, chunk.size) == (A, 1, 0, 32 * KIB)
    assert store.seal(A, b"x", OWNER, [(0, 100), (KIB, KIB)]) == []
    assert store.seal(A, b"y", OTHER, [(128, 64)]) == []
    assert store.give_back(A, 16 * KIB, 16 * KIB) == []
    assert list(store.objects()) == [(b"x", OWNER, 128 + KIB), (b"y", OTHER, 64)]
    assert store.pieces(b"x") == [(0, 100), (KIB, KIB)]
    assert store.pieces(b"z") is None
    assert store.sealed_bytes == 128 + KIB + 64
    assert store.used_bytes == 16 * KIB
    assert store.leased_bytes == 16 * KIB - store.sealed_bytes
    store.free(b"x")
    store.free(b"y")
    store.client_died(A)
    assert (store.used_bytes, store.sealed_bytes, list(store.objects())) == (0, 0, [])
    assert store.high_water == 32 * KIB


def test_waiting_is_strictly_first_in_first_out() -> None:
    store = sealed_store(4 * KIB, KIB, KIB, KIB)
    assert store.lease(B, 1, 3 * KIB, block=True) == []
    assert store.lease(C, 2, 64, block=True) == []
    assert "may not be overtaken" in refused(store.lease(C, 3, 64, block=False)).reason
    assert store.waiting_requests == 2
    assert store.free(b"1") == []
    effects = store.free(b"0") + store.free(b"2")
    assert [(e.client, e.request_id) for e in effects] == [(B, 1), (C, 2)]
    assert store.waiting_requests == 0


def test_what_can_never_fit_is_refused_with_the_arithmetic() -> None:
    store = sealed_store(64 * KIB, 8 * KIB, KIB)
    effect = refused(store.lease(B, 7, 64 * KIB + 1, block=True, deadline=99.0))
    assert effect.never_fits
    assert (effect.client, effect.request_id) == (B, 7)
    for part in (
        "65537 bytes",
        "64 KiB",
        "9 KiB in 2 objects",
        "largest free piece 55 KiB",
        OWNER.hex(),
        "host_memory",
    ):
        assert part in effect.reason, effect.reason


def test_non_blocking_request_is_refused_and_says_who_holds_the_store() -> None:
    store = sealed_store(64 * KIB, 32 * KIB)
    store.lease(B, 1, 16 * KIB, block=False)
    effect = refused(store.lease(B, 2, 32 * KIB, block=False))
    assert not effect.never_fits
    assert f"owner {OWNER.hex()}: 32 KiB in 1 objects" in effect.reason
    assert f"process {B.hex()} (being written): 16 KiB" in effect.reason


def test_top_holders_are_bounded() -> None:
    store = HostStoreCore(64 * KIB)
    for i in range(40):
        chunk = granted(store.lease(A, i, 64 * (i + 1), block=False))
        store.seal(A, b"%d" % i, b"owner%02d" % i, [(chunk.offset, chunk.size)])
    text = store.describe_full(10**9)
    assert text.count("objects;") == residency.TOP_HOLDERS - 1
    assert b"owner39".hex() in text


def test_deadlines() -> None:
    store = sealed_store(4 * KIB, 4 * KIB)
    assert store.next_deadline() is None
    store.lease(A, 1, 3 * KIB, block=True, deadline=5.0)
    store.lease(B, 2, KIB, block=True)
    store.lease(C, 3, KIB, block=True, deadline=4.0)
    assert store.next_deadline() == 4.0
    assert store.expire(3.9) == []
    effect = refused(store.expire(4.0))
    assert (effect.client, effect.never_fits) == (C, False)
    assert store.next_deadline() == 5.0


def test_expiry_of_a_big_request_lets_the_small_ones_behind_it_through() -> None:
    store = sealed_store(4 * KIB, 2 * KIB)
    store.lease(A, 1, 3 * KIB, block=True, deadline=1.0)
    store.lease(B, 2, KIB, block=True)
    first, second = store.expire(2.0)
    assert isinstance(first, Refused)
    assert isinstance(second, Granted)
    assert (first.client, second.client) == (A, B)


def test_free_before_seal_takes_effect_at_the_seal() -> None:
    store = HostStoreCore(4 * KIB)
    granted(store.lease(A, 1, 4 * KIB, block=True))
    assert store.lease(B, 2, 2 * KIB, block=True) == []
    assert store.free(b"x") == []
    assert granted(store.seal(A, b"x", OWNER, [(0, 2 * KIB)])).client == B
    assert list(store.objects()) == []
    assert store.sealed_bytes == 0
    store.seal(A, b"x", OWNER, [(2 * KIB, KIB)])
    assert list(store.objects()) == [(b"x", OWNER, KIB)]


def test_early_free_that_names_its_sealer_spares_a_later_execution() -> None:
    store = HostStoreCore(4 * KIB)
    granted(store.lease(A, 1, KIB, block=True))
    again = granted(store.lease(B, 1, KIB, block=True))
    store.free(b"x", sealer=A)
    store.seal(B, b"x", OWNER, [(again.offset, KIB)])
    assert store.pieces(b"x") == [(again.offset, KIB)]
    store.free(b"y", sealer=A)
    store.client_died(A)
    granted(store.lease(A, 2, KIB, block=True))
    store.seal(A, b"y", OWNER, [(0, KIB)])
    assert store.pieces(b"y") == [(0, KIB)]


def test_early_frees_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "MAX_EARLY_FREES", 2)
    store = HostStoreCore(4 * KIB)
    granted(store.lease(A, 1, 4 * KIB, block=True))
    for object_id in (b"x", b"y", b"z"):
        store.free(object_id)
    for i, object_id in enumerate((b"x", b"y", b"z")):
        store.seal(A, object_id, OWNER, [(i * KIB, KIB)])
    assert [object_id for object_id, _, _ in store.objects()] == [b"x"]


def test_second_seal_of_an_object_keeps_both_copies_until_the_free() -> None:
    store = sealed_store(4 * KIB, KIB)
    chunk = granted(store.lease(B, 1, KIB, block=True))
    store.seal(B, b"0", OTHER, [(chunk.offset, KIB)])
    assert list(store.objects()) == [(b"0", OTHER, 2 * KIB)]
    assert store.owner_died(OWNER) == []
    store.free(b"0")
    assert store.used_bytes == 0


def test_death_of_a_client_frees_what_it_did_not_seal() -> None:
    store = HostStoreCore(4 * KIB)
    granted(store.lease(A, 1, 3 * KIB, block=True))
    store.seal(A, b"x", OWNER, [(KIB, KIB)])
    assert store.lease(A, 2, 2 * KIB, block=True) == []
    assert store.lease(B, 3, 2 * KIB, block=True) == []
    effect = granted(store.client_died(A))
    assert (effect.client, effect.request_id, effect.offset) == (B, 3, 2 * KIB)
    assert list(store.objects()) == [(b"x", OWNER, KIB)]
    assert store.client_died(A) == []


def test_owners() -> None:
    store = sealed_store(4 * KIB, KIB, KIB)
    assert store.set_owner(b"1", OTHER)
    assert not store.set_owner(b"gone", OTHER)
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
    store = HostStoreCore(4 * KIB)
    granted(store.lease(A, 1, KIB, block=True))
    granted(store.lease(B, 1, KIB, block=True))
    store.seal(A, b"x", OWNER, [(128, 64)])
    before = (store.used_bytes, store.sealed_bytes, list(store.objects()))
    with pytest.raises(StoreUsageError):
        store.seal(A, b"y", OWNER, pieces)
    assert (store.used_bytes, store.sealed_bytes, list(store.objects())) == before


def test_other_wrong_use() -> None:
    store = sealed_store(4 * KIB, 4 * KIB)
    with pytest.raises(StoreUsageError):
        store.give_back(A, 0, KIB)
    with pytest.raises(StoreUsageError):
        store.lease(A, 1, 0, block=True)
    store.lease(A, 1, KIB, block=True)
    with pytest.raises(StoreUsageError):
        store.lease(A, 1, KIB, block=True)


UNITS = 64
CLIENTS = st.sampled_from([A, B, C])
IDS = st.sampled_from([b"o%d" % i for i in range(12)])
OWNERS = st.sampled_from([OWNER, OTHER])


class StoreAgainstNaiveMap(RuleBasedStateMachine):
    """The model names the holder of every unit; the queue is a list. Fragmentation is read off the model's map."""

    def __init__(self) -> None:
        super().__init__()
        self.store = HostStoreCore(UNITS * 64)
        self.map: list[bytes | None] = [None] * UNITS  # a client, or an object id
        self.queue: list[tuple[bytes, int, int, float | None]] = []
        self.owners: dict[bytes, bytes] = {}
        self.early: set[bytes] = set()
        self.next_id = 0
        self.now = 0.0

    def largest(self) -> int:
        text = "".join("." if holder is None else "x" for holder in self.map)
        return max(len(run) for run in text.split("x"))

    def apply(self, effects: list[Effect]) -> None:
        """Check each grant against the queue's head and the map; afterwards the head must not fit."""
        for effect in effects:
            client, request_id, units, _ = self.queue.pop(0)
            assert isinstance(effect, Granted)
            assert (effect.client, effect.request_id, effect.size) == (client, request_id, units * 64)
            self.fill(effect.offset // 64, units, None, client)
        if self.queue:
            assert self.queue[0][2] > self.largest(), "the head of the queue fits and was not served"

    def fill(self, start: int, units: int, old: bytes | None, new: bytes | None) -> None:
        assert self.map[start : start + units] == [old] * units
        self.map[start : start + units] = [new] * units

    def wipe(self, holder: bytes) -> None:
        self.map = [None if held == holder else held for held in self.map]

    @rule(client=CLIENTS, size=st.integers(1, UNITS * 66), block=st.booleans(), patience=st.none() | st.integers(0, 5))
    def lease(self, client: bytes, size: int, block: bool, patience: int | None) -> None:
        units = -(-size // 64)
        deadline = None if patience is None else self.now + patience
        self.next_id += 1
        fits = units <= self.largest() and not self.queue
        effects = self.store.lease(client, self.next_id, size, block, deadline)
        if units > UNITS or (not block and not fits):
            assert refused(effects).never_fits is (units > UNITS)
            return
        self.queue.append((client, self.next_id, units, deadline))
        assert len(effects) == fits
        self.apply(effects)

    @rule(client=CLIENTS, object_id=IDS, owner=OWNERS, count=st.integers(1, 4), data=st.data())
    def seal(self, client: bytes, object_id: bytes, owner: bytes, count: int, data: st.DataObject) -> None:
        starts = [unit for unit, holder in enumerate(self.map) if holder == client]
        if not starts:
            with pytest.raises(StoreUsageError):
                self.store.seal(client, object_id, owner, [(0, 64)])
            return
        chosen = data.draw(st.lists(st.sampled_from(starts), min_size=1, max_size=count, unique=True))
        effects = self.store.seal(client, object_id, owner, [(unit * 64, 64 - unit % 3) for unit in chosen])
        freed = object_id in self.early
        for unit in chosen:
            self.fill(unit, 1, client, None if freed else object_id)
        self.early.discard(object_id)
        if not freed:
            assert effects == []
            self.owners[object_id] = owner
        self.apply(effects)

    @rule(object_id=IDS)
    def free(self, object_id: bytes) -> None:
        effects = self.store.free(object_id)
        if self.owners.pop(object_id, None) is None:
            self.early.add(object_id)
        self.wipe(object_id)
        self.apply(effects)

    @rule(client=CLIENTS, data=st.data())
    def give_back(self, client: bytes, data: st.DataObject) -> None:
        starts = [unit for unit, holder in enumerate(self.map) if holder == client]
        if starts:
            unit = data.draw(st.sampled_from(starts))
            effects = self.store.give_back(client, unit * 64, 64)
            self.fill(unit, 1, client, None)
            self.apply(effects)

    @rule(client=CLIENTS)
    def client_dies(self, client: bytes) -> None:
        effects = self.store.client_died(client)
        self.queue = [waiting for waiting in self.queue if waiting[0] != client]
        self.wipe(client)
        self.apply(effects)

    @rule(step=st.integers(1, 4))
    def time_passes(self, step: int) -> None:
        self.now += step
        effects = self.store.expire(self.now)
        late = [w for w in self.queue if w[3] is not None and w[3] <= self.now]
        refusals = [effect for effect in effects if isinstance(effect, Refused)]
        assert [(e.client, e.request_id) for e in refusals] == [w[:2] for w in late]
        self.queue = [w for w in self.queue if w not in late]
        self.apply(effects[len(refusals) :])

    @rule(object_id=IDS, owner=OWNERS)
    def change_owner(self, object_id: bytes, owner: bytes) -> None:
        known = object_id in self.owners
        assert self.store.set_owner(object_id, owner) is known
        if known:
            self.owners[object_id] = owner

    @precondition(lambda self: self.queue)
    @rule()
    def everything_is_released_and_everybody_is_served(self) -> None:
        """Free all objects and give back what is leased, again and again; in turn, everybody is served."""
        for object_id in list(self.owners):
            self.free(object_id)
        while self.queue:
            for unit, holder in enumerate(self.map):
                if holder is not None:
                    effects = self.store.give_back(holder, unit * 64, 64)
                    self.fill(unit, 1, holder, None)
                    self.apply(effects)

    @invariant()
    def agrees(self) -> None:
        store = self.store
        held = Counter(holder for holder in self.map if holder is not None)
        assert store.used_bytes == sum(held.values()) * 64 <= store.capacity
        sizes = {object_id: held[object_id] * 64 for object_id in self.owners}
        assert store.sealed_bytes == sum(sizes.values())
        assert store.sealed_bytes + store.leased_bytes == store.used_bytes
        assert {i: (owner, size) for i, owner, size in store.objects()} == {
            i: (owner, sizes[i]) for i, owner in self.owners.items()
        }
        for owner in (OWNER, OTHER):
            assert set(store.owner_died(owner)) == {i for i, o in self.owners.items() if o == owner}
        assert store.waiting_requests == len(self.queue)
        assert store.next_deadline() == min((w[3] for w in self.queue if w[3] is not None), default=None)
        assert "Top holders" in store.describe_full(1)


TestStoreAgainstNaiveMap = StoreAgainstNaiveMap.TestCase
TestStoreAgainstNaiveMap.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
