"""The records of the core `leases`: what is needed, who wants it, and what was granted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from afield.machines import Table
from afield.scheduler.resources import CPU, GPU, GPU_MEMORY, UNIT, ResourceSet
from afield.scheduler.slots import Slot

# Grants that may pass over a demand before it is starving. A few rounds of a small machine's workers: enough that the
# order of arrivals within one burst does not matter, few enough that nobody waits for long.
PATIENCE = 16

LEASE = Table(
    "lease, as its node sees it",
    "granted",
    {
        ("granted", "block"): "blocked",
        ("granted", "release"): "released",
        ("blocked", "unblock"): "granted",
        ("blocked", "release"): "released",
    },
    {
        "granted": "its worker has all that the lease is for",
        "blocked": "its task waits for something: its CPUs, and nothing else, are given back for now",
        "released": "what it had is free; the number is never used again",
    },
    # The worker and the owner speak on different channels, so what they say of one lease may cross.
    late=[
        ("granted", "unblock"),
        ("blocked", "block"),
        ("released", "block"),
        ("released", "unblock"),
        ("released", "release"),
    ],
)


@dataclass(frozen=True, slots=True)
class Grant:
    """The owner may push tasks of its demand `key` to one worker that is bound to these devices."""

    lease_id: int
    owner: bytes
    key: int
    shape: ResourceSet
    device_uuids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Infeasible:
    """This demand can never be met on this node, and was dropped."""

    owner: bytes
    key: int
    reason: str


class Need:
    """A shape, taken apart once: countable amounts, and how much of how many devices. All in units of 1e-4."""

    __slots__ = ("count", "cpu", "device_count", "device_memory", "device_units", "names", "shape")

    def __init__(self, shape: ResourceSet) -> None:
        gpu = shape[GPU]
        self.shape = shape
        self.cpu = shape[CPU]
        self.count = {name: amount for name, amount in shape.items() if name not in (GPU, GPU_MEMORY)}
        self.device_memory = shape[GPU_MEMORY]
        self.device_units = min(gpu, UNIT)
        self.device_count = max(gpu // UNIT, 1) if gpu or self.device_memory else 0
        # Devices are contended as a whole, whichever of their two amounts runs out.
        self.names = frozenset((*self.count, GPU)) if self.device_count else frozenset(self.count)


class Demand:
    """What one (owner, key) still wants, and how often it was passed over."""

    __slots__ = ("count", "id", "lasting", "need", "passed", "patience")

    def __init__(self, demand_id: tuple[bytes, int], need: Need) -> None:
        self.id = demand_id
        self.need = need
        self.count = 0
        self.lasting = False
        self.passed = 0
        self.patience = PATIENCE


class Lease:
    """A lease that was granted, until it is released."""

    __slots__ = ("demand_id", "lasting", "need", "slots", "state")

    def __init__(self, demand: Demand, slots: Sequence[Slot]) -> None:
        self.demand_id = demand.id
        self.need = demand.need
        self.lasting = demand.lasting
        self.slots = slots
        self.state = LEASE.initial

    @property
    def blocked(self) -> bool:
        """True while its CPUs are given back."""
        return self.state == "blocked"
