"""`ObjectRefGenerator`: what a call of a streaming task returns, for its consumer; see `streams`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

from afield.errors import GetTimeoutError, NotInitializedError, RuntimeDiedError
from afield.ids import STREAM_END_INDEX, STREAM_INDEX
from afield.runtime.calls.streams import END, Streams
from afield.runtime.process import current
from afield.runtime.process.refs import ObjectRef
from afield.tracebacks import trim
from afield.transport.pump import Waiter


class ObjectRefGenerator:
    """Iterates over the refs of a streaming task's items as they are made; also with `async for`.

    It belongs to the process that called the task and cannot be passed on; the refs can.
    """

    def __init__(self, task_id: bytes, streams: Streams) -> None:
        self._task_id = task_id
        self._of = streams
        self._life = ObjectRef(task_id + STREAM_INDEX)
        self._end = ObjectRef(task_id + STREAM_END_INDEX)

    @property
    def id(self) -> bytes:
        """Return what names the generator among refs, for `wait`."""
        return self._life.id

    def completed(self) -> ObjectRef:
        """Return a ref that is ready when the task has ended: None, or its error."""
        return self._end

    def _streams(self) -> Streams:
        if current.process is not self._of.process:
            raise NotInitializedError("the generator belongs to a runtime that was shut down")
        return self._of

    def __iter__(self) -> ObjectRefGenerator:
        return self

    def __next__(self) -> ObjectRef:
        try:
            return self._next(None)
        except BaseException as error:
            trim(error)
            raise

    def _next(self, timeout_s: float | None) -> ObjectRef:
        streams = self._streams()
        process = streams.process
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            waiter = Waiter()
            taken = process.locked(streams.take, self._task_id, waiter.finish)
            if taken is END:
                raise StopIteration
            if taken is not None:
                return taken
            try:
                if not streams.blocking_wait(waiter, deadline):
                    if process.dead:
                        raise RuntimeDiedError(process.dead)
                    raise GetTimeoutError("the next item was not ready in time")
            finally:
                if not waiter.done:
                    process.locked(streams.stop_waiting, self._task_id, waiter.finish)

    def next_ready(self) -> bool:
        """Tell whether `next` would return (or raise StopIteration) without waiting."""
        stream = self._streams().get(self._task_id)
        return stream is None or stream.next_is_known()

    def is_finished(self) -> bool:
        """Tell whether `next` would raise StopIteration: the task has ended, and all its items were taken."""
        stream = self._streams().get(self._task_id)
        return stream is None or (stream.total is not None and stream.consumed >= stream.produced)

    def when_ready(self, notify: Callable[[], None]) -> bool:
        """Call `notify` once the next item is there; return True (and do not call) if it is there. For `wait`."""
        stream = self._streams().get(self._task_id)
        if stream is None or stream.next_is_known():
            return True
        stream.waiters.append(notify)
        return False

    def stop_waiting(self, notify: Callable[[], None]) -> None:
        """Call `notify` no more; the caller holds the lock. For `wait`."""
        self._of.stop_waiting(self._task_id, notify)

    def __aiter__(self) -> ObjectRefGenerator:
        return self

    async def __anext__(self) -> ObjectRef:
        streams = self._streams()
        process = streams.process
        loop = asyncio.get_running_loop()
        while True:
            ready: asyncio.Future[None] = loop.create_future()

            def wake(ready: asyncio.Future[None] = ready) -> None:
                with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits any more
                    loop.call_soon_threadsafe(lambda: None if ready.done() else ready.set_result(None))

            taken = process.locked(streams.take, self._task_id, wake)
            if taken is END:
                raise StopAsyncIteration
            if taken is not None:
                return taken
            try:
                await ready
            finally:
                if not ready.done() or ready.cancelled():
                    process.locked(streams.stop_waiting, self._task_id, wake)

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("an ObjectRefGenerator cannot be passed to another process; pass the refs that it yields")

    def __repr__(self) -> str:
        return f"ObjectRefGenerator({self._task_id.hex()})"
