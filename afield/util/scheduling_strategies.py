"""`NodeAffinitySchedulingStrategy`; see `afield.runtime.face.strategies`."""

from __future__ import annotations

from afield import NodeAffinitySchedulingStrategy

__all__ = ["NodeAffinitySchedulingStrategy"]
