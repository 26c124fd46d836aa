"""`afield.Executor`: a `concurrent.futures.Executor` whose calls are afield tasks.

Theory of operation. Each call becomes one task that gets the callable as an argument, and its future is settled by the
task's ref. Up to `max_workers` calls are with the cluster at a time, the others wait in the driver (see `lanes`); without
a bound of the user's there is one so large that it only keeps the cluster's queues in check.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

import afield
from afield.libraries.lanes import Lanes, batched, call_each

#: Calls that are with the cluster at a time if the user sets no bound: enough to keep any machine busy.
MAX_IN_FLIGHT = 10_000

P = ParamSpec("P")
R = TypeVar("R")


class Executor(concurrent.futures.Executor):
    """Run calls as afield tasks, in place of a `ProcessPoolExecutor`.

    A future stays pending until its result is there, and `cancel()` works until then: it also interrupts a call that is
    running. ObjectRefs among the arguments of `submit` are resolved first, as in every task. Leaving the program without
    `shutdown()` drops what has not finished.

    Args:
        max_workers: how many calls run at a time at most; as many as the cluster has room for by default.
        options: of the tasks, as in `@afield.remote`: `num_cpus`, `num_gpus`, `max_retries`, ...

    Raises:
        ValueError: `max_workers` is less than 1.
        InvalidOptionError: an option is not known or not valid.
    """

    def __init__(self, max_workers: int | None = None, **options: Any) -> None:
        if max_workers is not None and max_workers < 1:
            raise ValueError(f"max_workers={max_workers!r} must be at least 1")
        if "num_returns" in options:
            raise afield.InvalidOptionError("num_returns: a call of an executor has one result, its future's")

        @functools.lru_cache(maxsize=256)
        def task(name: str) -> Any:
            return afield.remote(_call).options(**{"name": name, **options})

        task("call")  # a wrong option is told here
        self._task = task
        self._lanes = Lanes([self._lane] * (max_workers or MAX_IN_FLIGHT))

    def _lane(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(function, "__qualname__", type(function).__qualname__)
        return self._task(name).remote(function, *args, **kwargs)

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Schedule ``fn(*args, **kwargs)``; an argument that cannot be pickled is an error of the future.

        Raises:
            RuntimeError: after `shutdown`.
        """
        return self._lanes.submit(fn, args, kwargs)

    def map(
        self, fn: Callable[..., R], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1
    ) -> Iterator[R]:
        """Return the results of ``fn`` for the zipped iterables, in their order; everything is submitted at once.

        Args:
            fn: takes as many arguments as there are iterables.
            iterables: the arguments.
            timeout: seconds from now in which each result must be there.
            chunksize: how many calls one task makes; more than 1 pays for short calls.

        Raises:
            TimeoutError: while iterating, when `timeout` is over.
            ValueError: `chunksize` is less than 1.
        """
        if chunksize < 1:
            raise ValueError(f"chunksize={chunksize!r} must be at least 1")
        if chunksize == 1:
            return super().map(fn, *iterables, timeout=timeout)
        run_chunk = functools.partial(call_each, fn)
        functools.update_wrapper(run_chunk, fn)  # its name is what errors and output show
        chunks = super().map(run_chunk, batched(zip(*iterables, strict=False), chunksize), timeout=timeout)
        return itertools.chain.from_iterable(chunks)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more calls.

        Args:
            wait: return only when every future is done and no call runs any more.
            cancel_futures: cancel all that are not done, also those whose calls are running.
        """
        self._lanes.close()
        if cancel_futures:
            self._lanes.cancel_all()
        if wait:
            self._lanes.wait()


def _call(function: Callable[..., R], /, *args: Any, **kwargs: Any) -> R:
    return function(*args, **kwargs)
