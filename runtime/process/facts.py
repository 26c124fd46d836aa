"""What this process knows about its place in the session: the job, the node, what it has leased, the actor that it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from afield.runtime.process.environment import Environment
from afield.runtime.wire import messages


@dataclass(frozen=True, slots=True)
class OwnActor:
    """The actor that lives in a worker: its class, and what its creator said of it. `owner` is empty if it is detached."""

    cls: type
    spec: messages.CreateActor
    owner: bytes


@dataclass(slots=True)
class Facts:
    """What this process knows about its place in the cluster."""

    job_id: str = ""
    node_id: str = ""
    namespace: str = ""
    #: What the tasks and actors that this process submits inherit.
    environment: Environment = field(default_factory=Environment)
    #: Returns what this process, a worker, has leased at the moment.
    assigned: Callable[[], messages.Assign | None] = lambda: None
    #: Returns the actor that this process is, or None.
    own_actor: Callable[[], OwnActor | None] = lambda: None


facts = Facts()


def install(new: Facts) -> None:
    """Make `new` the facts of this process."""
    global facts
    facts = new


def inherited_environment() -> Environment:
    """Return what the tasks and actors that this process submits inherit."""
    return facts.environment
