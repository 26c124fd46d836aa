"""`Pool` and what its methods return; see `afield.libraries.multiprocessing`."""

from __future__ import annotations

from multiprocessing import JoinableQueue, TimeoutError  # noqa: A004  # names that users of a pool look for here

from afield.libraries.multiprocessing import AsyncResult, ImapIterator, Pool

__all__ = ["AsyncResult", "ImapIterator", "JoinableQueue", "Pool", "TimeoutError"]
