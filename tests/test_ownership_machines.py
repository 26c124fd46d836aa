"""Several ownership tables, connected by queues that hypothesis delivers in any order.

Theory of operation. Each process has a table; each ordered pair of processes has a queue, because
messages between two processes keep their order and nothing else does. `Process` follows the protocol as the runtime's shell
does: the submitter pins a task's arguments until the reply, the worker's reply waits until its registrations are
acknowledged, refs inside results are handed on, readers of a container pin it while they register what is inside. A
model beside them knows who can still reach what: handles, refs in messages, refs in values that can be reached.

- `SafetyMachine`: without deaths nothing is freed that can be reached, no handle ever sees a failed value, and when all
  handles are gone everything is freed in every table.
- `DeathMachine`: with deaths values may be lost, but nobody waits for ever and the survivors' tables end empty.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from afield.runtime.cores.objects import FAILED, LOCATED, PENDING, FreeStored, Obligation, Send, Settled
from afield.runtime.cores.ownership import OwnershipTable
from afield.runtime.wire.messages import Add, Added, Location, Part, Release, Subscribe, Took, Value

PLACE = Location([Part(0, 0, 64)])


def effects_of(table: OwnershipTable) -> list[Any]:
    """Take the effects."""
    effects, table.effects = table.effects, []
    return effects


@dataclass
class Push:
    """A task on its way: `refs` are nested in its arguments."""

    sequence: int
    output: bytes
    refs: list[tuple[bytes, bytes]]


@dataclass
class Reply:
    """Its result, a stored value that contains `refs`."""

    sequence: int
    refs: list[tuple[bytes, bytes]]


@dataclass
class Running:
    """A task at its worker."""

    push: Push
    submitter: bytes
    obligation: Obligation
    handles: Counter[bytes] = field(default_factory=Counter)


@dataclass
class Submitted:
    """A task at its submitter."""

    output: bytes
    pinned: list[bytes]
    worker: bytes


class Process:
    """The protocol's shell around one table."""

    def __init__(self, name: bytes, world: World) -> None:
        self.name = name
        self.world = world
        self.table = OwnershipTable(name, lambda owner: b"owner died: " + owner)
        self.handles: Counter[bytes] = Counter()
        self.views: Counter[bytes] = Counter()
        self.running: list[Running] = []
        self.submitted: dict[int, Submitted] = {}
        self.waits: list[list[bool]] = []
        self.seen: list[bytes] = []  # waited for, and there: the handles of those who waited go

    def execute(self) -> None:
        """Let go of what was waited for, and execute the table's effects."""
        while self.seen:
            self.table.drop(self.seen.pop())
        while self.table.effects:
            for effect in effects_of(self.table):
                if isinstance(effect, Send):
                    self.world.send(self.name, effect.to, effect.message)
                elif isinstance(effect, FreeStored):
                    self.world.freed(effect.object_id)
                elif isinstance(effect, Settled):
                    to, reply = effect.token
                    self.world.send(self.name, to, reply)
                else:
                    raise AssertionError(effect)

    def owner_of(self, oid: bytes) -> bytes:
        """Return whom the table names as the owner."""
        return self.table.entries[oid].owner or self.name

    def put(self, refs: list[bytes]) -> None:
        """Make an object whose value contains refs."""
        oid = self.world.new_object(self.name, refs)
        self.table.put(oid, LOCATED, PLACE, refs)
        self.handles[oid] += 1

    def submit(self, worker: bytes, refs: list[bytes]) -> None:
        """Push a task with refs nested in its arguments."""
        output = self.world.new_object(self.name, None)
        sequence = next(self.world.sequences)
        self.table.own(output, sequence)
        self.handles[output] += 1
        for oid in refs:
            self.table.pin(oid)
        self.submitted[sequence] = Submitted(output, refs, worker)
        self.world.send(self.name, worker, Push(sequence, output, [(oid, self.owner_of(oid)) for oid in refs]))

    def start(self, submitter: bytes, push: Push) -> None:
        """Unpickle a task's arguments."""
        task = Running(push, submitter, Obligation())
        for oid, owner in push.refs:
            self.table.receive(oid, owner, task.obligation)
            task.handles[oid] += 1
        self.running.append(task)

    def finish(self, task: Running, keep: list[bytes], give: list[bytes]) -> None:
        """End a task: keep some of its refs in this process and return some."""
        self.running.remove(task)
        for oid in keep:
            task.handles[oid] -= 1
            self.handles[oid] += 1
        refs = self.table.hand_on(task.submitter, task.push.sequence, give) if give else []
        self.world.contents[task.push.output] = give
        for oid in task.handles.elements():
            self.table.drop(oid)
        reply = Reply(task.push.sequence, refs)
        if task.obligation.remaining:
            task.obligation.token = (task.submitter, reply)
        else:
            self.world.send(self.name, task.submitter, reply)

    def outcome(self, worker: bytes, reply: Reply) -> None:
        """Take a task's result."""
        task = self.submitted.pop(reply.sequence, None)
        if task is None:
            return
        contained = self.table.receive_contained(reply.refs, worker, reply.sequence) if reply.refs else []
        self.table.fulfil(task.output, LOCATED, PLACE, contained)
        for oid in task.pinned:
            self.table.unpin(oid)

    def worker_died(self, worker: bytes) -> None:
        """Fail what was on its way to a dead worker."""
        for sequence, task in list(self.submitted.items()):
            if task.worker == worker:
                del self.submitted[sequence]
                self.table.fulfil(task.output, FAILED, b"worker died")
                for oid in task.pinned:
                    self.table.unpin(oid)

    def read(self, oid: bytes) -> None:
        """Get a value: map it, and unpickle the refs inside; or begin to wait for it."""
        entry = self.table.entries[oid]
        if entry.state == PENDING:
            wait = [False]
            self.waits.append(wait)
            entry.handles += 1  # whoever waits has a ref until he has seen the value
            self.table.when_done(oid, lambda: self.saw(wait, oid))
        elif entry.state == LOCATED:
            entry.handles += 1
            self.views[oid] += 1
            for inner in self.world.contents[oid] or ():
                self.table.receive(inner, self.world.owners[inner], Obligation(container=oid))
                self.handles[inner] += 1

    def saw(self, wait: list[bool], oid: bytes) -> None:
        """What was waited for is there."""
        wait[0] = True
        self.seen.append(oid)

    def drop(self, held: Counter[bytes], oid: bytes) -> None:
        """Let go of a handle or of a view."""
        held[oid] -= 1
        if not held[oid]:
            del held[oid]
        self.table.drop(oid)

    def receive(self, peer: bytes, message: Any) -> None:
        """Handle one message, as the runtime's handlers do."""
        table = self.table
        kind = type(message)
        if kind is Push:
            self.start(peer, message)
        elif kind is Reply:
            self.outcome(peer, message)
        elif kind is Add:
            table.on_add(peer, message)
        elif kind is Added:
            table.on_added(message)
        elif kind is Release:
            table.on_release(peer, message.object_id)
        elif kind is Subscribe:
            table.on_subscribe(peer, message.object_id)
        elif kind is Value:
            table.on_value(message)
        elif kind is Took:
            table.on_took(peer, message.sequence)
        else:
            raise AssertionError(message)


