"""What has to do with actors, under the module name that users of this field look for."""

from __future__ import annotations

from afield.runtime.actors import ActorClass, ActorHandle, ActorMethod, list_named_actors
from afield.runtime.api import exit_actor

__all__ = ["ActorClass", "ActorHandle", "ActorMethod", "exit_actor", "list_named_actors"]
