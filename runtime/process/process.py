"""A process as a participant in the runtime: the shell around the ownership table, shared by drivers and workers.

It owns the loop, the channels to the node daemon and to other processes, and the table; it executes the table's effects.
Values are the business of `values`, submitting tasks that of `submission`, calling actors that of `actor_calls`, running
tasks that of `executor`.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, TypeVar

from afield.errors import (
    AfieldError,
    ObjectLostError,
    OwnerDiedError,
    RuntimeDiedError,
)
from afield.runtime.cores.objects import FreeStored, LifeEnded, Recompute, Send, Settled
from afield.runtime.cores.ownership import OwnershipTable
from afield.runtime.process.call_sites import RecordingTable
from afield.runtime.process.configuration import SessionConfig
from afield.runtime.process.serialization import serialize_error
from afield.runtime.wire import messages as m
from afield.transport.auth import Handshake
from afield.transport.channel import Channel, connect, listen, same_user
from afield.transport.loop import Loop
from afield.transport.pump import Pump, Waiter, uninterruptible

#: Values up to this size travel inside messages; larger ones stay in the store.
INLINE_BYTES = 100 * 1024

#: While frees follow one another they leave together: not later than this, and not more than this many.
FREE_DELAY_S, MAX_FREED = 0.002, 64

_T = TypeVar("_T")


class Process:
    """This process in the cluster.

    Args:
        config: the session.
        process_id: who we are.
        kind: "driver" or "worker".
        log_to_driver: whether the daemon sends us what workers print.
    """

    def __init__(self, config: SessionConfig, process_id: bytes, kind: str, *, log_to_driver: bool = False) -> None:
        self.config = config
        self.process_id = process_id
        self.loop = Loop()
        self.pump = Pump(self.loop, self.after_events, self._due_in, lambda: self.expecting())
        table = RecordingTable if config.record_call_sites else OwnershipTable
        self.table = table(process_id, self._owner_died_error)
        self.pump.on_crash = lambda error: self.fail_everything(f"a bug in the runtime: {error!r}")
        self.channels: dict[bytes, Channel] = {}
        self.handlers: dict[type, Callable[[Channel, Any], None]] = {}
        #: Handles one frame; `submission` puts its own in, which is quick about replies.
        self.on_batch: Callable[[Channel, list[Any]], None] = self._on_batch
        self.on_life_ended: Callable[[bytes], None] = lambda object_id: None
        self.on_settled: Callable[[Any], None] = lambda token: None
        self.on_recompute: Callable[[Any], None] = lambda record: None
        #: Called with the serialised error when nothing will be answered any more.
        self.on_dead: list[Callable[[bytes], None]] = []
        self.on_peer_lost: list[Callable[[bytes], None]] = []
        self.on_process_died: list[Callable[[bytes, str], None]] = []
        self.tickers: list[Callable[[float], float | None]] = []
        #: What this process answers when the daemon asks all (`node.census`): name of the question -> answer.
        self.questions: dict[str, Callable[[Any], Any]] = {}
        #: Refs of ours that are pinned until we end, and why, with how often.
        self.kept_for_ever: Counter[tuple[bytes, str]] = Counter()
        #: Tells whether answers are likely to come soon; see `Pump`.
        self.expecting: Callable[[], bool] = lambda: True
        #: A driver knows what the node daemon has printed.
        self.last_words: Callable[[], str] = lambda: ""
        self.dead = ""  # why nothing works any more, once it does not
        #: Objects whose handles are gone, left by `__del__` for the next transition.
        self.dropped: deque[bytes] = deque()
        self._freed: list[bytes] = []  # stored values of ours that nobody can reach any more
        self._free_due = 0.0
        self._requests: dict[int, list[Any]] = {}
        self._request = 0
        self._next_due: float | None = None
        self._listener = listen(config.address(process_id))
        self.loop.register(self._listener.fileno(), self._accept)
        self._install_handlers()
        self.daemon = self._open(connect(config.address(b"")), server=False)
        self.daemon.on_closed = self._daemon_lost
        self.loop.first = self.daemon
        self.daemon.send(m.Register(kind, os.getpid(), log_to_driver))

    def start(self) -> None:
        """Begin to serve others also while no thread of ours waits."""
        self.pump.start()

    # -- channels ------------------------------------------------------------------------------------------------

    def _open(self, sock: Any, *, server: bool) -> Channel:
        handshake = Handshake(self.config.token, self.process_id, os.urandom(32), server=server)

        def on_messages(channel: Channel, batch: list[Any]) -> None:
            self.on_batch(channel, batch)

        return Channel(self.loop, sock, handshake, m.decode, on_messages, self._channel_lost, self._channel_ready)

    def _accept(self, events: int) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                self._check_files(error)
                return
            sock.setblocking(False)
            if same_user(sock):
                self._open(sock, server=True)
            else:
                sock.close()

    def _channel_ready(self, channel: Channel) -> None:
        # What we send to a peer always goes through one and the same channel, so that it stays in order.
        self.channels.setdefault(channel.peer_id, channel)

    def channel_to(self, process_id: bytes) -> Channel | None:
        """Return the channel to a process, connecting if needed; None if the process is gone."""
        channel = self.channels.get(process_id)
        if channel is None:
            try:
                channel = self._open(connect(self.config.address(process_id)), server=False)
            except OSError as error:
                self._check_files(error)
                self._peer_died(process_id)
                return None
            channel.peer_id = process_id
            self.channels[process_id] = channel
        return channel

    def _channel_lost(self, channel: Channel) -> None:
        if channel.peer_id:
            self.channels.pop(channel.peer_id, None)
            self._peer_died(channel.peer_id)

    def _peer_died(self, process_id: bytes) -> None:
        self.table.on_peer_died(process_id)
        for notify in self.on_peer_lost:
            notify(process_id)

    def _check_files(self, error: OSError) -> None:
        """Without descriptors there are no connections: this process can take no further part."""
        if error.errno in (errno.EMFILE, errno.ENFILE):
            self.fail_everything(
                f"this process ran out of file descriptors ({error}); it needs one for each worker and actor that it "
                "talks to: raise the limit (ulimit -n), then call afield.shutdown() and afield.init()"
            )

    def _daemon_lost(self, channel: Channel) -> None:
        words = self.last_words().strip().rpartition("\n")[2]
        self.fail_everything(
            f"the node daemon is gone{f' ({words})' if words else ''}; "
            "call afield.shutdown() and afield.init() to start afresh"
        )

    def fail_everything(self, reason: str) -> None:
        """Nothing will be answered any more: fail every value that is still pending."""
        if self.dead:
            return
        self.dead = reason
        error = serialize_error(RuntimeDiedError(reason))
        self.table.fail_all(error)
        for tell in self.on_dead:
            tell(error)
        self.table.effects.clear()
        for request in self._requests.values():
            request[1] = RuntimeDiedError(reason)
            request[0].finish()

    # -- messages ------------------------------------------------------------------------------------------------

    def _install_handlers(self) -> None:
        table = self.table
        self.handlers |= {
            m.Add: lambda channel, message: table.on_add(channel.peer_id, message),
            m.Added: lambda channel, message: table.on_added(message),
            m.Release: lambda channel, message: table.on_release(channel.peer_id, message.object_id),
            m.Subscribe: lambda channel, message: table.on_subscribe(channel.peer_id, message.object_id),
            m.Value: lambda channel, message: table.on_value(message),
            m.Took: lambda channel, message: table.on_took(channel.peer_id, message.sequence),
            m.ProcessDied: self._on_process_died,
            m.Answer: self._on_answer,
            m.Held: self._on_held,
            m.Query: self._on_query,
        }

    def _on_batch(self, channel: Channel, batch: list[Any]) -> None:
        handlers = self.handlers
        for message in batch:
            handlers[type(message)](channel, message)

    def _on_process_died(self, channel: Channel, message: m.ProcessDied) -> None:
        lost = self.channels.get(message.process)
        if lost is not None:
            lost.drain()
        self.channels.pop(message.process, None)
        self.table.on_peer_died(message.process)
        for notify in self.on_process_died:
            notify(message.process, message.reason)

    def _on_held(self, channel: Channel, message: m.Held) -> None:
        held = [object_id for object_id in message.object_ids if object_id in self.table.entries]
        channel.send(m.Held(message.question, held))

    def _on_query(self, channel: Channel, message: m.Query) -> None:
        answer = self.questions.get(message.what)
        if answer is None:
            channel.send(m.Answer(message.request, None, f"this process does not know {message.what!r}"))
        else:
            channel.send(m.Answer(message.request, answer(message.argument)))

    # -- the shell of the table ----------------------------------------------------------------------------------

    def after_events(self) -> None:
        """Collect what was dropped, execute effects, and let those who have deadlines look at the clock."""
        dropped = self.dropped
        drop = self.table.drop
        while dropped:
            drop(dropped.popleft())
        if self.table.effects:
            self.run_effects()
        self._next_due = None
        if self.tickers:
            now = time.monotonic()
            if self._freed:
                self._free_later(now)
            for tick in self.tickers:
                due = tick(now)
                if due is not None and (self._next_due is None or due < self._next_due):
                    self._next_due = due

    def _due_in(self) -> float | None:
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
                    channel = self.channel_to(effect.to)
                    if channel is not None:
                        channel.send(effect.message)
                elif kind is FreeStored:
                    self._freed.append(effect.object_id)
                    if effect.soon:
                        self._free_due = 0.0
                elif kind is Settled:
                    self.on_settled(effect.token)
                elif kind is Recompute:
                    self._send_freed()  # or it would free what comes of this
                    self.on_recompute(effect.record)
                elif kind is LifeEnded:
                    self.on_life_ended(effect.object_id)

    def _free_later(self, now: float) -> None:
        """Let frees gather for a moment while values come and go in quick succession: each message wakes the daemon."""
        if len(self._freed) >= MAX_FREED or now >= self._free_due:
            self._send_freed()
            self._free_due = now + FREE_DELAY_S
        else:
            self._next_due = self._free_due

    def _send_freed(self) -> None:
        if self._freed and not self.dead:
            self.daemon.send(m.Free(self._freed))
        self._freed = []

    @uninterruptible
    def locked(self, action: Callable[..., _T], *args: Any) -> _T:
        """Call `action` as one transition, execute what follows from it and send it."""
        with self.pump.lock:
            result = action(*args)
            if self.table.effects:
                self.run_effects()
                if self._freed:
                    self._send_freed()
            if self.loop.dirty:
                self.loop.flush()
        return result

    def handle_dropped(self, object_id: bytes) -> None:
        """A handle is gone. Called from `__del__`, in any thread, also inside the garbage collector."""
        self.dropped.append(object_id)
        if self.pump.standby_leads:
            self.pump.wake_standby()

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

    # -- requests to the daemon ------------------------------------------------------------------------------------

    def request(
        self,
        make: Callable[[int], Any],
        give_up: Callable[[Any], None] | None = None,
        wait: Callable[[Waiter], bool] | None = None,
    ) -> Any:
        """Send the daemon a message with a request number and block until it is answered.

        Args:
            make: returns the message.
            give_up: called with an answer that came although the wait was interrupted.
            wait: how to wait; the pump's way by default.
        """
        waiter = Waiter()
        slot: list[Any] = [waiter, None]

        def send() -> None:
            self.check_alive()
            self.after_events()
            self._send_freed()  # it may make the room that we ask for
            self._request += 1
            self._requests[self._request] = slot
            self.daemon.send(make(self._request))

        self.locked(send)
        try:
            while not (wait or self.pump.wait_for)(waiter):
                self.check_alive()
        except BaseException:
            with self.pump.lock:
                for number in [number for number, asked in self._requests.items() if asked is slot]:
                    del self._requests[number]
            if waiter.done and give_up is not None and not isinstance(slot[1], BaseException):
                give_up(slot[1])
            raise
        answer = slot.pop()
        if isinstance(answer, BaseException):
            try:
                raise answer
            finally:
                del answer  # else it refers to itself, by way of this frame, and keeps what all its frames have
        return answer

    def answered(self, request: int, value: Any) -> bool:
        """Hand a value (or an error to raise) to the thread that made the request; return False if it has given up."""
        slot = self._requests.pop(request, None)
        if slot is None:
            return False
        slot[1] = value
        slot[0].finish()
        return True

    def _on_answer(self, channel: Channel, message: m.Answer) -> None:
        self.answered(message.request, AfieldError(message.error) if message.error else message.value)

    # -- end -----------------------------------------------------------------------------------------------------

    def check_alive(self) -> None:
        """Raise if nothing can be answered any more."""
        if self.dead:
            raise RuntimeDiedError(self.dead)

    def abandon(self) -> None:
        """Close this process's copies of the connections of the one that it was forked from."""
        self.dead = "this process was forked from one that uses afield and has no part in its runtime"
        self.pump.lock = threading.RLock()  # a thread that exists only in the parent may hold the copy
        for channel in [self.daemon, *self.channels.values()]:
            channel.sock.close()
        self._listener.close()

    def close(self) -> None:
        """Leave the cluster."""
        self.dead = self.dead or "the runtime was shut down"
        self.pump.close()
        for channel in [self.daemon, *self.channels.values()]:
            channel.close()
        self.loop.unregister(self._listener.fileno())
        self._listener.close()
        self.loop.close()
        with self.pump.lock:  # other threads may be in the middle of a submission
            self.table.clear()
