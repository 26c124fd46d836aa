"""A process's side of the tiers: writes values as parts, maps the parts of values, asks for those that are elsewhere.

Theory of operation. What a value is made of lies in parts: host bytes in the host's slab, device arrays in the slabs of
devices. Writing needs no answer from anybody: the memory is leased already, a slot of the pin board too, and a note (`Seal`)
tells the node daemon afterwards. Reading needs none either as long as a part lies in an arena that we can map, and has
not moved: `Pinner.pin` says so, and a `ViewPin` keeps it there for as long as anything uses the memory. Otherwise the daemon is
asked (`Need`); it has the part brought, and promises that it stays until we say that we have pinned it (`Mapped`).

A location is a hint. Whoever has read a value keeps the better hint that came out of it.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from afield.errors import (
    AfieldError,
    DeviceLostError,
    GetTimeoutError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDeviceMemoryError,
    RuntimeDiedError,
)
from afield.gpu_store.arena import DeviceArena
from afield.gpu_store.blocks import Block
from afield.gpu_store.client import HostStoreClient, ViewPin
from afield.gpu_store.interop import DevicePacker, DevicePlace, HostPlace, Place, resolving
from afield.gpu_store.pins import Pinner
from afield.gpu_store.rings import RingWriter
from afield.gpu_store.tiers import ARGUMENT, FIRST_LIFE, GET, HOST
from afield.runtime.process.events import TICK
from afield.runtime.process.process import INLINE_BYTES, Process
from afield.runtime.process.serialization import Serialized, deserialize
from afield.runtime.values.devices import Devices
from afield.runtime.values.garbage import Garbage
from afield.runtime.wire import messages
from afield.transport.channel import Channel
from afield.transport.interrupts import uninterruptible
from afield.transport.pump import Waiter

#: Slots of the pin board are asked for in batches, which double up to this.
MAX_SLOTS = 512
#: Where a thread was at the pins when they were to be drained, that is done after this time.
DRAIN_AGAIN_S = 0.01

__all__ = ["ARGUMENT", "GET", "Parts", "PartsLostError", "WouldBlockError"]

# The interpreter calls these at any moment, and an exception in them would be lost, with what they had to do.
uninterruptible(ViewPin.__del__)
uninterruptible(HostStoreClient.on_born_died)
uninterruptible(Block.__del__)
uninterruptible(DevicePlace.__del__)
uninterruptible(DevicePacker.__del__)
# Cut in half, these would leave memory that nobody gives back, or an arena that is never free again.
uninterruptible(DeviceArena.allocate)
uninterruptible(DevicePacker.reduce)
uninterruptible(DevicePacker.commit)

_encode = msgspec.msgpack.Encoder().encode

#: Waits for an answer: True when it is there, False when the time is over.
Wait = Callable[[Waiter, float | None, bool], bool]


class PartsLostError(Exception):
    """Parts of a value are gone from every tier: its owner may be able to make it again.

    Like the next one a signal between parts of the runtime, and none of its errors: no user's value or error is ever one.
    """


class WouldBlockError(Exception):
    """A part has to be brought here first, and the caller cannot wait for that."""


class Parts:
    """What this process has leased, written and mapped.

    Args:
        process: this process.
        wait: blocks for an answer, given a deadline and whether it is for room in a store.
    """

    def __init__(self, process: Process, wait: Wait) -> None:
        self.process = process
        self.pump = process.pump
        self._wait = wait
        config = process.config
        self.store = HostStoreClient(config.slab_fd, config.capacity, self._lease_host, self._give_back_host)
        self.pinner = Pinner(config.pins_fd, process.own.index)
        #: What we seal is noted for the daemon here; it reads before it handles any message.
        self._notes = RingWriter(config.pins_fd, process.own.index)
        self.devices = Devices(process, self.lease, self.give_back, self.lease_ahead)
        self.garbage = Garbage(self._garbage_collected)
        self._slots: deque[int] = deque()
        self._slots_asked = 16
        self._given_back: deque[messages.GiveBack] = deque()
        self._view_pins: list[Any] = []  # weak references
        self._view_pins_limit = 64
        process.register(messages.StoreGrant, self._on_store_grant)
        process.register(messages.Found, self._on_found)
        process.register(messages.Trim, lambda channel, message: self._later(lambda: self.devices.trim(message.arena)))
        process.register(messages.Collect, lambda channel, message: self.garbage.wanted(message.arena))
        process.subscribe(TICK, self._tick)

    def close(self) -> None:
        """Let go of all memory; it goes back to the system with the last view of it."""
        self.store.close()
        self.devices.close()
        self.pinner.close()
        with self.pump.lock:
            self._notes.close()

    # -- room ------------------------------------------------------------------------------------------------------

    def lease(self, arena: int, life: int, size: int, wait_s: float | None = None) -> tuple[int, int]:
        """Block until `size` bytes of this life of an arena are ours to write to; return (offset, size granted).

        Waits for `wait_s`, by default what the session says; 0 asks for what is free now.

        Raises:
            ObjectStoreFullError, OutOfDeviceMemoryError: no room came free in time.
            DeviceLostError: this life of the arena is over.
        """
        wait_s = self.process.config.store_wait_s if wait_s is None else wait_s
        granted: tuple[int, int] = self.process.requests.ask(
            lambda request: messages.StoreLease(request, size, wait_s, arena, life),
            give_up=lambda unwanted: self.give_back(arena, life, *unwanted),
            # While a producer waits for room, its CPU is for those whose work makes room.
            wait=lambda waiter: self._wait(waiter, None, True),
        )
        return granted

    def lease_ahead(self, arena: int, life: int, size: int) -> None:
        """Ask for bytes of a device that may be needed soon, without waiting for them."""
        with self.pump.lock:
            self.process.daemon.send(messages.StoreLease(messages.AHEAD, size, 0.0, arena, life))

    def _lease_host(self, size: int) -> tuple[int, int]:
        return self.lease(HOST, FIRST_LIFE, size)

    def _garbage_collected(self, arena: int) -> None:
        """What garbage had is free here: let the others know."""
        if not self.process.dead:
            self.devices.trim(arena)
            self.process.locked(self.process.tidy)

    def give_back(self, arena: int, life: int, offset: int, size: int) -> None:
        """Return leased bytes that nothing was sealed in; called from any thread, also inside the garbage collector."""
        self._given_back.append(messages.GiveBack(offset, size, arena, life))
        self.pump.wake_standby()

    def _give_back_host(self, offset: int, size: int) -> None:
        self.give_back(HOST, FIRST_LIFE, offset, size)

    def _later(self, action: Callable[[], None]) -> None:
        """Do something after this transition that takes the lock of an arena.

        Its holder may wait for the process's lock: the collector can run finalisers there which use afield. So whoever has the
        latter never waits for a lock of memory.
        """
        self.pump.callbacks.append(action)

    def _take_ahead(self, place: tuple[int, int, int, int]) -> None:
        if not self.devices.granted_ahead(*place):
            self.give_back(*place)

    def _tick(self, now: float) -> float | None:
        while self._given_back:
            self.process.daemon.send(self._given_back.popleft())
        return None if self.pinner.drain_if_free() else now + DRAIN_AGAIN_S

    def _on_store_grant(self, channel: Channel, message: messages.StoreGrant) -> None:
        place = message.arena, message.life, message.offset, message.size
        if message.request == messages.AHEAD:
            if not message.refusal:
                self._later(lambda: self._take_ahead(place))
        elif message.refusal:
            kind: type[AfieldError] = ObjectStoreFullError if message.arena == HOST else OutOfDeviceMemoryError
            if message.lost:
                kind = DeviceLostError
            self.process.requests.answered(message.request, kind(message.refusal))
        elif not self.process.requests.answered(message.request, (message.offset, message.size)):
            self.give_back(*place)  # whoever asked was interrupted

    # -- writing ---------------------------------------------------------------------------------------------------

    @uninterruptible
    def write(self, object_id: bytes, owner: bytes, value: Serialized, holder: list[Any]) -> messages.Location:
        """Write a value into the tiers as object `object_id` of `owner`; blocks while there is no room.

        `holder` has the only reference to the value, if the caller has no other one; it is emptied.
        """
        packer = value.device
        most = 1 + min(len(value.buffers), self.store.born) + (len(packer) if packer is not None else 0)
        if len(self._slots) < most:  # first of all: whoever is interrupted while he waits has nothing to give back yet
            self._ask_for_slots(most)
        on_devices: list[tuple[int, int, int, int]] = []

        def commit() -> None:
            if packer is not None:
                on_devices.extend(packer.commit(self.devices.arenas()))

        inline = INLINE_BYTES if packer is not None or self.store.born else -1
        frame, pieces = self.store.store(value, holder, inline, commit)
        places = [(HOST, FIRST_LIFE, offset, size) for offset, size in pieces] + on_devices
        parts = [self._publish(*place) for place in places]
        if parts:
            seal = messages.Seal(object_id, owner, parts)
            with self.pump.lock:
                if not self._notes.put(_encode(seal)):
                    self.process.daemon.send(seal)  # leaves with the next flush, before anything that could name it
        return messages.Location(parts, frame)

    def _ask_for_slots(self, least: int) -> None:
        count = max(least, self._slots_asked)
        ask = self.process.requests.ask
        self._slots.extend(ask(lambda request: messages.Query(request, "slots", count), give_up=self._slots.extend))
        self._slots_asked = min(2 * self._slots_asked, MAX_SLOTS)

    def _publish(self, arena: int, life: int, offset: int, size: int) -> messages.Part:
        """Enter a new part into the pin board; where that is full it has no slot, and never moves."""
        slot = self._slots.popleft() if self._slots else 0
        serial = self.pinner.new_serial()
        if slot:
            self.pinner.publish(slot, serial)
        return messages.Part(arena, offset, size, slot, serial, arena, life)

    # -- reading ---------------------------------------------------------------------------------------------------

    def read(
        self,
        object_id: bytes,
        location: messages.Location,
        what: str,
        on_ref: Callable[[bytes, bytes], None] | None,
        new_view_pin: Callable[[int], ViewPin],
        *,
        into: int | None = None,
        priority: int = GET,
        deadline: float | None = None,
        blocking: bool = True,
    ) -> tuple[Any, messages.Location]:
        """Rebuild a value from its parts; return it with a location that is at least as good as the one given.

        Args:
            object_id: of the object.
            location: where it was.
            what: names the value in errors.
            on_ref: called for each ref inside.
            new_view_pin: makes what keeps a part mapped, given its slot.
            into: the arena that device arrays are wanted in; by default that of this process's device, or the host.
            priority: GET or ARGUMENT.
            deadline: monotonic seconds.
            blocking: whether the caller may wait for parts that have to be brought here.

        Raises:
            WouldBlockError: it may not, and there are such parts.
            PartsLostError: it has to be made again.
            ObjectStoreFullError, OutOfDeviceMemoryError: there was no room to bring it here.
            GetTimeoutError: the deadline passed.
        """
        parts, view_pins, wants = self._pin(location.parts, new_view_pin, into)
        if wants:
            if not blocking:
                raise WouldBlockError
            self._bring(object_id, wants, priority, deadline, parts, view_pins, new_view_pin)
        places = [self._place(part, view_pins.pop(index)) for index, part in enumerate(parts)]
        hosts = [index for index, part in enumerate(parts) if not part.home]
        frame: Any = location.frame or places[hosts[-1]]
        on_devices = [_as_place(place) for part, place in zip(parts, places, strict=True) if part.home]
        if parts != location.parts:
            location = messages.Location(parts, location.frame)
        with resolving(on_devices.__getitem__, lambda: self.devices.home(into)):
            return deserialize(frame, what, on_ref, places), location

    def view_pin(self, slot: int, object_id: bytes | None) -> ViewPin:
        """Return what keeps a pinned copy in its place."""
        view_pin = ViewPin(slot, object_id, self._view_pin_died)
        self._view_pins.append(weakref.ref(view_pin))
        if len(self._view_pins) > self._view_pins_limit:
            self._view_pins = [reference for reference in self._view_pins if reference() is not None]
            self._view_pins_limit = max(64, 2 * len(self._view_pins))
        return view_pin

    def viewed(self) -> list[bytes]:
        """Return the objects whose memory is in use here, once for each part, for tools."""
        alive = [reference() for reference in self._view_pins]
        return [view_pin.object_id for view_pin in alive if view_pin is not None and view_pin.object_id is not None]

    def _view_pin_died(self, view_pin: ViewPin) -> None:
        if view_pin.slot:
            self.pinner.unpin(view_pin.slot)
        if view_pin.object_id is not None:
            self.process.handle_dropped(view_pin.object_id)
        elif self.pump.standby_leads:
            self.pump.wake_standby()

    @uninterruptible
    def _pin(
        self, parts: Sequence[messages.Part], new_view_pin: Callable[[int], ViewPin], into: int | None
    ) -> tuple[list[messages.Part], dict[int, ViewPin], list[tuple[int, int]]]:
        """Pin each part that this process can read where it is; return the view pins, and which parts are wanted where."""
        view_pins: dict[int, ViewPin] = {}
        wants: list[tuple[int, int]] = []
        if into:
            self.devices.renew()
        for index, part in enumerate(parts):
            wanted = HOST
            if part.home:
                wanted = into if into is not None else self.devices.readable(part.home)
            # What has no slot never moves, but the driver outlives devices.
            stays = part.slot or part.arena == HOST or self.devices.bound
            if part.arena == wanted and stays and self.pinner.pin(part.slot, part.serial):
                view_pins[index] = new_view_pin(part.slot)
            else:
                wants.append((index, wanted))
        return list(parts), view_pins, wants

    @uninterruptible
    def _bring(
        self,
        object_id: bytes,
        wants: list[tuple[int, int]],
        priority: int,
        deadline: float | None,
        parts: list[messages.Part],
        view_pins: dict[int, ViewPin],
        new_view_pin: Callable[[int], ViewPin],
        tries: int = 3,
    ) -> None:
        """Have parts brought to where we can read them, and pin them."""
        wait_s = self.process.config.store_wait_s
        if deadline is not None:
            wait_s = min(wait_s, max(0.0, deadline - time.monotonic()) + 1.0)

        def wait(waiter: Waiter) -> bool:
            if self._wait(waiter, deadline, False):
                return True
            if self.process.dead:
                raise RuntimeDiedError(self.process.dead)
            raise GetTimeoutError("the value is there, but it could not be brought here in time")

        try:
            answer: messages.Found = self.process.requests.ask(
                lambda request: messages.Need(request, object_id, wants, priority, wait_s),
                give_up=lambda unwanted: self._mapped(unwanted.request),
                wait=wait,
            )
        except DeviceLostError as error:
            if self.devices.bound:  # a worker asks for nothing on other devices than its own
                self.devices.unusable = str(error)
            raise
        if any(arena != HOST for _, arena in wants):
            self.devices.renew()
        for index, part in answer.parts:
            if part.slot and not self.pinner.pin(part.slot, part.serial):
                self._mapped(answer.request)
                if part.arena != HOST:  # the device was lost at that moment
                    if not tries:
                        raise DeviceLostError("the device is lost again and again before a value can be read on it")
                    return self._bring(object_id, wants, priority, deadline, parts, view_pins, new_view_pin, tries - 1)
                raise AfieldError(
                    f"a part of object {object_id.hex()} moved although it was promised: a bug of afield's"
                )
            parts[index], view_pins[index] = part, new_view_pin(part.slot)
        self._mapped(answer.request)

    def _mapped(self, request: int) -> None:
        self.process.locked(self.process.daemon.send, messages.Mapped(request))

    def _on_found(self, channel: Channel, message: messages.Found) -> None:
        answer: Any = message
        if message.kind:
            answer = _ERRORS[message.kind](message.reason)
        if not self.process.requests.answered(message.request, answer) and not message.kind:
            channel.send(messages.Mapped(message.request))  # whoever asked was interrupted

    def _place(self, part: messages.Part, view_pin: ViewPin) -> Any:
        """Return a part's memory in this process: a memoryview, or what stands for device memory."""
        if part.arena == HOST:
            return self.store.view(part.offset, part.size, view_pin)
        place = self.devices.place(part.arena, part.life, part.offset, part.size, view_pin)
        if place is None:
            raise PartsLostError("its device was lost since somebody looked where it was")
        return place


def _as_place(place: Any) -> Place:
    return HostPlace(place) if isinstance(place, memoryview) else place


_ERRORS: dict[str, type[Exception]] = {
    "unknown": PartsLostError,
    "lost": PartsLostError,
    "full": ObjectStoreFullError,
    "device_full": OutOfDeviceMemoryError,
    "device_lost": DeviceLostError,
    "failed": ObjectLostError,
}
