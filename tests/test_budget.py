"""How the suite is spread, what it may cost, and that a test which hangs is ended in a worker process as well."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import budget

pytest_plugins = ["pytester"]


def item(path: str, *slow: pytest.Mark) -> Any:
    """Return what stands for a test."""
    return SimpleNamespace(
        path=Path(path), get_closest_marker=lambda name: slow[0] if slow and name == "slow" else None
    )


def test_the_heaviest_file_comes_first_and_its_tests_keep_their_order() -> None:
    light, heavy = [item("a"), item("a")], [item("b"), item("b", pytest.mark.slow.mark), item("b")]
    heaviest = [item("c", pytest.mark.slow(10).mark)]
    items = [light[0], *heavy, light[1], *heaviest]
    budget.pytest_collection_modifyitems(items)
    assert items == [*heaviest, *heavy, *light]


@pytest.mark.parametrize(
    ("cpus", "args", "workers"),
    [
        (2, ["tests"], 4),
        (64, ["tests"], budget.MOST_WORKERS),
        (2, [__file__], 0),
        (2, [f"{__file__}::test_it"], 0),
        (2, [__file__, __file__], 4),
    ],
)
def test_workers(monkeypatch: pytest.MonkeyPatch, cpus: int, args: list[str], workers: int) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cpus)))
    assert budget.pytest_xdist_auto_num_workers(SimpleNamespace(args=args)) == workers  # type: ignore[arg-type]


def test_complaints() -> None:
    wall_s, cpu_s = budget.WHOLE_SUITE_S, budget.WHOLE_SUITE_CPU_S
    assert budget.complaint(wall_s, cpu_s) == ""
    assert "TOO EXPENSIVE" in budget.complaint(wall_s, cpu_s + 1)
    assert "TOO LONG" in budget.complaint(wall_s + 1, cpu_s)


def test_tests_that_should_be_marked() -> None:
    def report(nodeid: str, duration: float, *marks: str) -> Any:
        return SimpleNamespace(nodeid=nodeid, duration=duration, when="call", keywords=dict.fromkeys(marks, 1))

    most = budget.SLOW_S * budget.PATIENCE
    passed = [report("a", most + 1), report("b", most + 2), report("c", most + 3, "slow"), report("d", most - 1)]
    assert [line.split()[-1] for line in budget.unmarked(passed)] == ["b", "a"]


@pytest.mark.slow
def test_a_test_that_hangs_is_ended_with_a_traceback_in_a_worker_too(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import time

        def test_hangs():
            time.sleep(100)

        def test_goes_on():
            pass
        """
    )
    result = pytester.runpytest_subprocess("-n", "1", "--dist", "loadfile", "--timeout=1", timeout=100)
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["*time.sleep(100)", "E*Timeout (>1.0s) from pytest-timeout."])
