"""Calls around the restart of an actor: which wait, which fail, and that none runs twice that may not."""

from __future__ import annotations

import concurrent.futures
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import afield
from afield.util.multiprocessing import Pool
from tests.helpers import poll

pytestmark = pytest.mark.usefixtures("shared_runtime")

PATIENCE_S = 30.0


class Gated:
    """Its second life begins when somebody opens the gate."""

    def __init__(self, gate: Path, log: Path) -> None:
        self.log = log
        if afield.get_runtime_context().was_current_actor_reconstructed:
            gate.read_text()  # a pipe: waits for who writes to it

    def note(self, name: str) -> str:
        with self.log.open("a") as log:
            log.write(f"{name}\n")
        return name

    def pid(self) -> int:
        return os.getpid()

    def crash(self) -> None:
        os._exit(1)


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "gate")
    return tmp_path / "gate"


def get(ref: Any) -> Any:
    return afield.get(ref, timeout=PATIENCE_S)


def outcome(ref: Any) -> Any:
    try:
        return get(ref)
    except afield.AfieldError as error:
        return error


def away(call: Callable[[], Any]) -> afield.ActorUnavailableError | None:
    """Tell whether the caller knows that the actor restarts."""
    error = outcome(call())
    return error if isinstance(error, afield.ActorUnavailableError) and not error.may_have_run else None


@pytest.mark.parametrize("how", ["crash", "kill", "SIGKILL"])
def test_calls_that_are_made_while_it_restarts_have_not_run_and_say_so(gate: Path, tmp_path: Path, how: str) -> None:
    log = tmp_path / "log"
    actor = afield.remote(max_restarts=1)(Gated).remote(gate, log)
    patient = actor.note.options(max_task_retries=1)
    pid = get(actor.pid.remote())
    if how == "crash":
        cut = outcome(actor.crash.remote())
        assert isinstance(cut, afield.ActorUnavailableError) and cut.may_have_run
    elif how == "kill":
        afield.kill(actor, no_restart=False)
    else:
        os.kill(pid, signal.SIGKILL)
    error = poll(lambda: away(actor.pid.remote))
    assert "has not run" in str(error) and "max_task_retries" in str(error)
    waits = patient.remote("patient")
    late = [outcome(actor.note.remote(f"late {i}")) for i in range(3)]
    assert all(isinstance(each, afield.ActorUnavailableError) and not each.may_have_run for each in late)
    gate.write_text("open")
    assert get(waits) == "patient"
    assert get(actor.note.remote("after")) == "after"
    assert log.read_text().split() == ["patient", "after"], "each that succeeded ran once, and no other"


def test_calls_that_wait_for_an_argument_when_it_dies_wait_for_the_restart(gate: Path, tmp_path: Path) -> None:
    @afield.remote
    def read(path: Path) -> str:
        return path.read_text()

    os.mkfifo(tmp_path / "argument")
    actor = afield.remote(max_restarts=1, max_concurrency=2)(Gated).remote(gate, tmp_path / "log")
    pid = get(actor.pid.remote())
    before = actor.note.remote(read.remote(tmp_path / "argument"))
    os.kill(pid, signal.SIGKILL)
    poll(lambda: away(actor.pid.remote))
    (tmp_path / "argument").write_text("before")
    gate.write_text("open")
    assert get(before) == "before"


def test_a_process_that_meets_an_actor_which_restarts_is_told_so(gate: Path, tmp_path: Path) -> None:
    """Also on its first call, before which it has heard nothing of the actor."""

    @afield.remote
    class Other:
        def call(self, handle: Any) -> Any:
            error = outcome(handle[0].note.remote("never"))
            return type(error).__name__, getattr(error, "may_have_run", None)

        def wait(self, handle: Any) -> Any:
            return get(handle[0].note.options(max_task_retries=1).remote("waits"))

    actor = afield.remote(max_restarts=1)(Gated).remote(gate, tmp_path / "log")
    first, second = Other.remote(), Other.remote()
    os.kill(get(actor.pid.remote()), signal.SIGKILL)
    poll(lambda: away(actor.pid.remote))
    assert get(first.call.remote([actor])) == ("ActorUnavailableError", False)
    waits = second.wait.remote([actor])
    gate.write_text("open")
    assert get(waits) == "waits"
    assert get(first.wait.remote([actor])) == "waits"


def test_a_generator_that_is_begun_while_it_restarts_fails_too(gate: Path, tmp_path: Path) -> None:
    class Yields(Gated):
        def items(self, n: int) -> Any:
            yield from range(n)

    actor = afield.remote(max_restarts=1)(Yields).remote(gate, tmp_path / "log")
    os.kill(get(actor.pid.remote()), signal.SIGKILL)
    poll(lambda: away(actor.pid.remote))
    with pytest.raises(afield.ActorUnavailableError, match="has not run"):
        [get(ref) for ref in actor.items.options(num_returns="streaming").remote(2)]
    gate.write_text("open")
    assert [get(ref) for ref in actor.items.options(num_returns="streaming", max_task_retries=1).remote(2)] == [0, 1]


# -- pools of processes -------------------------------------------------------------------------------------------


def _open_gate(marker: Path, gate: Path) -> None:
    if marker.exists():
        gate.read_text()
    marker.touch()


@pytest.fixture
def pool(gate: Path, tmp_path: Path) -> Any:
    """A pool of one process, whose second life begins when somebody opens the gate."""
    with Pool(1, _open_gate, (tmp_path / "began", gate)) as pool:
        yield pool


def test_calls_wait_in_their_pool_for_a_process_that_restarts(pool: Any, gate: Path) -> None:
    """Only what it ran is lost: the queue does not run dry on a process that takes no calls."""
    crashed = pool.apply_async(os._exit, (1,))
    others = [pool.apply_async(abs, (-i,)) for i in range(20)]
    with pytest.raises(afield.ActorUnavailableError) as caught:
        crashed.get(PATIENCE_S)
    assert caught.value.may_have_run
    gate.write_text("open")
    assert [each.get(PATIENCE_S) for each in others] == list(range(20))


def test_a_call_to_a_process_that_has_died_idle_goes_to_its_next_life(pool: Any, gate: Path) -> None:
    os.kill(pool.apply(os.getpid), signal.SIGKILL)
    process = pool._processes[0]._actor
    poll(lambda: away(process.ready.remote))
    waits = [pool.apply_async(abs, (-i,)) for i in range(3)]
    gate.write_text("open")
    assert [each.get(PATIENCE_S) for each in waits] == [0, 1, 2]


def test_a_call_that_waits_for_its_process_can_be_cancelled(pool: Any, gate: Path) -> None:
    os.kill(pool.apply(os.getpid), signal.SIGKILL)
    process = pool._processes[0]._actor
    poll(lambda: away(process.ready.remote))
    result = pool.apply_async(abs, (-1,))
    pool.terminate()
    with pytest.raises(concurrent.futures.CancelledError):
        result.get(PATIENCE_S)
    pool.join()
