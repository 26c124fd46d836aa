"""`Pool`: `multiprocessing.Pool` with actors for processes.

Theory of operation. Each process of the pool is an actor and a lane (see `lanes`): calls wait in the driver, and go to
whichever process is free. `map` and its like cut their items into chunks, and a chunk is one call. An `AsyncResult` waits
for the futures of its chunks; the iterator of `imap` keeps a few chunks running ahead of its reader, and no more, so that
it can run over more than would fit into memory.

A process that dies fails the call that it ran, and is started again with the initializer; it gets the next call when it is
there. A call that was made to it meanwhile has not run, and goes to the next that is free. A process takes no CPU from the
cluster's account unless `remote_args` says so: an idle pool does not keep tasks from running.

A process has the `authkey` of the program that made the pool, as its children have: without it the queues and other proxies
of a `multiprocessing.Manager` can be passed to it, but not be used there.
"""

from __future__ import annotations

import concurrent.futures
import functools
import math
import multiprocessing
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import afield
from afield.libraries.lanes import Lanes, batched, call_each, try_each
from afield.tracebacks import unseen

#: `map` cuts its items into about so many chunks per process: few calls, but a slow chunk does not hold up everything.
CHUNKS_PER_PROCESS = 4
#: `imap` has so many chunks per process running or ready ahead of its reader.
AHEAD_PER_PROCESS = 2

Callback = Callable[[Any], object] | None


class ResultTimeoutError(afield.GetTimeoutError, multiprocessing.TimeoutError):
    """The result was not ready in time; also a `multiprocessing.TimeoutError` and a `TimeoutError`."""


class CallCancelledError(afield.TaskCancelledError, concurrent.futures.CancelledError):
    """The pool was terminated before the call had ended; also a `concurrent.futures.CancelledError`."""


class _Process:
    def __init__(self, authkey: bytes, initializer: Callable[..., object] | None, initargs: tuple[Any, ...]) -> None:
        multiprocessing.current_process().authkey = authkey
        if initializer is not None:
            initializer(*initargs)

    def ready(self) -> None:
        """Do nothing, once the initializer has run."""

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return function(*args, **kwargs)


class _ProcessLane:
    """Runs calls in one process at a time, and replaces it after `max_calls`."""

    def __init__(self, create: Callable[[], Any], max_calls: float) -> None:
        self._create = create
        self._max_calls = self._left = max_calls
        self._actor = create()

    def __call__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._left == 0:
            self.end()
            self._actor, self._left = self._create(), self._max_calls
        self._left -= 1
        return self._actor.run.remote(function, args, kwargs)

    def ready(self) -> Any:
        """Return a ref that is done when the process is there; it waits for a restart, since it is safe to run twice."""
        return self._actor.ready.options(max_task_retries=-1).remote()

    def end(self) -> None:
        afield.kill(self._actor)


