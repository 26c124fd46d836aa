"""Actors that run several calls at once: on threads, or on an event loop.

An actor with `async def` methods runs all of them on one event loop in the worker's main thread; the loop watches the
pump's descriptor, so a call goes from the socket to its coroutine without a change of thread. Other actors with
`max_concurrency` or concurrency groups run their calls on thread pools, one for each group.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from afield.errors import TaskCancelledError
from afield.runtime.process import current
from afield.runtime.process.context import TaskContext, enter, leave_copy
from afield.runtime.wire import messages as m
from afield.runtime.worker.invocation import in_full
from afield.transport.channel import Channel
from afield.transport.pump import Waiter

if TYPE_CHECKING:
    from afield.runtime.worker.executor import Executor

DEFAULT_ASYNC_CONCURRENCY = 1000


class Concurrency(Protocol):
    """Runs the calls of one actor."""

    def start(self, channel: Channel, push: m.Push) -> None:
        """A call arrived; the caller holds the process's lock."""

    def cancel(self, channel: Channel, sequence: int) -> bool:
        """Cancel a call; return False if it is not here. The caller holds the process's lock."""

    def serve(self) -> None:
        """Block the main thread until `end`."""

    def end(self) -> None:
        """Finish what has started, and return from `serve`; may be called from any thread."""


def make_concurrency(executor: Executor, cls: type, options: dict[str, Any]) -> Concurrency | None:
    """Return what runs an actor's calls; None for one at a time."""
    groups: dict[str, int] = options.get("concurrency_groups") or {}
    limit: int = options.get("max_concurrency") or 0
    if _is_async(cls):
        return EventLoop(executor, limit or DEFAULT_ASYNC_CONCURRENCY, groups)
    if limit > 1 or groups:
        return Threads(executor, limit or 1, groups)
    return None


def _is_async(cls: type) -> bool:
    members = (inspect.getattr_static(cls, name) for name in dir(cls))
    functions = (member.__func__ if isinstance(member, (staticmethod, classmethod)) else member for member in members)
    return any(inspect.iscoroutinefunction(f) or inspect.isasyncgenfunction(f) for f in functions)


class Threads:
    """A pool of threads for each concurrency group."""

    def __init__(self, executor: Executor, limit: int, groups: dict[str, int]) -> None:
        self._executor = executor
        self._pools = {name: ThreadPoolExecutor(size, f"afield-{name}") for name, size in groups.items()}
        self._pools[""] = ThreadPoolExecutor(limit, "afield-call")
        self._ended = Waiter()
        self._waiting: dict[tuple[int, int], Any] = {}

    def start(self, channel: Channel, push: m.Push) -> None:
        """Hand the call to its group's pool."""
        definition = self._executor.definition(channel, push)
        pool = self._pools.get(definition.group, self._pools[""])
        self._waiting[id(channel), push.sequence] = (pool.submit(self._run, channel, push), definition)

    def _run(self, channel: Channel, push: m.Push) -> None:
        self._waiting.pop((id(channel), push.sequence), None)
        self._executor.run_one(channel, push)
        self._executor.flush()

    def cancel(self, channel: Channel, sequence: int) -> bool:
        """A call that has not started never will; one that runs on a thread cannot be interrupted."""
        waiting = self._waiting.pop((id(channel), sequence), None)
        if waiting is not None and waiting[0].cancel():
            error = TaskCancelledError(f"{waiting[1].name}() was cancelled before it started")
            channel.send(self._executor.invocations.failure(sequence, waiting[1], error, False, channel.peer_id))
        return True

    def serve(self) -> None:
        """Drive the loop until the end, then let running calls finish."""
        self._executor.process.pump.wait_for(self._ended)
        for pool in self._pools.values():
            pool.shutdown(wait=True)

    def end(self) -> None:
        """Return from `serve`."""
        self._ended.finish()
        if threading.current_thread() is not threading.main_thread():
            self._executor.process.loop.kick()


async def _turn_by_turn(items: Iterable[Any]) -> AsyncIterator[Any]:
    """Iterate without keeping other calls from running."""
    for item in items:
        yield item
        await asyncio.sleep(0)


