"""Futures of values: Ctrl-C in the thread that completes them takes them from nobody."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import pytest

import afield
from afield.runtime.values import futures
from afield.runtime.values.futures import ValueFuture
from afield.runtime.values.parts import WouldBlockError
from afield.transport import pump as pump_module
from afield.transport.interrupts import is_protected
from tests.bytecodes import Bytecodes, place_of
from tests.test_pump import a_pump

FILES = {futures.__file__, pump_module.__file__, concurrent.futures._base.__file__, __file__}
HANG_S = 30.0


class Interrupter(Bytecodes):
    """Raises KeyboardInterrupt at the bytecode with a number, or at the first behind it where one may come."""

    def __init__(self, at: int) -> None:
        super().__init__(FILES)
        self.at = at
        self.raised = ""

    def before(self, frame: FrameType) -> None:
        if self.count >= self.at and not self.raised and not is_protected(frame):
            self.raised = place_of(frame)
            raise KeyboardInterrupt


def test_an_interrupt_at_every_bytecode_of_the_completion() -> None:
    def read() -> int:
        return 42

    def complete(at: int) -> Interrupter:
        future = ValueFuture(read, read)
        pump.callbacks.append(future.complete)
        interrupter = Interrupter(at)
        sys.settrace(interrupter.trace)
        try:
            pump.run_callbacks()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        pump.run_callbacks()  # as whoever drives the loop next
        assert future.result(HANG_S) == 42, interrupter.raised
        return interrupter

    with a_pump() as pump:
        complete(sys.maxsize)  # Python 3.12 traces bytecodes from the second `settrace` on
        at, raised = 1, set()
        while (interrupter := complete(at)).raised:
            raised.add(interrupter.raised.partition(":")[0])
            at += 1
    assert {"read", "_invoke_callbacks"} <= raised and "run_callbacks" not in raised


def test_who_waits_for_a_value_that_no_thread_can_fetch_hears_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def read() -> int:
        raise WouldBlockError

    future = ValueFuture(read, read)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    future.complete()
    with pytest.raises(RuntimeError, match="can't start new thread"):
        future.result(0)


def test_ctrl_c_reaches_a_done_callback_that_blocks(runtime: Any) -> None:
    @afield.remote
    def one() -> int:
        return 1

    entered, raised = threading.Event(), threading.Event()

    def block(done: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            entered.set()
            threading.Event().wait(HANG_S)

    def interrupt() -> None:
        assert entered.wait(HANG_S)
        while not raised.wait(0.5):  # one that comes just before the wait's system call does not cut that short
            os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=interrupt)
    sender.start()
    try:
        while not entered.is_set():  # until it is this thread that completes one
            ref = one.remote()
            ref.future().add_done_callback(block)
            afield.get(ref)
    except KeyboardInterrupt:
        raised.set()
    sender.join(HANG_S)
    assert raised.is_set()
