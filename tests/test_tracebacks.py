"""Tracebacks of tasks: shown as Python would have shown them where the error was raised, with nothing of ours between."""

from __future__ import annotations

import asyncio
import linecache
import os
import pickle
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import afield
from afield import code_names, source_lines, tracebacks
from afield.runtime.process.serialization import deserialize, serialize
from afield.util import ActorPool
from afield.util.multiprocessing import Pool
from tests.traceback_helpers import (
    CELLS,
    CODE,
    FAILS,
    HERE,
    PATIENCE_S,
    caught,
    decorated,
    executed,
    fail,
    frames_of,
    nested,
    ours,
    register,
)


@pytest.fixture
def cells() -> Iterator[None]:
    before = dict(linecache.cache)
    yield
    linecache.cache.clear()
    linecache.cache.update(before)


# -- described and made again: what Python prints stays the same ---------------------------------------------------


def chained() -> None:
    try:
        fail(0)
    except ZeroDivisionError as error:
        error.add_note("a note\nof two lines")
        raise ValueError("from it") from error


def in_context() -> None:
    try:
        chained()
    except ValueError:
        {}["missing"]  # type: ignore[index]


def without_context() -> None:
    try:
        fail(0)
    except ZeroDivisionError:
        raise KeyError("alone") from None


def grouped() -> None:
    errors: list[Exception] = []
    for function in (chained, in_context):
        try:
            function()
        except Exception as error:
            errors.append(error)
    raise ExceptionGroup("both", [*errors, ExceptionGroup("inner", [OSError(2, "no file")])])


def recursive() -> None:
    def down(n: int) -> int:
        return down(n + 1)

    down(0)


def over_lines() -> None:
    fail(
        0 + 0,
    )


def misspelt() -> None:
    nearly_right = 1
    nearly_rihgt  # type: ignore[name-defined]  # noqa: B018, F821
    del nearly_right


def of_another_length() -> None:
    "ä" + "ö" + fail(0)  # type: ignore[operator]


RAISING = [chained, in_context, without_context, grouped, recursive, over_lines, misspelt, of_another_length]


@pytest.mark.parametrize("function", RAISING, ids=lambda function: function.__name__)
def test_what_is_put_back_is_shown_as_before(function: Callable[[], None]) -> None:
    try:
        function()
    except Exception as error:
        before = "".join(traceback.format_exception(error))
        report = tracebacks.describe(error)
    again = pickle.loads(pickle.dumps(report, 5))
    assert tracebacks.formatted(again) == before
    stand_in, lent = tracebacks.stand_in(again)
    assert not lent
    assert tracebacks.formatted(tracebacks.describe(stand_in)) == before  # at the next process


def test_a_report_is_small_however_deep_the_error_is() -> None:
    def ping(n: int) -> int:
        return pong(n + 1)

    def pong(n: int) -> int:
        return ping(n + 1)

    for function, limit in ((recursive, 1500), (lambda: ping(0), 10_000)):
        with pytest.raises(RecursionError) as info:
            function()
        report = tracebacks.describe(info.value)
        assert len(pickle.dumps(report)) < limit
    text = tracebacks.formatted(report)
    assert "more frames>" in text and "in test_a_report_is_small" in text and text.count("return pong") > 10


def test_a_report_is_small_however_long_the_chain_is() -> None:
    error: Exception = ValueError("x" * 1_000_000)
    for _ in range(5000):
        later = ValueError("y")
        later.__cause__ = error
        error = later
    error.__cause__, first = later.__cause__, error
    group = ExceptionGroup("many", [ValueError("z" * 100_000) for _ in range(1000)])
    for each in (first, group):
        assert len(pickle.dumps(tracebacks.describe(each))) < 32 * 20_000
    first.__cause__ = first.__context__ = first  # a cycle
    assert tracebacks.describe(first).cause is None


def test_nothing_runs_when_frames_are_made_again() -> None:
    """Else debuggers and coverage tools would see lines of the user's run that did not run here."""
    with pytest.raises(ZeroDivisionError) as info:
        fail(0)
    report = tracebacks.describe(info.value)
    seen = []

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename == HERE:
            seen.append((frame.f_code.co_name, event))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        tracebacks.stand_in(report)
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)
    assert seen == []


def test_an_error_that_cannot_be_shown_can_be_described() -> None:
    class SilentError(Exception):
        def __str__(self) -> str:
            raise ValueError

    assert "its text cannot be shown" in tracebacks.formatted(tracebacks.describe(SilentError()))


