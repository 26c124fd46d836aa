"""The lease manager's fairness: nobody starves, and the hold that sees to it keeps no more than it must."""

from __future__ import annotations

import random
from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from afield.scheduler.devices import parse_devices
from afield.scheduler.leases import HOLD_LIMIT_S, PATIENCE, Grant, LeaseManager
from afield.scheduler.resources import ResourceSet

A, B, C = b"owner-a", b"owner-b", b"owner-c"


def shape(cpu: float = 0, gpu: float = 0) -> ResourceSet:
    return ResourceSet.from_options(cpu, gpu)


def node(cpu: float, devices: int = 0) -> LeaseManager:
    return LeaseManager(shape(cpu), parse_devices(f"emulated:{devices}" if devices else None))


def who(grants: Iterable[Grant]) -> list[tuple[bytes, int]]:
    return [(grant.owner, grant.key) for grant in grants]


ONE = shape(1)


class Churn:
    """Small owners that always want another lease and give theirs back one after the other, oldest first."""

    def __init__(self, leases: LeaseManager, small: ResourceSet, owners: int) -> None:
        self.leases = leases
        self.small = small
        self.owners = [b"small-%d" % i for i in range(owners)]
        self.held: list[Grant] = []
        self.others: list[Grant] = []

    def turn(self, now: float | None = None, pick: int = 0) -> int:
        """Return the number of small grants after one release; other owners' grants are collected."""
        for owner in self.owners:
            self.leases.demand(owner, self.small, 1, key=0)
        if self.held:
            self.leases.release(self.held.pop(pick % len(self.held)).lease_id)
        before = len(self.held)
        for grant in self.leases.schedule(now):
            (self.held if grant.owner in self.owners else self.others).append(grant)
        return len(self.held) - before


def turns_until_hold(churn: Churn, now: float | None = None) -> int:
    """Return the number of turns until a release is no longer followed by another small grant."""
    return next(turns for turns in range(1000) if churn.turn(now) == 0)


def test_a_big_request_is_not_starved_by_small_ones() -> None:
    churn = Churn(node(cpu=4), ONE, owners=6)
    churn.turn()
    churn.leases.demand(B, shape(4), 1, key=1)
    turns = 0
    while not churn.others:
        churn.turn()
        turns += 1
        assert turns <= PATIENCE + len(churn.owners) + 4, (
            "passed over by who came later, then a hold until 4 CPUs are free"
        )
    assert turns > PATIENCE
    assert who(churn.others) == [(B, 1)]
    churn.leases.release(churn.others[0].lease_id)
    assert churn.turn() == 4, "the hold is over"


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 2, 3]), st.randoms(use_true_random=False))
def test_whole_devices_are_not_starved_by_fractions(whole: int, rng: random.Random) -> None:
    churn = Churn(node(cpu=100, devices=3), shape(gpu=0.5), owners=9)
    assert churn.turn() == 6
    churn.leases.demand(B, shape(1, gpu=whole), 1, key=1)
    turns = 0
    while not churn.others:
        # In any order at first; then oldest first, so that those on the kept devices end too.
        churn.turn(pick=rng.randrange(100) if turns <= PATIENCE else 0)
        turns += 1
        assert turns <= PATIENCE + len(churn.owners) + 8
    assert len(churn.others[0].device_uuids) == whole


def test_a_hold_keeps_only_what_is_needed() -> None:
    leases = node(cpu=4, devices=1)
    churn = Churn(leases, shape(gpu=0.5), owners=4)
    churn.turn()
    leases.demand(B, shape(1, gpu=1), 1, key=1)
    assert PATIENCE <= turns_until_hold(churn) <= PATIENCE + len(churn.owners)
    leases.demand(C, ONE, 9, key=1)
    assert len(leases.schedule()) == 3, "one CPU is kept, the others are not"


