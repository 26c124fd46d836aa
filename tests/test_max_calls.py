"""`max_calls`: a worker ends after so many tasks of a function, and not before what it owns is no longer needed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

import afield
from tests.helpers import poll

PATIENCE_S = 30.0


def get(refs: Any) -> Any:
    return afield.get(refs, timeout=PATIENCE_S)


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@afield.remote
def pid() -> int:
    return os.getpid()


def test_a_worker_ends_after_its_last_call(shared_runtime: None) -> None:
    once = pid.options(max_calls=1)
    pids = [get(once.remote()) for _ in range(3)]
    assert len(set(pids)) == 3
    assert poll(lambda: all(map(is_gone, pids)), PATIENCE_S)
    first, second = get(pid.options(max_calls=2).remote()), get(pid.options(max_calls=2).remote())
    assert poll(lambda: is_gone(first) and is_gone(second), PATIENCE_S)


def test_no_worker_runs_more_than_it_may(shared_runtime: None) -> None:
    counts = Counter(get([pid.options(max_calls=4).remote() for _ in range(12)]))
    assert max(counts.values()) <= 4


def test_a_worker_that_is_not_used_up_ends_too_when_it_is_idle(shared_runtime: None) -> None:
    worker = get(pid.options(max_calls=1000).remote())
    assert poll(lambda: is_gone(worker), PATIENCE_S)


def test_no_limit(shared_runtime: None) -> None:
    for options in ({"max_calls": 0}, {"max_calls": None}):
        workers = set(get([pid.options(**options).remote() for _ in range(20)]))
        assert not any(map(is_gone, workers))
    for wrong in (-1, 1.5, "2", True):
        with pytest.raises(afield.InvalidOptionError, match="max_calls"):
            pid.options(max_calls=wrong)


def test_what_a_worker_owns_outlives_its_last_call(shared_runtime: None) -> None:
    @afield.remote(max_calls=1, max_retries=0)
    def own() -> tuple[int, list[Any]]:
        return os.getpid(), [afield.put("kept"), pid.remote()]

    worker, refs = get(own.remote())
    assert get(refs[0]) == "kept" and get(refs[1]) != worker
    assert not is_gone(worker)
    del refs
    assert poll(lambda: is_gone(worker), PATIENCE_S)


def test_without_retries_nothing_is_lost_between_two_workers(shared_runtime: None) -> None:
    @afield.remote(max_calls=2, max_retries=0)
    def number(i: int) -> int:
        return i

    assert get([number.remote(i) for i in range(9)]) == list(range(9))


def test_a_generator_is_one_call(shared_runtime: None) -> None:
    @afield.remote(max_calls=1)
    def items() -> Iterator[int]:
        yield os.getpid()
        yield os.getpid()

    first, second = get(list(items.remote()))
    assert first == second
    assert poll(lambda: is_gone(first), PATIENCE_S)


def test_a_call_that_raises_or_waits_counts(shared_runtime: None) -> None:
    @afield.remote(max_calls=1)
    def fail() -> None:
        raise ValueError(os.getpid())

    @afield.remote(max_calls=1)
    def wait() -> tuple[int, int]:
        return os.getpid(), int(afield.get(pid.remote()))

    with pytest.raises(ValueError) as caught:
        get(fail.remote())
    worker, other = get(wait.remote())
    assert worker != other
    gone = caught.value.cause.args[0]  # type: ignore[attr-defined]
    assert poll(lambda: is_gone(gone) and is_gone(worker), PATIENCE_S)


def test_a_device_is_free_for_the_next_worker(shared_runtime: None) -> None:
    @afield.remote(num_gpus=1, max_calls=1)
    def compute() -> tuple[int, float]:
        xp = afield.array_module()
        return os.getpid(), float(xp.arange(4).sum())

    results = get([compute.remote() for _ in range(3)])
    assert [total for _, total in results] == [6.0] * 3 and len({worker for worker, _ in results}) == 3
