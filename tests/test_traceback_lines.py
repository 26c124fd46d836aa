"""Files, lines and source lines of tasks, for every kind of function, also where the worker cannot read the source."""

from __future__ import annotations

import asyncio
import linecache
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import afield
from tests.traceback_helpers import (
    CELLS,
    CODE,
    FAILS,
    HERE,
    PATIENCE_S,
    caught,
    decorated,
    executed,
    facts,
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


# -- every kind of function ----------------------------------------------------------------------------------------


KINDS: dict[str, tuple[Callable[[], Callable[..., Any]], str, str]] = {
    "nested": (nested, "return facts() if x is None else 1 / x  # nested", HERE),
    "lambda": (
        lambda: lambda x: facts() if x is None else 1 / x,  # a lambda
        "lambda: lambda x: facts() if x is None else 1 / x,  # a lambda",
        __file__,
    ),
    "decorated": (lambda: decorated(nested()), "return facts() if x is None else 1 / x  # nested", HERE),
    "importable": (lambda: importable, "return facts() if x is None else 1 / x  # imported", __file__),
}


def importable(x: Any) -> Any:
    """Imported by the worker."""
    return facts() if x is None else 1 / x  # imported


def check(run: Callable[[Any], Any], name: str, line: str, file: str) -> None:
    """Look at what code finds out about itself, and at the error that it raises."""
    found = run(None)
    assert found["code"][0] == file and found["warning"] == found["logging"] == found["code"]
    assert (found["getsourcefile"], line in found["source"]) == (file, True)
    number = found["code"][1]
    with pytest.raises(ZeroDivisionError) as info:
        run(0)
    error: Any = info.value
    assert frames_of(error.__cause__)[-1] == (file, name, line)
    assert f'  File "{file}", line {number}, in {name}\n    {line}\n' in error.remote_traceback
    assert ours("".join(traceback.format_exception(error))) == []


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_function(shared_runtime: None, kind: str) -> None:
    make, line, file = KINDS[kind]
    name = {"nested": "inner", "decorated": "inner", "lambda": "<lambda>"}.get(kind, kind)
    function = afield.remote(make())
    check(lambda x: afield.get(function.remote(x), timeout=PATIENCE_S), name, line, file)


def test_a_decorator_is_shown(shared_runtime: None) -> None:
    error = caught(afield.remote(decorated(fail)).remote(0))
    shown = [(name, line) for _, name, line in frames_of(error.__cause__)]
    assert shown == [
        ("wrapper", "return function(*args)  # by the decorator"),
        ("fail", "return 1 / x  # the line that fails"),
    ]


@pytest.mark.parametrize("file", CELLS)
def test_a_cell_of_a_notebook_or_of_the_repl(shared_runtime: None, cells: None, file: str) -> None:
    register(file)
    function = afield.remote(executed(file))
    assert afield.get(function.remote(None), timeout=PATIENCE_S)["code"] == (file, 4)
    found = afield.get(function.remote(None), timeout=PATIENCE_S)
    assert found["warning"] == found["logging"] == (file, 4)
    assert found["getsourcefile"] == file and found["source"] == CODE.lstrip()
    error = caught(function.remote(0))
    assert frames_of(error.__cause__)[-1][::2] == (file, "return [1 / x  # in the cell")
    del linecache.cache[file]
    again = caught(function.remote(0))  # a process that does not know the cell gets the lines that the worker knows
    assert frames_of(again.__cause__)[-1][::2] == (file, "return [1 / x  # in the cell")


@pytest.mark.parametrize("file", ["<stdin>", "<string>"])
def test_code_without_a_source(shared_runtime: None, file: str) -> None:
    function = afield.remote(executed(file))
    found = afield.get(function.remote(None), timeout=PATIENCE_S)
    assert found["code"] == found["warning"] == found["logging"] == (file, 4) and found["source"] == ""
    error = caught(function.remote(0))
    assert frames_of(error.__cause__)[-1][::2] == (file, "")
    assert f'  File "{file}", line 5, in in_cell\n' in error.remote_traceback


def test_methods_of_actors(shared_runtime: None) -> None:
    class Local:
        def plain(self, x: Any) -> Any:
            return facts() if x is None else 1 / x  # a method

        @staticmethod
        def static(x: Any) -> Any:
            return facts() if x is None else 1 / x  # a static method

        def items(self, x: Any) -> Iterator[Any]:
            yield facts() if x is None else 1 / x  # an item

    actor = afield.remote(Local).remote()

    def get(method: str) -> Callable[[Any], Any]:
        return lambda x: afield.get(getattr(actor, method).remote(x), timeout=PATIENCE_S)

    check(get("plain"), "plain", "return facts() if x is None else 1 / x  # a method", __file__)
    check(get("static"), "static", "return facts() if x is None else 1 / x  # a static method", __file__)
    items = lambda x: afield.get(next(actor.items.remote(x)), timeout=PATIENCE_S)  # noqa: E731
    check(items, "items", "yield facts() if x is None else 1 / x  # an item", __file__)


def test_methods_of_async_actors(shared_runtime: None) -> None:
    class Local:
        async def coroutine(self, x: Any) -> Any:
            await asyncio.sleep(0)
            return facts() if x is None else 1 / x  # awaited

        async def items(self, x: Any) -> Any:
            yield facts() if x is None else 1 / x  # an item

        async def passes_on(self, ref: list[Any]) -> Any:
            return await ref[0]  # by await

    actor = afield.remote(Local).remote()
    run = lambda x: afield.get(actor.coroutine.remote(x), timeout=PATIENCE_S)  # noqa: E731
    check(run, "coroutine", "return facts() if x is None else 1 / x  # awaited", __file__)
    items = lambda x: afield.get(next(actor.items.remote(x)), timeout=PATIENCE_S)  # noqa: E731
    check(items, "items", "yield facts() if x is None else 1 / x  # an item", __file__)
    error = caught(actor.passes_on.remote([afield.remote(fail).remote(0)]))
    assert [name for _, name, _ in frames_of(error)] == ["caught", "passes_on"]
    assert frames_of(error)[1] == (__file__, "passes_on", "return await ref[0]  # by await")
    assert frames_of(error.__cause__)[-1][1] == "fail"


def test_a_constructor(shared_runtime: None) -> None:
    class Local:
        def __init__(self, x: float) -> None:
            self.y = fail(x)  # type: ignore[arg-type]  # in the constructor

        def method(self) -> None:
            pass

    for argument in (0, afield.remote(fail).remote(0)):
        with pytest.raises(afield.ActorConstructionError) as info:
            afield.get(afield.remote(Local).remote(argument).method.remote(), timeout=PATIENCE_S)
        error = info.value
        names = [name for _, name, _ in frames_of(error.__cause__)]
        assert names == (["__init__", "fail"] if argument == 0 else ["fail"])
        assert frames_of(error.__cause__)[-1] == FAILS
        assert ours(error.remote_traceback) == []
        assert isinstance(error, ZeroDivisionError)


# -- lines that the worker, or this process, cannot read ------------------------------------------------------------


def written(tmp_path: Path, text: str) -> tuple[Path, Any]:
    """Write a module and run it without importing it, so that its functions travel by value, as a script's do."""
    file = tmp_path / "changing.py"
    file.write_text(text)
    module = types.ModuleType("changing")
    exec(compile(text, str(file), "exec"), vars(module))
    return file, module


CHANGING = "def work(x):\n    return 1 / x  # as it was\n"


@pytest.mark.parametrize("change", ["edited", "deleted"])
def test_a_file_that_changed_since(shared_runtime: None, cells: None, tmp_path: Path, change: str) -> None:
    file, module = written(tmp_path, CHANGING)
    work = afield.remote(module.work)
    assert afield.get(work.remote(1), timeout=PATIENCE_S) == 1
    if change == "edited":
        file.write_text("# a line more\n\n\n" + CHANGING.replace("as it was", "as it is now"))
    else:
        file.unlink()
    for _ in range(2):
        error = caught(work.remote(0))
        assert frames_of(error.__cause__) == [(str(file), "work", "return 1 / x  # as it was")]
        assert "return 1 / x  # as it was" in error.remote_traceback


def test_a_file_that_is_run_again(shared_runtime: None, cells: None, tmp_path: Path) -> None:
    """As a notebook's `%run` does after an edit: its new functions have the new lines, also after the old were shown."""
    file, module = written(tmp_path, CHANGING)
    work = afield.remote(module.work)
    afield.get(work.remote(1), timeout=PATIENCE_S)
    text = "# a line more\n" + CHANGING.replace("as it was", "as it is now")
    file.write_text(text)
    assert frames_of(caught(work.remote(0)).__cause__)[-1][2] == "return 1 / x  # as it was"
    _, again = written(tmp_path, text)
    error = caught(afield.remote(again.work).remote(0))
    assert frames_of(error.__cause__) == [(str(file), "work", "return 1 / x  # as it is now")]


def test_lines_that_only_the_worker_can_read(shared_runtime: None, cells: None, tmp_path: Path) -> None:
    file = tmp_path / "elsewhere.py"

    def load() -> None:
        file.write_text(CHANGING.replace("as it was", "elsewhere"))
        variables: dict[str, Any] = {}
        exec(compile(file.read_text(), str(file), "exec"), variables)
        try:
            variables["work"](0)
        finally:
            linecache.getlines(str(file))
            entry = linecache.cache[str(file)]
            linecache.cache[str(file)] = (entry[0], None, *entry[2:])  # so that it stays, although the file goes
            file.unlink()

    error = caught(afield.remote(load).remote())
    assert frames_of(error.__cause__)[-1] == (str(file), "work", "return 1 / x  # elsewhere")
    assert linecache.getline(str(file), 1) == ""  # it was not sent


def test_an_exception_whose_class_is_not_here(runtime: Any, tmp_path: Path) -> None:
    (tmp_path / "only_there_module.py").write_text("class OnlyThereError(Exception):\n    pass\n")

    @afield.remote(runtime_env={"py_modules": [str(tmp_path / "only_there_module.py")]})
    def work() -> None:
        import only_there_module  # type: ignore[import-not-found]

        raise only_there_module.OnlyThereError("not known here", 5)

    error = caught(work.remote())
    assert error.cause is None and "OnlyThereError: ('not known here', 5)" in str(error)
    assert frames_of(error.__cause__)[-1] == (
        __file__,
        "work",
        'raise only_there_module.OnlyThereError("not known here", 5)',
    )
    text = "".join(traceback.format_exception(error))
    assert "DeserializationError" not in text and "only_there_module.OnlyThereError: (" in text
