"""Submitting tasks: the shell around `dispatch` that turns calls into pushes and replies into values."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

from afield.errors import TaskUnschedulableError, WorkerCrashedError
from afield.ids import ARGUMENTS_INDEX, FIRST_RETURN, object_id
from afield.runtime import messages as m
from afield.runtime.context import calling_context
from afield.runtime.dispatch import IDLE_LEASE_S, Lane, Lease, Task
from afield.runtime.ownership import FAILED, LOCATED, PENDING
from afield.runtime.process import Process
from afield.runtime.refs import ObjectRef
from afield.runtime.serialization import Serialized, dumps_plain, serialize
from afield.runtime.values import INLINE_BYTES, Values
from afield.transport.channel import Channel
from afield.transport.pump import uninterruptible

#: A burst of submissions looks for replies this often.
POLL_EVERY = 32


class Function:
    """What a push names: a remote function, or an actor's method (then `blob` is empty)."""

    __slots__ = ("blob", "index", "name", "num_returns")

    _indexes = itertools.count(1)

    def __init__(self, name: str, blob: bytes, num_returns: int) -> None:
        self.index = next(Function._indexes)
        self.name = name
        self.blob = blob
        self.num_returns = num_returns


class PeerState:
    """What we keep with a channel to a worker: what it knows, and what it owes us."""

    __slots__ = ("defined", "inflight", "lease", "on_batch")

    def __init__(self) -> None:
        self.defined: set[int] = set()
        self.inflight: dict[int, Task] = {}
        self.lease: Lease | None = None
        #: Called after a batch of messages with the number of replies in it.
        self.on_batch: Callable[[int], None] | None = None