class World:
    """All processes, what is on its way, and the model of what can be reached."""

    def __init__(self, count: int) -> None:
        self.processes = {name: Process(name, self) for name in (b"P%d" % i for i in range(count))}
        self.queues: dict[tuple[bytes, bytes], deque[Any]] = {}
        self.sequences = itertools.count(1)
        self.owners: dict[bytes, bytes] = {}
        self.contents: dict[bytes, list[bytes] | None] = {}  # None until the task has returned
        self.gone: set[bytes] = set()
        self.lossy = False

    def new_object(self, owner: bytes, refs: list[bytes] | None) -> bytes:
        """Name a new object."""
        oid = b"object %d" % len(self.owners)
        self.owners[oid] = owner
        self.contents[oid] = refs
        return oid

    def send(self, sender: bytes, to: bytes, message: Any) -> None:
        """Put a message into its queue."""
        if to in self.processes:
            self.queues.setdefault((sender, to), deque()).append(message)

    def deliver(self, pair: tuple[bytes, bytes]) -> None:
        """Deliver the oldest message of a queue."""
        queue = self.queues[pair]
        message = queue.popleft()
        if not queue:
            del self.queues[pair]
        receiver = self.processes[pair[1]]
        receiver.receive(pair[0], message)
        receiver.execute()

    def roots(self) -> Iterator[bytes]:
        """Yield what somebody holds directly."""
        for process in self.processes.values():
            yield from process.handles
            yield from process.views
            for task in process.running:
                yield from (+task.handles)
        for queue in self.queues.values():
            for message in queue:
                if isinstance(message, Push | Reply):
                    yield from (oid for oid, _ in message.refs)

    def reachable(self, start: Iterable[bytes]) -> set[bytes]:
        """Return everything that can be reached from somewhere."""
        found: set[bytes] = set()
        todo = list(start)
        while todo:
            oid = todo.pop()
            if oid not in found:
                found.add(oid)
                todo += self.contents[oid] or ()
        return found

    def freed(self, oid: bytes) -> None:
        """A stored value was freed: nobody may be able to reach it."""
        assert oid not in self.gone, f"{oid!r} was freed twice"
        self.gone.add(oid)
        if not self.lossy:
            assert oid not in self.reachable(self.roots()), f"{oid!r} was freed and can still be reached"


