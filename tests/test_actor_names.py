"""Names of actors between their reservation and the actor's creation: who looks them up waits, and destroys nothing."""

from __future__ import annotations

from typing import Any

import pytest

import afield


class Named:
    """An actor with a name."""

    def __init__(self, argument: Any = None) -> None:
        self.argument = argument

    def ping(self) -> int:
        return 1


class Meanwhile:
    """An argument during whose pickling the name is reserved, and the actor not created."""

    def __init__(self, act: Any) -> None:
        self.act = act

    def __reduce__(self) -> Any:
        self.act()
        return int, (7,)


def _call(name: str) -> list[Any]:
    """Call the actor that has a name, whether or not it is there yet."""
    return [afield.get_actor(name).ping.remote()]


def test_who_finds_a_name_before_its_actor_is_created_waits_for_the_actor(runtime: Any) -> None:
    call, refs = afield.remote(_call), []

    def look() -> None:
        refs.extend(afield.get(call.remote("early"), timeout=30))

    actor = afield.remote(Named).options(name="early").remote(Meanwhile(look))
    assert afield.get(refs[0], timeout=30) == 1
    assert afield.get(actor.ping.remote(), timeout=30) == 1
    assert afield.get(afield.get_actor("early").ping.remote(), timeout=30) == 1


def test_a_creation_that_fails_frees_the_name_and_tells_who_waits(runtime: Any) -> None:
    call, refs = afield.remote(_call), []

    def fail() -> None:
        refs.extend(afield.get(call.remote("unlucky"), timeout=30))
        raise ValueError("cannot be pickled")

    with pytest.raises(Exception, match="cannot be pickled"):
        afield.remote(Named).options(name="unlucky").remote(Meanwhile(fail))
    with pytest.raises(afield.ActorDiedError, match="never created"):
        afield.get(refs[0], timeout=30)
    with pytest.raises(ValueError, match="no living actor"):
        afield.get_actor("unlucky")
    again = afield.remote(Named).options(name="unlucky").remote()
    assert afield.get(again.ping.remote(), timeout=30) == 1


def test_creators_that_race_for_a_name_get_one_actor(runtime: Any) -> None:
    @afield.remote
    def use(name: str) -> int:
        actor = afield.remote(Named).options(name=name, get_if_exists=True, lifetime="detached").remote()
        return int(afield.get(actor.ping.remote(), timeout=30))

    for number in range(8):
        name = f"raced {number}"
        assert afield.get([use.remote(name) for _ in range(2)], timeout=30) == [1, 1]
        afield.kill(afield.get_actor(name))
