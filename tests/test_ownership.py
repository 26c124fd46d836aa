"""The ownership table of one process: handles, pins, borrowers, registrations, deaths."""

from __future__ import annotations

from typing import Any

from afield.runtime.cores.objects import FAILED, INLINE, LOCATED, FreeStored, Obligation, Send, Settled
from afield.runtime.cores.ownership import OwnershipTable
from afield.runtime.wire.messages import Add, Added, Location, Part, Release, Subscribe, Took, Value

PLACE = Location([Part(0, 0, 64)])


def table_of(name: bytes) -> OwnershipTable:
    """Return an empty table."""
    return OwnershipTable(name, lambda owner: b"owner died: " + owner)


def effects_of(table: OwnershipTable) -> list[Any]:
    """Take the effects."""
    effects, table.effects = table.effects, []
    return effects


# -- one table ----------------------------------------------------------------------------------------------------


def test_an_inline_value_goes_with_its_last_handle() -> None:
    table = table_of(b"me")
    table.put(b"x", INLINE, b"value")
    table.drop(b"x")
    assert not table.entries and not effects_of(table)
    table.drop(b"x")  # of a runtime that was shut down: nothing happens
    table.unpin(b"x")


def test_a_stored_value_is_freed_once() -> None:
    table = table_of(b"me")
    table.put(b"x", LOCATED, PLACE)
    table.pin(b"x")
    table.drop(b"x")
    assert not effects_of(table)
    table.unpin(b"x")
    assert effects_of(table) == [FreeStored(b"x")] and not table.entries


def test_a_container_holds_what_is_inside() -> None:
    table = table_of(b"me")
    table.put(b"inner", LOCATED, PLACE)
    table.put(b"outer", LOCATED, PLACE, [b"inner", b"inner"])
    table.drop(b"inner")
    assert not effects_of(table)
    table.drop(b"outer")
    assert effects_of(table) == [FreeStored(b"outer"), FreeStored(b"inner")]


def test_a_pending_output_without_handles_is_freed_when_it_comes() -> None:
    table = table_of(b"me")
    table.own(b"x", "task")
    table.drop(b"x")
    assert b"x" in table.entries
    table.fulfil(b"x", LOCATED, PLACE)
    assert effects_of(table) == [FreeStored(b"x")] and not table.entries


def test_an_output_of_an_unknown_task_is_freed_and_lets_go_of_its_content() -> None:
    table = table_of(b"me")
    table.put(b"inner", INLINE, b"")
    table.pin(b"inner")
    table.drop(b"inner")
    table.fulfil(b"x", LOCATED, PLACE, [b"inner"])
    assert effects_of(table) == [FreeStored(b"x")] and not table.entries


def test_a_second_outcome_is_ignored() -> None:
    table = table_of(b"me")
    table.own(b"x", "task")
    table.fulfil(b"x", INLINE, b"first")
    table.fulfil(b"x", FAILED, b"second")
    assert (table.entries[b"x"].state, table.entries[b"x"].value) == (INLINE, b"first")


def test_waiters_are_called_once_and_can_leave() -> None:
    table = table_of(b"me")
    table.own(b"x", "task")
    called: list[str] = []

    def leave() -> None:
        called.append("left")

    assert not table.when_done(b"x", lambda: called.append("stayed"))
    assert not table.when_done(b"x", leave)
    table.stop_waiting(b"x", leave)
    table.fulfil(b"x", INLINE, b"1")
    assert called == ["stayed"]
    assert table.when_done(b"x", leave)
    assert called == ["stayed"]


def test_a_borrower_registers_subscribes_and_releases() -> None:
    owner, borrower = table_of(b"owner"), table_of(b"borrower")
    owner.own(b"x", "task")
    borrower.receive(b"x", b"owner")
    done: list[int] = []
    assert not borrower.when_done(b"x", lambda: done.append(1))
    (add, subscribe) = effects_of(borrower)
    assert type(add.message) is Add and subscribe == Send(b"owner", Subscribe(b"x"))
    owner.on_add(b"borrower", add.message)
    added = Added(b"x", add.message.attempt, False)
    assert effects_of(owner) == [Send(b"borrower", added)]
    owner.on_subscribe(b"borrower", b"x")
    owner.drop(b"x")
    owner.fulfil(b"x", INLINE, b"value")
    assert effects_of(owner) == [Send(b"borrower", Value(b"x", INLINE, b"value"))]
    borrower.on_value(Value(b"x", INLINE, b"value"))
    assert not done  # before the acknowledgement, this answers an earlier life of the entry
    borrower.on_added(added)
    borrower.on_value(Value(b"x", INLINE, b"value"))
    assert done == [1] and borrower.entries[b"x"].value == b"value"
    borrower.drop(b"x")
    assert effects_of(borrower) == [Send(b"owner", Release(b"x"))]
    assert b"x" in owner.entries
    owner.on_release(b"borrower", b"x")
    assert not owner.entries


