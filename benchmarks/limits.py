"""The machine's own limits: what the same work costs without any runtime around it.

Theory of operation. A figure in microseconds means little without what the machine allows, and a small virtual
machine allows different things from one minute to the next: a ping-pong between two processes is several times slower
when the kernel puts them on two cores that both fell asleep. So every limit is one short *round* (a list of samples),
made anew each time it is called, and the runner alternates rounds of a limit with rounds of the case that is held
against it. The partner of a limit is a fresh bare interpreter and never a fork of this process, which has the
runtime's threads and sockets.

Run alone (`python -m benchmarks.limits`) the module prints each limit of this machine.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy

ASLEEP_S = 0.005
"""Pause between two calls that lets both sides fall asleep; the cases use the same one."""

_MESSAGE = b"x" * 64
_ECHO = """
import socket, sys
peer = socket.socket(fileno=int(sys.argv[1]))
while message := peer.recv(64):
    peer.send(message)
"""
_FORK = """
import json, os, sys, time
import numpy
samples = []
for _ in range(int(sys.argv[1])):
    started = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    samples.append(time.perf_counter() - started)
print(json.dumps(samples))
"""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much one round of a limit does: calls back to back, calls after a pause, and bytes to copy."""

    calls: int
    asleep_calls: int
    copy_bytes: int


def ping_pong_us(effort: Effort) -> list[float]:
    """Time round trips of 64 bytes over a unix socket to another process, back to back, in µs."""
    return _round_trips_us(effort.calls, pause_s=0.0)


def ping_pong_asleep_us(effort: Effort) -> list[float]:
    """Time the same round trips when both processes slept before each, in µs."""
    return _round_trips_us(effort.asleep_calls, pause_s=ASLEEP_S)


def ping_pong_apart_us(effort: Effort) -> list[float]:
    """Time them asleep, with each process held on a core of its own, in µs; needs two cores."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise NotImplementedError("two cores are needed to keep two processes apart")
    try:
        os.sched_setaffinity(0, {cores[0]})
        return _round_trips_us(effort.asleep_calls, pause_s=ASLEEP_S, partner_core=cores[1])
    finally:
        os.sched_setaffinity(0, cores)


def copy_gb_s(effort: Effort) -> list[float]:
    """Measure copies of an array into shared memory whose pages are already there, in GB/s."""
    source = numpy.ones(effort.copy_bytes, dtype=numpy.uint8)
    fd = os.memfd_create("limit")
    try:
        os.ftruncate(fd, effort.copy_bytes)
        memory = mmap.mmap(fd, effort.copy_bytes)
    finally:
        os.close(fd)
    target = numpy.frombuffer(memory, dtype=numpy.uint8)
    target[:] = source
    samples = []
    for _ in range(5):
        started = time.perf_counter()
        numpy.copyto(target, source)
        samples.append(effort.copy_bytes / 1e9 / (time.perf_counter() - started))
    del target
    memory.close()
    return samples


def import_numpy_s(_effort: Effort) -> list[float]:
    """Time a new interpreter that imports numpy and ends, in seconds."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import numpy"], check=True)
    return [time.perf_counter() - started]


def fork_8_s(_effort: Effort) -> list[float]:
    """Time eight forks of a process that has imported numpy, one after another, in seconds."""
    done = subprocess.run([sys.executable, "-c", _FORK, "8"], check=True, capture_output=True, text=True)
    return [sum(json.loads(done.stdout))]


LIMITS: dict[str, Callable[[Effort], list[float]]] = {
    "ping-pong": ping_pong_us,
    "ping-pong asleep": ping_pong_asleep_us,
    "ping-pong apart": ping_pong_apart_us,
    "copy to warm shm": copy_gb_s,
    "import numpy": import_numpy_s,
    "8 forks": fork_8_s,
}


def _round_trips_us(calls: int, *, pause_s: float, partner_core: int | None = None) -> list[float]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    command = [sys.executable, "-I", "-S", "-c", _ECHO, str(theirs.fileno())]
    with ours, subprocess.Popen(command, pass_fds=[theirs.fileno()]) as partner:
        theirs.close()
        if partner_core is not None:
            os.sched_setaffinity(partner.pid, {partner_core})
        samples = []
        for number in range(calls + 10):
            if pause_s:
                time.sleep(pause_s)
            started = time.perf_counter()
            ours.send(_MESSAGE)
            ours.recv(64)
            if number >= 10:  # The first calls wait for the partner's start and warm the path.
                samples.append((time.perf_counter() - started) * 1e6)
        ours.close()
        partner.wait()
    return samples


def main() -> None:
    """Print the median of each limit."""
    effort = Effort(calls=1000, asleep_calls=100, copy_bytes=128 << 20)
    for name, measure in LIMITS.items():
        print(f"{name:20} {statistics.median(measure(effort)):10.3f} ({measure.__name__})")


if __name__ == "__main__":
    main()
