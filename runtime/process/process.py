"""A process as a participant in the runtime: its lock, its table, and the ends where the parts of the runtime are joined.

Theory of operation. Messages come in by `channels`; each type has one handler, which is left with `register`. Handlers, and
calls from the program (`locked`), are transitions under one lock. What the table decides in a transition it leaves as effects,
which are executed here, in order, after it. What happens is announced as an event (`events`) to those who `subscribe`. What is
asked of the daemon, and by it, is the business of `requests`.

Values are the business of `values`, submitting tasks that of `submission`, calling actors that of `actor_calls`, running
tasks that of the worker. They stand above; nothing here knows them.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, TypeVar

from afield.errors import (
    AfieldError,
    InternalError,
    ObjectLostError,
    OwnerDiedError,
    RuntimeDiedError,
)
from afield.machines import Core, account
from afield.runtime.cores.objects import FreeStored, LifeEnded, Recompute, Send, Settled, Spare
from afield.runtime.cores.ownership import OwnershipTable
from afield.runtime.process import events
from afield.runtime.process.call_sites import RecordingTable
from afield.runtime.process.channels import Channels
from afield.runtime.process.configuration import ProcessConfig, SessionConfig
from afield.runtime.process.frees import Frees
from afield.runtime.process.requests import Requests
from afield.runtime.process.serialization import serialize_error
from afield.runtime.wire import messages, roles
from afield.transport.channel import Channel, UnexpectedMessageError
from afield.transport.interrupts import let_sigint_be, uninterruptible
from afield.transport.loop import Loop
from afield.transport.pump import Pump

#: Values up to this size travel inside messages; larger ones stay in the store.
INLINE_BYTES = 100 * 1024
#: Of the error of an internal fault so many characters are told.
FAULT_CHARACTERS = 2000
#: What those hear who wait for something of a runtime that ends.
SHUT_DOWN = "the runtime was shut down; what was not ready by then never will be"

_T = TypeVar("_T")
_Callback = TypeVar("_Callback", bound=Callable[..., Any])


class Process:
    """This process in the cluster.

    Args:
        config: the session.
        own: what this process alone was told.
        process_id: who we are.
        log_to_driver: whether the daemon sends us what workers print.
        expecting: tells whether answers are likely to come soon; see `Pump`.
        last_words: returns what the node daemon has printed, as far as this process can know.

    Attributes:
        cores: what decides in this process, by name, for those who look for faults; each part adds its own.
        handlers: message type -> what handles it.
        kept_for_ever: refs of ours that are pinned until we end, and why, with how often.
        dead: why nothing works any more, once it does not.
        dropped: objects whose handles are gone, left by `__del__` for the next transition.
    """

    def __init__(
        self,
        config: SessionConfig,
        own: ProcessConfig,
        process_id: bytes,
        *,
        log_to_driver: bool = False,
        expecting: Callable[[], bool] = lambda: True,
        last_words: Callable[[], str] = lambda: "",
    ) -> None:
        self.config = config
        self.own = own
        self.process_id = process_id
        self.dead = ""
        self.kept_for_ever: Counter[tuple[bytes, str]] = Counter()
        self.dropped: deque[bytes] = deque()
        self.loop = Loop()
        self.pump = Pump(self.loop, self.after_events, self.due_in, expecting)
        self.in_transition = self.pump.in_transition
        self.pump.on_crash = self._crashed
        table = RecordingTable if config.record_call_sites else OwnershipTable
        self.table = table(process_id, self._owner_died_error)
        self.cores: dict[str, Core] = {"ownership": self.table}
        self.requests = Requests(self)
        self.handlers: dict[type, Callable[[Channel, Any], object]] = {}
        self._install_handlers()
        self._last_words = last_words
        self._subscribers = events.Subscribers()
        self._ticks = self._subscribers.of(events.TICK)
        self._frees = Frees(self._send_freed)
        self._next_due: float | None = None
        self._on_batch: Callable[[Channel, list[Any]], None] = self._dispatch
        self.channels = Channels(
            config,
            process_id,
            self.loop,
            lambda channel, batch: self._on_batch(channel, batch),
            self._peer_left,
            self._out_of_files,
        )
        self.cores["links"] = self.channels.endpoint.links
        self.daemon.on_closed = self._daemon_gone
        self.daemon.send(messages.Register(own.kind, os.getpid(), log_to_driver))

    @property
    def daemon(self) -> Channel:
        """Return the channel to the node daemon."""
        return self.channels.daemon

    def start(self) -> None:
        """Begin to serve others also while no thread of ours waits."""
        self.pump.start()

    # -- where the parts of the runtime are joined ---------------------------------------------------------------

    def register(self, message_type: type, handler: Callable[[Channel, Any], object]) -> None:
        """Have messages of a type handled by `handler(channel, message)`, under the lock.

        Raises:
            InternalError: they have a handler already.
        """
        if message_type in self.handlers:
            first, second = events.name_of(self.handlers[message_type]), events.name_of(handler)
            raise InternalError(
                f"{message_type.__name__} is handled by {first} already; {second} cannot be a second one"
            )
        self.handlers[message_type] = handler if message_type not in roles.DAEMON_SAYS else self._of_daemon(handler)

    def _of_daemon(self, handler: Callable[[Channel, Any], object]) -> Callable[[Channel, Any], object]:
        """Return a handler of what only the daemon says: from anybody else we would take a lease, or a death, that is none."""

        @functools.wraps(handler)
        def checked(channel: Channel, message: Any) -> None:
            if channel is not self.daemon:
                raise UnexpectedMessageError(f"only the node daemon sends a {type(message).__name__}")
            handler(channel, message)

        return checked

    def subscribe(self, event: events.Event[_Callback], callback: _Callback) -> None:
        """Have `callback` called when something happens; `events` says with what.

        Raises:
            InternalError: the event has its only subscriber already.
        """
        self._subscribers.add(event, callback)

    def handle_batches_by(self, handle: Callable[[Channel, list[Any]], None]) -> None:
        """Have whole frames handled by `handle`, which is quick about some messages and leaves the others to `handlers`."""
        self._on_batch = handle

    def _dispatch(self, channel: Channel, batch: list[Any]) -> None:
        handlers = self.handlers
        for message in batch:
            handlers[type(message)](channel, message)

    def _install_handlers(self) -> None:
        table = self.table
        self.register(messages.Add, lambda channel, message: table.on_add(channel.peer_id, message))
        self.register(messages.Added, lambda channel, message: table.on_added(message))
        self.register(messages.Release, lambda channel, message: table.on_release(channel.peer_id, message.object_id))
        self.register(
            messages.Subscribe, lambda channel, message: table.on_subscribe(channel.peer_id, message.object_id)
        )
        self.register(messages.Value, lambda channel, message: table.on_value(message))
        self.register(messages.Took, lambda channel, message: table.on_took(channel.peer_id, message.sequence))
        self.register(messages.ProcessDied, self._on_process_died)
        self.register(messages.Held, self._on_held)
        self.register(messages.Answer, self.requests.on_answer)
        self.register(messages.Query, self.requests.on_query)

    # -- who is there, and who is not ----------------------------------------------------------------------------

    def channel_to(self, process_id: bytes) -> Channel | None:
        """Return the channel to a process, opening it if needed; None if it is gone: the daemon will say so."""
        return self.channels.to(process_id)

    def _out_of_files(self, reason: str) -> None:
        """A worker whom nobody can reach ends; a driver goes on, with what it has."""
        if self.own.kind == "worker":
            self.fail_everything(reason)

    def _peer_left(self, process_id: bytes) -> None:
        self.table.on_peer_died(process_id)
        for tell in self._subscribers.of(events.PEER_LEFT):
            tell(process_id)

    def _on_process_died(self, channel: Channel, message: messages.ProcessDied) -> None:
        self.channels.died(message.process)
        self.table.on_peer_died(message.process)
        for tell in self._subscribers.of(events.PROCESS_DIED):
            tell(message.process, message.reason)

    def _on_held(self, channel: Channel, message: messages.Held) -> None:
        held = [object_id for object_id in message.object_ids if object_id in self.table.entries]
        channel.send(messages.Held(message.question, held))

    # -- the shell of the table ----------------------------------------------------------------------------------

    def after_events(self) -> None:
        """Collect what was dropped, execute effects, and let those who have deadlines look at the clock."""
        dropped = self.dropped
        drop = self.table.drop
        while dropped:
            drop(dropped.popleft())
        if self.table.effects:
            self.run_effects()
        now = time.monotonic()
        next_due = self._frees.tick(now) if self._frees.waiting else None
        for tick in self._ticks:
            due = tick(now)
            if due is not None and (next_due is None or due < next_due):
                next_due = due
        self._next_due = next_due

    def due_in(self) -> float | None:
        if self.dropped or self.loop.dirty or self.pump.callbacks:
            return 0
        if self._next_due is None:
            return None
        return max(0.0, self._next_due - time.monotonic())

    def run_effects(self) -> None:
        """Execute what the table decided; the caller holds the lock."""
        table = self.table
        while table.effects:
            effects, table.effects = table.effects, []
            for effect in effects:
                kind = type(effect)
                if kind is Send:
                    channel = self.channels.to(effect.to)
                    if channel is not None:
                        channel.send(effect.message)
                elif kind is FreeStored:
                    self._frees.add(effect.object_id, soon=effect.soon)
                elif kind is Spare:
                    self.daemon.send(messages.Spare([effect.object_id], effect.spare))
                elif kind is Settled:
                    for tell in self._subscribers.of(events.OBLIGATION_MET):
                        tell(effect.token)
                elif kind is Recompute:
                    self._frees.flush()  # or it would free what comes of this
                    for tell in self._subscribers.of(events.RECOMPUTE):
                        tell(effect.record)
                elif kind is LifeEnded:
                    for tell in self._subscribers.of(events.LIFE_ENDED):
                        tell(effect.object_id)

    def _send_freed(self, object_ids: list[bytes]) -> None:
        if not self.dead:
            self.daemon.send(messages.Free(object_ids))

    def tidy(self) -> None:
        """Do what has been left for later, as it may make the room that is about to be asked for; the caller holds the lock."""
        self.after_events()
        self._frees.flush()

    @uninterruptible
    def locked(self, action: Callable[..., _T], *args: Any) -> _T:
        """Call `action` as one transition, execute what follows from it and send it."""
        with self.pump.lock:
            result = action(*args)
            if self.table.effects:
                self.run_effects()
                if self._frees.waiting:
                    self._frees.flush()
            if self.loop.dirty:
                self.loop.flush()
        return result

    def soon(self, action: Callable[..., object], *args: Any) -> None:
        """Do something as one transition now; or, if user code that asks for it has interrupted one, after that."""
        if self.in_transition():

            def later() -> None:
                self.locked(action, *args)

            self.pump.callbacks.append(later)
            self.pump.wake_standby()
        else:
            self.locked(action, *args)

    def handle_dropped(self, object_id: bytes) -> None:
        """A handle is gone. Called from `__del__`, in any thread, also inside the garbage collector."""
        self.dropped.append(object_id)
        pump = self.pump
        if pump.standby_leads or pump.standby_sleeps:
            pump.wake_standby()

    def owner_of(self, object_id: bytes) -> bytes:
        """Return the owner's id of an object that we hold."""
        entry = self.table.entries.get(object_id)
        if entry is None:
            raise ObjectLostError(f"ObjectRef({object_id.hex()}) belongs to a runtime that was shut down")
        return entry.owner or self.process_id

    def receive_ref(self, object_id: bytes, owner: bytes) -> None:
        """A ref was unpickled that nobody carries."""
        self.locked(self.table.receive, object_id, owner)

    def pin_for_ever(self, object_id: bytes, why: str = "pickled outside of afield") -> None:
        """Keep an object until this process ends: a ref was pickled that nobody carries, or that a function captured."""

        def pin() -> None:
            self.table.pin(object_id)
            self.kept_for_ever[object_id, why] += 1

        self.locked(pin)

    def _owner_died_error(self, owner: bytes) -> bytes:
        if owner == self.process_id:
            error: AfieldError = ObjectLostError("the object was freed: its last reference had been dropped")
        else:
            error = OwnerDiedError(f"the process that owned the object is gone (process {owner.hex()})")
        return serialize_error(error)

    # -- end -----------------------------------------------------------------------------------------------------

    def check_alive(self) -> None:
        """Raise if nothing can be answered any more."""
        if self.dead:
            raise RuntimeDiedError(self.dead)

    def check_usable(self) -> None:
        """Raise if nothing can be answered any more, or not now.

        Raises:
            RuntimeDiedError: the runtime is gone.
            ReentrantUseError: user code has interrupted us on this thread, in the midst of a transition.
        """
        self.check_alive()
        self.pump.refuse_reentry()

    def fail_everything(self, reason: str) -> None:
        """Nothing will be answered any more: fail every value that is still pending."""
        if self.dead:
            return
        self.dead = reason
        error = serialize_error(RuntimeDiedError(reason))
        self.table.fail_all(error)
        for tell in self._subscribers.of(events.RUNTIME_DEAD):
            tell(error)
        self.table.effects.clear()
        self.requests.fail_all(reason)

    def _daemon_gone(self, channel: Channel) -> None:
        if channel.fault:
            self.fail_everything(f"a bug in the runtime: the node daemon: {channel.fault}\n{account(self.cores)}")
            return
        words = self._last_words().strip().rpartition("\n")[2]
        self.fail_everything(
            f"the node daemon is gone{f' ({words})' if words else ''}; "
            "call afield.shutdown() and afield.init() to start afresh"
        )

    def _crashed(self, error: BaseException) -> None:
        """The thread that serves others ends by an exception: whoever waits would wait for ever."""
        with self.pump.lock:
            fault = f"{type(error).__name__}: {error}"[:FAULT_CHARACTERS]
            self.fail_everything(f"a bug in the runtime: {fault}\n{account(self.cores)}")
        self.loop.kick()  # a thread that waits in the loop looks whether it was waited for

    def expect_end(self, notify: Callable[[], None]) -> None:
        """The daemon goes because we asked it to: call `notify` then, instead of failing everything."""
        self.daemon.on_closed = lambda channel: notify()

    def abandon(self) -> None:
        """Close this process's copies of the connections of the one that it was forked from."""
        self.dead = "this process was forked from one that uses afield and has no part in its runtime"
        let_sigint_be()
        self.pump.lock = threading.RLock()  # a thread that exists only in the parent may hold the copy
        self.channels.abandon()

    def close(self) -> None:
        """Leave the cluster; whoever still waits for something hears that it was shut down."""
        with self.pump.lock:
            self.fail_everything(SHUT_DOWN)
        self.pump.close()
        with self.pump.lock:  # other threads may be in the middle of a submission, or of sending
            self.channels.close()
            self.loop.close()
            self.table.clear()
