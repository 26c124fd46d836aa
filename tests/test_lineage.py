"""The lineage core: what is made again, what fails, and what is kept for that."""

from __future__ import annotations

from typing import Any

import pytest

from afield.runtime.cores.lineage import Lineage
from afield.runtime.cores.lineage_records import CONTAINS_OTHERS, DROPPED, NO_TASK, RECORD_BYTES, USED_UP, Loss, Record
from afield.runtime.cores.objects import (
    FAILED,
    FREED,
    INLINE,
    LOCATED,
    PENDING,
    Entry,
    FreeStored,
    Recompute,
    Send,
    Spare,
)
from afield.runtime.wire import messages
from afield.runtime.wire.messages import Subscribe, Value
from tests.lineage_helpers import (
    PLACE,
    again,
    assert_empty,
    effects_of,
    end,
    lineage_of,
    lose,
    made,
)
from tests.sim.simulate import Simulation
from tests.sim.values import InvariantError, place_of


def test_a_lost_value_is_made_again() -> None:
    table, lineage = lineage_of()
    made(table, lineage, b"x")
    lose(table, b"x")
    entry = table.entries[b"x"]
    assert entry.state == PENDING
    done: list[int] = []
    assert not table.when_done(b"x", lambda: done.append(1))
    [record] = again(table)
    assert record.task == b"x's task" and record.left == 2
    lose(table, b"x")  # what it stores now may be lost before we hear of it
    assert not again(table)
    lineage.not_yet([b"x"])
    end(table, record, b"x")
    assert entry.state == LOCATED and done == [1]
    table.drop(b"x")
    assert effects_of(table) == [FreeStored(b"x")]
    assert_empty(table, lineage)


def test_recoveries_are_counted() -> None:
    table, lineage = lineage_of()
    made(table, lineage, b"x", left=1)
    lose(table, b"x")
    [record] = again(table)
    end(table, record, b"x")
    lose(table, b"x")
    assert table.entries[b"x"].value == f"x {USED_UP}: gone".encode()
    table.drop(b"x")
    assert effects_of(table) == [FreeStored(b"x")]  # of what is left of it
    assert_empty(table, lineage)


def test_what_no_task_made_fails() -> None:
    table, lineage = lineage_of()
    table.put(b"x", LOCATED, PLACE)
    lose(table, b"x", b"unknown")
    assert table.entries[b"x"].value == f"x {NO_TASK}: gone".encode()
    lose(table, b"x")
    table.drop(b"x")
    assert effects_of(table) == [FreeStored(b"x")]
    assert_empty(table, lineage)


def test_a_refused_task_leaves_the_reason() -> None:
    table, lineage = lineage_of()
    table.put(b"argument", LOCATED, PLACE)
    made(table, lineage, b"x", b"argument", left=0, refused="once")
    table.drop(b"argument")
    assert effects_of(table) == [FreeStored(b"argument")]  # nothing is held for it
    lose(table, b"x")
    assert table.entries[b"x"].value == b"x once: gone"
    table.drop(b"x")
    assert effects_of(table) == [FreeStored(b"x")]
    assert_empty(table, lineage)


def test_a_dependency_that_can_be_made_again_is_freed_and_made_again() -> None:
    table, lineage = lineage_of()
    made(table, lineage, b"a")
    made(table, lineage, b"b", b"a")
    made(table, lineage, b"c", b"b")
    table.drop(b"a")
    table.drop(b"b")
    assert effects_of(table) == [FreeStored(b"a"), FreeStored(b"b")]
    assert [table.entries[x].state for x in (b"a", b"b", b"c")] == [FREED, FREED, LOCATED]
    lose(table, b"c")
    [c] = again(table)
    resolved: list[bytes] = []
    assert not table.when_done(b"b", lambda: resolved.append(b"b"))  # as the shell does for the arguments of c's task
    [b] = again(table)
    assert not table.when_done(b"a", lambda: resolved.append(b"a"))
    [a] = again(table)
    end(table, a, b"a")
    end(table, b, b"b")
    assert resolved == [b"a", b"b"] and effects_of(table) == [FreeStored(b"a")]
    end(table, c, b"c")
    assert effects_of(table) == [FreeStored(b"b")]
    table.drop(b"c")
    assert effects_of(table) == [FreeStored(b"c")]
    assert_empty(table, lineage)


