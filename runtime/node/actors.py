"""The actor directory: creates actors, knows where each one lives, tells those who ask, and ends them.

What becomes of one actor is decided in `cores.actor`; here is the shell: names, watchers, workers, and the end of each actor,
which is remembered for a while.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

import msgspec

from afield.errors import ActorDiedError, ActorUnschedulableError
from afield.machines import FlightRecorder
from afield.runtime.cores.actor import ActorLives
from afield.runtime.wire import messages
from afield.scheduler.leases import Grant, Infeasible
from afield.scheduler.resources import ResourceSet
from afield.transport.channel import Channel

if TYPE_CHECKING:
    from afield.runtime.node.daemon import NodeDaemon
    from afield.runtime.node.workers import Worker

#: Lease owners that stand for an actor rather than a process start with this.
_ACTOR_OWNER = b"actor:"
#: The end of an actor is remembered for this many actors, for handles that ask late.
MAX_DEAD = 10_000
#: So many actors and names are looked at when the state is checked.
MOST_VALIDATED = 1000


def _forgotten(actor_id: bytes) -> bytes:
    return pickle.dumps(ActorDiedError("the actor is gone, and how it ended is no longer known", actor_id=actor_id), 5)


class Actor:
    """One actor as the directory knows it."""

    __slots__ = ("creator", "error", "lives", "spec", "watchers", "worker")

    def __init__(self, spec: messages.CreateActor, creator: bytes, recorder: FlightRecorder) -> None:
        self.spec = spec
        self.creator = creator
        self.lives = ActorLives(spec.actor_id, int(spec.options.get("max_restarts", 0)), recorder)
        self.worker: Worker | None = None
        self.watchers = {creator}
        self.error = b""

    @property
    def restarts(self) -> int:
        """How often it was started again."""
        return self.lives.restarts


class Classes:
    """The pickled classes of the actors that live, those of equal content once."""

    def __init__(self) -> None:
        self._users: dict[bytes, list[Any]] = {}  # class -> the same bytes, and how many actors have it

    def take(self, spec: messages.CreateActor) -> None:
        """An actor begins: it shares the class with others."""
        shared = self._users.setdefault(spec.blob, [spec.blob, 0])
        spec.blob = shared[0]
        shared[1] += 1

    def give_back(self, spec: messages.CreateActor) -> None:
        """An actor is over."""
        shared = self._users[spec.blob]
        shared[1] -= 1
        if not shared[1]:
            del self._users[spec.blob]


class Reserved(msgspec.Struct):
    """A name and what a handle to its actor needs."""

    actor_id: bytes
    creator: bytes
    description: dict[str, Any]


class ActorDirectory:
    """All actors of the cluster."""

    def __init__(self, daemon: NodeDaemon) -> None:
        self._daemon = daemon
        self.actors: dict[bytes, Actor] = {}
        self._classes = Classes()
        self.recorder = FlightRecorder()
        self._names: dict[tuple[str, str], Reserved] = {}
        self._dead: dict[bytes, bytes] = {}
        #: Actors that are still to be created, as far as others have asked for them already: creator, and who asked.
        self._early: dict[bytes, tuple[bytes, set[bytes]]] = {}
        #: Why actors were ended that are still to be created.
        self._ended_early: dict[bytes, str] = {}

    def is_actor_lease(self, owner: bytes) -> bool:
        """Tell whether a lease is for an actor."""
        return owner.startswith(_ACTOR_OWNER)

    def on_create(self, channel: Channel, spec: messages.CreateActor) -> None:
        """A process creates an actor."""
        self._classes.take(spec)
        actor = self.actors[spec.actor_id] = Actor(spec, channel.peer_id, self.recorder)
        _, watchers = self._early.pop(spec.actor_id, (b"", set()))
        actor.watchers |= watchers
        reason = self._ended_early.pop(spec.actor_id, "")
        if reason:
            self._end(actor, self._death(actor, reason))
        else:
            self._ask_for_worker(actor)

    # -- names ---------------------------------------------------------------------------------------------------

    def reserve(self, channel: Channel, argument: dict[str, Any]) -> dict[str, Any] | None:
        """Give a name to an actor that is about to be created; return the description of the one that has it, if any."""
        key = self._key(argument)
        taken = self._names.get(key)
        if taken is not None:
            return taken.description
        description = argument["description"]
        self._names[key] = Reserved(description["actor_id"], channel.peer_id, description)
        return None

    def _key(self, argument: dict[str, Any]) -> tuple[str, str]:
        namespace = argument["namespace"]
        return (self._daemon.config.namespace if namespace is None else namespace, argument["name"])

    def find(self, argument: dict[str, Any]) -> dict[str, Any] | None:
        """Return the description of the actor with a name."""
        found = self._names.get(self._key(argument))
        return None if found is None else found.description

    def names(self, argument: str | None) -> list[dict[str, str]]:
        """List the names in a namespace, or (None) in all."""
        return [{"namespace": ns, "name": name} for ns, name in self._names if argument is None or ns == argument]

    def _forget_names(self, gone: Callable[[Reserved], bool]) -> None:
        for key in [key for key, reserved in self._names.items() if gone(reserved)]:
            del self._names[key]

    # -- life ----------------------------------------------------------------------------------------------------

    def _ask_for_worker(self, actor: Actor) -> None:
        """Ask for a worker; an actor that has begun a life already waits for a lost device, however long that takes."""
        shape = ResourceSet(actor.spec.shape)
        owner = _ACTOR_OWNER + actor.spec.actor_id
        for refusal in self._daemon.leases.demand(owner, shape, 1, 0, lasting=True, patient=actor.lives.begun):
            self.on_refused(refusal)

    def on_refused(self, refusal: Infeasible) -> None:
        """There never will be a worker for an actor."""
        actor = self.actors.get(refusal.owner[len(_ACTOR_OWNER) :])
        if actor is None:
            return
        if actor.lives.begun:
            self._end(
                actor, self._death(actor, f"{actor.lives.why_again}, and it cannot start again: {refusal.reason}")
            )
        else:
            error = ActorUnschedulableError(f"{actor.spec.class_name}: {refusal.reason}", actor_id=actor.spec.actor_id)
            self._end(actor, pickle.dumps(error, 5))

    def on_granted(self, grant: Grant, worker: Worker) -> None:
        """A worker is there for an actor."""
        actor = self.actors.get(grant.owner[len(_ACTOR_OWNER) :])
        if actor is None:
            self._daemon.leases.release(grant.lease_id)
            self._daemon.workers.on_lease_returned(grant.lease_id)
            return
        worker.actor_id = actor.spec.actor_id
        worker.name = actor.spec.class_name
        actor.worker = worker
        actor.lives.given()
        self._daemon.send(worker.id, messages.BecomeActor(actor.spec, actor.creator, actor.restarts))

    def on_born(self, channel: Channel, message: messages.ActorBorn) -> None:
        """A constructor returned or raised."""
        actor = self.actors.get(message.actor_id)
        if actor is None or actor.worker is None or actor.worker.id != channel.peer_id:
            return
        if message.error:
            self._end(actor, message.error)
        elif message.lost:
            self._wait_for_arguments(actor, message.lost)
        else:
            actor.lives.lives()
            self._announce(actor)

    def _wait_for_arguments(self, actor: Actor, why: str) -> None:
        """An argument of the constructor is lost. Whoever created the actor may be able to make it again.

        That can need just the resources that the actor has: its worker ends, and it asks for another one later.
        """
        worker, actor.worker = actor.worker, None
        if worker is not None:
            self._daemon.workers.kill(worker)
        actor.lives.lacks(why)
        if actor.creator in self._daemon.channels:
            self._daemon.send(actor.creator, messages.ArgumentsLost(actor.spec.actor_id, why))
        else:
            self._end(actor, self._death(actor, f"{why}, and the process is gone that could make it again"))

    def on_arguments(self, channel: Channel, message: messages.ActorArguments) -> None:
        """The arguments of a constructor are there again."""
        actor = self.actors.get(message.actor_id)
        if actor is not None and actor.lives.state == "lacks" and actor.creator == channel.peer_id:
            actor.lives.has_arguments()
            spec = actor.spec
            spec.arguments, spec.location = message.arguments, message.location
            spec.dependencies = message.dependencies
            self._ask_for_worker(actor)

    def on_watch(self, channel: Channel, message: messages.WatchActor) -> None:
        """A process wants to call an actor."""
        actor = self.actors.get(message.actor_id)
        if actor is not None:
            actor.watchers.add(channel.peer_id)
            channel.send(self._state_of(actor))
        elif message.actor_id in self._dead:
            channel.send(messages.ActorState(message.actor_id, "dead", b"", self._dead[message.actor_id]))
        else:
            self._ask_creator(channel, message)

    def _ask_creator(self, channel: Channel, message: messages.WatchActor) -> None:
        """An actor may be unknown because its creator waits for the constructor's arguments, or because it is forgotten."""
        actor_id = message.actor_id
        creator = message.creator or self._namer(actor_id)
        if creator in self._daemon.channels:
            self._early.setdefault(actor_id, (creator, set()))[1].add(channel.peer_id)
            self._daemon.send(creator, messages.WatchActor(actor_id))
        else:
            channel.send(messages.ActorState(actor_id, "dead", b"", _forgotten(actor_id)))

    def _namer(self, actor_id: bytes) -> bytes:
        return next((known.creator for known in self._names.values() if known.actor_id == actor_id), b"")

    def on_gone(self, channel: Channel, message: messages.ActorGone) -> None:
        """An actor that others may wait for will not be created; the creator sends this after all that it did create."""
        actor_id = message.actor_id
        actor = self.actors.get(actor_id)
        if actor is not None:
            if actor.lives.state == "lacks" and actor.creator == channel.peer_id:  # they cannot be made again
                self._end(actor, message.error or self._death(actor, "an argument of its constructor is lost"))
            return
        error = self._dead[actor_id] = message.error or self._dead.get(actor_id) or _forgotten(actor_id)
        self._trim(self._dead)
        self._forget_names(lambda reserved: reserved.actor_id == actor_id)
        self._ended_early.pop(actor_id, None)
        for watcher in self._early.pop(actor_id, (b"", set()))[1]:
            self._daemon.send(watcher, messages.ActorState(actor_id, "dead", b"", error))

    @staticmethod
    def _trim(remembered: dict[bytes, Any]) -> None:
        if len(remembered) > MAX_DEAD:
            del remembered[next(iter(remembered))]

    def _state_of(self, actor: Actor) -> messages.ActorState:
        worker = actor.worker.id if actor.worker is not None else b""
        return messages.ActorState(actor.spec.actor_id, actor.lives.told, worker, actor.error)

    def _announce(self, actor: Actor) -> None:
        for watcher in actor.watchers:
            self._daemon.send(watcher, self._state_of(actor))

    def on_kill(self, channel: Channel, message: messages.KillActor) -> None:
        """A process ends an actor."""
        actor = self.actors.get(message.actor_id)
        if actor is None:
            if message.no_restart and message.actor_id not in self._dead:
                self._ended_early[message.actor_id] = message.reason
                self._trim(self._ended_early)
                self._daemon.send(message.creator or self._namer(message.actor_id), message)
            return
        actor.lives.killed(message.reason, message.no_restart)
        worker = actor.worker
        if message.gracefully and worker is not None and actor.lives.state == "alive":
            self._daemon.send(worker.id, messages.Terminate())
            actor.worker = None  # it ends by itself
        elif worker is not None and not message.no_restart:
            self._daemon.workers.kill(worker)
        if message.no_restart:
            self._end(actor, self._death(actor, message.reason))

    def _death(self, actor: Actor, reason: str) -> bytes:
        error = ActorDiedError(f"the actor {actor.spec.class_name} is dead: {reason}", actor_id=actor.spec.actor_id)
        return pickle.dumps(error, 5)

    def _end(self, actor: Actor, error: bytes) -> None:
        """The actor is over for good."""
        if not actor.lives.ends():
            return
        actor.error = error
        self._announce(actor)
        actor_id = actor.spec.actor_id
        del self.actors[actor_id]
        self._classes.give_back(actor.spec)
        self._forget_names(lambda reserved: reserved.actor_id == actor_id)
        self._dead[actor_id] = error
        self._trim(self._dead)
        self._daemon.leases.demand(_ACTOR_OWNER + actor_id, ResourceSet(actor.spec.shape), 0, 0)
        if actor.worker is not None:
            self._daemon.workers.kill(actor.worker)

    def on_worker_died(self, worker: Worker, reason: str) -> None:
        """A worker is gone, perhaps with an actor on it."""
        actor = self.actors.get(worker.actor_id) if worker.actor_id else None
        if actor is None or actor.worker is not worker:
            return
        actor.worker = None
        why, again = actor.lives.dies(reason)
        if again:
            actor.error = self._death(actor, why)
            self._announce(actor)
            self._ask_for_worker(actor)
        else:
            self._end(actor, self._death(actor, why))

    def on_process_died(self, process_id: bytes) -> None:
        """The creator of an actor is gone: so is the actor, unless it is detached."""
        self._forget_names(lambda reserved: reserved.creator == process_id and reserved.actor_id not in self.actors)
        for actor_id, (creator, watchers) in list(self._early.items()):
            watchers.discard(process_id)
            if creator == process_id:
                del self._early[actor_id]
                for watcher in watchers:
                    self._daemon.send(watcher, messages.ActorState(actor_id, "dead", b"", _forgotten(actor_id)))
        for actor in list(self.actors.values()):
            actor.watchers.discard(process_id)
            if actor.creator == process_id and (actor.lives.state == "lacks" or not actor.spec.options.get("detached")):
                self._end(actor, self._death(actor, "the process that created it ended"))

    def validate(self) -> list[str]:
        """Return what is wrong with the directory, none if all is well."""
        found = []
        for actor_id, actor in islice(self.actors.items(), MOST_VALIDATED):
            state = actor.lives.state
            if state == "dead" or (actor.worker is None) != (state in ("asks", "lacks")):
                found.append(f"actor {actor_id.hex()} {state}, with {'no' if actor.worker is None else 'a'} worker")
        for reserved in islice(self._names.values(), MOST_VALIDATED):
            if reserved.actor_id in self._dead:
                found.append(f"actor {reserved.actor_id.hex()} is dead, and has a name")
        return found
