"""One seed: random programs in simulated processes, random delays, and (with `faults`) deaths, (with `losses`) lost values.

Theory of operation. One thread takes events off one heap of (time, sequence, event). An event touches one process: a message
arrives, the program does something, a task starts or returns, a get goes on, a death becomes known. After each one `checkers`
look at that process. After the given number of steps the programs and the faults stop; everything must come to rest, every
ref that is left is read once more, all is dropped, and nothing may be left.

Every choice comes from one `random.Random(seed)`, and neither clocks nor the order of hashes have a say, so that a seed
replays on any machine: a run that failed is run again with a transcript.
"""

from __future__ import annotations

import heapq
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from afield.errors import InternalError
from afield.runtime.cores.lineage import Lineage
from afield.runtime.cores.lineage_records import RECORD_BYTES
from afield.runtime.cores.objects import FAILED, INLINE, LOCATED
from afield.runtime.cores.ownership import OwnershipTable
from afield.runtime.wire import messages
from tests.sim import checkers
from tests.sim.network import REPEATABLE, RESENDABLE, Network, Pair
from tests.sim.participant import Execution, Get, Outcome, Participant, Task
from tests.sim.values import InvariantError
from tests.sim.world import World

#: No run lets more processes die: ids have one digit.
MAX_DEATHS = 4
#: Settling takes a few events for each object; more is a livelock.
MAX_SETTLING_EVENTS = 20_000

#: A direction between two processes is this much slower or faster than others, so that short cuts win races.
SLOWNESS = (0.1, 0.5, 1.0, 10.0)
#: After each so many events the cores check themselves, and at rest; in a run with a transcript, after each one.
VALIDATE_EVERY = 8
DUPLICATES = 0.05
DEATHS = 0.008
LOSSES = 0.08
#: How often tasks may run again; what lineage may keep in a process, in bytes.
LEFT = (0, 1, 3, 3, -1)
LINEAGE_BYTES = (3 * RECORD_BYTES, 10 * RECORD_BYTES, 1 << 30)

