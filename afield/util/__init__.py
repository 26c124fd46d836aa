"""Helpers under the names that users of this field look for: each is a re-export from `afield.libraries`.

Theory of operation. The modules here hold no code of their own, and they are on the level of the libraries: they import
them, and nothing below imports them.
"""

from __future__ import annotations

from afield.actor import list_named_actors
from afield.libraries.actor_pool import ActorPool
from afield.libraries.addresses import get_node_ip_address
from afield.libraries.completion import as_completed, map_unordered
from afield.libraries.joblib_backend import register_joblib
from afield.libraries.queue import Queue
from afield.libraries.serializers import deregister_serializer, register_serializer

__all__ = [
    "ActorPool",
    "Queue",
    "as_completed",
    "deregister_serializer",
    "get_node_ip_address",
    "list_named_actors",
    "map_unordered",
    "register_joblib",
    "register_serializer",
]
