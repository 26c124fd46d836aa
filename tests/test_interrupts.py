"""Interrupts and re-entrant use: what may come in the midst of the runtime's own code, from outside and from user code."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import numpy as np
import pytest

import afield
from afield.runtime.calls import participation
from afield.transport.interrupts import interruptible, is_protected, uninterruptible
from tests.helpers import poll


@afield.remote(num_cpus=0.5)
def same(value: Any) -> Any:
    """Return the argument."""
    return value


@afield.remote
class Sleeper:
    """Takes its time."""

    def sleep(self, seconds: float) -> str:
        time.sleep(seconds)
        return "slept"


@pytest.fixture
def on_alarm() -> Iterator[Any]:
    """Return what sets a handler of SIGALRM and the time until it comes."""
    before = signal.getsignal(signal.SIGALRM)

    def set_alarm(handler: Any, seconds: float) -> None:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    yield set_alarm
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


# -- where an interrupt may come -----------------------------------------------------------------------------------


def _protected_in(source: str, name: str) -> bool:
    """Tell whether an interrupt has to wait in a function of `source`, as if that were the file `name`."""
    seen: list[bool] = []

    def look() -> None:
        frame: FrameType | None = sys._getframe(1)
        seen.append(is_protected(frame))

    space: dict[str, Any] = {"look": look, "interruptible": interruptible, "uninterruptible": uninterruptible}
    exec(compile(source, name, "exec"), space)
    space["run"]()
    return seen[0]


def test_where_an_interrupt_may_come() -> None:
    ours = os.path.join(os.path.dirname(afield.__file__), "runtime", "anything.py")
    assert is_protected(None)
    assert not is_protected(sys._getframe())
    assert not _protected_in("def run(): look()", "/a/users/file.py")
    assert _protected_in("def run(): look()", ours)
    assert not _protected_in("@interruptible\ndef run(): look()", ours)
    assert _protected_in("@interruptible\ndef inner(): look()\n@uninterruptible\ndef run(): inner()", ours)
    assert _protected_in("def inner(): look()\n@interruptible\ndef run(): inner()", ours)
    numpys = os.path.join(os.path.dirname(afield.__file__), "gpu_store", "emulated_arrays", "array.py")
    assert not _protected_in("def run(): look()", numpys)


@pytest.mark.parametrize(("interrupts", "seed"), [(300, 1), pytest.param(3000, 2, marks=pytest.mark.slow)])
def test_interrupts_by_another_process_leave_the_session_whole(interrupts: int, seed: int) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.interrupt_storm", "--interrupts", str(interrupts), "--seed", str(seed)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"'interrupts': {interrupts}" in result.stdout


# -- user code that runs inside of ours ----------------------------------------------------------------------------


def test_a_signal_handler_may_wait_while_its_thread_waits(runtime: Any, on_alarm: Any) -> None:
    answers: list[Any] = []
    sleeper = Sleeper.remote()
    assert afield.get(sleeper.sleep.remote(0)) == "slept"
    on_alarm(lambda number, frame: answers.append(afield.get(same.remote(afield.put("inner")))), 0.3)
    assert afield.get(sleeper.sleep.remote(1), timeout=60) == "slept"
    assert answers == ["inner"]


def test_what_the_outer_wait_waits_for_may_come_during_the_inner_one(runtime: Any, on_alarm: Any) -> None:
    answers: list[Any] = []
    one, other = Sleeper.remote(), Sleeper.remote()
    afield.get([one.sleep.remote(0), other.sleep.remote(0)])
    on_alarm(lambda number, frame: answers.append(afield.get(other.sleep.remote(1.5))), 0.2)
    assert afield.get(one.sleep.remote(0.7), timeout=60) == "slept"
    assert answers == ["slept"]


def test_use_in_the_midst_of_a_transition_raises_at_once(runtime: Any) -> None:
    ref = same.remote(1)
    process = participation.require("").process
    uses = [lambda: same.remote(2), lambda: afield.put(1), lambda: afield.wait([ref]), Sleeper.remote]

    def inside() -> list[type[BaseException]]:
        raised: list[type[BaseException]] = []
        for use in uses:
            try:
                use()
            except afield.errors.ReentrantUseError as error:
                raised.append(type(error))
        return raised

    assert process.locked(inside) == [afield.errors.ReentrantUseError] * len(uses)
    assert afield.get(ref) == 1
    assert afield.get(same.remote(3)) == 3


def test_kill_and_cancel_in_the_midst_of_a_transition_are_done_after_it(runtime: Any) -> None:
    actor, busy = Sleeper.remote(), same.remote(1)
    pending = actor.sleep.remote(1000)
    afield.get(busy)
    participation.require("").process.locked(afield.kill, actor)
    with pytest.raises(afield.ActorDiedError):
        afield.get(pending, timeout=60)


def test_finalisers_that_the_collector_calls_anywhere(runtime: Any) -> None:
    """Whatever the moment, a finaliser either does its work or raises at once; the rest goes on as if it were not there."""
    outcomes: list[str] = []

    class Cycle:
        def __init__(self) -> None:
            self.self = self

        def __del__(self) -> None:
            try:
                outcomes.append(f"got {afield.get(same.remote(7), timeout=60)}")
            except afield.errors.ReentrantUseError:
                outcomes.append("refused")

    before = gc.get_threshold()
    gc.set_threshold(7)
    try:
        for number in range(300):
            Cycle()
            assert afield.get([same.remote(number), afield.put(number)]) == [number] * 2
    finally:
        gc.set_threshold(*before)
    assert set(outcomes) <= {"got 7", "refused"} and "got 7" in outcomes


# -- what is dropped while nobody looks ----------------------------------------------------------------------------


def test_what_another_thread_drops_while_one_waits_for_an_actor_is_freed(runtime: Any) -> None:
    sleeper = Sleeper.remote()
    afield.get(sleeper.sleep.remote(0))
    refs = [afield.put(np.zeros(1 << 20, "u1")) for _ in range(8)]

    def wait() -> None:
        with pytest.raises(afield.ActorDiedError):
            afield.get(sleeper.sleep.remote(1000))

    waiting = threading.Thread(target=wait)
    waiting.start()
    process = participation.require("").process
    assert poll(lambda: process.pump.standby_sleeps)
    refs.clear()
    assert poll(lambda: not process.dropped)
    afield.kill(sleeper)
    waiting.join(60)


def test_ctrl_c_ends_a_copy_that_a_task_has_forked_and_not_the_task(runtime: Any) -> None:
    @afield.remote
    def fork() -> int:
        here, there = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                os.write(there, b"x")
                time.sleep(30)
                os._exit(1)
            except KeyboardInterrupt:
                os._exit(7)
        os.read(here, 1)
        os.kill(pid, signal.SIGINT)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert afield.get(fork.remote(), timeout=60) == 7