class Arg:
    """Stands in the pickled arguments for top-level ref number `index`."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index

    def __reduce__(self) -> tuple[Any, ...]:
        return Arg, (self.index,)


class Submitter:
    """Submits the tasks of a process and receives their outcomes."""

    def __init__(self, process: Process, values: Values) -> None:
        self.process = process
        self.values = values
        self.lanes: dict[Any, Lane] = {}
        self._lanes_by_key: dict[int, Lane] = {}
        self._leases: dict[bytes, Lease] = {}
        self._next_sequence = itertools.count(1).__next__
        self._since_poll = 0
        self.tasks_submitted = 0
        self.tasks_retried = 0
        process.handlers |= {
            m.ReplyMany: self._on_reply_many,
            m.HandBack: self._on_hand_back,
            m.Unblocked: self._on_unblocked,
            m.Grant: self._on_grant,
            m.Infeasible: self._on_infeasible,
            m.Reclaim: self._on_reclaim,
        }
        process.on_batch = self._on_batch
        process.tickers.append(self._tick)
        process.on_process_died.append(self._on_process_died)

    # -- arguments -----------------------------------------------------------------------------------------------

    def encode_arguments(self, task: Task, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
        """Serialise the arguments into `task`, with its top-level refs as dependencies, and pin what they refer to."""
        refs: list[bytes] = []
        if any(type(arg) is ObjectRef for arg in args):
            args = tuple(_placeholder(arg, refs) for arg in args)
        if kwargs and any(type(arg) is ObjectRef for arg in kwargs.values()):
            kwargs = {key: _placeholder(arg, refs) for key, arg in kwargs.items()}
        if refs:
            task.dependencies = refs
        data = None if refs else dumps_plain((args, kwargs))
        nested: list[bytes] = []
        if data is None or len(data) > INLINE_BYTES:
            serialized = serialize((args, kwargs), f"the arguments of {name}()")
            nested = serialized.refs
            if serialized.size > INLINE_BYTES:
                self._store_arguments(task, serialized, [])
                data = b""
            else:
                data = serialized.pack()
        task.arguments = data
        task.pinned = (task.pinned or []) + refs + nested or None

    def _store_arguments(self, task: Task, value: Serialized, holder: list[Any]) -> None:
        """Large arguments become an object of their own that lives as long as the task."""
        process = self.process
        argument_id = task.task_id + ARGUMENTS_INDEX
        task.location = self.values.write_object(argument_id, process.process_id, value, holder)

        def own() -> None:
            # The task's pin is the only hold of this object.
            process.table.put(argument_id, LOCATED, task.location)
            process.table.pin(argument_id)
            process.table.drop(argument_id)

        process.locked(own)
        task.pinned = [argument_id]

    def pin_arguments(self, task: Task) -> None:
        """Hold everything the task refers to until its reply; the caller holds the lock."""
        argument_id = task.task_id + ARGUMENTS_INDEX
        for pinned in task.pinned or ():
            if pinned != argument_id:
                self.process.table.pin(pinned)

    def unpin_arguments(self, task: Task) -> None:
        """The task's outcome is known."""
        if task.pinned is not None:
            for pinned in task.pinned:
                self.process.table.unpin(pinned)
            task.pinned = None

    def when_resolved(self, task: Task, proceed: Callable[[Task], None]) -> None:
        """Call `proceed` once every top-level argument is there; the caller holds the lock."""
        table = self.process.table

        def one_resolved() -> None:
            task.unresolved -= 1
            if not task.unresolved:
                proceed(task)

        task.unresolved = 1
        for dependency in task.dependencies or ():
            task.unresolved += 1
            if table.when_done(dependency, one_resolved):
                task.unresolved -= 1
        one_resolved()

    def failed_dependency(self, task: Task) -> bytes | None:
        """Return the serialised error of an argument that failed, if one did."""
        entries = self.process.table.entries
        for dependency in task.dependencies or ():
            entry = entries[dependency]
            if entry.state == FAILED:
                error: bytes = entry.value
                return error
        return None

    # -- submitting ----------------------------------------------------------------------------------------------

    def lane(self, shape: tuple[tuple[str, int], ...]) -> Lane:
        """Return the lane for tasks of this shape."""
        lane = self.lanes.get(shape)
        if lane is None:
            lane = Lane(len(self.lanes) + 1, dict(shape), self)
            self.lanes[shape] = self._lanes_by_key[lane.key] = lane
        return lane

    def submit(
        self,
        function: Function,
        lane: Lane,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        num_returns: int,
        retries: int,
    ) -> list[ObjectRef]:
        """Submit a task; return the refs of its outputs at once."""
        process = self.process
        if process.dead:
            process.check_alive()
        task_id = calling_context().next_task_id()
        task = Task(task_id, function, b"", lane, num_returns, retries)
        if args or kwargs:
            self.encode_arguments(task, args, kwargs, function.name)
        if num_returns == 1:
            object_ids = [task_id + FIRST_RETURN]
        else:
            object_ids = [object_id(task_id, index) for index in range(num_returns)]
        self._enter(task, object_ids)
        pump = process.pump
        if pump.interrupted:
            pump.deliver()
        self._since_poll += 1
        if self._since_poll >= POLL_EVERY:
            self._since_poll = 0
            pump.poll()
        return [ObjectRef(oid) for oid in object_ids]

    @uninterruptible
    def _enter(self, task: Task, object_ids: list[bytes]) -> None:
        process = self.process
        with process.pump.lock:
            self.tasks_submitted += 1
            for oid in object_ids:
                process.table.own(oid, task)
            if task.pinned is not None:
                self.pin_arguments(task)
            if task.dependencies is not None:
                self.when_resolved(task, self._resolved)
                if process.table.effects:
                    process.run_effects()
            else:
                task.lane.submit(task, time.monotonic())
            if process.loop.dirty:
                process.loop.flush()

    def _resolved(self, task: Task) -> None:
        if task.cancelled:
            return
        error = self.failed_dependency(task)
        if error is not None:
            self.fail(task, error)
        else:
            task.lane.submit(task, time.monotonic())

    # -- what a lane asks for ------------------------------------------------------------------------------------

    def push(self, lease: Lease, tasks: list[Task]) -> None:
        """Send tasks to a leased worker."""
        channel = lease.channel
        state: PeerState = channel.context
        for task in tasks:
            sequence = self.send_push(channel, state, task)
            lease.inflight[sequence] = task

    def send_push(self, channel: Channel, state: PeerState, task: Task) -> int:
        """Send one push, preceded by its function's definition where the peer does not know it yet."""
        function = task.function
        if function.index not in state.defined:
            state.defined.add(function.index)
            channel.send(m.Define(function.index, function.name, function.blob, function.num_returns))
        sequence = self._next_sequence()
        dependencies = None if task.dependencies is None else self.resolved_dependencies(task)
        channel.send(m.Push(sequence, task.task_id, function.index, task.arguments, task.location, dependencies))
        return sequence

    def resolved_dependencies(self, task: Task) -> list[m.Dependency]:
        """Describe the values of the task's top-level refs."""
        table = self.process.table
        described = []
        for oid in task.dependencies or ():
            entry = table.entries[oid]
            owner = entry.owner or self.process.process_id
            if entry.state == LOCATED:
                described.append(m.Dependency(oid, owner, LOCATED, b"", entry.value))
            else:
                described.append(m.Dependency(oid, owner, entry.state, entry.value))
        return described

    def demand(self, lane: Lane, count: int) -> None:
        """Tell the daemon how many more leases the lane wants."""
        if not self.process.dead:
            self.process.daemon.send(m.Demand(lane.key, lane.shape, count))

    def return_lease(self, lease: Lease) -> None:
        """Give a lease back; the connection stays for the next time."""
        self._leases.pop(lease.worker, None)
        lease.channel.context.lease = None
        self.process.daemon.send(m.ReturnLease(lease.lease_id))

    def recall(self, lease: Lease, count: int) -> None:
        """Ask for tasks that have not started."""
        lease.channel.send(m.Recall(count))

    def _tick(self, now: float) -> float | None:
        return self._return_idle(IDLE_LEASE_S, now) if self._leases else None

    def _on_reclaim(self, channel: Channel, message: m.Reclaim) -> None:
        self._return_idle(0.0)

    def _return_idle(self, max_idle_s: float, now: float | None = None) -> float | None:
        if now is None:
            now = time.monotonic()
        soonest: float | None = None
        for lane in self.lanes.values():
            due = lane.return_idle(now, max_idle_s)
            if due is not None and (soonest is None or due < soonest):
                soonest = due
        return soonest

    # -- outcomes ------------------------------------------------------------------------------------------------

    def _on_batch(self, channel: Channel, batch: list[Any]) -> None:
        """Handle a frame; the plain replies, which are nearly all messages of a busy owner, without a call each."""
        process = self.process
        handlers = process.handlers
        table = process.table
        entries = table.entries
        state: PeerState | None = channel.context
        inflight = state.inflight if state is not None else {}
        lease = state.lease if state is not None else None
        if lease is not None:
            inflight = lease.inflight
        replies = 0
        for message in batch:
            if type(message) is not m.Reply:
                handlers[type(message)](channel, message)
                if type(message) is m.ReplyMany:
                    replies += 1
                continue
            task = inflight.pop(message.sequence, None)
            if task is None:
                continue
            replies += 1
            entry = entries.get(task.task_id + FIRST_RETURN)
            if (
                message.contained is None
                and entry is not None
                and not message.kind
                and entry.waiters is None
                and entry.subscribers is None
                and entry.state == PENDING
                and entry.handles
            ):
                entry.state = 0
                entry.value = message.data
                entry.task = None
            else:
                self._fulfil(channel, task, 0, message, message.sequence)
            if task.pinned is not None:
                self.unpin_arguments(task)
        if replies and state is not None:
            if lease is not None:
                lease.lane.replied(lease, replies, time.monotonic())
            elif state.on_batch is not None:
                state.on_batch(replies)

    def _fulfil(self, channel: Channel, task: Task, index: int, result: m.Result | m.Reply, sequence: int) -> None:
        table = self.process.table
        contained: list[bytes] = []
        if result.contained:
            contained = table.receive_contained(result.contained, channel.peer_id, sequence)
        value = result.location if result.kind == LOCATED else result.data
        table.fulfil(object_id(task.task_id, index), result.kind, value, contained)

    def _on_reply_many(self, channel: Channel, message: m.ReplyMany) -> None:
        state: PeerState = channel.context
        inflight = state.lease.inflight if state.lease is not None else state.inflight
        task = inflight.pop(message.sequence, None)
        if task is None:
            return
        for index, result in enumerate(message.results):
            self._fulfil(channel, task, index, result, message.sequence)
        self.unpin_arguments(task)

    def fail(self, task: Task, error: bytes) -> None:
        """The task ends with an error instead of a value; the caller holds the lock."""
        table = self.process.table
        for index in range(task.num_returns):
            table.fulfil(object_id(task.task_id, index), FAILED, error)
        self.unpin_arguments(task)

    def fail_with(self, task: Task, error: Exception) -> None:
        """Like `fail`, with an exception."""
        self.fail(task, serialize(error, "the error").pack())

    # -- leases --------------------------------------------------------------------------------------------------

    def _on_grant(self, channel: Channel, message: m.Grant) -> None:
        process = self.process
        lane = self._lanes_by_key[message.key]
        worker = process.channel_to(message.worker)
        if worker is None:
            process.daemon.send(m.ReturnLease(message.lease_id))
            return
        if worker.context is None:
            worker.context = PeerState()
        lease = Lease(message.lease_id, message.worker, lane, worker)
        worker.context.lease = lease
        self._leases[message.worker] = lease
        lane.granted(lease, time.monotonic())

    def _on_infeasible(self, channel: Channel, message: m.Infeasible) -> None:
        lane = self._lanes_by_key[message.key]
        lane.demanded = 0
        while lane.ready:
            self.fail_with(lane.ready.popleft(), TaskUnschedulableError(message.reason))

    def _on_hand_back(self, channel: Channel, message: m.HandBack) -> None:
        lease: Lease | None = channel.context.lease
        if lease is not None:
            tasks = [lease.inflight.pop(sequence) for sequence in message.sequences if sequence in lease.inflight]
            lease.lane.handed_back(lease, tasks, message.blocked, time.monotonic())

    def _on_unblocked(self, channel: Channel, message: m.Unblocked) -> None:
        lease: Lease | None = channel.context.lease
        if lease is not None:
            lease.lane.unblocked(lease, time.monotonic())

    def _on_process_died(self, process_id: bytes, reason: str) -> None:
        """A leased worker is gone: what it was running is retried, what only waited there is pushed elsewhere."""
        lease = self._leases.pop(process_id, None)
        if lease is None:
            return
        tasks = lease.lane.lost(lease)
        requeue = []
        for position, task in enumerate(tasks):
            if position == 0:  # tasks run in order: only the oldest can have started without a reply
                if not task.retries_left:
                    self._crashed(task, reason)
                    continue
                task.retries_left -= 1 if task.retries_left > 0 else 0
                self.tasks_retried += 1
            requeue.append(task)
        lease.lane.requeue(requeue, time.monotonic())

    def _crashed(self, task: Task, reason: str) -> None:
        tries = task.function.name
        self.fail_with(
            task,
            WorkerCrashedError(
                f"the worker process that ran {tries}() died ({reason}) and the task has no retries left; "
                "raise max_retries if it is safe to run it again, and look at the worker's output for the cause"
            ),
        )
        self.process.daemon.send(m.Free([object_id(task.task_id, index) for index in range(task.num_returns)]))


def _placeholder(arg: Any, refs: list[bytes]) -> Any:
    if type(arg) is not ObjectRef:
        return arg
    refs.append(arg.id)
    return Arg(len(refs) - 1)
