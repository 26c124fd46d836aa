"""Code that is pickled by value keeps the name of its file.

Theory of operation. Functions and classes of `__main__`, and those made inside of functions, travel by value: their code is
taken apart by cloudpickle. Since 3.1.3 it writes `<dynamic-code>` for the file, so that pickles of a cell are equal whenever
it is run. We want the name: tracebacks, warnings, `logging`, `inspect` and coverage tools of the worker go by it. So the
pickler reduces code in cloudpickle's way, whatever that is, and `code_in_file` gives the result the name again, that of
nested code included, which is pickled code of its own. With it travel the source lines of code that has no file.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

from afield.source_lines import carried, learn, remember


def reduce_code(pickler: Any, code: CodeType) -> Any:
    """Reduce code for a pickler of cloudpickle's; NotImplemented if cloudpickle does it in a way that is not known here."""
    reduce = pickler.dispatch_table.get(CodeType)
    if reduce is None:
        return NotImplemented
    make, arguments = reduce(code)
    return code_in_file, (make, arguments, code.co_filename, carried(code))


def code_in_file(
    make: Callable[..., CodeType], arguments: tuple[Any, ...], file: str, lines: list[str] | None
) -> CodeType:
    """Make code again, from the file that it was in; named in pickles."""
    if lines is not None:
        learn(file, lines)
    code = make(*arguments)
    return code if code.co_filename == file else code.replace(co_filename=file)


def remember_source(function: FunctionType) -> None:
    """A function is pickled by value: note what its file says, in case that it changes before an error comes back."""
    remember(function.__code__.co_filename, function.__globals__)
