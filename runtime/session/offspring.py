"""What the programs of tasks start, and how it ends with them.

Theory of operation. Each worker leads a process session of its own (`setsid`), which whatever it starts is born into:
`multiprocessing`'s children, programs, and what they start in turn, also once the process between has ended. When the worker
is gone, whatever way it went, the fork server ends what is left of that session. A program that calls `setsid` itself has
said that it wants to outlive its starter, and does. The numbers of dead workers stay theirs while such a session has members,
since the kernel gives no process a number that is in use as a session's.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Collection

#: Whoever forks while we look is found the next time; what still grows after so many looks is left to the session's end.
MAX_LOOKS = 8


def lead() -> None:
    """Make this process, a new worker, the leader of a process session."""
    os.setsid()


def end(leaders: Collection[int]) -> None:
    """Kill what is left of the process sessions of these workers."""
    for leader in set(leaders) - {os.getpgrp()}:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL)  # most of it, at once
    ended: set[int] = set()
    for _ in range(MAX_LOOKS):
        found = _members(leaders) - ended
        if not found:
            return
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        ended |= found


def _members(leaders: Collection[int]) -> set[int]:
    """Return the processes of these process sessions, but for this process."""
    found = set()
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):  # no process, or gone at this moment
            if os.getsid(int(name)) in leaders:
                found.add(int(name))
    return found - {os.getpid()}
