"""Who knows which source lines, where files do not tell: cells of a notebook, files that have changed, files elsewhere.

Theory of operation. Whatever shows a traceback asks `linecache` for its lines, so this is where they are put, in the form that
it has for sources without a file, which it never drops.

- `carried` finds the source of code that has no file, such as a cell. It travels with the code (`code_names`), and `learn`
  takes it in.
- `remember` keeps what a file says when functions of it are pickled. If it has changed, or is gone, when an error comes back,
  the lines that the function was made from are the ones to show.
- `lend` puts in single lines, as the raising process read them, of files that this process does not have.
"""

from __future__ import annotations

import linecache
import os
from types import CodeType
from typing import Any

#: A source that travels with code, and one that is remembered, has no more characters.
MAX_CARRIED = 65_536
MAX_REMEMBERED = 4 * 1024 * 1024
#: So many files are remembered, and lines lent of so many; lines further down are not lent.
MAX_FILES = 64
MAX_LENT_LINE = 100_000
#: Of an expression over several lines, so many are taken.
MAX_LINES = 8


class _Lent(list[str]):
    """The lines of a file of which only some are known; the others are empty."""


class _Remembered:
    """A file as it was when a function of it was pickled."""

    __slots__ = ("execution", "lines", "modified", "size")

    def __init__(self, execution: tuple[int, int], entry: tuple[Any, ...]) -> None:
        #: Tells whether the file was run again since: a reload has a new spec, `%run` new globals.
        self.execution = execution
        self.size, self.modified, self.lines = entry[:3]

    def is_current(self, file: str) -> bool:
        try:
            found = os.stat(file)
        except (OSError, ValueError):
            return False
        return (found.st_size, found.st_mtime) == (self.size, self.modified)


#: Beside `linecache.cache`, which drops a file that has changed. Belongs to the interpreter as that one does.
_remembered: dict[str, _Remembered] = {}


def source_text(file: str, line: int, end_line: int, variables: dict[str, Any] | None = None) -> str:
    """Return lines of a file, or "" if they are not known."""
    try:
        linecache.checkcache(file)
        lines = linecache.getlines(file, variables)
    except Exception:  # a loader of somebody else's
        return ""
    return "".join(lines[line - 1 : max(line, min(end_line, line + MAX_LINES - 1))]) if line > 0 else ""


def has_no_file(file: str) -> bool:
    """Tell whether a name is one that Python gives to code without a file: <string>, <stdin>, <ipython-input-1-...>."""
    return file.startswith("<") and file.endswith(">")


def carried(code: CodeType) -> list[str] | None:
    """Return the lines of code without a file, if they are known; always the same list, so that a pickle has it once."""
    file = code.co_filename
    entry = linecache.cache.get(file)
    lines: Any = None
    if entry is not None and len(entry) == 4:
        if entry[1] is None:
            lines = entry[2]
    elif has_no_file(file):
        lines = linecache.getlines(file)  # doctest answers without an entry
        of_code = getattr(linecache, "_getlines_from_code", None)
        if not lines and of_code is not None:  # where the REPL of Python 3.13.1 and later keeps them
            lines = of_code(code)
    return lines if lines and type(lines) is list and sum(map(len, lines)) <= MAX_CARRIED else None


def learn(file: str, lines: list[str]) -> None:
    """Take in the source of code that came from another process."""
    known = linecache.cache.get(file)
    if known is None or len(known) == 1 or known[2] != lines:
        linecache.cache[file] = (sum(map(len, lines)), None, lines, file)


def remember(file: str, variables: dict[str, Any]) -> None:
    """Keep what a file says now, for code that is pickled and has these globals."""
    execution = (id(variables), id(variables.get("__spec__")))
    known = _remembered.get(file)
    if (known is not None and known.execution == execution) or has_no_file(file):
        return
    if known is not None and linecache.cache.get(file, ())[2:3] == (known.lines,):
        del linecache.cache[file]  # `lend` may have put it there, for good
    linecache.checkcache(file)
    try:
        linecache.getlines(file, variables)
    except Exception:
        return
    entry: tuple[Any, ...] = linecache.cache.get(file, ())
    if len(entry) != 4 or entry[1] is None or entry[0] > MAX_REMEMBERED:
        return
    _remembered.pop(file, None)
    while len(_remembered) >= MAX_FILES:
        del _remembered[next(iter(_remembered))]
    _remembered[file] = _Remembered(execution, entry)


def lend(file: str, line: int, known: str, variables: dict[str, Any]) -> bool:
    """Let `linecache` have a line of a file; `known` is what another process read.

    Returns True if the files here do not have it.
    """
    remembered = _remembered.get(file)
    if remembered is not None:
        if remembered.is_current(file):
            return False
        linecache.cache[file] = (remembered.size, None, remembered.lines, file)
        return True
    if source_text(file, line, line, variables) or not known or line > MAX_LENT_LINE:
        return False
    entry = linecache.cache.get(file)
    if entry is None or len(entry) == 1:
        if sum(len(each) == 4 and type(each[2]) is _Lent for each in linecache.cache.values()) >= MAX_FILES:
            return False
        entry = linecache.cache[file] = (0, None, _Lent(), file)
    lines = entry[2]
    if type(lines) is not _Lent:
        return False  # the file is here, and shorter
    new = known.splitlines(keepends=True)
    lines.extend("" for _ in range(line - 1 + len(new) - len(lines)))
    lines[line - 1 : line - 1 + len(new)] = new
    return not has_no_file(file)
