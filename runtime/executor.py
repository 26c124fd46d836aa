"""Running tasks: a worker's main thread takes pushes off a queue, runs them, and answers.

Theory of operation. Pushes arrive on the loop, which the main thread drives while it has nothing to do and the standby
thread drives while a task runs; both only append to `queue`. Replies are queued on the pusher's channel and leave when the
queue is empty or some time has passed, so that a burst of small tasks is answered in few frames. Before a task that may
take long nothing is held back: the standby thread flushes too.

When a task blocks in `get`, the tasks behind it are handed back to their owner at once (the one it waits for may be among
them), and the daemon is told that the worker's CPUs are free.
"""

from __future__ import annotations

import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from afield.errors import AfieldError, TaskError
from afield.ids import object_id
from afield.runtime import messages as m
from afield.runtime.context import TaskContext, enter
from afield.runtime.ownership import FAILED, INLINE, LOCATED, Obligation
from afield.runtime.process import Process
from afield.runtime.serialization import Serialized, deserialize, dumps_plain, serialize
from afield.runtime.submission import Arg
from afield.runtime.values import INLINE_BYTES, Values
from afield.transport.channel import Channel
from afield.transport.pump import Waiter, uninterruptible

#: Replies are held back no longer than this while further tasks run.
MAX_HOLD_S = 0.0005

Job = tuple[Channel, m.Push]


class Definition:
    """A function as its owner defined it; unpickled on first use."""

    __slots__ = ("_callable", "blob", "name", "num_returns")

    def __init__(self, message: m.Define) -> None:
        self.name = message.name
        self.blob = message.blob
        self.num_returns = message.num_returns
        self._callable: Callable[..., Any] | None = None

    def callable(self) -> Callable[..., Any]:
        """Return the function."""
        if self._callable is None:
            self._callable = deserialize(self.blob, f"the function {self.name}()", None)
        assert self._callable is not None
        return self._callable


