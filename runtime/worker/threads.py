"""An actor's calls on thread pools: one pool for each concurrency group, and one for all other methods.

A call that waits in a pool and is cancelled, or whose caller is gone, stays in the pool and does nothing when its turn comes.
One that runs cannot be interrupted; what it has submitted can be cancelled, and it ends as cancelled whatever it returns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from afield.runtime.worker.host import Host
from afield.runtime.worker.invocation import Invocation
from afield.transport.pump import Waiter


class Threads:
    """A pool of threads for each concurrency group."""

    def __init__(self, host: Host, limit: int, groups: dict[str, int]) -> None:
        self._host = host
        self._pools = {name: ThreadPoolExecutor(size, f"afield-{name}") for name, size in groups.items()}
        self._pools[""] = ThreadPoolExecutor(limit, "afield-call")
        self._ended = Waiter()

    def construct(self, make: Callable[[], Any]) -> Any:
        """Make the actor here: which thread runs which call is nobody's business."""
        return make()

    def start(self, call: Invocation) -> None:
        """Hand the call to its group's pool."""
        self._pools.get(call.callee.group, self._pools[""]).submit(self._run, call)

    def _run(self, call: Invocation) -> None:
        host = self._host
        if host.start(call):
            call.run(host)
            host.work.ended(call)
            host.replies.flush()

    def interrupt(self, call: Invocation) -> None:
        """A thread cannot be interrupted."""

    def coroutines(self) -> list[tuple[str, Any]]:
        """Threads run none."""
        return []

    def leaving(self) -> None:
        """The call that says so is answered, and then notices."""

    def serve(self) -> None:
        """Drive the loop until the end, then let calls finish that are here."""
        self._host.process.pump.wait_for(self._ended)
        self._host.process.locked(self._host.work.leave)  # what comes now is too late
        for pool in self._pools.values():
            pool.shutdown(wait=True)

    def end(self) -> None:
        """Return from `serve`."""
        self._ended.finish()
        if threading.current_thread() is not threading.main_thread():
            self._host.process.loop.kick()
