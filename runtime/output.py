"""What workers print, from the worker to the daemon: marked records in pipes, and lines out of them again.

Theory of operation. A worker has one pipe for stdout and one for stderr, so that also what C code and child processes write
arrives. Python's own streams (`WorkerStream`) write records that say which task and which thread speaks:

    OPEN name SEPARATOR thread SEPARATOR text CLOSE

Each record is one `write` of at most `PIPE_BUF` bytes, which the kernel never mixes with another writer's: no lock is needed,
nothing waits in a buffer that a crash would lose, and the lines of threads that print at the same time stay whole. Whatever
stands between records is raw output of the process. Text cannot contain the marks; they are taken out of it.

`LineParser` is the daemon's side: it joins the pieces of each thread to lines. It keeps no more than `MAX_OPEN_LINES` unfinished
lines of `MAX_LINE_BYTES`; a progress bar that goes back with carriage returns keeps its last state only.

From here lines go through `node.output` (bounds, drivers) to `printing` (folding, prefixes) in the driver.
"""

from __future__ import annotations

import io
import os
import re
import select
import threading
from collections.abc import Callable

_OPEN, _SEPARATOR, _CLOSE = b"\x1e", b"\x1f", b"\x1d"
_MARKS = _OPEN + _SEPARATOR + _CLOSE
_RECORD = re.compile(rb"\x1e([^\x1d-\x1f\n]*)\x1f([0-9]+)\x1f([^\x1d\x1e]*)(?:\x1d|(?=\x1e))")
#: A record is written in one piece.
MAX_RECORD_BYTES = select.PIPE_BUF
#: Longer names of tasks are cut.
MAX_NAME_BYTES = 200
#: A longer line is cut into pieces: an endless one must not fill the daemon's memory.
MAX_LINE_BYTES = 1 << 16
#: Threads of one worker that may be in the middle of a line; beyond it the oldest such line is ended.
MAX_OPEN_LINES = 64
_RAW = 0  # stands for the thread of what was written without marks


class WorkerStream(io.TextIOWrapper):
    """A worker's stdout or stderr.

    Args:
        fd: the descriptor, 1 or 2.
        speaker: returns the name of the task that runs, or "" for the worker's own.
    """

    def __init__(self, fd: int, speaker: Callable[[], str]) -> None:
        super().__init__(io.FileIO(fd, "w", closefd=False), "utf-8", "backslashreplace", write_through=True)
        self._fd = fd
        self._speaker = speaker

    def write(self, text: str) -> int:
        """Write at once; what ends in the middle of a line is continued by the same thread's next text."""
        if not isinstance(text, str):
            raise TypeError(f"write() takes text, not {type(text).__name__}")
        if self.closed:
            raise ValueError("I/O operation on closed file.")
        data = text.encode("utf-8", "backslashreplace").translate(None, _MARKS)
        name = self._speaker().encode("utf-8", "replace")[:MAX_NAME_BYTES].translate(None, _MARKS + b"\n")
        head = b"".join((_OPEN, name, _SEPARATOR, b"%d" % threading.get_native_id(), _SEPARATOR))
        room = MAX_RECORD_BYTES - len(head) - 1
        for start in range(0, len(data), room):
            self._write_record(head + data[start : start + room] + _CLOSE)
        return len(text)

    def _write_record(self, record: bytes) -> None:
        while True:
            try:
                os.write(self._fd, record)
                return
            except BlockingIOError:  # a child process made the pipe non-blocking for all who share it
                select.select([], [self._fd], [])
            except BrokenPipeError:  # the daemon is gone, and so are we in a moment
                return


class LineParser:
    """Makes (name, line) pairs out of what one pipe carries; the name is empty where the process itself spoke."""

    __slots__ = ("_open", "_rest")

    def __init__(self) -> None:
        self._rest = b""
        self._open: dict[int, tuple[bytes, bytes]] = {}  # thread -> name at the line's start, its text so far

    def feed(self, data: bytes) -> list[tuple[str, str]]:
        """Take what was read; return the lines that are complete now."""
        lines: list[tuple[bytes, bytes]] = []
        data = self._rest + data
        self._rest = b""
        position = 0
        while position < len(data):
            start = data.find(_OPEN, position)
            if start < 0:
                self._take(lines, b"", _RAW, data[position:])
                break
            if start > position:
                self._take(lines, b"", _RAW, data[position:start])
            record = _RECORD.match(data, start)
            if record is not None:
                self._take(lines, record[1], int(record[2]), record[3])
                position = record.end()
            elif len(data) - start < MAX_RECORD_BYTES:
                self._rest = data[start:]  # its end is on the way
                break
            else:
                position = start + 1  # a byte of raw output that only looks like a mark
        return [(name.decode("utf-8", "replace"), _shown(line)) for name, line in lines]

    def finish(self) -> list[tuple[str, str]]:
        """The pipe is at its end: return what was left without a newline."""
        lines: list[tuple[bytes, bytes]] = []
        if self._rest:
            self._take(lines, b"", _RAW, self._rest.translate(None, _MARKS))
            self._rest = b""
        lines += self._open.values()
        self._open.clear()
        return [(name.decode("utf-8", "replace"), _shown(line)) for name, line in lines]

    def _take(self, lines: list[tuple[bytes, bytes]], name: bytes, thread: int, data: bytes) -> None:
        opened = self._open.pop(thread, None)
        if opened is not None:
            name, data = opened[0] if opened[1] else name, opened[1] + data
        *whole, rest = data.split(b"\n")
        lines += [(name, line) for line in whole]
        if b"\r" in rest:
            rest = rest[rest.rfind(b"\r", 0, len(rest) - 1) + 1 :]
        if len(rest) > MAX_LINE_BYTES:
            lines.append((name, rest))
            rest = b""
        if rest:
            if len(self._open) >= MAX_OPEN_LINES:
                lines.append(self._open.pop(next(iter(self._open))))
            self._open[thread] = (name, rest)


def _shown(line: bytes) -> str:
    """Return the line as a terminal would show it in the end: what a carriage return went back over is gone."""
    return line.rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", "replace")
