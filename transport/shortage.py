"""Descriptors that are missing: who meets the lack says so at times, and learns when it has lasted too long.

Theory of operation. A process without descriptors can neither accept nor make a socket. Whoever wants one tries again by a
timer (`endpoint`): what connects to us waits in the kernel's queue meanwhile. Each failed try is told here. The first is
printed, then one in `PRINT_EVERY_S`; tries that follow one another with pauses up to `PAUSE_S` are one shortage.
"""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable

#: What the kernel says when this process, or the machine, has none left.
OUT_OF_FILES = frozenset([errno.EMFILE, errno.ENFILE])
PRINT_EVERY_S = 60.0
#: Longer than any pause between two tries.
PAUSE_S = 3.0


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Shortage:
    """The lack of descriptors in one process.

    Args:
        who: the process, for the text.
        clock: monotonic seconds.
        say: prints a line.
    """

    def __init__(
        self, who: str, clock: Callable[[], float] = time.monotonic, say: Callable[[str], None] = _print
    ) -> None:
        self._who = who
        self._clock = clock
        self._say = say
        self._since = self._last = self._printed = float("-inf")
        #: For how many seconds the last try has found none.
        self.lasts_s = 0.0

    def met(self, error: OSError) -> float:
        """A descriptor could not be had; return for how many seconds that has been so."""
        now = self._clock()
        if now - self._last > PAUSE_S:
            self._since = now
        self._last = now
        if now - self._printed >= PRINT_EVERY_S:
            self._printed = now
            self._say(f"afield: {self.describe(error)}")
        self.lasts_s = now - self._since
        return self.lasts_s

    def describe(self, error: OSError) -> str:
        """Say what is missing, and what can be done about it."""
        return (
            f"{self._who} ran out of file descriptors ({error}), and new connections wait until it has some; it needs one for "
            "each process that it talks to: raise the limit of open files (ulimit -n), or close what is not needed"
        )
