"""`Queue`, `Empty` and `Full`; see `afield.libraries.queue`."""

from __future__ import annotations

from afield.libraries.queue import Empty, Full, Queue

__all__ = ["Empty", "Full", "Queue"]
