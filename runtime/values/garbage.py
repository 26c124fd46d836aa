"""Values that only garbage refers to: reference cycles keep views of stored values, and refs, until Python collects them.

Theory of operation. Python's collector runs when many objects were made, and a view of a large value is one small object: a
cycle that has one can pin much memory for ever. When somebody waits for memory and all of it is in use, the daemon asks every
process to collect (`messages.Collect`), again and again while that is so.

To collect runs finalisers of the user's, which may do anything, block, or use afield. So it is done on a thread of its own,
without any lock of ours, while the process goes on to answer. It takes as long as the process has objects: hence one
at a time, none sooner than `EVERY_S` after the one before, and no more than one part in `SHARE` of the time.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable

EVERY_S = 0.2
#: Between two collections so many times the time passes that the last one took.
SHARE = 10


class Garbage:
    """Collects on request.

    Args:
        collected: called afterwards, on the same thread, with the arena for which it was asked.
    """

    def __init__(self, collected: Callable[[int], None]) -> None:
        self._collected = collected
        self.running = False
        self._next = 0.0  # monotonic seconds

    def wanted(self, arena: int) -> None:
        """Memory of an arena is short; the caller holds the process's lock. What comes too soon will be asked for again."""
        if self.running or time.monotonic() < self._next:
            return
        self.running = True
        try:
            threading.Thread(target=self._collect, args=(arena,), name="afield-collect", daemon=True).start()
        except RuntimeError:  # the system has no thread for us now; it will be asked for again
            self.running = False

    def _collect(self, arena: int) -> None:
        start = time.monotonic()
        try:
            gc.collect()
            self._collected(arena)
        finally:
            now = time.monotonic()
            self._next = now + max(EVERY_S, SHARE * (now - start))
            self.running = False
