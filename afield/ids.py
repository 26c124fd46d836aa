"""Identifiers.

Ids are plain `bytes`: they are dictionary keys on the hottest paths, and `bytes` hash, compare and travel at C speed.

- A `ProcessID` (8 bytes) is random, made once by each driver, worker and daemon.
- A `TaskID` (16 bytes) is the 12-byte *scope* of the submitting task and a 4-byte counter of its submissions. The scope is
  a hash of the parent's `TaskID`, so a task that is executed again submits children with the same ids; a driver's scope
  is random.
- An `ObjectID` (20 bytes) is its creating `TaskID` and a 4-byte index among the task's outputs. What a `put` makes is
  output `PUT_INDEX` of a task id taken from the same counter.
"""

from __future__ import annotations

import hashlib
import itertools
import os

PROCESS_ID_BYTES = 8
SCOPE_BYTES = 12
TASK_ID_BYTES = 16
OBJECT_ID_BYTES = 20

FIRST_RETURN = (0).to_bytes(4, "big")
PUT_INDEX = (0xFFFFFFFF).to_bytes(4, "big")
ARGUMENTS_INDEX = (0xFFFFFFFE).to_bytes(4, "big")
#: The completion of a streaming task, and the object that stands for its consumer's interest in it.
STREAM_END_INDEX = (0xFFFFFFFD).to_bytes(4, "big")
STREAM_INDEX = (0xFFFFFFFC).to_bytes(4, "big")


def new_process_id() -> bytes:
    """Make a random id for this process."""
    return os.urandom(PROCESS_ID_BYTES)


def object_id(task_id: bytes, index: int) -> bytes:
    """Return the id of output number `index` of a task."""
    return task_id + index.to_bytes(4, "big")


class Scope:
    """Hands out the ids of what one task (or driver) submits, in order; safe to use from several threads."""

    __slots__ = ("_next", "prefix")

    def __init__(self, parent_task_id: bytes | None = None) -> None:
        if parent_task_id is None:
            self.prefix = os.urandom(SCOPE_BYTES)
        else:
            self.prefix = hashlib.blake2b(parent_task_id, digest_size=SCOPE_BYTES).digest()
        self._next = itertools.count().__next__  # one C call: atomic under the interpreter lock

    def next_task_id(self) -> bytes:
        """Return the id of the next submission."""
        return self.prefix + self._next().to_bytes(4, "big")
