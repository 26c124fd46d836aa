"""Every interleaving of a small script, over the same core and the same model of the shell.

Theory of operation. A `State` is a world and the threads of its programs. `actions` lists what can happen next: a thread does
its next step, the oldest message of a channel arrives (or, `copies` times, a copy of it), a process dies, what a
dead process had sent gets lost, a process hears of the death, the store loses a value. Each action is tried on a copy of the
state; states that have been seen, compared by `fingerprint`, are not followed again. When nothing can happen, everything
must have come to an end; then all processes drop what they hold, and when nothing can happen again, nothing may be left.

A copy is a pickle: it keeps what refers to what. A fingerprint leaves out only what no later behaviour depends on.
"""

from __future__ import annotations

import copyreg
import gc
import hashlib
import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from afield.errors import InternalError
from afield.machines import FlightRecorder
from afield.runtime.cores.objects import INLINE, LOCATED, Obligation
from afield.runtime.cores.ownership import OwnershipTable
from tests.sim import checkers
from tests.sim.network import REPEATABLE, RESENDABLE
from tests.sim.participant import BODY, Execution, Get, Participant
from tests.sim.scenarios import Scenario, Step, Steps
from tests.sim.values import NODE, InvariantError
from tests.sim.world import World

Action = tuple[Any, ...]

MAIN = -1
#: How often a task is pushed whose worker could not read an argument; each time is another state.
MOST_ROUNDS = 2
_WAITS = ("get", "try")


@dataclass(slots=True, eq=False)
class Thread:
    """A program: the script of p0, or a task."""

    process: Participant
    body: int  # MAIN for the script of p0
    execution: Execution | None = None
    at: int = 0
    names: dict[str, bytes] = field(default_factory=dict)
    get: Get | None = None


@dataclass(slots=True)
class Emptied:
    """Called for each object whose value is freed while its entry stays."""

    world: World

    def __call__(self, object_id: bytes) -> None:
        checkers.on_emptied(self.world, object_id)


