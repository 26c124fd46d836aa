"""Failures: use before `init` and after `shutdown`, refs of an earlier runtime, and workers that die."""

from __future__ import annotations

import os
import pickle
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import afield
from afield.errors import DeviceLostError
from afield.runtime.calls import participation
from tests.helpers import HANG_S, poll, program, remote_with

PATIENCE_S = 30.0


# -- the life of the runtime --------------------------------------------------------------------------------------


def test_init_twice(runtime: afield.ClusterInfo) -> None:
    with pytest.raises(afield.AlreadyInitializedError, match=r"shutdown\(\).*ignore_reinit_error=True"):
        afield.init()
    assert afield.get(afield.put(1)) == 1


def test_use_after_shutdown(no_runtime: None) -> None:
    class Local:
        def work(self) -> None:
            pass

    afield.init(num_cpus=1)
    function: Any = afield.remote(lambda: 1)
    ref, pending, actor = afield.put(1), function.remote(), afield.remote(Local).remote()
    afield.get(actor.work.remote())
    afield.shutdown()
    uses: list[Callable[[], Any]] = [
        lambda: afield.get(ref),
        lambda: afield.get(pending, timeout=1),
        lambda: afield.wait([ref]),
        lambda: actor.work.remote(),
        lambda: afield.kill(actor),
        lambda: afield.cluster_resources(),
        lambda: afield.stats(),
        lambda: pickle.dumps(ref),
    ]
    for use in uses:
        with pytest.raises(afield.NotInitializedError, match=r"init|shut ?down"):
            use()
    assert not afield.is_initialized()


def test_refs_and_actors_of_a_runtime_that_was_shut_down(no_runtime: None) -> None:
    class Local:
        def work(self) -> None:
            pass

    afield.init(num_cpus=1)
    ref, actor = afield.put(1), afield.remote(Local).remote()
    afield.shutdown()
    afield.init(num_cpus=1)
    take = afield.remote(lambda x: x)
    uses: list[Callable[[], Any]] = [lambda: afield.get(ref), lambda: afield.get(take.remote(ref), timeout=PATIENCE_S)]
    for use in uses:
        with pytest.raises(afield.ObjectLostError, match="shut down"):
            use()
    with pytest.raises(afield.AfieldError, match="shut down"):
        afield.get(take.remote([ref]), timeout=PATIENCE_S)
    with pytest.raises(afield.ActorDiedError):
        afield.get(actor.work.remote(), timeout=PATIENCE_S)
    assert afield.wait([ref], timeout=1) == ([ref], [])  # ready: `get` has nothing to wait for
    assert afield.get(take.remote(2), timeout=PATIENCE_S) == 2


def test_init_inside_a_task(shared_runtime: None) -> None:
    with pytest.raises(afield.AlreadyInitializedError):
        afield.get(afield.remote(lambda: afield.init().session).remote(), timeout=PATIENCE_S)


# -- processes that die -------------------------------------------------------------------------------------------


def test_a_task_whose_worker_dies_is_tried_again(runtime: afield.ClusterInfo, tmp_path: Path) -> None:
    @remote_with(max_retries=2)
    def die(path: Path, times: int) -> int:
        with open(path, "a") as file:
            file.write("x")
        if path.stat().st_size <= times:
            os._exit(3)
        return path.stat().st_size

    assert afield.get(die.remote(tmp_path / "a", 2), timeout=HANG_S) == 3
    assert afield.stats()["tasks_retried"] == 2
    with pytest.raises(afield.WorkerCrashedError, match=r"exited with status 3.*max_retries"):
        afield.get(die.remote(tmp_path / "b", 5), timeout=HANG_S)
    assert (tmp_path / "b").stat().st_size == 3


def test_without_retries_nothing_runs_twice_and_the_innocent_are_spared(runtime: Any, tmp_path: Path) -> None:
    """A worker has several tasks in its queue; only the one that killed it may pay."""

    @remote_with(max_retries=0)
    def run(i: int) -> int:
        with open(tmp_path / str(i), "a") as file:
            file.write("x")
        if i == 300:
            os._exit(1)
        return i

    for _ in range(3):
        refs = [run.remote(i) for i in range(400)]
        ready, _ = afield.wait(refs, num_returns=400, timeout=HANG_S)
        assert len(ready) == 400
        failed = []
        for i, ref in enumerate(refs):
            try:
                assert afield.get(ref) == i
            except afield.WorkerCrashedError:
                failed.append(i)
        assert failed == [300]
        assert {int(path.name): path.stat().st_size for path in tmp_path.iterdir()} == dict.fromkeys(range(400), 1)
        for path in tmp_path.iterdir():
            path.unlink()


