"""The node daemon: the shell around the lease manager, and what holds the node's parts together.

It is single-threaded: one loop, one handler per message. Its state is the cores' state, the tiers of memory, the worker pool
and the actor directory; nothing here is on the path of a task that already has a lease.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from afield.errors import ActorUnschedulableError
from afield.ids import TASK_ID_BYTES
from afield.machines import Core
from afield.runtime.node.actors import ActorDirectory
from afield.runtime.node.census import Census
from afield.runtime.node.output import OutputRelay
from afield.runtime.node.tiers import Tiers
from afield.runtime.node.workers import Worker, WorkerPool
from afield.runtime.process.configuration import ForkServerConfig
from afield.runtime.process.environment import Environment
from afield.runtime.wire import messages, roles
from afield.scheduler.leases import Grant, Infeasible, LeaseManager
from afield.scheduler.resources import ResourceSet
from afield.transport.channel import Channel, UnexpectedMessageError
from afield.transport.endpoint import Endpoint
from afield.transport.loop import Loop
from afield.transport.shortage import Shortage

#: After `shutdown` the workers have so long to end in good order.
SHUTDOWN_WITHIN_S = 2.0
#: After the driver's end the fork server ends the session within so long, or is ended.
FORK_SERVER_WITHIN_S = 2.0


class NodeDaemon:
    """One node's daemon."""

    def __init__(self, config: ForkServerConfig, fork_sock: socket.socket) -> None:
        self.config = config
        self.session = config.session
        self.node_id = config.node_id
        self.loop = Loop()
        self.channels: dict[bytes, Channel] = {}
        self.clients: dict[bytes, Channel] = {}  # tools that only ask
        self.drivers: dict[bytes, bool] = {}  # id -> wants logs
        self.pids: dict[bytes, int] = {}
        self.primary = config.driver
        resources = ResourceSet.from_options(num_cpus=config.num_cpus, memory=config.memory, resources=config.resources)
        self.leases = LeaseManager(resources, config.devices)
        self.output = OutputRelay(self)
        self.workers = WorkerPool(self, fork_sock)
        self.tiers = Tiers(self, config.devices)
        self.actors = ActorDirectory(self)
        self.census = Census(self)
        self._placements: dict[
            bytes, dict[int, messages.Placement]
        ] = {}  # owner -> key of its demand -> what workers need
        self._device_numbers = {device.uuid: device.index for device in config.devices}
        self._store_waits: set[int] = set()  # leases whose workers gave their CPUs back while they wait for room
        self._stopping = self._orderly = False
        self._shortage = Shortage("the node daemon")
        self.endpoint = Endpoint(
            self.loop,
            self.session.token,
            self.node_id,
            messages.decode,
            self._on_messages,
            self._on_closed,
            on_absent=self._on_absent,
            on_error=self._out_of_files,
            on_refused=self._refused,
        )
        self.endpoint.listen(self.session.address(b""))
        self.loop.register(config.lifeline_fd, self._on_driver_ended)
        self._handlers: dict[type, Callable[[Channel, Any], None]] = {
            messages.Register: self._on_register,
            messages.Unreachable: self._on_unreachable,
            messages.Demand: self._on_demand,
            messages.ReturnLease: self._on_return_lease,
            messages.Blocked: self._on_blocked,
            messages.CreateActor: self._on_create_actor,
            messages.Retire: self.workers.on_retire_refused,
            messages.Unfit: self.workers.on_unfit,
            messages.ActorBorn: self.actors.on_born,
            messages.WatchActor: self.actors.on_watch,
            messages.ActorGone: self.actors.on_gone,
            messages.ActorArguments: self.actors.on_arguments,
            messages.KillActor: self.actors.on_kill,
            messages.KillWorker: lambda c, x: self.workers.kill_leased(x.lease_id),
            messages.Query: self._on_query,
            messages.Answer: self.census.on_answer,
            messages.Printed: self.output.on_printed,
            messages.Shutdown: self._on_shutdown,
            **self.tiers.handlers,
        }

    def run(self) -> None:
        """Serve until told to stop, or the fork server or the primary driver is gone."""
        self.workers.prestart()
        while not self._stopping:
            self.loop.step(self._timeout())
            now = time.monotonic()
            self.tiers.expire(now)
            self.census.expire(now)
            self.schedule()
            self.loop.flush()
        self._let_workers_end()
        self.output.finish()
        self.endpoint.close()

    def _let_workers_end(self) -> None:
        """The session was shut down: what its workers have to do before they end is done now; nothing new is granted."""
        if not self._orderly:
            return
        self.workers.end_all()
        deadline = time.monotonic() + SHUTDOWN_WITHIN_S
        while self.workers.by_id and time.monotonic() < deadline:
            self.loop.flush()
            self.loop.step(max(0.0, deadline - time.monotonic()))
            self.tiers.expire(time.monotonic())

    def _timeout(self) -> float | None:
        clocks = (self.tiers, self.leases, self.census)
        deadlines = [due for due in (clock.next_deadline() for clock in clocks) if due is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def stop(self) -> None:
        """Leave the loop; the fork server ends everything."""
        self._stopping = True

    def _on_driver_ended(self, events: int) -> None:
        """The fork server hears of this too and ends us all, unless somebody has stopped it."""
        self.loop.unregister(self.config.lifeline_fd)
        self.loop.after(FORK_SERVER_WITHIN_S, self._end_fork_server)

    def _end_fork_server(self) -> None:
        shutil.rmtree(self.config.directory, ignore_errors=True)
        os.kill(os.getppid(), signal.SIGKILL)  # and with it all its children, us too

    def cores(self) -> dict[str, Core]:
        """Return what can be looked into here: what each core did last, and whether its state is sound."""
        return {"leases": self.leases, "actors": self.actors, "books": self.tiers.books, "links": self.endpoint.links}

    # -- processes -----------------------------------------------------------------------------------------------

    def _refused(self, channel: Channel, message: Any, why: str) -> Any:
        """A message is too large: whoever asked is told; a worker that misses what it was to be told is of no use."""
        text = f"a message of the node daemon ({type(message).__name__}) could not be sent: {why}"
        if isinstance(message, messages.Answer):
            return messages.Answer(message.request, None, text)
        print(text, file=sys.stderr, flush=True)
        worker = self.workers.by_id.get(channel.peer_id)
        if worker is not None:
            worker.ended_for = text
            self.workers.kill(worker)
        return None

    def _on_messages(self, channel: Channel, batch: list[Any]) -> None:
        self.tiers.read_notes()
        for message in batch:
            if not channel.closed:
                self.handle(channel, message)

    def handle(self, channel: Channel, message: Any) -> None:
        """Do what a message asks for; one that makes no sense costs its channel (`Channel.deliver`).

        Whoever asks for something must have said before what it is: what it holds goes when that process does.
        """
        kind = type(message)
        if kind is not messages.Register and channel.context not in roles.MAY_SEND.get(kind, roles.PROCESSES):
            raise UnexpectedMessageError(
                f"{channel.context or 'a process that has not said what it is'} may not send it"
            )
        self._handlers[kind](channel, message)

    def _on_register(self, channel: Channel, message: messages.Register) -> None:
        if channel.context is not None or message.kind not in roles.KINDS:
            raise UnexpectedMessageError(
                "it has said already what it is" if channel.context else "there is no such kind"
            )
        if message.kind == "driver" and channel.peer_id != self.primary:
            # Nobody would tell of its death: what it had leased would never come back.
            raise UnexpectedMessageError("this session has another driver")
        channel.context = message.kind
        if message.kind == "client":
            self.clients[channel.peer_id] = channel
            return
        if message.kind == "store":
            self.tiers.stores.on_registered(channel, message)
            return
        if message.kind == "worker" and channel.peer_id not in self.workers.by_id:
            channel.died()  # it was reaped before we came to read this
            return
        self.pids[channel.peer_id] = message.pid
        self.channels[channel.peer_id] = channel
        if message.kind == "driver":
            self.drivers[channel.peer_id] = message.log_to_driver
        elif message.kind == "worker":
            self.workers.on_registered(channel)

    def send(self, process_id: bytes, message: Any) -> None:
        """Send to a process if it is still there."""
        channel = self.channels.get(process_id)
        if channel is not None:
            channel.send(message)

    def _out_of_files(self, error: OSError) -> None:
        """Who connects waits, unless there will be room as fewer workers are started: theirs is the error then."""
        self._shortage.met(error)
        self.workers.start_fewer()

    def _on_closed(self, channel: Channel) -> None:
        """A process has closed its channel, or broke the protocol; a socket that breaks is nobody's end."""
        process_id = channel.peer_id
        self.clients.pop(process_id, None)
        if self.channels.get(process_id) is not channel:
            return
        del self.channels[process_id]
        if process_id in self.drivers:
            self.process_died(process_id, "the driver ended")
        elif channel.fault:
            self.workers.end_faulty(process_id, channel.fault)
        # A worker's end is reported by the fork server, with the reason.

    def _on_absent(self, channel: Channel, name_is_gone: bool) -> None:
        """A process does not come back to its channel: it may have been settled before that channel began."""
        if not self._lives(channel.peer_id):
            channel.died()

    def _lives(self, process_id: bytes) -> bool:
        """Tell whether a process has not been settled yet: its death, if it is dead, is still to be told."""
        return process_id in self.channels or process_id in self.workers.by_id or self.tiers.stores.knows(process_id)

    def _on_unreachable(self, channel: Channel, message: messages.Unreachable) -> None:
        if message.fault:
            # Whoever of the two is a worker; its death is told to all.
            faulty = message.process if message.process in self.workers.by_id else channel.peer_id
            self.workers.end_faulty(faulty, message.fault)
        elif not self._lives(message.process):
            channel.send(messages.ProcessDied(message.process, "it had ended before anybody asked for it"))

    def expel(self, process_id: bytes, fault: str) -> None:
        """End what we have with a process that did what cannot be."""
        channel = self.channels.get(process_id)
        if channel is not None:
            channel.refused(fault)
        else:
            self.workers.kill_process(process_id)

    def hear_out(self, process_id: bytes) -> None:
        """Handle what a dead process had sent."""
        channel = self.channels.get(process_id)
        if channel is not None:
            channel.drain()

    def process_died(self, process_id: bytes, reason: str) -> None:
        """Settle everything that a process leaves behind."""
        self.channels.pop(process_id, None)
        self.endpoint.died(process_id)
        self.drivers.pop(process_id, None)
        self.output.driver_left(process_id)
        self.census.process_died(process_id)
        self.pids.pop(process_id, None)
        if process_id == self.primary:
            self.stop()
            return
        self._placements.pop(process_id, None)
        for lease_id in self.leases.owner_died(process_id):
            self.workers.kill_leased(lease_id)
        self.actors.on_process_died(process_id)
        for channel in self.channels.values():
            channel.send(messages.ProcessDied(process_id, reason))
        self.tiers.process_died(process_id)

    # -- leases --------------------------------------------------------------------------------------------------

    def _on_demand(self, channel: Channel, message: messages.Demand) -> None:
        if message.placement is not None:
            reason = self._misplaced(message.placement)
            if reason and message.count:
                channel.send(messages.Infeasible(message.key, reason))
                return
            self._placements.setdefault(channel.peer_id, {})[message.key] = message.placement
        for refusal in self.leases.demand(channel.peer_id, ResourceSet(message.shape), message.count, message.key):
            channel.send(messages.Infeasible(refusal.key, refusal.reason))

    def _on_create_actor(self, channel: Channel, spec: messages.CreateActor) -> None:
        ResourceSet(spec.shape)  # raises for what is none, before there is anything that asks for it again and again
        reason = self._misplaced(spec.placement) if spec.placement is not None else ""
        if reason:
            error = pickle.dumps(ActorUnschedulableError(f"{spec.class_name}: {reason}", actor_id=spec.actor_id), 5)
            self.actors.on_gone(channel, messages.ActorGone(spec.actor_id, error))
            channel.send(messages.ActorState(spec.actor_id, "dead", b"", error))
        else:
            self.actors.on_create(channel, spec)

    def _misplaced(self, placement: messages.Placement) -> str:
        """Return why this node cannot be or provide what is needed, or ""."""
        if placement.node and placement.node != self.node_id.hex():
            return (
                f"asked for the node {placement.node}, which is not part of this cluster (its only node is "
                f"{self.node_id.hex()}); take the id from afield.get_runtime_context().get_node_id(), or pass soft=True"
            )
        return Environment.decode(placement.environment).problem()

    def environment_of(self, grant: Grant) -> bytes:
        """Return the environment that the worker for a grant must have."""
        if self.actors.is_actor_lease(grant.owner):
            actor = self.actors.actors.get(grant.owner[-TASK_ID_BYTES:])
            placement = actor.spec.placement if actor is not None else None
        else:
            placement = self._placements.get(grant.owner, {}).get(grant.key)
        return placement.environment if placement is not None else b""

    def not_started(self, worker: Worker, grant: Grant, reason: str) -> None:
        """No worker for a grant could be started: those who wait for it must not wait for ever."""
        if self.actors.is_actor_lease(grant.owner):
            self.actors.on_granted(grant, worker)  # and it has died: the directory decides about a restart
        else:
            self.leases.demand(grant.owner, grant.shape, 0, grant.key)
            self.send(grant.owner, messages.Infeasible(grant.key, f"{reason}; what it printed says why"))

    def _on_return_lease(self, channel: Channel, message: messages.ReturnLease) -> None:
        self.leases.release(message.lease_id)
        self.workers.on_lease_returned(message.lease_id, message.wears_out)

    def _on_blocked(self, channel: Channel, message: messages.Blocked) -> None:
        worker = self.workers.by_id.get(channel.peer_id)
        if worker is None or not worker.lease_id:
            return
        if not message.blocked:
            self._store_waits.discard(worker.lease_id)
            self.leases.unblock(worker.lease_id)
        elif not message.for_store:
            self.leases.block(worker.lease_id)
        else:
            # Each that gives its CPU back lets another task start, which may be a producer too: there is an end to it.
            self._store_waits = {lease for lease in self._store_waits if self.workers.is_leased(lease)}
            if len(self._store_waits) < max(1, int(self.config.num_cpus)):
                self._store_waits.add(worker.lease_id)
                self.leases.block(worker.lease_id)

    def schedule(self) -> None:
        """Grant what can be granted and ask for what is needed."""
        for grant in self.leases.schedule(time.monotonic()):
            self.workers.provide(grant)
        self.tiers.reserve()
        for owner in self.leases.reclaims():
            self.send(owner, messages.Reclaim())
        for refusal in self.leases.refusals():
            self._refuse(refusal)

    def _refuse(self, refusal: Infeasible) -> None:
        """What somebody waits for can never be had, since a device was lost."""
        if self.actors.is_actor_lease(refusal.owner):
            self.actors.on_refused(refusal)
        else:
            self.send(refusal.owner, messages.Infeasible(refusal.key, refusal.reason))

    def granted(self, worker: Worker) -> None:
        """A worker is ready for its lease."""
        grant = worker.grant
        assert grant is not None
        if self.actors.is_actor_lease(grant.owner):
            self.send(worker.id, self._assignment(grant))
            self.actors.on_granted(grant, worker)
        elif grant.owner in self.channels:
            assignment = self._assignment(grant)
            self.send(grant.owner, messages.Grant(grant.key, grant.lease_id, worker.id, assignment))
        else:
            self.leases.release(grant.lease_id)
            self.workers.on_lease_returned(grant.lease_id)

    def _assignment(self, grant: Grant) -> messages.Assign:
        facts = None
        if self.actors.is_actor_lease(grant.owner):
            actor = self.actors.actors.get(grant.owner[-TASK_ID_BYTES:])
            if actor is not None:
                spec = actor.spec
                facts = messages.ActorFacts(
                    spec.actor_id, spec.class_name, spec.options.get("name") or "", actor.restarts
                )
        numbers = [self._device_numbers[uuid] for uuid in grant.device_uuids]
        return messages.Assign(grant.lease_id, list(grant.device_uuids), numbers, grant.shape.units(), facts)

    # -- questions -----------------------------------------------------------------------------------------------

    def _on_query(self, channel: Channel, message: messages.Query) -> None:
        answers: dict[str, Callable[[Any], Any]] = {
            "total": lambda argument: self.leases.total(),
            "available": lambda argument: self.leases.available(),
            "store": lambda argument: self.tiers.describe(),
            "devices": lambda argument: self.tiers.describe_devices(),
            "stores": lambda argument: self.tiers.stores.describe(),
            "processes": lambda argument: [process.hex() for process in self.channels],
            "workers": lambda argument: self.workers.describe(),
            "census": lambda argument: self.census.processes(),
            "reserve_actor_name": lambda argument: self.actors.reserve(channel, argument),
            "find_actor": lambda argument: self.actors.find(argument),
            "actor_names": lambda argument: self.actors.names(argument),
        }
        make = answers.get(message.what)
        if message.what in self.census.questions:
            self.census.ask(channel, message)
        elif message.what in self.tiers.questions:
            self.tiers.questions[message.what](channel, message)
        elif make is None:
            channel.send(messages.Answer(message.request, None, f"the node daemon does not know {message.what!r}"))
        else:
            channel.send(messages.Answer(message.request, make(message.argument)))

    def _on_shutdown(self, channel: Channel, message: messages.Shutdown) -> None:
        if channel.peer_id == self.primary:
            self._orderly = True
            self.stop()
