"""Exceptions: all of them are documented, travel with their cause and traceback, and are short in `str`, complete in `repr`."""

from __future__ import annotations

import inspect
import pickle
import threading
import tracemalloc
from typing import Any

import cloudpickle
import pytest

import afield
from afield import causes, errors, exceptions
from afield.errors import AfieldError, TaskError

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, AfieldError)]
PLAIN = [kind for kind in KINDS if not issubclass(kind, TaskError)]
PATIENCE_S = 30.0


class RefusedError(Exception):
    """An exception that pickle cannot rebuild by itself: its constructor takes more than its args."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{reason} ({code})")
        self.code = code


def round_trip(error: BaseException) -> Any:
    return pickle.loads(cloudpickle.dumps(error, 5))


def test_the_documentation_names_every_exception() -> None:
    assert sorted(kind.__name__ for kind in KINDS) == errors.__all__, "afield.errors.__all__ is the one list of them"
    assert set(errors.__all__) < set(exceptions.__all__) and set(errors.__all__) < set(afield.__all__)
    for name in errors.__all__:
        assert getattr(exceptions, name) is getattr(afield, name) is getattr(errors, name)
        assert f"`{name}`" in (exceptions.__doc__ or "") or name == "AfieldError"


@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.__name__)
def test_an_exception_travels_with_its_cause(kind: type[AfieldError]) -> None:
    error = kind("what happened; what to do")
    error.__cause__ = ValueError("the cause")
    error.add_note("a note")
    again = round_trip(error)
    assert type(again) is kind and again.args == error.args
    assert str(again) == "what happened; what to do"
    assert type(again.__cause__) is ValueError and again.__cause__.args == ("the cause",)
    assert again.__notes__ == ["a note"]
    assert repr(again) == f"{kind.__name__}('what happened; what to do')\ncaused by ValueError('the cause')"
    assert repr(kind("x")) == f"{kind.__name__}('x')"


def test_a_cause_that_pickle_cannot_rebuild_travels_in_parts() -> None:
    error = errors.ActorDiedError("the actor is dead")
    error.__cause__ = RefusedError(7, "no")
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(error.__cause__))
    cause = round_trip(error).__cause__
    assert type(cause) is RefusedError and cause.code == 7 and str(cause) == "no (7)"
    vars(error.__cause__)["lock"] = threading.Lock()
    cause = round_trip(error).__cause__
    assert cause.code == 7 and not hasattr(cause, "lock")


def test_a_task_error_is_short_and_complete(shared_runtime: None) -> None:
    def fail() -> None:
        try:
            dict[str, int]()["missing"]
        except KeyError as error:
            raise ValueError("no such thing") from error

    with pytest.raises(ValueError) as caught:
        afield.get(afield.remote(name="fetch")(fail).remote(), timeout=PATIENCE_S)
    error = caught.value
    assert isinstance(error, TaskError)
    assert str(error) == "fetch() raised ValueError: no such thing"
    assert "in fail" in repr(error) and "KeyError: 'missing'" in repr(error)
    again = round_trip(error)
    assert type(again) is type(error) and isinstance(again, ValueError)
    assert again.remote_traceback == error.remote_traceback and "in fail" in again.remote_traceback
    assert type(again.cause) is ValueError and again.__cause__ is again.cause


def test_a_failed_constructor_is_named_by_the_error_of_every_call(shared_runtime: None) -> None:
    class Broken:
        def __init__(self) -> None:
            raise KeyError("no configuration")

        def work(self) -> None:
            pass

    actor = afield.remote(Broken).remote()
    for _ in range(2):
        with pytest.raises(AfieldError) as caught:
            afield.get(actor.work.remote(), timeout=PATIENCE_S)
        assert "\n" not in str(caught.value)
        assert "no configuration" in repr(caught.value) and "no configuration" in repr(round_trip(caught.value))


LARGE = [
    (ValueError(b"x" * (1 << 24)), "b'xxx", "... (16777216 in all)"),
    (ValueError("first", b"y" * (1 << 24), 3), "('first', b'yyy", "... (3 in all))"),
    (KeyError("k" * (1 << 24)), "'kkk", "... (16777216 in all)"),
    (ValueError("t" * (1 << 24)), "ttt", "... (16777216 characters in all)"),
    (ValueError([b"z" * 1000] * 10_000), "[b'zzz", "... (10000 in all)]"),
    (ValueError({"a": list(range(100_000)), "b": 1}), "{'a': [0, 1, 2", "... (2 in all)}"),
    (ValueError({1}, frozenset(range(100_000))), "({1}, frozenset({", "... (100000 in all)}))"),
]


@pytest.mark.parametrize("index", range(len(LARGE)))
def test_the_text_of_a_large_error_is_its_beginning(index: int) -> None:
    error, begin, end = LARGE[index]
    tracemalloc.start()
    try:
        text = causes.text_of(error)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert text.startswith(begin) and text.endswith(end) and len(text) < 2 * causes.MAX_TEXT
    assert peak < 4 << 20, "it is not made whole first"


def test_the_text_of_other_errors_is_whole() -> None:
    class OwnError(Exception):
        def __str__(self) -> str:
            return f"own {len(self.args[0])}"

    cycle: list[Any] = [1]
    cycle.append(cycle)
    errors: list[BaseException] = [
        ValueError(),
        ValueError(3),
        ValueError("a", 1),
        ValueError((1,)),
        KeyError("k"),
        KeyError("a", b"b"),
        KeyError(),
        OSError(2, "no file", "name"),
        ValueError({"a": {1, 2}, "b": frozenset()}),
        ValueError(cycle),
        OwnError(b"x" * (1 << 20)),
        ValueError([b"q" * 60_000]),
    ]
    assert [causes.text_of(error) for error in errors] == [str(error) for error in errors]


def test_a_large_error_arrives_whole_and_its_text_does_not(shared_runtime: None) -> None:
    @afield.remote(max_retries=0)
    def fail() -> None:
        raise ValueError("payload", b"x" * (1 << 22))

    with pytest.raises(ValueError) as caught:
        afield.get(fail.remote())
    assert isinstance(caught.value, afield.TaskError)
    assert len(str(caught.value)) < 1 << 18 and "... (4194304 in all))" in str(caught.value)
    cause = caught.value.cause
    assert cause is not None and cause.args == ("payload", b"x" * (1 << 22))
