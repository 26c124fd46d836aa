"""The records in which a worker's Python code writes lines into its pipes, and the parser that makes lines of them again.

Theory of operation. A worker has one pipe for stdout and one for stderr, so that also what C code and child processes write
arrives. Python's own streams (`worker.output`) write records that say which task and which thread speaks:

    OPEN name SEPARATOR thread SEPARATOR task SEPARATOR text CLOSE

Each is one `write` of at most `PIPE_BUF` bytes, which the kernel never mixes with another writer's, and each thread has its
own line. What stands between records is raw output of the process. Text cannot contain the marks; they are taken out of it.

`LineParser` joins the pieces of each thread to lines; what a task left without a newline ends where the next task of that
thread speaks. It keeps no more than `MAX_OPEN_LINES` unfinished lines of `MAX_LINE_BYTES`; a progress bar that goes back with
carriage returns keeps its last state only.
"""

from __future__ import annotations

import re
import select
from collections.abc import Iterator

_OPEN, _CLOSE = b"\x1e", b"\x1d"
_MARKS = b"\x1d\x1e\x1f"
_RECORD = re.compile(rb"\x1e([^\x1d-\x1f\n]*)\x1f([0-9]+)\x1f([0-9a-f]*)\x1f([^\x1d\x1e]*)(?:\x1d|(?=\x1e))")
_BEGINNING = re.compile(rb"\x1e[^\x1d-\x1f\n]*(?:\x1f[0-9]*(?:\x1f[0-9a-f]*(?:\x1f[^\x1d\x1e]*)?)?)?\Z")
#: A record is written in one piece.
MAX_RECORD_BYTES = select.PIPE_BUF
#: Longer names of tasks are cut.
MAX_NAME_BYTES = 200
#: A longer line is cut into pieces: an endless one must not fill the daemon's memory.
MAX_LINE_BYTES = 1 << 16
#: Threads of one worker that may be in the middle of a line; beyond it the oldest such line is ended.
MAX_OPEN_LINES = 64
_RAW = 0  # stands for the thread of what was written without marks


def records(name: str, thread: int, task_id: bytes, text: str) -> Iterator[bytes]:
    """Return the records, each of them to be written in one piece, that carry `text`."""
    data = text.encode("utf-8", "backslashreplace").translate(None, _MARKS)
    shown = name.encode("utf-8", "replace")[:MAX_NAME_BYTES].translate(None, _MARKS + b"\n")
    head = b"\x1e%b\x1f%d\x1f%b\x1f" % (shown, thread, task_id.hex().encode())
    room = MAX_RECORD_BYTES - len(head) - 1
    for start in range(0, len(data), room):
        yield head + data[start : start + room] + _CLOSE


class LineParser:
    """Makes (name, line) pairs out of what one pipe carries; the name is empty where the process itself spoke."""

    __slots__ = ("_open", "_rest")

    def __init__(self) -> None:
        self._rest = b""
        self._open: dict[
            int, tuple[bytes, bytes, bytes]
        ] = {}  # thread -> (task, its name, text so far), if a line is open

    def feed(self, data: bytes) -> list[tuple[str, str]]:
        """Take what was read; return the lines that are complete now."""
        lines: list[tuple[bytes, bytes]] = []
        data = self._rest + data
        self._rest = b""
        position = 0
        while position < len(data):
            start = data.find(_OPEN, position)
            if start < 0:
                self._take(lines, _RAW, b"", b"", data[position:])
                break
            if start > position:
                self._take(lines, _RAW, b"", b"", data[position:start])
            record = _RECORD.match(data, start)
            if record is not None:
                self._take(lines, int(record[2]), record[3], record[1], record[4])
                position = record.end()
            elif len(data) - start < MAX_RECORD_BYTES and _BEGINNING.match(data, start):
                self._rest = data[start:]  # its end is on the way
                break
            else:
                position = start + 1  # a byte of raw output that only looks like a mark
        return [(name.decode("utf-8", "replace"), _shown(line)) for name, line in lines]

    def finish(self) -> list[tuple[str, str]]:
        """The pipe is at its end: return what was left without a newline."""
        lines: list[tuple[bytes, bytes]] = []
        if self._rest:
            self._take(lines, _RAW, b"", b"", self._rest.translate(None, _MARKS))
            self._rest = b""
        lines += [(name, text) for _, name, text in self._open.values()]
        self._open.clear()
        return [(name.decode("utf-8", "replace"), _shown(line)) for name, line in lines]

    def _take(self, lines: list[tuple[bytes, bytes]], thread: int, task: bytes, name: bytes, data: bytes) -> None:
        opened = self._open.pop(thread, None)
        if opened is not None and opened[0] == task:
            data = opened[2] + data
        elif opened is not None:
            lines.append(opened[1:])
        *whole, rest = data.split(b"\n")
        lines += [(name, line) for line in whole]
        if not rest:
            return
        if b"\r" in rest:
            rest = rest[rest.rfind(b"\r", 0, len(rest) - 1) + 1 :]
        if len(rest) > MAX_LINE_BYTES:
            lines.append((name, rest))
            return
        if len(self._open) >= MAX_OPEN_LINES:
            lines.append(self._open.pop(next(iter(self._open)))[1:])
        self._open[thread] = (task, name, rest)


def _shown(line: bytes) -> str:
    """Return the line as a terminal would show it in the end: what a carriage return went back over is gone."""
    if b"\r" in line:
        line = line.rstrip(b"\r").rpartition(b"\r")[2]
    return line.decode("utf-8", "replace")
