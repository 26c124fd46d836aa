"""What a program can ask about itself: `get_runtime_context()` and `get_gpu_ids()`.

Theory of operation. Some of it is fixed when a process joins a session (`Facts`: the job, the node, the inherited
environment), some comes with each lease (`Assign`: resources, devices, the actor), and some belongs to the running task
(`context`). `RuntimeContext` holds nothing itself: each question is answered at the moment it is asked, so that one
object serves all tasks of an async actor.
"""

from __future__ import annotations

import json
from typing import Any

from afield.errors import NotInitializedError
from afield.runtime.calls import participation
from afield.runtime.face.handles import ActorHandle, describe_actor
from afield.runtime.process import context, current, facts
from afield.runtime.wire import messages
from afield.scheduler.resources import UNIT


def get_runtime_context() -> RuntimeContext:
    """Return the context of the caller, which answers who and where it is; starts the runtime on first use."""
    participation.ensure()
    return _context


def get_gpu_ids() -> list[int]:
    """Return the numbers of the devices that the running task or actor has leased, in the numbering of its node.

    They do not depend on what the process can see: a worker with devices 2 and 3 gets [2, 3] here, while a device
    library calls them 0 and 1. A driver has no lease and gets []. `get_accelerator_ids` gives the devices' UUIDs.
    """
    participation.ensure()
    assignment = facts.facts.assigned()
    return list(assignment.device_numbers) if assignment is not None else []


class Id(str):
    """An id as text, hexadecimal; it has the methods of ids that programs written for Ray call."""

    __slots__ = ()

    def hex(self) -> str:
        """Return the id as plain text."""
        return str(self)

    def binary(self) -> bytes:
        """Return the bytes that the id names."""
        return bytes.fromhex(self)

    def is_nil(self) -> bool:
        """Tell whether it names nothing; there is no such id here: what is not there is None."""
        return False


def _id(text: str | None) -> Id | None:
    return None if text is None else Id(text)


#: What `get_accelerator_ids` names: devices are "GPU", and the others are kinds that other runtimes know.
ACCELERATORS = ("GPU", "HPU", "NPU", "RBLN", "TPU", "neuron_cores")