def test_a_dependency_that_cannot_be_made_again_is_kept() -> None:
    table, lineage = lineage_of()
    table.put(b"a", LOCATED, PLACE)
    made(table, lineage, b"x", b"a")
    table.drop(b"a")
    assert effects_of(table) == [Spare(b"a", True)] and lineage.bytes == RECORD_BYTES + PLACE.size
    table.drop(b"x")
    assert effects_of(table) == [FreeStored(b"x"), FreeStored(b"a")]
    assert_empty(table, lineage)


def test_a_kept_dependency_that_is_lost_fails_what_is_made_from_it() -> None:
    table, lineage = lineage_of()
    table.put(b"a", LOCATED, PLACE)
    made(table, lineage, b"x", b"a")
    table.drop(b"a")
    lose(table, b"a")
    assert table.entries[b"a"].state == FAILED
    lose(table, b"x")
    [x] = again(table)
    assert table.when_done(b"a", lambda: None)  # and the shell passes the error on
    end(table, x, b"x", FAILED, table.entries[b"a"].value)
    table.drop(b"x")
    assert effects_of(table) == [FreeStored(b"a"), FreeStored(b"x")]
    assert_empty(table, lineage)


def test_what_was_made_is_given_back_only_when_it_can_be_made_once_more() -> None:
    table, lineage = lineage_of()
    made(table, lineage, b"a", left=1)
    made(table, lineage, b"x", b"a")
    table.drop(b"a")
    lose(table, b"x")
    [x] = again(table)
    table.when_done(b"a", lambda: None)
    [a] = again(table)
    end(table, a, b"a")
    end(table, x, b"x")
    assert effects_of(table) == [Spare(b"a", True)]  # it was its last execution
    assert table.entries[b"a"].state == LOCATED
    table.drop(b"x")
    assert effects_of(table) == [FreeStored(b"x"), FreeStored(b"a")]
    assert_empty(table, lineage)


def test_one_execution_makes_all_outputs_that_are_lost() -> None:
    table, lineage = lineage_of()
    for output in (b"x", b"y", b"z"):
        table.own(output, "task")
        table.fulfil(output, LOCATED, PLACE)
    lineage.keep("task", [b"x", b"y", b"z"], left=3)
    table.drop(b"z")
    effects_of(table)
    lose(table, b"x", b"y")
    [record] = again(table)
    for output in (b"x", b"y", b"z"):
        table.fulfil(output, LOCATED, PLACE)
    lineage.ended(record, [b"x", b"y", b"z"])
    assert effects_of(table) == [FreeStored(b"z")]  # nobody wants it any more
    assert record.left == 2 and not again(table)
    table.drop(b"x")
    table.drop(b"y")
    assert_empty(table, lineage)


def test_a_whole_output_stays_as_it_is() -> None:
    table, lineage = lineage_of()
    for output in (b"x", b"y"):
        table.own(output, "task")
        table.fulfil(output, LOCATED, PLACE)
    lineage.keep("task", [b"x", b"y"], left=3)
    lose(table, b"x")
    [record] = again(table)
    elsewhere = place_of(b"elsewhere", 1)
    table.fulfil(b"x", LOCATED, elsewhere)
    table.fulfil(b"y", LOCATED, elsewhere)
    lineage.ended(record, [b"x", b"y"])
    assert (table.entries[b"x"].value, table.entries[b"y"].value) == (elsewhere, PLACE)
    assert not effects_of(table)


def test_a_loss_that_overtakes_the_reply_counts() -> None:
    table, lineage = lineage_of()
    table.own(b"x", "task")
    lose(table, b"x")
    assert table.entries[b"x"].state == PENDING and not effects_of(table)
    table.fulfil(b"x", LOCATED, PLACE)
    lineage.keep("task", [b"x"], left=3)
    [record] = again(table)
    end(table, record, b"x")
    assert not again(table)


def test_a_loss_of_an_execution_that_came_to_nothing_does_not_count() -> None:
    table, lineage = lineage_of()
    table.own(b"x", "task")
    lose(table, b"x")
    lineage.not_yet([b"x"])
    table.fulfil(b"x", LOCATED, PLACE)
    lineage.keep("task", [b"x"], left=3)
    assert table.entries[b"x"].state == LOCATED and not again(table)


