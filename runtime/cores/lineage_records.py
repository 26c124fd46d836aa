"""What lineage keeps of a task, and what it says of a value that is not made again; `lineage` decides about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

#: Why an object is not made again, where the record does not say it.
NO_TASK = "no task"
DROPPED = "dropped for its size"
USED_UP = "used up"
CONTAINS_OTHERS = "contains others"
#: Whether an execution that lineage has asked for is under way: see `Record.running`.
NOT, ASKED, STARTED = 0, 1, 2
#: What a record takes by itself, in bytes, with its task and the entries of its outputs.
RECORD_BYTES = 1024


class Loss(msgspec.Struct, frozen=True):
    """What happened to a value: the `cause` in words, and `kind` "device" if it went with a device."""

    cause: str
    kind: str = ""


class Record(msgspec.Struct, eq=False):
    """A task that can run again, or why it cannot (`refused`)."""

    task: Any
    outputs: set[bytes]  # those that are stored, or would be if they were made again
    inputs: list[bytes]
    number: int  # grows with time
    size: int  # bytes
    left: int  # how often it may run again; -1: any number of times
    freeable: bool  # whether its outputs may be freed in the trust that it can run again
    refused: str = ""
    running: int = 0  # NOT, ASKED (the effect waits) or STARTED


#: Serialises the error of an object that is lost: (object, its record if there is one, why it is not made again, the loss).
Explain = Callable[[bytes, Record | None, str, Loss], bytes]
