"""What of the machine a process may use: affinity, and control groups of both versions, from trees made here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from afield.runtime.process.limits import usable_cpus, usable_memory_bytes

MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
MANY = 1 << 20


class Tree:
    """A hierarchy of control groups in files."""

    def __init__(self, folder: Path) -> None:
        self.mounted = folder / "mounted"
        self.ours = folder / "cgroup"
        self.mounted.mkdir()

    def write(self, **files: str) -> None:
        for name, text in files.items():
            path = self.mounted / name.replace("__", "/").replace("DOT", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")

    def cpus(self) -> int:
        return usable_cpus(self.mounted, self.ours)

    def memory(self) -> int:
        return usable_memory_bytes(self.mounted, self.ours)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Return an empty hierarchy, on a machine of 16 CPUs."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    return Tree(tmp_path)


def test_without_control_groups_the_machine_is_ours(tree: Tree) -> None:
    assert (tree.cpus(), tree.memory()) == (16, MACHINE)


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [("max 100000", 16), ("400000 100000", 4), ("250000 100000", 3), ("1000 100000", 1), ("9900000 100000", 16)],
)
def test_a_quota_of_version_2_counts_in_whole_cpus(tree: Tree, quota: str, cpus: int) -> None:
    tree.ours.write_text("0::/job\n")
    tree.write(job__cpuDOTmax=quota)
    assert tree.cpus() == cpus


def test_the_tightest_of_a_group_and_those_above_it_holds(tree: Tree) -> None:
    tree.ours.write_text("0::/outer/inner\n")
    tree.write(
        outer__inner__cpuDOTmax="800000 100000",
        outer__cpuDOTmax="200000 100000",
        outer__inner__memoryDOTmax=str(64 * MANY),
        outer__memoryDOTmax="max",
        memoryDOTmax=str(128 * MANY),
    )
    assert (tree.cpus(), tree.memory()) == (2, 64 * MANY)


def test_version_1_and_both_at_once(tree: Tree) -> None:
    tree.ours.write_text("5:cpu,cpuacct:/job\n4:memory:/job\n0::/other\n")
    tree.write(
        **{
            "cpu,cpuacct__job__cpuDOTcfs_quota_us": "300000",
            "cpu,cpuacct__job__cpuDOTcfs_period_us": "100000",
            "cpu,cpuacct__cpuDOTcfs_quota_us": "-1",
            "cpu,cpuacct__cpuDOTcfs_period_us": "100000",
            "memory__job__memoryDOTlimit_in_bytes": str(96 * MANY),
            "memory__memoryDOTlimit_in_bytes": "9223372036854771712",
            "unified__other__memoryDOTmax": str(32 * MANY),
        }
    )
    assert (tree.cpus(), tree.memory()) == (3, 32 * MANY)


def test_a_path_of_the_host_that_a_container_does_not_see_means_the_root(tree: Tree) -> None:
    tree.ours.write_text("0::/../../docker/abc\n")
    tree.write(cpuDOTmax="100000 100000", memoryDOTmax=str(48 * MANY))
    assert (tree.cpus(), tree.memory()) == (1, 48 * MANY)


def test_what_cannot_be_understood_limits_nothing(tree: Tree) -> None:
    tree.ours.write_text("nonsense\n0::/job\n")
    tree.write(job__cpuDOTmax="a b", job__memoryDOTmax="")
    (tree.mounted / "cpu.max").write_bytes(b"\xff\xfe 0")
    assert (tree.cpus(), tree.memory()) == (16, MACHINE)


def test_init_schedules_on_the_cpus_that_the_program_may_use() -> None:
    script = "import afield; print(afield.init().num_cpus)"
    one = min(os.sched_getaffinity(0))
    result = subprocess.run(
        ["taskset", "-c", str(one), sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert (result.stdout.strip(), result.returncode) == ("1.0", 0), result.stderr
