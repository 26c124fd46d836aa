"""An async actor's event loop without a session around it: what arrives while it begins."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from afield.runtime.worker.event_loop import EventLoop

HANG_S = 30.0


class MeetingLock:
    """The pump's lock, which says when the event loop's thread comes for it."""

    def __init__(self, came: threading.Event) -> None:
        self._lock = threading.RLock()
        self._came = came

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._came.set()
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()


class MeetingList(list[Any]):
    """The early calls: one that arrives is appended when the event loop has begun, as far as it can."""

    def __init__(self, begin: threading.Event, begun: threading.Event) -> None:
        super().__init__()
        self._begin, self._begun = begin, begun

    def append(self, call: Any) -> None:
        """Let the event loop begin first."""
        self._begin.set()
        assert self._begun.wait(HANG_S)
        super().append(call)

    def __iter__(self) -> Iterator[Any]:
        self._begun.set()
        return super().__iter__()


class Call:
    """A push, as far as the event loop needs it."""

    callee = SimpleNamespace(group="")


def test_a_call_that_arrives_while_the_event_loop_begins_is_run() -> None:
    begin, begun = threading.Event(), threading.Event()
    lock = MeetingLock(begun)
    descriptor = os.eventfd(0)
    started: list[Any] = []

    def start(call: Any) -> bool:
        started.append(call)
        loop.end()
        return False

    process = SimpleNamespace(
        pump=SimpleNamespace(lock=lock, driven_elsewhere=contextlib.nullcontext),
        loop=SimpleNamespace(fileno=lambda: descriptor),
        locked=lambda action: action(),
    )
    host: Any = SimpleNamespace(
        process=process,
        start=start,
        work=SimpleNamespace(left=False, leave=lambda: None),
        replies=SimpleNamespace(flush=lambda: None),
    )
    loop = EventLoop(host, 1, {})
    loop._early = MeetingList(begin, begun)
    call: Any = Call()

    def receive() -> None:
        with lock:  # as whoever handles messages
            loop.start(call)

    receiver = threading.Thread(target=receive)
    receiver.start()
    assert begin.wait(HANG_S)
    guard = threading.Timer(5.0, loop.end)  # else the test would hang where the call is lost
    guard.start()
    loop.serve()
    guard.cancel()
    receiver.join(HANG_S)
    os.close(descriptor)
    assert started == [call]
