"""`Pool` and what its methods return; see `afield.libraries.multiprocessing`."""

from __future__ import annotations

from multiprocessing import TimeoutError  # noqa: A004  # the name that users of a pool catch

from afield.libraries.multiprocessing import AsyncResult, ImapIterator, Pool

__all__ = ["AsyncResult", "ImapIterator", "Pool", "TimeoutError"]
