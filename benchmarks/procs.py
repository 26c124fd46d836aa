"""What the processes of a system under test cost, read from `/proc`.

Theory of operation. A system under test starts daemons, servers and workers in ways of its own: some are children of
the driver, some detach from it. All of them inherit the environment, so the driver sets one variable to a random
value before it starts the system, and whatever process carries that value belongs to it. Descendants of the driver
are added, in case a system gives its processes a clean environment. The figures are the kernel's own: private pages
(USS) and proportional pages (PSS) from `smaps_rollup`, CPU time in nanoseconds from `schedstat` or in ticks where the
kernel keeps no schedstat.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

MARK = "AFIELD_BENCH_MARK"
_PROC = Path("/proc")
_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


def mark_descendants() -> str:
    """Give every process that is started from now on a mark, and return it."""
    mark = uuid.uuid4().hex
    os.environ[MARK] = mark
    return mark


def members(mark: str) -> list[int]:
    """Return the pids of this process, of all that carry the mark and of all descendants, without zombies."""
    wanted = f"{MARK}={mark}".encode()
    parents: dict[int, int] = {}
    found = {os.getpid()}
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if state == "Z":
                continue
            parents[pid] = int(parent)
            if wanted in (entry / "environ").read_bytes():
                found.add(pid)
        except OSError:
            continue  # It ended while we looked, or it is not ours to look at.
    grew = True
    while grew:
        children = {pid for pid, parent in parents.items() if parent in found} - found
        found |= children
        grew = bool(children)
    return sorted(found)


@contextlib.contextmanager
def apart(mark: str) -> Iterator[None]:
    """Keep this process on one core and all other members on another while the block runs.

    Raises `NotImplementedError` where this process may use only one core.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise NotImplementedError("two cores are needed to keep two processes apart")
    pids = members(mark)
    try:
        for pid in pids:
            _pin(pid, {cores[0] if pid == os.getpid() else cores[1]})
        yield
    finally:
        for pid in {*pids, *members(mark)}:  # Whatever was started meanwhile inherited its parent's core.
            _pin(pid, set(cores))


def _pin(pid: int, cores: set[int]) -> None:
    with contextlib.suppress(OSError):  # A process or thread that ended meanwhile needs no core.
        for thread in (_PROC / str(pid) / "task").iterdir():
            os.sched_setaffinity(int(thread.name), cores)


def private_bytes(pid: int) -> int:
    """Return the bytes that only this process maps (USS); 0 when it has ended."""
    return _rollup(pid, ("Private_Clean:", "Private_Dirty:"))


def proportional_bytes(pids: Iterable[int]) -> int:
    """Return the bytes that these processes use together, shared pages counted once (the sum of their PSS)."""
    return sum(_rollup(pid, ("Pss:",)) for pid in pids)


def resident_bytes() -> int:
    """Return the resident set of this process in bytes."""
    for line in (_PROC / "self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not tell a process's resident set (VmRSS in /proc/self/status)")


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that all threads of a process have used, in seconds; 0.0 when it has ended."""
    try:
        tasks = [(task / "schedstat").read_text().split()[0] for task in (_PROC / str(pid) / "task").iterdir()]
        total_s = sum(map(int, tasks)) * 1e-9
        if total_s > 0.0:
            return total_s
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * _TICK_S
    except OSError:
        return 0.0


def _rollup(pid: int, keys: tuple[str, ...]) -> int:
    try:
        lines = (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(keys))
