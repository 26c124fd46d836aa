"""A model of one caller, one actor and the daemon: the real core, the real shell around it, and channels that are lists.

Theory of operation. `World` does one *action* at a time: the caller makes its next call, an argument comes, the oldest message
of a channel is read, the actor runs its oldest call, its process dies, and so on. `actions` lists what can happen now, so that
a test can try everything in every order, or a little of much. Actor and daemon do what `worker/executor.py` and
`node/actors.py` do, as far as a caller can tell. What must hold is checked after each action; `finish` lets everything come to
its end, without faults, and then nothing may be left.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from afield.errors import ActorDiedError, ActorUnavailableError, TaskCancelledError, TaskError
from afield.ids import FIRST_RETURN
from afield.machines import FlightRecorder
from afield.runtime.calls.actor_calls import ActorCalls
from afield.runtime.calls.callee import Callee
from afield.runtime.calls.submission import Submitter
from afield.runtime.cores.caller import life_of
from afield.runtime.cores.dispatch import Task
from afield.runtime.cores.objects import FAILED, INLINE, PENDING, LifeEnded, Recompute
from afield.runtime.cores.ownership import OwnershipTable
from afield.runtime.process.events import RECOMPUTE
from afield.runtime.process.serialization import deserialize, serialize_error
from afield.runtime.values.arguments import Arguments
from afield.runtime.values.definitions import Definition
from afield.runtime.wire import messages

ACTOR = b"actor".ljust(16, b"-")
PLAIN = Callee("call", Definition(b""), 1)
CALLEES = {
    (order, retried): Callee("call", Definition(b""), 1, retry_on=retried, order=order)
    for order in ("", "a", "b", None)
    for retried in (False, True)
}
DEAD = serialize_error(ActorDiedError("the actor is dead"))
FAILURE = serialize_error(TaskError.from_exception("call", ValueError("raised"), ""))


@dataclass(frozen=True)
class Call:
    """What is special about a call."""

    retries: int = 0
    late: bool = False  # its argument is not there at first
    fails: bool = False  # and will never be: it comes as an error
    raises: bool = False  # it raises, the first time, what its caller wants retried
    loses: bool = False  # the actor cannot read its argument, the first time
    order: str | None = ""  # see `Callee.order`


@dataclass(frozen=True)
class Script:
    """What a caller does, and what befalls it."""

    calls: tuple[Call, ...]
    restarts: int = 0
    deaths: int = 0
    kills: int = 0
    cancels: tuple[int, ...] = ()
    creator: bool = True  # else it has got a handle from somebody
    drops: bool = False  # its handle goes as soon as the last call is made
    argument_fails: bool = False  # the constructor's argument is late, and comes as an error


@dataclass(eq=False)
class Incarnation:
    """One process of the actor."""

    number: int
    world: World
    context: Any = None
    alive: bool = True
    outbox: list[Any] = field(default_factory=list)  # as `Channel.outbox`: always sent at once here
    inbox: deque[messages.Push] = field(default_factory=deque)
    answers: deque[Any] = field(default_factory=deque)
    ran: list[int] = field(default_factory=list)

    @property
    def peer_id(self) -> bytes:
        return b"incarnation %d" % self.number

    def send(self, message: Any) -> None:
        if isinstance(message, messages.Push):
            self.world.on_push(self, message)

    def drain(self) -> None:
        while self.answers:
            self.world.read_answer(self)


class Process:
    """The caller's process, as far as calling actors needs one."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.config = SimpleNamespace(capacity=1 << 30, lineage_bytes=1 << 20)
        self.process_id = b"caller"
        self.handlers: dict[type, Callable[[Any, Any], None]] = {}
        self.table = OwnershipTable(self.process_id, lambda owner: b"")
        self.pump = SimpleNamespace(lock=threading.RLock())
        self.loop = SimpleNamespace(dirty=[])
        self.daemon = SimpleNamespace(send=world.to_daemon.append)
        self.cores: dict[str, Any] = {}

        self.subscribers: dict[Any, Callable[..., Any]] = {}
        self.on_batch: Any = None
        self.dead = ""

    def register(self, message_type: type, handler: Callable[[Any, Any], None]) -> None:
        assert message_type not in self.handlers
        self.handlers[message_type] = handler

    def subscribe(self, event: Any, callback: Callable[..., Any]) -> None:
        self.subscribers[event] = callback

    def handle_batches_by(self, handle: Any) -> None:
        self.on_batch = handle

    def check_alive(self) -> None:
        pass

    @property
    def channels(self) -> Any:
        """What there is of sockets: no descriptor is ever missing."""
        return SimpleNamespace(to=lambda worker, patient: self.channel_to(worker))

    def channel_to(self, worker: bytes) -> Incarnation | None:
        found = self.world.incarnations[int(worker.split()[-1]) - 1]
        return found if found.alive else None

    def locked(self, action: Callable[..., Any], *args: Any) -> Any:
        result = action(*args)
        self.run_effects()
        return result

    def run_effects(self) -> None:
        while self.table.effects:
            effects, self.table.effects = self.table.effects, []
            for effect in effects:
                if isinstance(effect, LifeEnded):
                    self.world.actors.end(effect.object_id)
                elif isinstance(effect, Recompute):
                    self.subscribers[RECOMPUTE](effect.record)


