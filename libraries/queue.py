"""`Queue`: a first-in, first-out queue that tasks, actors and the driver share.

Theory of operation. The queue is an `asyncio.Queue` in an async actor, and a `Queue` object is little more than the
actor's handle: pass it to whoever should have it. A call that has to wait is a coroutine suspended in the actor, and its
caller waits for the call's ref: nothing polls. If the caller gives up waiting (Ctrl-C, or its own coroutine is cancelled),
the call is cancelled too, so that it does not take an item for nobody.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Iterable
from typing import Any

import afield
from afield.tracebacks import unseen

#: Calls that may wait in the queue at a time. When so many wait to get, nobody can put any more, so it is generous.
MAX_WAITING = 10_000


class Empty(queue.Empty):
    """There was nothing to get, or not in time."""

    _foreseen = True  # see `afield.tracebacks`


class Full(queue.Full):
    """There was no room to put, or not in time."""

    _foreseen = True


class _QueueActor:
    """Everything is `async def`, also what never waits, so that all of it runs in the actor's one event loop."""

    def __init__(self, maxsize: int) -> None:
        self._queue: asyncio.Queue[Any] = asyncio.Queue(maxsize)

    async def qsize(self) -> int:
        return self._queue.qsize()

    async def put(self, item: Any, timeout: float | None) -> None:
        try:
            async with asyncio.timeout(timeout):
                await self._queue.put(item)
        except TimeoutError:
            raise Full(f"no room in the queue after {timeout:g} s") from None

    async def get(self, timeout: float | None) -> Any:
        try:
            async with asyncio.timeout(timeout):
                return await self._queue.get()
        except TimeoutError:
            raise Empty(f"nothing in the queue after {timeout:g} s") from None

    async def put_nowait(self, items: list[Any]) -> None:
        size, maxsize = self._queue.qsize(), self._queue.maxsize
        if maxsize > 0 and size + len(items) > maxsize:
            raise Full(f"no room for {len(items)} more: the queue has {size} of at most {maxsize}")
        for item in items:
            self._queue.put_nowait(item)

    async def put_one_nowait(self, item: Any) -> None:
        await self.put_nowait([item])

    async def get_nowait(self, count: int) -> list[Any]:
        if count > self._queue.qsize():
            raise Empty(f"{count} wanted, but the queue has {self._queue.qsize()}")
        return [self._queue.get_nowait() for _ in range(count)]

    async def get_one_nowait(self) -> Any:
        (item,) = await self.get_nowait(1)
        return item


class Queue:
    """A queue in an actor of its own. Can be passed to tasks and actors; ends when nobody has it any more.

    Items are kept by value: an ObjectRef is resolved on its way in (put ``[ref]`` to keep it a reference). Items come out
    in the order in which they came in; those of one caller keep its order.

    Args:
        maxsize: how many items it holds at most; no bound if it is 0 or less.
        actor_options: options of the actor, as in `.options()`: `name`, `num_cpus`, ...
    """

    def __init__(self, maxsize: int = 0, actor_options: dict[str, Any] | None = None) -> None:
        self.maxsize = maxsize
        options = {"max_concurrency": MAX_WAITING} | (actor_options or {})
        self.actor = afield.remote(_QueueActor).options(**options).remote(maxsize)

    @unseen
    def qsize(self) -> int:
        """Return the number of items."""
        size: int = afield.get(self.actor.qsize.remote())
        return size

    size = qsize

    def __len__(self) -> int:
        return self.qsize()

    def empty(self) -> bool:
        """Tell whether there are no items; already outdated if others use the queue."""
        return self.qsize() == 0

    def full(self) -> bool:
        """Tell whether there is no room; already outdated if others use the queue."""
        return 0 < self.maxsize <= self.qsize()

    @unseen
    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Add an item, waiting for room if `block` is true.

        Args:
            item: anything that can be pickled.
            block: wait for room.
            timeout: seconds to wait at most.

        Raises:
            Full: no room, or not in time.
            ValueError: `timeout` is negative.
        """
        _wait_for(self._put(item, block, timeout))

    @unseen
    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Take the oldest item, waiting for one if `block` is true.

        Raises:
            Empty: no item, or not in time.
            ValueError: `timeout` is negative.
        """
        return _wait_for(self._get(block, timeout))

    async def put_async(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Like `put`, for coroutines."""
        await _wait_for_async(self._put(item, block, timeout))

    async def get_async(self, block: bool = True, timeout: float | None = None) -> Any:
        """Like `get`, for coroutines."""
        return await _wait_for_async(self._get(block, timeout))

    @unseen
    def put_nowait(self, item: Any) -> None:
        """Add an item if there is room, else raise `Full`."""
        self.put(item, block=False)

    @unseen
    def get_nowait(self) -> Any:
        """Take the oldest item if there is one, else raise `Empty`."""
        return self.get(block=False)

    @unseen
    def put_nowait_batch(self, items: Iterable[Any]) -> None:
        """Add all items if there is room for all, else none and raise `Full`."""
        _wait_for(self.actor.put_nowait.remote(list(items)))

    @unseen
    def get_nowait_batch(self, num_items: int) -> list[Any]:
        """Take the `num_items` oldest items if there are so many, else none and raise `Empty`.

        Raises:
            TypeError: `num_items` is not a whole number.
            ValueError: it is negative.
        """
        if not isinstance(num_items, int):
            raise TypeError(f"num_items={num_items!r} must be a whole number")
        if num_items < 0:
            raise ValueError(f"num_items={num_items!r} must not be negative")
        items: list[Any] = _wait_for(self.actor.get_nowait.remote(num_items))
        return items

    def shutdown(self, force: bool = False, grace_period_s: float = 5) -> None:
        """End the queue for everybody; whoever waits in it gets `ActorDiedError`.

        Args:
            force: do not let the calls arrive first that were made before this one.
            grace_period_s: seconds that they have at most.
        """
        if not force:
            afield.wait([self.actor.qsize.remote()], timeout=grace_period_s)
        afield.kill(self.actor)

    def _put(self, item: Any, block: bool, timeout: float | None) -> Any:
        if not block:
            return self.actor.put_one_nowait.remote(item)
        return self.actor.put.remote(item, _checked(timeout))

    def _get(self, block: bool, timeout: float | None) -> Any:
        if not block:
            return self.actor.get_one_nowait.remote()
        return self.actor.get.remote(_checked(timeout))

    def __repr__(self) -> str:
        return f"Queue(maxsize={self.maxsize})"


def _checked(timeout: float | None) -> float | None:
    if timeout is not None and timeout < 0:
        raise ValueError(f"timeout={timeout!r} must not be negative")
    return timeout


def _wait_for(ref: Any) -> Any:
    try:
        return afield.get(ref)
    except KeyboardInterrupt:
        afield.cancel(ref)
        raise


async def _wait_for_async(ref: Any) -> Any:
    try:
        return await ref
    except asyncio.CancelledError:
        afield.cancel(ref)
        raise
