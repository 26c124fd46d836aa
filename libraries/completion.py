"""`as_completed` and `map_unordered`: results in the order in which they become ready.

Theory of operation. Both are generators around `wait`, and only do something while somebody iterates. They look at a window of
the oldest refs that are not ready, since looking at all of very many again and again would take longer than the tasks.
`map_unordered` submits the next call only while fewer than `backpressure_size` are on their way, so that `items` may be
endless.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import afield

#: So many refs are looked at together. Tasks finish roughly in the order of their submission.
WINDOW = 1000
#: So many calls of `map_unordered` are on their way unless it is told otherwise.
BACKPRESSURE = 100


def as_completed(
    refs: Sequence[Any], *, chunk_size: int = 1, yield_obj_refs: bool = False, **options: Any
) -> Iterator[Any]:
    """Yield the values of refs as they become ready.

    Args:
        refs: different refs.
        chunk_size: wait for so many at a time; they come in the order of `refs`.
        yield_obj_refs: yield the refs in place of their values.
        options: further arguments of `wait`.

    Raises:
        ValueError: `chunk_size` is less than 1, or `options` have `num_returns`.
        TaskError: while iterating: the value that is next is an error, which ends the iteration.
    """
    _check(chunk_size, options)
    return _as_completed(refs, chunk_size, yield_obj_refs, options)


def map_unordered(
    fn: Any,
    items: Iterable[Any],
    *,
    backpressure_size: int | None = BACKPRESSURE,
    chunk_size: int = 1,
    yield_obj_refs: bool = False,
    **options: Any,
) -> Iterator[Any]:
    """Call a remote function, or an actor's method, with each item; yield the results as they become ready.

    Args:
        fn: what has `.remote(item)`.
        items: read one by one, while there is room for another call.
        backpressure_size: so many calls are on their way at most; None for any number.
        chunk_size: wait for so many results at a time.
        yield_obj_refs: yield the refs in place of their values.
        options: further arguments of `wait`.

    Raises:
        ValueError: `backpressure_size` or `chunk_size` is less than 1, or `options` have `num_returns`.
        TaskError: while iterating: the result that is next is an error, which ends the iteration.
    """
    _check(chunk_size, options)
    if backpressure_size is not None and backpressure_size < 1:
        raise ValueError(f"backpressure_size={backpressure_size} must be at least 1, or None for no limit")
    return _map_unordered(fn, items, backpressure_size, chunk_size, yield_obj_refs, options)


def _check(chunk_size: int, options: dict[str, Any]) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    if "num_returns" in options:
        raise ValueError("num_returns= is not for this function; chunk_size= says how many are waited for at a time")


def _as_completed(refs: Iterable[Any], chunk_size: int, as_refs: bool, options: dict[str, Any]) -> Iterator[Any]:
    pending = deque(refs)
    while pending:
        yield from _ready(pending, chunk_size, as_refs, options)


def _map_unordered(
    fn: Any, items: Iterable[Any], limit: int | None, chunk_size: int, as_refs: bool, options: dict[str, Any]
) -> Iterator[Any]:
    pending: deque[Any] = deque()
    for item in items:
        pending.append(fn.remote(item))
        if limit is not None and len(pending) >= limit:
            yield from _ready(pending, chunk_size, as_refs, options)
    yield from _as_completed(pending, chunk_size, as_refs, options)


def _ready(pending: deque[Any], chunk_size: int, as_refs: bool, options: dict[str, Any]) -> Iterator[Any]:
    """Wait for the next ones, and take them out of `pending`; fewer where a timeout ends the wait."""
    window = list(islice(pending, WINDOW))
    ready, rest = afield.wait(window, num_returns=min(chunk_size, len(window)), **options)
    for _ in window:
        pending.popleft()
    pending.extendleft(reversed(rest))
    yield from ready if as_refs else map(afield.get, ready)