class Machine(RuleBasedStateMachine):
    """What processes do."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(3)

    def process(self, data: st.DataObject) -> Process:
        """Choose a process."""
        return data.draw(st.sampled_from(list(self.world.processes.values())))

    def some(self, data: st.DataObject, held: Counter[bytes]) -> list[bytes]:
        """Choose some of what is held, without repetition."""
        return data.draw(st.lists(st.sampled_from(sorted(held)), max_size=3, unique=True)) if held else []

    @rule(data=st.data())
    def put(self, data: st.DataObject) -> None:
        process = self.process(data)
        process.put(self.some(data, process.handles))
        process.execute()

    @rule(data=st.data())
    def submit(self, data: st.DataObject) -> None:
        process = self.process(data)
        others = [name for name in self.world.processes if name != process.name]
        if others:
            process.submit(data.draw(st.sampled_from(others)), self.some(data, process.handles))
            process.execute()

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        process = self.process(data)
        if not process.running:
            return
        task = data.draw(st.sampled_from(process.running))
        keep = self.some(data, task.handles)
        # A task can return what it was given, and what its process kept from earlier ones or made itself. Values that
        # contain one another in a ring are never freed, which is the price of counting; the model makes none.
        fine = [oid for oid in [*task.handles, *process.handles] if task.push.output not in self.world.reachable([oid])]
        give = self.some(data, Counter(fine))
        process.finish(task, keep, give)
        process.execute()

    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        process = self.process(data)
        if process.handles:
            process.read(data.draw(st.sampled_from(sorted(process.handles))))
            process.execute()

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        process = self.process(data)
        held = data.draw(st.sampled_from([process.handles, process.views]))
        if held:
            process.drop(held, data.draw(st.sampled_from(sorted(held))))
            process.execute()

    @precondition(lambda self: self.world.queues)
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        for _ in range(data.draw(st.integers(1, 4))):
            if self.world.queues:
                self.world.deliver(data.draw(st.sampled_from(sorted(self.world.queues))))

    def settle(self) -> None:
        """Deliver everything, end all tasks, until nothing happens any more."""
        world = self.world
        while world.queues or any(process.running for process in world.processes.values()):
            while world.queues:
                world.deliver(next(iter(world.queues)))
            for process in world.processes.values():
                for task in list(process.running):
                    give = [oid for oid in +task.handles if task.push.output not in world.reachable([oid])]
                    process.finish(task, [], give[:1])
                    process.execute()

    def drop_everything(self) -> None:
        """Let go of all handles and views."""
        for process in self.world.processes.values():
            for held in (process.handles, process.views):
                for oid in list(held.elements()):
                    process.drop(held, oid)
            process.execute()

    def assert_empty(self) -> None:
        """Nothing is left in any table."""
        for process in self.world.processes.values():
            table = process.table
            assert not table.entries, table.entries
            assert not table._awaiting and not table._transit and not table._borrowed_from
            assert not any(table._lent_to.values())


class SafetyMachine(Machine):
    """Nothing that can be reached is freed, and everything else is."""

    @invariant()
    def no_handle_has_failed(self) -> None:
        for process in self.world.processes.values():
            for oid in [*process.handles, *process.views]:
                assert process.table.entries[oid].state != FAILED, oid
                assert oid not in self.world.gone

    def teardown(self) -> None:
        self.settle()
        self.no_handle_has_failed()
        for process in self.world.processes.values():
            assert all(done for (done,) in process.waits), "somebody waits for ever"
            for oid in list(process.handles):
                process.read(oid)
                process.execute()
        self.settle()
        self.no_handle_has_failed()
        self.drop_everything()
        self.settle()
        self.assert_empty()
        assert self.world.gone == set(self.world.owners), "something was never freed"


class DeathMachine(Machine):
    """Processes die at any moment; P0, the driver, stays."""

    def __init__(self) -> None:
        super().__init__()
        self.world.lossy = True
        self.obituaries: list[tuple[bytes, bytes]] = []  # (who is to be told, who died)

    @precondition(lambda self: len(self.world.processes) > 1)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        world = self.world
        victim = data.draw(st.sampled_from(sorted(world.processes)[1:]))
        del world.processes[victim]
        for pair in list(world.queues):
            if pair[1] == victim:
                del world.queues[pair]
            elif pair[0] == victim:  # what had left it arrives, the rest does not
                queue = world.queues[pair]
                for _ in range(data.draw(st.integers(0, len(queue)))):
                    queue.pop()
                if not queue:
                    del world.queues[pair]
        self.obituaries += [(name, victim) for name in world.processes]

    @precondition(lambda self: self.obituaries)
    @rule(data=st.data())
    def tell(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.obituaries) - 1))
        self._tell(*self.obituaries.pop(at))

    def _tell(self, name: bytes, victim: bytes) -> None:
        process = self.world.processes.get(name)
        if process is not None:
            process.table.on_peer_died(victim)
            process.worker_died(victim)
            # What a dead submitter sent is not worth running.
            for task in [task for task in process.running if task.submitter == victim]:
                process.running.remove(task)
                for oid in task.handles.elements():
                    process.table.drop(oid)
            process.execute()

    def teardown(self) -> None:
        while self.obituaries:
            self._tell(*self.obituaries.pop())
        self.settle()
        for process in self.world.processes.values():
            assert all(done for (done,) in process.waits), "somebody waits for ever"
        self.drop_everything()
        self.settle()
        self.assert_empty()


SafetyMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
DeathMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestSafety = pytest.mark.slow(6)(SafetyMachine.TestCase)
TestDeath = pytest.mark.slow(6)(DeathMachine.TestCase)
