"""An async actor's calls: an event loop for each concurrency group, and one for all other methods, the default loop.

The default loop runs in the main thread. The constructor runs on it as well, so that it finds a running loop and can begin
tasks on it. Without groups it is the only one, and watches the pump's descriptor, so that a call goes from the socket to its
coroutine without a change of thread.

With groups a method that blocks its loop must not keep those of others from running, or from being heard of. So each group
has a thread with a loop of its own, and another thread drives the pump until the actor has ended. What the groups share is
up to the actor, as with threads.

The end: the loops go on until no call is left on any of them, since calls of one group may wait for what another does. When
the actor has left, or is ended at once, a loop that is blocked is waited for no longer than `LEFT_S`, so that the rest of a
good end (`ending`) finds time.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import sys
import threading
import traceback
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from afield.runtime.process.events import RUNTIME_DEAD
from afield.runtime.worker.event_loop import CallLoop
from afield.runtime.worker.host import Host
from afield.runtime.worker.invocation import Invocation
from afield.transport.pump import Waiter

#: A loop may take so long to end once nobody waits for its calls.
LEFT_S = 1.0


class EventLoops:
    """Runs an async actor's calls."""

    def __init__(self, host: Host, limit: int, groups: dict[str, int]) -> None:
        self._host = host
        self._runner = asyncio.Runner()
        self._default = CallLoop(host, limit)
        self._groups = {name: CallLoop(host, size) for name, size in groups.items()}
        self._all = [self._default, *self._groups.values()]
        #: The actor ends: after the calls that are here, or (`_left`) with them.
        self._ended: asyncio.Event | None = None
        self._left = asyncio.Event()
        self._ending = False
        self._poll_planned = False
        host.process.subscribe(RUNTIME_DEAD, self._give_up)

    def coroutines(self) -> list[tuple[str, Any]]:
        """Return name and object of what the event loops run."""
        loops = [each.loop for each in self._all if each.loop is not None]
        return [(task.get_name(), task.get_coro()) for loop in loops for task in asyncio.all_tasks(loop)]

    def construct(self, make: Callable[[], Any]) -> Any:
        """Make the actor on the default loop, where what it begins (tasks, locks, clients) goes on when it serves."""

        async def inside() -> tuple[Any, BaseException | None]:
            try:
                return make(), None
            except BaseException as error:
                return None, error

        actor, error = self._runner.run(inside())
        if error is not None:
            raise error  # from here: frames of the event loop tell the user nothing
        return actor

    # -- calls -------------------------------------------------------------------------------------------------------

    def _of(self, call: Invocation) -> CallLoop:
        return self._groups.get(call.callee.group, self._default)

    def start(self, call: Invocation) -> None:
        """Begin the call on the event loop of its group; the caller holds the process's lock."""
        self._of(call).start(call)

    def interrupt(self, call: Invocation) -> None:
        """Cancel a call's asyncio task; the caller holds the process's lock."""
        self._of(call).interrupt(call)

    def leaving(self) -> None:
        """The actor ends itself: a call notices when it is answered, any other asyncio task has nobody who would."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # a thread that a call has begun
            self._host.say_goodbye()
            return
        task = asyncio.current_task()
        if not any(each.runs(task) for each in self._all):
            loop.call_soon(self._host.say_goodbye)

    def end(self) -> None:
        """Finish and return from `serve`."""
        self._ending = True
        if self._ended is not None and self._default.loop is not None:
            with suppress(RuntimeError):  # the event loop has ended already
                self._default.loop.call_soon_threadsafe(self._on_end)

    def _on_end(self) -> None:
        assert self._ended is not None
        self._ended.set()
        if self._host.work.left:
            self._left.set()

    def _give_up(self, error: bytes) -> None:
        """The runtime is dead, and nobody waits for anything any more."""
        for each in self._all:
            each.interrupt_all()
        self.end()

    # -- serving -----------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Run the event loops until the end."""
        self._runner.run(self._serve())
        # Not after an exception: its calls would be cancelled, and say so. They are not over, but the process is.
        self._runner.close()

    async def _serve(self) -> None:
        self._default.open()
        self._ended = asyncio.Event()
        if self._ending:
            self._on_end()
        with self._beside() if self._groups else self._alone():
            await self._ended.wait()
            finished = asyncio.create_task(self._finish())
            left = asyncio.create_task(self._left.wait())
            await asyncio.wait([finished, left], return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait([finished], timeout=LEFT_S)
            for task in (finished, left):
                task.cancel()
            self._host.process.locked(self._host.work.leave)
            self._host.replies.flush()

    async def _finish(self) -> None:
        """Wait until no call is left on any loop, and accept no more."""
        while not self._host.process.locked(self._leave_if_done):
            for each in self._all:
                await _on(each.loop, each.drain)

    def _leave_if_done(self) -> bool:
        """What comes from now on is too late, if no call is left."""
        if any(each.calls for each in self._all):
            return False
        self._host.work.leave()
        return True

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """There is one loop, which drives the pump."""
        loop, process = asyncio.get_running_loop(), self._host.process
        loop.add_reader(process.loop.fileno(), self._on_readable)
        with process.pump.driven_elsewhere():
            yield

    def _on_readable(self) -> None:
        process = self._host.process
        process.pump.poll()
        self._plan_poll(process.due_in())

    def _plan_poll(self, due_s: float | None) -> None:
        """Have a look when something is due, which no message may tell of."""
        if due_s is not None and not self._poll_planned and self._default.loop is not None:
            self._poll_planned = True
            self._default.loop.call_later(due_s, self._on_due)

    def _on_due(self) -> None:
        self._poll_planned = False
        self._on_readable()

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """There are several loops, each in a thread of its own, and one thread that drives the pump for all."""
        context = contextvars.copy_context()
        threads = [_GroupThread(name, each, context.copy()) for name, each in self._groups.items()]
        over = Waiter()
        pump = self._host.process.pump
        driver = threading.Thread(target=pump.wait_for, args=(over,), name="afield-driver", daemon=True)
        driver.start()
        try:
            yield
        finally:
            for thread in threads:
                thread.end()
            over.finish()
            driver.join()


class _GroupThread:
    """The thread of one group's loop; it runs when this is made.

    What ends the loop by an exception (a SystemExit in an asyncio task of the user's, say) ends the process, as it does on
    the default loop: else the calls of this group would never be answered.
    """

    def __init__(self, name: str, calls: CallLoop, context: contextvars.Context) -> None:
        self._calls = calls
        self._opened = threading.Event()
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=context.run, args=(self._run,), name=f"afield-{name}", daemon=True)
        self._thread.start()
        self._opened.wait()

    def _run(self) -> None:
        runner = asyncio.Runner()
        try:
            runner.run(self._serve())
        except BaseException:
            traceback.print_exc(file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)
        runner.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        self._calls.open()
        self._opened.set()
        await self._stop.wait()

    def end(self) -> None:
        """End the loop, and wait for it, unless it is blocked."""
        if self._stop is not None and self._calls.loop is not None:
            self._calls.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(LEFT_S)


async def _on(loop: asyncio.AbstractEventLoop | None, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Await on whichever loop."""
    assert loop is not None
    if loop is asyncio.get_running_loop():
        await work()
    else:
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work(), loop))
