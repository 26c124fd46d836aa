"""afield: a GPU-aware accelerator runtime for Python on distributed futures."""

from __future__ import annotations

import importlib
from typing import Any

from afield.errors import (
    ActorConstructionError,
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    AfieldError,
    AlreadyInitializedError,
    DeserializationError,
    DeviceLostError,
    GetTimeoutError,
    InvalidOptionError,
    LossError,
    NoClusterError,
    NoDeviceError,
    NotInitializedError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDeviceMemoryError,
    OwnerDiedError,
    PendingCallsLimitExceededError,
    RuntimeDiedError,
    SerializationError,
    TaskCancelledError,
    TaskError,
    TaskUnschedulableError,
    UsageError,
    WorkerCrashedError,
)
from afield.runtime.actors import ActorClass, ActorHandle, get_actor, method
from afield.runtime.api import (
    ClusterInfo,
    available_resources,
    cancel,
    cluster_resources,
    empty,
    exit_actor,
    get,
    init,
    is_initialized,
    kill,
    memory,
    put,
    remote,
    shutdown,
    stats,
    wait,
)
from afield.runtime.functions import RemoteFunction
from afield.runtime.memory import MemoryEntry
from afield.runtime.refs import ObjectRef
from afield.runtime.runtime_context import get_gpu_ids, get_runtime_context
from afield.runtime.strategies import NodeAffinitySchedulingStrategy
from afield.runtime.streams import ObjectRefGenerator

# Each of these needs a partner, or is a library of its own: loaded on first use.
_LAZY = {
    "Executor": "libraries.executor",
    "dask_get": "libraries.dask_scheduler",
    "progress": "libraries.progress",
    "register_joblib": "libraries.joblib_backend",
}


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name, name if name in ("actor", "exceptions", "util") else None)
    if module is None:
        raise AttributeError(f"module 'afield' has no attribute {name!r}")
    loaded = importlib.import_module("afield." + module)
    return getattr(loaded, name) if name in _LAZY else loaded


__version__ = "0.1.0"

__all__ = [
    "NodeAffinitySchedulingStrategy",
    "register_joblib",
    "progress",
    "dask_get",
    "Executor",
    "ActorClass",
    "ActorConstructionError",
    "ActorDiedError",
    "ActorHandle",
    "ActorUnavailableError",
    "ActorUnschedulableError",
    "AfieldError",
    "AlreadyInitializedError",
    "ClusterInfo",
    "DeserializationError",
    "DeviceLostError",
    "GetTimeoutError",
    "InvalidOptionError",
    "LossError",
    "MemoryEntry",
    "NoClusterError",
    "NoDeviceError",
    "NotInitializedError",
    "ObjectLostError",
    "ObjectRef",
    "ObjectRefGenerator",
    "ObjectStoreFullError",
    "OutOfDeviceMemoryError",
    "OwnerDiedError",
    "PendingCallsLimitExceededError",
    "RemoteFunction",
    "RuntimeDiedError",
    "SerializationError",
    "TaskCancelledError",
    "TaskError",
    "TaskUnschedulableError",
    "UsageError",
    "WorkerCrashedError",
    "available_resources",
    "exit_actor",
    "cancel",
    "cluster_resources",
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
    "put",
    "remote",
    "shutdown",
    "stats",
    "wait",
]
