"""An async actor's event loop without a session around it: what arrives while it begins."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

from afield.runtime.worker.event_loop import CallLoop
from tests.helpers import MeetingLock

HANG_S = 30.0


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


def test_a_call_that_arrives_while_the_event_loop_begins_is_run() -> None:
    begin, begun = threading.Event(), threading.Event()
    lock = MeetingLock(threading.RLock(), begun)
    started: list[Any] = []

    def locked(action: Callable[[], Any]) -> Any:
        with lock:
            return action()

    def start(call: Any) -> bool:
        started.append(call)
        return False

    host: Any = SimpleNamespace(process=SimpleNamespace(locked=locked), start=start, work=SimpleNamespace(left=False))
    call: Any = Call()

    def receive() -> None:
        with lock:  # as whoever handles messages
            loop.start(call)

    async def serve() -> None:
        loop.open()
        with suppress(TimeoutError):  # of a call that is lost
            await asyncio.wait_for(loop.drain(), 5)

    loop = CallLoop(host, 1)
    loop._early = MeetingList(begin, begun)
    receiver = threading.Thread(target=receive)
    receiver.start()
    assert begin.wait(HANG_S)
    asyncio.run(serve())
    receiver.join(HANG_S)
    assert started == [call]
