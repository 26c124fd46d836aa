"""The options of `@remote` and `.options()`: which exist, what they accept, and what a wrong one is told."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from afield.errors import InvalidOptionError
from afield.scheduler.resources import ResourceSet

Check = Callable[[Any], str]  # returns what was expected, or "" if the value is fine


def _whole(minimum: int) -> Check:
    def check(value: Any) -> str:
        fine = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
        return "" if fine else f"a whole number, at least {minimum}"

    return check


def _kind(kind: type | tuple[type, ...], what: str) -> Check:
    return lambda value: "" if isinstance(value, kind) else what


def _resource(value: Any) -> str:
    return ""  # `ResourceSet.from_options` checks it, and names the option


_COMMON: dict[str, Check] = {
    "num_cpus": _resource,
    "num_gpus": _resource,
    "memory": _resource,
    "gpu_memory": _resource,
    "resources": _resource,
    "name": _kind(str, "a string"),
}
TASK_OPTIONS: dict[str, Check] = _COMMON | {
    "num_returns": _whole(0),
    "max_retries": _whole(-1),
}
ACTOR_OPTIONS: dict[str, Check] = _COMMON | {
    "max_restarts": _whole(-1),
    "max_task_retries": _whole(-1),
}
METHOD_OPTIONS: dict[str, Check] = {
    "num_returns": _whole(0),
    "name": _kind(str, "a string"),
    "max_task_retries": _whole(-1),
}


def validate(options: Mapping[str, Any], known: Mapping[str, Check], what: str) -> None:
    """Raise `InvalidOptionError` for an option that is not known or has a wrong value; None stands for the default."""
    for name, value in options.items():
        check = known.get(name)
        if check is None:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InvalidOptionError(f"{what} has no option {name!r}{hint} It takes: {', '.join(sorted(known))}")
        expected = check(value) if value is not None else ""
        if expected:
            raise InvalidOptionError(f"{what}: {name}={value!r} is not valid; expected {expected}")


def shape_of(options: Mapping[str, Any], default_cpus: float) -> tuple[tuple[str, int], ...]:
    """Return the resource shape as a hashable tuple of (name, units of 1e-4)."""
    cpus = options.get("num_cpus")
    return ResourceSet.from_options(
        num_cpus=default_cpus if cpus is None else cpus,
        num_gpus=options.get("num_gpus"),
        memory=options.get("memory"),
        resources=options.get("resources"),
        gpu_memory=options.get("gpu_memory"),
    ).key()
