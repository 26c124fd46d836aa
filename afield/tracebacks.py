"""Tracebacks that cross processes: described where an error is raised, made again where it is shown.

Theory of operation. A traceback cannot be pickled, and text alone would show the lines that the raising process could read.
So `describe` makes a `Report` of an error: for each frame the file, the line, the columns and the name, and the same of its
causes, its context, and the members of a group. It is small and bounded. `put_back` gives an error that has arrived real
traceback objects made from its report, and errors that stand in for those of its chain that did not travel. From then on
it is shown like any other error, by Python, pytest, IPython and debuggers, and the lines come from the process that shows
it: from its files, and from what its `linecache` has, such as the cells of a notebook (`source_lines` has the rest).

A traceback needs frames, and a frame needs code that once ran. `_frame` takes that of a generator that is never started,
whose code has the file, the name and one instruction with the position that is to be shown.

Frames of our own say nothing to the user. `trim` takes them out of an error's traceback; where it is followed by a bare
`raise`, the function that does so is not in the traceback either, so `get` leaves none. With `AFIELD_FULL_TRACEBACKS=1` all
frames stay.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType, TracebackType
from typing import Any, NamedTuple, ParamSpec, TypeVar

from afield.causes import (
    add_note,
    class_attribute,
    innate,
    is_a,
    members_of,
    name_of,
    notes_of,
    put_innate,
    text_of,
)
from afield.source_lines import lend, source_text

P = ParamSpec("P")
R = TypeVar("R")

#: A report has no more frames of one traceback, errors, characters of one error's text, and columns of one line.
MAX_FRAMES = 64
MAX_ERRORS = 32
MAX_TEXT = 16_384
MAX_LINE = 500
#: Repeated frames are made again up to this number; Python shows only three of them, and says how many there are.
MAX_REPEATS = 10_000

#: The folder of the package: code below it is ours.
_HOME = os.path.dirname(os.path.abspath(__file__)) + os.sep
_PICKLER = "/cloudpickle/cloudpickle.py"


class Frame(NamedTuple):
    """One line of a traceback, or `times` equal ones in a row."""

    file: str
    line: int
    name: str
    qualified_name: str
    first_line: int  # of the function
    module: str
    text: str  # the line, or lines, as the raising process read them; empty if it could not
    end_line: int
    columns: tuple[int, int] | None  # in bytes, as Python counts them
    times: int
    hidden: bool  # __tracebackhide__


class Report(NamedTuple):
    """What can be shown of an error elsewhere."""

    module: str
    name: str
    text: str
    hint: str  # what Python adds to the text: "Did you mean: ..."
    notes: tuple[str, ...]
    frames: tuple[Frame, ...]
    cause: Report | None
    context: Report | None
    members: tuple[Report, ...]  # of a group


class Elsewhere:
    """Marks the errors that stand in for errors of another process: of the same name, without their class."""


def wants_all_frames() -> bool:
    """Tell whether frames of our own are to be shown; the only place that asks for this setting."""
    return os.environ.get("AFIELD_FULL_TRACEBACKS", "0") not in ("", "0")


# -- frames of our own ------------------------------------------------------------------------------------------------


def is_ours(file: str) -> bool:
    """Tell whether a file is part of afield, or of the pickler that it calls."""
    return file.startswith(_HOME) or file.endswith(_PICKLER)


def trim(error: BaseException, *, foreseen: bool | None = None, always: bool = False) -> None:
    """Take the frames of our own out of an error's traceback.

    Args:
        error: is raised again with a bare `raise`, or put somewhere.
        foreseen: whether those frames go that it was raised in; by default if it is one of our errors, or an interrupt.
        always: whatever the setting says.
    """
    if always or not wants_all_frames():
        kept = _users(innate(error, "__traceback__"), _is_foreseen(error) if foreseen is None else foreseen)
        for entry, following in itertools.zip_longest(kept, kept[1:]):
            entry.tb_next = following
        put_innate(error, "__traceback__", kept[0] if kept else None)


def unseen(function: Callable[P, R]) -> Callable[P, R]:
    """Keep a function of ours, and what it calls, out of the tracebacks of errors that leave it. Costs a call."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            trim(error)
            raise

    return call


def _users(traceback: TracebackType | None, foreseen: bool) -> list[TracebackType]:
    """Return the entries of a traceback that are not ours, and the last ones also if they are: nobody foresaw the error."""
    entries = list(_all(traceback))
    last = len(entries)
    while not foreseen and last and is_ours(entries[last - 1].tb_frame.f_code.co_filename):
        last -= 1
    return [entry for entry in entries[:last] if not is_ours(entry.tb_frame.f_code.co_filename)] + entries[last:]


