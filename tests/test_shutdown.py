"""`shutdown` beside everything that may be waiting or blocked then, and what comes after it."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from typing import Any

import pytest

import afield
from afield.runtime.calls import participation
from afield.runtime.calls.participant import Participant
from afield.runtime.face import lifecycle
from afield.runtime.wire import messages
from tests.helpers import MeetingLock, poll


@afield.remote
def for_ever() -> None:
    """Never return."""
    time.sleep(10_000)


@afield.remote
def one() -> int:
    """Return 1."""
    return 1


def test_futures_of_what_was_not_ready_fail(runtime: Any) -> None:
    future = for_ever.remote().future()
    afield.shutdown()
    with pytest.raises(afield.RuntimeDiedError, match="shut down"):
        future.result(timeout=30)


def test_whoever_awaits_or_gets_in_another_thread_hears_of_it(runtime: Any) -> None:
    heard: list[BaseException] = []

    def get(ref: Any) -> None:
        try:
            afield.get(ref)
        except BaseException as error:
            heard.append(error)

    async def main() -> BaseException | None:
        ref = for_ever.remote()
        thread = threading.Thread(target=get, args=(ref,))
        thread.start()
        waiting = asyncio.ensure_future(ref)
        await asyncio.sleep(0)
        await asyncio.to_thread(afield.shutdown)
        done, _ = await asyncio.wait([waiting], timeout=30)
        thread.join(30)
        return done.pop().exception()

    heard.append(asyncio.run(main()) or AssertionError("there was a value"))
    assert [type(error) for error in heard] == [afield.RuntimeDiedError] * 2


def test_a_thread_can_shut_down_and_the_next_runtime_is_whole(no_runtime: None) -> None:
    for _ in range(2):
        afield.init(num_cpus=1)
        assert afield.get(one.remote()) == 1
        thread = threading.Thread(target=afield.shutdown)
        thread.start()
        thread.join(30)
        assert not thread.is_alive() and not afield.is_initialized()
    with afield.init(num_cpus=1):
        # The handler that defers interrupts out of transitions is this runtime's, and goes with it.
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_next_runtime_may_start_while_the_last_one_ends(
    no_runtime: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    @afield.remote
    def say() -> None:
        print("it is heard")

    afield.init(num_cpus=1)
    close = Participant.close

    def close_meanwhile(participant: Participant) -> None:
        monkeypatch.setattr(Participant, "close", close)
        afield.init(num_cpus=1)  # as another thread may
        close(participant)

    monkeypatch.setattr(Participant, "close", close_meanwhile)
    afield.shutdown()
    assert afield.is_initialized()
    afield.get(say.remote())
    assert participation.participant is not None
    assert signal.getsignal(signal.SIGINT) == participation.participant.process.pump.on_sigint
    afield.shutdown()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "it is heard" in capfd.readouterr().out


def test_a_thread_that_sends_while_the_runtime_is_closed_is_not_cut_off(
    runtime: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert afield.get(one.remote()) == 1
    assert participation.participant is not None
    process = participation.participant.process
    sending, go = threading.Event(), threading.Event()
    raised: list[BaseException] = []
    encode, close_pump, close_channels = process.daemon._encode, process.pump.close, process.channels.close

    def encode_slowly(batch: Any) -> bytes:
        if threading.current_thread() is thread:
            sending.set()
            assert go.wait(5)
        return encode(batch)

    def send() -> None:
        try:
            process.locked(process.daemon.send, messages.Printed(0))
        except BaseException as error:
            raised.append(error)

    def begin_to_send() -> None:
        close_pump()
        thread.start()
        assert sending.wait(5)
        process.pump.lock = MeetingLock(process.pump.lock, go)  # type: ignore[assignment]

    def cut() -> None:
        close_channels()
        go.set()
        thread.join(30)

    thread = threading.Thread(target=send)
    process.daemon._encode = encode_slowly  # type: ignore[assignment]
    monkeypatch.setattr(process.pump, "close", begin_to_send)
    monkeypatch.setattr(process.channels, "close", cut)
    monkeypatch.setattr(lifecycle, "END_WITHIN_S", 0.0)
    monkeypatch.setattr(
        messages, "Shutdown", lambda: messages.Printed(0)
    )  # so the daemon is there when the driver lets go
    afield.shutdown()
    thread.join(30)
    assert sending.is_set() and raised == []


def test_a_callback_that_blocks_does_not_hold_up_the_end(runtime: Any) -> None:
    blocked, release = threading.Event(), threading.Event()

    def block(future: Any) -> None:
        blocked.set()
        release.wait()

    try:
        future = one.remote().future()
        future.add_done_callback(block)
        assert poll(blocked.is_set)
        ending = threading.Thread(target=afield.shutdown)
        ending.start()
        ending.join(30)
        assert not ending.is_alive()
    finally:
        release.set()


def test_a_first_use_after_the_end_starts_again_but_not_for_what_went_with_it(runtime: Any) -> None:
    old = one.remote()
    assert afield.get(old) == 1
    afield.shutdown()
    for use in (lambda: afield.get(old), lambda: afield.wait([old]), old.future):
        with pytest.raises(afield.NotInitializedError, match="shut down"):
            use()
    assert not afield.is_initialized()
    assert afield.get(one.remote()) == 1
    assert afield.is_initialized()
    with pytest.raises(afield.ObjectLostError, match="shut down"):
        afield.get(old)
    afield.shutdown()
