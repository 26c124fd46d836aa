"""Where tasks and actors run: scheduling strategies, and what a lane's workers need besides resources.

Theory of operation. `scheduling_strategy=` and `runtime_env=` become one `Placement`, which travels with the demand for
leases and with the creation of an actor; None stands for what everybody gets. On a cluster of one node all strategies
come to the same, but for a hard affinity to a node that is not part of it, which the daemon refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from afield.errors import InvalidOptionError
from afield.runtime.process.environment import Environment
from afield.runtime.wire.messages import Placement

#: "DEFAULT" packs while there is room, "SPREAD" takes the emptiest node.
NAMED = ("DEFAULT", "SPREAD")


@dataclass(frozen=True, slots=True)
class NodeAffinitySchedulingStrategy:
    """Run on the node `node_id`, as `get_runtime_context().get_node_id()` names it there.

    With `soft`, another node will do when that one is not part of the cluster; without, the task fails with
    `TaskUnschedulableError` and the actor with `ActorUnschedulableError`.

    Raises:
        InvalidOptionError: `node_id` is no node's id, or `soft` is not True or False.
    """

    node_id: str
    soft: bool = False

    def __post_init__(self) -> None:
        if not _is_node_id(self.node_id):
            raise InvalidOptionError(
                f"node_id={self.node_id!r} is not the id of a node; "
                "take it from afield.get_runtime_context().get_node_id()"
            )
        if self.soft not in (True, False):
            raise InvalidOptionError(f"soft={self.soft!r}: expected True or False")


def _is_node_id(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and not set(value) - set("0123456789abcdef")


def strategy_problem(value: Any) -> str:
    """Return what was expected instead of `value` as a `scheduling_strategy`, or "" if it is one."""
    if isinstance(value, NodeAffinitySchedulingStrategy) or (isinstance(value, str) and value in NAMED):
        return ""
    return "'DEFAULT', 'SPREAD' or a NodeAffinitySchedulingStrategy"


def with_environment(options: dict[str, Any]) -> dict[str, Any]:
    """Return options whose `runtime_env` is checked and no longer depends on the present directory.

    Raises:
        InvalidOptionError: see `Environment.of`.
    """
    if options.get("runtime_env") is None:
        return options
    return options | {"runtime_env": Environment.of(options["runtime_env"])}


def placement_of(options: Mapping[str, Any], inherited: Environment) -> Placement | None:
    """Return what workers for these (checked) options need besides resources; None for nothing in particular."""
    environment: Environment = options.get("runtime_env") or Environment()
    encoded = environment.over(inherited).encode()
    strategy = options.get("scheduling_strategy")
    node = strategy.node_id if isinstance(strategy, NodeAffinitySchedulingStrategy) and not strategy.soft else ""
    return Placement(encoded, node) if encoded or node else None
