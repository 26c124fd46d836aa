"""Running tasks: a worker's main thread takes calls off a queue, runs them, and answers.

Theory of operation. Pushes arrive on the loop, which the main thread drives while it has nothing to do and the standby thread
drives while a task runs. What may happen to a call, and which thread may do it, is decided in `cores.work`; this is its
shell: it makes `Invocation`s of pushes, runs those that the main thread takes, sends what the core decides and raises the
signal. Actors with concurrent calls are the business of `concurrency`.

When a task blocks in `get`, the tasks behind it are handed back to their owner at once (the one it waits for may be among
them), and the daemon is told that the worker's CPUs are free.

A cancelled task is interrupted by SIGINT, which whoever handles the message sends to the main thread; the handler asks the
core whether the call that the interrupt is for still runs. A signal that comes between the main thread's last look for signals
and a system call does not cut that short, so it is sent again, less and less often, until the handler has run.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial
from types import FrameType
from typing import Any

from afield.runtime.calls.participant import Participant
from afield.runtime.cores.work import ANSWER, INTERRUPT, NOTHING
from afield.runtime.process import current
from afield.runtime.process.context import TaskContext, enter, running
from afield.runtime.process.events import PEER_LEFT, PROCESS_DIED, TICK
from afield.runtime.process.facts import OwnActor
from afield.runtime.values.definitions import rebuild
from afield.runtime.values.parts import PartsLostError
from afield.runtime.wire import messages
from afield.runtime.worker.concurrency import Concurrency, make_concurrency
from afield.runtime.worker.host import Host
from afield.runtime.worker.invocation import Invocation
from afield.runtime.worker.outcomes import Code, LoadedCallee
from afield.runtime.worker.replies import MAX_REPLY_DELAY_S
from afield.scheduler.resources import UNIT
from afield.transport.channel import Channel
from afield.transport.pump import Waiter

#: A signal is sent again after the first of these times, then after twice that, and so on up to the second.
SIGNAL_AGAIN_S, MAX_SIGNAL_AGAIN_S = 0.005, 0.1


class Executor:
    """Runs what is pushed to this worker."""

    def __init__(self, participant: Participant) -> None:
        self.process = process = participant.process
        self.values = participant.values
        self.cancellation = participant.cancellation
        self.host = host = Host(participant)
        self.work = host.work
        self.assignment: messages.Assign | None = None
        #: Whether OMP_NUM_THREADS follows the CPUs of the lease.
        self.threads_by_cpus = False
        self._own_actor: OwnActor | None = None
        self._concurrency: Concurrency | None = None
        self._callees: dict[tuple[bytes, int], LoadedCallee] = {}
        #: What their callers have defined, by caller and digest, until they say that it is done with.
        self._codes: dict[tuple[bytes, bytes], Code] = {}
        #: What has come of the arguments of pushes that follow: (caller, sequence) -> arguments.
        self._dependencies: dict[tuple[bytes, int], list[messages.Dependency]] = {}
        self._idle: Waiter | None = None
        self._actor_spec: messages.BecomeActor | None = None
        self._ending = False
        self._running_name = ""
        self.used = False  # whether user code has run here
        self._signal_due = 0.0  # when the next signal is sent, while an interrupt is due
        self._signal_again_s = SIGNAL_AGAIN_S
        process.register(messages.Define, self._on_define)
        process.register(messages.Forget, self._on_forget)
        process.register(messages.MoreDependencies, self._on_more_dependencies)
        process.register(messages.Push, self._on_push)
        process.register(messages.Recall, self._on_recall)
        process.register(messages.Assign, self._on_assign)
        process.register(messages.BecomeActor, self._on_become_actor)
        process.register(messages.Terminate, lambda channel, message: self.end(message.at_once))
        process.register(messages.Cancel, self._on_cancel)
        process.register(messages.Consumed, self._on_consumed)
        process.subscribe(TICK, self._signal_again)
        process.subscribe(PEER_LEFT, self._forget_peer)
        process.subscribe(PROCESS_DIED, self._on_process_died)  # may come first
        process.cores["work"] = self.work
        self.values.on_block = self._block
        self.values.on_unblock = self._unblock
        signal.signal(signal.SIGINT, self._on_sigint)
        process.pump.take_interrupt = self.work.take_interrupt
        current.in_actor = lambda: bool(host.actor_id)
        current.leave_actor = self._leave_actor

    # -- what arrives --------------------------------------------------------------------------------------------

    def _on_define(self, channel: Channel, message: messages.Define) -> None:
        code = None
        if message.digest:
            key = channel.peer_id, message.digest
            code = self._codes.get(key)
            if code is None:
                code = self._codes[key] = Code(message.blob)
        self._callees[channel.peer_id, message.index] = LoadedCallee(message, code)

    def _on_forget(self, channel: Channel, message: messages.Forget) -> None:
        """A caller is done with these; a call that is here already has what it needs."""
        for index in message.indexes:
            self._callees.pop((channel.peer_id, index), None)
        for digest in message.digests:
            self._codes.pop((channel.peer_id, digest), None)

    def _on_push(self, channel: Channel, message: messages.Push) -> None:
        callee = self._callees.get((channel.peer_id, message.function))
        if callee is None:
            return  # the caller is gone, and this is the last that it has sent
        if self._dependencies:
            before = self._dependencies.pop((channel.peer_id, message.sequence), None)
            if before is not None:
                message.dependencies = before + (message.dependencies or [])
        call = Invocation(channel, message, callee)
        if not self.work.arrived(call):
            return  # the daemon will tell the caller that the actor is dead
        if self._concurrency is not None:
            self._concurrency.start(call)
        elif self._idle is not None:
            self._idle.finish()

    def _on_more_dependencies(self, channel: Channel, message: messages.MoreDependencies) -> None:
        key = channel.peer_id, message.sequence
        self._dependencies.setdefault(key, []).extend(message.dependencies)

    def _wake(self) -> None:
        if self._idle is not None:
            self._idle.finish()

    def _on_recall(self, channel: Channel, message: messages.Recall) -> None:
        """Hand back the newest tasks that have not started."""
        channel.send(messages.HandBack(self.work.recall(channel, message.count), False))

    def _on_assign(self, channel: Channel, message: messages.Assign) -> None:
        self.assignment = message
        if self.threads_by_cpus:
            os.environ["OMP_NUM_THREADS"] = str(max(1, message.shape.get("CPU", 0) // UNIT))

    def _on_become_actor(self, channel: Channel, message: messages.BecomeActor) -> None:
        self._actor_spec = message
        self._wake()

    def end(self, at_once: bool = False) -> None:
        """End after the calls that are here already; `at_once`: none of them starts, and those that run are interrupted."""
        self._ending = True
        if at_once:
            self.work.leave()
            for call in self.work.started():
                self._on_cancel(call.channel, messages.Cancel(call.sequence, False))
        if self._concurrency is not None:
            self._concurrency.end()
        self._wake()

    def _on_consumed(self, channel: Channel, message: messages.Consumed) -> None:
        call = self.work.find(channel, message.sequence)
        if call is not None and call.stream is not None:
            call.stream.taken(message.count)

    def _forget_peer(self, peer: bytes) -> None:
        for key in [key for key in self._callees if key[0] == peer]:
            del self._callees[key]
        for known in [known for known in self._codes if known[0] == peer]:
            del self._codes[known]
        for early in [early for early in self._dependencies if early[0] == peer]:
            del self._dependencies[early]
        for channel in self.work.callers():
            if channel.peer_id == peer:
                for call in self.work.caller_gone(channel):
                    if self._concurrency is not None:
                        self._concurrency.interrupt(call)

    def _on_process_died(self, peer: bytes, reason: str) -> None:
        """A caller is dead: nobody waits for its calls any more, and what they would take they would take for nobody."""
        self._forget_peer(peer)
        for call in self.work.started():
            if call.channel.peer_id == peer:
                if call.stream is not None:
                    call.stream.abandon()
                if self._concurrency is not None:
                    self._on_cancel(call.channel, messages.Cancel(call.sequence, False))

    # -- the main thread -----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run tasks until the cluster, or the actor that lives here, ends."""
        host, work, replies, process = self.host, self.work, self.host.replies, self.process
        queue, take = work.queue, work.take
        call = None
        while not process.dead:
            if not queue:
                call = None  # else an idle worker kept its function, and what that has captured
                replies.flush()
                if self._ending:
                    return
                self._wait_for_work()
            try:
                call = take()
            except IndexError:
                continue
            self.used = True
            self._running_name = call.name
            call.run(host)
            work.current = None
            if work.blocked:  # an interrupt came between the end of a wait and saying so
                process.locked(self._announce_unblock, call.channel)
            if queue and (call.callee.once or time.monotonic() - replies.last_flush > MAX_REPLY_DELAY_S):
                replies.flush()

    def _wait_for_work(self) -> None:
        idle = self._idle = Waiter()
        if not self.work.queue and self._actor_spec is None and not self._ending:
            self.process.pump.wait_for(idle)
        self._idle = None
        self.host.replies.last_flush = time.monotonic()
        if self._actor_spec is not None:
            become, self._actor_spec = self._actor_spec, None
            self._construct(become)

    def running_name(self) -> str:
        """Return the name of the task that runs, for the prefix of its output; an actor's output carries its class."""
        return "" if self.host.actor_id else self._running_name

    # -- cancelling ----------------------------------------------------------------------------------------------

    def _on_cancel(self, channel: Channel, message: messages.Cancel) -> None:
        call, decision = self.work.cancel(channel, message.sequence, message)
        if call is None or decision == NOTHING:
            return
        if decision == ANSWER:
            channel.send(call.cancelled(self.host, "before it started"))
        elif message.recursive:
            self.cancellation.cancel_children(call.task_id)
        if self._concurrency is not None:
            self._concurrency.interrupt(call)
        elif decision == INTERRUPT:
            self._signal_again_s = SIGNAL_AGAIN_S
            self._signal(time.monotonic())

    def _signal(self, now: float) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        self._signal_due = now + self._signal_again_s
        self._signal_again_s = min(2 * self._signal_again_s, MAX_SIGNAL_AGAIN_S)

    def _signal_again(self, now: float) -> float | None:
        """Send the signal again if the main thread has not seen it; return when to look again."""
        if not self.work.may_interrupt():
            return None
        if now >= self._signal_due:
            self._signal(now)
        return self._signal_due

    def _on_sigint(self, number: int, frame: FrameType | None) -> None:
        if self.work.may_interrupt():
            self.process.pump.interrupt(frame)
        else:
            self.process.pump.interrupted = False  # what was held back is for a call that is over

    # -- blocking ------------------------------------------------------------------------------------------------

    def _block(self, for_store: bool) -> None:
        call = self.work.current
        if self.host.actor_id or call is None or threading.current_thread() is not threading.main_thread():
            return
        self.process.locked(self._announce_block, call.channel, for_store)

    def _announce_block(self, running: Channel, for_store: bool) -> None:
        self.host.replies.queue()
        for channel, sequences in self.work.block().items():
            channel.send(messages.HandBack(sequences, channel is running))
        self.process.daemon.send(messages.Blocked(True, for_store))

    def _unblock(self) -> None:
        call = self.work.current
        if self.host.actor_id or call is None or threading.current_thread() is not threading.main_thread():
            return
        self.process.locked(self._announce_unblock, call.channel)

    def _announce_unblock(self, running: Channel) -> None:
        if self.work.unblock():
            running.send(messages.Unblocked())
            self.process.daemon.send(messages.Blocked(False))

    # -- actors --------------------------------------------------------------------------------------------------

    def _construct(self, become: messages.BecomeActor) -> None:
        spec, host = become.spec, self.host
        host.actor_id = spec.actor_id
        self.used = True
        context = TaskContext(spec.actor_id, f"{spec.class_name}.__init__")
        enter(context)
        error, lost = b"", ""
        try:
            cls = rebuild(spec.blob, f"the class {spec.class_name}", self.values)
            push = messages.Push(0, spec.actor_id, 0, spec.arguments, spec.location, spec.dependencies)
            argument_pins: list[Any] = []
            args: Any = ()
            kwargs: dict[str, Any] = {}
            if spec.arguments or spec.location is not None:
                args, kwargs = host.outcomes.arguments(push, context, become.owner, argument_pins)
            owner = b"" if spec.options["detached"] else become.owner
            spec.blob = b""  # it is kept as the class
            self._own_actor = OwnActor(cls, spec, owner)
            concurrency = make_concurrency(host, cls, spec.options)
            make = partial(cls, *args, **kwargs)
            del args, kwargs
            host.actor = make() if concurrency is None else concurrency.construct(make)
            del make
            host.outcomes.keep_argument_pins(argument_pins, context)
            self._concurrency = concurrency
            host.work.concurrent = concurrency is not None
        except PartsLostError as gone:  # no code of the user's raises it
            lost = f"an argument of its constructor is lost ({gone})"
        except BaseException as raised:
            broken = host.participant.values.parts.devices.broken()
            if broken:  # as for a call: this process has no device any more, and the actor is constructed elsewhere
                host.leave(broken)
            error = host.outcomes.constructor_failure(spec, raised)
        finally:
            enter(None)
        born = messages.ActorBorn(spec.actor_id, error, lost)
        obligation = context.obligation
        if obligation is None or not host.replies.wait_for_registration(obligation, self.process.daemon, born):
            host.waiting.append((self.process.daemon, born))
        host.replies.flush()
        if self._concurrency is not None and not error:
            self._concurrency.serve()
            self._ending = True

    def _leave_actor(self) -> None:
        """The actor ends itself; the call that says so does not have to be the one that notices."""
        self.host.goodbye = "it ended itself"
        if running() is None:
            self.host.say_goodbye()  # a thread of the actor's own
        elif self._concurrency is not None:
            self._concurrency.leaving()

    def give_up_actor(self) -> list[Any]:
        """Return a list with the actor that lives here (or None), and let go of it."""
        holder, self.host.actor = [self.host.actor], None
        return holder

    def coroutines(self) -> list[tuple[str, Any]]:
        """Return name and object of the coroutines that an async actor's event loop runs."""
        return self._concurrency.coroutines() if self._concurrency is not None else []

    def own_actor(self) -> OwnActor | None:
        """Return the actor that lives here, None if there is none."""
        return self._own_actor