def _all(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _is_foreseen(error: BaseException) -> bool:
    return class_attribute(type(error), "_foreseen") is True or is_a(error, KeyboardInterrupt)


# -- describing -------------------------------------------------------------------------------------------------------


def describe(error: BaseException) -> Report:
    """Describe an error and all that Python would show with it."""
    described = _Describer().report(error)
    assert described is not None
    return described


class _Describer:
    """Follows the chain of an error from the outside in, each error once, until there are too many."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def report(self, error: BaseException | None) -> Report | None:
        if error is None or id(error) in self._seen or len(self._seen) == MAX_ERRORS:
            return None
        self._seen.add(id(error))
        text = text_of(error)
        cause = innate(error, "__cause__")
        hidden = cause is not None or innate(error, "__suppress_context__")
        context = None if hidden else innate(error, "__context__")
        return Report(
            *name_of(type(error)),
            _cut(text, MAX_TEXT),
            _hint(error, text),
            tuple(_cut(note, MAX_TEXT) for note in notes_of(error)[:MAX_ERRORS]),
            frames_of(error),
            self.report(cause),
            self.report(context),
            tuple(filter(None, map(self.report, members_of(error)))),
        )


def _hint(error: BaseException, text: str) -> str:
    """Return what Python adds to an error's text when it shows it, which it finds in frames that do not travel."""
    import traceback

    if not is_a(error, (NameError, AttributeError, ImportError)):
        return ""
    with contextlib.suppress(BaseException):
        shown = "".join(traceback.TracebackException.from_exception(error, limit=1).format_exception_only())
        _, found, hint = shown.partition(f": {text}. Did you")
        if found:
            return f"Did you{hint}".splitlines()[0]
    return ""


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} ... ({len(text) - limit} more characters)"


def frames_of(error: BaseException) -> tuple[Frame, ...]:
    """Describe the frames of an error's traceback."""
    traceback = innate(error, "__traceback__")
    entries = list(_all(traceback)) if wants_all_frames() else _users(traceback, _is_foreseen(error))
    runs = [list(run) for _, run in itertools.groupby(entries, lambda entry: (entry.tb_frame.f_code, entry.tb_lineno))]
    if len(runs) <= MAX_FRAMES:
        return tuple(_frame_of(run[0], len(run)) for run in runs)
    half = MAX_FRAMES // 2
    left_out = f"<{sum(map(len, runs[half:-half]))} more frames>"
    return (
        *(_frame_of(run[0], len(run)) for run in runs[:half]),
        Frame(left_out, 1, "...", "...", 1, "", "", 1, None, 1, False),
        *(_frame_of(run[0], len(run)) for run in runs[-half:]),
    )


