"""What a push names, as its caller keeps it."""

from __future__ import annotations

import copy
import itertools

from afield.runtime.values.definitions import Definition
from afield.runtime.wire import messages

#: Which errors of the user's are to be retried: all, none, or packed types, which only the worker unpacks.
RetryOn = bool | bytes


class Callee:
    """What a push names: a remote function, or an actor's method (then its definition is empty)."""

    __slots__ = (
        "__weakref__",
        "_alone",
        "backpressure",
        "definition",
        "group",
        "index",
        "method",
        "name",
        "num_returns",
        "once",
        "order",
        "retry_on",
    )

    _indexes = itertools.count(1)

    def __init__(
        self,
        name: str,
        definition: Definition,
        num_returns: int,
        backpressure: int = 0,
        group: str = "",
        retry_on: RetryOn = False,
        once: bool = False,
        order: str | None = "",
        method: str = "",
    ) -> None:
        self.index = next(Callee._indexes)
        self.name = name
        self.definition = definition
        self.num_returns = num_returns
        self.backpressure = backpressure
        self.group = group
        self.retry_on = retry_on
        self.method = method
        self.once = once
        #: Of an actor's method: its calls leave in order with all that have the same; None: as soon as they can.
        self.order = order
        self._alone: Callee | None = None

    def alone(self) -> Callee:
        """Return what names the same, for calls before which their worker sends all replies, and after them theirs.

        For a task whose worker died: should it end the next one too, it is the oldest there without a reply.
        """
        if self.once:
            return self
        if self._alone is None:
            alone = copy.copy(self)
            alone.index, alone.once = next(Callee._indexes), True
            self._alone = alone
        return self._alone

    def define(self, known: bool) -> messages.Define:
        """Return the message that makes a worker know it; `known`: it has the definition already."""
        return messages.Define(
            self.index,
            self.name,
            b"" if known else self.definition.blob,
            self.num_returns,
            self.backpressure,
            self.group,
            self.once,
            self.retry_on,
            self.method,
            self.definition.digest,
        )
