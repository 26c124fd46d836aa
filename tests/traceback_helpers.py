"""What the tests of tracebacks share: code that fails and code that tells about itself, and how to look at errors."""

from __future__ import annotations

import functools
import inspect
import linecache
import logging
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest

import afield

PATIENCE_S = 30.0
HERE = __file__


def fail(x: int) -> float:
    """Raise where the line can be recognised."""
    return 1 / x  # the line that fails


def frames_of(error: BaseException | None) -> list[tuple[str, str, str]]:
    """Return (file, function, source line) for each frame of an error's traceback."""
    assert error is not None
    return [(f.filename, f.name, f.line or "") for f in traceback.extract_tb(error.__traceback__)]


#: The frame of `fail`.
FAILS = (HERE, "fail", "return 1 / x  # the line that fails")


def caught(ref: Any) -> Any:
    """Return the error that `get` raises."""
    with pytest.raises(afield.TaskError) as info:
        afield.get(ref, timeout=PATIENCE_S)
    return info.value


def ours(text: str) -> list[str]:
    """Return the lines of a traceback that show a file of ours."""
    return [line for line in text.splitlines() if "/afield/" in line and "File " in line]


def facts() -> dict[str, Any]:
    """Tell what code that calls this can find out about itself."""
    frame = sys._getframe(1)
    code = frame.f_code
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warnings.warn("careful", stacklevel=2)
    record: list[logging.LogRecord] = []
    logger = logging.getLogger("tests.tracebacks")
    logger.propagate = False
    handler = logging.Handler()
    handler.emit = record.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.warning("careful", stacklevel=2)
    logger.removeHandler(handler)
    try:
        source = inspect.getsource(code)
    except OSError:
        source = ""
    return {
        "code": (code.co_filename, frame.f_lineno),
        "warning": (found[0].filename, found[0].lineno),
        "logging": (record[0].pathname, record[0].lineno),
        "getsourcefile": inspect.getsourcefile(code),
        "source": source,
    }


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Stand for anybody's decorator."""

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)  # by the decorator

    return wrapper


CODE = """
def in_cell(x):
    if x is None:
        return facts()
    return [1 / x  # in the cell
            for _ in range(1)][0]
"""


def executed(file: str) -> Callable[..., Any]:
    """Make a function out of text, as a notebook and the REPL do."""
    variables: dict[str, Any] = {"facts": facts, "__name__": "__main__"}
    exec(compile(CODE, file, "exec"), variables)
    return variables["in_cell"]  # type: ignore[no-any-return]


def register(file: str) -> None:
    lines = CODE.splitlines(keepends=True)
    linecache.cache[file] = (len(CODE), None, lines, "<stdin>" if file.startswith("<python") else file)


def nested() -> Callable[..., Any]:
    """Make a function that is pickled by value, with code in its constants."""

    def outer(x: Any) -> Any:
        def inner(x: Any) -> Any:
            return facts() if x is None else 1 / x  # nested

        return inner(x)

    return outer


CELLS = ["<ipython-input-3-0123456789ab>", "<python-input-7>", "/tmp/ipykernel_123/456.py"]