def _frame_of(entry: TracebackType, times: int) -> Frame:
    frame = entry.tb_frame
    code = frame.f_code
    line = entry.tb_lineno or code.co_firstlineno
    start, end_line, column, end_column = next(
        itertools.islice(code.co_positions(), max(0, entry.tb_lasti) // 2, None), (None,) * 4
    )
    columns = None
    if start != line or end_line is None:
        end_line = line
    elif column is not None and end_column is not None:
        columns = (column, end_column)
    return Frame(
        code.co_filename,
        line,
        code.co_name,
        code.co_qualname,
        code.co_firstlineno,
        text_of(frame.f_globals.get("__name__", "")),
        _cut(source_text(code.co_filename, line, end_line, frame.f_globals), MAX_LINE),
        end_line,
        columns,
        times,
        _is_true(_local(frame, "__tracebackhide__")),
    )


def _is_true(value: object) -> bool:
    try:
        return bool(value)
    except BaseException:  # it is the user's
        return False


def _local(frame: Any, name: str) -> object:
    """Return a variable of a frame, or a global; without `f_locals`, which would make a copy of all of them, if need be."""
    if name in frame.f_code.co_varnames:
        return frame.f_locals.get(name, False)
    return frame.f_globals.get(name, False)


# -- making again -----------------------------------------------------------------------------------------------------


def put_back(error: BaseException, report: Report) -> bool:
    """Give an error that has arrived the traceback and the chain of its report.

    Returns True if lines are shown that the files here do not have.
    """
    traceback, lent = traceback_of(report.frames)
    put_innate(error, "__traceback__", traceback)
    if report.hint and report.hint not in notes_of(error):
        add_note(error, report.hint)
    for link, described in (("__cause__", report.cause), ("__context__", report.context)):
        if described is not None:
            linked, more = _linked(innate(error, link), described)
            put_innate(error, link, linked)
            lent |= more
    members = members_of(error)
    if len(members) == len(report.members):
        for member, of_member in zip(members, report.members, strict=True):
            if _is_described_by(member, of_member):
                lent |= put_back(member, of_member)
    return lent


def stand_in(report: Report) -> tuple[BaseException, bool]:
    """Make an error that is shown as the described one would be, and put its traceback back."""
    shown = f"{report.text}. {report.hint}" if report.hint else report.text
    values = {"__module__": report.module, "__qualname__": report.name, "__str__": lambda self: shown}
    name = report.name.rpartition(".")[2]
    error: BaseException
    if report.members:
        members = [stand_in(member)[0] for member in report.members]
        error = type(name, (Elsewhere, BaseExceptionGroup), values)(report.text, members)
    else:
        error = type(name, (Elsewhere, Exception), values)(report.text)
    for note in report.notes:
        error.add_note(note)
    return error, put_back(error, report._replace(hint=""))


def _linked(error: BaseException | None, report: Report) -> tuple[BaseException, bool]:
    """Return the error that a report in a chain is about: the one that has travelled, or one that stands in for it."""
    if error is not None and _is_described_by(error, report):
        return error, put_back(error, report)
    return stand_in(report)


def _is_described_by(error: BaseException, report: Report) -> bool:
    return name_of(type(error)) == (report.module, report.name)


def formatted(report: Report) -> str:
    """Return what Python prints of the described error."""
    import traceback

    return "".join(traceback.format_exception(stand_in(report)[0]))


def continued(text: str, error: BaseException, frames: tuple[Frame, ...]) -> str:
    """Return what Python prints of an error that was raised, from what `text` shows, in these frames."""
    import traceback

    passed = Report(*name_of(type(error)), text_of(error), "", (), frames, None, None, ())
    shown = "".join(traceback.format_exception(stand_in(passed)[0]))
    return f"{text}\nThe above exception was the direct cause of the following exception:\n\n{shown}"


def is_shown_by_files() -> bool:
    """Tell whether Python shows an error that nobody catches with lines of files, whatever `linecache` has."""
    return sys.version_info < (3, 13) and sys.excepthook is sys.__excepthook__ and not hasattr(sys, "ps1")


def traceback_of(frames: Iterable[Frame]) -> tuple[TracebackType | None, bool]:
    """Make the traceback; also tell whether lines are shown that the files here do not have."""
    frames = tuple(frames)
    lent = False
    traceback = None
    for described in reversed(frames):
        variables = _globals(described)
        lent |= lend(described.file, described.line, described.text, variables)
        code, instruction = _code(described._replace(module="", times=1, hidden=False))
        frame = _frame(code, variables)
        for _ in range(min(described.times, MAX_REPEATS)):
            traceback = TracebackType(traceback, frame, instruction, described.line)
    return traceback, lent


def _globals(frame: Frame) -> dict[str, Any]:
    """Return the globals of a frame: what `linecache` needs to ask the module's loader for its source."""
    variables: dict[str, Any] = {"__name__": frame.module, "__file__": frame.file}
    module = sys.modules.get(frame.module)
    if getattr(module, "__file__", None) == frame.file:
        variables |= {name: getattr(module, name, None) for name in ("__spec__", "__loader__")}
    if frame.hidden:
        variables["__tracebackhide__"] = True
    return variables


@functools.lru_cache(maxsize=512)
def _code(frame: Frame) -> tuple[CodeType, int]:
    """Return code with an instruction at the frame's position, and where in the code that is."""
    start, end = frame.columns or _whole_line(frame.text)
    place = (frame.line, frame.end_line, start, end)
    tree = ast.parse("def f(): yield")
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr | ast.Yield):
            node.lineno, node.end_lineno, node.col_offset, node.end_col_offset = place
        elif isinstance(node, ast.FunctionDef):
            node.lineno, node.end_lineno = frame.first_line, max(frame.first_line, frame.end_line)
    module = compile(tree, frame.file, "exec")
    code = next(constant for constant in module.co_consts if isinstance(constant, CodeType))
    instruction = 2 * next((index for index, found in enumerate(code.co_positions()) if found == place), 0)
    return code.replace(co_name=frame.name, co_qualname=frame.qualified_name), instruction


def _whole_line(text: str) -> tuple[int, int]:
    """Return the columns of a line's text. Python marks nothing where that would mark all of it."""
    line = text.partition("\n")[0].rstrip().encode(errors="replace")
    return len(line) - len(line.lstrip()), len(line)


def _frame(code: CodeType, variables: dict[str, Any]) -> Any:
    """Return a frame of code without running it."""
    generator = FunctionType(code, variables)()
    frame = generator.gi_frame
    tracer = sys.gettrace()
    if tracer is not None:
        sys.settrace(None)  # Python 3.11 reports to debuggers and coverage tools that the generator ends
    try:
        generator.close()
    finally:
        if tracer is not None:
            sys.settrace(tracer)
    return frame
