"""`ActorPool` and the process `Pool` by behaviour."""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import multiprocessing.connection
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

import afield
from afield.libraries.multiprocessing import Pool as LibraryPool
from afield.util import ActorPool
from afield.util.multiprocessing import Pool

pytestmark = pytest.mark.usefixtures("shared_runtime")

PATIENCE_S = 30.0


def new_actor() -> Any:
    class Worker:
        def double(self, x: int) -> int:
            return 2 * x

        def sleep(self, seconds: float) -> float:
            time.sleep(seconds)
            return seconds

        def fail(self, x: int) -> None:
            raise KeyError(x)

        def leave(self) -> None:
            os._exit(1)

        def ask(self, other: Any) -> Any:
            return afield.get(other.double.remote(1))

        def touch(self, path: Path) -> None:
            path.touch()

        def wait_for(self, path: Path) -> str:
            deadline = time.monotonic() + PATIENCE_S
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.002)
            return path.name

    return afield.remote(Worker).remote()


def double(actor: Any, value: int) -> Any:
    return actor.double.remote(value)


def wait_for(actor: Any, path: Path) -> Any:
    return actor.wait_for.remote(path)


# -- ActorPool ----------------------------------------------------------------------------------------------------


def test_actor_pool_maps_in_order() -> None:
    pool = ActorPool([new_actor(), new_actor()])
    assert list(pool.map(double, range(10))) == [2 * x for x in range(10)]
    assert list(pool.map(lambda a, s: a.sleep.remote(s), [0.05, 0.0, 0.01])) == [0.05, 0.0, 0.01]


def test_actor_pool_maps_as_ready(tmp_path: Path) -> None:
    pool = ActorPool([new_actor(), new_actor()])
    slow, quick = tmp_path / "slow", tmp_path / "quick"
    quick.touch()
    results = pool.map_unordered(wait_for, [slow, quick, quick])
    assert [next(results), next(results)] == ["quick", "quick"]
    slow.touch()
    assert list(results) == ["slow"]


def test_actor_pool_submits_and_gets() -> None:
    pool = ActorPool([new_actor()])
    assert not pool.has_next()
    assert pool.has_free()
    for value in range(3):
        pool.submit(double, value)
    assert pool.has_next()
    assert not pool.has_free()
    assert [pool.get_next(), pool.get_next_unordered(), pool.get_next()] == [0, 2, 4]
    assert not pool.has_next()
    assert pool.has_free()
    with pytest.raises(StopIteration):
        pool.get_next()
    with pytest.raises(StopIteration):
        pool.get_next_unordered()


def test_actor_pool_keeps_others_busy_while_the_first_is_slow(tmp_path: Path) -> None:
    """Getting in order waits for the first, and hands out work to whoever is free meanwhile."""
    pool = ActorPool([new_actor(), new_actor()])
    gate = tmp_path / "gate"
    pool.submit(wait_for, gate)
    pool.submit(double, 1)
    pool.submit(double, 2)
    # Comes to its turn although nobody has fetched what is before it.
    pool.submit(lambda actor, path: actor.touch.remote(path), gate)
    assert [pool.get_next(PATIENCE_S / 2) for _ in range(4)] == ["gate", 2, 4, None]


def test_actor_pool_times_out(tmp_path: Path) -> None:
    pool = ActorPool([new_actor()])
    gate = tmp_path / "gate"
    pool.submit(wait_for, gate)
    pool.submit(double, 4)
    for get in pool.get_next, pool.get_next_unordered:
        with pytest.raises(TimeoutError):
            get(timeout=0.01)
    with pytest.raises(afield.GetTimeoutError, match="given up"):
        pool.get_next(timeout=0.01, ignore_if_timedout=True)
    gate.touch()
    assert pool.get_next(timeout=PATIENCE_S) == 8
    assert not pool.has_next()


def test_actor_pool_passes_errors_on_and_the_actor_stays() -> None:
    pool = ActorPool([new_actor()])
    pool.submit(lambda a, v: a.fail.remote(v), 1)
    pool.submit(double, 1)
    with pytest.raises(KeyError):
        pool.get_next()
    assert pool.get_next() == 2


