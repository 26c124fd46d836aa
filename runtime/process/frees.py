"""Stored values that nobody can reach any more: they are freed in batches, as each message wakes the daemon.

While values come and go in quick succession the frees of a moment leave together; what somebody may wait for leaves at once.
"""

from __future__ import annotations

from collections.abc import Callable

#: While frees follow one another they leave together: not later than this, and not more than this many.
FREE_DELAY_S, MAX_FREED = 0.002, 64


class Frees:
    """What is to be freed.

    Args:
        send: tells the daemon.
    """

    __slots__ = ("_due", "_send", "waiting")

    def __init__(self, send: Callable[[list[bytes]], None]) -> None:
        self._send = send
        self._due = 0.0  # monotonic seconds
        self.waiting: list[bytes] = []

    def add(self, object_id: bytes, *, soon: bool) -> None:
        """Free an object, at the next opportunity if it is `soon`."""
        self.waiting.append(object_id)
        if soon:
            self._due = 0.0

    def tick(self, now: float) -> float | None:
        """Send what is due; return when the rest will be."""
        if len(self.waiting) >= MAX_FREED or now >= self._due:
            self.flush()
            self._due = now + FREE_DELAY_S
            return None
        return self._due

    def flush(self) -> None:
        """Send all."""
        if self.waiting:
            object_ids, self.waiting = self.waiting, []
            self._send(object_ids)
