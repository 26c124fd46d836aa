"""The ownership table and lineage find out by themselves that they are wrong: `validate`, and transitions that cannot be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from afield.errors import InternalError
from afield.machines import REMEMBERED
from afield.runtime.cores import entries
from afield.runtime.cores.dispatch import Task
from afield.runtime.cores.lineage import Lineage
from afield.runtime.cores.lineage_records import Loss, Record
from afield.runtime.cores.objects import (
    FAILED,
    INLINE,
    LIFE,
    LOCATED,
    NUMBERS,
    PENDING,
    STATES,
    Entry,
    FreeStored,
    Obligation,
)
from afield.runtime.cores.ownership import OwnershipTable
from afield.runtime.wire.messages import Add, Added, Contained, Lost, Reply, Took, Value
from tests.sim import checkers
from tests.sim.simulate import Simulation
from tests.sim.values import InvariantError, place_of
from tests.sim.world import World
from tests.test_sim import KeepsDeadBorrowers, WaitsForDeadOwners

PLACE = place_of(b"somewhere", 1)


def process() -> tuple[OwnershipTable, Lineage]:
    """Return a table and its lineage in the middle of much."""

    def explain(object_id: bytes, record: Record | None, why: str, loss: Loss) -> bytes:
        return why.encode()

    table = OwnershipTable(b"me", lambda owner: b"died: " + owner)
    lineage = Lineage(table, 1 << 30, explain)
    table.put(b"lent", INLINE, b"1")
    table.on_add(b"peer", Add(b"lent", 1))
    table.put(b"inside", INLINE, b"1")
    table.put(b"outside", INLINE, b"1", [b"inside"])
    table.hand_on(b"peer", 7, [b"lent"])
    table.receive(b"borrowed", b"peer", Obligation(container=b"outside"))
    table.receive(b"known", b"peer")
    table.on_added(Added(b"known", table.entries[b"known"].attempt, False))
    table.when_done(b"known", lambda: None)
    table.own(b"pending", "a task")
    table.own(b"made", "its task")
    table.pin(b"lent")
    table.fulfil(b"made", LOCATED, PLACE)
    lineage.keep("its task", [b"made"], [b"lent"], left=3)
    table.unpin(b"lent")
    table.own(b"made from it", "another task")
    table.pin(b"made")
    table.fulfil(b"made from it", LOCATED, PLACE)
    lineage.keep("another task", [b"made from it"], [b"made"], left=3)
    table.unpin(b"made")
    table.drop(b"made")  # which frees its value
    table.own(b"failed", "a task")
    table.fulfil(b"failed", FAILED, b"error")
    table.effects.clear()
    assert [*table.validate(), *lineage.validate()] == []
    return table, lineage


def put(object_id: bytes, **fields: Any) -> Callable[[OwnershipTable, Lineage], None]:
    """Write what only the table may write."""

    def change(table: OwnershipTable, lineage: Lineage) -> None:
        for name, value in fields.items():
            setattr(table.entries[object_id], name, value)

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (put(b"lent", handles=-1), "lent has -1 handles"),
        (put(b"lent", pins=-1), "lent has 1 handles and -1 pins"),
        (put(b"lent", pins=0), "lent has 0 pins, and 1 are known"),
        (put(b"inside", pins=0), "inside has 0 pins, and 1 are known"),
        (put(b"outside", pins=0), "outside has 0 pins, and 1 are known"),
        (put(b"failed", handles=0), "failed is held by nothing"),
        (put(b"lent", borrowers={b"stranger"}), "lent is borrowed by stranger, to whom nothing says that it is lent"),
        (put(b"lent", borrowers=None), "lent is lent to peer, and its entry does not say so"),
        (put(b"pending", value=b"1"), "pending is pending with the value bytes"),
        (put(b"failed", value=None), "failed is failed with the value NoneType"),
        (put(b"failed", task="a task"), "failed is failed, and a task is still to make it"),
        (put(b"inside", waiters=[print]), "inside is inline, and somebody waits for it"),
        (put(b"made", value=PLACE), "made is freed with the value Location"),
        (put(b"made", state=PENDING), "made is pending, and its record does not run"),
        (put(b"made from it", value=b""), "made from it is located with the value bytes"),
        (put(b"pending", subscribed=True), "pending is ours, and is registered or subscribed to elsewhere"),
        (put(b"known", subscribed=False), "known is waited for, and peer was not asked for it"),
        (put(b"known", life=True), "known is owned by peer, and has what only an owner's entry has"),
        (put(b"known", registration=0), "known is owned by peer, alive: True, and its registration is 0"),
        (put(b"known", owner=b"other"), "known is borrowed from peer, and its entry does not say so"),
        (put(b"borrowed", registration=2), "borrowed is not being registered, and 1 wait for that"),
        (lambda table, lineage: table._borrowed_from.clear(), "known is owned by peer, alive: True"),
        (lambda table, lineage: table._lent_to.clear(), "lent is borrowed by peer, to whom nothing says"),
        (lambda table, lineage: table._dead.add(b"peer"), "nobody took 7 of peer, dead"),
        (lambda table, lineage: table._awaiting[b"borrowed"][0].__setattr__("remaining", 0), "nothing remains"),
        (lambda table, lineage: table.entries.pop(b"lent"), "lent is held, and the table does not know it"),
        (lambda table, lineage: table.lineage_knows.clear(), "made is freed, and no lineage of ours knows it"),
        (lambda table, lineage: lineage.inputs.update({b"lent": 2}), "lent x2, made x1 is held"),
        (lambda table, lineage: lineage.inputs.pop(b"made"), "made is there for the sake of lineage, and no record"),
        (lambda table, lineage: lineage._kept.update({b"inside": 1}), "inside is there for the sake of lineage"),
        (lambda table, lineage: setattr(lineage, "bytes", 1), "bytes, and 1 are counted"),
        (
            lambda table, lineage: lineage._early.update({b"gone": Loss("")}),
            "gone is lost, and the table does not know",
        ),
        (lambda table, lineage: lineage._records.pop(b"made"), "record 1 makes made, which another record makes"),
        (lambda table, lineage: lineage._by_age[1].outputs.clear(), "record 1 is kept for no output"),
        (lambda table, lineage: setattr(lineage._by_age[2], "left", -2), "record 2 may run -2 times"),
    ],
)
def test_validate_complains(change: Callable[[OwnershipTable, Lineage], Any], complaint: str) -> None:
    table, lineage = process()
    change(table, lineage)
    names = [*process()[0].entries, b"peer", b"stranger", b"gone"]
    complaints = "\n".join([*table.validate(), *lineage.validate()])
    for name in sorted(names, key=len, reverse=True):
        complaints = complaints.replace(name.hex(), name.decode())
    assert complaint in complaints


def test_validate_looks_at_the_newest_entries_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "MOST_VALIDATED", 2)
    table = OwnershipTable(b"me", lambda owner: b"")
    for object_id in (b"a", b"b", b"c"):
        table.put(object_id, INLINE, b"")
    table.entries[b"a"].handles = -1
    assert table.validate() == []
    table.entries[b"b"].handles = -1
    assert len(table.validate()) == 1


# -- plain replies ---------------------------------------------------------------------------------------------------


def replies(table: OwnershipTable) -> tuple[list[Any], dict[int, Task]]:
    """Submit three tasks; return their replies and what is in flight."""
    tasks = {}
    for sequence, output in enumerate((b"first", b"second", b"third"), 1):
        tasks[sequence] = task = Task(output, None, b"", None, output=output)
        table.own(output, task)
    return [Reply(sequence, INLINE, b"value %d" % sequence) for sequence in tasks], tasks


def test_plain_replies_are_written_down_at_once() -> None:
    table = OwnershipTable(b"me", lambda owner: b"")
    batch, tasks = replies(table)
    table.put(b"argument", LOCATED, PLACE)
    table.pin(b"argument")
    table.drop(b"argument")
    tasks[2].pinned = [b"argument"]
    assert table.fulfil_plain(batch, 1, tasks) == 3
    assert list(tasks) == [1] and table.effects == [FreeStored(b"argument")]
    assert [table.entries[each].value for each in (b"first", b"second", b"third")] == [None, b"value 2", b"value 3"]
    assert table.fulfil_plain(batch, 0, tasks) == 1  # the next has been answered
    assert not tasks and table.validate() == []
    assert table.fulfil_plain(batch, 3, tasks) == 3


@pytest.mark.parametrize(
    "make_special",
    [
        lambda table, batch, tasks: batch.__setitem__(1, Took(1)),
        lambda table, batch, tasks: batch.__setitem__(1, Reply(2, FAILED, b"error")),
        lambda table, batch, tasks: batch.__setitem__(1, Reply(2, INLINE, b"", None, Contained(1, [(b"x", b"peer")]))),
        lambda table, batch, tasks: tasks.pop(2),
        lambda table, batch, tasks: setattr(tasks[2], "output", b""),
        lambda table, batch, tasks: (table.pin(b"second"), table.drop(b"second")),
        lambda table, batch, tasks: table.when_done(b"second", print),
        lambda table, batch, tasks: (table.on_add(b"peer", Add(b"second", 1)), table.on_subscribe(b"peer", b"second")),
        lambda table, batch, tasks: table.fulfil(b"second", INLINE, b"earlier"),
        lambda table, batch, tasks: table.on_lost(Lost([b"second"], "before its reply")),
    ],
    ids=["other message", "error", "refs", "unknown", "outputs", "no handle", "waiter", "subscriber", "done", "lost"],
)
def test_other_replies_are_left(make_special: Callable[[OwnershipTable, list[Any], dict[int, Task]], Any]) -> None:
    table = OwnershipTable(b"me", lambda owner: b"")
    Lineage(table, 1 << 30, lambda *loss: b"lost")
    batch, tasks = replies(table)
    make_special(table, batch, tasks)
    before = [dict(tasks), table.entries[b"second"].state, table.entries[b"second"].value]
    assert table.fulfil_plain(batch, 0, tasks) == 1
    before[0].pop(1)
    assert [tasks, table.entries[b"second"].state, table.entries[b"second"].value] == before


# -- transitions -----------------------------------------------------------------------------------------------------


def test_states_have_names() -> None:
    assert set(STATES.values()) == set(LIFE.states)
    assert {NUMBERS[name]: name for name in LIFE.states} == STATES


def test_an_illegal_transition_raises_with_the_story() -> None:
    table, _ = process()
    table.on_peer_died(b"peer")
    with pytest.raises(InternalError) as raised:
        table.fail(b"inside", table.entries[b"inside"], b"error")
    text = str(raised.value)
    assert text.startswith(
        f"object {b'inside'.hex()}: fails in state inline, where only nothing may happen; before that:"
    )
    assert f"{b'peer'.hex()} has died" in text
    assert f"{b'known'.hex()} fails pending -> failed" in text


def test_small_tasks_leave_no_notes_and_others_a_bounded_number() -> None:
    table, lineage = process()
    before = table.recorder.story()
    table.own(b"x", "task")
    table.fulfil(b"x", INLINE, b"1")
    table.drop(b"x")
    assert table.recorder.story() == before
    for _ in range(REMEMBERED):
        table.on_add(b"peer", Add(b"inside", 1))
        table.on_release(b"peer", b"inside")
    assert len(table.recorder.story()) == REMEMBERED
    table.on_lost(Lost([b"made from it"], "the disk is gone"))
    assert f"{b'made'.hex()} is needed freed -> pending" not in table.recorder.story()
    assert table.recorder.story()[-1] == f"{b'made from it'.hex()} is lost located -> pending"
    assert lineage.recorder.story() == [f"{b'made from it'.hex()} makes record 2 run again, left 2"]


def test_what_a_dead_owner_still_says_is_of_an_earlier_life() -> None:
    """An acknowledgement that it had sent would make its entry look registered: with whoever makes the object next, too."""
    table = OwnershipTable(b"me", lambda owner: b"")
    table.receive(b"x", b"first")
    attempt = table.entries[b"x"].attempt
    table.on_peer_died(b"first")
    table.on_added(Added(b"x", attempt, False))
    assert table.validate() == []
    table.effects.clear()
    table.receive(b"x", b"second")
    [add] = table.effects
    assert add.to == b"second" and isinstance(add.message, Add)


def test_all_fail_at_the_end() -> None:
    table, _ = process()
    told: list[int] = []
    table.when_done(b"borrowed", lambda: told.append(1))
    table.fail_all(b"over")
    assert told == [1] and table.entries[b"pending"].value == b"over"
    assert not table._borrowed_from
    table.on_value(Value(b"known", INLINE, b"late"))
    assert table.entries[b"known"].value == b"over"


# -- broken cores in the simulator -----------------------------------------------------------------------------------


class ForgetsToWhomItLends(OwnershipTable):
    """The entry knows its borrower, and the books of borrowers do not."""

    def on_add(self, peer: bytes, message: Add) -> None:
        super().on_add(peer, message)
        self._lent_to.pop(peer, None)


class ForgetsWhoseItIs(OwnershipTable):
    """A borrowed entry that no death of its owner will find."""

    def _new_borrowed(self, object_id: bytes, owner: bytes) -> Entry:
        entry = super()._new_borrowed(object_id, owner)
        self._borrowed_from.pop(owner, None)
        return entry


class UnpinsContents(OwnershipTable):
    """The refs inside a result are let go of while the result lives."""

    def fulfil(self, object_id: bytes, kind: int, value: Any, contained: Any = ()) -> None:
        contained = list(contained)
        super().fulfil(object_id, kind, value, contained)
        for inner in contained:
            self.unpin(inner)


class KeepsTheTask(OwnershipTable):
    """A finished entry still has its task."""

    def fulfil(self, object_id: bytes, kind: int, value: Any, contained: Any = ()) -> None:
        entry = self.entries.get(object_id)
        task = None if entry is None else entry.task
        super().fulfil(object_id, kind, value, contained)
        if entry is not None:
            entry.task = task


class LosesCount(Lineage):
    """What was kept is not counted back."""

    def _release(self, object_id: bytes) -> None:
        kept = self._kept.get(object_id, 0)
        super()._release(object_id)
        self.bytes += kept


class HoldsForEver(Lineage):
    """A record that goes leaves its holds."""

    def _release(self, object_id: bytes) -> None:
        pass


def nothing(*args: object) -> None:
    """Stands for the checks of the simulator itself."""


@pytest.mark.parametrize(
    ("table", "lineage"),
    [
        (ForgetsToWhomItLends, Lineage),
        (ForgetsWhoseItIs, Lineage),
        (UnpinsContents, Lineage),
        (KeepsTheTask, Lineage),
        (KeepsDeadBorrowers, Lineage),
        (WaitsForDeadOwners, Lineage),
        (OwnershipTable, LosesCount),
        (OwnershipTable, HoldsForEver),
    ],
    ids=lambda value: value.__name__,
)
def test_validate_catches(table: type[OwnershipTable], lineage: type[Lineage], monkeypatch: pytest.MonkeyPatch) -> None:
    """The cores notice, when nobody looks at what they do."""
    for check in ("after_event", "on_emptied", "at_rest", "after_all"):
        monkeypatch.setattr(checkers, check, nothing)
    for seed in range(40):
        simulation = Simulation(seed, faults=True, losses=True, table=table, lineage=lineage)
        try:
            simulation.run(300)
        except InvariantError as violation:
            if str(violation).startswith("the books of p"):
                noticed = violation
                break
    else:
        pytest.fail(f"40 seeds did not notice: {table.__doc__} {lineage.__doc__}")
    assert len(noticed.__notes__) > 5


def test_a_failure_tells_the_story_with_names() -> None:
    world = World()
    lender, borrower = world.add(b"p0"), world.add(b"p1")
    object_id = lender.put([])
    borrower.unpickle(object_id)
    lender.deliver(b"p1", world.network.take(b"p1", b"p0"))
    name = object_id.decode()
    assert checkers.stories(world) == [
        f"p0 ownership: {name} is lent to p1",
        f"p1 ownership: {name} is borrowed from p0 attempt 1",
    ]
    lender.table.entries[object_id].borrowers = None
    with pytest.raises(
        InvariantError, match=rf"the books of p0 are wrong: {name} is lent to p1, and its entry does not"
    ):
        checkers.books(lender)
