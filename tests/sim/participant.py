"""A simulated process around the real ownership core: a model of the shell, without sockets, pickles or threads.

Theory of operation. A `Participant` has an `OwnershipTable` and does what `runtime` does around it: it pins the arguments of
a task until the reply (`arguments`, `submission`), lets a reply wait for the registrations of what came with the task
(`executor`), hands on the refs in a result (`invocation`), carries refs out of containers with an obligation (`values`), and
executes effects in order (`process`), and runs tasks again whose results were lost (`recovery`).

Its program is whoever calls its methods: a seed in `simulate`, a script in
`explore`. Handles that the program drops wait in `dropped` until `drain`, as they do behind `ObjectRef.__del__`.

Everything here can be pickled, which is how the explorer copies states; time, delays and choices are the driver's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from afield.runtime.cores.lineage_records import Loss, Record
from afield.runtime.cores.objects import (
    FAILED,
    FREED,
    INLINE,
    LOCATED,
    PENDING,
    Entry,
    FreeStored,
    LifeEnded,
    Obligation,
    Recompute,
    Send,
    Settled,
    Spare,
)
from afield.runtime.wire import messages
from tests.sim.values import (
    NODE,
    InvariantError,
    LostError,
    Ref,
    decode,
    encode,
    lost,
    object_at,
    owner_of,
    show,
    show_id,
)

if TYPE_CHECKING:
    from tests.sim.world import World

#: What a task's output becomes: (INLINE, LOCATED or FAILED, the refs inside).
Outcome = tuple[int, Sequence[bytes]]

OUTPUTS = (b"r", b"s")
#: A push's `function` is BODY * (what the task does) + (how many outputs it has).
BODY = 4
TASK_FAILED = b"!the task failed"
WORKER_DIED = b"!the worker died"
VALUE_LOST = b"!the value is lost"


@dataclass(slots=True, eq=False)
class Task:
    """A submitted task, kept until its outcome is known."""

    task_id: bytes
    target: bytes
    function: int
    outputs: list[bytes]
    arguments: bytes
    location: messages.Location | None
    dependencies: list[bytes]
    pinned: list[bytes]
    left: int = 0  # how often it may run again after a loss
    unresolved: int = 0
    rounds: int = 0


@dataclass(slots=True, eq=False)
class Resolved:
    """Called for each top-level argument that is there."""

    participant: Participant
    task: Task

    def __call__(self) -> None:
        self.task.unresolved -= 1
        if not self.task.unresolved:
            self.participant.resolved(self.task)


@dataclass(slots=True, eq=False)
class Get:
    """A get that waits. It holds the handle that it was called with."""

    participant: Participant
    object_id: bytes
    ready: bool = False

    def __call__(self) -> None:
        self.ready = True
        self.participant.world.on_ready(self)


@dataclass(slots=True, eq=False)
class Execution:
    """A task that runs: refs that came with it, refs still to be unpickled, and the stored values that it reads in place."""

    submitter: bytes
    push: messages.Push
    obligation: Obligation = field(default_factory=Obligation)
    todo: list[Ref] = field(default_factory=list)
    refs: list[bytes] = field(default_factory=list)
    views: list[bytes] = field(default_factory=list)
    reply: messages.ReplyMany | None = None


class Participant:
    """One process: its table, and what the shell and the program keep."""

    def __init__(self, world: World, name: bytes) -> None:
        self.world = world
        self.name = name
        self.table = world.table(name, lost)
        self.handles: list[bytes] = []  # the program's variables and an actor's state
        self.views: list[bytes] = []  # arrays that lie in stored values
        self.pickled: list[bytes] = []
        self.dropped: list[bytes] = []
        self.gets: list[Get] = []
        self.waiting: list[Task] = []  # for their arguments
        self.inflight: dict[int, Task] = {}
        self.queue: list[tuple[bytes, messages.Push]] = []
        self.executions: list[Execution] = []
        self.unsettled: list[Execution] = []  # their replies wait for registrations
        self.handed_on: dict[tuple[bytes, int], list[bytes]] = {}  # until `Took`
        self.owned: set[bytes] = set()  # made here and not freed yet; kept by the checkers
        self.known_dead: set[bytes] = set()
        self.lineage = world.lineage(self.table, world.lineage_bytes, self._explain)
        self.again: dict[bytes, Record] = {}  # tasks that run again
        self.recomputed = 0
        self._objects = 0
        self._sequence = 0
        self._token = 0

    def _new(self, kind: bytes, *others: bytes) -> list[bytes]:
        self._objects += 1
        object_ids = [self.name[1:] + b".%d" % self._objects + each for each in (kind, *others)]
        self.owned.update(object_ids)
        return object_ids

    # -- the shell: effects and messages -------------------------------------------------------------------------

    def run_effects(self) -> None:
        """Execute what the table decided."""
        table = self.table
        while table.effects:
            effects, table.effects = table.effects, []
            for effect in effects:
                if isinstance(effect, Send):
                    self.world.send(self.name, effect.to, effect.message)
                elif isinstance(effect, FreeStored):
                    self._free(effect.object_id)
                elif isinstance(effect, Spare):
                    self.world.set_spare(effect.object_id, effect.spare)
                elif isinstance(effect, Recompute):
                    self._recompute(effect.record)
                elif isinstance(effect, Settled):
                    self.unsettled.remove(effect.token)
                    self.world.send(self.name, effect.token.submitter, effect.token.reply)
                elif not isinstance(effect, LifeEnded):
                    raise InvariantError(f"unknown effect {effect!r}")

    def _free(self, object_id: bytes) -> None:
        self.world.free(object_id)
        entry = self.table.entries.get(object_id)
        if entry is not None and entry.state == FREED:
            self.world.on_emptied(object_id)
            self.world.contents.pop(object_id, None)

    def drain(self) -> None:
        """Tell the table of dropped handles."""
        while self.dropped:
            self.table.drop(self.dropped.pop(0))
        self.run_effects()

    def deliver(self, source: bytes, message: Any) -> None:
        """Handle one message."""
        if self.world.log is not None:
            self.world.note(self.name, f"<- {source.decode()}: {show(message)}")
        table = self.table
        match message:
            case messages.Add():
                table.on_add(source, message)
            case messages.Added():
                table.on_added(message)
            case messages.Release():
                table.on_release(source, message.object_id)
            case messages.Subscribe():
                table.on_subscribe(source, message.object_id)
            case messages.Value():
                table.on_value(message)
            case messages.Took():
                self.handed_on.pop((source, message.sequence), None)
                table.on_took(source, message.sequence)
            case messages.Push():
                self.queue.append((source, message))
            case messages.ReplyMany():
                self._on_reply(source, message)
            case messages.Reply():
                self._on_argument_lost(message)
            case messages.Lost():
                table.on_lost(message)
            case _:
                raise InvariantError(f"unknown message {message!r}")
        self.run_effects()

    def peer_died(self, peer: bytes) -> None:
        """Hear of a death: what the peer was running is run elsewhere or fails."""
        if self.world.log is not None:
            self.world.note(self.name, f"hears that {peer.decode()} died")
        self.known_dead.add(peer)
        self.table.on_peer_died(peer)
        for sequence in [sequence for sequence, task in self.inflight.items() if task.target == peer]:
            task = self.inflight.pop(sequence)
            self.lineage.not_yet(task.outputs)
            self._push(task)
        self.run_effects()

    # -- the submitter -------------------------------------------------------------------------------------------

    def submit(
        self,
        target: bytes,
        dependencies: Sequence[bytes],
        nested: Sequence[bytes],
        *,
        returns: int = 1,
        stored: bool = False,
        body: int = 0,
        left: int = 0,
    ) -> list[bytes]:
        """Submit a task with these top-level and nested refs as arguments; return its outputs, each with a handle."""
        outputs = self._new(*OUTPUTS[:returns])
        pinned = [*dependencies, *nested]
        task = Task(
            outputs[0], target, body * BODY + returns, outputs, encode(nested), None, list(dependencies), pinned, left
        )
        if stored:
            self._store_arguments(task, nested)
        for object_id in outputs:
            self.table.own(object_id, task)
            self.handles.append(object_id)
        for object_id in pinned:
            self.table.pin(object_id)
        if task.location is not None:
            task.pinned = [object_at(task.location), *pinned]
        self._wait(task)
        self.run_effects()
        return outputs

    def _wait(self, task: Task) -> None:
        """Push a task once its top-level arguments are there."""
        self.waiting.append(task)
        notify = Resolved(self, task)
        task.unresolved = 1
        for object_id in task.dependencies:
            task.unresolved += 1
            if self.table.when_done(object_id, notify):
                task.unresolved -= 1
        notify()

    def _store_arguments(self, task: Task, nested: Sequence[bytes]) -> None:
        [argument] = self._new(b"a")
        task.arguments, task.location = b"", self.world.write(argument, nested)
        self.table.put(argument, LOCATED, task.location)
        self.table.pin(argument)
        self.table.drop(argument)
        self.world.finished(argument, LOCATED, ())

    def resolved(self, task: Task) -> None:
        """The top-level arguments of a task are there."""
        self.waiting.remove(task)
        self._push(task)

    def _push(self, task: Task) -> None:
        stored = [object_at(task.location)] if task.location is not None else []
        for object_id in [*stored, *task.dependencies]:
            entry = self.table.entries[object_id]
            if entry.state == FAILED:  # perhaps only since the task was pushed for the first time
                self.expect_error(object_id)
                self._fail(task, entry.value)
                return
        if any(self.table.entries[object_id].state == PENDING for object_id in task.dependencies):
            self._wait(task)  # it was lost since then
            return
        if task.target in self.known_dead:
            target = self.world.retarget(self, task)
            if target is None:
                self._fail(task, WORKER_DIED)
                return
            task.target = target
        self._sequence += 1
        self.inflight[self._sequence] = task
        dependencies = [self._dependency(object_id) for object_id in task.dependencies]
        push = messages.Push(self._sequence, task.task_id, task.function, task.arguments, task.location, dependencies)
        self.world.send(self.name, task.target, push)

    def _dependency(self, object_id: bytes) -> messages.Dependency:
        entry = self.table.entries[object_id]
        owner = entry.owner or self.name
        if entry.state == LOCATED:
            return messages.Dependency(object_id, owner, LOCATED, b"", entry.value)
        return messages.Dependency(object_id, owner, entry.state, entry.value)

    def _fail(self, task: Task, error: bytes) -> None:
        for object_id in task.outputs:
            self._finished(object_id, FAILED, ())
            self.table.fulfil(object_id, FAILED, error)
        if task.task_id in self.again:
            self._ended(task)
        self._unpin(task)

    def _finished(self, object_id: bytes, kind: int, inside: Sequence[bytes]) -> None:
        entry = self.table.entries.get(object_id)
        if entry is None or entry.state == PENDING:  # another execution makes also what is there already
            self.world.finished(object_id, kind, inside)

    def _unpin(self, task: Task) -> None:
        pinned, task.pinned = task.pinned, []
        for object_id in pinned:
            self.table.unpin(object_id)

    def _on_reply(self, source: bytes, message: messages.ReplyMany) -> None:
        task = self.inflight.pop(message.sequence, None)
        if task is None:
            return
        for object_id, result in zip(task.outputs, message.results, strict=True):
            contained: list[bytes] = []
            if result.contained is not None:
                contained = self.table.receive_contained(result.contained.refs, source, result.contained.token)
            self._finished(object_id, result.kind, contained)
            value = result.location if result.kind == LOCATED else result.data
            self.table.fulfil(object_id, result.kind, value, contained)
        if task.task_id in self.again or any(result.kind == LOCATED for result in message.results):
            self._ended(task)
        self._unpin(task)

    # -- recovery ------------------------------------------------------------------------------------------------

    def _ended(self, task: Task) -> None:
        record = self.again.pop(task.task_id, None)
        if record is not None:
            self.lineage.ended(record, task.outputs)
        else:
            refused = "" if task.left else "once"
            self.lineage.keep(task, task.outputs, task.pinned, left=task.left, refused=refused)

    def _recompute(self, record: Record) -> None:
        task: Task = record.task
        if task.task_id in self.again:
            raise InvariantError(f"{show_id(task.task_id)} is made twice at the same time")
        self.lineage.started(record)
        self.again[task.task_id] = record
        self.recomputed += 1
        task.pinned = list(record.inputs)
        task.rounds = 0
        self._wait(task)

    def _on_argument_lost(self, message: messages.Reply) -> None:
        task = self.inflight.pop(message.sequence, None)
        if task is None:
            return
        task.rounds += 1
        for object_id in task.dependencies:
            entry = self.table.entries[object_id]
            if entry.owner and entry.state == LOCATED:
                self.table.lost(object_id)
        if task.rounds > self.world.most_rounds:
            self._fail(task, VALUE_LOST)
        else:
            self._wait(task)

    def _explain(self, object_id: bytes, record: Record | None, why: str, loss: Loss) -> bytes:
        self.world.failed.add(object_id)
        self.world.given_up += 1
        return VALUE_LOST

    def _find_lost(self, object_id: bytes) -> None:
        """A value that we read is lost: what the node has told us before counts, as it answers us on the same channel."""
        while (news := self.world.network.take(NODE, self.name)) is not None:
            self.deliver(NODE, news)
        self.table.lost(object_id)
        self.run_effects()

    # -- the worker ----------------------------------------------------------------------------------------------

    def begin(self) -> Execution | None:
        """Start the oldest task of the queue; its refs are unpickled by `unpickle_next`. None if an argument is lost."""
        submitter, push = self.queue.pop(0)
        try:
            return self._begin(submitter, push)
        except LostError:
            self.world.send(self.name, submitter, messages.Reply(push.sequence, messages.ARGUMENT_LOST, b""))
            return None

    def _begin(self, submitter: bytes, push: messages.Push) -> Execution:
        world = self.world
        excused = submitter not in world.processes
        execution = Execution(submitter, push)
        if push.location is not None:
            execution.todo += world.read(push.location, excused=excused)
            execution.views.append(object_at(push.location))
        else:
            execution.todo += decode(push.arguments)
        for dependency in push.dependencies or ():
            if dependency.location is not None:
                inside = world.read(dependency.location, excused=excused)
                execution.views.append(dependency.object_id)
            else:
                inside = decode(dependency.data)
            if world.unprotected(dependency.object_id):
                world.excuse([object_id for object_id, _ in inside])
            execution.todo += inside
        self.executions.append(execution)
        return execution

    def unpickle_next(self, execution: Execution) -> bytes:
        """Unpickle the next ref among the arguments; return its object."""
        object_id, owner = execution.todo.pop(0)
        self.table.receive(object_id, owner, execution.obligation)
        execution.refs.append(object_id)
        self.run_effects()
        return object_id

    def outputs_of(self, execution: Execution) -> list[bytes]:
        """Return the objects that a running task makes."""
        return [execution.push.task_id[:-1] + kind for kind in OUTPUTS[: execution.push.function % BODY]]

    def finish(self, execution: Execution, outcomes: Sequence[Outcome], keep: Sequence[bytes], *, views: bool) -> None:
        """The task returns. It keeps the refs in `keep` (in an actor's state, say), and with `views` its arrays."""
        self.executions.remove(execution)
        if views:
            for object_id in execution.views:
                self.table.receive(object_id, owner_of(object_id), execution.obligation)
                self.views.append(object_id)
                self.run_effects()
        results = []
        for index, (kind, object_ids) in enumerate(outcomes):
            results.append(self._encode(execution, index, kind, list(object_ids)))
        execution.reply = messages.ReplyMany(execution.push.sequence, results)
        self.handles += keep
        for object_id in keep:
            execution.refs.remove(object_id)
        self.dropped += execution.refs
        execution.refs = []
        if execution.obligation.remaining:
            execution.obligation.token = execution
            self.unsettled.append(execution)
        else:
            self.world.send(self.name, execution.submitter, execution.reply)
        self.run_effects()

    def _encode(self, execution: Execution, index: int, kind: int, object_ids: list[bytes]) -> messages.Result:
        if kind == FAILED:
            return messages.Result(FAILED, TASK_FAILED)
        contained = None
        if object_ids:
            self._token += 1
            refs = self.table.hand_on(execution.submitter, self._token, object_ids)
            contained = messages.Contained(self._token, refs)
            self.handed_on[execution.submitter, self._token] = object_ids
        if kind == INLINE:
            return messages.Result(INLINE, encode(object_ids), None, contained)
        output = self.outputs_of(execution)[index]
        return messages.Result(LOCATED, b"", self.world.write(output, object_ids), contained)

    # -- the program ---------------------------------------------------------------------------------------------

    def put(self, object_ids: Sequence[bytes], *, stored: bool = False) -> bytes:
        """Put a value that contains refs."""
        [object_id] = self._new(b"x")
        value = self.world.write(object_id, object_ids) if stored else encode(object_ids)
        self.table.put(object_id, LOCATED if stored else INLINE, value, object_ids)
        self.world.finished(object_id, LOCATED if stored else INLINE, object_ids)
        self.handles.append(object_id)
        self.run_effects()
        return object_id

    def begin_life(self) -> bytes:
        """Create an actor."""
        [object_id] = self._new(b"l")
        self.table.begin_life(object_id)
        self.world.finished(object_id, INLINE, ())
        self.handles.append(object_id)
        return object_id

    def drop(self, object_id: bytes) -> None:
        """The program loses one handle."""
        self.handles.remove(object_id)
        self.dropped.append(object_id)

    def get(self, object_id: bytes) -> Get:
        """Get a value: wait until it is there; then `finish_get` reads it."""
        self.handles.remove(object_id)
        get = Get(self, object_id)
        self.gets.append(get)
        if self.table.when_done(object_id, get):
            get()
        self.run_effects()
        return get

    def give_up(self, get: Get) -> None:
        """The get times out."""
        self.table.stop_waiting(get.object_id, get)
        self.gets.remove(get)
        self.handles.append(get.object_id)
        self.run_effects()

    def finish_get(self, get: Get, *, view: bool = False) -> list[bytes] | None:
        """Read the value: its refs become handles of the program, and with `view` an array of a stored value lives on.

        Returns None if the value is lost, and the get waits again.
        """
        object_id = get.object_id
        entry = self.table.entries[object_id]
        try:
            refs = self._read(object_id, entry, view)
        except LostError:
            self._find_lost(object_id)
        if entry.state == PENDING:  # lost, perhaps since the get was ready
            get.ready = False
            if self.table.when_done(object_id, get):
                raise InvariantError(f"{show_id(object_id)} is pending and done")
            self.run_effects()
            return None
        self.gets.remove(get)
        self.handles.append(object_id)
        if entry.state == FAILED:
            self.expect_error(object_id)
            return []
        inside = [inner for inner, _ in refs]
        if not object_id.endswith(b"l") and inside != self.world.contents[object_id]:
            raise InvariantError(f"the value of {show_id(object_id)} is not the one that was put")
        if self.world.unprotected(object_id):
            self.world.excuse(inside)
        for inner, owner in refs:
            self.table.receive(inner, owner, Obligation(container=object_id))
            self.handles.append(inner)
            self.run_effects()
        return inside

    def _read(self, object_id: bytes, entry: Entry, view: bool) -> list[Ref]:
        if entry.state == FREED:
            raise InvariantError(f"{show_id(object_id)} is freed while a handle of it lives")
        if entry.state != LOCATED:
            return decode(entry.value) if entry.state == INLINE else []
        refs = self.world.read(entry.value)
        self.table.add_handle(entry)  # the view's
        (self.views if view else self.dropped).append(object_id)
        return refs

    def expect_error(self, object_id: bytes) -> None:
        """Complain about an error that nothing explains: no task failed, no owner and no carrier died."""
        if object_id not in self.world.failed and not self.world.unprotected(object_id):
            raise InvariantError(
                f"{show_id(object_id)} is lost in {self.name.decode()}, though nobody died who protected it"
            )

    def pickle(self, object_id: bytes) -> None:
        """Pickle a ref out of band."""
        self.table.pin(object_id)
        self.pickled.append(object_id)
        self.world.pickles.append((object_id, self.name))

    def unpickle(self, object_id: bytes) -> None:
        """Unpickle a ref that was pickled out of band."""
        self.table.receive(object_id, owner_of(object_id))
        self.handles.append(object_id)
        self.run_effects()

    def let_go(self) -> None:
        """The end of the program: drop whatever it holds."""
        for object_id in self.pickled:
            self.table.unpin(object_id)
        self.world.pickles = [pickle for pickle in self.world.pickles if pickle[1] != self.name]
        self.dropped += self.handles + self.views
        self.handles, self.views, self.pickled = [], [], []
        self.drain()