def test_too_much_lineage_is_dropped_oldest_first() -> None:
    table, lineage = lineage_of(3 * RECORD_BYTES)
    for index in range(4):
        made(table, lineage, b"%d" % index)
    lose(table, b"0", b"1")
    assert table.entries[b"0"].value == f"0 {DROPPED}: gone".encode()
    assert [record.task for record in again(table)] == [b"1's task"]


def test_what_was_freed_cannot_be_had_when_its_lineage_is_dropped() -> None:
    table, lineage = lineage_of(2 * RECORD_BYTES)
    made(table, lineage, b"a")
    made(table, lineage, b"b", b"a")
    table.drop(b"a")
    made(table, lineage, b"c")
    assert b"a" not in table.entries, "nobody can have it made again any more, so nobody can read it"
    lose(table, b"b")
    assert table.entries[b"b"].value == f"b {DROPPED}: gone".encode()
    for output in (b"b", b"c"):
        table.drop(output)
    assert_empty(table, lineage)


def test_what_was_freed_and_is_asked_for_fails_when_its_lineage_is_dropped() -> None:
    table, lineage = lineage_of(3 * RECORD_BYTES)
    made(table, lineage, b"a")
    made(table, lineage, b"b", b"a")
    table.drop(b"a")
    table.pin(b"a")  # a task takes it again, and waits for another argument first
    made(table, lineage, b"c")
    made(table, lineage, b"d")
    assert table.entries[b"a"].state == FAILED
    assert str(table.entries[b"a"].value, "utf-8").startswith(f"a {DROPPED}")
    table.unpin(b"a")
    for output in (b"b", b"c", b"d"):
        table.drop(output)
    assert_empty(table, lineage)


def test_a_large_kept_value_empties_the_record_that_keeps_it() -> None:
    table, lineage = lineage_of(RECORD_BYTES)
    table.put(b"a", LOCATED, PLACE)
    made(table, lineage, b"x", b"a")
    table.drop(b"a")
    assert effects_of(table) == [FreeStored(b"a")] and lineage.bytes == 0
    table.drop(b"x")
    assert_empty(table, lineage)


def test_a_long_chain_goes_at_once() -> None:
    table, lineage = lineage_of()
    made(table, lineage, b"0")
    for index in range(1, 3000):
        made(table, lineage, b"%d" % index, b"%d" % (index - 1))
        table.drop(b"%d" % (index - 1))
    table.drop(b"2999")
    assert_empty(table, lineage)


def test_refs_that_the_task_made_cannot_be_made_again_while_their_owner_lives() -> None:
    table, lineage = lineage_of()
    for output in (b"x", b"y"):
        table.receive(b"in " + output, b"worker")
        table.own(output, "task")
        table.pin(b"in " + output)
        table.fulfil(output, LOCATED, PLACE, [b"in " + output])
        lineage.keep("task", [output], left=3)
    lose(table, b"x")
    assert table.entries[b"x"].value == f"x {CONTAINS_OTHERS}: gone".encode()
    table.on_peer_died(b"worker")
    lose(table, b"y")
    assert len(again(table)) == 1


def test_an_object_of_a_dead_owner_is_adopted_by_who_makes_it_again() -> None:
    table, _ = lineage_of()
    table.receive(b"x", b"first")
    table.on_peer_died(b"first")
    assert table.entries[b"x"].state == FAILED
    effects_of(table)
    table.receive(b"x", b"second")
    entry = table.entries[b"x"]
    assert (entry.state, entry.owner, entry.handles) == (PENDING, b"second", 2)
    [add] = effects_of(table)
    assert add.to == b"second"
    table.on_peer_died(b"second")
    assert entry.state == FAILED


