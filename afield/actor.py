"""What has to do with actors, under the module name that users of this field look for."""

from __future__ import annotations

from afield.runtime.face.actors import ActorClass, list_named_actors
from afield.runtime.face.api import exit_actor
from afield.runtime.face.handles import ActorHandle, ActorMethod

__all__ = ["ActorClass", "ActorHandle", "ActorMethod", "exit_actor", "list_named_actors"]