class AsyncResult:
    """What the `..._async` methods return."""

    def __init__(
        self,
        futures: list[Future[Any]],
        combine: Callable[[list[Any]], Any],
        callback: Callback,
        error_callback: Callback,
    ) -> None:
        self._futures = futures
        self._combine = combine
        self._callbacks = callback, error_callback
        self._value: Any = None
        self._error: BaseException | None = None
        self._done = threading.Event()
        self._lock = threading.Lock()
        # One more than there are futures: the last to count down, perhaps this line, finishes.
        self._missing = len(futures) + 1
        for future in futures:
            future.add_done_callback(self._count_down)
        self._count_down()

    @unseen
    def get(self, timeout: float | None = None) -> Any:
        """Return the result, or raise what the call raised.

        Args:
            timeout: seconds.

        Raises:
            multiprocessing.TimeoutError: not ready in time.
            TaskError: the function raised; also an instance of what it raised.
            TaskCancelledError: the pool was terminated; also a `concurrent.futures.CancelledError`.
        """
        if not self._done.wait(timeout):
            raise ResultTimeoutError(f"the result was not ready after {timeout:g} s")
        if self._error is not None:
            raise self._error
        return self._value

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the result is ready, or `timeout` seconds."""
        self._done.wait(timeout)

    def ready(self) -> bool:
        """Tell whether the call is done."""
        return self._done.is_set()

    def successful(self) -> bool:
        """Tell whether the call is done without an error.

        Raises:
            ValueError: it is not done.
        """
        if not self.ready():
            raise ValueError(f"{self!r} not ready")
        return self._error is None

    def _count_down(self, _: Any = None) -> None:
        with self._lock:
            self._missing -= 1
            if self._missing:
                return
        callback, error_callback = self._callbacks
        try:
            try:
                self._value = self._combine([_outcome(future) for future in self._futures])
            except Exception as error:
                self._error = error
            self._futures = []
            if self._error is not None:
                if error_callback is not None:
                    error_callback(self._error)
            elif callback is not None:
                callback(self._value)
        finally:
            self._done.set()  # last: who was waiting finds that the callback has run


class ImapIterator:
    """What `imap` and `imap_unordered` return. For one thread at a time.

    An item for which the function raised is the exception, not raised, as in Ray: one bad item among a million ends no
    loop. Who wants it raised uses `map`, or raises it.
    """

    def __init__(self, submit: Callable[[Any], Future[Any]], chunks: Iterator[Any], ahead: int, ordered: bool) -> None:
        self._submit = submit
        self._chunks = chunks
        self._ahead = ahead
        self._ordered = ordered
        #: The future of each chunk, and how many items it has.
        self._running: dict[Future[Any], int] = {}
        self._values: deque[Any] = deque()
        self._run_ahead()

    def __iter__(self) -> ImapIterator:
        return self

    @unseen
    def __next__(self) -> Any:
        return self.next()

    @unseen
    def next(self, timeout: float | None = None) -> Any:
        """Return the next result, or the exception that the function raised instead.

        Args:
            timeout: seconds.

        Raises:
            StopIteration: there are no more.
            multiprocessing.TimeoutError: not ready in time.
        """
        while not self._values:
            if not self._running:
                raise StopIteration
            candidates = [next(iter(self._running))] if self._ordered else list(self._running)
            done, _ = concurrent.futures.wait(candidates, timeout, concurrent.futures.FIRST_COMPLETED)
            if not done:
                raise ResultTimeoutError(f"the next result was not ready after {timeout:g} s")
            future = done.pop()
            items = self._running.pop(future)
            self._run_ahead()
            try:
                self._values.extend(_outcome(future))
            except Exception as error:  # the whole chunk is lost: its process died, or its results cannot be pickled
                self._values.extend([error] * items)
        return self._values.popleft()

    def _run_ahead(self) -> None:
        while len(self._running) < self._ahead:
            try:
                chunk = next(self._chunks)
            except StopIteration:
                return
            self._running[self._submit(chunk)] = len(chunk)


class Pool:
    """A pool of processes, as in `multiprocessing`.

    Args:
        processes: how many; the cluster's CPUs by default.
        initializer: called in each process when it starts.
        initargs: its arguments.
        maxtasksperchild: a process is replaced after so many calls (chunks, for the methods that cut their items).
        context: there for compatibility; processes are always the cluster's.
        ray_address: there for compatibility; None, "auto" and "local" are this session.
        remote_args: options of the processes' actors: `num_cpus`, `num_gpus`, `resources`, ...
        ray_remote_args: another name of `remote_args`.

    Raises:
        ValueError: `processes` or `maxtasksperchild` is less than 1.
        InvalidOptionError: an option in `remote_args` is not known or not valid.
    """

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: Any = None,
        ray_address: str | None = None,
        ray_remote_args: Mapping[str, Any] | None = None,
        *,
        remote_args: Mapping[str, Any] | None = None,
    ) -> None:
        if ray_address not in (None, "auto", "local"):
            raise afield.InvalidOptionError(
                f"ray_address={ray_address!r}: a pool runs in the session of its own program"
            )
        count = max(1, int(afield.cluster_resources().get("CPU", 1))) if processes is None else processes
        if count < 1:
            raise ValueError(f"processes={processes!r}: at least 1 is needed")
        if maxtasksperchild is not None and maxtasksperchild < 1:
            raise ValueError(f"maxtasksperchild={maxtasksperchild!r} must be at least 1 or None")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        actor_class = afield.remote(_Process).options(
            **{"max_restarts": -1, **(ray_remote_args or {}), **(remote_args or {})}
        )
        authkey = bytes(multiprocessing.current_process().authkey)
        create = functools.partial(actor_class.remote, authkey, initializer, tuple(initargs))
        self._processes = [_ProcessLane(create, maxtasksperchild or math.inf) for _ in range(count)]
        if (
            initializer is not None
        ):  # it has run everywhere, or failed, when there is a pool; its error is that of the calls
            afield.wait([process.ready() for process in self._processes], num_returns=count)
        self._lanes = Lanes(self._processes, _ProcessLane.ready)
        self._state = "running"

    # -- calls -------------------------------------------------------------------------------------------------------

    @unseen
    def apply(self, func: Callable[..., Any], args: Iterable[Any] = (), kwds: Mapping[str, Any] | None = None) -> Any:
        """Call `func` in a process and wait for its result."""
        return self.apply_async(func, args, kwds).get()

    def apply_async(
        self,
        func: Callable[..., Any],
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] | None = None,
        callback: Callback = None,
        error_callback: Callback = None,
    ) -> AsyncResult:
        """Call `func` in a process.

        `callback` is called with the result, or `error_callback` with the error, in a thread of the runtime's: they should
        be quick.

        Raises:
            ValueError: the pool is closed.
        """
        self._check_running()
        future = self._lanes.submit(func, tuple(args), dict(kwds or {}))
        return AsyncResult([future], lambda results: results[0], callback, error_callback)

    @unseen
    def map(self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int | None = None) -> list[Any]:
        """Return the results of `func` for each item, in their order."""
        results: list[Any] = self.map_async(func, iterable, chunksize).get()
        return results

    def map_async(
        self,
        func: Callable[[Any], Any],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callback = None,
        error_callback: Callback = None,
    ) -> AsyncResult:
        """Like `map`, without waiting. For the callbacks see `apply_async`."""
        return self.starmap_async(func, ((item,) for item in iterable), chunksize, callback, error_callback)

    @unseen
    def starmap(
        self, func: Callable[..., Any], iterable: Iterable[Iterable[Any]], chunksize: int | None = None
    ) -> list[Any]:
        """Like `map`, with items that are the arguments."""
        results: list[Any] = self.starmap_async(func, iterable, chunksize).get()
        return results

    def starmap_async(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        callback: Callback = None,
        error_callback: Callback = None,
    ) -> AsyncResult:
        """Like `starmap`, without waiting. For the callbacks see `apply_async`.

        Raises:
            ValueError: the pool is closed, or `chunksize` is less than 1.
        """
        self._check_running()
        if chunksize is not None:
            _check_chunksize(chunksize)
        items = [tuple(args) for args in iterable]
        if chunksize is None:
            chunksize = max(1, math.ceil(len(items) / (CHUNKS_PER_PROCESS * len(self._processes))))
        futures = [self._submit_chunk(func, chunk) for chunk in batched(items, chunksize)]
        return AsyncResult(futures, _flatten, callback, error_callback)

    def imap(self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int = 1) -> ImapIterator:
        """Return an iterator over the results in the order of the items.

        It takes items only a little ahead of its reader: those that it did not come to when it is dropped are never called.
        Where the function raised, the item is the exception.

        Raises:
            ValueError: the pool is closed, or `chunksize` is less than 1.
        """
        return self._imap(func, iterable, chunksize, ordered=True)

    def imap_unordered(self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int = 1) -> ImapIterator:
        """Like `imap`, with the results in the order in which they become ready."""
        return self._imap(func, iterable, chunksize, ordered=False)

    def _imap(self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int, ordered: bool) -> ImapIterator:
        self._check_running()
        _check_chunksize(chunksize)
        chunks = batched(((item,) for item in iterable), chunksize)
        ahead = AHEAD_PER_PROCESS * len(self._processes)
        return ImapIterator(functools.partial(self._submit_chunk, func, each=try_each), chunks, ahead, ordered)

    def _submit_chunk(
        self, func: Callable[..., Any], chunk: list[tuple[Any, ...]], each: Callable[..., list[Any]] = call_each
    ) -> Future[Any]:
        return self._lanes.submit(each, (func, chunk), {})

    # -- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Accept no more calls; those that there are go on."""
        if self._state == "running":
            self._state = "closed"

    def terminate(self) -> None:
        """End the processes at once; what is not finished fails with `TaskCancelledError`."""
        self.close()
        self._end()

    def join(self) -> None:
        """Wait for all calls and end the processes. An iterator of `imap` must have been read to its end.

        Raises:
            ValueError: neither `close` nor `terminate` was called.
        """
        if self._state == "running":
            raise ValueError("the pool is still running; call close() or terminate() first")
        self._lanes.wait()
        self._end()

    def _end(self) -> None:
        self._lanes.close()
        self._lanes.cancel_all()
        if self._state != "ended" and afield.is_initialized():
            for process in self._processes:
                process.end()
        self._state = "ended"

    def _check_running(self) -> None:
        if self._state != "running":
            raise ValueError("the pool is not running: it was closed or terminated")

    def __enter__(self) -> Pool:
        self._check_running()
        return self

    def __exit__(self, *_: object) -> None:
        self.terminate()


def _outcome(future: Future[Any]) -> Any:
    try:
        return future.result()
    except concurrent.futures.CancelledError as error:
        raise CallCancelledError("the pool was terminated before the call had ended") from error


def _check_chunksize(chunksize: int) -> None:
    if chunksize < 1:
        raise ValueError(f"chunksize={chunksize!r} must be at least 1")


def _flatten(chunks: list[list[Any]]) -> list[Any]:
    return [result for chunk in chunks for result in chunk]