def test_a_borrower_asks_its_owner_again() -> None:
    borrower, _ = lineage_of()
    borrower.receive(b"x", b"owner")
    borrower.when_done(b"x", lambda: None)
    attempt = effects_of(borrower)[0].message.attempt
    borrower.on_added(messages.Added(b"x", attempt, False))
    borrower.lost(b"x")  # not known yet: nothing to ask for
    assert not effects_of(borrower)
    borrower.on_value(Value(b"x", LOCATED, b"", PLACE))
    borrower.lost(b"x", "gone")
    assert borrower.entries[b"x"].state == PENDING
    assert effects_of(borrower) == [Send(b"owner", Subscribe(b"x"))]
    borrower.lost(b"x", "gone")
    assert not effects_of(borrower)
    borrower.on_value(Value(b"x", LOCATED, b"", PLACE))
    assert borrower.entries[b"x"].state == LOCATED


def test_a_subscription_has_a_freed_value_made_again() -> None:
    table, lineage = lineage_of()
    made(table, lineage, b"a")
    made(table, lineage, b"x", b"a")
    table.drop(b"a")
    effects_of(table)
    table.pin(b"a")  # nested in a task that runs again
    table.on_add(b"worker", messages.Add(b"a", 1))
    table.on_subscribe(b"worker", b"a")
    assert table.entries[b"a"].state == PENDING
    [record] = [effect.record for effect in effects_of(table) if isinstance(effect, Recompute)]
    end(table, record, b"a", INLINE, b"small now")
    assert effects_of(table) == [Send(b"worker", Value(b"a", INLINE, b"small now"))]


# -- under the simulator -----------------------------------------------------------------------------------------------

SEEDS = 100
STEPS = 600


def simulate(seed: int, *, faults: bool, lineage: type[Lineage] = Lineage) -> Any:
    """Run one seed in which the store loses values."""
    return Simulation(seed, processes=3 + seed % 2, faults=faults, losses=True, lineage=lineage).run(STEPS)


@pytest.mark.slow(6)
@pytest.mark.parametrize("faults", [False, True])
def test_seeds(faults: bool) -> None:
    losses = recomputed = given_up = objects = freed = 0
    for seed in range(SEEDS):
        try:
            summary = simulate(seed, faults=faults)
        except InvariantError as error:
            option = " --faults" if faults else ""
            command = f"python -m tests.sim --seed {seed} --steps {STEPS} --processes {3 + seed % 2} --losses{option}"
            pytest.fail(f"{error}\nfor the transcript: {command}")
        losses += summary.losses
        recomputed += summary.recomputed
        given_up += summary.given_up
        objects += summary.objects
        freed += summary.freed
    assert freed == objects
    assert losses > 10 * SEEDS and recomputed > SEEDS and given_up > SEEDS


class ForgetsRemains(Lineage):
    """What is left of a lost value stays in the store."""

    def has_remains(self, object_id: bytes) -> bool:
        return False


class HoldsNothing(Lineage):
    """Arguments go, whatever was made from them."""

    def retain(self, object_id: bytes, entry: Entry) -> bool:
        return False


class LetsNothingGo(Lineage):
    """Records keep what they hold when their outputs are gone."""

    def _drop(self, record: Record) -> None:
        pass


class IgnoresEarlyLosses(Lineage):
    """A loss that is heard of before the reply is forgotten."""

    def not_yet(self, object_ids: Any) -> None:
        self._early.clear()

    def _hear_of_early_losses(self, object_ids: Any) -> None:
        self._early.clear()


class MakesTwice(Lineage):
    """Each lost output has its task run, also if it runs already."""

    def started(self, record: Record) -> None:
        pass

    def _make_again(self, object_id: bytes, entry: Entry, loss: Loss) -> None:
        record = self._records.get(object_id)
        if record is not None:
            record.running = 0
        super()._make_again(object_id, entry, loss)


class FreesForGood(Lineage):
    """What was freed is not made again when it is needed."""

    def revive(self, object_id: bytes, entry: Entry) -> None:
        entry.state = PENDING


@pytest.mark.slow
@pytest.mark.parametrize(
    "lineage",
    [
        ForgetsRemains,
        HoldsNothing,
        LetsNothingGo,
        IgnoresEarlyLosses,
        MakesTwice,
        FreesForGood,
    ],
    ids=lambda lineage: lineage.__name__,
)
def test_simulator_catches(lineage: type[Lineage]) -> None:
    for seed in range(SEEDS):
        try:
            simulate(seed, faults=False, lineage=lineage)
        except InvariantError:
            return
    pytest.fail(f"{SEEDS} seeds did not notice: {lineage.__doc__}")
