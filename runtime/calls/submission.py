"""Submitting tasks: the shell around `dispatch` that turns calls into pushes and replies into values."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from afield.errors import TaskCancelledError, TaskUnschedulableError, WorkerCrashedError
from afield.ids import FIRST_RETURN, STREAM_END_INDEX, object_id
from afield.runtime.calls.callee import Callee
from afield.runtime.calls.generators import ObjectRefGenerator
from afield.runtime.calls.pushes import PeerState, Pushes
from afield.runtime.calls.recovery import Recovery
from afield.runtime.calls.streams import Streams
from afield.runtime.cores.dispatch import IDLE_LEASE_S, Lane, Lanes, Lease, Task
from afield.runtime.cores.objects import FAILED, LOCATED
from afield.runtime.process.channels import AGAIN_S
from afield.runtime.process.context import calling_context
from afield.runtime.process.events import PROCESS_DIED, TICK
from afield.runtime.process.process import Process
from afield.runtime.process.refs import ObjectRef
from afield.runtime.process.serialization import serialize_error
from afield.runtime.values.arguments import Arguments
from afield.runtime.wire import messages
from afield.transport.channel import Channel
from afield.transport.interrupts import uninterruptible

#: A burst of submissions looks for replies this often.
POLL_EVERY = 32


def _is_to_be_retried(result: messages.Result | messages.Reply) -> bool:
    """Tell whether the worker says that this error is one to be retried; of one that is stored, `data` says so."""
    return result.kind == messages.FAILED_AGAIN or (result.kind == LOCATED and bool(result.data))


def _is_final(result: messages.Result | messages.Reply) -> None:
    """The error is not retried: it is the result."""
    if result.kind == messages.FAILED_AGAIN:
        result.kind = FAILED
    else:
        result.data = b""


class Submitter:
    """Submits the tasks of a process and receives their outcomes."""

    def __init__(self, process: Process, arguments: Arguments, streams: Streams) -> None:
        self.process = process
        self.arguments = arguments
        self.streams = streams
        self.core = Lanes()
        self.lanes = self.core.by_need
        self.leases: dict[bytes, Lease] = {}
        self.pushes = Pushes(process, arguments)
        self._since_poll = 0
        self._wanted_until = 0.0  # somebody waits for leases until then
        self._next_look = 0.0  # when to look for idle leases again
        self.tasks_submitted = 0
        self.tasks_retried = 0
        process.register(messages.ReplyMany, self._on_reply_many)
        process.register(messages.Item, self._on_item)
        process.register(messages.HandBack, self._on_hand_back)
        process.register(messages.Unblocked, self._on_unblocked)
        process.register(messages.Grant, self._on_grant)
        process.register(messages.Infeasible, self._on_infeasible)
        process.register(messages.Reclaim, self._on_reclaim)
        self.recovery = Recovery(process, arguments, self)
        process.handle_batches_by(self._on_batch)
        process.subscribe(TICK, self._tick)
        process.subscribe(PROCESS_DIED, self._on_process_died)

    # -- submitting ----------------------------------------------------------------------------------------------

    def lane(
        self, shape: tuple[tuple[str, int], ...], placement: messages.Placement | None = None, max_calls: int = 0
    ) -> Lane:
        """Return the lane for tasks of this shape whose workers need this, and end after so many of them (0: never)."""
        return self.lanes.get((shape, placement, max_calls)) or self._make_lane(shape, placement, max_calls)

    @uninterruptible
    def _make_lane(
        self, shape: tuple[tuple[str, int], ...], placement: messages.Placement | None, max_calls: int
    ) -> Lane:
        with self.process.pump.lock:  # another thread may want the same, or another one, at this moment
            lane = self.lanes.get((shape, placement, max_calls))
            if lane is None:
                need = shape, placement, max_calls
                lane = self.core.make(need, dict(shape), self, placement, max_calls)
            return lane

    def call(
        self,
        function: Callee,
        lane: Lane | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        retries: int,
        enter: Callable[[Task, list[bytes]], None],
    ) -> Any:
        """Make a task of a call and `enter` it; return its ref, its list of refs, or its generator at once."""
        process = self.process
        if process.dead or process.in_transition():
            process.check_usable()
        task_id = calling_context().next_task_id()
        num_returns = function.num_returns
        task = Task(task_id, function, b"", lane, num_returns, retries)
        if args or kwargs:
            self.arguments.encode(task, args, kwargs, function.name)
        if num_returns == 1:
            object_ids = [task_id + FIRST_RETURN]
        elif num_returns == messages.STREAMING:
            object_ids = [task_id + STREAM_END_INDEX]
        else:
            object_ids = [object_id(task_id, index) for index in range(num_returns)]
        outcome = self._outcome(task, object_ids, enter)
        pump = process.pump
        if pump.interrupted:
            pump.deliver()
        self._since_poll += 1
        if self._since_poll >= POLL_EVERY:
            self._since_poll = 0
            pump.poll()
        return outcome

    @uninterruptible
    def _outcome(self, task: Task, object_ids: list[bytes], enter: Callable[[Task, list[bytes]], None]) -> Any:
        """Enter the task and make what the caller gets: from here on the outputs have a holder, whatever interrupts."""
        enter(task, object_ids)
        if task.num_returns == 1:
            return ObjectRef(object_ids[0])
        if task.num_returns == messages.STREAMING:
            return ObjectRefGenerator(task.task_id, self.streams)
        return [ObjectRef(oid) for oid in object_ids] or None

    def submit(self, function: Callee, lane: Lane, args: tuple[Any, ...], kwargs: dict[str, Any], retries: int) -> Any:
        """Submit a task; return its ref, its list of refs, or its generator at once."""
        return self.call(function, lane, args, kwargs, retries, self._enter)

    def own(self, task: Task, object_ids: list[bytes]) -> None:
        """Enter a task's outputs into the table and pin its arguments; the caller holds the lock."""
        self.process.check_alive()  # under the lock: what is entered later than the end would wait for ever
        self.tasks_submitted += 1
        for oid in object_ids:
            self.process.table.own(oid, task)
        if task.num_returns == 1:
            task.output = object_ids[0]
        if task.num_returns == messages.STREAMING:
            self.streams.open(task)
        if task.pinned is not None:
            self.arguments.pin(task)

    @uninterruptible
    def _enter(self, task: Task, object_ids: list[bytes]) -> None:
        process = self.process
        with process.pump.lock:
            self.own(task, object_ids)
            if task.dependencies is not None:
                self.arguments.when_resolved(task, self.resolved)
                if process.table.effects:
                    process.run_effects()
            else:
                task.lane.submit(task, time.monotonic())
            if process.loop.dirty:
                process.loop.flush()

    def resolved(self, task: Task) -> None:
        """The arguments of a task are there."""
        if task.cancelled:
            return
        error = self.arguments.failure(task)
        if error is not None:
            self.fail(task, error)
        else:
            task.lane.submit(task, time.monotonic())

    # -- what a lane asks for ------------------------------------------------------------------------------------

    def push(self, lease: Lease, tasks: Sequence[Task]) -> None:
        """Send tasks to a leased worker."""
        channel = lease.channel
        state: PeerState = channel.context
        for task in tasks:
            if (task.dependencies is None and task.location is None) or self._still_resolved(task):
                lease.inflight[self.pushes.send(channel, state, task)] = task

    def _still_resolved(self, task: Task) -> bool:
        """Tell whether the arguments are there; if one was lost since the task became ready, wait for it or fail."""
        error = self.arguments.failure(task)
        if error is not None:
            self.fail(task, error)
        elif self.arguments.lost_again(task):
            self.arguments.when_resolved(task, self.resolved)
        else:
            return True
        return False

    def demand(self, lane: Lane, count: int) -> None:
        """Tell the daemon how many more leases the lane wants."""
        if not self.process.dead:
            self.process.daemon.send(messages.Demand(lane.key, lane.shape, count, lane.placement))

    def return_lease(self, lease: Lease) -> None:
        """Give a lease back; the connection stays for the next time."""
        self.leases.pop(lease.worker, None)
        lease.channel.context.lease = None
        self.process.daemon.send(messages.ReturnLease(lease.lease_id, lease.wears_out))

    def recall(self, lease: Lease, count: int) -> None:
        """Ask for tasks that have not started."""
        lease.channel.send(messages.Recall(count))

    def _tick(self, now: float) -> float | None:
        if self.pushes.gone:
            self.pushes.forget_gone()
        wanted = now < self._wanted_until
        if wanted or now >= self._next_look:
            self._next_look = now + IDLE_LEASE_S
            self._return_idle(0.0 if wanted else IDLE_LEASE_S, now)
        return self._next_look if self.leases else None

    def _on_reclaim(self, channel: Channel, message: messages.Reclaim) -> None:
        # Also what becomes idle a little later: the daemon asks once, and whoever waits goes on waiting.
        now = time.monotonic()
        self._wanted_until = now + IDLE_LEASE_S
        self._return_idle(0.0, now)

    def _return_idle(self, max_idle_s: float, now: float) -> None:
        for lane in {lease.lane.key: lease.lane for lease in self.leases.values()}.values():
            lane.return_idle(now, max_idle_s)

    # -- outcomes ------------------------------------------------------------------------------------------------

    def _on_batch(self, channel: Channel, batch: list[Any]) -> None:
        """Handle a frame; the plain replies, which are nearly all messages of a busy owner, without a call each."""
        handlers = self.process.handlers
        fulfil_plain = self.process.table.fulfil_plain
        state: PeerState | None = channel.context
        inflight = self._inflight(state)
        lease = state.lease if state is not None else None
        at = replies = 0
        while True:
            start, at = at, fulfil_plain(batch, at, inflight)
            replies += at - start
            if at == len(batch):
                break
            message = batch[at]
            at += 1
            kind = type(message)
            if kind is messages.Reply:
                replies += self._on_reply(channel, inflight.pop(message.sequence, None), message)
            else:
                handlers[kind](channel, message)
                replies += kind is messages.ReplyMany
        if replies and state is not None:
            if lease is not None:
                lease.lane.replied(lease, replies, time.monotonic())
            elif state.on_batch is not None:
                state.on_batch(replies)

    def _on_reply(self, channel: Channel, task: Task | None, reply: messages.Reply) -> bool:
        """Handle a reply that takes more than writing down its value; return False if nobody waits for it any more."""
        if task is None:
            return False
        if not self._finish(channel, task, reply) and task.pinned is not None:
            self.arguments.unpin(task)
        return True

    def _inflight(self, state: PeerState | None) -> dict[int, Task]:
        if state is None:
            return {}
        return state.lease.inflight if state.lease is not None else state.inflight

    def _finish(self, channel: Channel, task: Task, reply: messages.Reply) -> bool:
        """Record an outcome; return True if the task runs again instead."""
        if _is_to_be_retried(reply):
            if self._retry(channel, task, reply):
                return True
            _is_final(reply)
        if reply.kind == messages.ARGUMENT_LOST:
            if task.cancelled:  # it has not run, and does not run again
                self.fail_with(task, TaskCancelledError(f"{task.function.name}() was cancelled before it started"))
                return True
            return self.recovery.argument_lost(channel, task)
        if task.num_returns == messages.STREAMING:
            self.streams.finish(task, reply.kind, reply.data, self._receive(channel, reply.contained))
        elif task.num_returns:
            self._fulfil(channel, task, 0, reply)
            if reply.kind == LOCATED or task.task_id in self.recovery.running:
                self.recovery.ended(task)
        return False

    def _receive(self, channel: Channel, contained: messages.Contained | None) -> list[bytes]:
        """Hold the refs inside a result."""
        if contained is None:
            return []
        return self.process.table.receive_contained(contained.refs, channel.peer_id, contained.token)

    def _fulfil(self, channel: Channel, task: Task, index: int, result: messages.Result | messages.Reply) -> None:
        contained = self._receive(channel, result.contained)
        value = result.location if result.kind == LOCATED else result.data
        self.process.table.fulfil(object_id(task.task_id, index), result.kind, value, contained)

    def _on_reply_many(self, channel: Channel, message: messages.ReplyMany) -> None:
        task = self._inflight(channel.context).pop(message.sequence, None)
        if task is None:
            return
        results = message.results
        if results and _is_to_be_retried(results[-1]):  # what was made before the error is there
            if self._retry(channel, task, *results):
                return
            for result in results:
                _is_final(result)
        for index, result in enumerate(results):
            self._fulfil(channel, task, index, result)
        if task.task_id in self.recovery.running or any(result.kind == LOCATED for result in results):
            self.recovery.ended(task)
        self.arguments.unpin(task)

    def _on_item(self, channel: Channel, item: messages.Item) -> None:
        task = self._inflight(channel.context).get(item.sequence)
        if task is None:
            return
        report = None
        if task.function.backpressure:
            report = lambda count: self.process.locked(channel.send, messages.Consumed(item.sequence, count))  # noqa: E731
        self.streams.on_item(task, item, self._receive(channel, item.contained), report)

    def _retry(self, channel: Channel, task: Task, *results: messages.Result | messages.Reply) -> bool:
        """Run a task again whose exception is one that its caller wants retried, which the worker has told."""
        if not task.retries_left or task.cancelled:
            return False
        for result in results:  # the refs in an error that nobody will see
            for ref in self._receive(channel, result.contained):
                self.process.table.unpin(ref)
        self.use_retry(task)
        self.tasks_retried += 1
        stored = [index for index, result in enumerate(results) if result.kind == LOCATED]
        if stored:
            self._free_first(channel, task, stored)
        elif task.lane is not None:
            task.lane.requeue([task], time.monotonic())
        if task.lane is None and channel.context.retry is not None:
            channel.context.retry(task)
        return True

    def _free_first(self, channel: Channel, task: Task, stored: Sequence[int]) -> None:
        """What an execution has stored is nobody's. It is freed before the next one begins, which stores the same ids.

        Only what it has stored: the same worker may run it again, and an early free would be for what it seals then.
        """
        self.recovery.forget_stored(channel.peer_id, (object_id(task.task_id, index) for index in stored))
        go_on = channel.context.go_on
        task.unresolved = 1

        def freed() -> None:
            task.unresolved = 0
            if self.process.dead or task.cancelled:
                return
            if task.lane is not None:
                task.lane.requeue([task], time.monotonic())
            elif go_on is not None:
                go_on()

        self.process.requests.ask_nowait(lambda number: messages.Query(number, "freed"), freed)

    def use_retry(self, task: Task) -> None:
        """The task runs once more."""
        if task.retries_left > 0:
            task.retries_left -= 1
            task.retries_used += 1
        self.recovery.starts_afresh(task)

    def fail(self, task: Task, error: bytes) -> None:
        """The task ends with an error instead of a value; the caller holds the lock."""
        if task.num_returns == messages.STREAMING:
            self.streams.finish(task, FAILED, error)
        if task.task_id in self.recovery.running:
            self.recovery.fails(task)
        for index in range(task.num_returns):
            self.process.table.fulfil(object_id(task.task_id, index), FAILED, error)
        if task.task_id in self.recovery.running:
            self.recovery.ended(task)
        self.arguments.unpin(task)

    def fail_with(self, task: Task, error: Exception) -> None:
        """Like `fail`, with an exception."""
        self.fail(task, serialize_error(error))

    # -- leases --------------------------------------------------------------------------------------------------

    def _on_grant(self, channel: Channel, message: messages.Grant) -> None:
        process = self.process
        lane = self.core.by_key.get(message.key)
        if lane is None:  # what it was for has ended otherwise
            process.daemon.send(messages.ReturnLease(message.lease_id))
            return
        try:
            worker = process.channels.to(message.worker, patient=False)
        except OSError as error:
            process.daemon.send(messages.ReturnLease(message.lease_id))
            process.channels.try_again(error, lane.grant_failed, lambda why: self._unreachable(lane, why))
            return
        if worker is None:
            process.daemon.send(messages.ReturnLease(message.lease_id))
            lane.grant_failed()
            return
        worker.send(message.assignment)  # ahead of all pushes, whatever befalls the daemon's channel to the worker
        if worker.context is None:
            worker.context = PeerState()
        lease = Lease(message.lease_id, message.worker, lane, worker)
        worker.context.lease = lease
        self.leases[message.worker] = lease
        lane.granted(lease, time.monotonic())

    def _unreachable(self, lane: Lane, why: str) -> None:
        """There are no descriptors for another worker: what waits has those that there are, or fails."""
        if lane.leases:
            self.process.loop.after(AGAIN_S, lane.grant_failed)
        else:
            self.infeasible(lane.key, why)

    def _on_infeasible(self, channel: Channel, message: messages.Infeasible) -> None:
        self.infeasible(message.key, message.reason)

    def infeasible(self, key: int, reason: str) -> None:
        """There never will be a lease for a lane: what waits in it fails."""
        lane = self.core.by_key.get(key)
        if lane is None:
            return
        lane.demanded = 0
        while lane.ready:
            task = lane.ready.popleft()
            self.recovery.postpone(task)
            self.fail_with(task, TaskUnschedulableError(reason))

    def _on_hand_back(self, channel: Channel, message: messages.HandBack) -> None:
        lease: Lease | None = channel.context.lease
        if lease is not None:
            tasks = [lease.inflight.pop(sequence) for sequence in message.sequences if sequence in lease.inflight]
            for task in tasks:
                if task.cancelled:  # the request and the task have passed each other on their way
                    self.fail_with(task, TaskCancelledError(f"{task.function.name}() was cancelled before it started"))
            tasks = [task for task in tasks if not task.cancelled]
            lease.lane.handed_back(lease, tasks, message.blocked, time.monotonic())

    def _on_unblocked(self, channel: Channel, message: messages.Unblocked) -> None:
        lease: Lease | None = channel.context.lease
        if lease is not None:
            lease.lane.unblocked(lease, time.monotonic())

    def _on_process_died(self, process_id: bytes, reason: str) -> None:
        """A leased worker is gone: what it was running is retried, what only waited there is pushed elsewhere."""
        lease = self.leases.pop(process_id, None)
        if lease is None:
            return
        requeue = []
        for position, task in enumerate(lease.lane.worker_died(lease)):
            if position == 0:
                self.cut_short(process_id, task)
            if task.cancelled:
                self.fail_with(task, TaskCancelledError(f"{task.function.name}() was cancelled"))
                continue
            if position == 0:  # tasks run in order: only the oldest can have started without a reply
                if not task.retries_left:
                    self._crashed(task, reason)
                    continue
                self.use_retry(task)
                self.tasks_retried += 1
            # Behind a reply that was held back another may have started, and one that had finished has used a retry: not again.
            task.function = task.function.alone()
            requeue.append(task)
        lease.lane.requeue(requeue, time.monotonic())

    def cut_short(self, worker: bytes, task: Task) -> None:
        """A worker died that may have been running a task; comes before the task ends or runs again."""
        # Of the items of a stream those that have arrived are located, and one may have been on its way.
        first = self.streams.produced(task.task_id) if task.num_returns == messages.STREAMING else 0
        last = first + 1 if task.num_returns == messages.STREAMING else task.num_returns
        self.recovery.forget_stored(worker, (object_id(task.task_id, index) for index in range(first, last)))

    def _crashed(self, task: Task, reason: str) -> None:
        self.fail_with(
            task,
            WorkerCrashedError(
                f"the worker process that ran {task.function.name}() died ({reason}) and the task has no retries left; "
                "raise max_retries if it is safe to run it again, and look at the worker's output for the cause"
            ),
        )