class State:
    """Everything that can differ between two moments of a scenario."""

    def __init__(self, scenario: Scenario, table: type[OwnershipTable], *, recording: bool = False) -> None:
        self.world = World(table, recording=recording)
        self.scenario = scenario
        self.copies = scenario.copies
        self.losses = scenario.losses
        self.over = False
        self.world.on_emptied = Emptied(self.world)
        self.world.most_rounds = MOST_ROUNDS
        self.kept: dict[bytes, dict[str, bytes]] = {}
        for index in range(scenario.processes):
            self.world.add(b"p%d" % index)
        self.threads = [Thread(self.world.processes[b"p0"], MAIN)]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"scenario": None}  # the same in all states: no need to copy it

    def steps(self, thread: Thread) -> Steps:
        """Return the script of a thread."""
        return self.scenario.main if thread.body == MAIN else self.scenario.bodies[thread.body]

    def can_go_on(self, thread: Thread) -> bool:
        """Say whether the next step of a thread can be done."""
        if thread.get is None or thread.get.ready:
            return True
        return self.steps(thread)[thread.at][0] == "try"

    # -- what can happen -----------------------------------------------------------------------------------------

    def actions(self) -> list[Action]:
        """Return every action that is possible now."""
        world = self.world
        found: list[Action] = [("step", index) for index, thread in enumerate(self.threads) if self.can_go_on(thread)]
        for (source, target), channel in world.network.channels.items():
            found.append(("deliver", source, target))
            if source not in world.processes and source != NODE:
                found.append(("lose", source, target))
            elif self.copies and isinstance(channel[0], REPEATABLE + RESENDABLE):
                found.append(("copy", source, target))
        if self.losses and not self.over:
            found += [("vanish", object_id) for object_id in world.losable()]
        if not world.dead and not self.over:
            found += [("die", name) for name in map(str.encode, self.scenario.mortal)]
        for name, process in world.processes.items():
            found += [("hear", name, dead) for dead in world.dead if dead not in process.known_dead]
        if not found and not self.over:
            found.append(("let go",))
        return found

    def apply(self, action: Action) -> list[Participant]:
        """Do one action and check what it did; return the processes that it touched.

        Raises:
            InvariantError: an invariant does not hold.
        """
        world = self.world
        match action:
            case ("step", index):
                thread = self.threads[index]
                touched = self._step(thread)
                if touched.name not in world.processes:
                    return []
                if thread.at == len(self.steps(thread)):
                    del self.threads[index]
            case ("deliver", source, target):
                touched = self._deliver(world.processes[target], source, world.network.take(source, target))
            case ("copy", source, target):
                self.copies -= 1
                touched = self._deliver(world.processes[target], source, world.network.channels[source, target][0])
            case ("lose", source, target):
                world.network.lose(source, target, 0)
                return []
            case ("die", name):
                self._die(name)
                return []
            case ("vanish", object_id):
                self.losses -= 1
                world.lose(object_id)
                return []
            case ("hear", name, dead):
                touched = world.processes[name]
                touched.peer_died(dead)
            case _:
                self._let_go()
                return list(world.processes.values())
        checkers.after_event(world, touched)
        return [touched]

    def _die(self, name: bytes) -> None:
        self._note(name, "dies")
        self.world.kill(name)
        self.threads = [thread for thread in self.threads if thread.process.name != name]

    def _note(self, who: bytes, text: str) -> None:
        if self.world.log is not None:
            self.world.note(who, text)

    def _deliver(self, process: Participant, source: bytes, message: Any) -> Participant:
        process.deliver(source, message)
        while process.queue:
            execution = process.begin()
            if execution is not None:
                self.threads.append(Thread(process, execution.push.function // BODY, execution))
        return process

    def _let_go(self) -> None:
        checkers.at_rest(self.world)
        self._note(b"--", "everything is dropped")
        self.over = True
        self.threads = []
        for process in self.world.processes.values():
            process.let_go()
            checkers.after_event(self.world, process)

    # -- steps of programs ---------------------------------------------------------------------------------------

    def _bound(self, thread: Thread, names: tuple[str | int, ...]) -> list[bytes]:
        kept = self.kept.get(thread.process.name, {})
        return [found for name in names if (found := thread.names.get(str(name)) or kept.get(str(name))) is not None]

    def _step(self, thread: Thread) -> Participant:
        process, execution = thread.process, thread.execution
        if execution is not None and execution.todo:
            name = f"a{len(thread.names)}"
            thread.names[name] = process.unpickle_next(execution)
            return process
        step = self.steps(thread)[thread.at]
        self._note(process.name, f"does {step!r}")
        if step[0] in _WAITS:
            self._wait(thread, step)
            return process
        thread.at += 1
        match step:
            case ("put" | "store" as how, str(name), *inside):
                thread.names[name] = process.put(self._bound(thread, tuple(inside)), stored=how == "store")
            case ("submit" | "pass" as how, str(name), str(target), int(body), *refs):
                bound = self._bound(thread, tuple(refs))
                top, nested = (bound, []) if how == "pass" else ([], bound)
                [thread.names[name]] = process.submit(target.encode(), top, nested, body=body, left=self.scenario.left)
            case ("die",):
                self._die(process.name)
                return process
            case ("drop", *names):
                for each in names:
                    self._drop(thread, str(each))
            case ("keep", str(name), str(as_name)):
                self._keep(thread, name, as_name)
            case ("return" | "return stored" as how, *names):
                self._return(thread, LOCATED if how == "return stored" else INLINE, tuple(names))
        process.drain()
        return process

    def _keep(self, thread: Thread, name: str, as_name: str) -> None:
        object_id = thread.names.pop(name, None)
        if object_id is None:
            return
        assert thread.execution is not None
        if object_id in thread.execution.refs:
            thread.execution.refs.remove(object_id)
            thread.process.handles.append(object_id)
        self.kept.setdefault(thread.process.name, {})[as_name] = object_id

    def _return(self, thread: Thread, kind: int, names: tuple[str | int, ...]) -> None:
        process, execution = thread.process, thread.execution
        assert execution is not None
        inside = self._bound(thread, names)
        came_with_it = list(execution.refs)
        process.finish(execution, [(kind, inside)], [], views=False)
        for object_id in thread.names.values():
            if object_id in came_with_it:
                came_with_it.remove(object_id)  # dropped by `finish`
            else:
                process.drop(object_id)

    def _drop(self, thread: Thread, name: str) -> None:
        process, execution = thread.process, thread.execution
        names = thread.names if name in thread.names else self.kept.get(process.name, {})
        object_id = names.pop(name, None)
        if object_id is None:
            return
        if execution is not None and object_id in execution.refs:
            execution.refs.remove(object_id)
            process.dropped.append(object_id)
        else:
            process.drop(object_id)

    def _wait(self, thread: Thread, step: Step) -> None:
        process = thread.process
        if thread.get is None:
            bound = self._bound(thread, step[1:2])
            if not bound:
                thread.at += 1
                return
            object_id = bound[0]
            if thread.execution is not None and object_id in thread.execution.refs:
                thread.execution.refs.remove(object_id)
                process.handles.append(object_id)
            thread.get = process.get(object_id)
            return
        get, thread.get = thread.get, None
        if step[0] == "try":
            thread.at += 1
            process.give_up(get)
            return
        inside = process.finish_get(get)
        if inside is None:  # lost: it waits again
            thread.get = get
            return
        thread.at += 1
        for name, inner in zip(step[2:], inside, strict=False):
            thread.names[str(name)] = inner
        process.drain()


# -- comparing states ------------------------------------------------------------------------------------------------


def fingerprint(state: State) -> bytes:
    """Return equal bytes for states that behave alike."""
    world = state.world
    numbers: dict[int, int] = {}

    def number(obligation: Obligation) -> tuple[Any, ...]:
        known = id(obligation) in numbers
        position = numbers.setdefault(id(obligation), len(numbers))
        if known:
            return (position,)
        token = obligation.token.push.task_id if obligation.token is not None else None
        return (position, obligation.remaining, obligation.container, obligation.message, token)

    parts: list[Any] = [sorted(world.network.channels.items()), world.dead, state.over, state.copies, state.losses]
    parts.append((sorted(world.excused), sorted(world.failed)))
    for object_id, versions in sorted(world.store.items()):
        parts.append((object_id, [(stored.there, stored.lost) for stored in versions], object_id in world.early_frees))
    for name, process in world.processes.items():
        table = process.table
        parts.append(name)
        for object_id, entry in sorted(table.entries.items()):
            sets = (sorted(entry.borrowers or ()), sorted(entry.subscribers or ()), len(entry.waiters or ()))
            flags = (entry.owner, entry.state, entry.handles, entry.pins, entry.registration, entry.attempt)
            parts.append((object_id, flags, entry.value, sets, entry.contained, entry.subscribed))
        parts.append(sorted((key, [number(each) for each in value]) for key, value in table._awaiting.items()))
        parts.append(sorted((key, sorted(value)) for key, value in table._lent_to.items()))
        parts.append(sorted((key, sorted(value)) for key, value in table._borrowed_from.items()))
        parts.append(sorted(table._transit.items()))
        parts.append(sorted(process.known_dead))
        parts.append(sorted(process.handles))
        parts.append(sorted(state.kept.get(name, {}).items()))
        parts.append([(sequence, task.target, task.rounds) for sequence, task in process.inflight.items()])
        parts.append([task.task_id for task in process.waiting])
        parts.append(_lineage(process))
        parts.append([execution.push.task_id for execution in process.unsettled])
    threads = []
    for thread in state.threads:
        execution = thread.execution
        running = None if execution is None else (execution.push.task_id, execution.todo, number(execution.obligation))
        waiting = thread.get is not None and (thread.get.ready, thread.get.object_id)
        threads.append((thread.process.name, thread.at, sorted(thread.names.items()), running, waiting))
    parts.append(threads)
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def _lineage(process: Participant) -> Any:
    lineage = process.lineage
    records = []
    for output, record in sorted(lineage._records.items()):
        records.append((output, record.number, sorted(record.outputs), record.inputs, record.left, record.running))
    kept = (sorted(lineage.inputs.items()), sorted(lineage._kept.items()), sorted(lineage._remains))
    return (records, kept, sorted(lineage._early), sorted(process.again))


# -- the search ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Explored:
    """What a search found: `states` are distinct, `ends` are those in which nothing can happen any more."""

    states: int
    transitions: int
    ends: int


class CounterexampleError(InvariantError):
    """A violation with the actions that lead to it; `transcript` shows them."""

    def __init__(self, violation: InvariantError, transcript: list[str]) -> None:
        super().__init__(str(violation))
        self.transcript = transcript


@contextmanager
def _uncollected() -> Iterator[None]:
    """States are freed as they are left (`World.forget`), so the collections that so many new objects cause find nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_uncollected()
def explore(scenario: Scenario, table: type[OwnershipTable] = OwnershipTable) -> Explored:
    """Visit every state of a scenario.

    Raises:
        CounterexampleError: an invariant does not hold in one of them.
    """
    start = State(scenario, table)
    root = fingerprint(start)
    parents: dict[bytes, tuple[bytes, Action]] = {root: (b"", ())}
    stack = [(root, _freeze(start))]
    transitions = ends = 0
    while stack:
        mark, frozen = stack.pop()
        state = _thaw(scenario, frozen)
        actions = state.actions()
        try:
            if not actions:
                ends += 1
                checkers.after_all(state.world)
            for index, action in enumerate(actions):
                if index:
                    _forget(state)
                    state = _thaw(scenario, frozen)
                transitions += 1
                touched = _apply(state, action)
                child = fingerprint(state)
                if child not in parents:
                    for process in touched:
                        checkers.books(process)
                    parents[child] = (mark, action)
                    stack.append((child, _freeze(state)))
        except InvariantError as violation:
            path = [action] if actions else []
            while mark != root:
                mark, action = parents[mark]
                path.append(action)
            raise CounterexampleError(violation, _replay(scenario, table, path[::-1])) from violation
        finally:
            _forget(state)
    return Explored(len(parents), transitions, ends)


def _freeze(state: State) -> bytes:
    """Pickle a state without the stories of its cores: the transcript of a counterexample is made afresh, with them."""
    frozen = io.BytesIO()
    pickler = pickle.Pickler(frozen, 5)
    pickler.dispatch_table = copyreg.dispatch_table | {FlightRecorder: lambda recorder: (FlightRecorder, ())}
    pickler.dump(state)
    return frozen.getvalue()


def _thaw(scenario: Scenario, frozen: bytes) -> State:
    state: State = pickle.loads(frozen)
    state.scenario = scenario
    return state


def _forget(state: State) -> None:
    for thread in state.threads:
        if thread.execution is not None:
            thread.execution.obligation.token = None
    state.world.forget()


def _apply(state: State, action: Action) -> list[Participant]:
    try:
        return state.apply(action)
    except (KeyError, AttributeError, ValueError, InternalError) as error:
        raise InvariantError(f"the core raised {type(error).__name__}: {checkers.readable(str(error))}") from error


def _replay(scenario: Scenario, table: type[OwnershipTable], path: list[Action]) -> list[str]:
    state = State(scenario, table, recording=True)
    try:
        for action in path:
            for process in _apply(state, action):
                checkers.books(process)
    except InvariantError:
        pass
    assert state.world.log is not None
    return state.world.log + checkers.stories(state.world)
