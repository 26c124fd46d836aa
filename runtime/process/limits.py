"""How much of the machine this process may use: CPUs by affinity and quota, memory by the limits of its control groups.

Theory of operation. A container, a batch system's job or `systemd-run` sees the whole machine in /proc and may use a part of
it. CPUs are what the affinity mask allows (which is also how cpusets show themselves), cut to the CPU time that a control
group gives in each period. Memory is the machine's, cut to the lowest limit of any group that this process is in. Groups are
nested, and the tightest of a group and all those above it holds. Both versions of the interface are read (one machine may
have both): version 2 as `cpu.max` and `memory.max`, version 1 as `cpu.cfs_quota_us`, `cpu.cfs_period_us` and
`memory.limit_in_bytes`. In a container the path of the group may be the host's, of which nothing is to be seen inside: then
the root of what is mounted is the container's own group. What cannot be read limits nothing.

Source: the kernel's documentation, admin-guide/cgroup-v2 and admin-guide/cgroup-v1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

_MOUNTED = Path("/sys/fs/cgroup")
_OURS = Path("/proc/self/cgroup")


def usable_cpus(mounted: Path = _MOUNTED, ours: Path = _OURS) -> int:
    """Return how many CPUs this process may use, at least 1; a part of one that a quota gives counts as one."""
    cpus: float = len(os.sched_getaffinity(0))
    for group in _groups("cpu", mounted, ours):
        quota, _, period = _read(group / "cpu.max").partition(" ")
        if not period:
            quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
        share = _number(quota), _number(period)
        if share[0] > 0 and share[1] > 0:
            cpus = min(cpus, share[0] / share[1])
    return max(1, math.ceil(cpus))


def usable_memory_bytes(mounted: Path = _MOUNTED, ours: Path = _OURS) -> int:
    """Return how much memory this process and those beside it in its control groups may use."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for group in _groups("memory", mounted, ours):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _number(_read(group / name))
            if limit > 0:
                memory = min(memory, limit)
    return memory


def _groups(controller: str, mounted: Path, ours: Path) -> Iterator[Path]:
    """Yield the directories of the groups that may limit this process: its own and all above, in each hierarchy."""
    for line in _read(ours).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            roots = [mounted, mounted / "unified"]
        elif controller in controllers.split(","):
            roots = [mounted / controllers, mounted / controller]
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for root in roots:
            for depth in range(len(parts), -1, -1):
                yield root.joinpath(*parts[:depth])


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(text: str) -> int:
    """Return the number that `text` is; -1 for "max", nothing, and everything else."""
    try:
        return int(text)
    except ValueError:
        return -1
