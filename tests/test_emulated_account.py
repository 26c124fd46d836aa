"""The account of an emulated device's memory, used again by what interrupts it on the same thread."""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

from afield.gpu_store.emulated_arrays import account as module
from afield.gpu_store.emulated_arrays.account import Account, Lease

UNIT_BYTES = 512


def test_a_handler_that_computes_may_interrupt_the_account_anywhere() -> None:
    account = Account("the account", 1000 * UNIT_BYTES)
    taken: list[Lease] = []
    at = count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line":
            count += 1
            if count == at:
                sys.settrace(None)
                taken.append(account.take(UNIT_BYTES))  # as a signal handler, or __del__ called by the collector
        return trace

    def take() -> None:
        nonlocal at, count
        while count >= at:
            at, count = at + 1, 0
            taken.append(account.take(UNIT_BYTES))
            taken.pop()  # so that there is something to drain
            sys.settrace(trace)
            try:
                taken.append(account.take(UNIT_BYTES))
            finally:
                sys.settrace(None)
        assert at > 5

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it waits for itself"
    assert account.used_bytes == len(taken) * UNIT_BYTES
    taken.clear()
    assert account.used_bytes == 0
