"""One event loop of an async actor, and the calls that run on it: those of one concurrency group.

A call waits for the group's semaphore as an asyncio task and begins when it has it, unless it was cancelled, or its caller was
gone, by then. A call that runs is cancelled as an asyncio task is, also when its caller dies.

Whichever thread receives a call, it counts as one of the loop's from then on (`calls`), so that nothing which was accepted is
forgotten when the actor ends. All of them begin in the context (`contextvars`) that the loop was opened in.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from contextlib import suppress

from afield.runtime.process.context import ActorExit, enter
from afield.runtime.worker.host import Host
from afield.runtime.worker.invocation import Invocation


def _on_unretrieved(loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    """Report what nobody has awaited, but for the way in which an actor leaves."""
    if not isinstance(context.get("exception"), ActorExit):
        loop.default_exception_handler(context)


class CallLoop:
    """Runs the calls of one group on the event loop that it is opened on, up to `limit` at a time."""

    def __init__(self, host: Host, limit: int) -> None:
        self._host = host
        self._limit = limit
        #: Calls that were accepted and are not over; None for one that has no asyncio task yet.
        self.calls: dict[Invocation, asyncio.Task[None] | None] = {}
        #: Those that came before there was a loop.
        self._early: list[Invocation] = []
        self.loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        self._context = contextvars.Context()
        self._semaphore = asyncio.Semaphore(limit)
        self._flush_planned = False

    def open(self) -> None:
        """Begin calls on the running event loop from now on."""
        enter(None)  # no call runs yet; in the main thread the constructor is over
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_on_unretrieved)
        self._context = contextvars.copy_context()
        self._thread = threading.get_ident()

        def take_early() -> list[Invocation]:
            self.loop = loop
            early, self._early = self._early, []
            return early

        for call in self._host.process.locked(take_early):
            self._begin(call)

    def start(self, call: Invocation) -> None:
        """Accept a call, whichever thread received it; the caller holds the process's lock."""
        self.calls[call] = None
        if self.loop is None:
            self._early.append(call)
        elif threading.get_ident() == self._thread:
            self._begin(call)
        else:
            self.loop.call_soon_threadsafe(self._begin, call, context=self._context)

    def _begin(self, call: Invocation) -> None:
        assert self.loop is not None
        task = self.calls[call] = self.loop.create_task(self._run(call))
        task.add_done_callback(lambda done: self.calls.pop(call, None))

    async def _run(self, call: Invocation) -> None:
        host = self._host
        async with self._semaphore:
            if host.start(call):
                await call.run_async(host)
                host.work.ended(call)
                self._flush_soon()

    def _flush_soon(self) -> None:
        """Send the replies of all calls that end in this turn of the event loop together."""
        assert self.loop is not None
        if not self._flush_planned:
            self._flush_planned = True
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_planned = False
        self._host.replies.flush()

    def interrupt(self, call: Invocation) -> None:
        """Cancel a call's asyncio task."""
        self._later(self._cancel_task, call)

    def _cancel_task(self, call: Invocation) -> None:
        task = self.calls.get(call)
        if task is not None:
            task.cancel()

    def interrupt_all(self) -> None:
        """Cancel all of them."""
        for call in list(self.calls):
            self.interrupt(call)

    def _later(self, callback: object, *args: object) -> None:
        if self.loop is not None:
            with suppress(RuntimeError):  # the event loop has ended already
                self.loop.call_soon_threadsafe(callback, *args)  # type: ignore[arg-type]

    def runs(self, task: asyncio.Task[object] | None) -> bool:
        """Tell whether an asyncio task of this thread is one of the calls."""
        return task is not None and any(each is task for each in list(self.calls.values()))

    async def drain(self) -> None:
        """Wait until no call is left here; once the actor has left, nobody waits for them any more, and they are cancelled."""
        while self.calls:
            tasks = [task for task in self.calls.values() if task is not None]
            if self._host.work.left:
                for task in tasks:
                    task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            else:
                await asyncio.sleep(0)  # what was accepted begins