Event = tuple[Callable[..., Participant | None], tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run did. `digest` is equal for equal runs."""

    events: int
    messages: int
    objects: int
    freed: int
    excused: int
    deaths: int
    losses: int
    recomputed: int
    given_up: int
    digest: int


class TimedNetwork(Network):
    """Delivers each message after a delay, in order within a channel, and some control messages twice."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__()
        self._simulation = simulation
        self._last: dict[Pair, float] = {}
        self._slowness: dict[Pair, float] = {}
        self.sent = 0

    def send(self, source: bytes, target: bytes, message: Any) -> None:
        """Append to the channel and schedule the delivery of its then oldest message."""
        self._enqueue(source, target, message)
        simulation = self._simulation
        if simulation.random.random() < DUPLICATES:
            if isinstance(message, REPEATABLE):
                self._enqueue(source, target, message)
            elif isinstance(message, RESENDABLE):
                simulation.after(simulation.delay() * 3, simulation.resend, source, target, message)

    def _enqueue(self, source: bytes, target: bytes, message: Any) -> None:
        super().send(source, target, message)
        self.sent += 1
        simulation = self._simulation
        pair = (source, target)
        if pair not in self._slowness:
            self._slowness[pair] = simulation.random.choice(SLOWNESS)
        due = max(self._last.get(pair, 0.0), simulation.now + simulation.delay() * self._slowness[pair])
        self._last[pair] = due
        simulation.at(due, simulation.deliver, source, target)

    def resend(self, source: bytes, target: bytes, message: Any) -> None:
        """Append a copy."""
        self._enqueue(source, target, message)


class Simulation:
    """One run.

    Args:
        seed: of every choice.
        processes: how many there are at first.
        faults: whether processes die.
        losses: whether the store loses values.
        table: the core under test.
        lineage: the core beside it.
        recording: whether to keep a transcript.
    """

    def __init__(
        self,
        seed: int,
        *,
        processes: int = 3,
        faults: bool = False,
        losses: bool = False,
        table: type[OwnershipTable] = OwnershipTable,
        lineage: type[Lineage] = Lineage,
        recording: bool = False,
    ) -> None:
        self.random = random.Random(seed)
        self.faults = faults
        self.losses = losses
        self.lost = 0
        self.now = 0.0
        self.events = 0
        self.digest = 0
        self.running = True
        self.validate_every = 1 if recording else VALIDATE_EVERY
        limit = self.random.choice(LINEAGE_BYTES) if losses else LINEAGE_BYTES[-1]
        self.world = World(table, lineage=lineage, recording=recording, lineage_bytes=limit)
        self.network = TimedNetwork(self)
        self.world.network = self.network
        self.world.on_ready = self._on_ready
        self.world.on_emptied = lambda object_id: checkers.on_emptied(self.world, object_id)
        self.world.retarget = self._retarget
        self._heap: list[tuple[float, int, Event]] = []
        self._scheduled = 0
        self._named = 0
        self._inside: dict[bytes, list[bytes]] = {}  # also of results that are still on their way
        self._made_from: dict[bytes, list[bytes]] = {}  # output -> arguments, which lineage may hold
        # Each seed has habits of its own: what is rare in the average program is common in some.
        choose = self.random.choice
        self._forgetful = choose((0.2, 0.6, 0.95))
        self._most_handles = choose((1, 2, 4, 8))
        self._inside_most = choose((1, 1, 2))
        self._weights = [weight * choose((0.2, 1.0, 3.0)) for weight in _WEIGHTS]
        for _ in range(processes):
            self._add()

    # -- the heap ------------------------------------------------------------------------------------------------

    def at(self, time: float, action: Callable[..., Participant | None], *args: Any) -> None:
        """Schedule an event."""
        self._scheduled += 1
        heapq.heappush(self._heap, (time, self._scheduled, (action, args)))

    def after(self, delay: float, action: Callable[..., Participant | None], *args: Any) -> None:
        """Schedule an event relative to now."""
        self.at(self.now + delay, action, *args)

    def delay(self) -> float:
        """Return how long a message takes: mostly little, at times so long that much else happens first."""
        draw = self.random.random()
        if draw < 0.7:
            return 0.1 + draw
        return 1.0 + draw * (5.0 if draw < 0.92 else 40.0)

    def step(self) -> bool:
        """Execute the next event and check what it did; False if there is none.

        Raises:
            InvariantError: an invariant does not hold.
        """
        if not self._heap:
            return False
        self.now, _, (action, args) = heapq.heappop(self._heap)
        try:
            touched = action(*args)
        except (KeyError, AttributeError, ValueError, InternalError) as error:
            raise InvariantError(f"the core raised {type(error).__name__}: {checkers.readable(str(error))}") from error
        if touched is not None and touched.name in self.world.processes:
            self.events += 1
            self.digest = zlib.crc32(b"%d %s %d" % (self.now * 1e6, touched.name, len(touched.handles)), self.digest)
            checkers.after_event(self.world, touched)
            if self.events % self.validate_every == 0:
                checkers.books(touched)
        return True

    def run(self, steps: int) -> Summary:
        """Run `steps` events, let everything come to rest, drop all, and check that nothing is left.

        Raises:
            InvariantError: an invariant does not hold; its notes are the last transitions of the cores.
        """
        try:
            return self._run(steps)
        except InvariantError as violation:
            for line in checkers.stories(self.world):
                violation.add_note(line)
            raise

    def _run(self, steps: int) -> Summary:
        while self.events < steps and self.step():
            pass
        self.running = False
        self._note(b"--", "the programs stop")
        self._settle()
        for process in self.world.processes.values():
            for object_id in list(process.handles):
                process.get(object_id)
        self._settle()
        self._note(b"--", "everything is dropped")
        for process in self.world.processes.values():
            process.let_go()
        self._settle()
        checkers.after_all(self.world)
        world = self.world
        objects = sum(process._objects for process in world.processes.values())
        return Summary(
            self.events,
            self.network.sent,
            objects,
            objects - sum(len(process.owned) for process in world.processes.values()),
            len(world.excused),
            len(world.dead),
            self.lost,
            sum(process.recomputed for process in world.processes.values()),
            world.given_up,
            self.digest,
        )

    def _settle(self) -> None:
        limit = self.events + MAX_SETTLING_EVENTS
        busy = True
        while busy:
            for process in self.world.processes.values():
                process.drain()
                checkers.after_event(self.world, process)
                checkers.books(process)
            busy = False
            while self.step():
                busy = True
                if self.events > limit:
                    raise InvariantError("the run does not come to rest")
        checkers.at_rest(self.world)

    def _note(self, who: bytes, text: str) -> None:
        if self.world.log is not None:
            self.world.note(who, f"[{self.now:.2f}] {text}")

    # -- events of the network and of tasks ----------------------------------------------------------------------

    def _alive(self, process: Participant) -> bool:
        return process.name in self.world.processes

    def deliver(self, source: bytes, target: bytes) -> Participant | None:
        """The oldest message of a channel arrives."""
        process = self.world.processes.get(target)
        message = self.network.take(source, target)
        if process is None or message is None:
            return None
        process.deliver(source, message)
        if isinstance(message, messages.Push):
            self.after(self.delay(), self._begin, process)
        return process

    def resend(self, source: bytes, target: bytes, message: Any) -> None:
        """A copy of a message is sent."""
        if source in self.world.processes and target in self.world.processes:
            self.network.resend(source, target, message)

    def _begin(self, process: Participant) -> Participant | None:
        if not self._alive(process):
            return None
        process.drain()
        execution = process.begin()
        if execution is None:
            return process
        self._note(process.name, f"starts task {execution.push.task_id!r}")
        while execution.todo:
            process.unpickle_next(execution)
        if execution.refs and self.running and self.random.random() < 0.4:
            self._submit_with(process, [], self._some(execution.refs, 2))
        self.after(self.delay() * 2, self._finish, process, execution)
        return process

    def _finish(self, process: Participant, execution: Execution) -> Participant | None:
        if not self._alive(process):
            return None
        choose = self.random
        outcomes: list[Outcome] = []
        for output in process.outputs_of(execution):
            kind = choose.choices((INLINE, LOCATED, FAILED), (2, 8, 1) if self.losses else (6, 3, 1))[0]
            at_hand = [
                object_id for object_id in execution.refs + process.handles if not self._reaches(object_id, output)
            ]
            inside = self._some(at_hand, self._inside_most)
            self._inside[output] = [*self._inside.get(output, ()), *inside]  # those of earlier executions stay
            outcomes.append((kind, inside))
        keep = [object_id for object_id in execution.refs if choose.random() < 0.3]
        self._note(process.name, f"task {execution.push.task_id!r} returns {outcomes!r} and keeps {keep!r}")
        process.finish(execution, outcomes, keep, views=choose.random() < 0.3)
        if keep and self.running and choose.random() < 0.5:
            process.get(keep[0])
        if choose.random() < 0.7:
            process.drain()
        return process

    def _reaches(self, object_id: bytes, goal: bytes) -> bool:
        """Say whether `goal` is inside an object, or it was made from it: what held itself would not be freed by counting."""
        stack, seen = [object_id], {object_id}
        while stack:
            held = stack.pop()
            for inner in [*self._inside.get(held, ()), *self._made_from.get(held, ())]:
                if inner not in seen:
                    seen.add(inner)
                    stack.append(inner)
        return goal in seen

    def _on_ready(self, get: Get) -> None:
        self.after(self.delay() * 0.3, self._resume, get)

    def _resume(self, get: Get) -> Participant | None:
        process = get.participant
        if not self._alive(process) or get not in process.gets:
            return None
        self._note(process.name, f"reads {get.object_id!r}")
        if process.finish_get(get, view=self.random.random() < 0.3) is None:
            return process
        self._let_go(process, {get.object_id})
        if self.random.random() < 0.7:
            process.drain()
        return process

    # -- events of the programs ----------------------------------------------------------------------------------

    def _some(self, object_ids: list[bytes], most: int) -> list[bytes]:
        count = min(max(0, self.random.randint(-1, most)), len(object_ids))
        return self.random.sample(object_ids, count)

    def _act(self, process: Participant) -> Participant | None:
        if not self.running or not self._alive(process):
            return None
        self.after(self.random.uniform(0.2, 2.0), self._act, process)
        if self.faults and self.random.random() < DEATHS and self._kill(process):
            return None
        if self.losses and self.random.random() < LOSSES:
            self._lose()
        if self.random.random() < 0.8:
            process.drain()
        while len(process.handles) > self._most_handles:
            self._drop(process)
        self.random.choices(_ACTIONS, self._weights)[0](self, process)
        return process

    def _put(self, process: Participant) -> None:
        inside = self._some(process.handles, self._inside_most)
        object_id = process.put(inside, stored=self.random.random() < 0.4)
        self._inside[object_id] = inside
        self._note(process.name, f"puts {object_id!r} with {inside!r} inside")
        self._let_go(process, set(inside))

    def _submit(self, process: Participant) -> None:
        self._submit_with(process, self._some(process.handles, 2), self._some(process.handles, 2))

    def _submit_with(self, process: Participant, dependencies: list[bytes], nested: list[bytes]) -> None:
        target = self._target(process)
        if target is None:
            return
        returns = self.random.choice((1, 1, 2))
        stored = self.random.random() < 0.2
        self._note(process.name, f"submits to {target!r} with {dependencies!r} and, nested, {nested!r}")
        left = self.random.choice(LEFT) if self.losses else 0
        for output in process.submit(target, dependencies, nested, returns=returns, stored=stored, left=left):
            self._made_from[output] = [*dependencies, *nested] if left else []
        if self.random.random() < self._forgetful / 2:
            self._note(process.name, f"submits to {target!r} with the same arguments again")
            process.submit(target, dependencies, nested)
        self._let_go(process, {*dependencies, *nested})

    def _let_go(self, process: Participant, object_ids: set[bytes]) -> None:
        """At times a program that passed something on has no more use for it."""
        if self.random.random() < self._forgetful:
            for object_id in [object_id for object_id in process.handles if object_id in object_ids]:
                self._note(process.name, f"drops {object_id!r}")
                process.drop(object_id)

    def _target(self, process: Participant) -> bytes | None:
        names = [*self.world.processes, *self.world.dead]
        others = [name for name in names if name != process.name and name not in process.known_dead]
        return self.random.choice(others) if others else None

    def _retarget(self, process: Participant, task: Task) -> bytes | None:
        return self._target(process) if self.random.random() < 0.5 else None

    def _get(self, process: Participant) -> None:
        if process.handles:
            get = process.get(self.random.choice(process.handles))
            self._note(process.name, f"gets {get.object_id!r}")

    def _give_up(self, process: Participant) -> None:
        if process.gets:
            get = self.random.choice(process.gets)
            self._note(process.name, f"gives up the get of {get.object_id!r}")
            process.give_up(get)

    def _drop(self, process: Participant) -> None:
        if process.handles:
            object_id = self.random.choice(process.handles)
            self._note(process.name, f"drops {object_id!r}")
            process.drop(object_id)

    def _drop_view(self, process: Participant) -> None:
        if process.views:
            object_id = process.views.pop(self.random.randrange(len(process.views)))
            self._note(process.name, f"drops an array in {object_id!r}")
            process.dropped.append(object_id)

    def _pickle(self, process: Participant) -> None:
        if process.handles:
            object_id = self.random.choice(process.handles)
            self._note(process.name, f"pickles {object_id!r} out of band")
            process.pickle(object_id)

    def _unpickle(self, process: Participant) -> None:
        if self.world.pickles:
            object_id, _ = self.random.choice(self.world.pickles)
            self._note(process.name, f"unpickles {object_id!r} from out of band")
            process.unpickle(object_id)

    def _begin_life(self, process: Participant) -> None:
        self._note(process.name, f"creates an actor, whose life is {process.begin_life()!r}")

    def _lose(self) -> None:
        """The store loses a value, at times just when it was made."""
        losable = self.world.losable()
        if losable:
            self.lost += 1
            self.world.lose(losable[-1] if self.random.random() < 0.3 else self.random.choice(losable))

    # -- life and death ------------------------------------------------------------------------------------------

    def _add(self) -> None:
        process = self.world.add(b"p%d" % self._named)
        self._named += 1
        self.after(self.random.random(), self._act, process)
        for dead in self.world.dead:
            self.after(self.delay(), self._hear, process, dead)

    def _kill(self, process: Participant) -> bool:
        world = self.world
        if len(world.dead) == MAX_DEATHS or len(world.processes) == 1:
            return False
        self._note(process.name, "dies")
        world.kill(process.name)
        for other in world.processes.values():
            channel = self.network.channels.get((process.name, other.name), ())
            self.network.lose(process.name, other.name, self.random.randint(0, len(channel)))
            self.after(self.delay(), self._hear, other, process.name)
        if len(world.processes) == 1 or self.random.random() < 0.7:
            self._add()
        return True

    def _hear(self, process: Participant, dead: bytes) -> Participant | None:
        if not self._alive(process):
            return None
        process.peer_died(dead)
        return process


_ACTIONS: tuple[Callable[[Simulation, Participant], None], ...] = (
    Simulation._put,
    Simulation._submit,
    Simulation._get,
    Simulation._drop,
    Simulation._drop_view,
    Simulation._give_up,
    Simulation._pickle,
    Simulation._unpickle,
    Simulation._begin_life,
)
_WEIGHTS = (20, 35, 25, 25, 6, 3, 1, 1, 2)