def test_a_ref_that_came_too_late_says_that_its_object_is_gone() -> None:
    owner, borrower = table_of(b"owner"), table_of(b"borrower")
    borrower.receive(b"x", b"owner")
    done: list[int] = []
    borrower.when_done(b"x", lambda: done.append(1))
    add = effects_of(borrower)[0].message
    owner.on_add(b"borrower", add)
    added = effects_of(owner)[0].message
    assert added.gone
    borrower.on_added(added)
    assert done == [1] and borrower.entries[b"x"].state == FAILED


def test_an_acknowledgement_of_an_earlier_life_is_ignored() -> None:
    borrower = table_of(b"borrower")
    token = Obligation(token="reply")
    borrower.receive(b"x", b"owner")
    first = effects_of(borrower)[0].message
    borrower.drop(b"x")
    borrower.receive(b"x", b"owner", token)
    second = effects_of(borrower)[-1].message
    assert second.attempt != first.attempt and token.remaining == 1
    borrower.on_added(Added(b"x", first.attempt, False))
    assert token.remaining == 1 and not effects_of(borrower)
    borrower.on_added(Added(b"x", second.attempt, False))
    assert effects_of(borrower) == [Settled("reply")]


def test_refs_in_a_result_stay_pinned_until_they_were_taken() -> None:
    worker = table_of(b"worker")
    worker.put(b"x", LOCATED, PLACE)
    assert worker.hand_on(b"caller", 7, [b"x"]) == [(b"x", b"worker")]
    worker.drop(b"x")
    assert not effects_of(worker)
    worker.on_took(b"stranger", 7)
    worker.on_took(b"caller", 8)
    assert not effects_of(worker)
    worker.on_took(b"caller", 7)
    assert effects_of(worker) == [FreeStored(b"x")]


def test_a_result_without_new_refs_is_acknowledged_at_once() -> None:
    caller = table_of(b"caller")
    caller.put(b"mine", INLINE, b"")
    assert caller.receive_contained([(b"mine", b"caller")], b"worker", 3) == [b"mine"]
    assert effects_of(caller) == [Send(b"worker", Took(3))]
    assert caller.entries[b"mine"].pins == 1


def test_a_dead_owner_fails_what_was_borrowed_and_wakes_who_waits() -> None:
    table = table_of(b"me")
    settled = Obligation(token="reply")
    table.receive(b"x", b"owner", settled)
    done: list[int] = []
    table.when_done(b"x", lambda: done.append(1))
    effects_of(table)
    table.on_peer_died(b"owner")
    assert done == [1] and table.entries[b"x"].value == b"owner died: owner"
    assert effects_of(table) == [Settled("reply")]
    table.receive(b"y", b"owner")  # a ref that arrives afterwards
    assert table.entries[b"y"].state == FAILED and not effects_of(table)


def test_a_value_that_was_inlined_survives_its_owner() -> None:
    table = table_of(b"me")
    table.receive(b"x", b"owner")
    table.when_done(b"x", lambda: None)
    table.on_added(Added(b"x", effects_of(table)[0].message.attempt, False))
    table.on_value(Value(b"x", INLINE, b"value"))
    table.on_peer_died(b"owner")
    assert table.entries[b"x"].value == b"value"


def test_a_dead_borrower_and_receiver_hold_nothing() -> None:
    table = table_of(b"me")
    table.put(b"x", LOCATED, PLACE)
    table.put(b"y", LOCATED, PLACE)
    table.on_add(b"peer", Add(b"x", 1))
    table.hand_on(b"peer", 1, [b"y"])
    table.drop(b"x")
    table.drop(b"y")
    effects_of(table)
    table.on_peer_died(b"peer")
    assert sorted(effect.object_id for effect in effects_of(table)) == [b"x", b"y"]
    table.on_add(b"peer", Add(b"x", 2))  # was on its way
    table.on_peer_died(b"peer")
    assert not table.entries
