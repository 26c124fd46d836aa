"""Calling actors: each caller keeps its calls to one actor in order and sends them straight to the actor's worker.

Theory of operation. A `Caller` stands for one actor in one process. Calls enter its queue in the order in which they were
made; the head leaves as soon as its arguments are there and the actor is alive, so the order of one caller is kept end to
end. The daemon tells where the actor lives and when it dies or restarts (`ActorState`). What was on its way when the
actor died is sent again if the call may be retried, else it fails with `ActorDiedError` and the cause.

A call that could not read an argument, because its stored value is lost, waits at the head of the queue until the value has
been made again. If calls behind it were on their way already they have run or will: it cannot take its place any more, and
fails with `ObjectLostError`.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from afield.errors import (
    ActorConstructionError,
    ActorUnavailableError,
    PendingCallsLimitExceededError,
    TaskCancelledError,
)
from afield.ids import FIRST_RETURN, TASK_ID_BYTES
from afield.runtime.calls.submission import Function, PeerState, Submitter
from afield.runtime.cores.dispatch import Task
from afield.runtime.process.process import Process
from afield.runtime.process.serialization import deserialize, serialize_error
from afield.runtime.wire import messages as m
from afield.transport.channel import Channel
from afield.transport.pump import uninterruptible

#: A call is sent at once if nothing is on its way; otherwise it leaves in a batch of up to this many.
BATCH = 64


def actor_ref_id(actor_id: bytes) -> bytes:
    """Return the id of the object that stands for an actor's life."""
    return actor_id + FIRST_RETURN


class Caller:
    """One actor, as seen from one process."""

    __slots__ = ("actor_id", "channel", "creation", "error", "held", "life", "queue", "state", "worker")

    def __init__(self, actor_id: bytes) -> None:
        self.actor_id = actor_id
        self.state = "pending"
        self.worker = b""
        self.channel: Channel | None = None
        self.queue: deque[Task] = deque()
        self.error = b""
        #: The object that stands for the actor; pinned while a call is pending (`held`).
        self.life = actor_ref_id(actor_id)
        self.held = False
        #: In the creator: keeps the constructor's arguments pinned as long as the actor may be constructed again.
        self.creation: Task | None = None


