"""Calls that wait for a free lane: what the executor and the process pool have in common.

Theory of operation. A lane is whatever runs one call at a time and answers with its `ObjectRef`: a share of the cluster,
or an actor. `Lanes.submit` queues a call and returns a future; a call leaves the queue when a lane is free, and its lane
is free again when its ref has a value or an error. That is the only event, and it comes through `ref.future()`: nothing
polls, and no thread is kept.

A lane whose actor is away takes no calls until it is back, as the queue would run dry on it: `until_back` gives a ref that
tells. What was handed over to it meanwhile, and has not run, stands first in the queue again.

A future is pending until its result is there, because only the worker knows whether a call has started. So `cancel()`
succeeds until then: a call that waits is forgotten, one that was handed over is cancelled with `afield.cancel` (it never
starts, or is interrupted). The future is done at once, its lane only when the cluster has let go of the call.

Nothing here calls out while it holds the lock: the callbacks of futures may submit, cancel and close.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

import cloudpickle

import afield

T = TypeVar("T")

#: Starts a call of (function, positional arguments, keyword arguments); returns its ref.
Lane = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
#: A call that is made, and the future that gets its outcome.
Queued = tuple[Future[Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Lanes:
    """A queue of calls before a fixed number of lanes. Safe in all threads.

    Args:
        lanes: what runs the calls.
        until_back: called with a lane whose actor restarts; returns a ref that is done when it is back, or will never be.
    """

    def __init__(self, lanes: Iterable[Lane], until_back: Callable[[Any], Any] | None = None) -> None:
        self._until_back = until_back
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._free = deque(lanes)
        self._waiting: deque[Queued] = deque()
        #: The ref of each future that is not done; None until its call is handed over.
        self._unfinished: dict[Future[Any], Any] = {}
        self._running = 0  # calls that the cluster has not let go of
        self._closed = False

    def submit(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Future[Any]:
        """Queue a call; an error of handing it over becomes the future's.

        Raises:
            RuntimeError: `close` was called.
        """
        future: Future[Any] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("cannot schedule new calls after shutdown")
            self._unfinished[future] = None
            self._waiting.append((future, function, args, kwargs))
        future.add_done_callback(self._on_done)
        self._hand_over()
        return future

    def close(self) -> None:
        """Accept no more calls; those that there are go on."""
        with self._lock:
            self._closed = True

    def cancel_all(self) -> None:
        """Cancel every call that has not finished."""
        with self._lock:
            unfinished = list(self._unfinished)
        for future in unfinished:
            future.cancel()

    def wait(self) -> None:
        """Wait until every future is done and no call runs any more, also none that was cancelled."""
        with self._idle:
            self._idle.wait_for(lambda: not (self._unfinished or self._running))

    def _hand_over(self) -> None:
        while True:
            with self._lock:
                while self._waiting and self._waiting[0][0] not in self._unfinished:
                    self._waiting.popleft()  # cancelled
                if not (self._waiting and self._free):
                    return
                queued = self._waiting.popleft()
                lane = self._free.popleft()
            self._start(lane, queued)

    def _start(self, lane: Lane, queued: Queued) -> None:
        future, function, args, kwargs = queued
        try:
            ref = lane(function, args, kwargs)
            outcome = ref.future()
        except Exception as error:
            with self._lock:
                self._free.append(lane)
            _settle(future, None, error)
            del future, queued  # its error holds this frame: no cycle
            return
        with self._lock:
            self._running += 1
            cancelled = future not in self._unfinished
            if not cancelled:
                self._unfinished[future] = ref
        if cancelled:
            afield.cancel(ref)
        outcome.add_done_callback(functools.partial(self._on_outcome, lane, queued))

    def _on_outcome(self, lane: Lane, queued: Queued, outcome: Future[Any]) -> None:
        error = outcome.exception()
        # What the call itself has raised is a `TaskError` as well, and says nothing of the lane.
        if type(error) is afield.ActorUnavailableError and self._until_back is not None:
            self._wait_for(lane, self._until_back)
            if not error.may_have_run:
                self._put_back(queued)
                return
        else:
            with self._lock:
                self._free.append(lane)
        self._hand_over()  # first: the callbacks of `future` are the user's and may take their time
        _settle(queued[0], None if error else outcome.result(), error)
        self._has_let_go()

    def _has_let_go(self) -> None:
        with self._idle:
            self._running -= 1
            self._idle.notify_all()

    def _put_back(self, queued: Queued) -> None:
        """A call has not run: it is the next to leave, unless it was cancelled meanwhile."""
        with self._lock:
            if queued[0] in self._unfinished:
                self._unfinished[queued[0]] = None
                self._waiting.appendleft(queued)
        self._has_let_go()
        self._hand_over()

    def _wait_for(self, lane: Lane, until_back: Callable[[Any], Any]) -> None:
        """Use a lane again when its actor is back; if it will never be, the calls that come to it are told why."""

        def back(_: Any) -> None:
            with self._lock:
                self._free.append(lane)
            self._hand_over()

        try:
            until_back(lane).future().add_done_callback(back)
        except Exception:  # the session is over: so are the calls
            back(None)

    def _on_done(self, future: Future[Any]) -> None:
        with self._idle:
            ref = self._unfinished.pop(future)
            self._idle.notify_all()
        if future.cancelled():
            future.set_running_or_notify_cancel()  # only now do `concurrent.futures.wait` and its like see it
            if ref is not None:
                afield.cancel(ref)


def _settle(future: Future[Any], result: Any, error: BaseException | None) -> None:
    try:
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
    except InvalidStateError:
        pass  # cancelled in the meantime


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of `size`; the last may be shorter."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def call_each(function: Callable[..., T], chunk: list[tuple[Any, ...]]) -> list[T]:
    """Call the function with each tuple of arguments: many short calls in one."""
    return [function(*args) for args in chunk]


def try_each(function: Callable[..., T], chunk: list[tuple[Any, ...]]) -> list[T | Exception]:
    """Like `call_each`, with the exception in place of the result where the function raised."""
    return [_try(function, args) for args in chunk]


def _try(function: Callable[..., T], args: tuple[Any, ...]) -> T | Exception:
    try:
        return function(*args)
    except Exception as error:
        try:
            cloudpickle.loads(cloudpickle.dumps(error))
        except Exception as failure:  # it would take the results of the whole chunk with it
            kind = type(error)
            return RuntimeError(
                f"{kind.__module__}.{kind.__qualname__} was raised, and cannot be sent: {type(failure).__name__}"
            )
        return error.with_traceback(None)
