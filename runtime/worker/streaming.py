"""A generator's items on their way out: each leaves as soon as it is made; with back-pressure the producer waits.

Theory of operation. A call that streams has a `Stream`. On a thread `run` takes items from the generator and sends them; on
an event loop `run_async` does, and lets other calls run between two items. With back-pressure the producer is at most that
many items ahead of the consumer, who says what he has taken (`Consumed`). A consumer that is gone is waited for no longer,
and for one that is dead nothing more is made.

An item is pickled where an interrupt may come; from when it is stored until it is queued none comes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

from afield.runtime.process.serialization import Serialized
from afield.runtime.wire import messages
from afield.runtime.worker.outcomes import LoadedCallee, Outcomes
from afield.runtime.worker.replies import MAX_REPLY_DELAY_S, Replies
from afield.transport.channel import Channel
from afield.transport.interrupts import interruptible, uninterruptible
from afield.transport.pump import Waiter

#: A producer that waits looks this often for a consumer that is gone.
LOOK_S = 1.0


class Stream:
    """The items of one call.

    Args:
        outcomes: pickles the items.
        replies: where they go.
        channel: who gets them.
        push: what the call was asked for with.
        callee: its function.
        at_once: each item leaves at once: calls run beside this one, and nobody looks for what has gathered.
    """

    __slots__ = (
        "abandoned",
        "at_once",
        "channel",
        "consumed",
        "callee",
        "notify",
        "outcomes",
        "replies",
        "sent",
        "sequence",
        "task_id",
    )

    def __init__(
        self,
        outcomes: Outcomes,
        replies: Replies,
        channel: Channel,
        push: messages.Push,
        callee: LoadedCallee,
        at_once: bool,
    ) -> None:
        self.outcomes = outcomes
        self.replies = replies
        self.channel = channel
        self.sequence = push.sequence
        self.task_id = push.task_id
        self.callee = callee
        self.at_once = at_once
        self.sent = 0
        self.consumed = 0
        #: The consumer is dead: nothing is made for it any more.
        self.abandoned = False
        #: Wakes the producer that waits for the consumer.
        self.notify: Callable[[], object] | None = None

    def taken(self, count: int) -> None:
        """The consumer has taken `count` items; the caller holds the process's lock."""
        self.consumed = count
        self._wake()

    def abandon(self) -> None:
        """The consumer is dead; the caller holds the process's lock."""
        self.abandoned = True
        self._wake()

    def _wake(self) -> None:
        notify = self.notify  # the producer may take it away meanwhile
        if notify is not None:
            notify()

    @interruptible
    def run(self, holder: list[Any]) -> int:
        """Send what the iterable in `holder` makes, as it makes it; return the number of items."""
        items: Iterator[Any] = iter(holder.pop())
        while True:
            while self._too_far_ahead():
                self._wait()
            if self.abandoned:
                if hasattr(items, "close"):
                    items.close()
                return self.sent
            try:
                holder.append(next(items))
            except StopIteration:
                return self.sent
            self._send(holder)

    async def run_async(self, items: Any) -> int:
        """Do the same on an event loop, also for an asynchronous generator."""
        if not hasattr(items, "__aiter__"):
            items = turn_by_turn(items)
        async for item in items:
            holder = [item]
            del item
            self._send(holder)
            while self._too_far_ahead():
                await self._wait_async()
        return self.sent

    def _send(self, holder: list[Any]) -> None:
        """Send the item in `holder`, which is emptied; the first of a burst leaves at once."""
        self._queue(holder, self.outcomes.pickled(holder[0], self.callee.name))
        if self.at_once or time.monotonic() - self.replies.last_flush > MAX_REPLY_DELAY_S:
            self.replies.flush()
        else:
            self.replies.process.pump.wake_standby()

    @uninterruptible
    def _queue(self, holder: list[Any], value: Serialized) -> None:
        index = self.sent
        result = self.outcomes.written(holder, value, self.task_id, index, self.channel.peer_id)
        holder.clear()
        item = messages.Item(self.sequence, index, result.kind, result.data, result.location, result.contained)
        self.replies.waiting.append((self.channel, item))
        self.sent = index + 1

    def _too_far_ahead(self) -> bool:
        allowed = self.callee.backpressure
        return bool(allowed) and self.consumed <= self.sent - allowed and not (self.abandoned or self.channel.closed)

    def _wait(self) -> None:
        waiter = Waiter()
        self.notify = waiter.finish
        if self._too_far_ahead():
            self.replies.flush()
            self.replies.process.pump.wait_for(waiter, LOOK_S)
        self.notify = None

    async def _wait_async(self) -> None:
        taken = asyncio.Event()
        loop = asyncio.get_running_loop()
        self.notify = lambda: loop.call_soon_threadsafe(taken.set)
        try:
            if self._too_far_ahead():
                with suppress(TimeoutError):
                    await asyncio.wait_for(taken.wait(), LOOK_S)
        finally:
            self.notify = None


async def turn_by_turn(items: Iterable[Any]) -> AsyncIterator[Any]:
    """Iterate without keeping other calls from running."""
    for item in items:
        yield item
        await asyncio.sleep(0)