class ActorCalls:
    """All actors that this process calls."""

    def __init__(self, process: Process, submitter: Submitter) -> None:
        self.process = process
        self.submitter = submitter
        self.callers: dict[bytes, Caller] = {}
        process.register(m.ActorState, self._on_state)
        process.register(m.WatchActor, self._on_asked)
        submitter.recovery.call_again = self._call_again

    def create(self, spec: m.CreateActor, task: Task, detached: bool) -> None:
        """Send the actor to the daemon once its constructor's arguments are there; the task keeps them pinned."""

        def send(ready: Task) -> None:
            error = self.submitter.arguments.failure(ready)
            if error is not None:
                self._die(caller, self._argument_failed(spec.class_name, error))
                self.process.daemon.send(m.ActorGone(spec.actor_id, caller.error))
                return
            spec.arguments, spec.location = ready.arguments, ready.location
            spec.dependencies = self.submitter.arguments.describe(ready)
            self.process.daemon.send(spec)

        caller = self.callers[spec.actor_id] = Caller(spec.actor_id)
        caller.creation = task

        def enter() -> None:
            if not detached:
                self.process.table.begin_life(caller.life)
            self.submitter.arguments.pin(task)
            self.submitter.arguments.when_resolved(task, send)

        self.process.locked(enter)

    def _argument_failed(self, class_name: str, data: bytes) -> bytes:
        """The constructor never runs: to every caller it is as if it had raised what its argument did."""
        error = deserialize(data, "the error of an argument", None)
        cause = getattr(error, "cause", None) or error
        text = getattr(error, "remote_traceback", "")
        return serialize_error(ActorConstructionError.from_exception(f"{class_name}.__init__", cause, text))

    def caller(self, actor_id: bytes) -> Caller:
        """Return the caller of an actor, asking the daemon where it is on first use; the caller holds the lock."""
        caller = self.callers.get(actor_id)
        if caller is None:
            caller = self.callers[actor_id] = Caller(actor_id)
            life = self.process.table.entries.get(caller.life)
            self.process.daemon.send(m.WatchActor(actor_id, life.owner if life is not None else b""))
        return caller

    def _on_asked(self, channel: Channel, message: m.WatchActor) -> None:
        """Somebody has a handle to an actor that the daemon does not know."""
        caller = self.callers.get(message.actor_id)
        if caller is None or caller.state == "dead":
            channel.send(m.ActorGone(message.actor_id, caller.error if caller is not None else b""))

    def submit(
        self,
        actor_id: bytes,
        function: Function,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        retries: int,
        max_pending: int,
    ) -> Any:
        """Call a method; return its ref, its list of refs, or its generator at once.

        Raises:
            PendingCallsLimitExceededError: `max_pending` calls of this process wait already (0: no limit).
        """
        if max_pending:
            self._check_pending(actor_id, max_pending)

        def enter(task: Task, object_ids: list[bytes]) -> None:
            self._enter(actor_id, task, object_ids)

        return self.submitter.call(function, None, args, kwargs, retries, enter)

    def _check_pending(self, actor_id: bytes, limit: int) -> None:
        caller = self.callers.get(actor_id)
        if caller is None:
            return
        pending = len(caller.queue) + (len(caller.channel.context.inflight) if caller.channel is not None else 0)
        if pending >= limit:
            raise PendingCallsLimitExceededError(
                f"{pending} calls to the actor are pending and max_pending_calls={limit}; wait for some of them first"
            )

    @uninterruptible
    def _enter(self, actor_id: bytes, task: Task, object_ids: list[bytes]) -> None:
        process = self.process
        with process.pump.lock:
            self.submitter.own(task, object_ids)
            if task.retries_left:
                task.actor = actor_id
            caller = self.callers.get(actor_id) or self.caller(actor_id)
            if not caller.held:
                self._hold_life(caller)
            caller.queue.append(task)
            if task.dependencies is not None:
                self.submitter.arguments.when_resolved(task, lambda ready: self._advance(caller))
                if process.table.effects:
                    process.run_effects()
            else:
                self._advance(caller)
            if process.loop.dirty:
                self._flush(caller)

    def _flush(self, caller: Caller) -> None:
        channel = caller.channel
        if channel is not None and channel.outbox and len(channel.context.inflight) > 1 and len(channel.outbox) < BATCH:
            # The actor is busy: let a batch gather. Whoever drives the loop next sends it.
            if len(channel.outbox) == 1:
                self.process.pump.wake_standby()
            return
        self.process.loop.flush()

    def _advance(self, caller: Caller) -> None:
        queue = caller.queue
        while queue:
            if caller.state == "dead":
                self.submitter.fail(queue.popleft(), caller.error)
                continue
            if caller.channel is None or queue[0].unresolved:
                return
            task = queue.popleft()
            error = self.submitter.arguments.failure(task) if task.dependencies or task.location is not None else None
            if error is not None:
                self.submitter.fail(task, error)
            elif task.dependencies is not None and self.submitter.arguments.lost_again(task):
                self._wait_again(caller, task)
                return
            else:
                state: PeerState = caller.channel.context
                state.inflight[self.submitter.send_push(caller.channel, state, task)] = task

    # -- life and death of actors --------------------------------------------------------------------------------

    def _on_state(self, channel: Channel, message: m.ActorState) -> None:
        caller = self.callers.get(message.actor_id)
        if caller is None or caller.state == "dead":
            return
        if message.state != "alive" and caller.channel is not None:
            caller.channel.drain()  # what it answered before counts
        if message.state == "alive":
            self._alive(caller, message.worker)
        elif message.state == "restarting":
            self._interrupted(caller, message.error)
            caller.state, caller.channel = "restarting", None
        elif message.state == "dead":
            self._die(caller, message.error)

    def _alive(self, caller: Caller, worker: bytes) -> None:
        channel = self.process.channel_to(worker)
        if channel is None:
            return  # it died again; the daemon will say so
        if channel.context is None:
            channel.context = PeerState()
        caller.state, caller.worker, caller.channel = "alive", worker, channel
        channel.context.on_batch = lambda replies: self._maybe_let_go(caller)
        channel.context.retry = lambda task: self._again(caller, task)
        channel.context.argument_lost = lambda task: self._argument_lost(caller, task)
        if caller.creation is not None and not caller.creation.retries_left:
            self._forget_creation(caller)
        self._advance(caller)

    def _interrupted(self, caller: Caller, error: bytes) -> None:
        """Put calls that were on their way back into the queue, if they may run twice; fail the others."""
        if caller.channel is None:
            return
        inflight: dict[int, Task] = caller.channel.context.inflight
        again = []
        for task in inflight.values():
            self.submitter.cut_short(caller.worker, task)
            if task.cancelled:
                self.submitter.fail_with(task, TaskCancelledError(f"{task.function.name}() was cancelled"))
            elif task.retries_left:
                self.submitter.use_retry(task)
                again.append(task)
            else:
                self.submitter.fail_with(
                    task,
                    ActorUnavailableError(
                        f"{task.function.name}() was on its way when the actor died and restarted; it may have run. "
                        "Set max_task_retries if it is safe to run it twice"
                    ),
                )
        inflight.clear()
        caller.queue.extendleft(reversed(again))

    def _die(self, caller: Caller, error: bytes) -> None:
        caller.state, caller.error = "dead", error
        self._forget_creation(caller)
        if caller.channel is not None:
            inflight: dict[int, Task] = caller.channel.context.inflight
            for task in list(inflight.values()):
                self.submitter.cut_short(caller.worker, task)
                self.submitter.fail(task, error)
            inflight.clear()
            caller.channel = None
        self._advance(caller)
        self._let_go(caller)
        if caller.life not in self.process.table.entries:
            self.callers.pop(caller.actor_id, None)

    def _again(self, caller: Caller, task: Task) -> None:
        caller.queue.appendleft(task)
        self._advance(caller)

    def _wait_again(self, caller: Caller, task: Task) -> None:
        """Put a call back at the head of the queue until its arguments, which were lost, are there again."""
        caller.queue.appendleft(task)
        self.submitter.arguments.when_resolved(task, lambda ready: self._advance(caller))

    def _argument_lost(self, caller: Caller, task: Task) -> bool:
        """A call has not run as an argument was lost: do it again, if no later one has overtaken it on its way."""
        if caller.channel is None or caller.channel.context.inflight:
            return False
        self._wait_again(caller, task)
        return True

    def _call_again(self, task: Task) -> None:
        """Call a method again whose stored result was lost; the call comes after those that wait."""
        caller = self.callers.get(task.actor) or self.caller(task.actor)
        self._hold_life(caller)
        caller.queue.append(task)
        if task.dependencies is not None:
            self.submitter.arguments.when_resolved(task, lambda ready: self._advance(caller))
        else:
            self._advance(caller)

    def _hold_life(self, caller: Caller) -> None:
        if not caller.held and caller.life in self.process.table.entries:
            caller.held = True
            self.process.table.pin(caller.life)

    def _maybe_let_go(self, caller: Caller) -> None:
        """The actor need not live for our sake once nothing of ours is pending."""
        if caller.held and not caller.queue and caller.channel is not None and not caller.channel.context.inflight:
            self._let_go(caller)

    def _let_go(self, caller: Caller) -> None:
        if caller.held:
            caller.held = False
            self.process.table.unpin(caller.life)

    def end(self, life: bytes) -> None:
        """Nobody can reach an actor of ours any more: it ends after the calls that it has."""
        actor_id = life[:TASK_ID_BYTES]
        if not self.process.dead:
            self.process.daemon.send(m.KillActor(actor_id, True, "all handles to it are gone", True))
        caller = self.callers.get(actor_id)
        if caller is not None and caller.state == "dead":
            del self.callers[actor_id]

    def _forget_creation(self, caller: Caller) -> None:
        if caller.creation is not None:
            self.submitter.arguments.unpin(caller.creation)
            caller.creation = None
