"""Calling actors: the shell around the core `caller`, which sends calls straight to the actor's worker and records their ends.

Theory of operation. The core keeps the calls of this process to each actor in order and says which may leave (`cores.caller`).
Here they are sent, and their outcomes entered into the table. The daemon tells where an actor lives and when it dies or
restarts (`ActorState`); what the actor answered before that, and has arrived, is read first and counts.

Answers come by the channel of the worker, whose `PeerState` shares the core's `on_way` for just this incarnation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from afield.errors import (
    ActorDiedError,
    ActorUnavailableError,
    PendingCallsLimitExceededError,
    TaskCancelledError,
    of_constructor,
)
from afield.ids import TASK_ID_BYTES
from afield.runtime.calls.callee import Callee
from afield.runtime.calls.pushes import PeerState
from afield.runtime.calls.submission import Submitter
from afield.runtime.cores.caller import (
    CANCELLED,
    DIED,
    Again,
    Caller,
    Callers,
    Effect,
    Ended,
    ForgetCreation,
    Interrupt,
    LetGo,
    life_of,
)
from afield.runtime.cores.dispatch import Task
from afield.runtime.process.process import Process
from afield.runtime.process.serialization import deserialize_unopened, serialize_error
from afield.runtime.values.definitions import Definition
from afield.runtime.wire import messages
from afield.transport.channel import Channel
from afield.transport.interrupts import uninterruptible

#: A call is sent at once if nothing is on its way; otherwise it leaves in a batch of up to this many.
BATCH = 64


class ActorCalls:
    """All actors that this process calls."""

    def __init__(self, process: Process, submitter: Submitter) -> None:
        self.process = process
        self.submitter = submitter
        self.core = Callers()
        self.callers = self.core.by_id
        process.register(messages.ActorState, self._on_state)
        process.register(messages.WatchActor, self._on_asked)
        process.register(messages.ArgumentsLost, self._on_arguments_lost)
        submitter.recovery.call_again = self._call_again
        process.register(
            messages.KillActor, lambda channel, message: self._end_unmade(message.actor_id, message.reason)
        )
        #: Actors that are about to be created here, and that others may have heard of.
        self._expected: set[bytes] = set()
        #: Those of which the daemon is not told yet, as an argument of the constructor is not there.
        self._unmade: set[bytes] = set()

    def create(self, spec: messages.CreateActor, task: Task, detached: bool) -> None:
        """Send the actor to the daemon once its constructor's arguments are there; the task keeps them pinned."""

        def send(ready: Task) -> None:
            if spec.actor_id not in self._unmade:
                return  # it was ended meanwhile
            self._unmade.discard(spec.actor_id)
            if self._has_arguments(caller, ready):
                spec.arguments, spec.location = ready.arguments, ready.location
                spec.dependencies = self.submitter.arguments.describe(ready)
                self.process.daemon.send(spec)

        task.function = Callee(f"{spec.class_name}.__init__", Definition(b""), 0)
        caller = self.core.add(spec.actor_id, task)

        def enter() -> None:
            self._expected.discard(spec.actor_id)
            self._unmade.add(spec.actor_id)
            if not detached:
                self.process.table.begin_life(caller.life)
            self.submitter.arguments.pin(task)
            self.submitter.arguments.when_resolved(task, send)

        self.process.locked(enter)

    def _has_arguments(self, caller: Caller, creation: Task) -> bool:
        """Tell whether the constructor can be given its arguments; the actor is dead if one has failed."""
        error = self.submitter.arguments.failure(creation)
        if error is not None:
            self._never_lives(caller, self._argument_failed(creation, error))
        return error is None

    def _never_lives(self, caller: Caller, error: bytes) -> None:
        """An actor of ours is dead before, or without, another life: so hear its callers here and elsewhere."""
        self._die(caller, error)
        self.process.daemon.send(messages.ActorGone(caller.actor_id, caller.error))

    def _end_unmade(self, actor_id: bytes, reason: str) -> bool:
        """End an actor of ours of which the daemon is not told yet, and may never be; return False if it is none."""
        if actor_id not in self._unmade:
            return False
        self._unmade.discard(actor_id)
        caller = self.callers[actor_id]
        assert caller.creation is not None
        name = caller.creation.function.name.removesuffix(".__init__")
        died = ActorDiedError(f"the actor {name} is dead: {reason}", actor_id=actor_id)
        self._never_lives(caller, serialize_error(died))
        return True

    def _on_arguments_lost(self, channel: Channel, message: messages.ArgumentsLost) -> None:
        """An actor of ours could not be constructed: have the arguments made again that are lost, as for a fresh actor."""
        caller = self.callers.get(message.actor_id)
        creation = caller.creation if caller is not None else None
        if caller is None or creation is None:
            channel.send(messages.ActorGone(message.actor_id, caller.error if caller is not None else b""))
            return
        error = self.submitter.recovery.creation_lost(creation, message.why)
        if error is not None:
            self._never_lives(caller, self._argument_failed(creation, error))
            return

        def send(ready: Task) -> None:
            if self._has_arguments(caller, ready):
                dependencies = self.submitter.arguments.describe(ready)
                channel.send(messages.ActorArguments(caller.actor_id, ready.arguments, ready.location, dependencies))

        self.submitter.arguments.when_resolved(creation, send)

    def creation_refused(self, actor_id: bytes, error: Exception) -> None:
        """The daemon could not be told of an actor; the caller holds the lock."""
        caller = self.callers.get(actor_id)
        if caller is not None:
            died = ActorDiedError(f"the actor could not be created: {error}", actor_id=actor_id)
            self._never_lives(caller, serialize_error(died))

    def _argument_failed(self, creation: Task, data: bytes) -> bytes:
        """The constructor never runs: to every caller it is as if it had raised what its argument did."""
        error = deserialize_unopened(data, "the error of an argument")  # we hold the lock
        return serialize_error(of_constructor(creation.function.name, error, creation.task_id))

    def caller(self, actor_id: bytes) -> Caller:
        """Return the caller of an actor, asking the daemon where it is on first use; the caller holds the lock."""
        caller = self.callers.get(actor_id)
        if caller is None:
            caller = self.core.add(actor_id)
            life = self.process.table.entries.get(caller.life)
            self.process.daemon.send(messages.WatchActor(actor_id, life.owner if life is not None else b""))
        return caller

    def expect(self, actor_id: bytes) -> None:
        """An actor is about to be created whose name others can find already; `create` or `give_up` follows."""
        self._expected.add(actor_id)

    def give_up(self, actor_id: bytes, error: BaseException | None) -> None:
        """An actor that was to be created is not: another has its name, or with an error, which those hear who wait for it.

        Its name, if it has it, is free again.
        """

        def tell() -> None:
            self._expected.discard(actor_id)
            if error is not None:
                text = f"the actor was never created: its creator failed with {type(error).__name__}"
                self.process.daemon.send(
                    messages.ActorGone(actor_id, serialize_error(ActorDiedError(text, actor_id=actor_id)))
                )

        self.process.locked(tell)

    def _on_asked(self, channel: Channel, message: messages.WatchActor) -> None:
        """Somebody has a handle to an actor that the daemon does not know."""
        if message.actor_id in self._expected:
            return  # what follows is the answer
        caller = self.callers.get(message.actor_id)
        if caller is None or caller.state == "dead":
            channel.send(messages.ActorGone(message.actor_id, caller.error if caller is not None else b""))

    def submit(
        self,
        actor_id: bytes,
        function: Callee,
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
        pending = caller.pending
        if pending >= limit:
            raise PendingCallsLimitExceededError(
                f"{pending} calls to the actor are pending and max_pending_calls={limit}; wait for some of them first",
                actor_id=actor_id,
            )

    @uninterruptible
    def _enter(self, actor_id: bytes, task: Task, object_ids: list[bytes]) -> None:
        process = self.process
        with process.pump.lock:
            self.submitter.own(task, object_ids)
            if task.retries_left:
                task.actor = actor_id
            caller = self.callers.get(actor_id) or self.caller(actor_id)
            if not caller.life_pinned:
                self._pin_life(caller)
            if caller.leaves_at_once(task):
                self._send(caller, task)
            else:
                self._wait(caller, task)
                if process.table.effects:
                    process.run_effects()
            if process.loop.dirty:
                self._flush(caller)

    def _send(self, caller: Caller, task: Task) -> None:
        channel: Channel = caller.channel
        caller.on_way[self.submitter.pushes.send(channel, channel.context, task)] = task

    def _wait(self, caller: Caller, task: Task) -> None:
        """Enter a call that does not leave at once: see whether it, or those before it, can."""
        effects = caller.enter(task)
        if effects:
            self._execute(caller, effects)
        elif task.dependencies is not None:
            self._when_resolved(caller, task)
        else:
            self._advance(caller)

    def _when_resolved(self, caller: Caller, task: Task) -> None:
        def proceed(ready: Task) -> None:
            caller.ready(ready)
            self._advance(caller)

        self.submitter.arguments.when_resolved(task, proceed)

    def _flush(self, caller: Caller) -> None:
        channel: Channel | None = caller.channel
        if channel is not None and channel.outbox and len(caller.on_way) > 1 and len(channel.outbox) < BATCH:
            # The actor is busy: let a batch gather. Whoever drives the loop next sends it.
            if len(channel.outbox) == 1:
                self.process.pump.wake_standby()
            return
        self.process.loop.flush()

    def _advance(self, caller: Caller) -> None:
        """Send what can leave; a call whose argument failed, or was lost since it was there, does not."""
        arguments = self.submitter.arguments
        while (task := caller.take()) is not None:
            error = arguments.failure(task) if task.dependencies or task.location is not None else None
            if error is not None:
                self.submitter.fail(task, error)
                self._let_go_if_idle(caller)
            elif task.dependencies is not None and arguments.lost_again(task):
                caller.put_back(task)
                self._when_resolved(caller, task)
            else:
                self._send(caller, task)

    # -- what the core decides -----------------------------------------------------------------------------------

    def _execute(self, caller: Caller, effects: Iterable[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Ended):
                self._ended(caller, effect)
            elif isinstance(effect, Again):
                self.submitter.cut_short(effect.worker, effect.task)
                self.submitter.use_retry(effect.task)
            elif isinstance(effect, Interrupt):
                if caller.channel is not None:  # else its process is gone, and the call with it
                    caller.channel.send(messages.Cancel(effect.sequence, effect.recursive))
            elif isinstance(effect, ForgetCreation):
                self.submitter.arguments.unpin(effect.task)
            elif isinstance(effect, LetGo):
                self.process.table.unpin(caller.life)

    def _ended(self, caller: Caller, effect: Ended) -> None:
        task, name = effect.task, effect.task.function.name
        if effect.worker:
            self.submitter.cut_short(effect.worker, task)
        if effect.why == DIED:
            self.submitter.fail(task, caller.error)
        elif effect.why == CANCELLED:
            when = "" if effect.worker else " before it started"
            self.submitter.fail_with(task, TaskCancelledError(f"{name}() was cancelled{when}"))
        elif effect.worker:
            text = f"{name}() was on its way when the actor died and restarted; it may have run. "
            text += "Set max_task_retries if it is safe to run it twice"
            self.submitter.fail_with(task, ActorUnavailableError(text, actor_id=caller.actor_id))
        else:
            text = f"{name}() was called while the actor restarted; it has not run. "
            text += "Call it again later, or set max_task_retries to have it wait"
            error = ActorUnavailableError(text, actor_id=caller.actor_id)
            error.may_have_run = False
            self.submitter.fail_with(task, error)

    # -- life and death of actors --------------------------------------------------------------------------------

    def kill(self, actor_id: bytes, no_restart: bool) -> None:
        """End an actor's process; the caller holds the lock."""
        reason = "it was ended by kill()"
        if no_restart and self._end_unmade(actor_id, reason):
            return
        life = self.process.table.entries.get(life_of(actor_id))
        creator = life.owner if life is not None else b""
        self.process.daemon.send(messages.KillActor(actor_id, no_restart, reason, creator=creator))
        # The worker may go on until the daemon has read this: a call that is made now must not run there. Without a caller
        # the next call asks the daemon first, which knows by then.
        caller = self.callers.get(actor_id)
        if caller is not None and no_restart:
            caller.ends()

    def cancel(self, task: Task, recursive: bool) -> None:
        """Cancel a call, whichever actor it is to; does nothing if it is over. The caller holds the lock."""
        for caller in self.callers.values():
            effects = caller.cancel(task, recursive)
            if effects is not None:
                self._execute(caller, effects)
                self._advance(caller)  # it may have been the first of those that wait
                return

    def _on_state(self, channel: Channel, message: messages.ActorState) -> None:
        caller = self.callers.get(message.actor_id)
        if caller is None:
            return
        if message.state == "pending":
            caller.waits()
        elif message.state == "alive":
            self._alive(caller, message.worker)
        else:
            if caller.channel is not None:
                caller.gone()
                caller.channel.drain()  # what it answered before counts
                caller.channel = None
            if message.state == "restarting":
                self._execute(caller, caller.restarts())
            else:
                self._die(caller, message.error)

    def _alive(self, caller: Caller, worker: bytes) -> None:
        try:
            channel = self.process.channels.to(worker, patient=False)
        except OSError as error:
            self.process.channels.try_again(
                error, lambda: self._alive_still(caller, worker), lambda why: self._unreachable(caller, why)
            )
            return
        if channel is None:
            return  # it died again; the daemon will say so
        effects = caller.lives(worker)
        if caller.creation is not None:
            caller.creation.rounds = 0  # this time its arguments were there
        if not caller.open:
            return  # it was ended meanwhile
        caller.channel = channel
        if channel.context is None:
            channel.context = PeerState()
        state: PeerState = channel.context
        state.inflight = caller.on_way
        state.on_batch = lambda replies: self._let_go_if_idle(caller)
        state.retry = lambda task: self._again(caller, task)
        state.go_on = lambda: self._advance(caller)
        state.argument_lost = lambda task: self._argument_lost(caller, task)
        self._execute(caller, effects)
        self._advance(caller)

    def _alive_still(self, caller: Caller, worker: bytes) -> None:
        """There may be descriptors for the channel by now, if the actor is still to be reached."""
        if self.callers.get(caller.actor_id) is caller and caller.state in ("asked", "pending", "restarting"):
            self._alive(caller, worker)

    def _unreachable(self, caller: Caller, why: str) -> None:
        """This process has no descriptors for the actor: its calls fail. Those to come ask the daemon again."""
        if caller.state in ("asked", "pending", "restarting"):
            error = ActorUnavailableError(f"the actor cannot be reached: {why}", actor_id=caller.actor_id)
            self._die(caller, serialize_error(error))
            self.callers.pop(caller.actor_id, None)

    def _die(self, caller: Caller, error: bytes) -> None:
        self._execute(caller, caller.dies(error))
        if caller.life not in self.process.table.entries:
            self.callers.pop(caller.actor_id, None)

    def _again(self, caller: Caller, task: Task) -> None:
        caller.run_again(task)
        self._advance(caller)

    def _argument_lost(self, caller: Caller, task: Task) -> bool:
        """A call has not run as an argument was lost: do it again, if no later one has overtaken it on its way."""
        if not caller.argument_lost(task):
            return False
        self._when_resolved(caller, task)
        return True

    def _call_again(self, task: Task) -> None:
        """Call a method again whose stored result was lost; it keeps back no others, and they do not keep it back."""
        caller = self.callers.get(task.actor) or self.caller(task.actor)
        self._pin_life(caller)
        self._wait(caller, task)

    def _pin_life(self, caller: Caller) -> None:
        if not caller.life_pinned and caller.life in self.process.table.entries:
            caller.life_pinned = True
            self.process.table.pin(caller.life)

    def _let_go_if_idle(self, caller: Caller) -> None:
        """The actor need not live for our sake once nothing of ours is pending."""
        if caller.lets_go():
            self.process.table.unpin(caller.life)

    def end(self, life: bytes) -> None:
        """Nobody can reach an actor of ours any more: it ends after the calls that it has."""
        actor_id = life[:TASK_ID_BYTES]
        reason = "all handles to it are gone"
        if not self.process.dead and not self._end_unmade(actor_id, reason):
            self.process.daemon.send(messages.KillActor(actor_id, True, reason, True))
        caller = self.callers.get(actor_id)
        if caller is not None:
            caller.ends()
            if caller.state == "dead":
                del self.callers[actor_id]
