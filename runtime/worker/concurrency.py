"""How an actor's calls run that runs several at once: on threads, or on an event loop.

An actor with `async def` methods runs its calls on an event loop in the worker's main thread, and those of each concurrency
group on one of its own (`event_loops`). Other actors with `max_concurrency` or concurrency groups run their calls on thread
pools (`threads`). All others, and all tasks, are the business of `executor`. All three drive the same `Invocation`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from afield.runtime.face.handles import is_async
from afield.runtime.worker.event_loops import EventLoops
from afield.runtime.worker.host import Host
from afield.runtime.worker.invocation import Invocation
from afield.runtime.worker.threads import Threads

DEFAULT_ASYNC_CONCURRENCY = 1000


class Concurrency(Protocol):
    """Runs the calls of one actor."""

    def construct(self, make: Callable[[], Any]) -> Any:
        """Return the actor that `make` makes, as code of it finds the world that runs later; called in the main thread."""

    def start(self, call: Invocation) -> None:
        """A call arrived; the caller holds the process's lock."""

    def interrupt(self, call: Invocation) -> None:
        """A call is cancelled, or does not start any more; the caller holds the process's lock."""

    def coroutines(self) -> list[tuple[str, Any]]:
        """Return name and object of the coroutines that run."""

    def serve(self) -> None:
        """Block the main thread until `end`."""

    def leaving(self) -> None:
        """The actor ends itself; called by user code of a call, or of what a call has left behind."""

    def end(self) -> None:
        """Finish what has started, and return from `serve`; may be called from any thread."""


def make_concurrency(host: Host, cls: type, options: dict[str, Any]) -> Concurrency | None:
    """Return what runs an actor's calls; None for one at a time."""
    groups: dict[str, int] = options.get("concurrency_groups") or {}
    limit: int = options.get("max_concurrency") or 0
    if is_async(cls):
        return EventLoops(host, limit or DEFAULT_ASYNC_CONCURRENCY, groups)
    if limit > 1 or groups:
        return Threads(host, limit or 1, groups)
    return None
