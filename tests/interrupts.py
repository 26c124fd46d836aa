"""Interrupts that another process sends: as Ctrl-C in a terminal, at moments that nothing here can foresee."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import afield

_SENDER = """
import os, random, signal, sys, time
pid, seed, longest_s = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
rng = random.Random(seed)
while os.getppid() == pid:
    time.sleep(rng.random() * longest_s)
    os.kill(pid, signal.SIGINT)
"""


@contextlib.contextmanager
def interrupted(seed: str, longest_s: float) -> Iterator[None]:
    """Let another process send SIGINT to this one until the end of the block, with pauses of up to `longest_s`.

    The block is to catch every KeyboardInterrupt; that of the end is caught here. Only for the main thread, while a session
    runs.
    """
    command = [sys.executable, "-c", _SENDER, str(os.getpid()), seed, str(longest_s)]
    sender = subprocess.Popen(command)
    try:
        yield
    finally:
        _stop(sender)
        persist(afield.cluster_resources)  # which raises what came while a transition could not be interrupted


def persist(work: Callable[[], object], depth: int = 6) -> None:
    """Call `work` until it returns: after each KeyboardInterrupt that leaves it, again.

    The next may come while the one before is being caught; hence the levels, of which each catches what meets the one below.
    """
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            if depth:
                persist(work, depth - 1)
            else:
                work()
            return


def _stop(sender: subprocess.Popen[bytes]) -> None:
    """End the sender; what it has sent by then is of no interest any more."""
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)
            break
    sender.kill()
    sender.wait()
    time.sleep(0.05)
    signal.signal(signal.SIGINT, before)
