"""Streaming generators: a task that yields its outputs one by one, as its owner and consumer see it.

Theory of operation. The worker sends each item as soon as it is there (`Item`), and the number of items when the generator
is exhausted (`Reply`). Item number `i` is object `i` of the task, so a second execution makes the same ids and what the
consumer has already is not asked for again. An item is pinned by its stream until it is consumed, when a ref takes over;
whoever drops the generator frees what was not consumed and cancels the rest. With back-pressure the worker waits while it
is that many items ahead of the consumer (`Consumed`). An exception takes its place in the stream as a failed item.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from afield.errors import GetTimeoutError, RuntimeDiedError
from afield.ids import STREAM_END_INDEX, STREAM_INDEX, object_id
from afield.runtime import current
from afield.runtime import messages as m
from afield.runtime.dispatch import Task
from afield.runtime.ownership import FAILED, INLINE, LOCATED, Entry, OwnershipTable
from afield.runtime.refs import ObjectRef
from afield.runtime.serialization import deserialize
from afield.transport.pump import Waiter


class Stream:
    """The owner's record of one streaming task."""

    __slots__ = ("consumed", "produced", "report", "task", "total", "waiters")

    def __init__(self, task: Task) -> None:
        self.task = task
        self.produced = 0
        self.consumed = 0
        self.total: int | None = None
        self.waiters: list[Callable[[], None]] = []
        #: Tells the worker how many items were consumed, while it wants to know.
        self.report: Callable[[int], None] | None = None

    def settled(self) -> bool:
        """Tell whether the next item, or the end, is there."""
        return self.consumed < self.produced or self.total is not None

    def notify(self) -> None:
        """Wake everybody who waits for the next item."""
        waiters, self.waiters = self.waiters, []
        for notify in waiters:
            notify()


class Streams:
    """All streams that this process owns."""

    def __init__(self, table: OwnershipTable) -> None:
        self._table = table
        self._streams: dict[bytes, Stream] = {}

    def open(self, task: Task) -> None:
        """A streaming task was submitted; the caller makes its generator."""
        self._streams[task.task_id] = Stream(task)
        self._table.begin_life(task.task_id + STREAM_INDEX)

    def get(self, task_id: bytes) -> Stream | None:
        """Return the stream of a task while its consumer is interested."""
        return self._streams.get(task_id)

    def produced(self, task_id: bytes) -> int:
        """Return how many items of a task have arrived; 0 when nobody is interested in them any more."""
        stream = self._streams.get(task_id)
        return 0 if stream is None else stream.produced

    def on_item(self, task: Task, item: m.Item, contained: list[bytes], report: Callable[[int], None] | None) -> None:
        """An item arrived; the refs inside it are pinned for it."""
        stream = self._streams.get(task.task_id)
        oid = object_id(task.task_id, item.index)
        if stream is None or item.index != stream.produced:
            # Nobody wants it any more, or a repeated execution makes what was there already, and may be freed by now.
            if item.kind == LOCATED:
                self._table.fulfil(oid, LOCATED, item.location)
            for inner in contained:
                self._table.unpin(inner)
            return
        stream.report = report
        self._append(stream, item.kind, item.location if item.kind == LOCATED else item.data, contained)
        stream.notify()

    def _append(self, stream: Stream, kind: int, value: Any, contained: list[bytes]) -> None:
        oid = object_id(stream.task.task_id, stream.produced)
        self._table.entries[oid] = Entry(state=kind, value=value, pins=1, contained=contained or None)
        stream.produced += 1

    def finish(self, task: Task, kind: int, data: bytes, contained: Sequence[bytes] = ()) -> None:
        """The task ended: with the number of its items, or with an error, which becomes the last item."""
        stream = self._streams.get(task.task_id)
        end = task.task_id + STREAM_END_INDEX
        if kind == INLINE:
            total = deserialize(data, "the number of items", None)
            self._table.fulfil(end, INLINE, b"")
        else:
            total = None
            self._table.fulfil(end, FAILED, data, contained)
        if stream is not None:
            if total is None:
                self._append(stream, FAILED, data, [])
            stream.total = stream.produced
            stream.notify()

    def fail_all(self, error: bytes) -> None:
        """Nothing will arrive any more: end every open stream with an error in its next place."""
        for stream in list(self._streams.values()):
            if stream.total is None:
                self.finish(stream.task, FAILED, error)

    def consume(self, task_id: bytes) -> ObjectRef | None:
        """Take the next item if it is there; the caller holds the lock and has seen `settled`."""
        stream = self._streams[task_id]
        if stream.consumed >= stream.produced:
            return None
        oid = object_id(task_id, stream.consumed)
        entry = self._table.entries[oid]
        entry.handles += 1
        self._table.unpin(oid)
        stream.consumed += 1
        if stream.report is not None and stream.total is None:
            stream.report(stream.consumed)
        return ObjectRef(oid)

    def drop(self, task_id: bytes) -> Task | None:
        """The consumer lost interest: free what it did not take; return the task if it still runs."""
        stream = self._streams.pop(task_id, None)
        if stream is None:
            return None
        for index in range(stream.consumed, stream.produced):
            self._table.unpin(object_id(task_id, index))
        return stream.task if stream.total is None else None


