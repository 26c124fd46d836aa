# ruff: noqa: N818
"""Exceptions of the user's that do what they like: none ends a worker, and each is still caught by its type."""

from __future__ import annotations

import abc
import copy
import dataclasses
import io
import pickle
import sys
import textwrap
import threading
import traceback
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import afield
from afield.causes import Cause, carried, load_unopened, open_cause
from afield.errors import of_constructor
from afield.runtime.process.serialization import deserialize, serialize_error
from tests.helpers import poll

PATIENCE_S = 30


class Attributes(Exception):
    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)


class EveryAttribute(Exception):
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"asked for {name}")


class Class(Exception):
    @property
    def __class__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("asked for its class")


class Falsy(Exception):
    def __bool__(self) -> bool:
        raise RuntimeError("asked whether it is true")

    def __len__(self) -> int:
        return -1


class Equal(Exception):
    def __eq__(self, other: object) -> bool:
        raise RuntimeError("compared")

    __hash__ = None  # type: ignore[assignment]


class Properties(Exception):
    @property
    def args(self) -> Any:  # type: ignore[override]
        raise RuntimeError("asked for args")

    @property
    def __cause__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("asked for its cause")

    @property
    def __traceback__(self) -> Any:  # type: ignore[override]
        while True:
            pass

    @property
    def __notes__(self) -> Any:
        while True:
            pass

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise SystemExit(3)


class Text(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)

    def __repr__(self) -> str:
        raise KeyboardInterrupt


class Reduces(Exception):
    def __reduce__(self) -> Any:
        raise KeyboardInterrupt


class ReducesToNothing(Exception):
    def __reduce__(self) -> Any:
        return str, ("no exception",)


def leave(kind: type[BaseException]) -> None:
    raise kind


class ReducesToExit(Exception):
    def __reduce__(self) -> Any:
        return leave, (SystemExit,)


class ReducesToInterrupt(Exception):
    def __reduce__(self) -> Any:
        return leave, (KeyboardInterrupt,)


class ReducesToGeneratorExit(Exception):
    def __reduce__(self) -> Any:
        return leave, (GeneratorExit,)


class State(Exception):
    def __setstate__(self, state: object) -> None:
        raise GeneratorExit

    def __init__(self) -> None:
        self.code = 5


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int

    def __str__(self) -> str:
        return f"frozen {self.code}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenKeywords(Exception):
    code: int


class Slots(Exception):
    __slots__ = ("code",)

    def __init__(self, code: int = 0) -> None:
        self.code = code


class ReadOnlyCause(Exception):
    @property
    def cause(self) -> str:
        return "my own"

    @property
    def summary(self) -> str:
        raise RuntimeError("not asked for")

    @property
    def function_name(self) -> str:
        return "mine"


class Required(Exception):
    def __new__(cls, code: int, *, detail: str) -> Required:
        return super().__new__(cls)

    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__()
        self.code = code


class Meta(type):
    def __new__(mcs, name: str, bases: Any, namespace: Any, *, registry: str) -> Any:
        return super().__new__(mcs, name, bases, namespace)

    def __init__(cls, name: str, bases: Any, namespace: Any, *, registry: str) -> None:
        super().__init__(name, bases, namespace)


class WithMetaclass(Exception, metaclass=Meta, registry="x"):
    pass


class Hostile(type):
    def __eq__(cls, other: object) -> bool:
        raise RuntimeError("compared")

    def __hash__(cls) -> int:
        raise RuntimeError("hashed")

    def __getattribute__(cls, name: str) -> Any:
        raise RuntimeError(f"asked for {name}")


class OfHostile(Exception, metaclass=Hostile):
    """Not even its class can be pickled."""


class Final(Exception):
    def __init_subclass__(cls, **kwargs: Any) -> None:
        raise TypeError("nothing is derived from it")


class Abstract(abc.ABC, Exception):
    pass


