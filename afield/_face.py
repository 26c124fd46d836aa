"""The public names and where they come from; `afield/__init__.py` hands them out, and those of `errors` with them.

Theory of operation. Importing this file imports the whole runtime. It is separate from the package's own `__init__`, which
does not, so that importing one part of the package (the pytest plugin, which pytest loads in every run; the errors; the
command line) costs no more than that part.
"""

from __future__ import annotations

from afield.runtime.calls.generators import ObjectRefGenerator
from afield.runtime.face.actors import ActorClass, get_actor
from afield.runtime.face.api import (
    array_module,
    available_resources,
    cancel,
    cluster_resources,
    empty,
    exit_actor,
    get,
    kill,
    memory,
    nodes,
    put,
    remote,
    stats,
    wait,
)
from afield.runtime.face.functions import RemoteFunction
from afield.runtime.face.handles import ActorHandle, method
from afield.runtime.face.lifecycle import ClusterInfo, init, is_initialized, shutdown
from afield.runtime.face.runtime_context import get_gpu_ids, get_runtime_context
from afield.runtime.face.strategies import NodeAffinitySchedulingStrategy
from afield.runtime.face.torch_device import torch_device
from afield.runtime.process.refs import ObjectRef
from afield.runtime.tools.memory import MemoryEntry, MemoryListing

__all__ = [
    "NodeAffinitySchedulingStrategy",
    "ActorClass",
    "ActorHandle",
    "ClusterInfo",
    "MemoryEntry",
    "MemoryListing",
    "ObjectRef",
    "ObjectRefGenerator",
    "RemoteFunction",
    "available_resources",
    "exit_actor",
    "cancel",
    "cluster_resources",
    "array_module",
    "empty",
    "get",
    "get_gpu_ids",
    "get_runtime_context",
    "get_actor",
    "init",
    "is_initialized",
    "kill",
    "memory",
    "method",
    "nodes",
    "put",
    "remote",
    "shutdown",
    "stats",
    "torch_device",
    "wait",
]
