"""The core of sharing a node's devices: what is left of each, which are away, and which fit what is needed.

Theory of operation. Device amounts live on the devices, not in one sum: a device that is nine tenths full does not help
who needs two tenths twice. A `Slot` is one device; amounts are in units of 1e-4, as everywhere in the scheduler.

A device can be *withdrawn* (`DEVICE`): nothing new is placed on it, and the totals shrink. What its leases hold stays
accounted until each is released, so a device that comes back is not handed out twice. Whoever withdraws it says what is to be
expected: it is back `SOON`, `AFTER_RESET`, which may be long in coming, or `NEVER`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from afield.machines import FlightRecorder, Table
from afield.scheduler.devices import Device
from afield.scheduler.resources import GPU, GPU_MEMORY, UNIT, format_amount

# Devices that one error text names; the rest is counted.
MAX_NAMED = 4

#: When a device that is withdrawn is back.
SOON, AFTER_RESET, NEVER = "soon", "after a reset", "never"
_WITHDRAWN = {SOON: "suspend", AFTER_RESET: "lose", NEVER: "withdraw"}

DEVICE = Table(
    "device, as the scheduler sees it",
    "here",
    {
        ("here", "suspend"): "coming_back",
        ("here", "lose"): "lost",
        ("here", "withdraw"): "gone",
        ("coming_back", "restore"): "here",
        ("coming_back", "suspend"): "coming_back",
        ("coming_back", "lose"): "lost",
        ("coming_back", "withdraw"): "gone",
        ("lost", "restore"): "here",
        ("lost", "suspend"): "coming_back",
        ("lost", "lose"): "lost",
        ("lost", "withdraw"): "gone",
        ("gone", "restore"): "here",
        ("gone", "suspend"): "coming_back",
        ("gone", "lose"): "lost",
        ("gone", "withdraw"): "gone",
    },
    {
        "here": "leases are placed on it",
        "coming_back": "its store process is started anew, or it is reset: what needs it waits",
        "lost": "it comes back if it is reset: who is patient waits, the others are told that it is infeasible",
        "gone": "the node has given it up: what cannot be met without it is infeasible, and told so",
    },
    late=[("here", "restore")],
)


class Slot:
    """What is left of one device, and how much of that is kept for the demand with the hold."""

    __slots__ = ("all_memory", "away", "held_memory", "held_units", "index", "memory", "state", "units", "uuid")

    def __init__(self, device: Device, index: int) -> None:
        self.uuid = device.uuid
        self.index = index
        self.units = UNIT
        self.all_memory = self.memory = device.memory_bytes * UNIT
        self.held_units = 0
        self.held_memory = 0
        self.state = DEVICE.initial
        self.away = ""  # why it is not here, for people

    @property
    def here(self) -> bool:
        return self.state == "here"

    def expected(self, patient: bool) -> bool:
        """Tell whether it is here, or will be again; for who is `patient`, also after a reset of which nothing is known."""
        return self.state in ("here", "coming_back") or (patient and self.state == "lost")


class DeviceSlots:
    """The devices of one node."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self._slots = [Slot(device, index) for index, device in enumerate(devices)]
        self._by_uuid = {slot.uuid: slot for slot in self._slots}

    # -- coming and going -----------------------------------------------------------------------------------------

    def withdraw(self, uuid: str, cause: str, back: str, recorder: FlightRecorder | None = None) -> Slot:
        """Place nothing more on a device; raises KeyError for one that the node never had."""
        slot = self._by_uuid[uuid]
        slot.state = DEVICE.after(slot.state, _WITHDRAWN[back], uuid, recorder)
        slot.away = cause
        slot.held_units = slot.held_memory = 0
        return slot

    def restore(self, uuid: str, recorder: FlightRecorder | None = None) -> None:
        """Place things on it again; raises KeyError for a device that the node never had."""
        slot = self._by_uuid[uuid]
        slot.state = DEVICE.after(slot.state, "restore", uuid, recorder)
        slot.away = ""

    # -- what there is --------------------------------------------------------------------------------------------

    def total(self) -> dict[str, int]:
        """Return the amounts of the devices that are here, used or not."""
        here = [slot for slot in self._slots if slot.here]
        return {GPU: UNIT * len(here), GPU_MEMORY: sum(slot.all_memory for slot in here)}

    def free(self) -> dict[str, int]:
        """Return what is not leased of them."""
        here = [slot for slot in self._slots if slot.here]
        return {GPU: sum(slot.units for slot in here), GPU_MEMORY: sum(slot.memory for slot in here)}

    def reserved_bytes(self, uuid: str) -> int:
        """Return how many bytes of a device leases have reserved; raises KeyError for one that the node never had."""
        slot = self._by_uuid[uuid]
        return (slot.all_memory - slot.memory) // UNIT

    # -- what fits ------------------------------------------------------------------------------------------------

    def find(self, count: int, units: int, memory: int, with_held: bool) -> Sequence[Slot] | None:
        """Return `count` devices with so much room, the fullest first choice, or None; without what is held unless told."""
        if not count:
            return ()
        fitting = [
            slot
            for slot in self._slots
            if slot.here
            and slot.units - (0 if with_held else slot.held_units) >= units
            and slot.memory - (0 if with_held else slot.held_memory) >= memory
        ]
        if len(fitting) < count:
            return None
        fitting.sort(key=lambda slot: (slot.units, slot.memory, slot.index))
        return sorted(fitting[:count], key=lambda slot: slot.index)

    def hold(self, count: int, units: int, memory: int, back: Iterable[tuple[Slot, int, int]]) -> bool:
        """Keep devices on which so much fits once `back` (slot, units, memory) has come back; False if it never will."""
        slot_units = [slot.units for slot in self._slots]
        slot_memory = [slot.memory for slot in self._slots]
        for slot, more_units, more_memory in back:
            slot_units[slot.index] += more_units
            slot_memory[slot.index] += more_memory
        hopeful = [
            slot
            for slot in self._slots
            if slot.here and slot_units[slot.index] >= units and slot_memory[slot.index] >= memory
        ]
        if len(hopeful) < count:
            return False
        # Devices that are kept already stay so, else the emptiest: changing the choice would lose what was gathered.
        hopeful.sort(key=lambda slot: (-slot.held_units, -slot.held_memory, -slot.units, -slot.memory, slot.index))
        self.end_hold()
        for slot in hopeful[:count]:
            slot.held_units, slot.held_memory = units, memory
        return True

    def end_hold(self) -> None:
        """Nothing is kept for anybody any more."""
        for slot in self._slots:
            slot.held_units = slot.held_memory = 0

    # -- the state as a whole -------------------------------------------------------------------------------------

    def held(self) -> bool:
        """Tell whether anything is kept for the demand with the hold."""
        return any(slot.held_units or slot.held_memory for slot in self._slots)

    def wrong_sums(self, taken: Iterable[tuple[Slot, int, int]]) -> list[str]:
        """Return what is wrong, given all that leases have of devices: (slot, units, memory)."""
        units = [slot.units for slot in self._slots]
        memory = [slot.memory for slot in self._slots]
        for slot, its_units, its_memory in taken:
            units[slot.index] += its_units
            memory[slot.index] += its_memory
        found = []
        for slot in self._slots:
            if (units[slot.index], memory[slot.index]) != (UNIT, slot.all_memory) or slot.units < 0 or slot.memory < 0:
                found.append(f"device {slot.uuid}: {slot.units} and {slot.memory} are left, which does not add up")
            if (slot.held_units or slot.held_memory) and not slot.here:
                found.append(f"device {slot.uuid} is {slot.state}, and kept for somebody")
        return found

    # -- what never will ------------------------------------------------------------------------------------------

    def why_infeasible(self, gpu: int, count: int, memory: int, patient: bool) -> tuple[str, str]:
        """Return (what is not enough, remedy) if `count` devices with so much memory are more than there will be."""
        there = [slot for slot in self._slots if slot.expected(patient)]
        if count > len(there):
            wanted = max(count, 2)
            remedy = self._gone() or (
                f'Ask for devices when the runtime starts: afield.init(devices="emulated:{wanted}") '
                f"or AFIELD_DEVICES=emulated:{wanted} in the environment."
            )
            return f"{GPU} (asked {format_amount(GPU, gpu or UNIT)}, total {len(there)})", remedy
        if sum(slot.all_memory >= memory for slot in there) < count:
            have = ", ".join(format_amount(GPU_MEMORY, slot.all_memory) for slot in there)
            asked = format_amount(GPU_MEMORY, memory)
            return f"{GPU_MEMORY} (asked {asked} on {count} devices, they have {have})", self._gone()
        return "", ""

    def _gone(self) -> str:
        """Say which devices were here once and why they are not any more."""
        gone = [slot for slot in self._slots if not slot.expected(False)]
        if not gone:
            return ""
        named = ", ".join(f"{slot.uuid} ({slot.away})" if slot.away else slot.uuid for slot in gone[:MAX_NAMED])
        more = f" and {len(gone) - MAX_NAMED} more" if len(gone) > MAX_NAMED else ""
        if all(slot.state == "gone" for slot in gone):
            return f"Withdrawn from this node: {named}{more}; the node has given up on starting what serves it."
        return f"Withdrawn from this node: {named}{more}; a device comes back when it was reset."