class NeverSet(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        raise RuntimeError(f"sets {name}")

    def add_note(self, note: str) -> None:
        raise RuntimeError("no notes")

    def with_traceback(self, traceback: Any) -> Any:
        raise RuntimeError("no tracebacks")


class OutOfMemory(afield.ObjectStoreFullError):
    """`MemoryError` among its bases does not decide about its memory."""


class OsLike(OSError):
    def __init__(self, path: str) -> None:
        super().__init__(2, "not there", path)


class Ours(Exception):
    """It has attributes with the names of `TaskError`'s."""

    def __init__(self) -> None:
        super().__init__("ours")
        self.cause = self.summary = self._remote = self._passed = self._base = self._foreseen = "mine"
        self.code = 9


class Itself(Exception):
    def __init__(self) -> None:
        super().__init__("a cycle")
        self.itself = self


MAKE: dict[str, Callable[[], BaseException]] = {
    "HTTPError": lambda: urllib.error.HTTPError("http://x", 404, "Not Found", None, None),  # type: ignore[arg-type]
    "HTTPError with a body": lambda: urllib.error.HTTPError("http://x", 500, "Broken", {}, io.BytesIO(b"no")),  # type: ignore[arg-type]
    "Required": lambda: Required(7, detail="seven"),
    "Frozen": lambda: Frozen(7),
    "FrozenKeywords": lambda: FrozenKeywords(code=7),
    "Slots": lambda: Slots(7),
    "OsLike": lambda: OsLike("/nowhere"),
    "OutOfMemory": lambda: OutOfMemory("the text"),
    "UnicodeDecodeError": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
}
PLAIN: list[type[BaseException]] = [
    Attributes, EveryAttribute, Class, Falsy, Equal, Properties, Text, Reduces, ReducesToNothing, ReducesToExit,
    ReducesToInterrupt, ReducesToGeneratorExit, State, ReadOnlyCause, WithMetaclass, Final, Abstract, NeverSet, Ours, Itself,
]  # fmt: skip
MAKE |= {kind.__name__: kind for kind in PLAIN}
#: Python itself cannot print these.
UNPRINTABLE = {"Attributes", "EveryAttribute", "Class", "Falsy", "Properties"}


class Raiser:
    def fail_for_a_hostile_class(self) -> None:
        raise OfHostile("the text")

    def fail(self, name: str) -> None:
        raise MAKE[name]()

    def ping(self) -> str:
        return "alive"


@pytest.fixture
def raiser(shared_runtime: None) -> Any:
    return afield.remote(Raiser).remote()


@pytest.mark.parametrize("name", MAKE)
def test_an_exception_of_any_kind_ends_no_worker_and_is_caught_by_its_type(
    shared_runtime: None, raiser: Any, name: str
) -> None:
    @afield.remote
    def fail() -> None:
        raise MAKE[name]()

    kind = type(MAKE[name]())
    for ref in (raiser.fail.remote(name), fail.remote()):
        try:
            afield.get(ref, timeout=PATIENCE_S)
        except kind as caught:
            error: Any = caught
        assert issubclass(type(error), afield.TaskError)
        assert type(error.cause) is kind
        assert error.function_name.endswith("fail") and kind.__name__ in error.summary
        assert "fail" in error.remote_traceback and f"raised {kind.__name__}" in str(error)
        if name not in UNPRINTABLE:
            assert "raise MAKE[name]()" in "".join(traceback.format_exception(error))
        # What is caught can be looked at, kept in sets and dicts, noted, passed on.
        assert error and error == error and error in {error}
        error.add_note("seen")
        error.extra = 1
        assert error.extra == 1 and "extra" in vars(error)
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and str(again) == str(error)
    assert afield.get(raiser.ping.remote(), timeout=PATIENCE_S) == "alive"


def test_an_exception_whose_class_cannot_be_pickled_is_described(raiser: Any) -> None:
    with pytest.raises(afield.TaskError, match="OfHostile: the text") as caught:
        afield.get(raiser.fail_for_a_hostile_class.remote(), timeout=PATIENCE_S)
    assert caught.value.cause is None and "in fail_for_a_hostile_class" in caught.value.remote_traceback
    assert afield.get(raiser.ping.remote(), timeout=PATIENCE_S) == "alive"


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("Frozen", {"code": 7}),
        ("FrozenKeywords", {"code": 7}),
        ("Slots", {"code": 7}),
        ("Required", {"code": 7}),
        ("OsLike", {"errno": 2, "filename": "/nowhere"}),
        ("UnicodeDecodeError", {"start": 0, "reason": "invalid"}),
        ("Ours", {"code": 9}),
        ("HTTPError", {"code": 404, "msg": "Not Found"}),
        ("State", {"code": 5}),
    ],
)
def test_attributes_are_there_on_the_error_and_on_its_cause(raiser: Any, name: str, attributes: dict[str, Any]) -> None:
    with pytest.raises(afield.TaskError) as caught:
        afield.get(raiser.fail.remote(name), timeout=PATIENCE_S)
    for error in (caught.value, caught.value.cause):
        assert {each: getattr(error, each) for each in attributes} == attributes


