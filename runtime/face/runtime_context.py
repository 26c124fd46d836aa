"""What a program can ask about itself: `get_runtime_context()` and `get_gpu_ids()`.

Theory of operation. Some of it is fixed when a process joins a session (`Facts`: the job, the node, the inherited
environment), some comes with each lease (`Assign`: resources, devices, the actor), and some belongs to the running task
(`context`). `RuntimeContext` holds nothing itself: each question is answered at the moment it is asked, so that one
object serves all tasks of an async actor.
"""

from __future__ import annotations

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


class RuntimeContext:
    """Who and where the running code is. Ids are hexadecimal; what a driver does not have is None or empty."""

    def _known(self) -> facts.Facts:
        if participation.participant is None:
            raise NotInitializedError("the runtime was shut down; call afield.init() to start it again")
        return facts.facts

    def _actor(self) -> messages.ActorFacts | None:
        assignment = self._known().assigned()
        return assignment.actor if assignment is not None else None

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
        return running.name if actor is None or "." in running.name else f"{actor.class_name}.{running.name}"

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
        """Return the UUIDs of the leased devices under "GPU"; an empty list where there are none."""
        assignment = self._known().assigned()
        return {"GPU": list(assignment.devices) if assignment is not None else []}

    def __repr__(self) -> str:
        return "RuntimeContext()"


_context = RuntimeContext()
