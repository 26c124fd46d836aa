"""What a worker's Python code prints: marked records in the pipes that stand for its stdout and stderr.

Theory of operation. A record (`wire.records`) is written when its line is complete, or `flush` is called, or the worker next
looks at its messages, so that what a task printed has left before its reply does.

From here lines go through `node.output` (bounds, drivers) to `face.printing` (folding, prefixes) in the driver.
"""

from __future__ import annotations

import io
import os
import select
import threading
from collections.abc import Callable

from afield.runtime.wire.records import MAX_RECORD_BYTES, records


class WorkerStream(io.TextIOWrapper):
    """A worker's stdout or stderr.

    Args:
        fd: the descriptor, 1 or 2.
        speaker: returns the name of the task that runs ("" for the worker's own) and its id (b"" outside of tasks).

    Lives as long as the process.
    """

    def __init__(self, fd: int, speaker: Callable[[], tuple[str, bytes]]) -> None:
        super().__init__(io.FileIO(fd, "w", closefd=False), "utf-8", "backslashreplace", write_through=True)
        self._fd = fd
        self._speaker = speaker
        #: Beginnings of lines: thread -> who began it, text.
        self.unfinished: dict[int, tuple[tuple[str, bytes], str]] = {}
        self._lock = threading.RLock()
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        """A copy of this process has none of its threads, and must not repeat what they have written."""
        self._lock = threading.RLock()
        self.unfinished.clear()

    def write(self, text: str) -> int:
        """Write whole lines at once; what ends in the middle of a line waits for its end, or for `flush`."""
        if not isinstance(text, str):
            raise TypeError(f"write() takes text, not {type(text).__name__}")
        count = len(text)
        if self.closed:
            raise ValueError("I/O operation on closed file.")
        speaker = self._speaker()
        thread = threading.get_ident()
        with self._lock:
            begun = self.unfinished.pop(thread, None)
            if begun is not None:
                if begun[0] == speaker:
                    text = begun[1] + text
                else:
                    self._put_out(thread, *begun)
            end = text.rfind("\n") + 1 if len(text) < MAX_RECORD_BYTES else len(text)
            if end:
                self._put_out(thread, speaker, text[:end])
            if end < len(text):
                self.unfinished[thread] = speaker, text[end:]
        return count

    def flush(self) -> None:
        """Write also the beginnings of lines."""
        if not self.unfinished:
            return
        with self._lock:
            while self.unfinished:
                thread, begun = self.unfinished.popitem()
                self._put_out(thread, *begun)

    def flush_if_free(self) -> bool:
        """Do the same if no other thread writes, and tell whether it is done; for who holds the process's lock.

        A thread that writes may wait for that lock: the collector can run finalisers there which use afield.
        """
        if self.unfinished:
            if not self._lock.acquire(blocking=False):
                return False
            try:
                self.flush()
            finally:
                self._lock.release()
        return True

    def _put_out(self, thread: int, speaker: tuple[str, bytes], text: str) -> None:
        for record in records(speaker[0], thread, speaker[1], text):
            self._write_record(record)

    def _write_record(self, record: bytes) -> None:
        while True:
            try:
                os.write(self._fd, record)
                return
            except BlockingIOError:  # a child process made the pipe non-blocking for all who share it
                select.select([], [self._fd], [])
            except BrokenPipeError:  # the daemon is gone, and so are we in a moment
                return