class EventLoop:
    """One asyncio event loop in the main thread, with a limit for each concurrency group."""

    def __init__(self, executor: Executor, limit: int, groups: dict[str, int]) -> None:
        self._executor = executor
        self._limits = {"": limit, **groups}
        self._semaphores: dict[str, asyncio.Semaphore] = {}
        self._tasks: dict[tuple[int, int], asyncio.Task[None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._early: list[tuple[Channel, m.Push]] = []
        self._ended: asyncio.Event | None = None
        self._ending = False
        self._flush_planned = False

    def serve(self) -> None:
        """Run the event loop until the end."""
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        pump = self._executor.process.pump
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._semaphores = {name: asyncio.Semaphore(limit) for name, limit in self._limits.items()}
        self._loop.add_reader(self._executor.process.loop.fileno(), self._on_readable)
        with pump.driven_elsewhere():
            early, self._early = self._early, []
            for channel, push in early:
                self._begin(channel, push)
            if self._ending:
                self._ended.set()
            await self._ended.wait()
            while self._tasks:
                await asyncio.wait(list(self._tasks.values()))
            self._executor.flush()

    def _on_readable(self) -> None:
        process = self._executor.process
        process.pump.poll()
        if process.dead and self._ended is not None:
            self._ended.set()
            for task in self._tasks.values():
                task.cancel()

    def start(self, channel: Channel, push: m.Push) -> None:
        """Begin the call on the event loop, whichever thread received it."""
        if self._loop is None:
            self._early.append((channel, push))
        elif threading.current_thread() is threading.main_thread():
            self._begin(channel, push)
        else:
            self._loop.call_soon_threadsafe(self._begin, channel, push)

    def _begin(self, channel: Channel, push: m.Push) -> None:
        assert self._loop is not None
        key = (id(channel), push.sequence)
        task = self._loop.create_task(self._run(channel, push))
        self._tasks[key] = task
        task.add_done_callback(lambda done: self._tasks.pop(key, None))

    async def _run(self, channel: Channel, push: m.Push) -> None:
        executor = self._executor
        definition = executor.definition(channel, push)
        context = TaskContext(push.task_id, definition.name)
        enter(context)
        in_user_code = failed = False
        holds: list[Any] = []
        executor.invocations.begin(channel, push)
        try:
            async with self._semaphores.get(definition.group, self._semaphores[""]):
                function = executor.function(definition)
                if push.arguments or push.location is not None:
                    args, kwargs, holds = executor.invocations.arguments(push, context, channel.peer_id)
                else:
                    args, kwargs = (), {}
                in_user_code = True
                value = function(*args, **kwargs)
                del args, kwargs
                if definition.num_returns == m.STREAMING:
                    value = await self._stream(value, channel, push, definition)
                elif inspect.isawaitable(value):
                    value = await value
                if definition.num_returns != 1:
                    value = in_full(value, definition.num_returns)
                in_user_code = False
                if current.process is not executor.process:
                    leave_copy(None)
            holder = [value]
            del value
            executor.invocations.keep_holds(holds, context)
            reply = executor.invocations.reply(holder, push, channel.peer_id, definition)
        except asyncio.CancelledError:
            error = TaskCancelledError(f"{definition.name}() was cancelled")
            reply = executor.invocations.failure(push.sequence, definition, error, False, channel.peer_id)
            failed = True
        except BaseException as error:
            reply = executor.failure(channel, push, definition, error, in_user_code)
            failed = True
        if failed and holds:
            args, kwargs = (), {}  # noqa: F841 - lets go of them
            executor.keep_holds_of_failed(holds, context)
        executor.invocations.end(channel, push)
        executor.answer(channel, reply, context)
        self._flush_soon()

    async def _stream(self, items: Any, channel: Channel, push: m.Push, definition: Any) -> int:
        count = 0
        if not hasattr(items, "__aiter__"):
            items = _turn_by_turn(items)
        async for item in items:
            self._executor.send_item([item], count, channel, push, definition)
            count += 1
            if definition.backpressure:
                await self._wait_for_consumer(channel, push, count - definition.backpressure)
        self._executor.forget_consumer(channel, push)
        return count

    async def _wait_for_consumer(self, channel: Channel, push: m.Push, needed: int) -> None:
        """Wait until the consumer has taken more than `needed` items."""
        assert self._loop is not None
        record = self._executor.consumer(channel, push)
        while record.consumed <= needed and not channel.closed:
            taken = asyncio.Event()
            loop = self._loop
            record.notify = lambda: loop.call_soon_threadsafe(taken.set)  # noqa: B023 - replaced before the next turn
            if record.consumed <= needed:
                with suppress(TimeoutError):  # looks again for a consumer that is gone
                    await asyncio.wait_for(taken.wait(), 1.0)
            record.notify = None

    def _flush_soon(self) -> None:
        """Send the replies of all calls that end in this turn of the event loop together."""
        assert self._loop is not None
        if not self._flush_planned:
            self._flush_planned = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_planned = False
        self._executor.flush()

    def cancel(self, channel: Channel, sequence: int) -> bool:
        """Cancel a call's asyncio task."""
        task = self._tasks.get((id(channel), sequence))
        if task is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(task.cancel)
        return True

    def end(self) -> None:
        """Finish and return from `serve`."""
        self._ending = True
        if self._loop is not None and self._ended is not None:
            with suppress(RuntimeError):  # the event loop has ended already
                self._loop.call_soon_threadsafe(self._ended.set)