def test_actor_pool_grows_and_shrinks() -> None:
    first, second = new_actor(), new_actor()
    pool = ActorPool([first])
    with pytest.raises(ValueError, match="already"):
        pool.push(first)
    assert pool.pop_idle() == first
    assert pool.pop_idle() is None
    pool.submit(double, 5)
    with pytest.raises(ValueError, match="no actors"):
        pool.get_next()
    pool.push(second)
    assert pool.get_next() == 10


def test_actor_pool_map_gives_up_earlier_results() -> None:
    pool = ActorPool([new_actor()])
    pool.submit(double, 1)
    pool.submit(double, 2)
    assert list(pool.map(double, [3])) == [6]


@pytest.mark.parametrize("method", ["map", "map_unordered"])
def test_actor_pool_goes_on_without_an_actor_that_died(method: str) -> None:
    pool = ActorPool([new_actor(), new_actor()])
    pool.submit(lambda actor, value: actor.leave.remote(), 0)
    for value in range(20):
        pool.submit(double, value)
    results: list[Any] = []
    with pytest.raises(afield.ActorDiedError):
        while pool.has_next():
            results.append(pool.get_next() if method == "map" else pool.get_next_unordered())
    while pool.has_next():
        results.append(pool.get_next() if method == "map" else pool.get_next_unordered())
    assert sorted(results) == [2 * value for value in range(20)]
    for _ in range(2):
        assert sorted(getattr(pool, method)(double, range(6))) == [0, 2, 4, 6, 8, 10]


def test_actor_pool_whose_actors_are_all_dead_has_an_error_for_each_call() -> None:
    pool = ActorPool([new_actor(), new_actor()])
    for value in range(2):
        pool.submit(lambda actor, value: actor.leave.remote(), value)
    for value in range(4):
        pool.submit(double, value)
    for _ in range(6):
        with pytest.raises(afield.ActorDiedError):
            pool.get_next(timeout=PATIENCE_S)
    assert not pool.has_next()


def test_actor_pool_keeps_an_actor_whose_method_met_a_dead_one() -> None:
    dead = new_actor()
    afield.kill(dead)
    pool = ActorPool([new_actor(), new_actor()])
    for _ in range(2):
        pool.submit(lambda actor, value: actor.ask.remote(value), dead)
        with pytest.raises(afield.ActorDiedError):
            pool.get_next()
    assert [pool.pop_idle() is None for _ in range(3)] == [False, False, True]


def test_actor_pool_wants_a_ref() -> None:
    pool = ActorPool([new_actor()])
    with pytest.raises(TypeError, match="ObjectRef"):
        pool.submit(lambda a, v: v, 1)
    pool.submit(double, 1)
    assert pool.get_next() == 2


# -- Pool ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes(_runtime_of_module: None) -> Iterator[Pool]:
    afield.init(num_cpus=2, devices="emulated:2", ignore_reinit_error=True)
    with Pool(2) as pool:
        yield pool


def test_pool_applies(processes: Pool) -> None:
    assert processes.apply(divmod, (7, 2)) == (3, 1)
    assert processes.apply(int, ("ff",), {"base": 16}) == 255
    assert processes.apply(os.getpid) != os.getpid()


@pytest.mark.parametrize("chunksize", [None, 1, 3, 100])
def test_pool_maps(processes: Pool, chunksize: int | None) -> None:
    assert processes.map(lambda x: x * x, range(20), chunksize) == [x * x for x in range(20)]
    assert processes.starmap(pow, [(2, 3), (3, 2)], chunksize) == [8, 9]
    assert processes.map(abs, [], chunksize) == []


@pytest.mark.parametrize("chunksize", [1, 3])
def test_pool_iterates(processes: Pool, chunksize: int) -> None:
    assert list(processes.imap(abs, range(-20, 0), chunksize)) == list(range(20, 0, -1))
    assert sorted(processes.imap_unordered(abs, range(-20, 0), chunksize)) == list(range(1, 21))


def test_pool_iterates_over_more_than_fits(processes: Pool) -> None:
    taken: list[int] = []

    def endless() -> Iterator[int]:
        for i in itertools.count():
            taken.append(i)
            yield i

    results = processes.imap(abs, endless())
    assert list(itertools.islice(results, 100)) == list(range(100))
    assert len(taken) < 120