@pytest.mark.parametrize("name", ["Attributes", "Class", "Frozen", "ReducesToExit", "NeverSet"])
def test_a_constructor_raises_it(shared_runtime: None, name: str) -> None:
    class Local:
        def __init__(self) -> None:
            raise MAKE[name]()

        def ping(self) -> None:
            pass

    actor = afield.remote(Local).remote()
    with pytest.raises(afield.ActorConstructionError, match=name) as caught:
        afield.get(actor.ping.remote(), timeout=PATIENCE_S)
    assert type(caught.value.cause) is type(MAKE[name]()) and issubclass(type(caught.value), type(caught.value.cause))


def test_it_is_a_cause_a_context_or_a_member_of_another(shared_runtime: None) -> None:
    @afield.remote
    def fail(how: str) -> None:
        try:
            try:
                raise Properties
            except Properties:
                raise EveryAttribute  # noqa: B904
        except EveryAttribute as error:
            if how == "group":
                raise ExceptionGroup("several", [Class(), Falsy(), error]) from None
            raise ValueError(how) from error

    with pytest.raises(ValueError, match="chain") as caught:
        afield.get(fail.remote("chain"), timeout=PATIENCE_S)
    text = caught.value.remote_traceback  # type: ignore[attr-defined]
    assert "Properties" in text and "EveryAttribute" in text
    with pytest.raises(afield.TaskError, match="several"):
        afield.get(fail.remote("group"), timeout=PATIENCE_S)


@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration])
def test_what_would_end_an_iteration_of_the_reader_s_is_no_more_than_a_task_error(
    shared_runtime: None, kind: type[Exception]
) -> None:
    """`list(map(get, refs))` would be silently short."""

    @afield.remote
    def fail(x: int) -> int:
        if x == 1:
            raise kind(5)
        return x

    with pytest.raises(afield.TaskError, match=kind.__name__) as caught:
        list(map(afield.get, [fail.remote(x) for x in range(3)]))
    assert not isinstance(caught.value, kind) and isinstance(caught.value.cause, kind)


# -- at the reader ------------------------------------------------------------------------------------------------


class Elsewhere(Exception):
    """Raises where it arrives, though it did not on trial."""

    where = "worker"

    def __reduce__(self) -> Any:
        return _elsewhere, ()


def _elsewhere() -> Any:
    if Elsewhere.where == "reader":
        raise MemoryError("not here")
    return Elsewhere()


def test_a_cause_that_cannot_be_rebuilt_at_the_reader_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    data = serialize_error(afield.TaskError.from_exception("f", Elsewhere("x")))
    monkeypatch.setattr(Elsewhere, "where", "reader")
    error = deserialize(data, "the value", None)
    assert type(error) is afield.TaskError and error.cause is None
    assert "Elsewhere" in str(error) and "Elsewhere" in repr(error.__cause__)


def test_who_holds_a_lock_passes_an_error_on_without_rebuilding_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = serialize_error(afield.TaskError.from_exception("f", Elsewhere("x")))
    monkeypatch.setattr(Elsewhere, "where", "reader")
    passed = serialize_error(of_constructor("A.__init__", load_unopened(data)))
    monkeypatch.setattr(Elsewhere, "where", "worker")
    error = deserialize(passed, "the value", None)
    assert isinstance(error, Elsewhere) and isinstance(error, afield.ActorConstructionError)
    assert type(error.cause) is Elsewhere  # type: ignore[attr-defined]


