"""`ActorPool`: hand values to whichever actor of a group is free.

Theory of operation. An actor is idle, or busy with one call. A submitted value goes to an idle actor, or waits for one; an
actor is found to be free again when a result is asked for, so the pool needs no thread: it moves on while somebody waits
for results. Results are remembered in the order of submission, so both orders of getting them can be mixed freely.

An actor that is dead would be free again at once after each call, and fail all that waits. That it is dead shows in two
places: where the user gets the error of the call that it died in, and, before that, where a new call is ready as soon as it
is made; then its last call is looked at. It leaves the pool, and the new call, which cannot have run, is made to another
actor. The last actor stays, so that there is an error for each call and not a pool that answers nothing.
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
        self._last: dict[Any, afield.ObjectRef] = {}  # an idle actor -> its last call, till its result is got
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
        self._last.clear()
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
        if not self.has_free():
            return None
        actor = self._idle.pop()
        self._last.pop(actor, None)
        return actor

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
            last = self._last.pop(actor, None)
            if last is not None and (self._idle or self._busy) and afield.wait(refs[:1], timeout=0)[0]:
                if _died(actor, self._unreturned[last]):
                    self._waiting.appendleft((fn, value))
                    continue
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
                return self._take(chosen)
            if not self._free_one(deadline):
                break
        message = f"no result after {timeout:g} s"
        if ignore and self._unreturned:
            given_up = next(iter(self._unreturned))
            del self._unreturned[given_up]
            self._forget(given_up)
            message += f"; {given_up!r} was given up"
        raise afield.GetTimeoutError(message)

    def _take(self, ref: afield.ObjectRef) -> Any:
        actor = self._forget(ref)
        try:
            return afield.get(self._unreturned.pop(ref))
        except afield.ActorDiedError as error:
            if actor is not None and _is_of(error, actor) and (len(self._idle) > 1 or self._busy):
                self._idle.remove(actor)
            raise

    def _forget(self, ref: afield.ObjectRef) -> Any:
        """A result is not kept any more: return the actor if this was its last call, and it is idle."""
        actor = next((actor for actor, last in self._last.items() if last == ref), None)
        self._last.pop(actor, None)
        return actor

    def _any_ready(self) -> afield.ObjectRef | None:
        return next((ref for ref in self._unreturned if ref not in self._busy), None)

    def _free_one(self, deadline: float | None) -> bool:
        """Wait for any call to end and give its actor the next one; tell whether that happened in time."""
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready, _ = afield.wait(list(self._busy), timeout=left)
        for ref in ready:
            actor = self._busy.pop(ref)
            self._idle.append(actor)
            if ref in self._unreturned:
                self._last[actor] = ref
        self._call_idle()
        return bool(ready)


def _died(actor: Any, result: afield.ObjectRef | list[afield.ObjectRef]) -> bool:
    """Tell whether a call that has ended found its actor dead, or ended with it."""
    try:
        afield.get(result)
    except afield.ActorDiedError as error:
        return _is_of(error, actor)
    except Exception:
        return False
    return False


def _is_of(error: afield.ActorDiedError, actor: Any) -> bool:
    return bool(error.actor_id == actor._actor_id.hex())  # and not of an actor that a method has called
