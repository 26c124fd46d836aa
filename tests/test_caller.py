"""An actor's caller: every order of small scripts, and long ones at random, against a model of actor and daemon."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afield.errors import InternalError
from afield.machines import FlightRecorder
from afield.runtime.calls.callee import Callee
from afield.runtime.cores.caller import (
    CALL,
    CALLER,
    CANCELLED,
    UNAVAILABLE,
    Again,
    Caller,
    Callers,
    Ended,
    ForgetCreation,
)
from afield.runtime.cores.dispatch import Task
from afield.runtime.values.definitions import Definition
from tests.actor_world import PLAIN, Call, Script, World

P, R = Call(), Call(retries=1)
SCRIPTS = {
    "plain": Script((P, P, P)),
    "death": Script((P, R, P), deaths=1),
    "restart": Script((P, R, R), deaths=1, restarts=1),
    "the last restart": Script((R,), deaths=2, restarts=1),
    "restarts": Script((R, P), deaths=2, restarts=2),
    "late arguments": Script((Call(late=True), P, Call(late=True, retries=1)), deaths=1, restarts=1),
    "failed arguments": Script((Call(fails=True), P, Call(fails=True)), drops=True),
    "lost arguments": Script((P, Call(loses=True), Call(loses=True, retries=1)), deaths=1, restarts=1),
    "exceptions": Script((Call(raises=True, retries=1), P), deaths=1, restarts=1),
    "kill": Script((P, R), kills=1, deaths=1, restarts=1),
    "kill twice": Script((P,), kills=2, deaths=1, restarts=1),
    "kill of an unknown one": Script((P, P), kills=1, deaths=1, restarts=1, creator=False),
    "cancel": Script((R, Call(late=True)), cancels=(0, 1), deaths=1, restarts=1),
    "cancel of the first": Script((Call(late=True), P), cancels=(0,), kills=1),
    "a cancelled call was the last": Script((Call(late=True),), cancels=(0,), drops=True),
    "the handle goes": Script((Call(late=True), R), drops=True, deaths=1, restarts=1),
    "no order": Script(
        (Call(late=True, order=None), Call(order=None), Call(late=True, retries=1, order=None)), deaths=1, restarts=1
    ),
    "no order, lost and failed": Script(
        (Call(loses=True, order=None), Call(fails=True, order=None), Call(order=None)), cancels=(0, 1), drops=True
    ),
    "orders": Script((Call(late=True, order="a"), Call(order="b"), Call(order="a", retries=1)), deaths=1, restarts=1),
    "orders, lost": Script((Call(order="a"), Call(loses=True, order="b"), Call(order="b")), kills=1, cancels=(1,)),
    "borrowed": Script((P, R), creator=False, deaths=1, restarts=1),
    "borrowed, late": Script((Call(late=True), Call(order=None)), creator=False, deaths=2, restarts=1),
    "no constructor": Script((P, Call(late=True)), argument_fails=True, kills=1, cancels=(1,)),
}
#: Far more than any of the scripts has.
MOST_STATES = 60_000


#: Transitions that no order of events leads to here: of an actor that is dead the daemon says nothing more.
UNHEARD_OF = {("dead", event) for event in ("waits", "lives", "restarts", "dies")}
#: What happens to every call is not noted.
UNNOTED = {("waiting", "leaves"), ("on_its_way", "answered"), ("over", "answered"), ("over", "cancelled")}


def replay(script: Script, path: tuple[Any, ...]) -> World:
    world = World(script)
    for action in path:
        world.apply(action, checked=True)
    return world


@cache
def explore(script: Script) -> tuple[int, frozenset[tuple[str, str]]]:
    """Try every order of actions; return the number of states, and the (state, event) that were noted."""
    seen: set[Any] = set()
    noted: set[tuple[str, str]] = set()
    waiting: list[tuple[Any, ...]] = [()]
    while waiting:
        path = waiting.pop()
        world = replay(script, path)
        for action in world.actions():
            world = replay(script, path)
            with saying(f"after {[*path, action]}"):
                world.apply(action)
            mark = world.fingerprint()
            if mark not in seen:
                seen.add(mark)
                assert len(seen) < MOST_STATES
                waiting.append((*path, action))
        with saying(f"after {[*path]}, then to the end"):
            world = replay(script, path)
            world.finish()
        noted |= {(state, event) for _, event, state, *_ in world.actors.core.recorder.notes()}
    return len(seen), frozenset(noted)


@contextmanager
def saying(what: str) -> Iterator[None]:
    """Add how it came to a failure."""
    try:
        yield
    except BaseException as error:
        error.add_note(what)
        raise


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_order(name: str) -> None:
    states, _ = explore(SCRIPTS[name])
    assert states > 5


def test_the_tables_name_what_happens_and_nothing_else() -> None:
    noted = {each for script in SCRIPTS.values() for each in explore(script)[1]}
    assert noted == (set(CALLER.transitions()) | set(CALL.transitions())) - UNHEARD_OF - UNNOTED


calls = st.builds(
    Call,
    retries=st.sampled_from([0, 0, 1, 2, -1]),
    late=st.booleans(),
    fails=st.sampled_from([False, False, False, True]),
    loses=st.sampled_from([False, False, True]),
    order=st.sampled_from(["", "", "a", None]),
)
scripts = st.builds(
    Script,
    calls=st.lists(calls, min_size=1, max_size=12).map(tuple),
    restarts=st.integers(0, 3),
    deaths=st.integers(0, 4),
    kills=st.sampled_from([0, 0, 1, 2]),
    cancels=st.lists(st.integers(0, 11), max_size=3, unique=True).map(tuple),
    creator=st.booleans(),
    drops=st.booleans(),
)


@settings(max_examples=200, deadline=None)
@given(script=scripts, data=st.data())
def test_long_scripts_in_random_orders(script: Script, data: st.DataObject) -> None:
    world = World(script)
    for _ in range(60):
        actions = world.actions()
        if not actions:
            break
        world.apply(actions[data.draw(st.integers(0, len(actions) - 1))])
    world.finish()


def caller() -> Caller:
    return Caller(b"actor", FlightRecorder())


def call(name: bytes, retries: int = 0) -> Task:
    return Task(name, PLAIN, b"", None, retries_left=retries)


def test_what_cannot_happen_raises_with_the_story() -> None:
    one = caller()
    one.lives(b"w1")
    with pytest.raises(
        InternalError, match=r"(?s)lives in state alive, where only gone, ends may.*lives asked -> alive"
    ):
        one.lives(b"w2")


def test_what_comes_late_changes_nothing() -> None:
    one = caller()
    one.lives(b"w1")
    one.gone()
    assert one.dies(b"first") == []
    assert one.lives(b"w2") == [] and one.restarts() == [] and one.dies(b"second") == []
    one.ends()
    assert (one.state, one.error, one.open, one.incarnation) == ("dead", b"first", False, 1)


def test_a_call_without_its_argument_holds_back_only_those_of_its_order() -> None:
    one = caller()
    one.lives(b"w1")
    waits, same, other, free, late = (call(name) for name in (b"waits", b"same", b"other", b"free", b"late"))
    for task, order in ((waits, "a"), (same, "a"), (other, "b"), (free, None), (late, None)):
        task.function = Callee("call", Definition(b""), 1, order=order)
    for task in (waits, late):
        task.dependencies, task.unresolved = [b"argument"], 1
        assert one.enter(task) == []
    assert [one.leaves_at_once(task) for task in (same, other, free)] == [False, True, True]
    assert one.enter(same) == [] and one.take() is None
    late.unresolved = 0
    one.ready(late)
    assert one.take() is late and one.take() is None
    waits.unresolved = 0
    assert [one.take(), one.take(), one.take()] == [waits, same, None]


def test_a_call_whose_result_was_lost_is_not_held_back_by_the_calls_that_may_wait_for_it() -> None:
    one = caller()
    one.lives(b"w1")
    waits, again, deeper = call(b"waits", retries=1), call(b"again", retries=1), call(b"deeper", retries=1)
    again.again = deeper.again = True
    for task in (waits, again):
        task.dependencies, task.unresolved = [b"argument"], 1
        assert one.enter(task) == []
    assert one.take() is None and one.enter(deeper) == [] and one.take() is deeper
    again.unresolved = 0
    one.ready(again)
    assert one.take() is again
    one.on_way.update({1: again, 2: deeper})
    waits.unresolved = 0
    assert one.take() is waits
    one.on_way[3] = waits
    del one.on_way[1]
    assert one.argument_lost(one.on_way.pop(3))  # it keeps its place: what runs again has not taken it
    waits.unresolved = 1
    # Back in the queues after a restart they stand as before.
    one.gone()
    assert one.restarts() == [Again(deeper, b"w1")]
    one.lives(b"w2")
    assert one.take() is deeper and one.take() is None
    deeper.dependencies, deeper.unresolved = [b"argument"], 1
    one.put_back(deeper)
    assert one.cancel(deeper, False) == [Ended(deeper, CANCELLED)] and list(one.waiting()) == [waits]


def test_calls_that_are_made_while_the_actor_restarts_wait_only_if_they_may_be_retried() -> None:
    one = caller()
    before, never, retried, again = call(b"before"), call(b"never"), call(b"retried", retries=1), call(b"again")
    again.again = True
    one.waits()
    assert one.enter(before) == []
    one.lives(b"w1")
    one.gone()
    one.restarts()
    assert one.enter(never) == [Ended(never, UNAVAILABLE)]
    assert one.enter(retried) == [] and one.enter(again) == []
    one.lives(b"w2")
    assert [one.take() for _ in range(4)] == [before, retried, again, None]


def test_calls_that_are_made_before_it_is_known_that_the_actor_restarts_are_no_exception() -> None:
    one = caller()
    never, retried = call(b"never"), call(b"retried", retries=1)
    assert one.enter(never) == one.enter(retried) == []
    assert one.restarts() == [Ended(never, UNAVAILABLE)]
    one.lives(b"w1")
    assert [one.take(), one.take()] == [retried, None]


def test_the_answers_of_an_incarnation_settle_only_its_own_calls() -> None:
    one = caller()
    one.lives(b"w1")
    task = call(b"a", retries=1)
    assert one.leaves_at_once(task)
    of_the_first = one.on_way
    of_the_first[7] = task
    one.gone()
    assert one.restarts() == [Again(task, b"w1")]
    assert one.lives(b"w2") == []
    assert one.take() is task
    one.on_way[7] = task
    assert of_the_first.pop(7, None) is None and list(one.on_way) == [7]


def test_the_constructor_s_arguments_are_kept_while_it_may_run_again() -> None:
    creation = call(b"actor", retries=1)
    one = Caller(b"actor", FlightRecorder(), creation)
    assert one.lives(b"w1") == []
    one.gone()
    one.restarts()
    assert one.lives(b"w2") == [ForgetCreation(creation)]
    one.gone()
    assert one.dies(b"") == []


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda one: setattr(one, "open", False), "not open"),
        (lambda one: setattr(one, "life_pinned", True), "no call is pending"),
        (lambda one: one.queues.update({"": deque([call(b"x")])}), "could leave"),
        (lambda one: one.queues.update({"": deque()}), "empty queue"),
        (lambda one: one.late.update({b"x": call(b"x")}), "arguments are there"),
        (lambda one: one.on_way.update({1: call(b"x"), 2: call(b"x")}), ""),
        (lambda one: one.on_way.update(dict.fromkeys((1, 2), call(b"x"))), "twice"),
        (lambda one: (one.gone(), one.dies(b""), one.queues.update({"": deque([call(b"x")])})), "1 calls wait"),
        (lambda one: (one.gone(), one.restarts(), one.on_way.update({1: call(b"x")})), "on their way"),
    ],
)
def test_validate_sees_what_is_wrong(spoil: Any, complaint: str) -> None:
    callers = Callers()
    one = callers.add(b"actor")
    one.lives(b"w1")
    assert callers.validate() == []
    spoil(one)
    if complaint:
        assert complaint in "\n".join(callers.validate())
    else:
        assert callers.validate() == []