def test_an_argument_s_own_loss_is_what_a_constructor_fails_with(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = afield.ObjectLostError("gone")
    lost.__cause__ = Elsewhere("x")
    data = serialize_error(lost)
    monkeypatch.setattr(Elsewhere, "where", "reader")
    passed = serialize_error(of_constructor("A.__init__", load_unopened(data)))
    monkeypatch.setattr(Elsewhere, "where", "worker")
    error: Any = deserialize(passed, "the value", None)
    assert isinstance(error, afield.ObjectLostError) and isinstance(error, afield.ActorConstructionError)
    assert type(error.cause.__cause__) is Elsewhere


def test_ctrl_c_while_a_cause_is_rebuilt_is_the_reader_s(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (data,) = carried(ReducesToInterrupt(), pickle.dumps)
    assert type(open_cause(data)) is ReducesToInterrupt, "on trial it raised, so it goes in parts"
    with pytest.raises(KeyboardInterrupt):
        open_cause(pickle.dumps(ReducesToInterrupt()))


def test_a_cause_by_itself_is_pickled_in_full() -> None:
    error = copy.copy(pickle.loads(pickle.dumps(Cause(Slots(3)))))
    assert error.code == 3


# -- retries ------------------------------------------------------------------------------------------------------


@pytest.fixture
def only_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A module that only workers with this environment can import."""
    (tmp_path / "only_there.py").write_text(
        textwrap.dedent(
            """
            class NotHereError(ValueError):
                def __init__(self, code, *, detail):
                    super().__init__(code)
                    self.code = code

            def fail_first(path):
                with open(path, "a") as file:
                    file.write("x")
                with open(path) as file:
                    if len(file.read()) < 3:
                        raise NotHereError(3, detail="x")
                return "done"
            """
        )
    )
    return {"py_modules": [str(tmp_path / "only_there.py")]}


@pytest.mark.parametrize("retry", [True, [ValueError], [OSError, ValueError], [KeyError], []])
def test_the_worker_says_whether_an_error_is_one_to_be_retried(
    shared_runtime: None, only_there: dict[str, Any], tmp_path: Path, retry: Any
) -> None:
    @afield.remote(runtime_env=only_there, max_retries=4, retry_exceptions=retry)
    def fail(path: str) -> str:
        import only_there

        return only_there.fail_first(path)  # type: ignore[no-any-return]

    ref = fail.remote(str(tmp_path / "runs"))
    if retry is True or ValueError in retry:
        assert afield.get(ref, timeout=PATIENCE_S) == "done"
        assert (tmp_path / "runs").read_text() == "xxx"
    else:
        with pytest.raises(afield.TaskError, match="NotHereError: 3"):
            afield.get(ref, timeout=PATIENCE_S)
        assert (tmp_path / "runs").read_text() == "x"
    assert "only_there" not in sys.modules


@pytest.mark.parametrize("num_returns", [0, 2, "streaming"])
def test_errors_are_retried_whatever_the_number_of_results(
    shared_runtime: None, tmp_path: Path, num_returns: Any
) -> None:
    class Local:
        @afield.method(num_returns=num_returns, max_task_retries=2, retry_exceptions=[OSError])
        def fail(self, path: str) -> Any:
            with open(path, "a") as file:
                file.write("x")
            raise FileNotFoundError(path)

        def ping(self) -> str:
            return "alive"

    actor = afield.remote(Local).remote()
    path = tmp_path / "runs"
    refs = actor.fail.remote(str(path))
    if num_returns == 2:
        for ref in refs:
            with pytest.raises(FileNotFoundError):
                afield.get(ref, timeout=PATIENCE_S)
    elif num_returns == "streaming":
        with pytest.raises(FileNotFoundError):
            afield.get(next(refs), timeout=PATIENCE_S)
    assert afield.get(actor.ping.remote(), timeout=PATIENCE_S) == "alive"
    poll(lambda: path.read_text() == "xxx")


def test_refs_in_an_error_that_is_retried_are_let_go(shared_runtime: None, tmp_path: Path) -> None:
    class WithRef(Exception):
        pass

    @afield.remote(max_retries=1, retry_exceptions=[WithRef])
    def fail(path: str) -> str:
        if not Path(path).exists():
            Path(path).touch()
            error = WithRef()
            error.ref = afield.put("inside")  # type: ignore[attr-defined]
            raise error
        return "done"

    assert afield.get(fail.remote(str(tmp_path / "once")), timeout=PATIENCE_S) == "done"


class Unspeakable:
    """Can neither be pickled nor shown."""

    def __reduce__(self) -> Any:
        raise TypeError("no")

    def __repr__(self) -> str:
        raise SystemExit


def raise_with_a_lock() -> None:
    raise ValueError("locked", threading.Lock(), Unspeakable(), 5)


def test_an_argument_that_cannot_be_pickled_costs_the_error_nothing_but_itself(shared_runtime: None) -> None:
    """It once arrived as a plain TaskError, which `except ValueError` misses."""
    passed_on = afield.remote(lambda ref: ref)
    for ref in (afield.remote(raise_with_a_lock).remote(), passed_on.remote(afield.remote(raise_with_a_lock).remote())):
        with pytest.raises(ValueError) as caught:
            afield.get(ref, timeout=60)
        cause = caught.value.cause  # type: ignore[attr-defined]
        assert type(cause) is ValueError
        said, lock, unspeakable, number = cause.args
        assert (said, number) == ("locked", 5)
        assert "lock object" in lock and unspeakable == "(Unspeakable, which cannot be shown)"