class ObjectRefGenerator:
    """Iterates over the refs of a streaming task's items as they are made; also with `async for`.

    It belongs to the process that called the task and cannot be passed on; the refs can.
    """

    def __init__(self, task_id: bytes) -> None:
        self._task_id = task_id
        self._life = ObjectRef(task_id + STREAM_INDEX)
        self._end = ObjectRef(task_id + STREAM_END_INDEX)

    @property
    def id(self) -> bytes:
        """Return what names the generator among refs, for `wait`."""
        return self._life.id

    def completed(self) -> ObjectRef:
        """Return a ref that is ready when the task has ended: None, or its error."""
        return self._end

    def __iter__(self) -> ObjectRefGenerator:
        return self

    def __next__(self) -> ObjectRef:
        return self._next(None)

    def _next(self, timeout_s: float | None) -> ObjectRef:
        participant = current.require("the generator belongs to a runtime that was shut down")
        process, streams = participant.process, participant.streams
        waiter = Waiter()
        stream = streams.get(self._task_id)
        if stream is None:
            raise StopIteration

        def settled() -> bool:
            if not stream.settled():
                stream.waiters.append(waiter.finish)
                return False
            return True

        if not process.locked(settled):
            deadline = None if timeout_s is None else time.monotonic() + timeout_s
            try:
                if not participant.values.blocking_wait(waiter, deadline):
                    if process.dead:
                        raise RuntimeDiedError(process.dead)
                    raise GetTimeoutError("the next item was not ready in time")
            finally:
                if not waiter.done:
                    stream.waiters = [notify for notify in stream.waiters if notify != waiter.finish]
        ref: ObjectRef | None = process.locked(streams.consume, self._task_id)
        if ref is None:
            raise StopIteration
        return ref

    def next_ready(self) -> bool:
        """Tell whether `next` would return (or raise StopIteration) without waiting."""
        stream = current.require("the generator belongs to a runtime that was shut down").streams.get(self._task_id)
        return stream is None or stream.settled()

    def when_ready(self, notify: Callable[[], None]) -> bool:
        """Call `notify` once the next item is there; return True (and do not call) if it is there. For `wait`."""
        stream = current.require("the generator belongs to a runtime that was shut down").streams.get(self._task_id)
        if stream is None or stream.settled():
            return True
        stream.waiters.append(notify)
        return False

    def __aiter__(self) -> ObjectRefGenerator:
        return self

    async def __anext__(self) -> ObjectRef:
        participant = current.require("the generator belongs to a runtime that was shut down")
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            loop.call_soon_threadsafe(lambda: None if ready.done() else ready.set_result(None))

        if not participant.process.locked(self.when_ready, wake):
            await ready
        try:
            return self._next(0)
        except StopIteration:
            raise StopAsyncIteration from None

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("an ObjectRefGenerator cannot be passed to another process; pass the refs that it yields")

    def __repr__(self) -> str:
        return f"ObjectRefGenerator({self._task_id.hex()})"
