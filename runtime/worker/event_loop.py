"""An async actor's calls: all on one asyncio event loop in the worker's main thread, with a limit for each concurrency group.

The constructor runs on that loop as well, so that it finds a running loop and can begin tasks on it.

The loop watches the pump's descriptor, so a call goes from the socket to its coroutine without a change of thread. A call
waits for its group's semaphore as an asyncio task and begins when it has it, unless it was cancelled, or its caller was gone,
by then. A call that runs is cancelled as an asyncio task is, also when its caller dies.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from afield.runtime.process.context import ActorExit, enter
from afield.runtime.worker.host import Host
from afield.runtime.worker.invocation import Invocation


def _on_unretrieved(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Report what nobody has awaited, but for the way in which an actor leaves."""
    if not isinstance(context.get("exception"), ActorExit):
        loop.default_exception_handler(context)


class EventLoop:
    """Runs an async actor's calls."""

    def __init__(self, host: Host, limit: int, groups: dict[str, int]) -> None:
        self._host = host
        self._runner = asyncio.Runner()
        self._limits = {"": limit, **groups}
        self._semaphores: dict[str, asyncio.Semaphore] = {}
        self._tasks: dict[Invocation, asyncio.Task[None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._early: list[Invocation] = []
        self._ended: asyncio.Event | None = None
        self._ending = False
        self._flush_planned = self._poll_planned = False

    def coroutines(self) -> list[tuple[str, Any]]:
        """Return name and object of what the event loop runs."""
        loop = self._loop
        return [] if loop is None else [(task.get_name(), task.get_coro()) for task in asyncio.all_tasks(loop)]

    def construct(self, make: Callable[[], Any]) -> Any:
        """Make the actor on the event loop, where what it begins (tasks, locks, clients) goes on when it serves."""

        async def inside() -> tuple[Any, BaseException | None]:
            try:
                return make(), None
            except BaseException as error:
                return None, error

        actor, error = self._runner.run(inside())
        if error is not None:
            raise error  # from here: frames of the event loop tell the user nothing
        return actor

    def serve(self) -> None:
        """Run the event loop until the end."""
        with self._runner:
            self._runner.run(self._serve())

    async def _serve(self) -> None:
        enter(None)  # the constructor is over, whose context the event loop began with
        pump = self._host.process.pump
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_on_unretrieved)
        self._ended = asyncio.Event()
        self._semaphores = {name: asyncio.Semaphore(limit) for name, limit in self._limits.items()}
        loop.add_reader(self._host.process.loop.fileno(), self._on_readable)
        with pump.driven_elsewhere():
            with pump.lock:  # `start` is called under it: a call is either among the early ones or goes to the loop
                self._loop = loop
                early, self._early = self._early, []
            for call in early:
                self._begin(call)
            if self._ending:
                self._ended.set()
            await self._ended.wait()
            while self._tasks:
                if self._host.work.left:  # the actor is over: nobody waits for these calls any more
                    for task in self._tasks.values():
                        task.cancel()
                await asyncio.wait(list(self._tasks.values()))
            self._host.process.locked(self._host.work.leave)  # what comes now is too late
            self._host.replies.flush()

    def _on_readable(self) -> None:
        process = self._host.process
        process.pump.poll()
        self._plan_poll(process.due_in())
        if process.dead and self._ended is not None:
            self._ended.set()
            for task in self._tasks.values():
                task.cancel()

    def _plan_poll(self, due_s: float | None) -> None:
        """Have a look when something is due, which no message may tell of."""
        if due_s is not None and not self._poll_planned and self._loop is not None:
            self._poll_planned = True
            self._loop.call_later(due_s, self._on_due)

    def _on_due(self) -> None:
        self._poll_planned = False
        self._on_readable()

    def start(self, call: Invocation) -> None:
        """Begin the call on the event loop, whichever thread received it."""
        if self._loop is None:
            self._early.append(call)
        elif threading.current_thread() is threading.main_thread():
            self._begin(call)
        else:
            self._loop.call_soon_threadsafe(self._begin, call)

    def _begin(self, call: Invocation) -> None:
        assert self._loop is not None
        task = self._loop.create_task(self._run(call))
        self._tasks[call] = task
        task.add_done_callback(lambda done: self._tasks.pop(call, None))

    async def _run(self, call: Invocation) -> None:
        host = self._host
        async with self._semaphores.get(call.callee.group, self._semaphores[""]):
            if host.start(call):
                await call.run_async(host)
                host.work.ended(call)
                self._flush_soon()

    def _flush_soon(self) -> None:
        """Send the replies of all calls that end in this turn of the event loop together."""
        assert self._loop is not None
        if not self._flush_planned:
            self._flush_planned = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_planned = False
        self._host.replies.flush()

    def interrupt(self, call: Invocation) -> None:
        """Cancel a call's asyncio task; the caller holds the process's lock."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the event loop has ended already
                self._loop.call_soon_threadsafe(self._cancel_task, call)

    def _cancel_task(self, call: Invocation) -> None:
        task = self._tasks.get(call)
        if task is not None:
            task.cancel()

    def leaving(self) -> None:
        """The actor ends itself: a call notices when it is answered, any other asyncio task has nobody who would."""
        if asyncio.current_task() not in self._tasks.values() and self._loop is not None:
            self._loop.call_soon(self._host.say_goodbye)

    def end(self) -> None:
        """Finish and return from `serve`."""
        self._ending = True
        if self._loop is not None and self._ended is not None:
            with suppress(RuntimeError):  # the event loop has ended already
                self._loop.call_soon_threadsafe(self._ended.set)
