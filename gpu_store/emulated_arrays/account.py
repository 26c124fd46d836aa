"""How much of an emulated device's memory is in use.

Theory of operation. Bytes are given back from `__del__`, which runs at any moment in any thread: it only appends to a queue,
and whoever next looks at the account drains it. What runs at any moment, a finaliser or a signal handler, may also compute,
and so use the account in the midst of another use by the same thread: the lock can be taken again.
"""

from __future__ import annotations

import threading
from collections import deque

from afield.errors import OutOfDeviceMemoryError
from afield.units import format_bytes

#: Allocations start at multiples of this and are counted in multiples of it, as on a CUDA device.
ALIGNMENT = 512


class Lease:
    """So many bytes of an account, given back when this object goes."""

    __slots__ = ("_returned", "size_bytes")

    def __init__(self, size_bytes: int, returned: deque[int]) -> None:
        self.size_bytes = size_bytes
        self._returned = returned

    def __del__(self) -> None:
        self._returned.append(self.size_bytes)


class Account:
    """Bytes in use against a hard limit; any thread may call."""

    def __init__(self, label: str, limit_bytes: int) -> None:
        self.label = label
        self.limit_bytes = limit_bytes
        self._used = 0
        self._returned: deque[int] = deque()
        self._lock = threading.RLock()

    @property
    def used_bytes(self) -> int:
        with self._lock:
            return self._drain()

    def take(self, nbytes: int) -> Lease:
        """Count `nbytes`, rounded up to whole units; raises OutOfDeviceMemoryError, with the arithmetic."""
        size_bytes = -(-nbytes // ALIGNMENT) * ALIGNMENT
        with self._lock:
            used = self._drain()
            if used + size_bytes <= self.limit_bytes:
                self._used += size_bytes
                return Lease(size_bytes, self._returned)
        raise OutOfDeviceMemoryError(
            f"{self.label} has no room for {format_bytes(size_bytes)}: {format_bytes(used)} of "
            f"{format_bytes(self.limit_bytes)} are in use"
        )

    def _drain(self) -> int:
        while self._returned:
            try:
                size_bytes = self._returned.popleft()
            except IndexError:  # what has interrupted us did it
                break
            self._used -= size_bytes
        return self._used
