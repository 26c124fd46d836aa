"""The core of the node daemon's decision who may use a worker. Pure: no I/O, no clock, no threads.

Theory of operation. An owner tells how many more leases of a shape it wants (`demand`, an absolute number per (owner,
key)); `schedule` turns demand into grants while resources last; a lease ends with `release`. The shell starts or
picks a worker for each grant, and calls `schedule` and then `reclaims` after anything that may have freed or asked
for something. What becomes of a lease is the table `LEASE` (`demands`).

**Order.** Demands stand in one queue and are served round-robin, one lease each; who got a lease goes to its end. A
demand that does not fit now is passed over, so that what is free does not idle.

**No starvation.** Passing over must end. A demand whose (owner, key) holds no lease is *starving* once `PATIENCE`
grants have taken what it lacks. The first such demand gets the one *hold*: from then on nobody else is granted what
would leave less than the demand needs (of countable resources and on the devices picked for it), so every release
brings it closer. A hold is only given, and kept, while there is hope: the demand would fit if all leases that will
come back did. Leases of actors (`lasting`) do not come back, and a blocked lease may be waiting for the very task
that the hold would keep out, so both count against hope and a hold cannot deadlock with them. As a last guard
(against tasks that run for ever or poll) the hold lapses after `HOLD_LIMIT_S` where the shell hands in the time, and
each lapse doubles the demand's patience, so that hopeless holds cost less and less.

**Blocked leases.** A worker that waits inside its task gives its CPUs (only those) back, so that the tasks that it
waits for can run. When it goes on it takes them again without asking; the node may be oversubscribed until enough
leases ended.

**Devices** (`slots`). A fraction shares the fullest device that still has room (best fit keeps whole devices free); a
whole number takes that many untouched devices. `gpu_memory` counts on each of them. A device that was lost is
withdrawn; what waits and can never fit without it is dropped and told in `refusals`. Whether it will be reset nobody
knows: a task is told at once, since it can be submitted again. An actor that is refused is over for good, so what is
`lasting` and waits already waits on, and so does a new demand that says that it is `patient`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from afield.machines import FlightRecorder
from afield.scheduler.demands import LEASE, PATIENCE, Demand, Grant, Infeasible, Lease, Need
from afield.scheduler.devices import Device
from afield.scheduler.resources import CPU, GPU, GPU_MEMORY, UNIT, ResourceSet, format_amount
from afield.scheduler.slots import NEVER, SOON, DeviceSlots, Slot

__all__ = ["HOLD_LIMIT_S", "PATIENCE", "Grant", "Infeasible", "LeaseManager"]

# Seconds for which one hold may keep resources idle. Longer than most tasks, shorter than a user's patience.
HOLD_LIMIT_S = 5.0

# So many leases and demands are looked at when the state is checked; of more than this, sums are not made.
CHECKED = 1000


class LeaseManager:
    """Grants leases of one node. The owner of a lease is a process, named by its id in bytes."""

    def __init__(self, total: ResourceSet, devices: Sequence[Device]) -> None:
        """Manage `total`; its GPU and gpu_memory are replaced by what `devices` really provide."""
        self._slots = DeviceSlots(devices)
        self._free = {name: amount for name, amount in total.units().items() if name not in (GPU, GPU_MEMORY)}
        self._total = ResourceSet({**self._free, **self._slots.total()})
        self._demands: OrderedDict[tuple[bytes, int], Demand] = OrderedDict()
        self._leases: dict[int, Lease] = {}
        self._by_owner: dict[bytes, dict[int, None]] = {}  # living owners only
        self._held_by: dict[tuple[bytes, int], int] = {}  # number of leases of each (owner, key)
        self._asked: set[bytes] = set()  # owners that `reclaims` reported and that did not react yet
        self._next_lease_id = 1
        self._hold: Demand | None = None
        self._hold_since: float | None = None
        self._devices_left = False  # since `refusals` looked
        self.recorder = FlightRecorder()

    # -- what owners and workers report ---------------------------------------------------------------------------

    def demand(
        self, owner: bytes, shape: ResourceSet, count: int, key: int, lasting: bool = False, patient: bool = False
    ) -> list[Infeasible]:
        """Set how many more leases of `shape` the demand `key` of `owner` wants now; 0 withdraws it.

        `lasting` says that the leases will be kept for an unknown time (actors), `patient` that it waits also for
        devices that are lost. A demand that can never be met is dropped.
        """
        demand_id = (owner, key)
        demand = self._demands.get(demand_id)
        if count <= 0:
            if demand is not None:
                self._drop(demand)
            return []
        if demand is None or demand.need.shape != shape:
            need = Need(shape)
            reason = self._why_infeasible(need, patient)
            if demand is not None and (reason or demand is self._hold):
                self._end_hold(demand)
            if reason:
                self._demands.pop(demand_id, None)
                return [Infeasible(owner, key, reason)]
            if demand is None:
                demand = self._demands[demand_id] = Demand(demand_id, need)
            demand.need = need
            self._asked.clear()
        demand.count = count
        demand.lasting = lasting
        return []

    def release(self, lease_id: int) -> bool:
        """End a lease; returns False when it ended before (messages about one lease may cross)."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return False
        was_blocked = lease.blocked
        self._go(lease_id, lease, "release")
        free = self._free
        for name, amount in lease.need.count.items():
            free[name] += amount
        if was_blocked:
            free[CPU] -= lease.need.cpu
        for slot in lease.slots:
            slot.units += lease.need.device_units
            slot.memory += lease.need.device_memory
        owner = lease.demand_id[0]
        held = self._held_by[lease.demand_id] - 1
        if held:
            self._held_by[lease.demand_id] = held
        else:
            del self._held_by[lease.demand_id]
        leases = self._by_owner.get(owner)
        if leases is not None:
            leases.pop(lease_id, None)
            if not leases:
                del self._by_owner[owner]
        self._asked.discard(owner)
        return True

    def block(self, lease_id: int) -> bool:
        """The worker waits inside its task: give its CPUs back. Returns False for an ended or blocked lease."""
        lease = self._leases.get(lease_id)
        if lease is None or not self._go(lease_id, lease, "block"):
            return False
        self._asked.discard(lease.demand_id[0])
        if lease.need.cpu:
            self._free[CPU] += lease.need.cpu
        return True

    def unblock(self, lease_id: int) -> bool:
        """The worker goes on and takes its CPUs again, even if none are free. False for a lease that is not blocked."""
        lease = self._leases.get(lease_id)
        if lease is None or not self._go(lease_id, lease, "unblock"):
            return False
        self._asked.discard(lease.demand_id[0])
        if lease.need.cpu:
            self._free[CPU] -= lease.need.cpu
        return True

    def owner_died(self, owner: bytes) -> list[int]:
        """Drop the demands of `owner` and return the ids of the leases that it held, oldest first.

        They stay accounted until each is released: until its worker is known to be free, it still uses what it was
        given.
        """
        for demand in [demand for demand in self._demands.values() if demand.id[0] == owner]:
            self._drop(demand)
        self._asked.discard(owner)
        return list(self._by_owner.pop(owner, ()))

    # -- devices come and go --------------------------------------------------------------------------------------

    def withdraw(self, uuid: str, cause: str = "", back: str = NEVER) -> list[int]:
        """Grant nothing more on a device, and return the ids of the leases that have it, oldest first.

        `cause` is for people, and should say when ("lost at 12:03:11, Xid 79"); `back` is SOON, AFTER_RESET or NEVER.
        What needs the device waits if it is back soon; else `refusals` tells which demands can never be met without
        it. The leases stay accounted until each is released. Raises KeyError for a device that the node never had.
        """
        gone = self._slots.withdraw(uuid, cause, back, self.recorder)
        self._total = ResourceSet({**self._total.units(), **self._slots.total()})
        self._devices_left = self._devices_left or back != SOON
        self._asked.clear()
        return [lease_id for lease_id, lease in self._leases.items() if gone in lease.slots]

    def restore(self, uuid: str) -> None:
        """Grant leases on a device again. Raises KeyError for one that the node never had."""
        self._slots.restore(uuid, self.recorder)
        self._total = ResourceSet({**self._total.units(), **self._slots.total()})
        self._asked.clear()

    def refusals(self) -> list[Infeasible]:
        """Drop and return the waiting demands that can never be met since devices were withdrawn; each is told once."""
        if not self._devices_left:
            return []
        self._devices_left = False
        refused = []
        for demand in list(self._demands.values()):
            reason = self._why_infeasible(demand.need, demand.lasting)
            if reason:
                self._drop(demand)
                refused.append(Infeasible(*demand.id, reason))
        return refused

    def reserved_bytes(self, uuid: str) -> int:
        """Return how many bytes of a device leases have reserved for themselves (`gpu_memory`).

        Raises KeyError for a device that the node never had.
        """
        return self._slots.reserved_bytes(uuid)

    def _go(self, lease_id: int, lease: Lease, event: str) -> bool:
        """Move a lease on; False: the event came late, and changes nothing."""
        before = lease.state
        lease.state = LEASE.after(before, event, lease_id, self.recorder)
        return lease.state != before

    # -- decisions ------------------------------------------------------------------------------------------------

    def schedule(self, now: float | None = None) -> list[Grant]:
        """Grant what fits, round-robin over the waiting demands. `now` (seconds) is only used to let a hold lapse."""
        if not self._demands:
            return []
        self._review_hold(now)
        grants: list[Grant] = []
        takers: list[Need] = []
        missed: list[tuple[Demand, int]] = []
        turn = list(self._demands.values())
        while turn:
            still_wanting = []
            for demand in turn:
                slots = self._find(demand)
                if slots is None:
                    missed.append((demand, len(takers)))
                    continue
                takers.append(demand.need)
                grants.append(self._grant(demand, slots))
                if demand.count:
                    still_wanting.append(demand)
            turn = still_wanting
        if grants:
            self._count_passes(missed, takers)
        if self._hold is None:
            self._maybe_hold([demand for demand, _ in missed], now)
        return grants

    def next_deadline(self) -> float | None:
        """Return when the hold lapses, if there is one and the time is known: call `schedule` then at the latest."""
        return self._hold_since + HOLD_LIMIT_S if self._hold_since is not None else None

    def reclaims(self) -> list[bytes]:
        """Return the owners that should give back idle leases, because others wait for what these leases hold.

        Each is named once, until it reacts (its leases change) or somebody new waits. Leases of the waiting (owner,
        key) itself, lasting and blocked ones are no reason to ask.
        """
        waiting_for: dict[str, set[tuple[bytes, int]]] = {}
        for demand in self._demands.values():
            for name in self._lacking(demand):
                waiting_for.setdefault(name, set()).add(demand.id)
        if not waiting_for:
            return []
        ask = []
        for owner, lease_ids in self._by_owner.items():
            if owner not in self._asked and any(self._in_the_way(self._leases[i], waiting_for) for i in lease_ids):
                ask.append(owner)
        self._asked.update(ask)
        return ask

    def total(self) -> dict[str, float]:
        """Return the node's resources: CPUs, devices, bytes."""
        return self._total.as_floats()

    def available(self) -> dict[str, float]:
        """Return what is not leased now; an oversubscribed CPU shows as 0."""
        units = {**self._free, **self._slots.free()}
        return {name: max(units[name], 0) / UNIT for name in self._total}

    # -- granting -------------------------------------------------------------------------------------------------

    def _find(self, demand: Demand) -> Sequence[Slot] | None:
        """Return the devices (possibly none) with which the demand fits now, or None when it does not fit."""
        need, free, hold = demand.need, self._free, self._hold
        mine = hold is None or hold is demand
        for name, amount in need.count.items():
            kept = 0 if mine or hold is None else hold.need.count.get(name, 0)
            if free[name] - kept < amount:
                return None
        return self._slots.find(need.device_count, need.device_units, need.device_memory, with_held=mine)

    def _grant(self, demand: Demand, slots: Sequence[Slot]) -> Grant:
        need, demand_id = demand.need, demand.id
        for name, amount in need.count.items():
            self._free[name] -= amount
        for slot in slots:
            slot.units -= need.device_units
            slot.memory -= need.device_memory
        lease_id = self._next_lease_id
        self._next_lease_id += 1
        owner, key = demand_id
        self._leases[lease_id] = Lease(demand, slots)
        self.recorder.note((lease_id, "granted", owner, key))
        self._by_owner.setdefault(owner, {})[lease_id] = None
        self._held_by[demand_id] = self._held_by.get(demand_id, 0) + 1
        self._asked.discard(owner)
        demand.passed = 0
        demand.patience = PATIENCE
        demand.count -= 1
        if demand.count:
            self._end_hold(demand)
            self._demands.move_to_end(demand_id)
        else:
            self._drop(demand)
        return Grant(lease_id, owner, key, need.shape, tuple([slot.uuid for slot in slots]))

    def _drop(self, demand: Demand) -> None:
        del self._demands[demand.id]
        self._end_hold(demand)

    def _lacking(self, demand: Demand) -> list[str]:
        """Return the names of what keeps the demand waiting (GPU for anything about devices)."""
        need, free = demand.need, self._free
        names = [name for name, amount in need.count.items() if free[name] < amount]
        if self._slots.find(need.device_count, need.device_units, need.device_memory, with_held=True) is None:
            names.append(GPU)
        if not names and self._hold is not None and self._hold is not demand:
            # It would fit but for the hold: what the two share is what it waits for.
            names = [name for name in need.names if name in self._hold.need.names]
        return names

    @staticmethod
    def _in_the_way(lease: Lease, waiting_for: dict[str, set[tuple[bytes, int]]]) -> bool:
        if lease.lasting or lease.blocked:
            return False
        for name in lease.need.names:
            waiting = waiting_for.get(name)
            if waiting and (len(waiting) > 1 or lease.demand_id not in waiting):
                return True
        return False

    # -- starvation -----------------------------------------------------------------------------------------------

    def _count_passes(self, missed: Iterable[tuple[Demand, int]], takers: Sequence[Need]) -> None:
        """Count, for each demand without a lease, the grants after its turn that took something that it lacks now."""
        for demand, seen in missed:
            if seen == len(takers) or demand.id in self._held_by:
                continue
            lacking = self._lacking(demand)
            demand.passed += sum(1 for taker in takers[seen:] if not taker.names.isdisjoint(lacking))

    def _maybe_hold(self, missed: Iterable[Demand], now: float | None) -> None:
        for demand in missed:
            if demand.passed >= demand.patience and self._hold_for(demand):
                self._hold = demand
                self._hold_since = now
                self.recorder.note((*demand.id, "has the hold"))
                return

    def _review_hold(self, now: float | None) -> None:
        """End the hold when its time is over or there is no hope left; else pick its devices afresh."""
        demand = self._hold
        if demand is None:
            return
        if now is not None:
            if self._hold_since is None:
                self._hold_since = now
            elif now >= self._hold_since + HOLD_LIMIT_S:
                demand.passed = 0
                demand.patience *= 2
                self._end_hold(demand)
                return
        if not self._hold_for(demand):
            self._end_hold(demand)

    def _hold_for(self, demand: Demand) -> bool:
        """Keep devices for the demand and return True, if it would fit once all leases that will come back did."""
        need = demand.need
        back = dict.fromkeys(need.count, 0)
        devices_back: list[tuple[Slot, int, int]] = []
        for lease in self._leases.values():
            if lease.lasting or lease.blocked:
                continue
            for name, amount in lease.need.count.items():
                if name in back:
                    back[name] += amount
            for slot in lease.slots:
                devices_back.append((slot, lease.need.device_units, lease.need.device_memory))
        if any(self._free[name] + back[name] < amount for name, amount in need.count.items()):
            return False
        return self._slots.hold(need.device_count, need.device_units, need.device_memory, devices_back)

    def _end_hold(self, demand: Demand) -> None:
        if demand is not self._hold:
            return
        self._hold = None
        self._hold_since = None
        self._slots.end_hold()
        self.recorder.note((*demand.id, "has the hold no longer"))

    # -- what can never be met ------------------------------------------------------------------------------------

    def _why_infeasible(self, need: Need, patient: bool) -> str | None:
        """Return why the node can never meet the need, with the remedy, or None when it can."""
        shape, total = need.shape, self._total
        problems = [
            f"{name} (asked {format_amount(name, amount)}, total {format_amount(name, total[name])})"
            for name, amount in need.count.items()
            if amount > total[name]
        ]
        lacking, remedy = self._slots.why_infeasible(shape[GPU], need.device_count, need.device_memory, patient)
        if lacking:
            problems.append(lacking)
        if not problems:
            return None
        said = f"asked for {shape}, but this node has {total}: not enough {', '.join(problems)}."
        return f"{said} {remedy}" if remedy else said

    # -- the state as a whole -------------------------------------------------------------------------------------

    def validate(self) -> list[str]:
        """Return what is wrong with the books of leases, none if all is well."""
        found = []
        for demand in list(self._demands.values())[:CHECKED]:
            if demand.count <= 0 or demand.passed < 0:
                found.append(
                    f"demand {demand.id} wants {demand.count} leases, and was passed over {demand.passed} times"
                )
        if self._hold is not None and self._demands.get(self._hold.id) is not self._hold:
            found.append(f"the hold is for {self._hold.id}, which does not wait")
        if self._hold is None and (self._hold_since is not None or self._slots.held()):
            found.append("devices are kept, or a time runs, for a hold that nobody has")
        if len(self._leases) <= CHECKED:
            found += self._wrong_sums()
        return found

    def _wrong_sums(self) -> list[str]:
        """Add up what the leases have, and compare."""
        free, held_by = dict(self._free), dict(self._held_by)
        for lease_id, lease in self._leases.items():
            if lease.state not in ("granted", "blocked"):
                return [f"lease {lease_id} is {lease.state}, and kept"]
            for name, amount in lease.need.count.items():
                free[name] += 0 if name == CPU and lease.blocked else amount
            held_by[lease.demand_id] = held_by.get(lease.demand_id, 0) - 1
        found = [
            f"{name}: {amount} with all that is leased, of {self._total[name]}"
            for name, amount in free.items()
            if amount != self._total[name]
        ]
        if any(held_by.values()):
            found.append(f"leases are miscounted: {[demand_id for demand_id, rest in held_by.items() if rest]}")
        known = {lease_id for leases in self._by_owner.values() for lease_id in leases}
        if not known <= set(self._leases):
            found.append(f"owners have leases that there are not: {known - set(self._leases)}")
        taken = [(slot, lease.need) for lease in self._leases.values() for slot in lease.slots]
        return found + self._slots.wrong_sums((slot, need.device_units, need.device_memory) for slot, need in taken)
