"""The loop, and the pump that drives it for the threads of a process."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from afield.transport.interrupts import uninterruptible
from afield.transport.loop import Loop
from afield.transport.pump import Pump, Waiter
from tests.helpers import poll
from tests.test_transport import a_loop


def test_a_kick_wakes_the_loop_and_is_absorbed() -> None:
    with a_loop() as loop:
        threading.Timer(0.05, loop.kick).start()
        started = time.monotonic()
        loop.step(20)
        assert time.monotonic() - started < 10
        loop.kick()
        loop.kick()
        loop.step(20)
        assert loop.wait(0) == []


@contextlib.contextmanager
def a_pump(after: Any = lambda: None, due: Any = lambda: None) -> Iterator[Pump]:
    """A pump that runs."""
    loop = Loop()
    pump = Pump(loop, after, due)
    pump.start()
    try:
        yield pump
    finally:
        pump.close()
        loop.close()


def reader(fd: int, waiter: Waiter) -> Callable[[int], None]:
    """Return a handler that reads a byte and lets the waiter go."""

    def handle(events: int) -> None:
        os.read(fd, 1)
        waiter.finish()

    return handle


def test_many_threads_wait_and_each_is_woken_by_its_own_event() -> None:
    with a_pump() as pump:
        waiters = [Waiter() for _ in range(12)]
        pipes = [os.pipe() for _ in waiters]
        for waiter, (read, _) in zip(waiters, pipes, strict=True):
            pump.loop.register(read, reader(read, waiter))
        results: list[bool] = []
        threads = [threading.Thread(target=lambda w=w: results.append(pump.wait_for(w, 20))) for w in waiters]
        for thread in threads:
            thread.start()
        for _, write in reversed(pipes):
            os.write(write, b"x")
        for thread in threads:
            thread.join(20)
        assert results == [True] * 12
        for read, write in pipes:
            pump.loop.unregister(read)
            os.close(read)
            os.close(write)


def test_waiting_ends_in_time_without_an_event() -> None:
    with a_pump() as pump:
        started = time.monotonic()
        assert not pump.wait_for(Waiter(), 0.05)
        assert not pump.wait_for(Waiter(), 0)
        assert 0.05 <= time.monotonic() - started < 5
        done = Waiter()
        done.finish()
        assert pump.wait_for(done)


@pytest.mark.parametrize("timeout_s", [1e9, float("inf")])
def test_a_wait_may_have_more_time_than_epoll_counts(timeout_s: float) -> None:
    with a_pump() as pump:
        waiter = Waiter()
        threading.Timer(0.05, waiter.finish).start()
        assert pump.wait_for(waiter, timeout_s)


def test_events_are_handled_while_no_thread_waits() -> None:
    with a_pump() as pump:
        read, write = os.pipe()
        seen: list[bytes] = []
        pump.loop.register(read, lambda events: seen.append(os.read(read, 1)))
        for byte in (b"a", b"b"):
            os.write(write, byte)
            assert poll(lambda: seen and seen[-1] == byte, 5)  # noqa: B023 - called at once
        pump.loop.unregister(read)
        os.close(read)
        os.close(write)


def test_closing_wakes_who_waits() -> None:
    with a_pump() as pump:
        results: list[bool] = []
        threads = [threading.Thread(target=lambda: results.append(pump.wait_for(Waiter()))) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join(10)
    assert results == [False] * 3


def test_ctrl_c_inside_a_transition_comes_after_it() -> None:
    import signal

    reached: list[str] = []

    @uninterruptible
    def transition() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass  # the interpreter would raise at one of these
        reached.append("its end")

    with a_pump() as pump:
        restore = pump.install_sigint()
        try:
            with pytest.raises(KeyboardInterrupt):
                transition()
                pump.deliver()
            assert reached == ["its end"] and not pump.interrupted
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
        finally:
            restore()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_inside_a_transition_comes_also_without_a_thread_to_remind_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import _thread
    import signal

    def refuse(function: Any, arguments: Any) -> None:
        raise RuntimeError("can't start new thread")

    @uninterruptible
    def transition() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass

    with a_pump() as pump:
        restore = pump.install_sigint()
        try:
            with monkeypatch.context() as patch:
                patch.setattr(_thread, "start_new_thread", refuse)
                transition()
            with pytest.raises(KeyboardInterrupt):
                pump.wait_for(Waiter(), 20)
        finally:
            restore()


def test_ctrl_c_ends_a_wait_inside_a_transition() -> None:
    import signal

    @uninterruptible
    def transition(pump: Pump) -> None:
        pump.wait_for(Waiter(), 30)

    with a_pump() as pump:
        restore = pump.install_sigint()
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
        started = time.monotonic()
        try:
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                transition(pump)
        finally:
            restore()
        timer.join()
        assert time.monotonic() - started < 10


def test_a_handler_of_the_program_s_own_is_left_alone() -> None:
    import signal

    def mine(number: int, frame: Any) -> None:
        pass

    before = signal.signal(signal.SIGINT, mine)
    try:
        with a_pump() as pump:
            restore = pump.install_sigint()
            assert signal.getsignal(signal.SIGINT) is mine
            restore()
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_kick_that_meets_the_absorption_of_another_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    with a_loop() as loop:
        read = os.eventfd_read

        def read_and_be_met(fd: int) -> int:
            monkeypatch.setattr(os, "eventfd_read", read)
            loop.kick()  # as another thread may, since reading lets it run
            return read(fd)

        monkeypatch.setattr(os, "eventfd_read", read_and_be_met)
        loop.kick()
        loop.step(20)
        loop.kick()
        assert loop.wait(0), "the loop cannot be woken any more"


def test_a_waiter_that_another_thread_finishes_wakes_the_thread_that_leads() -> None:
    with a_pump() as pump:
        waiter = Waiter()

        def finish() -> None:
            assert poll(lambda: waiter.leads is not None)
            with pump.lock:
                waiter.finish()

        thread = threading.Thread(target=finish)
        thread.start()
        assert pump.wait_for(waiter, 60)
        thread.join()


def test_what_is_left_while_the_standby_thread_falls_asleep_is_not_left_for_ever() -> None:
    left: list[str] = []
    waiter = Waiter()

    def after() -> None:
        if left:
            left.clear()
            waiter.finish()

    class Met(Pump):
        """Another thread leaves something for the loop just before the standby thread says that it sleeps."""

        _sleeps = met = False

        @property
        def standby_sleeps(self) -> bool:
            return self._sleeps

        @standby_sleeps.setter
        def standby_sleeps(self, value: bool) -> None:
            if value and not self.met:
                self.met = True
                left.append("a dropped object")
                self.wake_standby()
            self._sleeps = value

    loop = Loop()
    pump = Met(loop, after, lambda: 0 if left else None)  # type: ignore[arg-type]
    pump.start()
    thread = threading.Thread(target=pump.wait_for, args=(waiter,))
    thread.start()
    thread.join(10)
    assert waiter.done, "nobody looked at it"
    pump.close()
    thread.join(20)
    loop.close()
