"""An error of pickling names the part that is to blame: of values, functions, classes and their instances."""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest

import afield
from afield.runtime.process import culprits
from afield.runtime.process.culprits import find_culprit

LOCK = threading.Lock()


class Attribute:
    """By value, as if it were the program's own."""

    def attribute(self) -> Any:
        class HasLock:
            lock = LOCK

        return HasLock

    def nested(self) -> Any:
        class Outer:
            class Inner:
                deep = {"x": [0, LOCK]}

        return Outer

    def of_base(self) -> Any:
        class Base:
            items = (i for i in range(3))

        class Derived(Base):
            def get(self) -> None: ...

        return Derived

    def default(self) -> Any:
        class Default:
            def get(self, a: int = 1, b: Any = LOCK, *, c: int = 2) -> None: ...

        return Default

    def keyword(self) -> Any:
        class Keyword:
            @classmethod
            def get(cls, *, c: Any = LOCK) -> None: ...

        return Keyword

    def captured(self) -> Any:
        lock = threading.Lock()

        class Captured:
            @staticmethod
            def get() -> Any:
                return lock

        return Captured

    def of_property(self) -> Any:
        lock = threading.Lock()

        class Property:
            @property
            def value(self) -> Any:
                return lock

        return Property

    def itself(self) -> Any:
        class Itself:
            def make(self) -> Any:
                return Itself()  # what is captured is the class, which cannot be pickled either

            lock = LOCK

        return Itself


CLASSES = {
    "attribute": "the class HasLock.lock is a _thread.lock",
    "nested": "the class Outer.Inner.deep['x'][1] is a _thread.lock",
    "of_base": "the class Derived (its base Base).items is a builtins.generator",
    "default": "the class Default.get (default of 'b') is a _thread.lock",
    "keyword": "the class Keyword.get (default of 'c') is a _thread.lock",
    "captured": "the class Captured.get (captured 'lock') is a _thread.lock",
    "of_property": "the class Property.value (captured 'lock') is a _thread.lock",
    "itself": "the class Itself.lock is a _thread.lock",
}


@pytest.mark.parametrize("name", CLASSES)
def test_the_part_of_an_actor_class(shared_runtime: None, name: str) -> None:
    cls = getattr(Attribute(), name)()
    with pytest.raises(afield.SerializationError) as caught:
        afield.remote(cls).remote()
    assert f"cannot pickle the class {cls.__name__}: {CLASSES[name]} (TypeError" in str(caught.value)


@dataclasses.dataclass
class Data:
    number: int
    held: Any


class Slots:
    __slots__ = ("held", "missing")

    def __init__(self) -> None:
        self.held = LOCK


class Reduces:
    def __reduce__(self) -> Any:
        return Data, (1, [LOCK])


class Hostile:
    """Its attributes raise, and so does its text."""

    def __reduce__(self) -> Any:
        raise RuntimeError("not me")

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        raise RuntimeError("no text")


def _fails(value: Any) -> Callable[[], Any]:
    return lambda: value


def _inner() -> Any:
    return [LOCK for _ in range(2)]


VALUES: list[tuple[Any, str]] = [
    (Data(1, LOCK), "v.held"),
    (Slots(), "v.held"),
    (Reduces(), "v (what its __reduce__ gives)[1][1][0]"),
    (functools.partial(print, 1, LOCK), "v (its arguments)[1]"),
    (functools.partial(print, file=LOCK), "v (its arguments)['file']"),
    (_fails(LOCK), "v (captured 'value')"),
    ({LOCK: 1}, "v (key <unlocked _thread.lock"),
    ({"k" * 100: LOCK}, "v['" + "k" * 59 + "...]"),
    (collections.deque([1, LOCK]), "v[1]"),
    (Data(1, LOCK).__repr__, "v (its object).held"),
    ((i for i in ()), "v"),
]


@pytest.mark.parametrize(("value", "path"), VALUES)
def test_the_part_of_a_value(value: Any, path: str) -> None:
    found, culprit = find_culprit(value, "v")
    assert found.startswith(path) and len(found) < len(path) + 40
    assert culprit is LOCK or path == "v"


def test_what_a_function_takes_from_its_module() -> None:
    by_value = type(_inner)(_inner.__code__, {"LOCK": LOCK}, "by_value")
    by_value.__module__ = "__main__"
    assert find_culprit(by_value, "f") == ("f (global 'LOCK')", LOCK)


def test_code_of_the_users_does_not_get_in_the_way() -> None:
    hostile = Hostile()
    assert find_culprit([1, hostile], "v")[0] == "v[1]"
    assert find_culprit({hostile: 1}, "v")[0] == "v (key <Hostile>)"


def test_values_that_contain_themselves_come_to_an_end() -> None:
    items: list[Any] = []
    items += [items, {"again": items}, LOCK]
    assert find_culprit(items, "v") == ("v[2]", LOCK)


def test_the_search_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    deep: Any = LOCK
    for _ in range(100):
        deep = [deep]
    assert find_culprit(deep, "v")[0] == "v" + "[0]" * culprits.MAX_DEPTH
    monkeypatch.setattr(culprits, "MAX_TRIALS", 50)
    many = [*range(1000), LOCK]
    assert find_culprit(many, "v") == ("v", many)