def test_a_demand_that_holds_a_lease_already_gets_no_hold() -> None:
    leases = node(cpu=2, devices=1)
    leases.demand(B, shape(1, gpu=1), 5, key=1)
    assert len(leases.schedule()) == 1
    churn = Churn(leases, ONE, owners=3)
    assert all(churn.turn() == 1 for _ in range(10 * PATIENCE))


def test_no_hold_without_hope_behind_an_actor() -> None:
    leases = node(cpu=4)
    leases.demand(A, ONE, 1, key=1, lasting=True)
    (actor,) = leases.schedule()
    churn = Churn(leases, ONE, owners=5)
    leases.demand(B, shape(4), 1, key=1)
    churn.turn()
    assert all(churn.turn() == 1 for _ in range(10 * PATIENCE))
    leases.release(actor.lease_id)
    for _ in range(5):
        churn.turn()
    assert who(churn.others) == [(B, 1)], "hope came back, and with it the hold"


def test_a_hold_does_not_keep_the_child_of_a_blocked_task_out() -> None:
    leases = node(cpu=1, devices=1)
    leases.demand(A, shape(1, gpu=1), 1, key=1)
    (parent,) = leases.schedule()
    leases.block(parent.lease_id)
    churn = Churn(leases, ONE, owners=2)
    leases.demand(B, shape(1, gpu=1), 1, key=1)
    churn.turn()
    assert all(churn.turn() == 1 for _ in range(10 * PATIENCE))
    leases.unblock(parent.lease_id)
    churn.turn()
    assert churn.turn() == 0
    leases.block(parent.lease_id)
    assert churn.turn() == 1, "hope is gone, the hold too"


def test_a_hold_lapses_with_time_and_comes_back_more_patiently() -> None:
    leases = node(cpu=2)
    leases.demand(A, ONE, 1, key=1)
    leases.schedule()
    churn = Churn(leases, ONE, owners=3)
    leases.demand(B, shape(2), 1, key=1)
    for _ in range(PATIENCE + 1):
        churn.turn(now=10.0)
    assert leases.next_deadline() == 10.0 + HOLD_LIMIT_S
    assert churn.turn(now=14.9) == 0
    assert churn.turn(now=10.0 + HOLD_LIMIT_S) == 1
    assert leases.next_deadline() is None
    assert all(churn.turn(now=20.0) == 1 for _ in range(2 * PATIENCE - 1))
    assert leases.next_deadline() == 20.0 + HOLD_LIMIT_S


def test_a_hold_ends_with_its_demand() -> None:
    for end in ("withdrawn", "owner died", "shape changed", "infeasible"):
        leases = node(cpu=2, devices=1)
        churn = Churn(leases, shape(1, gpu=0.5), owners=3)
        churn.turn()
        leases.demand(B, shape(2, gpu=1), 1, key=1)
        for _ in range(PATIENCE + 1):
            churn.turn()
        assert churn.turn() == 0
        if end == "withdrawn":
            leases.demand(B, shape(2, gpu=1), 0, key=1)
        elif end == "owner died":
            assert leases.owner_died(B) == []
        elif end == "infeasible":
            assert leases.demand(B, shape(3), 1, key=1)
        else:
            leases.demand(B, shape(0, gpu=0.01), 1, key=1)
        assert churn.turn() >= 1, end


def test_a_hold_keeps_the_emptiest_device() -> None:
    leases = node(cpu=2, devices=2)
    leases.demand(A, shape(gpu=1), 1, key=1)
    (busy,) = leases.schedule()
    churn = Churn(leases, ONE, owners=3)
    churn.turn()
    leases.demand(B, shape(2, gpu=1), 1, key=1)
    turns_until_hold(churn)
    leases.demand(C, shape(gpu=0.5), 1, key=1)
    assert leases.schedule() == [], "the free device is kept"
    leases.release(busy.lease_id)
    (grant,) = leases.schedule()
    assert (grant.owner, grant.device_uuids) == (C, busy.device_uuids), "and stays the one that is kept"