class RuntimeContext:
    """Who and where the running code is. Ids are hexadecimal; what a driver does not have is None or empty."""

    def _known(self) -> facts.Facts:
        if participation.participant is None:
            raise NotInitializedError("the runtime was shut down; call afield.init() to start it again")
        return facts.facts

    def _actor(self) -> messages.ActorFacts | None:
        assignment = self._known().assigned()
        return assignment.actor if assignment is not None else None

    def get(self) -> dict[str, Any]:
        """Return the ids of the job and the node and the namespace, with those of the running task and of the actor."""
        found = {
            "job_id": self.job_id,
            "node_id": self.node_id,
            "namespace": self.namespace,
            "task_id": self.task_id,
            "actor_id": self.actor_id,
        }
        return {name: value for name, value in found.items() if value is not None}

    @property
    def job_id(self) -> Id:
        """`get_job_id()` as an `Id`."""
        return Id(self.get_job_id())

    @property
    def node_id(self) -> Id:
        """`get_node_id()` as an `Id`."""
        return Id(self.get_node_id())

    @property
    def worker_id(self) -> Id:
        """`get_worker_id()` as an `Id`."""
        return Id(self.get_worker_id())

    @property
    def task_id(self) -> Id | None:
        """`get_task_id()` as an `Id`."""
        return _id(self.get_task_id())

    @property
    def actor_id(self) -> Id | None:
        """`get_actor_id()` as an `Id`."""
        return _id(self.get_actor_id())

    @property
    def runtime_env(self) -> dict[str, Any]:
        """The environment of this worker, or of the job, in the form that `runtime_env=` takes; paths are absolute."""
        return self._known().environment.described()

    def get_runtime_env_string(self) -> str:
        """Return `runtime_env` as JSON."""
        return json.dumps(self.runtime_env)

    def get_job_id(self) -> str:
        """Return the id of the job: of the session that the driver's `init` started."""
        return self._known().job_id

    def get_node_id(self) -> str:
        """Return the id of the node that this process runs on."""
        return self._known().node_id

    def get_worker_id(self) -> str:
        """Return the id of this process; a driver has one too."""
        self._known()
        assert current.process is not None
        return current.process.process_id.hex()

    def get_task_id(self) -> str | None:
        """Return the id of the running task or actor call, the same in each retry; None in a driver."""
        self._known()
        running = context.running()
        return running.task_id.hex() if running is not None and running.task_id else None

    def get_task_name(self) -> str | None:
        """Return the `name` option of the running task, or its function's name; `Class.method` in an actor."""
        running = context.running()
        actor = self._actor()
        if running is None or not running.task_id:
            return None
        method = _method(running)
        return f"{actor.class_name}.{method}" if actor is not None and method == running.name else running.name

    def get_task_function_name(self) -> str | None:
        """Return what runs, as `module.function` or `module.Class.method`, whatever `name` says; None in a driver."""
        running = context.running()
        if running is None or not running.task_id:
            return None
        own = self._known().own_actor()
        of: Any = own.cls if own is not None else getattr(getattr(running, "callee", None), "function", None)
        if of is None:  # a constructor that still runs
            return running.name
        name = f"{of.__module__}.{of.__qualname__}".replace("<locals>.", "")
        return name if own is None else f"{name}.{_method(running) or '__init__'}"

    def is_canceled(self) -> bool:
        """Tell whether the running call was cancelled, for code that no interrupt reaches, as in a threaded actor."""
        running = context.running()
        return getattr(running, "cancel", None) is not None

    def get_actor_id(self) -> str | None:
        """Return the id of the actor that this process is, or None."""
        actor = self._actor()
        return actor.actor_id.hex() if actor is not None else None

    def get_actor_name(self) -> str | None:
        """Return the name of the actor that this process is, "" if it was given none; None outside of actors."""
        actor = self._actor()
        return actor.name if actor is not None else None

    @property
    def current_actor(self) -> Any:
        """A handle to the actor that this process is; it does not keep the actor alive, nor do copies of it.

        Raises:
            RuntimeError: this is no actor.
        """
        own = self._known().own_actor()
        if own is None:
            raise RuntimeError("current_actor was asked for outside of an actor")
        description = describe_actor(own.spec.actor_id, own.spec.class_name, own.cls, own.spec.options, own.owner)
        return ActorHandle(description, None)

    @property
    def namespace(self) -> str:
        """The job's namespace, in which names of actors are looked up."""
        return self._known().namespace

    @property
    def was_current_actor_reconstructed(self) -> bool:
        """Whether the actor that this process is was restarted after its process had died; False outside of actors."""
        actor = self._actor()
        return actor is not None and actor.restarts > 0

    def get_assigned_resources(self) -> dict[str, float]:
        """Return what the running task or actor has leased: CPUs, GPUs, bytes of memory; nothing in a driver."""
        assignment = self._known().assigned()
        return {name: units / UNIT for name, units in assignment.shape.items()} if assignment is not None else {}

    def get_accelerator_ids(self) -> dict[str, list[str]]:
        """Return the UUIDs of the leased devices under "GPU", and an empty list for each other kind, of which there is none."""
        assignment = self._known().assigned()
        devices = list(assignment.devices) if assignment is not None else []
        return {kind: devices if kind == "GPU" else [] for kind in ACCELERATORS}

    def __repr__(self) -> str:
        return "RuntimeContext()"


def _method(running: context.TaskContext) -> str:
    """Return the actor's method that a call runs; "" for a task, and for a constructor."""
    callee = getattr(running, "callee", None)
    return callee.method if callee is not None else ""


_context = RuntimeContext()
