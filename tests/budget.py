"""What the suite may cost, and how it is spread over processes: hooks of pytest that `tests/conftest.py` loads.

Theory of operation. `make test` gives whole files to worker processes (pytest-xdist, `--dist loadfile`), so that what the
tests of a file share is made once. A file is handed out when a worker has nearly ended the one before, in the order of
collection; the heaviest come first, or else the last one to start would keep one worker busy while the others are
idle. What a file takes is told by its marks: `slow`, or `slow(10)` for a test that takes some ten seconds.

Most tests wait for processes of their own, so there are twice as many workers as CPUs. More than `MOST_WORKERS` gain
nothing, as no run is shorter than its longest file, and each has half a dozen processes.

At its end a run of the whole suite says what it took, and complains if that was more than `WHOLE_SUITE_S`. It does not
fail: how long a run takes depends on who else uses the machine. CPU time hardly does, and is told as well.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

#: The whole suite takes no longer than this on two idle CPUs.
WHOLE_SUITE_S = 240.0
#: So much CPU time fits into that: two CPUs are never busy all the time.
WHOLE_SUITE_CPU_S = 2 * 0.9 * WHOLE_SUITE_S
#: A test that takes longer is marked `slow`.
SLOW_S = 1.0
#: Workers that share the CPUs, and other users of the machine, make a test take this many times as long.
PATIENCE = 3.0

WORKERS_PER_CPU = 2
MOST_WORKERS = 16
#: What a test takes, for the order of the files: one that is marked `slow` without a number, and one that is not marked.
USUALLY_SLOW_S = 2.0
USUALLY_QUICK_S = 0.1
#: Tests without the mark that a run names, the slowest first.
MAX_NAMED = 10

_STARTED: pytest.StashKey[float] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    """Look at the clock, and let compiled modules be kept: each of some five hundred processes would compile all of afield."""
    config.stash[_STARTED] = time.monotonic()
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return what `-n auto` means; 0 is this process."""
    if len(config.args) == 1 and Path(config.args[0].partition("::")[0]).is_file():
        return 0
    return min(WORKERS_PER_CPU * len(os.sched_getaffinity(0)), MOST_WORKERS)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the heaviest files first; within a file nothing changes."""
    seconds: dict[Path, float] = {}
    for item in items:
        slow = item.get_closest_marker("slow")
        takes_s = USUALLY_QUICK_S if slow is None else slow.args[0] if slow.args else USUALLY_SLOW_S
        seconds[item.path] = seconds.get(item.path, 0.0) + takes_s
    items.sort(key=lambda item: -seconds[item.path])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what the whole suite took."""
    option = config.option
    is_part = option.keyword or option.markexpr or option.collectonly or option.deselect or getattr(option, "lf", False)
    if is_part or config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return
    wall_s = time.monotonic() - config.stash[_STARTED]
    cpu_s = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    terminalreporter.section("cost of the whole suite")
    terminalreporter.line(f"{wall_s:.0f} s on {len(os.sched_getaffinity(0))} CPUs, {cpu_s:.0f} s of CPU time")
    wrong = complaint(wall_s, cpu_s)
    if wrong:
        terminalreporter.line(wrong, red=True, bold=True)
    for line in unmarked(terminalreporter.stats.get("passed", [])):
        terminalreporter.line(line, yellow=True)


def complaint(wall_s: float, cpu_s: float) -> str:
    """Say what is wrong with what the whole suite took; "" if nothing is."""
    if cpu_s > WHOLE_SUITE_CPU_S:
        return (
            f"THE SUITE IS TOO EXPENSIVE: it may use {WHOLE_SUITE_CPU_S:.0f} s of CPU time (tests/budget.py). "
            "See the slowest tests above, and CONTRIBUTING.md for what a test may cost."
        )
    if wall_s > WHOLE_SUITE_S:
        return (
            f"THE SUITE TOOK TOO LONG: {WHOLE_SUITE_S:.0f} s are allowed (tests/budget.py). As it did not use too much CPU "
            "time, others have used the machine, or a test waits too long: see the slowest tests above."
        )
    return ""


def unmarked(passed: Sequence[pytest.TestReport]) -> list[str]:
    """Name tests that should be marked `slow`, since `make check` leaves out only what is."""
    found = [
        (report.duration, report.nodeid)
        for report in passed
        if report.when == "call" and report.duration > PATIENCE * SLOW_S and "slow" not in report.keywords
    ]
    return [
        f"{duration_s:.1f} s and not marked slow: {nodeid}"
        for duration_s, nodeid in sorted(found, reverse=True)[:MAX_NAMED]
    ]
