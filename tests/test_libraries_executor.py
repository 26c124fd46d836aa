"""`Executor` by behaviour: results, errors, cancelling, the bound, shutdown, callbacks."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import afield
from afield.libraries.executor import Executor
from tests.helpers import poll

pytestmark = pytest.mark.usefixtures("shared_runtime")

PATIENCE_S = 30.0


def gated(path: Path) -> Callable[[], str]:
    """Return a function that ends when the path exists."""

    def wait_at_gate() -> str:
        deadline = time.monotonic() + PATIENCE_S
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        return path.name

    return wait_at_gate


def test_submit_and_map() -> None:
    with Executor() as executor:
        assert executor.submit(divmod, 7, 2).result() == (3, 1)
        assert executor.submit(int, "ff", base=16).result() == 255
        assert list(executor.map(pow, [1, 2, 3], [2, 2])) == [1, 4]
        assert list(executor.map(lambda x: x * x, range(10), chunksize=3)) == [x * x for x in range(10)]
        assert list(executor.map(abs, [])) == []


def test_refs_among_the_arguments_are_resolved() -> None:
    with Executor() as executor:
        assert executor.submit(sum, afield.put([1, 2, 3])).result() == 6


def test_options_are_those_of_the_tasks() -> None:
    def devices() -> int:
        return len(afield.get_gpu_ids())

    with Executor(num_gpus=1, num_cpus=0) as executor:
        assert executor.submit(devices).result() == 1


def test_futures_work_with_concurrent_futures_and_asyncio() -> None:
    with Executor() as executor:
        futures = [executor.submit(abs, -i) for i in range(5)]
        assert sorted(f.result() for f in concurrent.futures.as_completed(futures, PATIENCE_S)) == [0, 1, 2, 3, 4]

        async def main() -> list[int]:
            loop = asyncio.get_running_loop()
            return await asyncio.gather(*(loop.run_in_executor(executor, abs, -i) for i in range(3)))

        assert asyncio.run(main()) == [0, 1, 2]


def test_an_error_has_its_type_and_the_function_s_name() -> None:
    def fails(x: int) -> None:
        raise KeyError(x)

    with Executor() as executor:
        error = executor.submit(fails, 3).exception(PATIENCE_S)
        assert isinstance(error, KeyError)
        assert isinstance(error, afield.TaskError)
        assert "fails() raised KeyError" in str(error)
        with pytest.raises(ZeroDivisionError, match="divmod"):
            list(executor.map(divmod, [1, 1, 1], [1, 0, 1], chunksize=2))


def test_what_cannot_be_pickled_is_an_error_of_the_future_and_costs_no_lane() -> None:
    with Executor(1) as executor:
        for _ in range(3):
            assert isinstance(executor.submit(repr, threading.Lock()).exception(PATIENCE_S), TypeError)
        assert executor.submit(abs, -1).result(PATIENCE_S) == 1


def test_no_more_than_max_workers_run_at_a_time() -> None:
    def interval(_: int) -> tuple[float, float]:
        started = time.monotonic()
        time.sleep(0.01)
        return started, time.monotonic()

    with Executor(1) as executor:
        intervals = sorted(executor.map(interval, range(10)))
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(intervals))


def test_a_waiting_call_that_is_cancelled_never_runs(tmp_path: Path) -> None:
    with Executor(1) as executor:
        first = executor.submit(gated(tmp_path / "gate"))
        second = executor.submit(Path.touch, tmp_path / "second")
        third = executor.submit(abs, -3)
        assert second.cancel()
        assert second.cancelled()
        assert concurrent.futures.wait([second], timeout=0).done == {second}
        with pytest.raises(concurrent.futures.CancelledError):
            second.result()
        (tmp_path / "gate").touch()
        assert first.result(PATIENCE_S) == "gate"
        assert third.result(PATIENCE_S) == 3
    assert not (tmp_path / "second").exists()


def test_a_running_call_is_interrupted_and_its_lane_is_free_again(tmp_path: Path) -> None:
    def run() -> None:
        (tmp_path / "runs").touch()
        gated(tmp_path / "never")()

    with Executor(1, max_retries=0) as executor:
        running = executor.submit(run)
        assert poll((tmp_path / "runs").exists)
        assert running.cancel()
        assert executor.submit(abs, -1).result(PATIENCE_S / 3) == 1
        assert running.cancelled()


def test_a_finished_call_cannot_be_cancelled() -> None:
    with Executor() as executor:
        future = executor.submit(abs, -1)
        assert future.result() == 1
        assert not future.cancel()


def test_a_callback_may_submit_and_get() -> None:
    with Executor(1) as executor:
        chain: list[Any] = []
        done = threading.Event()

        def go_on(future: concurrent.futures.Future[int]) -> None:
            chain.append(future.result() + afield.get(afield.put(0)))
            if len(chain) < 5:
                executor.submit(abs, -len(chain)).add_done_callback(go_on)
            else:
                done.set()

        executor.submit(abs, 0).add_done_callback(go_on)
        assert done.wait(PATIENCE_S)
        assert chain == [0, 1, 2, 3, 4]


def test_sixteen_threads_submit() -> None:
    def submit(executor: Executor, results: list[int], start: int) -> None:
        futures = [executor.submit(abs, -i) for i in range(start, start + 20)]
        results.extend(future.result() for future in futures)

    results: list[int] = []
    with Executor(4) as executor:
        threads = [threading.Thread(target=submit, args=(executor, results, 20 * i)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(results) == list(range(320))


def test_shutdown_waits() -> None:
    executor = Executor(1)
    futures = [executor.submit(time.sleep, 0.01) for _ in range(4)]
    executor.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(abs, -1)
    executor.shutdown()
    assert all(future.done() and not future.cancelled() for future in futures)


def test_shutdown_cancels_if_it_is_told_to(tmp_path: Path) -> None:
    def run() -> None:
        (tmp_path / "runs").touch()
        try:
            gated(tmp_path / "never")()
        finally:
            (tmp_path / "ended").touch()

    executor = Executor(1, max_retries=0)
    futures = [executor.submit(run) for _ in range(4)]
    assert poll((tmp_path / "runs").exists)
    executor.shutdown(cancel_futures=True)
    assert all(future.cancelled() for future in futures)
    assert (tmp_path / "ended").exists()


def test_map_gives_up_after_its_timeout(tmp_path: Path) -> None:
    with Executor(1) as executor:
        with pytest.raises(TimeoutError):
            list(executor.map(lambda _: gated(tmp_path / "never")(), [1], timeout=0.05))


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Executor(0), ValueError),
        (lambda: Executor(1, num_cpu=1), afield.InvalidOptionError),
        (lambda: Executor(num_returns=2), afield.InvalidOptionError),
        (lambda: Executor().map(abs, [1], chunksize=0), ValueError),
    ],
)
def test_wrong_use(make: Callable[[], object], error: type[Exception]) -> None:
    with pytest.raises(error):
        make()
