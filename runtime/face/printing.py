"""The driver's side of workers' output: folds repeated lines, and prints in a thread of its own.

Theory of operation. `Fold` is a core without I/O or clock. A line is printed at once the first time; the same line (same task
name, same stream, exactly the same text) from *other* workers within `FOLD_WINDOW_S` is only counted, and when the window ends
one line tells how often it came and from how many workers. A worker that repeats itself is not folded: its program said so
many times. Texts that differ in a digit are different: folding them would lose what they say. Lines without a letter or
digit are never folded, so that frames and blank lines keep their place.

`Printer` is the shell. The messages arrive under the process's lock; printing may block for as long as whoever reads the
driver's output likes, so it happens in a thread of its own that is started with the first line. What has been printed is
acknowledged, and the daemon sends no more than a window ahead of that: the queue here is bounded by it.
"""

from __future__ import annotations

import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from afield.runtime.wire import messages
from afield.text import harmless

FOLD_WINDOW_S = 2.0
#: Lines remembered for folding; beyond it the oldest window ends early.
MAX_REMEMBERED = 2000
#: Longer lines are not folded.
MAX_FOLDED_CHARACTERS = 2000
#: Messages that are printed with one write.
MAX_BATCH = 64

_has_word = re.compile(r"\w").search
_DIM, _PLAIN = "\x1b[36m", "\x1b[0m"


class Line(NamedTuple):
    """One line to print."""

    stream: str
    name: str
    pid: int
    text: str


class _Seen:
    """A line within its window."""

    __slots__ = ("count", "ends_at", "last_pid", "pids")

    def __init__(self, pid: int, ends_at: float) -> None:
        self.pids = {pid}
        self.last_pid = pid
        self.count = 0
        self.ends_at = ends_at


class Fold:
    """Decides which lines are printed; `now` is the caller's clock in seconds."""

    def __init__(self, window_s: float = FOLD_WINDOW_S) -> None:
        self._window_s = window_s
        self._seen: dict[tuple[str, str, str], _Seen] = {}  # in the order in which their windows end

    def feed(self, message: messages.Log, now: float) -> list[Line]:
        """Take lines of one worker; return what is to be printed at once."""
        lines = self.expire(now)
        stream, name, pid = message.stream, message.name, message.pid
        if not self._window_s:
            return lines + [Line(stream, name, pid, text) for text in message.lines]
        for text in message.lines:
            key = (stream, name, text)
            seen = self._seen.get(key)
            if seen is None:
                if len(text) <= MAX_FOLDED_CHARACTERS and _has_word(text):
                    if len(self._seen) >= MAX_REMEMBERED:
                        self._forget(next(iter(self._seen)), lines)
                    self._seen[key] = _Seen(pid, now + self._window_s)
            else:
                seen.pids.add(pid)
                if len(seen.pids) > 1:
                    seen.count += 1
                    seen.last_pid = pid
                    continue
            lines.append(Line(stream, name, pid, text))
        return lines

    def expire(self, now: float) -> list[Line]:
        """End the windows whose time is over; return what is to be printed about them."""
        lines: list[Line] = []
        while self._seen:
            key = next(iter(self._seen))
            if self._seen[key].ends_at > now:
                break
            self._forget(key, lines)
        return lines

    def flush(self) -> list[Line]:
        """End all windows."""
        lines: list[Line] = []
        for key in list(self._seen):
            self._forget(key, lines)
        return lines

    def next_deadline(self) -> float | None:
        """Return when something that was counted must be printed at the latest."""
        return min((seen.ends_at for seen in self._seen.values() if seen.count), default=None)

    def _forget(self, key: tuple[str, str, str], lines: list[Line]) -> None:
        seen = self._seen.pop(key)
        if seen.count:
            stream, name, text = key
            again = f"{text} [repeated {seen.count}x across {len(seen.pids)} workers]"
            lines.append(Line(stream, name, seen.last_pid, again))


class Printer:
    """Prints what arrives.

    Args:
        acknowledge: told, in the printer's thread, how many bytes of messages have been printed.
        fold: whether repeated lines are folded.
        colour: whether prefixes may be coloured; they are only where the stream is a terminal.
    """

    def __init__(self, acknowledge: Callable[[int], None], *, fold: bool = True, colour: bool = True) -> None:
        self._acknowledge = acknowledge
        self._fold = Fold() if fold else Fold(0)
        self._colour = colour
        self._queue: queue.SimpleQueue[messages.Log | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def post(self, message: messages.Log) -> None:
        """Leave a message to be printed; does not block."""
        self._queue.put(message)
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="afield-output", daemon=True)
            try:
                thread.start()
                self._thread = thread
            except RuntimeError:
                pass  # the interpreter is ending and starts no threads any more: `close` prints

    def close(self, timeout_s: float) -> None:
        """Print what is left, waiting at most `timeout_s` for whoever reads our output."""
        self._queue.put(None)
        if self._thread is None:
            self._run()
        elif self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        ended = False
        while not ended:
            batch, ended = self._next_batch()
            now = time.monotonic()
            lines = self._fold.expire(now)
            for message in batch:
                lines += self._fold.feed(message, now)
            if ended:
                lines += self._fold.flush()
            self._print(lines)
            if batch:
                self._acknowledge(sum(message.size for message in batch))

    def _next_batch(self) -> tuple[list[messages.Log], bool]:
        """Wait for messages or for the end of a window; return what is there and whether it is the end."""
        batch: list[messages.Log] = []
        due = self._fold.next_deadline()
        timeout = None if due is None else max(0.0, due - time.monotonic())
        try:
            message = self._queue.get(timeout=timeout)
            while message is not None:
                batch.append(message)
                if len(batch) >= MAX_BATCH:
                    return batch, False
                message = self._queue.get_nowait()
            return batch, True
        except queue.Empty:
            return batch, False

    def _print(self, lines: Iterable[Line]) -> None:
        pending: list[Line] = []
        for line in lines:
            if pending and pending[0].stream != line.stream:
                self._write(pending)
                pending = []
            pending.append(line)
        if pending:
            self._write(pending)

    def _write(self, lines: list[Line]) -> None:
        # Looked up each time: notebooks and tests put other streams in their place.
        target = sys.stderr if lines[0].stream == "err" else sys.stdout
        if target is None:
            return
        try:
            on, off = (_DIM, _PLAIN) if self._colour and target.isatty() else ("", "")
            text = "".join(f"{on}({harmless(line.name)} pid={line.pid}){off} {harmless(line.text)}\n" for line in lines)
            try:
                target.write(text)
            except UnicodeEncodeError:
                encoding = target.encoding or "ascii"
                target.write(text.encode(encoding, "backslashreplace").decode(encoding))
            target.flush()
        except (OSError, ValueError):
            pass  # nobody reads our output any more, or it was closed