def test_with_retries_too_it_is_found_who_ends_workers(runtime: afield.ClusterInfo, tmp_path: Path) -> None:
    """The death of a worker may be laid to a call whose answer was held back, once; the next one tells who it was."""
    folder = str(tmp_path)

    @remote_with(max_retries=1)
    def run(name: str | None = None) -> int:
        if name is not None:
            log = os.open(f"{folder}/{name}", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.write(log, b"x")
            os.kill(os.getpid(), 9)
        return 1

    afield.get(run.remote(), timeout=HANG_S)
    for name in "abcd":
        innocent = [run.remote() for _ in range(200)]
        guilty = run.remote(name)
        innocent += [run.remote() for _ in range(20)]
        with pytest.raises(afield.WorkerCrashedError):
            afield.get(guilty, timeout=HANG_S)
        assert afield.get(innocent, timeout=HANG_S) == [1] * 220
    assert all((tmp_path / name).stat().st_size in (2, 3) for name in "abcd")


@pytest.mark.parametrize("how", ["os._exit(0)", "os.kill(os.getpid(), 9)", "os.abort()"])
def test_without_retries_a_dead_worker_is_an_error(runtime: afield.ClusterInfo, how: str) -> None:
    @remote_with(max_retries=0)
    def die() -> None:
        exec(f"import os, resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); {how}")

    with pytest.raises(afield.WorkerCrashedError) as caught:
        afield.get(die.remote(), timeout=HANG_S)
    assert "die" in str(caught.value)
    expected = {"os._exit(0)": "status 0", "os.kill(os.getpid(), 9)": "SIGKILL", "os.abort()": "SIGABRT"}[how]
    assert expected in str(caught.value)
    assert afield.get(afield.remote(lambda: 1).remote(), timeout=HANG_S) == 1


def test_an_actor_whose_process_dies(runtime: afield.ClusterInfo) -> None:
    class Local:
        def die(self) -> None:
            os._exit(7)

        def work(self) -> None:
            pass

    actor = afield.remote(Local).remote()
    assert afield.get(actor.work.remote(), timeout=PATIENCE_S) is None
    refs = [actor.die.remote(), actor.work.remote()]
    for ref in [*refs, actor.work.remote()]:
        with pytest.raises(afield.ActorDiedError, match=r"Local.*exited with status 7"):
            afield.get(ref, timeout=PATIENCE_S)


def test_what_a_dead_process_owned_is_lost_and_says_so(runtime: afield.ClusterInfo) -> None:
    class Local:
        def make(self) -> list[Any]:
            return [afield.put("small"), afield.put(b"x" * 500_000), afield.remote(lambda: time.sleep(60)).remote()]

    actor = afield.remote(Local).remote()
    refs = afield.get(actor.make.remote(), timeout=PATIENCE_S)
    afield.kill(actor)
    try:  # a small value that was fetched before the end was known stays readable
        assert afield.get(refs[0], timeout=PATIENCE_S) == "small"
    except afield.OwnerDiedError:
        pass
    for ref in refs[1:]:

        def lost(ref: Any = ref) -> bool:
            try:
                afield.get(ref, timeout=PATIENCE_S)
            except afield.OwnerDiedError as error:
                return "process that owned the object is gone" in str(error)
            return False

        assert poll(lost, PATIENCE_S)


def test_an_uncaught_error_shows_the_remote_traceback() -> None:
    source = """
    afield.init(num_cpus=1)

    @afield.remote
    def divide(x):
        return 1 // x

    afield.get(divide.remote(0))
    """
    with program(source) as driver:
        status, _, error = driver.end()
    assert status == 1
    error = re.sub("^    .*\\n", "", error, flags=re.M)  # source lines, which Python 3.13 has for -c as well
    story = [
        ", in divide\nZeroDivisionError: ",
        "direct cause",
        ", in <module>\n",
        "TaskError(ZeroDivisionError): divide() raised",
    ]
    places = [error.find(part) for part in story]
    assert -1 not in places and places == sorted(places)
    assert [error.count(part) for part in story] == [1] * len(story) and "afield/" not in error


@pytest.mark.parametrize("is_async", [False, True])
def test_a_device_that_fails_after_the_task_has_raised_ends_the_worker(runtime: Any, is_async: bool) -> None:
    """What user code began there ends badly only while the failed call is tidied up: the caller must hear of it."""

    def fail(array: Any) -> None:
        found = participation.participant

        def synchronize() -> None:
            raise DeviceLostError("its device went away at the worst moment")

        assert callable(found.values.parts.devices.synchronize)  # type: ignore[union-attr]
        found.values.parts.devices.synchronize = synchronize  # type: ignore[union-attr]
        raise ValueError(array.sum())

    class _Plain:
        def fail(self, array: Any) -> None:
            fail(array)

    class _Async:
        async def fail(self, array: Any) -> None:
            fail(array)

    actor = afield.remote(_Async if is_async else _Plain).remote()
    with pytest.raises(afield.ActorDiedError, match="at the worst moment"):
        afield.get(actor.fail.remote(afield.put(np.ones(1 << 17))), timeout=30)
