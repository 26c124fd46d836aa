"""The core that decides about one actor in the directory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afield.errors import InternalError
from afield.machines import FlightRecorder
from afield.runtime.cores.actor import ACTOR, ActorLives


def actor(max_restarts: int = 0) -> ActorLives:
    return ActorLives(b"actor", max_restarts, FlightRecorder())


def test_it_starts_again_as_often_as_it_may() -> None:
    one = actor(2)
    for restarts in range(3):
        assert (one.restarts, one.told) == (restarts, "restarting" if restarts else "pending")
        one.given()
        assert one.told == ("restarting" if restarts else "pending")
        one.lives()
        assert one.told == "alive"
        assert one.dies("exit status 1") == ("its process died (exit status 1)", restarts < 2)
    assert one.ends() and one.told == "dead"
    assert not one.ends(), "it was already"


def test_one_that_may_always_start_again_does() -> None:
    one = actor(-1)
    for _ in range(10):
        one.given()
        assert one.dies("gone")[1]
    assert one.restarts == 10 and one.why_again == "its process died (gone)"


def test_an_argument_that_is_lost_uses_up_no_restart() -> None:
    one = actor(1)
    one.given()
    one.lacks("an argument is lost")
    assert (one.told, one.begun, one.why_again) == ("pending", True, "an argument is lost")
    one.has_arguments()
    one.given()
    assert one.dies("gone")[1]


def test_who_kills_it_is_why_its_worker_dies_and_only_that_worker() -> None:
    one = actor(-1)
    one.killed("killed while it asked", False)
    one.given()
    assert one.dies("gone")[0] == "its process died (gone)", "there was no worker to end"
    one.given()
    one.lives()
    one.killed("killed", False)
    assert one.dies("gone") == ("killed", True)
    one.given()
    one.killed("killed for good", True)
    assert one.dies("gone") == ("killed for good", False)


def test_what_cannot_happen_raises_with_the_story() -> None:
    one = actor()
    one.given()
    with pytest.raises(InternalError, match="is given a worker"):
        one.given()


@given(max_restarts=st.integers(-1, 3), data=st.data())
def test_any_legal_order_keeps_the_count(max_restarts: int, data: st.DataObject) -> None:
    one = actor(max_restarts)
    actions = {
        "is given a worker": one.given,
        "lives": one.lives,
        "lacks an argument": lambda: one.lacks("why"),
        "has its arguments": one.has_arguments,
        "starts again": lambda: one.dies("how"),
        "ends": one.ends,
    }
    for _ in range(30):
        events = list(ACTOR.events(one.state))
        if one.state == "dead":
            break
        actions[data.draw(st.sampled_from(sorted(events)))]()
        assert one.state in ACTOR.states
        if max_restarts >= 0:
            assert one.restarts + one.restarts_left == max_restarts
        assert one.begun or one.restarts == 0
        assert (one.told == "restarting") == (bool(one.restarts) and one.state not in ("alive", "dead"))
