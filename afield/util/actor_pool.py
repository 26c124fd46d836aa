"""`ActorPool`; see `afield.libraries.actor_pool`."""

from __future__ import annotations

from afield.libraries.actor_pool import ActorPool

__all__ = ["ActorPool"]