# -- frames of ours ------------------------------------------------------------------------------------------------


def test_get_leaves_no_frame(shared_runtime: None) -> None:
    error = caught(afield.remote(fail).remote(0))
    assert [name for _, name, _ in frames_of(error)] == ["caught"]
    assert frames_of(error.__cause__) == [FAILS]
    with pytest.raises(afield.WorkerCrashedError) as info:
        afield.get(afield.remote(lambda: os._exit(3)).options(max_retries=0).remote(), timeout=PATIENCE_S)
    assert [file for file, _, _ in frames_of(info.value)] == [__file__]


def test_all_frames_are_shown_on_request(shared_runtime: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFIELD_FULL_TRACEBACKS", "1")
    error = caught(afield.remote(fail).remote(0))
    assert [name for _, name, _ in frames_of(error)] == ["caught", "get", "get", "value_of"]


@pytest.mark.parametrize("name", ["put", "argument", "method", "constructor", "function"])
def test_what_cannot_be_pickled_is_told_at_the_users_line(shared_runtime: None, name: str) -> None:
    class Local:
        def take(self, x: Any) -> None:
            pass

    lock = types.ModuleType("x").__loader__, Unpicklable()
    actor = afield.remote(Local).remote()
    calls: dict[str, Callable[[], Any]] = {
        "put": lambda: afield.put(lock),
        "argument": lambda: afield.remote(fail).remote(lock),
        "method": lambda: actor.take.remote(lock),
        "constructor": lambda: afield.remote(Holder).remote(lock),
        "function": lambda: afield.remote(lambda: lock).remote(),
    }
    with pytest.raises(afield.SerializationError) as info:
        calls[name]()
    assert ours("".join(traceback.format_exception(info.value))) == []
    assert [name for _, name, _ in frames_of(info.value.__cause__)] == ["__reduce__"]


class Unpicklable:
    """Raises when it is pickled."""

    def __reduce__(self) -> Any:
        raise ValueError("this stays here")


class Holder:
    """An actor class with an argument."""

    def __init__(self, x: Any) -> None:
        pass


def test_where_our_own_code_fails_its_frames_stay() -> None:
    with pytest.raises(TypeError) as info:
        deserialize(3, "x", None)  # type: ignore[arg-type]
    before = frames_of(info.value)
    tracebacks.trim(info.value)
    assert frames_of(info.value) == before and before[-1][1] == "deserialize"
    tracebacks.trim(info.value, foreseen=True)
    assert frames_of(info.value) == before[:-1]


# -- through several processes, and by other ways than get ---------------------------------------------------------


def test_an_error_that_passes_through_tasks_keeps_each_part(shared_runtime: None) -> None:
    inner = afield.remote(fail)

    @afield.remote
    def middle() -> Any:
        return afield.get(inner.remote(0))  # in the middle

    @afield.remote
    def outer() -> Any:
        return afield.get([middle.remote()])  # outside

    error = caught(outer.remote())
    assert error.function_name == "fail" and isinstance(error.cause, ZeroDivisionError)
    assert [(name, line) for _, name, line in frames_of(error)][1:] == [
        ("outer", "return afield.get([middle.remote()])  # outside"),
        ("middle", "return afield.get(inner.remote(0))  # in the middle"),
    ]
    assert [name for _, name, _ in frames_of(error.__cause__)] == ["fail"]
    text = error.remote_traceback
    places = [text.index(part) for part in ("in fail", "direct cause", "in outer", "in middle", "TaskError(ZeroDiv")]
    assert places == sorted(places) and ours(text) == []
    again = pickle.loads(pickle.dumps(error))
    assert again.remote_traceback == text and [name for _, name, _ in frames_of(again)] == ["outer", "middle"]


def test_an_error_that_is_raised_from_a_tasks_error(shared_runtime: None) -> None:
    inner = afield.remote(fail)

    @afield.remote
    def outer() -> Any:
        try:
            afield.get(inner.remote(0))
        except ZeroDivisionError as error:
            raise LookupError("nothing there") from error

    error = caught(outer.remote())
    assert isinstance(error, LookupError) and isinstance(error.cause, LookupError)
    text = "".join(traceback.format_exception(error))
    parts = [", in fail", "ZeroDivisionError: division", "TaskError(ZeroDivisionError): fail() raised"]
    parts += ["LookupError: nothing there", ", in caught", "TaskError(LookupError): "]
    places = [text.index(part) for part in parts]
    assert places == sorted(places) and [text.count(part) for part in parts[:4]] == [1, 2, 1, 2]
    assert text.count("direct cause") == 3 and ours(text) == []


def test_futures_and_callbacks(shared_runtime: None) -> None:
    function = afield.remote(fail)
    seen: list[Any] = []
    future = function.remote(0).future()
    future.add_done_callback(lambda done: seen.append(done.exception()))
    error = future.exception(timeout=PATIENCE_S)
    assert seen == [error] and frames_of(error) == []
    assert frames_of(error.__cause__) == [FAILS]

    async def main() -> None:
        await function.remote(0)  # by await

    with pytest.raises(ZeroDivisionError) as info:
        asyncio.run(main())
    assert frames_of(info.value)[-1] == (__file__, "main", "await function.remote(0)  # by await")
    assert frames_of(info.value.__cause__)[-1][1] == "fail"


@pytest.mark.parametrize("way", ["executor", "chunks", "pool", "actors"])
def test_the_libraries_show_the_users_frames_only(shared_runtime: None, way: str) -> None:
    class Local:
        def call(self, x: int) -> float:
            return fail(x)

    def run() -> Any:
        if way == "pool":
            with Pool(1) as pool:
                return pool.map(fail, [0])
        if way == "actors":
            actors = ActorPool([afield.remote(Local).remote()])
            return list(actors.map(lambda actor, x: actor.call.remote(x), [0]))
        with afield.Executor() as executor:
            return list(executor.map(fail, [0, 1], chunksize=1 if way == "executor" else 2))

    with pytest.raises(ZeroDivisionError) as info:
        run()
    assert frames_of(info.value.__cause__)[-1] == FAILS
    assert ours("".join(traceback.format_exception(info.value))) == []


def test_joblib_and_dask_show_the_users_line(shared_runtime: None) -> None:
    dask = pytest.importorskip("dask")
    joblib = pytest.importorskip("joblib")
    nested_one = nested()
    afield.register_joblib()
    with pytest.raises(ZeroDivisionError) as first, joblib.parallel_config("afield"):
        joblib.Parallel(2)(joblib.delayed(nested_one)(x) for x in [1, 0])
    with pytest.raises(ZeroDivisionError) as second:
        dask.delayed(nested_one)(0).compute(scheduler=afield.dask_get)
    for info in (first, second):
        assert frames_of(info.value.__cause__)[-1] == (
            HERE,
            "inner",
            "return facts() if x is None else 1 / x  # nested",
        )
        assert ours("".join(traceback.format_exception(info.value))) == []


# -- what we rely on -----------------------------------------------------------------------------------------------


@pytest.mark.contract
def test_cloudpickle_lets_us_name_the_file() -> None:
    """If this fails, cloudpickle reduces code in another way than by its dispatch table: see `code_names`."""

    class Local:
        def method(self) -> Any:
            return lambda: [x + 1 for x in (1, 2)]

    functions = [nested(), executed("<a-cell>"), Local.method, decorated(fail)]
    for function in functions:
        again = deserialize(serialize(function, "it", stored=False).pack(), "it", None)
        assert again is not function
        names = {code.co_filename for code in all_code(again.__code__)}
        assert names == {function.__code__.co_filename}
        assert list(all_code(again.__code__)) == list(all_code(function.__code__))
    pickler = type("Pickler", (), {"dispatch_table": {}})()
    assert code_names.reduce_code(pickler, fail.__code__) is NotImplemented


def all_code(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield code and all code inside."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from all_code(constant)


@pytest.mark.contract
def test_python_keeps_sources_without_a_file(cells: None) -> None:
    """`linecache` never drops them, and everything that shows a traceback asks it."""
    register(CELLS[0])
    linecache.checkcache()
    assert linecache.getline(CELLS[0], 4) == "        return facts()\n"
    assert source_lines.carried(executed(CELLS[0]).__code__) is linecache.cache[CELLS[0]][2]
    assert source_lines.carried(fail.__code__) is None and source_lines.carried(executed("<stdin>").__code__) is None
    linecache.cache[CELLS[1]] = (1 << 20, None, ["x" * (1 << 20)], CELLS[1])
    assert source_lines.carried(executed(CELLS[1]).__code__) is None  # too large to travel with each function


def test_doctest_sources_travel(cells: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = linecache.getlines
    lines = CODE.splitlines(keepends=True)
    monkeypatch.setattr(
        linecache, "getlines", lambda file, *rest: lines if file == "<doctest x[0]>" else real(file, *rest)
    )
    assert source_lines.carried(executed("<doctest x[0]>").__code__) == lines
