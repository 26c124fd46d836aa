"""`progress`: watch refs become ready.

Theory of operation. `progress` is an iterator over refs in the order in which they become ready, and shows how far it is
while somebody iterates. It looks at a window of the oldest refs that are not ready, all of them at a time: looking at all
of a hundred thousand again and again would take longer than the tasks. What is shown goes to stderr: a bar where there is
a terminal or a notebook, now and then a line where there is not, and nothing where stderr is closed.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import afield

#: So many refs are looked at together. Tasks finish roughly in the order of their submission.
WINDOW = 1000
#: Without a terminal there is a line at most so often.
LINE_EVERY_S = 5.0


def progress(refs: Iterable[Any], total: int | None = None, description: str = "tasks") -> Iterator[Any]:
    """Yield the refs as they become ready, with a value or an error, and show how many are.

    ``for ref in afield.progress(refs): value = afield.get(ref)``

    Args:
        refs: different refs, yielded in the order in which they become ready (looking at the oldest 1000 at a time). An
            iterator is read to its end first, except for the stream of a remote generator: its items are passed on
            as they come.
        total: how many there are, where `refs` cannot tell.
        description: stands before the bar.

    Raises:
        TypeError: something is not an ObjectRef.
        ValueError: a ref is there twice.
    """
    if isinstance(refs, afield.ObjectRef):
        raise TypeError("progress() takes several ObjectRefs, not a single one; use progress([ref])")
    if isinstance(refs, afield.ObjectRefGenerator):
        return _shown(refs, description, total)
    found = list(refs)
    wrong = next((ref for ref in found if not isinstance(ref, afield.ObjectRef)), None)
    if wrong is not None:
        raise TypeError(f"progress() takes ObjectRefs, not a {type(wrong).__name__}")
    if len(set(found)) != len(found):
        raise ValueError("progress() takes different refs; these have duplicates")
    return _shown(_as_ready(found), description, len(found) if total is None else total)


def _shown(refs: Iterable[Any], description: str, total: int | None) -> Iterator[Any]:
    display = _display(description, total)  # not before somebody iterates: it has to be finished
    try:
        for ref in refs:
            display.advance()
            yield ref
    finally:
        display.finish()


def _as_ready(refs: Iterable[Any]) -> Iterator[Any]:
    waiting = deque(refs)
    window: list[Any] = []
    while waiting or window:
        while waiting and len(window) < WINDOW:
            window.append(waiting.popleft())
        afield.wait(window)
        ready, window = afield.wait(window, num_returns=len(window), timeout=0)
        yield from ready


class Display:
    """Shows nothing: for where there is nobody to see it."""

    def advance(self) -> None:
        """One more is ready."""

    def finish(self) -> None:
        """There will be no more, or nobody asks for them."""


class _Bar(Display):
    def __init__(self, console: Console, description: str, total: int | None) -> None:
        columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        self._progress = Progress(TextColumn("{task.description}", markup=False), *columns, console=console)
        self._task = self._progress.add_task(description, total=total)
        self._progress.start()

    def advance(self) -> None:
        self._progress.advance(self._task)

    def finish(self) -> None:
        self._progress.stop()


class _Lines(Display):
    def __init__(self, description: str, total: int | None) -> None:
        self._description = description
        self._total = total
        self._ready = 0
        self._printed = -1
        self._started = self._last = time.monotonic()

    def advance(self) -> None:
        self._ready += 1
        if time.monotonic() - self._last >= LINE_EVERY_S:
            self._print()

    def finish(self) -> None:
        if self._printed != self._ready:
            self._print()

    def _print(self) -> None:
        self._last, self._printed = time.monotonic(), self._ready
        of = "" if self._total is None else f" of {self._total}"
        try:
            print(f"{self._description}: {self._ready}{of} in {self._last - self._started:.0f} s", file=sys.stderr)
        except (OSError, ValueError):
            pass  # stderr was closed meanwhile; that is no reason to fail


def _display(description: str, total: int | None) -> Display:
    if sys.stderr is None or getattr(sys.stderr, "closed", False):
        return Display()
    console = Console(stderr=True)
    if console.is_terminal or console.is_jupyter:
        return _Bar(console, description, total)
    return _Lines(description, total)
