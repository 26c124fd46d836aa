"""Running tasks: a worker's main thread takes pushes off a queue, runs them, and answers.

Theory of operation. Pushes arrive on the loop, which the main thread drives while it has nothing to do and the standby
thread drives while a task runs; both only append to `queue`. Replies gather in `_replies` and leave when the queue is empty
or some time has passed, so that a burst of small tasks is answered in few frames; while a task takes long the standby
thread sends what has gathered.

When a task blocks in `get`, the tasks behind it are handed back to their owner at once (the one it waits for may be among
them), and the daemon is told that the worker's CPUs are free.

A cancelled task is interrupted by SIGINT, which the standby thread sends to the main thread; the handler raises
KeyboardInterrupt only while the code of just that task runs. Actors with concurrent calls are the business of `concurrency`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from afield.errors import AfieldError, DeviceLostError, TaskCancelledError
from afield.runtime.calls.participant import Participant
from afield.runtime.process import current
from afield.runtime.process.context import ActorExit, TaskContext, enter, leave_copy
from afield.runtime.process.events import OBLIGATION_MET, PEER_LOST, TICK
from afield.runtime.process.facts import OwnActor
from afield.runtime.process.serialization import deserialize
from afield.runtime.wire import messages as m
from afield.runtime.worker.concurrency import Concurrency, make_concurrency
from afield.runtime.worker.invocation import Definition, Invocations, in_full
from afield.transport.channel import Channel
from afield.transport.pump import Waiter, uninterruptible

#: Replies are held back no longer than this while further tasks run.
MAX_HOLD_S = 0.0005

#: A worker that the daemon was asked to end does so itself after this time.
END_WITHIN_S = 5.0

Job = tuple[Channel, m.Push]


class Consumer:
    """How far the consumer of a stream is, and how to wake the producer that waits for it."""

    __slots__ = ("consumed", "notify")

    def __init__(self) -> None:
        self.consumed = 0
        self.notify: Callable[[], object] | None = None


class Executor:
    """Runs what is pushed to this worker."""

    def __init__(self, participant: Participant) -> None:
        self.participant = participant
        self.process = process = participant.process
        self.values = participant.values
        self.invocations = Invocations(participant)
        self.queue: deque[Job] = deque()
        self.actor: Any = None
        self.actor_id = b""
        self._own_actor: OwnActor | None = None
        self.assignment: m.Assign | None = None
        self._concurrency: Concurrency | None = None
        self._definitions: dict[tuple[bytes, int], Definition] = {}
        self._idle: Waiter | None = None
        self._actor_spec: m.BecomeActor | None = None
        self._ending = False
        self._goodbye = ""
        self._left = False
        self._running: Channel | None = None
        self._running_push: m.Push | None = None
        self._running_name = ""
        self._interruptible: tuple[Channel, int] | None = None
        self._interrupt: tuple[Channel, int] | None = None
        self._consumers: dict[tuple[bytes, int], Consumer] = {}
        self._last_flush = 0.0
        self._replies: deque[tuple[Channel, Any]] = deque()
        process.register(m.Define, self._on_define)
        process.register(m.Push, self._on_push)
        process.register(m.Recall, self._on_recall)
        process.register(m.Assign, self._on_assign)
        process.register(m.BecomeActor, self._on_become_actor)
        process.register(m.Terminate, lambda channel, message: self._finish_and_end())
        process.register(m.Cancel, self._on_cancel)
        process.register(m.Consumed, self._on_consumed)
        process.subscribe(TICK, self._queue_replies)
        process.subscribe(OBLIGATION_MET, self._send_settled)
        process.subscribe(PEER_LOST, self._forget_peer)
        self.values.on_block = self._block
        self.values.on_unblock = self._unblock
        signal.signal(signal.SIGINT, process.pump.on_sigint)
        process.pump.may_interrupt = self._may_interrupt
        current.in_actor = lambda: bool(self.actor_id)

    # -- what arrives --------------------------------------------------------------------------------------------

    def _on_define(self, channel: Channel, message: m.Define) -> None:
        self._definitions[channel.peer_id, message.index] = Definition(message)

    def _on_push(self, channel: Channel, message: m.Push) -> None:
        if self._left:
            return  # the daemon will tell the caller that the actor is dead
        if self._concurrency is not None:
            self._concurrency.start(channel, message)
            return
        self.queue.append((channel, message))
        self._wake()

    def _wake(self) -> None:
        if self._idle is not None:
            self._idle.finish()

    def _on_recall(self, channel: Channel, message: m.Recall) -> None:
        """Hand back the newest tasks that have not started."""
        sequences: list[int] = []
        while self.queue and len(sequences) < message.count:
            try:
                sequences.append(self.queue.pop()[1].sequence)
            except IndexError:  # the main thread took the last one at this moment
                break
        channel.send(m.HandBack(sequences[::-1], False))

    def _on_assign(self, channel: Channel, message: m.Assign) -> None:
        self.assignment = message

    def _on_become_actor(self, channel: Channel, message: m.BecomeActor) -> None:
        self._actor_spec = message
        self._wake()

    def _finish_and_end(self) -> None:
        """End after the calls that are here already."""
        self._ending = True
        if self._concurrency is not None:
            self._concurrency.end()
        self._wake()

    def _on_consumed(self, channel: Channel, message: m.Consumed) -> None:
        record = self._consumers.get((channel.peer_id, message.sequence))
        if record is not None:
            record.consumed = message.count
            if record.notify is not None:
                record.notify()

    def _forget_peer(self, peer: bytes) -> None:
        for key in [key for key in self._definitions if key[0] == peer]:
            del self._definitions[key]
        for job in [job for job in self.queue if job[0].peer_id == peer]:
            with contextlib.suppress(ValueError):
                self.queue.remove(job)

    # -- the main thread -----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run tasks until the cluster, or the actor that lives here, ends."""
        queue = self.queue
        while not self.process.dead:
            if not queue:
                self.flush()
                if self._ending:
                    return
                self._wait_for_work()
            try:
                channel, push = queue.popleft()
            except IndexError:
                continue
            self._running, self._running_push = channel, push
            self.run_one(channel, push)
            self._running = self._running_push = None
            if queue and time.monotonic() - self._last_flush > MAX_HOLD_S:
                self.flush()

    def _wait_for_work(self) -> None:
        idle = self._idle = Waiter()
        if not self.queue and self._actor_spec is None and not self._ending:
            self.process.pump.wait_for(idle)
        self._idle = None
        self._last_flush = time.monotonic()
        if self._actor_spec is not None:
            become, self._actor_spec = self._actor_spec, None
            self._construct(become)

    @uninterruptible
    def flush(self) -> None:
        """Send the replies that have gathered."""
        process = self.process
        with process.pump.lock:
            process.after_events()
            if process.loop.dirty:
                process.loop.flush()
        self._last_flush = time.monotonic()

    def definition(self, channel: Channel, push: m.Push) -> Definition:
        """Return what a push names."""
        return self._definitions[channel.peer_id, push.function]

    def function(self, definition: Definition) -> Callable[..., Any]:
        """Return the function, or the actor's method, of a definition."""
        if not self.actor_id:
            return definition.callable()
        if definition.name.startswith("__afield_"):
            return _ready if definition.name == "__afield_ready__" else _exit
        method: Callable[..., Any] = getattr(self.actor, definition.name)
        return method

    def run_one(self, channel: Channel, push: m.Push) -> None:
        """Run one push on this thread and answer it."""
        definition = self.definition(channel, push)
        context = TaskContext(push.task_id, definition.name)
        enter(context)
        self.process.pump.interrupted = False
        in_user_code = failed = False
        holds: list[Any] = []
        job = (channel, push.sequence)
        main = self._running is channel
        if main:
            self._running_name = definition.name
        try:
            function = self.function(definition)
            if push.arguments or push.location is not None:
                args, kwargs, holds = self.invocations.arguments(push, context, channel.peer_id)
            else:
                args, kwargs = (), {}
            if definition.once and self._replies:
                self.flush()  # should it end this process, the owner takes the oldest task without a reply for it
            in_user_code = True
            if main:
                self._interruptible = job
            holder = [function(*args, **kwargs)]
            del args, kwargs
            if definition.num_returns == m.STREAMING:
                count = self._stream(holder, channel, push, definition)
                holder = [count]
            elif definition.num_returns != 1:
                holder.append(in_full(holder.pop(), definition.num_returns))
            self._interruptible = None
            in_user_code = False
            if current.process is not self.process:
                leave_copy(None)
            if holds:
                self.invocations.keep_holds(holds, context)
            reply = self.invocations.reply(holder, push, channel.peer_id, definition)
        except BaseException as error:
            self._interruptible = None
            reply = self.failure(channel, push, definition, error, in_user_code)
            failed = True
        if failed and holds:
            args, kwargs = (), {}  # noqa: F841 - lets go of them
            self.keep_holds_of_failed(holds, context)
        enter(None)
        self.answer(channel, reply, context)
        if definition.once and self.queue:
            self.flush()

    def failure(
        self, channel: Channel, push: m.Push, definition: Definition, error: BaseException, in_user_code: bool
    ) -> Any:
        """Make the reply of a task that raised."""
        if current.process is not self.process:
            leave_copy(error)
        # Outside of user code it is our own device that is lost: where arguments go to, or results come from.
        lost = isinstance(error, DeviceLostError) and not in_user_code
        broken = str(error) if lost else self.values.parts.devices.broken()
        if broken:
            self._leave(broken)
        if isinstance(error, ActorExit):
            self._goodbye = "it ended itself"
            return self.invocations.reply([None] * max(1, definition.num_returns), push, channel.peer_id, definition)
        if isinstance(error, (KeyboardInterrupt, TaskCancelledError)) and self._interrupt == (channel, push.sequence):
            self._interrupt = None
            error = TaskCancelledError(f"{definition.name}() was cancelled while it ran")
            in_user_code = False
        return self.invocations.failure(push.sequence, definition, error, in_user_code, channel.peer_id)

    def keep_holds_of_failed(self, holds: list[Any], context: TaskContext) -> None:
        """Keep what user code has put aside before it raised; the frames that only took part are gone with the error.

        What it began on the device may end badly only here: then this process cannot go on.
        """
        try:
            self.invocations.keep_holds(holds, context)
        except AfieldError as error:
            self._leave(str(error))

    def answer(self, channel: Channel, reply: Any, context: TaskContext) -> None:
        """Queue a reply; it waits until the refs that the task keeps are registered with their owners."""
        obligation = context.obligation
        if obligation is not None:
            with self.process.pump.lock:
                if obligation.remaining:
                    obligation.token = (channel, reply)
                    return
        self._replies.append((channel, reply))
        if self._goodbye:
            self._say_goodbye()

    def _queue_replies(self, now: float) -> None:
        """Move replies to their channels; the caller holds the lock."""
        replies = self._replies
        while replies:
            channel, reply = replies.popleft()
            channel.send(reply)

    def _send_settled(self, token: Any) -> None:
        channel, reply = token
        self._queue_replies(0.0)
        channel.send(reply)

    def running_name(self) -> str:
        """Return the name of the task that runs, for the prefix of its output; an actor's output carries its class."""
        return "" if self.actor_id else self._running_name

    # -- streams -------------------------------------------------------------------------------------------------

    def _stream(self, holder: list[Any], channel: Channel, push: m.Push, definition: Definition) -> int:
        """Send the items of a generator as it makes them; return their number."""
        items: Iterator[Any] = iter(holder.pop())
        for index in itertools.count():
            if definition.backpressure:
                self._wait_for_consumer(channel, push, index - definition.backpressure)
            try:
                holder.append(next(items))
            except StopIteration:
                self.forget_consumer(channel, push)
                return index
            self.send_item(holder, index, channel, push, definition)
        raise AssertionError

    def send_item(self, holder: list[Any], index: int, channel: Channel, push: m.Push, definition: Definition) -> None:
        """Send one item; the first of a burst leaves at once."""
        self._replies.append((channel, self.invocations.item(holder, push, index, channel.peer_id, definition)))
        if time.monotonic() - self._last_flush > MAX_HOLD_S or self._concurrency is not None:
            self.flush()  # with concurrent calls the main thread drives the loop and does not look for items
        else:
            self.process.pump.wake_standby()

    def _wait_for_consumer(self, channel: Channel, push: m.Push, needed: int) -> None:
        """Wait until the consumer has taken more than `needed` items."""
        record = self.consumer(channel, push)
        while record.consumed <= needed and not channel.closed:
            waiter = Waiter()
            record.notify = waiter.finish
            if record.consumed <= needed:
                self.flush()
                self.process.pump.wait_for(waiter, 1.0)  # looks again for a consumer that is gone
            record.notify = None

    def consumer(self, channel: Channel, push: m.Push) -> Consumer:
        """Return what is known of the consumer of a stream with back-pressure."""
        return self._consumers.setdefault((channel.peer_id, push.sequence), Consumer())

    def forget_consumer(self, channel: Channel, push: m.Push) -> None:
        """The stream has ended."""
        self._consumers.pop((channel.peer_id, push.sequence), None)

    # -- cancelling ----------------------------------------------------------------------------------------------

    def _on_cancel(self, channel: Channel, message: m.Cancel) -> None:
        self._interrupt = (channel, message.sequence)
        if message.recursive:
            self._cancel_children(channel, message.sequence)
        if self._concurrency is not None and self._concurrency.cancel(channel, message.sequence):
            return
        for job in list(self.queue):
            if job[0] is channel and job[1].sequence == message.sequence:
                with contextlib.suppress(ValueError):  # the main thread took it at this moment
                    self.queue.remove(job)
                    definition = self.definition(*job)
                    error = TaskCancelledError(f"{definition.name}() was cancelled before it started")
                    channel.send(self.invocations.failure(message.sequence, definition, error, False, channel.peer_id))
                    return
        if self._interruptible == self._interrupt:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def _cancel_children(self, channel: Channel, sequence: int) -> None:
        running = self._running_push
        if running is not None and self._running is channel and running.sequence == sequence:
            task_id: bytes | None = running.task_id
        else:
            task_id = self.invocations.task_id_of(channel, sequence)
        if task_id is not None:
            self.participant.cancellation.cancel_children(task_id)

    def _may_interrupt(self) -> bool:
        return self._interrupt is not None and self._interruptible == self._interrupt

    # -- blocking ------------------------------------------------------------------------------------------------

    def _block(self, for_store: bool) -> None:
        running = self._running
        if self.actor_id or running is None or threading.current_thread() is not threading.main_thread():
            return
        self.process.locked(self._announce_block, running, for_store)

    def _announce_block(self, running: Channel, for_store: bool) -> None:
        self._queue_replies(0.0)
        jobs = list(self.queue)
        self.queue.clear()
        running.send(m.HandBack([push.sequence for _, push in jobs], True))
        self.process.daemon.send(m.Blocked(True, for_store))

    def _unblock(self) -> None:
        running = self._running
        if self.actor_id or running is None or threading.current_thread() is not threading.main_thread():
            return
        self.process.locked(self._announce_unblock, running)

    def _announce_unblock(self, running: Channel) -> None:
        running.send(m.Unblocked())
        self.process.daemon.send(m.Blocked(False))

    # -- actors --------------------------------------------------------------------------------------------------

    def _construct(self, become: m.BecomeActor) -> None:
        spec = become.spec
        self.actor_id = spec.actor_id
        context = TaskContext(spec.actor_id, f"{spec.class_name}.__init__")
        enter(context)
        error = b""
        try:
            cls = deserialize(spec.blob, f"the class {spec.class_name}", None)
            push = m.Push(0, spec.actor_id, 0, spec.arguments, spec.location, spec.dependencies)
            if spec.arguments or spec.location is not None:
                args, kwargs, holds = self.invocations.arguments(push, context, become.owner)
            else:
                args, kwargs, holds = (), {}, []
            owner = b"" if spec.options["detached"] else become.owner
            self._own_actor = OwnActor(cls, spec, owner)
            self.actor = cls(*args, **kwargs)
            del args, kwargs
            self.invocations.keep_holds(holds, context)
            self._concurrency = make_concurrency(self, cls, spec.options)
        except BaseException as raised:
            error = self.invocations.constructor_failure(spec.class_name, raised)
        finally:
            enter(None)
        self.answer(self.process.daemon, m.ActorBorn(spec.actor_id, error), context)
        self.flush()
        if self._concurrency is not None and not error:
            self._concurrency.serve()
            self._ending = True

    def own_actor(self) -> OwnActor | None:
        """Return the actor that lives here, None if there is none."""
        return self._own_actor

    def _leave(self, reason: str) -> NoReturn:
        """This process is of no use any more: what it was doing failed for that, and is to be done elsewhere."""
        self.flush()
        self.process.locked(self.process.daemon.send, m.Unfit(reason))
        time.sleep(END_WITHIN_S)  # the daemon ends us
        os._exit(1)

    def _say_goodbye(self) -> None:
        """Tell the daemon that this actor ends by its own will, after its caller has its answer."""
        reason, self._goodbye = self._goodbye, ""
        self._left = True
        self.queue.clear()
        self.flush()
        self.process.locked(self.process.daemon.send, m.KillActor(self.actor_id, True, reason, True))


def _ready() -> bool:
    return True


def _exit() -> None:
    raise ActorExit