class Executor:
    """Runs what is pushed to this worker."""

    def __init__(self, process: Process, values: Values) -> None:
        self.process = process
        self.values = values
        self.queue: deque[Job] = deque()
        self.actor: Any = None
        self.actor_id = b""
        self.devices: list[str] = []
        self._definitions: dict[tuple[bytes, int], Definition] = {}
        self._idle: Waiter | None = None
        self._actor_spec: m.BecomeActor | None = None
        self._running: Channel | None = None
        self._running_name = ""
        self._last_flush = 0.0
        process.handlers |= {
            m.Define: self._on_define,
            m.Push: self._on_push,
            m.Recall: self._on_recall,
            m.Assign: self._on_assign,
            m.BecomeActor: self._on_become_actor,
        }
        self._replies: deque[tuple[Channel, Any]] = deque()
        process.tickers.append(self._queue_replies)
        values.on_block = self._block
        values.on_unblock = self._unblock
        process.on_settled = self._send_settled
        process.on_peer_lost.append(self._forget_peer)

    # -- what arrives --------------------------------------------------------------------------------------------

    def _on_define(self, channel: Channel, message: m.Define) -> None:
        self._definitions[channel.peer_id, message.index] = Definition(message)

    def _on_push(self, channel: Channel, message: m.Push) -> None:
        self.queue.append((channel, message))
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
        self.devices = message.devices

    def _on_become_actor(self, channel: Channel, message: m.BecomeActor) -> None:
        self._actor_spec = message
        if self._idle is not None:
            self._idle.finish()

    def _forget_peer(self, peer: bytes) -> None:
        for key in [key for key in self._definitions if key[0] == peer]:
            del self._definitions[key]
        for job in [job for job in self.queue if job[0].peer_id == peer]:
            try:
                self.queue.remove(job)
            except ValueError:
                pass

    # -- the main thread -----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run tasks until the cluster ends."""
        process = self.process
        pump = process.pump
        queue = self.queue
        while not process.dead:
            if not queue:
                self._flush()
                idle = self._idle = Waiter()
                if not queue and self._actor_spec is None:
                    pump.wait_for(idle)
                self._idle = None
                self._last_flush = time.monotonic()
                if self._actor_spec is not None:
                    self._construct(self._actor_spec)
                    self._actor_spec = None
            try:
                channel, push = queue.popleft()
            except IndexError:
                continue
            self._running = channel
            self._run_one(channel, push)
            self._running = None
            if queue and time.monotonic() - self._last_flush > MAX_HOLD_S:
                self._flush()

    @uninterruptible
    def _flush(self) -> None:
        process = self.process
        with process.pump.lock:
            process.after_events()
            if process.loop.dirty:
                process.loop.flush()
        self._last_flush = time.monotonic()

    def _run_one(self, channel: Channel, push: m.Push) -> None:
        definition = self._definitions[channel.peer_id, push.function]
        context = TaskContext(push.task_id, definition.name)
        enter(context)
        in_user_code = False
        self._running_name = definition.name
        try:
            function = getattr(self.actor, definition.name) if self.actor_id else definition.callable()
            if push.arguments or push.location is not None:
                args, kwargs, views = self._arguments(push, context)
                in_user_code = True
                holder = [function(*args, **kwargs)]
                del args, kwargs
                in_user_code = False
                if views:
                    self._keep_views(views, context)
            else:
                in_user_code = True
                holder = [function()]
                in_user_code = False
            if definition.num_returns == 1:
                result = self._encode(holder, push, 0, channel.peer_id, definition.name)
                reply: Any = m.Reply(push.sequence, result.kind, result.data, result.location, result.contained)
            else:
                reply = m.ReplyMany(push.sequence, self._encode_many(holder, push, channel.peer_id, definition))
        except BaseException as error:
            reply = self._failure(push.sequence, definition, error, in_user_code)
        enter(None)
        if context.obligation is not None and context.obligation.remaining:
            context.obligation.token = (channel, reply)
        else:
            self._replies.append((channel, reply))

    def _queue_replies(self, now: float) -> None:
        """Move replies to their channels; the caller holds the lock."""
        replies = self._replies
        while replies:
            channel, reply = replies.popleft()
            channel.send(reply)

    def running_name(self) -> str:
        """Return the name of the task that runs, for the prefix of its output; an actor's output carries its class."""
        return "" if self.actor_id else self._running_name

    def _send_settled(self, token: Any) -> None:
        channel, reply = token
        channel.send(reply)

    # -- arguments -----------------------------------------------------------------------------------------------

    def _arguments(self, push: m.Push, context: TaskContext) -> tuple[Any, dict[str, Any], list[Any]]:
        """Rebuild the arguments; the views are those of stored values, which the submitter pins until the reply."""
        views: list[Any] = []
        on_ref = self._on_ref(context)
        data: Any = push.arguments
        if push.location is not None:
            data = self._mapped(push.task_id + b"\xff\xff\xff\xfe", b"", push.location, views)
        args, kwargs = deserialize(data, "the arguments", on_ref)
        del data
        if push.dependencies:
            values = [self._dependency(dependency, on_ref, views) for dependency in push.dependencies]
            args = [values[arg.index] if type(arg) is Arg else arg for arg in args]
            kwargs = {key: values[arg.index] if type(arg) is Arg else arg for key, arg in kwargs.items()}
        return args, kwargs, views

    def _on_ref(self, context: TaskContext) -> Callable[[bytes, bytes], None]:
        def on_ref(oid: bytes, owner: bytes) -> None:
            if context.obligation is None:
                context.obligation = Obligation()
            self.process.locked(self.process.table.receive, oid, owner, context.obligation)

        return on_ref

    def _mapped(self, oid: bytes, owner: bytes, location: m.Location, views: list[Any]) -> memoryview:
        view = self.values.store.view(location.offset, location.size, self.process.handle_dropped)
        views.append((weakref.ref(view), oid, owner))
        return view.data

    def _dependency(self, dependency: m.Dependency, on_ref: Callable[[bytes, bytes], None], views: list[Any]) -> Any:
        if dependency.kind != LOCATED:
            return deserialize(dependency.data, "an argument", on_ref)
        assert dependency.location is not None
        data = self._mapped(dependency.object_id, dependency.owner, dependency.location, views)

        def resolve(offset: int, size: int) -> memoryview:
            return self._mapped(dependency.object_id, dependency.owner, m.Location(0, offset, size), views)

        return deserialize(data, "an argument", on_ref, resolve)

    def _keep_views(self, views: list[Any], context: TaskContext) -> None:
        """Views of arguments that outlive the task become handles of their objects."""
        for reference, oid, owner in views:
            view = reference()
            if view is not None:
                self._on_ref(context)(oid, owner)
                view.hold = oid

    # -- results -------------------------------------------------------------------------------------------------

    def _encode(self, holder: list[Any], push: m.Push, index: int, owner: bytes, name: str) -> m.Result:
        data = dumps_plain(holder[0])
        if data is not None and len(data) <= INLINE_BYTES:
            return m.Result(INLINE, data)
        if data is not None:
            serialized = Serialized(data, [], [])
        else:
            serialized = serialize(holder[0], f"the result of {name}()")
        contained = None
        if serialized.refs:
            contained = self.process.locked(self.process.table.hand_on, owner, push.sequence, serialized.refs)
        if serialized.size > INLINE_BYTES:
            location = self.values.write_object(object_id(push.task_id, index), owner, serialized, holder)
            return m.Result(LOCATED, b"", location, contained)
        return m.Result(INLINE, serialized.pack(), None, contained)

    def _encode_many(self, holder: list[Any], push: m.Push, owner: bytes, definition: Definition) -> list[m.Result]:
        value = holder.pop()
        expected = definition.num_returns
        if not isinstance(value, (tuple, list)) or len(value) != expected:
            found = f"{len(value)} values" if isinstance(value, (tuple, list)) else f"a {type(value).__name__}"
            raise ValueError(
                f"{definition.name}() has num_returns={expected} and must return {expected} values, not {found}"
            )
        items = list(value)
        del value
        items.reverse()
        return [self._encode([items.pop()], push, index, owner, definition.name) for index in range(expected)]

    def _failure(self, sequence: int, definition: Definition, error: BaseException, in_user_code: bool) -> Any:
        text = "".join(traceback.format_exception(type(error), error, _user_frames(error)))
        wrapped: BaseException = error
        if in_user_code or not isinstance(error, AfieldError):
            wrapped = TaskError.from_exception(definition.name, error, text)
        try:
            data = serialize(wrapped, "the error").pack()
        except Exception:
            data = serialize(TaskError(definition.name, None, f"{type(error).__name__}", text), "the error").pack()
        if definition.num_returns == 1:
            return m.Reply(sequence, FAILED, data)
        return m.ReplyMany(sequence, [m.Result(FAILED, data)] * definition.num_returns)

    # -- blocking ------------------------------------------------------------------------------------------------

    def _block(self) -> None:
        running = self._running
        if self.actor_id or running is None:
            return
        self.process.locked(self._announce_block, running)

    def _announce_block(self, running: Channel) -> None:
        jobs = list(self.queue)
        self.queue.clear()
        running.send(m.HandBack([push.sequence for _, push in jobs], True))
        self.process.daemon.send(m.Blocked(True))

    def _unblock(self) -> None:
        running = self._running
        if self.actor_id or running is None:
            return
        self.process.locked(running.send, m.Unblocked())
        self.process.locked(self.process.daemon.send, m.Blocked(False))

    # -- actors --------------------------------------------------------------------------------------------------

    def _construct(self, become: m.BecomeActor) -> None:
        spec = become.spec
        self.actor_id = spec.actor_id
        context = TaskContext(spec.actor_id)
        enter(context)
        error = b""
        try:
            cls = deserialize(spec.blob, f"the class {spec.class_name}", None)
            push = m.Push(0, spec.actor_id, 0, spec.arguments, spec.location, spec.dependencies)
            args, kwargs, views = self._arguments(push, context) if spec.arguments or spec.location else ((), {}, [])
            self.actor = cls(*args, **kwargs)
            del args, kwargs
            self._keep_views(views, context)
        except BaseException as raised:
            text = "".join(traceback.format_exception(type(raised), raised, _user_frames(raised)))
            wrapped = TaskError.from_exception(f"{spec.class_name}.__init__", raised, text)
            error = serialize(wrapped, "the error").pack()
        finally:
            enter(None)
        born = m.ActorBorn(spec.actor_id, error)
        if context.obligation is not None and context.obligation.remaining:
            context.obligation.token = (self.process.daemon, born)
        else:
            self.process.locked(self.process.daemon.send, born)


def _user_frames(error: BaseException) -> Any:
    """Return the traceback without the frames of this module, which say nothing to the user."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__ and frames.tb_next is not None:
        frames = frames.tb_next
    return frames
