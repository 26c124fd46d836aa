"""`ActorPool`: hand values to whichever actor of a group is free.

Theory of operation. An actor is idle, or busy with one call. A submitted value goes to an idle actor, or waits for one; an
actor is found to be free again when a result is asked for, so the pool needs no thread: it moves on while somebody waits
for results. Results are remembered in the order of submission, so both orders of getting them can be mixed freely.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import afield
from afield.tracebacks import trim, unseen

#: Makes a call: `lambda actor, value: actor.method.remote(value)`. A method with several returns gives a list of refs.
Call = Callable[[Any, Any], Any]


class ActorPool:
    """A group of actors that share work. For one thread at a time.

    Args:
        actors: handles; they must not be used elsewhere if the work is to be spread evenly.

    Raises:
        ValueError: an actor is there twice.
    """

    def __init__(self, actors: Iterable[Any]) -> None:
        self._idle: list[Any] = []
        self._busy: dict[afield.ObjectRef, Any] = {}  # a call that may be running -> its actor
        # A call -> what `get` takes for its result: the call itself, or the refs of all its returns. Ordered as submitted.
        self._unreturned: dict[afield.ObjectRef, afield.ObjectRef | list[afield.ObjectRef]] = {}
        self._waiting: deque[tuple[Call, Any]] = deque()
        for actor in actors:
            self.push(actor)

    def map(self, fn: Call, values: Iterable[Any]) -> Iterator[Any]:
        """Submit all values now; return an iterator over the results in the order of `values`.

        Results of earlier calls that nobody fetched are given up.

        Args:
            fn: ``lambda actor, value: actor.method.remote(value)``.
            values: one for each call.
        """
        return self._map(fn, values, self.get_next)

    def map_unordered(self, fn: Call, values: Iterable[Any]) -> Iterator[Any]:
        """Like `map`, with the results in the order in which they become ready."""
        return self._map(fn, values, self.get_next_unordered)

    def _map(self, fn: Call, values: Iterable[Any], get_next: Callable[[], Any]) -> Iterator[Any]:
        self._waiting.clear()
        self._unreturned.clear()
        for value in values:
            self.submit(fn, value)

        def results() -> Iterator[Any]:
            try:
                while self.has_next():
                    yield get_next()
            except afield.AfieldError as error:
                trim(error)
                raise

        return results()

    @unseen
    def submit(self, fn: Call, value: Any) -> None:
        """Call an idle actor with the value, or remember it until one is idle.

        Raises:
            TypeError: `fn` returned neither an ObjectRef nor a list of them.
        """
        self._waiting.append((fn, value))
        self._call_idle()

    def has_next(self) -> bool:
        """Tell whether results are left to be fetched."""
        return bool(self._unreturned or self._waiting)

    @unseen
    def get_next(self, timeout: float | None = None, ignore_if_timedout: bool = False) -> Any:
        """Return the next result in the order of submission.

        Args:
            timeout: seconds.
            ignore_if_timedout: give the result up if it is not there in time; it is still an error.

        Raises:
            StopIteration: there are no more results.
            GetTimeoutError: not ready in time.
            TaskError: the call raised.
        """
        return self._next(timeout, ignore_if_timedout, lambda: next(iter(self._unreturned)))

    @unseen
    def get_next_unordered(self, timeout: float | None = None, ignore_if_timedout: bool = False) -> Any:
        """Return whichever result is ready first. See `get_next`."""
        return self._next(timeout, ignore_if_timedout, self._any_ready)

    def has_free(self) -> bool:
        """Tell whether an actor is idle and nothing waits for it."""
        return bool(self._idle) and not self._waiting

    def pop_idle(self) -> Any:
        """Take an idle actor out of the pool; None if there is none."""
        return self._idle.pop() if self.has_free() else None

    @unseen
    def push(self, actor: Any) -> None:
        """Add an actor.

        Raises:
            ValueError: it is in the pool already.
        """
        if actor in self._idle or actor in self._busy.values():
            raise ValueError(f"{actor!r} belongs to the pool already")
        self._idle.append(actor)
        self._call_idle()

    def _call_idle(self) -> None:
        while self._waiting and self._idle:
            fn, value = self._waiting.popleft()
            actor = self._idle.pop()
            try:
                result = fn(actor, value)
                refs = list(result) if isinstance(result, list | tuple) else [result]
                if not refs or not all(isinstance(ref, afield.ObjectRef) for ref in refs):
                    raise TypeError(f"fn must return the ObjectRef of a call, or those of its returns, not {result!r}")
            except BaseException:
                self._idle.append(actor)
                raise
            # All returns of a call come with its one reply, so any of them stands for it.
            self._busy[refs[0]] = actor
            self._unreturned[refs[0]] = refs[0] if result is refs[0] else refs

    def _next(self, timeout: float | None, ignore: bool, choose: Callable[[], afield.ObjectRef | None]) -> Any:
        if not self.has_next():
            raise StopIteration("no more results to get")
        if not self._unreturned and not self._busy:
            raise ValueError("the pool has no actors to run what was submitted")
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            chosen = choose() if self._unreturned else None
            if chosen is not None and chosen not in self._busy:
                return afield.get(self._unreturned.pop(chosen))
            if not self._free_one(deadline):
                break
        message = f"no result after {timeout:g} s"
        if ignore and self._unreturned:
            given_up = next(iter(self._unreturned))
            del self._unreturned[given_up]
            message += f"; {given_up!r} was given up"
        raise afield.GetTimeoutError(message)

    def _any_ready(self) -> afield.ObjectRef | None:
        return next((ref for ref in self._unreturned if ref not in self._busy), None)

    def _free_one(self, deadline: float | None) -> bool:
        """Wait for any call to end and give its actor the next one; tell whether that happened in time."""
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready, _ = afield.wait(list(self._busy), timeout=left)
        for ref in ready:
            self._idle.append(self._busy.pop(ref))
        self._call_idle()
        return bool(ready)
