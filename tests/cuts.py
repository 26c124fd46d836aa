"""Cuts sockets of running processes from outside: the processes behind them live on and know of nothing.

Theory of operation. `pidfd_getfd` gives a copy of a descriptor of another process, and `shutdown` works on the socket behind
it. A channel's socket is known by its name, or its peer's: an abstract one of a session (`afield-...`). Where the system
forbids that (no permission to trace), `can_cut` says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable

_PIDFD_GETFD = 438
_libc = ctypes.CDLL(None, use_errno=True)


def channel_sockets(pid: int) -> list[socket.socket]:
    """Return copies of the sockets of a process's channels; close them."""
    found = []
    with contextlib.suppress(OSError):  # it has ended
        pidfd = os.pidfd_open(pid)
        try:
            for fd in map(int, os.listdir(f"/proc/{pid}/fd")):
                copy = _libc.syscall(_PIDFD_GETFD, pidfd, fd, 0)
                if copy >= 0:
                    found += _if_channel(copy)
        finally:
            os.close(pidfd)
    return found


def _if_channel(fd: int) -> list[socket.socket]:
    try:
        sock = socket.socket(fileno=fd)
    except OSError:  # no socket
        os.close(fd)
        return []
    with contextlib.suppress(OSError):  # not connected
        names = [sock.getsockname(), sock.getpeername()]
        if any(isinstance(name, bytes) and name.startswith(b"\0afield-") for name in names):
            return [sock]
    sock.close()
    return []


def can_cut() -> bool:
    """Tell whether the system lets us."""
    ours, theirs = socket.socketpair()
    pidfd = os.pidfd_open(os.getpid())
    try:
        copy = _libc.syscall(_PIDFD_GETFD, pidfd, ours.fileno(), 0)
        if copy >= 0:
            os.close(copy)
        return copy >= 0
    finally:
        os.close(pidfd)
        ours.close()
        theirs.close()


def cut_all(pid: int) -> int:
    """Cut all channels of a process, in both directions; return how many."""
    socks = channel_sockets(pid)
    for sock in socks:
        with contextlib.suppress(OSError):  # it is no longer connected
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()
    return len(socks)


def cut_one(pid: int, rng: random.Random) -> int:
    """Cut one channel of a process, in both directions or in one; return whether there was one."""
    how = rng.choice([socket.SHUT_RDWR, socket.SHUT_RD, socket.SHUT_WR])
    socks = channel_sockets(pid)
    count = 0
    if socks:
        with contextlib.suppress(OSError):
            rng.choice(socks).shutdown(how)
            count = 1
    for sock in socks:
        sock.close()
    return count


class Cutter:
    """A thread that cuts a channel of one of several processes at random, until it is told to stop.

    Args:
        seed: what it does.
        pids: returns the processes.
        pause_s: the shortest and the longest time between two cuts.
    """

    def __init__(self, seed: int, pids: Callable[[], list[int]], pause_s: tuple[float, float] = (0.0, 0.02)) -> None:
        self._rng = random.Random(seed)
        self._pids = pids
        self._pause_s = pause_s
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cutter", daemon=True)
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> Cutter:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ending.wait(self._rng.uniform(*self._pause_s)):
            pids = self._pids()
            if pids:
                self.counts["cuts"] += cut_one(self._rng.choice(pids), self._rng)
