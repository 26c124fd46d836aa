"""The tiers of a node as its daemon runs them: the shell around the books, the pin board and the store processes.

Theory of operation. Processes ask for room, say what they have written, and ask for parts that are not where they can read
them; the books (`gpu_store.books.residency`) decide, and their effects become answers to processes and moves for the store
processes (`stores`). A device's arena enters the books when its store process is ready, which is started with the first
lease of the device, or whoever else first asks for its memory. When a device or its store process is lost, the arena leaves
the books: the owners of what was only there are told (`Lost`), the device's workers are ended, and the scheduler does without
it until it has a new life.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import msgspec

from afield.gpu_store import tiers
from afield.gpu_store.backends.base import SlabExport
from afield.gpu_store.books.residency import Residency
from afield.gpu_store.mover import Completion
from afield.gpu_store.pins import PinBoard
from afield.gpu_store.rings import RingDamagedError, Rings
from afield.gpu_store.tiers import DISK, HOST, PartCopy
from afield.runtime.node.stores import StoreProcesses
from afield.runtime.process.configuration import DRIVER_INDEX
from afield.runtime.wire import messages
from afield.scheduler.devices import Device
from afield.scheduler.slots import AFTER_RESET, NEVER, SOON
from afield.transport.channel import Channel

if TYPE_CHECKING:
    from afield.runtime.node.daemon import NodeDaemon

#: A process leases no more slots than this at once.
MAX_SLOTS = 4096
#: While a dead owner's objects are still mapped somewhere, ask again this often.
ORPHAN_CHECK_S = 1.0

#: How the books name processes: an owner or client by its id, who has pinned something by its row of the board.
_WHO = re.compile(r"\b(owner|process) ([0-9a-f]{16}|#\d+)")

_decode_seal = msgspec.msgpack.Decoder(messages.Seal).decode


class Tiers:
    """The memory of a node."""

    def __init__(self, daemon: NodeDaemon, devices: Sequence[Device]) -> None:
        self._daemon = daemon
        session = daemon.session
        self.devices = {1 + device.index: device for device in devices}
        self.board = PinBoard(session.pins_fd)
        self._notes = Rings(session.pins_fd)
        self._processes: dict[int, bytes] = {}  # row of the pin board -> process
        self._indexes: dict[bytes, int] = {}
        self.books = Residency(session.capacity, self.board)
        self.stores = StoreProcesses(
            daemon,
            devices,
            on_ready=self._on_ready,
            on_done=self._on_done,
            on_lost=self._on_lost,
            link=daemon.config.emulated_link,
        )
        self._until_ready: dict[int, list[tuple[Channel, Any]]] = {}
        self._reserved: dict[int, int] = {}
        self._orphans: set[bytes] = set()
        self._question = 0
        self._asked: set[bytes] = set()
        self._still_held: set[bytes] = set()
        self._next_orphan_check = 0.0
        self.handlers: dict[type, Callable[[Channel, Any], None]] = {
            messages.StoreLease: self._on_lease,
            messages.GiveBack: lambda c, x: self.run(
                self.books.give_back(c.peer_id, x.arena, x.offset, x.size, x.life)
            ),
            messages.Seal: self._on_seal,
            messages.Free: self._on_free,
            messages.Spare: lambda c, x: self.run(self.books.set_spare(c.peer_id, x.object_ids, x.spare)),
            messages.Need: self._on_need,
            messages.Mapped: lambda c, x: self.run(self.books.mapped(c.peer_id, x.request)),
            messages.Held: self._on_held,
            **self.stores.handlers,
        }
        self.begin_process(daemon.primary, DRIVER_INDEX)
        self.questions = {"slots": self._on_slots, "slab": self._on_slab, "freed": self._on_freed}

    # -- what processes ask ----------------------------------------------------------------------------------------

    def _on_lease(self, channel: Channel, message: messages.StoreLease) -> None:
        if message.arena != HOST and not self._is_ready(message.arena, channel, message):
            return
        if message.request == messages.AHEAD and not self.books.has_plenty(message.arena, message.size):
            return
        self.run(
            self.books.lease(
                channel.peer_id,
                message.request,
                message.arena,
                message.size,
                block=message.timeout_s > 0,
                deadline=time.monotonic() + message.timeout_s,
                life=message.life,
            )
        )

    def _is_ready(self, arena: int, channel: Channel, message: Any) -> bool:
        """Tell whether a device's memory can be used; if not yet, the message is handled again when it can."""
        if self.stores.ready(arena):
            return True
        problem = self.stores.ensure(arena)
        if problem:
            self._refuse(channel, message, problem)
        else:
            self._until_ready.setdefault(arena, []).append((channel, message))
        return False

    def _refuse(self, channel: Channel, message: Any, reason: str) -> None:
        if isinstance(message, messages.StoreLease):
            channel.send(messages.StoreGrant(message.request, 0, 0, reason, message.arena, message.life, True))
        elif isinstance(message, messages.Need):
            channel.send(messages.Found(message.request, [], "device_lost", reason))
        else:
            channel.send(messages.Answer(message.request, None, reason))

    def read_notes(self) -> None:
        """Take note of what processes have sealed; comes before anything else is done."""
        for index, record in self._notes.take():
            process_id = self._processes[index]
            try:
                if record is None:
                    raise RingDamagedError("the ring is damaged")
                self._seal(process_id, index, _decode_seal(record))
            except Exception as error:  # as in `Channel.deliver`
                traceback.print_exc()
                self._daemon.expel(
                    process_id, f"what it left in shared memory cannot be ({type(error).__name__}: {error})"
                )

    def _on_seal(self, channel: Channel, message: messages.Seal) -> None:
        self._seal(channel.peer_id, self._indexes[channel.peer_id], message)

    def _seal(self, client: bytes, index: int, message: messages.Seal) -> None:
        self.board.adopt([part.slot for part in message.parts], index)
        parts = [PartCopy(p.arena, p.offset, p.size, p.slot, p.serial, p.home, p.life) for p in message.parts]
        self.run(self.books.seal(client, message.object_id, message.owner, parts), "device")

    def _on_free(self, channel: Channel, message: messages.Free) -> None:
        for object_id in message.object_ids:
            self.run(self.books.free(object_id, message.sealer or None))

    def _on_freed(self, channel: Channel, message: messages.Query) -> None:
        """All that the process has freed until now is freed: what it names by the same ids from here on is new."""
        channel.send(messages.Answer(message.request))

    def _on_need(self, channel: Channel, message: messages.Need) -> None:
        lost = self.books.lost_from(message.object_id)
        if lost is not None:  # the owner was told, perhaps before it knew of the object
            self._daemon.send(lost, messages.Lost([message.object_id], "it was in no tier when it was needed"))
        for _, arena in message.wants:
            if arena != HOST and not self._is_ready(arena, channel, message):
                return
        self.run(
            self.books.need(
                channel.peer_id,
                message.request,
                message.object_id,
                message.wants,
                priority=message.priority,
                deadline=time.monotonic() + message.timeout_s,
            )
        )

    def _on_slots(self, channel: Channel, message: messages.Query) -> None:
        """A process wants slots of the pin board for what it is going to write."""
        slots = self.board.lease_slots(min(int(message.argument), MAX_SLOTS), self._indexes[channel.peer_id])
        channel.send(messages.Answer(message.request, slots))

    def _on_slab(self, channel: Channel, message: messages.Query) -> None:
        """A process wants to map a device's slab; one of a life that is over would be of no use."""
        self.stores.look(message.argument)
        if self._is_ready(message.argument, channel, message):
            export: SlabExport = self.stores.export(message.argument)
            life = self.stores.life(message.argument)
            channel.send(messages.Answer(message.request, (life, msgspec.msgpack.encode(export))))

    # -- what the books decide -------------------------------------------------------------------------------------

    def run(self, effects: Sequence[Any], kind_of_loss: str = "") -> None:
        """Execute what the books decided; `kind_of_loss` as in `Lost`."""
        for effect in effects:
            kind = type(effect)
            if kind is tiers.Granted:
                grant = messages.StoreGrant(
                    effect.request_id, effect.offset, effect.size, "", effect.arena, effect.life
                )
                self._daemon.send(effect.client, grant)
            elif kind is tiers.Refused:
                reason = self._with_names(effect.reason)
                self._daemon.send(
                    effect.client, messages.StoreGrant(effect.request_id, 0, 0, reason, effect.arena, lost=effect.lost)
                )
            elif kind is tiers.Found:
                parts = [(i, _as_part(copy)) for i, copy in effect.parts]
                self._daemon.send(effect.client, messages.Found(effect.request_id, parts))
            elif kind is tiers.NotFound:
                reason = self._with_names(effect.reason)
                self._daemon.send(effect.client, messages.Found(effect.request_id, [], effect.kind, reason))
            elif kind is tiers.Lost:
                self._daemon.send(
                    effect.owner, messages.Lost(list(effect.object_ids), effect.cause, effect.kind or kind_of_loss)
                )
            elif kind is tiers.Trim:
                for channel in self._daemon.channels.values():
                    channel.send(messages.Trim(effect.arena))
            elif kind is tiers.Collect:
                for channel in self._daemon.channels.values():
                    channel.send(messages.Collect(effect.arena))
            else:
                self.stores.execute(effect)

    def _with_names(self, reason: str) -> str:
        """Return what the books say with processes named as `afield.memory()` names them: the books know their ids only."""
        pids, workers = self._daemon.pids, self._daemon.workers.by_id
        names = {
            process_id: f"{'worker' if process_id in workers else 'driver'} pid {pid}"
            for process_id, pid in pids.items()
        }
        by_word = {process_id.hex()[:16]: name for process_id, name in names.items()}
        by_word |= {f"#{index}": names[each] for index, each in self._processes.items() if each in names}

        def named(match: re.Match[str]) -> str:
            name = by_word.get(match[2])
            return match[0] if name is None else f"values of {name}" if match[1] == "owner" else name

        return _WHO.sub(named, reason)

    def _on_done(self, done: Sequence[Completion]) -> None:
        self.run(self.books.finished_all([(job, f"{kind}: {text}" if kind else "") for job, kind, text in done]))

    # -- devices ---------------------------------------------------------------------------------------------------

    def _on_ready(self, arena: int, capacity: int) -> None:
        device = self.devices[arena]
        self.run(
            self.books.add_arena(arena, capacity, f"device {device.uuid} ({device.name})", self.stores.life(arena))
        )
        self._daemon.leases.restore(device.uuid)
        for channel, message in self._until_ready.pop(arena, []):
            if not channel.closed:
                channel.deliver([message])

    def _on_lost(self, arena: int, uuid: str, epoch: int, cause: str) -> None:
        """A life of a device is over, whatever ended it, or it is given up; told once for each life."""
        self._reserved.pop(arena, None)
        again = self.stores.restart(arena)
        words = f"lost at {time.strftime('%H:%M:%S')}: {cause}"
        back = SOON if again else AFTER_RESET if self.stores.awaits_reset(arena) else NEVER
        self._daemon.leases.withdraw(uuid, words, back)
        self._daemon.workers.end_bound_to(uuid, f"its device {uuid} was {words}")
        for channel, message in [] if again else self._until_ready.pop(arena, []):
            if not channel.closed:
                self._refuse(channel, message, cause)
        self.run(self.books.remove_arena(arena, f"device {uuid} was {words}"), "device")

    def look(self, uuids: Sequence[str]) -> None:
        """Somebody has trouble with these devices: see whether they are lost, before anybody else is sent there."""
        for arena, device in self.devices.items():
            if device.uuid in uuids:
                self.stores.look(arena)

    def reserve(self) -> None:
        """Keep room free on the devices for what tasks have reserved (`gpu_memory`)."""
        for arena, device in self.devices.items():
            reserved = self._daemon.leases.reserved_bytes(device.uuid)
            if reserved != self._reserved.get(arena, 0) and self.stores.ready(arena):
                self._reserved[arena] = reserved
                self.run(self.books.reserve(arena, reserved))

    # -- processes and time ----------------------------------------------------------------------------------------

    def begin_process(self, process_id: bytes, index: int, devices: Sequence[str] = ()) -> dict[int, str]:
        """Prepare for a process that is about to begin and is bound to devices with these UUIDs; return arena -> UUID."""
        self._processes[index] = process_id
        self._indexes[process_id] = index
        self.board.add_process(index)
        self._notes.add(index)
        arenas = {device.uuid: arena for arena, device in self.devices.items()}
        bound = {arenas[uuid]: uuid for uuid in devices}
        for arena in bound:
            self.stores.ensure(arena)
        return bound

    def process_died(self, process_id: bytes) -> None:
        """Take back what a process had leased and pinned; what its objects become is decided when nobody uses them."""
        self.read_notes()
        index = self._indexes.pop(process_id, None)
        if index is not None:
            self.board.remove_process(index)
            self._notes.remove(index)
            del self._processes[index]
        self.run(self.books.client_died(process_id))
        self._asked.discard(process_id)
        orphans = self.books.owner_died(process_id)
        if orphans:
            self._orphans.update(orphans)
            self._ask_for_orphans(time.monotonic())

    def expire(self, now: float) -> None:
        """Do what is due."""
        self.read_notes()
        self.stores.expire(now)
        self.run(self.books.expire(now))
        if self._orphans and now >= self._next_orphan_check:
            self._ask_for_orphans(now)

    def next_deadline(self) -> float | None:
        """Return when `expire` has something to do."""
        dues = [self.books.next_deadline(), self.stores.next_deadline()]
        if self._orphans:
            dues.append(self._next_orphan_check)
        return min((due for due in dues if due is not None), default=None)

    def _ask_for_orphans(self, now: float) -> None:
        """Ask who still maps objects whose owner is dead; what nobody maps is freed when all have answered."""
        self._question += 1
        self._next_orphan_check = now + ORPHAN_CHECK_S
        self._still_held = set()
        self._asked = set(self._daemon.channels)
        for channel in self._daemon.channels.values():
            channel.send(messages.Held(self._question, list(self._orphans)))

    def _on_held(self, channel: Channel, message: messages.Held) -> None:
        if message.question != self._question:
            return
        self._still_held.update(message.object_ids)
        self._asked.discard(channel.peer_id)
        if not self._asked:
            for object_id in self._orphans - self._still_held:
                self.run(self.books.free(object_id))
            self._orphans &= self._still_held

    # -- for tools -------------------------------------------------------------------------------------------------

    def describe_devices(self) -> dict[str, Any]:
        """Return what a process that is not bound to devices must know to use them."""
        return {
            "backend": self.stores.backend_spec if self.devices else "",
            "devices": [
                {"arena": arena, "uuid": d.uuid, "index": d.index, "name": d.name, "memory": d.memory_bytes}
                for arena, d in self.devices.items()
            ],
        }

    def describe(self) -> dict[str, Any]:
        """Return how the tiers are used: the host's figures, and all of them by name under "tiers"."""
        host = self.books.usage(HOST)
        tiers = {"host": host, "disk": self.books.usage(DISK)}
        tiers |= {self.devices[arena].uuid: self.books.usage(arena) for arena in self.books.arenas if arena > HOST}
        return {
            "capacity": host.capacity,
            "used": host.used,
            "sealed": host.sealed,
            "leased": host.leased,
            "objects": sum(1 for _ in self.books.objects()),
            "tiers": {name: asdict(usage) for name, usage in tiers.items()},
        }


def _as_part(copy: PartCopy) -> messages.Part:
    return messages.Part(copy.arena, copy.offset, copy.size, copy.slot, copy.serial, copy.home, copy.life)
