"""The lease manager: order, devices, blocked leases, and a model that adds everything up."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from afield.scheduler.devices import parse_devices
from afield.scheduler.leases import Grant, Infeasible, LeaseManager
from afield.scheduler.resources import UNIT, ResourceSet
from afield.scheduler.slots import AFTER_RESET, NEVER, SOON

A, B, C = b"owner-a", b"owner-b", b"owner-c"


def shape(cpu: float = 0, gpu: float = 0, gpu_memory: str | None = None, **custom: float) -> ResourceSet:
    return ResourceSet.from_options(cpu, gpu, None, custom, gpu_memory)


def node(cpu: float = 4, devices: int = 0, **custom: float) -> LeaseManager:
    return LeaseManager(
        ResourceSet.from_options(cpu, resources=custom), parse_devices(f"emulated:{devices}:16GiB" if devices else None)
    )


def who(grants: Iterable[Grant]) -> list[tuple[bytes, int]]:
    return [(grant.owner, grant.key) for grant in grants]


ONE = shape(1)


def test_demand_is_granted_while_resources_last() -> None:
    leases = node(cpu=2)
    assert leases.demand(A, ONE, 3, key=7) == []
    first, second = leases.schedule()
    assert (first.owner, first.key, first.shape, first.device_uuids) == (A, 7, ONE, ())
    assert first.lease_id != second.lease_id
    assert leases.schedule() == []
    assert leases.available() == {"CPU": 0.0}
    assert leases.total() == {"CPU": 2.0}
    assert leases.release(first.lease_id)
    assert not leases.release(first.lease_id)
    assert who(leases.schedule()) == [(A, 7)]
    assert leases.release(second.lease_id)
    assert leases.schedule() == []


def test_the_count_replaces_the_one_before() -> None:
    leases = node(cpu=8)
    leases.demand(A, ONE, 5, key=1)
    leases.demand(A, ONE, 2, key=1)
    assert len(leases.schedule()) == 2
    leases.demand(A, ONE, 5, key=1)
    leases.demand(A, ONE, 0, key=1)
    assert leases.schedule() == []


def test_round_robin_over_demands_within_and_between_calls() -> None:
    leases = node(cpu=4)
    leases.demand(A, ONE, 9, key=1)
    leases.demand(B, ONE, 9, key=1)
    leases.demand(A, ONE, 1, key=2)
    grants = leases.schedule()
    assert who(grants) == [(A, 1), (B, 1), (A, 2), (A, 1)]
    for grant in grants:
        leases.release(grant.lease_id)
        assert len(leases.schedule()) == 1
    assert who(leases.schedule()) == []
    leases.demand(C, ONE, 1, key=1)
    leases.release(5)
    assert who(leases.schedule()) == [(B, 1)], "who waited longest since its last lease is next"


def test_what_does_not_fit_is_passed_over() -> None:
    leases = node(cpu=4)
    leases.demand(A, shape(3), 1, key=1)
    leases.demand(B, shape(2), 1, key=1)
    leases.demand(C, ONE, 1, key=1)
    assert who(leases.schedule()) == [(A, 1), (C, 1)]


def test_infeasible_demand_is_refused_with_the_arithmetic_and_dropped() -> None:
    leases = node(cpu=4, disk=2)
    (refusal,) = leases.demand(A, shape(8, disk=1, tape=1), 1, key=3)
    assert isinstance(refusal, Infeasible)
    assert (refusal.owner, refusal.key) == (A, 3)
    assert refusal.reason == (
        "asked for CPU 8, disk 1, tape 1, but this node has CPU 4, disk 2: "
        "not enough CPU (asked 8, total 4), tape (asked 1, total 0)."
    )
    assert leases.schedule() == []


def test_a_demand_that_becomes_infeasible_is_withdrawn() -> None:
    leases = node(cpu=4)
    leases.demand(A, ONE, 1, key=1)
    assert len(leases.demand(A, shape(5), 1, key=1)) == 1
    assert leases.schedule() == []


@pytest.mark.parametrize("gpu", [0.5, 1, 3])
def test_missing_devices_are_an_error_that_names_the_remedy(gpu: float) -> None:
    (refusal,) = node(cpu=4).demand(A, shape(1, gpu), 1, key=1)
    count = max(2, int(gpu))
    assert f'devices="emulated:{count}"' in refusal.reason
    assert f"AFIELD_DEVICES=emulated:{count}" in refusal.reason
    assert f"GPU (asked {gpu}, total 0)" in refusal.reason


def test_device_memory_that_no_device_has() -> None:
    leases = node(cpu=1, devices=2)
    (refusal,) = leases.demand(A, shape(gpu_memory="17GiB"), 1, key=1)
    assert "gpu_memory (asked 17 GiB on 1 devices, they have 16 GiB, 16 GiB)" in refusal.reason
    (refusal,) = node(cpu=1).demand(A, shape(gpu_memory="1GiB"), 1, key=1)
    assert "GPU (asked 1, total 0)" in refusal.reason


def test_whole_devices_and_fractions() -> None:
    leases = node(cpu=16, devices=3)
    assert leases.total() == {"CPU": 16.0, "GPU": 3.0, "gpu_memory": 48.0 * 2**30}
    uuids = [device.uuid for device in parse_devices("emulated:3")]
    leases.demand(A, shape(gpu=0.25), 1, key=1)
    leases.demand(B, shape(gpu=0.5), 2, key=1)
    grants = leases.schedule()
    assert [grant.device_uuids for grant in grants] == [(uuids[0],), (uuids[0],), (uuids[1],)]
    leases.demand(C, shape(gpu=0.25), 1, key=1)
    (quarter,) = leases.schedule()
    assert quarter.device_uuids == (uuids[0],), "the fullest device that still fits"
    leases.demand(C, shape(gpu=2), 1, key=2)
    assert leases.schedule() == [], "two devices are in use"
    assert leases.available()["GPU"] == 1.5
    leases.release(grants[2].lease_id)
    (pair,) = leases.schedule()
    assert pair.device_uuids == (uuids[1], uuids[2])
    leases.release(pair.lease_id)
    assert leases.available()["GPU"] == 2.0


def test_device_memory_is_reserved_on_each_device() -> None:
    leases = node(cpu=4, devices=2)
    leases.demand(A, shape(gpu=0.1, gpu_memory="10GiB"), 3, key=1)
    grants = leases.schedule()
    assert len({grant.device_uuids for grant in grants}) == 2
    assert len(grants) == 2, "no device has another 10 GiB"
    assert leases.available()["gpu_memory"] == 12.0 * 2**30
    leases.demand(B, shape(gpu_memory="6GiB"), 1, key=1)
    assert who(leases.schedule()) == [(B, 1)]
    assert leases.available()["GPU"] == 1.8


def test_a_blocked_lease_gives_back_its_cpu_and_nothing_else() -> None:
    leases = node(cpu=1, devices=1, disk=1)
    leases.demand(A, shape(1, 1, disk=1), 1, key=1)
    (parent,) = leases.schedule()
    leases.demand(B, ONE, 1, key=1)
    assert leases.schedule() == []
    assert leases.block(parent.lease_id)
    assert not leases.block(parent.lease_id)
    assert leases.available() == {"CPU": 1.0, "GPU": 0.0, "gpu_memory": 16.0 * 2**30, "disk": 0.0}
    (child,) = leases.schedule()
    assert leases.unblock(parent.lease_id)
    assert not leases.unblock(parent.lease_id)
    assert leases.available()["CPU"] == 0.0
    leases.demand(C, ONE, 1, key=1)
    leases.release(child.lease_id)
    assert leases.schedule() == [], "the debt is paid first"
    leases.release(parent.lease_id)
    assert who(leases.schedule()) == [(C, 1)]


def test_release_of_a_blocked_lease_does_not_give_its_cpu_back_twice() -> None:
    leases = node(cpu=1)
    leases.demand(A, ONE, 1, key=1)
    (lease,) = leases.schedule()
    leases.block(lease.lease_id)
    leases.release(lease.lease_id)
    assert leases.available() == {"CPU": 1.0}
    assert not leases.block(lease.lease_id)
    assert not leases.unblock(lease.lease_id)


def test_death_of_an_owner() -> None:
    leases = node(cpu=2)
    leases.demand(A, ONE, 5, key=1)
    leases.demand(B, ONE, 1, key=1)
    grants = leases.schedule()
    assert who(grants) == [(A, 1), (B, 1)]
    assert leases.owner_died(A) == [grants[0].lease_id]
    assert leases.owner_died(A) == []
    leases.demand(B, ONE, 1, key=2)
    assert leases.schedule() == [], "the dead owner's worker is not known to be free"
    assert leases.reclaims() == [B]
    assert leases.release(grants[0].lease_id)
    assert who(leases.schedule()) == [(B, 2)]


def test_reclaims_name_each_owner_once_until_something_changes() -> None:
    leases = node(cpu=3, devices=1)
    leases.demand(A, ONE, 1, key=1)
    leases.demand(B, ONE, 2, key=1)
    leases.demand(C, shape(gpu=1), 1, key=1)
    grants = leases.schedule()
    assert len(grants) == 4
    assert leases.reclaims() == [], "nobody waits"
    leases.demand(C, shape(2), 1, key=2)
    assert leases.schedule() == []
    assert leases.reclaims() == [A, B], "C holds no CPU"
    assert leases.reclaims() == []
    leases.release(next(grant.lease_id for grant in grants if grant.owner == B))
    assert leases.schedule() == []
    assert leases.reclaims() == [B]
    leases.demand(A, ONE, 1, key=9)
    assert len(leases.schedule()) == 1
    assert leases.reclaims() == [A, B], "a demand that is new asks everybody again"


def test_reclaims_leave_out_the_waiting_itself_actors_and_blocked_leases() -> None:
    leases = node(cpu=3)
    leases.demand(A, ONE, 2, key=1)
    leases.demand(B, ONE, 1, key=1, lasting=True)
    grants = leases.schedule()
    leases.demand(A, ONE, 1, key=1)
    assert leases.schedule() == []
    assert leases.reclaims() == []
    leases.demand(A, ONE, 1, key=2)
    assert leases.reclaims() == [A], "another shape of the same owner waits"
    for grant in grants:
        if grant.owner == A:
            leases.block(grant.lease_id)
    leases.demand(C, shape(3), 1, key=1)
    leases.schedule()
    assert [grant.lease_id for grant in grants if grant.owner == B]
    assert B not in leases.reclaims()


DEVICES = 3
UUIDS = [device.uuid for device in parse_devices(f"emulated:{DEVICES}")]
SHAPES = [
    shape(1),
    shape(0.5),
    shape(2),
    shape(4),
    shape(),
    shape(1, gpu=0.5),
    shape(1, gpu=1),
    shape(0, gpu=2),
    shape(gpu=0.3, gpu_memory="6GiB"),
    shape(gpu_memory="9GiB"),
    shape(1, disk=1),
    shape(3, gpu=3, disk=2),
]


class LeasesAgainstNaiveSums(RuleBasedStateMachine):
    """The model keeps the granted leases and adds them up anew each time."""

    def __init__(self) -> None:
        super().__init__()
        self.leases = node(cpu=4, devices=DEVICES, disk=2)
        self.wanted: dict[tuple[bytes, int], tuple[ResourceSet, int]] = {}
        self.granted: dict[int, Grant] = {}
        self.blocked: set[int] = set()
        self.dead: set[int] = set()
        self.away: dict[str, str] = {}  # device -> when it comes back
        self.now = 0.0

    def free(self) -> tuple[dict[str, int], list[tuple[int, int]]]:
        """Return what is left: countable amounts, and (units, memory units) of each device that is here."""
        counts = {"CPU": 4 * UNIT, "disk": 2 * UNIT}
        devices = {device.uuid: (UNIT, device.memory_bytes * UNIT) for device in parse_devices("emulated:3:16GiB")}
        for lease_id, grant in self.granted.items():
            for name in counts:
                if name != "CPU" or lease_id not in self.blocked:
                    counts[name] -= grant.shape[name]
            for uuid in grant.device_uuids:
                units, memory = devices[uuid]
                devices[uuid] = (units - min(grant.shape["GPU"], UNIT), memory - grant.shape["gpu_memory"])
        return counts, [left for uuid, left in devices.items() if uuid not in self.away]

    def fits(self, wanted: ResourceSet) -> bool:
        counts, devices = self.free()
        if any(wanted[name] > left for name, left in counts.items() if wanted[name]):
            return False
        units, memory = min(wanted["GPU"], UNIT), wanted["gpu_memory"]
        needed = max(wanted["GPU"] // UNIT, 1) if units or memory else 0
        return sum(left >= units and room >= memory for left, room in devices) >= needed

    def feasible(self, wanted: ResourceSet, patient: bool) -> bool:
        needed = max(wanted["GPU"] // UNIT, 1) if wanted["GPU"] or wanted["gpu_memory"] else 0
        hopeless = [NEVER] if patient else [NEVER, AFTER_RESET]
        return DEVICES - sum(back in hopeless for back in self.away.values()) >= needed

    def schedule(self) -> list[Grant]:
        self.now += 1
        grants = self.leases.schedule(self.now)
        for grant in grants:
            wanted, count = self.wanted[grant.owner, grant.key]
            assert grant.shape == wanted
            assert self.fits(wanted), "granted more than there is"
            needed = max(wanted["GPU"] // UNIT, 1) if wanted["GPU"] or wanted["gpu_memory"] else 0
            assert len(set(grant.device_uuids)) == len(grant.device_uuids) == needed
            assert grant.lease_id not in self.granted
            self.granted[grant.lease_id] = grant
            if count == 1:
                del self.wanted[grant.owner, grant.key]
            else:
                self.wanted[grant.owner, grant.key] = (wanted, count - 1)
        return grants

    @rule(
        owner=st.sampled_from([A, B, C]),
        key=st.integers(0, 2),
        wanted=st.sampled_from(SHAPES),
        count=st.integers(0, 5),
        patient=st.booleans(),
    )
    def demand(self, owner: bytes, key: int, wanted: ResourceSet, count: int, patient: bool) -> None:
        lasting = key == 2
        waits = self.wanted.get((owner, key), (None, 0))[0] == wanted  # and goes on, with another count
        refused = self.leases.demand(owner, wanted, count, key, lasting, patient and lasting)
        assert bool(refused) is bool(count and not waits and not self.feasible(wanted, patient and lasting))
        self.wanted.pop((owner, key), None)
        if count and not refused:
            self.wanted[owner, key] = (wanted, count)
        self.schedule()

    @rule(owner=st.sampled_from([A, B, C]))
    def demand_too_much(self, owner: bytes) -> None:
        assert len(self.leases.demand(owner, shape(5), 1, 0)) == 1
        self.wanted.pop((owner, 0), None)

    @rule(data=st.data(), action=st.sampled_from(["release", "release", "block", "unblock"]))
    def act_on_a_lease(self, data: st.DataObject, action: str) -> None:
        lease_id = data.draw(st.sampled_from([*self.granted, 10**9]))
        known, blocked = lease_id in self.granted, lease_id in self.blocked
        if action == "release":
            assert self.leases.release(lease_id) is known
            self.granted.pop(lease_id, None)
            self.blocked.discard(lease_id)
        elif action == "block":
            assert self.leases.block(lease_id) is (known and not blocked)
            if known:
                self.blocked.add(lease_id)
        else:
            assert self.leases.unblock(lease_id) is blocked
            self.blocked.discard(lease_id)
        self.schedule()

    @rule(uuid=st.sampled_from(UUIDS), back=st.sampled_from([SOON, AFTER_RESET, NEVER]))
    def device_goes(self, uuid: str, back: str) -> None:
        having = [lease_id for lease_id, grant in self.granted.items() if uuid in grant.device_uuids]
        assert self.leases.withdraw(uuid, "lost", back) == having
        self.away[uuid] = back
        self.schedule()
        refused = {(refusal.owner, refusal.key) for refusal in self.leases.refusals()}
        assert refused == {who for who, (wanted, _) in self.wanted.items() if not self.feasible(wanted, who[1] == 2)}
        for gone in refused:
            del self.wanted[gone]

    @rule(uuid=st.sampled_from(UUIDS))
    def device_comes_back(self, uuid: str) -> None:
        self.leases.restore(uuid)
        self.away.pop(uuid, None)
        self.schedule()

    @rule(owner=st.sampled_from([A, B, C]))
    def owner_dies(self, owner: bytes) -> None:
        held = [i for i, grant in self.granted.items() if grant.owner == owner and i not in self.dead]
        assert self.leases.owner_died(owner) == held
        self.dead.update(held)
        self.wanted = {demand: value for demand, value in self.wanted.items() if demand[0] != owner}
        self.schedule()

    @rule()
    def all_is_released_and_all_are_served(self) -> None:
        for uuid in UUIDS:
            self.leases.restore(uuid)
        self.away.clear()
        for _ in range(200):
            for lease_id in self.granted:
                assert self.leases.release(lease_id)
            self.granted.clear()
            self.blocked.clear()
            if not self.schedule():
                break
        assert not self.wanted
        assert self.leases.available() == self.leases.total()

    @invariant()
    def it_has_no_complaints(self) -> None:
        assert self.leases.validate() == []

    @invariant()
    def agrees(self) -> None:
        counts, devices = self.free()
        assert all(min(pair) >= 0 for pair in devices)
        assert counts["disk"] >= 0
        of_devices = {
            "GPU": sum(units for units, _ in devices) / UNIT,
            "gpu_memory": sum(memory for _, memory in devices) / UNIT,
        }
        assert self.leases.available() == {
            "CPU": max(counts["CPU"], 0) / UNIT,
            "disk": counts["disk"] / UNIT,
            **(of_devices if devices else {}),
        }

    @invariant()
    def nobody_waits_for_what_is_free(self) -> None:
        self.schedule()
        if self.leases._hold is None:
            assert not any(self.fits(wanted) for wanted, _ in self.wanted.values())

    @invariant()
    def reclaims_name_living_holders_once(self) -> None:
        asked = self.leases.reclaims()
        holders = {
            grant.owner for i, grant in self.granted.items() if i not in self.dead | self.blocked and grant.key != 2
        }
        assert set(asked) <= holders
        assert not asked or self.wanted
        assert self.leases.reclaims() == []


def test_validate_sees_what_does_not_add_up() -> None:
    def some() -> LeaseManager:
        leases = node(cpu=4, devices=2, disk=2)
        leases.demand(A, shape(1, gpu=0.5, disk=1), 1, key=1)
        leases.demand(B, shape(1, gpu=2), 1, key=1)
        assert len(leases.schedule()) == 1
        assert leases.validate() == []
        return leases

    spoilt: list[tuple[Callable[[LeaseManager], object], str]] = [
        (lambda it: it._free.update(disk=0), "disk: 10000 with all that is leased, of 20000"),
        (lambda it: setattr(it._slots._slots[0], "units", 0), "which does not add up"),
        (lambda it: setattr(it._slots._slots[1], "held_units", 1), "for a hold that nobody has"),
        (lambda it: setattr(it._demands[B, 1], "count", 0), "wants 0 leases"),
        (lambda it: it._leases.pop(1), "miscounted"),
        (lambda it: setattr(it._leases[1], "state", "released"), "lease 1 is released, and kept"),
    ]
    for spoil, complaint in spoilt:
        leases = some()
        spoil(leases)
        assert complaint in "\n".join(leases.validate())


def test_the_story_of_a_lease() -> None:
    leases = node(cpu=1)
    leases.demand(b"\xaa", ONE, 1, key=7)
    leases.schedule()
    leases.block(1)
    leases.release(1)
    assert leases.recorder.story() == ["1 granted aa 7", "1 block granted -> blocked", "1 release blocked -> released"]


TestLeasesAgainstNaiveSums = pytest.mark.slow(LeasesAgainstNaiveSums.TestCase)
TestLeasesAgainstNaiveSums.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