class World:
    """One caller and its actor."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.to_daemon: deque[Any] = deque()
        self.from_daemon: deque[messages.ActorState] = deque()
        self.incarnations: list[Incarnation] = []
        # The daemon's view.
        self.known = not script.creator
        self.state = "pending"
        self.watched = script.creator
        self.restarts_left = script.restarts
        self.starting = self.known
        # What is left of the script.
        self.made = 0
        self.deaths, self.kills = script.deaths, script.kills
        self.cancels = list(script.cancels)
        self.has_handle = True
        self.killed = False
        self.ended_early = False
        self.tasks: list[Task] = []
        self.away: set[int] = set()  # calls that were made while the actor restarted, as far as their caller knew
        self.outcomes: dict[int, Any] = {}
        self.cancelled: set[int] = set()
        self.cancelled_in_time: set[int] = set()
        self.missing = {i for i, call in enumerate(script.calls) if call.late or call.fails}
        self.misread = {i for i, call in enumerate(script.calls) if call.loses}
        self.to_raise = {i for i, call in enumerate(script.calls) if call.raises}
        self.sent_again: set[int] = set()  # those whose place in the order is not the first any more

        self.process = Process(self)
        process: Any = self.process
        arguments = Arguments(process, cast(Any, None))
        self.submitter = Submitter(process, arguments, cast(Any, None))
        self.actors = ActorCalls(process, self.submitter)
        self.actors.core.recorder = FlightRecorder(10_000)
        self.table = self.process.table
        self.construction = Task(ACTOR, None, b"", None, retries_left=script.restarts)
        self.constructor_argument = b"constructor's".ljust(20, b"-")
        self.pending_construction = script.creator and script.argument_fails
        if script.creator:
            self._create()
        else:  # a borrowed handle: the owner is somebody else
            self.table.begin_life(life_of(ACTOR))
            self.table.entries[life_of(ACTOR)].owner = b"somebody"

    def _create(self) -> None:
        if self.pending_construction:
            self.table.own(self.constructor_argument, None)
            self.construction.dependencies = [self.constructor_argument]
            self.construction.pinned = [self.constructor_argument]
        spec = messages.CreateActor(ACTOR, "Actor", b"", {}, b"", None, None, {}, None)
        self.actors.create(spec, self.construction, False)
        if self.pending_construction:
            self.table.drop(self.constructor_argument)

    # -- names ----------------------------------------------------------------------------------------------------

    def argument(self, index: int) -> bytes:
        return (b"argument %d" % index).ljust(20, b"-")

    def output(self, index: int) -> bytes:
        return self.tasks[index].task_id + FIRST_RETURN

    def index(self, task_id: bytes) -> int:
        return int(task_id.split()[1].rstrip(b"-"))

    @property
    def now(self) -> Incarnation | None:
        return self.incarnations[-1] if self.incarnations and self.incarnations[-1].alive else None

    # -- what can happen ------------------------------------------------------------------------------------------

    def actions(self, faults: bool = True) -> list[tuple[Any, ...]]:
        """Return what can happen now; without `faults` only what must happen in the end."""
        found: list[tuple[Any, ...]] = []
        if self.made < len(self.script.calls):
            found.append(("call",))
        elif self.has_handle and self.script.drops:
            found.append(("drop",))
        found += [("resolve", index) for index in sorted(self.missing) if index < self.made]
        if self.pending_construction:
            found.append(("construct",))
        if self.to_daemon:
            found.append(("daemon",))
        if self.starting and self.now is None:
            found.append(("start",))
        if self.now is not None and self.state != "alive" and self.state != "dead":
            found.append(("born",))
        if self.now is not None and self.now.inbox and self.state == "alive":
            found.append(("run",))
        if self.from_daemon:
            found.append(("told",))
        found += [("answer", each.number) for each in self.incarnations if each.answers]
        if faults:
            if self.now is not None and self.deaths:
                found.append(("die",))
            if self.kills and self.made and self.has_handle:
                found.append(("kill",))
            found += [("cancel", index) for index in self.cancels if index < self.made]
        return found

    def apply(self, action: tuple[Any, ...], checked: bool = False) -> None:
        """Do one action, and check what holds, unless that was `checked` before."""
        getattr(self, "_" + action[0])(*action[1:])
        self.process.run_effects()
        for index in range(self.made):
            entry = self.table.entries[self.output(index)]
            if entry.state != PENDING:
                outcome = (entry.state, entry.value)
                assert self.outcomes.setdefault(index, outcome) == outcome, "a second outcome"
        if not checked:
            self.check()

    def _call(self) -> None:
        index, call = self.made, self.script.calls[self.made]
        self.made += 1
        callee = CALLEES[call.order, call.raises]
        task = Task((b"call %d" % index).ljust(16, b"-"), callee, b"", None, 1, call.retries)
        if call.late or call.fails or call.loses:
            argument = self.argument(index)
            if call.late or call.fails:
                self.table.own(argument, None)
            else:
                self.table.put(argument, INLINE, b"")
            task.dependencies, task.pinned = [argument], [argument]
        self.tasks.append(task)
        caller = self.actors.callers.get(ACTOR)
        if caller is None or caller.state in ("asked", "restarting"):
            self.away.add(index)
        self.actors._enter(ACTOR, task, [self.output(index)])
        if task.dependencies is not None:
            self.table.drop(self.argument(index))

    def _resolve(self, index: int) -> None:
        self.missing.discard(index)
        argument = self.argument(index)
        if argument in self.table.entries:
            failed = self.script.calls[index].fails
            self.table.fulfil(argument, FAILED if failed else INLINE, FAILURE if failed else b"")

    def _construct(self) -> None:
        self.pending_construction = False
        if self.constructor_argument in self.table.entries:
            self.table.fulfil(self.constructor_argument, FAILED, FAILURE)

    def _drop(self) -> None:
        self.has_handle = False
        self.table.drop(life_of(ACTOR))

    def _kill(self) -> None:
        self.kills -= 1
        self.killed = True
        self.actors.kill(ACTOR, True)

    def _cancel(self, index: int) -> None:
        self.cancels.remove(index)
        if index not in self.outcomes:
            self.cancelled.add(index)
            if not any(push.task_id == self.tasks[index].task_id for each in self.incarnations for push in each.inbox):
                caller = self.actors.callers[ACTOR]
                if self.tasks[index] in caller.waiting():
                    self.cancelled_in_time.add(index)
            self.tasks[index].cancelled = True
            self.actors.cancel(self.tasks[index], True)

    # -- the daemon and the actor ---------------------------------------------------------------------------------

    def _daemon(self) -> None:
        message = self.to_daemon.popleft()
        if isinstance(message, messages.CreateActor):
            self.known = self.starting = True
            if self.ended_early:
                self._over()
        elif isinstance(message, messages.WatchActor):
            self.watched = True
            self.announce()
        elif isinstance(message, messages.ActorGone):
            self.state, self.starting = "dead", False
        elif isinstance(message, messages.KillActor):
            if not self.known:
                self.ended_early = True
            elif self.state != "dead":
                self._over()

    def _over(self) -> None:
        self.state, self.starting = "dead", False
        if self.now is not None:
            self.now.inbox.clear()
            self.now.alive = False
        self.announce()

    def _start(self) -> None:
        self.starting = False
        self.incarnations.append(Incarnation(len(self.incarnations) + 1, self))

    def _born(self) -> None:
        self.state = "alive"
        self.announce()

    def _die(self) -> None:
        assert self.now is not None
        self.deaths -= 1
        self.now.inbox.clear()
        self.now.alive = False
        if self.restarts_left:
            self.restarts_left -= 1
            self.state, self.starting = "restarting", True
        else:
            self.state = "dead"
        self.announce()

    def announce(self) -> None:
        if self.watched:
            worker = self.incarnations[-1].peer_id if self.incarnations else b""
            self.from_daemon.append(
                messages.ActorState(ACTOR, self.state, worker, DEAD if self.state == "dead" else b"")
            )

    def on_push(self, incarnation: Incarnation, push: messages.Push) -> None:
        """The caller has sent a call."""
        index = self.index(push.task_id)
        assert not self.killed, "a call left after kill()"
        assert index not in self.outcomes, "a call that has ended was sent"
        assert index not in self.cancelled_in_time, "a call that was cancelled while it waited was sent"
        if incarnation.alive:
            incarnation.inbox.append(push)

    def _run(self) -> None:
        assert self.now is not None
        push = self.now.inbox.popleft()
        index = self.index(push.task_id)
        if index in self.misread:
            self.misread.discard(index)
            self.now.answers.append(messages.Reply(push.sequence, messages.ARGUMENT_LOST, b""))
            return
        order = self.script.calls[index].order
        if index not in self.sent_again and order is not None:
            before = [other for other in self.now.ran if self.script.calls[other].order == order]
            assert all(index > other or other in self.sent_again for other in before), "out of order"
        self.now.ran.append(index)
        if index in self.to_raise:
            self.to_raise.discard(index)
            self.sent_again.add(index)
            self.now.answers.append(messages.Reply(push.sequence, messages.FAILED_AGAIN, FAILURE))
        else:
            self.now.answers.append(messages.Reply(push.sequence, INLINE, b"%d" % self.now.number))

    # -- what the caller reads ------------------------------------------------------------------------------------

    def _told(self) -> None:
        message = self.from_daemon.popleft()
        answered = [
            each.context.inflight[reply.sequence]
            for each in self.incarnations
            for reply in each.answers
            if reply.kind == INLINE and reply.sequence in each.context.inflight
        ]
        self.process.handlers[messages.ActorState](self.process.daemon, message)
        if message.state in ("restarting", "dead"):
            for task in answered:
                state = self.table.entries[task.task_id + FIRST_RETURN].state
                assert state == INLINE, "an answer that had arrived does not count"

    def _answer(self, number: int) -> None:
        self.read_answer(self.incarnations[number - 1])

    def read_answer(self, incarnation: Incarnation) -> None:
        self.process.on_batch(incarnation, [incarnation.answers.popleft()])

    # -- what holds -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Check what holds after each action."""
        complaints = self.actors.core.validate()
        assert not complaints, complaints
        caller = self.actors.callers.get(ACTOR)
        places = [] if caller is None else [*caller.waiting(), *caller.on_way.values()]
        for index, task in enumerate(self.tasks):
            if index in self.outcomes:
                assert not any(each is task for each in places), f"call {index} has ended and is kept"
            else:
                assert sum(each is task for each in places) == 1, f"call {index} is forgotten, or kept twice"

    def finish(self) -> None:
        """Let everything come to its end, and see that it is a right one and leaves nothing."""
        while actions := self.actions(faults=False):
            self.apply(actions[0])
        assert sorted(self.outcomes) == list(range(len(self.script.calls))), "a call never ends"
        for index, (state, value) in self.outcomes.items():
            self._judge(index, state, value)
        if self.has_handle:
            self.table.drop(life_of(ACTOR))
            self.has_handle = False
            self.process.run_effects()
        for index in range(self.made):
            self.table.drop(self.output(index))
        self.process.run_effects()
        while actions := self.actions(faults=False):
            getattr(self, "_" + actions[0][0])(*actions[0][1:])
            self.process.run_effects()
        if self.script.creator:
            assert self.state == "dead", "nobody can reach the actor, and it lives"
            assert not self.actors.callers, "the caller of an actor that is dead is kept"
        left = {oid for oid in self.table.entries if oid != life_of(ACTOR)}
        assert not left, f"still held: {left}"
        assert life_of(ACTOR) not in self.table.entries

    def _judge(self, index: int, state: int, value: bytes) -> None:
        call = self.script.calls[index]
        times = sum(each.ran.count(index) for each in self.incarnations)
        assert call.retries < 0 or times <= 1 + call.retries, "it ran more often than it may"
        if state == INLINE:
            assert times, "a value of a call that has not run"
            return
        error = deserialize(value, "the error", None)
        if isinstance(error, TaskCancelledError):
            assert index in self.cancelled
        elif isinstance(error, ActorUnavailableError):
            assert not self.tasks[index].retries_left
            assert self.deaths < self.script.deaths
            assert error.may_have_run or (index in self.away and not times), "it has run, or waited before"
        elif isinstance(error, ActorDiedError):
            assert self.state == "dead"
        elif isinstance(error, TaskError):
            assert call.fails or call.raises or self.script.argument_fails
        else:
            assert call.loses, f"an error of its own: {error!r}"  # overtaken
        if index in self.cancelled_in_time:
            assert isinstance(error, TaskCancelledError)

    def fingerprint(self) -> Any:
        """Return what a later action can depend on."""
        caller = self.actors.callers.get(ACTOR)
        inside: Any = None
        if caller is not None:
            names = [self.index(task.task_id) for task in caller.waiting()]
            on_way = [self.index(task.task_id) for task in caller.on_way.values()]
            inside = (caller.state, tuple(names), tuple(on_way), caller.life_pinned, caller.channel is not None)
        return (
            inside,
            tuple((t.retries_left, t.unresolved, t.cancelled, t.rounds) for t in self.tasks),
            tuple(sorted((index, state) for index, (state, _) in self.outcomes.items())),
            tuple((type(message).__name__) for message in self.to_daemon),
            tuple((message.state, message.worker) for message in self.from_daemon),
            tuple(
                (
                    each.alive,
                    tuple(self.index(push.task_id) for push in each.inbox),
                    tuple((reply.kind, reply.data) for reply in each.answers),
                    len(each.context.inflight) if each.context is not None else 0,
                    tuple(each.ran),
                )
                for each in self.incarnations
            ),
            (self.known, self.state, self.watched, self.restarts_left, self.starting),
            (self.made, self.deaths, self.kills, tuple(self.cancels), self.has_handle, self.killed, self.ended_early),
            (tuple(sorted(self.missing)), tuple(sorted(self.misread)), tuple(sorted(self.to_raise))),
            (self.pending_construction, tuple(sorted(self.sent_again)), life_of(ACTOR) in self.table.entries),
            tuple(sorted(self.away)),
        )