@pytest.mark.parametrize("method", ["imap", "imap_unordered"])
@pytest.mark.parametrize("chunksize", [1, 2, 5])
def test_pool_iterators_have_exceptions_as_items(processes: Pool, method: str, chunksize: int) -> None:
    """As Ray's; an item that fails takes none of its chunk with it."""
    results = list(getattr(processes, method)(lambda x: 6 // x, [1, 0, 3, 0, 6], chunksize))
    failed = [each for each in results if isinstance(each, Exception)]
    assert [type(each) for each in failed] == [ZeroDivisionError] * 2
    assert sorted(each for each in results if not isinstance(each, Exception)) == [1, 2, 6]
    if method == "imap":
        assert results[0] == 6
        assert results[1] is failed[0]


class _CannotTravelError(Exception):
    def __init__(self) -> None:
        self.lock = threading.Lock()


def test_pool_iterator_with_an_exception_that_cannot_be_pickled(processes: Pool) -> None:
    def fail(x: int) -> int:
        if x:
            return x
        raise _CannotTravelError

    first, second, third = processes.imap(fail, [1, 0, 2], 3)
    assert (first, third) == (1, 2)
    assert isinstance(second, RuntimeError)
    assert "_CannotTravelError" in str(second)


def test_pool_iterator_whose_process_dies(processes: Pool) -> None:
    """All items of the chunk are the error; the chunks after it are called."""
    results = list(processes.imap(lambda x: os._exit(1) if x == 0 else x, [0, 1, 2, 3], 2))
    assert all(isinstance(each, afield.ActorError) for each in results[:2])
    assert results[2:] == [2, 3]


def test_pool_iterator_times_out(processes: Pool) -> None:
    results = processes.imap(time.sleep, [0.1])
    with pytest.raises(multiprocessing.TimeoutError):
        results.next(timeout=0.01)
    assert list(results) == [None]


def test_async_result(processes: Pool) -> None:
    result = processes.map_async(time.sleep, [0.1, 0.0])
    assert not result.ready()
    with pytest.raises(ValueError, match="not ready"):
        result.successful()
    with pytest.raises(multiprocessing.TimeoutError):
        result.get(timeout=0.01)
    with pytest.raises(TimeoutError):
        result.get(timeout=0)
    result.wait(PATIENCE_S)
    assert result.ready()
    assert result.successful()
    assert result.get() == [None, None]


def test_callbacks_have_run_when_the_result_is_there(processes: Pool) -> None:
    seen: list[Any] = []
    processes.map_async(abs, [-1, -2], callback=seen.append, error_callback=pytest.fail).wait(PATIENCE_S)
    processes.starmap_async(pow, [(2, 2)], callback=seen.append).wait(PATIENCE_S)
    processes.apply_async(abs, (-3,), callback=seen.append).wait(PATIENCE_S)
    assert seen == [[1, 2], [4], 3]
    failed = processes.apply_async(divmod, (1, 0), callback=pytest.fail, error_callback=seen.append)
    failed.wait(PATIENCE_S)
    assert isinstance(seen[-1], ZeroDivisionError)
    assert not failed.successful()
    with pytest.raises(ZeroDivisionError):
        failed.get()


def test_a_callback_may_use_the_pool(processes: Pool) -> None:
    second: list[Any] = []
    called = threading.Event()

    def again(value: int) -> None:
        second.append(processes.apply_async(abs, (-value - 1,)))
        called.set()

    processes.apply_async(abs, (-1,), callback=again)
    assert called.wait(PATIENCE_S)
    assert second[0].get(PATIENCE_S) == 2


def test_pool_initializer_and_several_calls_in_one_process() -> None:
    def start(value: str) -> None:
        os.environ["AFIELD_TEST_POOL"] = value

    with Pool(2, start, ("set",)) as pool:
        assert pool.map(lambda _: os.environ.get("AFIELD_TEST_POOL"), range(6), 1) == ["set"] * 6
        assert len(set(pool.map(lambda _: os.getpid(), range(6), 1))) <= 2


def test_what_a_manager_shares_can_be_used_in_a_pool(processes: Pool) -> None:
    listener = multiprocessing.connection.Listener(authkey=multiprocessing.current_process().authkey)

    def talk(address: Any) -> None:  # as the proxies of a manager do
        with multiprocessing.connection.Client(address, authkey=multiprocessing.current_process().authkey) as there:
            there.send("hello")

    with listener:
        called = processes.apply_async(talk, (listener.address,))
        with listener.accept() as here:
            assert here.recv() == "hello"
        called.get(PATIENCE_S)


def test_pool_initializer_that_fails_fails_the_calls() -> None:
    with Pool(1, divmod, (1, 0)) as pool:
        with pytest.raises((ZeroDivisionError, afield.ActorDiedError), match="ZeroDivisionError"):
            pool.apply_async(abs, (-1,)).get(PATIENCE_S)


def test_pool_replaces_a_process_after_so_many_calls() -> None:
    with Pool(1, maxtasksperchild=2) as pool:
        pids = [pool.apply(os.getpid) for _ in range(6)]
    assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4] == pids[5]


def test_pool_survives_the_death_of_a_process() -> None:
    with Pool(1) as pool:
        with pytest.raises(afield.LossError):
            pool.apply_async(os._exit, (1,)).get(PATIENCE_S)
        assert pool.apply_async(abs, (-1,)).get(PATIENCE_S) == 1


def test_pool_closes_and_joins() -> None:
    pool = Pool(1)
    result = pool.map_async(time.sleep, [0.02] * 3)
    with pytest.raises(ValueError, match="still running"):
        pool.join()
    pool.close()
    with pytest.raises(ValueError, match="not running"):
        pool.apply(abs, (-1,))
    with pytest.raises(ValueError, match="not running"):
        pool.imap(abs, [-1])
    pool.join()
    assert result.successful()
    with pytest.raises(ValueError, match="not running"):
        with pool:
            pass


def test_pool_terminates_at_once() -> None:
    pool = Pool(1)
    result = pool.map_async(time.sleep, [PATIENCE_S] * 3, 1)
    pool.terminate()
    with pytest.raises(concurrent.futures.CancelledError) as caught:
        result.get(PATIENCE_S / 3)
    assert isinstance(caught.value, afield.TaskCancelledError)  # what programs written for Ray catch: a RayError
    pool.join()
    pool.terminate()


def test_pool_has_run_its_initializer_everywhere(tmp_path: Path) -> None:
    with Pool(3, lambda: (tmp_path / str(os.getpid())).touch()):
        assert len(list(tmp_path.iterdir())) == 3


def test_pool_with_the_arguments_that_ray_s_has() -> None:
    with Pool(1, ray_address="auto", ray_remote_args={"num_cpus": 1}) as pool:
        assert pool.apply(lambda: afield.get_runtime_context().get_assigned_resources()) == {"CPU": 1.0}
    with pytest.raises(afield.InvalidOptionError, match="session of its own program"):
        Pool(1, ray_address="somewhere:6379")


def test_actor_pool_with_several_returns() -> None:
    @afield.remote
    class Worker:
        @afield.method(num_returns=2)
        def both(self, x: int) -> tuple[int, int]:
            return x, -x

    pool = ActorPool([Worker.remote(), Worker.remote()])
    assert list(pool.map(lambda actor, x: actor.both.remote(x), range(5))) == [[x, -x] for x in range(5)]
    results = pool.map_unordered(lambda actor, x: actor.both.remote(x), range(5))
    assert sorted(results) == [[x, -x] for x in range(5)]
    with pytest.raises(TypeError, match=r"not \[\]"):
        pool.submit(lambda actor, _: [], None)
    assert pool.has_free()


def test_pool_default_size_is_the_cluster_s() -> None:
    with Pool() as pool:
        assert len(pool._processes) == 2


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Pool(0), ValueError),
        (lambda: Pool(1, maxtasksperchild=0), ValueError),
        (lambda: Pool(1, initializer=cast(Any, "no function")), TypeError),
        (lambda: Pool(1, remote_args={"num_cpu": 1}), afield.InvalidOptionError),
    ],
)
def test_pool_wrong_use(make: Callable[[], object], error: type[Exception]) -> None:
    with pytest.raises(error):
        make()


@pytest.mark.parametrize("name", ["map", "imap", "imap_unordered", "starmap_async"])
def test_pool_wrong_chunksize(processes: Pool, name: str) -> None:
    with pytest.raises(ValueError, match="chunksize"):
        getattr(processes, name)(abs, [1], chunksize=0)


def test_util_has_the_libraries_own_classes() -> None:
    assert Pool is LibraryPool
