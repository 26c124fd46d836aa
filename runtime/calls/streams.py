"""Streaming generators: a task that yields its outputs one by one, as its owner and consumer see it.

Theory of operation. The worker sends each item as soon as it is there (`Item`), and the number of items when the generator
is exhausted (`Reply`). Item number `i` is object `i` of the task, so a second execution makes the same ids and what the
consumer has already is not asked for again. An item is pinned by its stream until it is consumed, when a ref takes over;
whoever drops the generator frees what was not consumed and cancels the rest. With back-pressure the worker waits while it
is that many items ahead of the consumer (`Consumed`). An exception takes its place in the stream as a failed item.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

from afield.ids import STREAM_END_INDEX, STREAM_INDEX, object_id
from afield.runtime.cores.dispatch import Task
from afield.runtime.cores.objects import FAILED, INLINE, LOCATED
from afield.runtime.process.process import Process
from afield.runtime.process.refs import ObjectRef
from afield.runtime.process.serialization import deserialize
from afield.runtime.wire import messages
from afield.transport.pump import Waiter


class End(Enum):
    """What comes after the last item."""

    END = "end"


END = End.END


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

    def next_is_known(self) -> bool:
        """Tell whether the next item, or the end, is there."""
        return self.consumed < self.produced or self.total is not None

    def notify(self) -> None:
        """Wake everybody who waits for the next item."""
        waiters, self.waiters = self.waiters, []
        for notify in waiters:
            notify()


class Streams:
    """All streams that this process owns.

    Args:
        process: this process.
        blocking_wait: blocks whoever asks for the next item; see `Values.blocking_wait`.
    """

    def __init__(self, process: Process, blocking_wait: Callable[[Waiter, float | None], bool]) -> None:
        self.process = process
        self.blocking_wait = blocking_wait
        self._table = process.table
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

    def on_item(
        self, task: Task, item: messages.Item, contained: list[bytes], report: Callable[[int], None] | None
    ) -> None:
        """An item arrived; the refs inside it are pinned for it."""
        stream = self._streams.get(task.task_id)
        oid = object_id(task.task_id, item.index)
        if stream is None or item.index != stream.produced:
            # Nobody wants it any more, or a repeated execution makes what was there already, and may be freed by now.
            if report is not None:
                self._let_go_on(stream, item.index, report)
            if item.kind == LOCATED:
                self._table.fulfil(oid, LOCATED, item.location)
            for inner in contained:
                self._table.unpin(inner)
            return
        stream.report = report
        self._append(stream, item.kind, item.location if item.kind == LOCATED else item.data, contained)
        stream.notify()

    @staticmethod
    def _let_go_on(stream: Stream | None, index: int, report: Callable[[int], None]) -> None:
        """An execution begins with nothing taken, and would wait for what was taken of the one before, or never will be."""
        if stream is None:
            report(index + 1)
        else:
            stream.report = report
            report(stream.consumed)

    def _append(self, stream: Stream, kind: int, value: Any, contained: list[bytes]) -> None:
        oid = object_id(stream.task.task_id, stream.produced)
        self._table.add_item(oid, kind, value, contained)
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

    def take(self, task_id: bytes, notify: Callable[[], None]) -> ObjectRef | End | None:
        """Take the next item, or see the end; None: neither is there, and `notify` is called when one may be.

        Several threads may share a generator: all of them are told of an item, and one of them takes it. The caller holds the
        lock.
        """
        stream = self._streams.get(task_id)
        if stream is None:
            return END
        if stream.consumed >= stream.produced:
            if stream.total is not None:
                return END
            stream.waiters.append(notify)
            return None
        oid = object_id(task_id, stream.consumed)
        self._table.take_item(oid)
        stream.consumed += 1
        if stream.report is not None and stream.total is None:
            stream.report(stream.consumed)
        return ObjectRef(oid)

    def stop_waiting(self, task_id: bytes, notify: Callable[[], None]) -> None:
        """Whoever was to be told waits no longer; the caller holds the lock."""
        stream = self._streams.get(task_id)
        if stream is not None:
            stream.waiters = [each for each in stream.waiters if each != notify]

    def drop(self, task_id: bytes) -> Task | None:
        """The consumer lost interest: free what it did not take; return the task if it still runs."""
        stream = self._streams.pop(task_id, None)
        if stream is None:
            return None
        for index in range(stream.consumed, stream.produced):
            self._table.unpin(object_id(task_id, index))
        return stream.task if stream.total is None else None
