"""The results of a call that yields them: each is written as soon as it is made, so that they are never all in memory.

Theory of operation. A call with `num_returns=N` that returns an iterator (a generator, as a rule) has a `Yields`. It takes the
items one by one: each is pickled, small ones wait inside the reply, large ones go to the store, and then the next one is asked
for. What is there when the iterator raises stays: the error takes the places from there on (`Outcomes.failure`). After the
N-th item it is asked once more, so that what stands behind the last `yield` runs; if there is another item it is closed.
Nobody else knows of what was written before the reply leaves: a cancelled call takes it back, and so does the owner who runs
the task again.

On a thread `run` does this, on an event loop `run_async`, which lets other calls run between two items. An item is pickled
where an interrupt may come; from when it is stored until it is noted none comes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from afield.runtime.process.serialization import Serialized
from afield.runtime.wire import messages
from afield.runtime.worker.outcomes import LoadedCallee, Outcomes, Results
from afield.runtime.worker.streaming import turn_by_turn
from afield.transport.interrupts import interruptible, uninterruptible

_END: Any = object()


class Yields:
    """What one call has yielded.

    Args:
        outcomes: pickles and writes.
        push: what the call was asked for with.
        callee: its function.
        owner: whose its results are.
    """

    __slots__ = ("callee", "outcomes", "owner", "results", "task_id", "writing")

    def __init__(self, outcomes: Outcomes, push: messages.Push, callee: LoadedCallee, owner: bytes) -> None:
        self.outcomes = outcomes
        self.task_id = push.task_id
        self.callee = callee
        self.owner = owner
        self.results = Results()
        #: An item is on its way into the results: what is raised meanwhile is not the iterator's.
        self.writing = False

    @interruptible
    def run(self, holder: list[Any]) -> None:
        """Write what the iterator in `holder` makes.

        Raises:
            ValueError: there are too few items.
        """
        items = iter(holder.pop())
        for _ in range(self.callee.num_returns):
            holder.append(next(items, _END))
            if holder[0] is _END:
                raise self._too_few()
            self._write(holder)
        if next(items, _END) is not _END and hasattr(items, "close"):
            items.close()

    async def run_async(self, value: Any) -> None:
        """Do the same on an event loop, also for an asynchronous iterator.

        Raises:
            ValueError: there are too few items.
        """
        asynchronous = hasattr(value, "__anext__")
        items: AsyncIterator[Any] = value if asynchronous else turn_by_turn(value)
        for _ in range(self.callee.num_returns):
            holder = [await anext(items, _END)]
            if holder[0] is _END:
                raise self._too_few()
            self._write(holder)
        if await anext(items, _END) is not _END:
            if hasattr(items, "aclose"):
                await items.aclose()
            if not asynchronous and hasattr(value, "close"):
                value.close()

    def _too_few(self) -> ValueError:
        expected, came = self.callee.num_returns, len(self.results.made)
        return ValueError(f"{self.callee.name}() has num_returns={expected} and yielded only {came} values")

    def _write(self, holder: list[Any]) -> None:
        """Write the item in `holder`, which is emptied."""
        self.writing = True
        self._add(holder, self.outcomes.pickled(holder[0], self.callee.name))
        self.writing = False

    @uninterruptible
    def _add(self, holder: list[Any], value: Serialized) -> None:
        self.outcomes.add(self.results, holder, value, self.task_id, self.owner)
        holder.clear()


def is_iterator(value: Any) -> bool:
    """Tell whether what a call has returned makes its results one by one."""
    return hasattr(value, "__next__") or hasattr(value, "__anext__")
