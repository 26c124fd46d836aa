"""The options of `@remote` and `.options()`: which exist, what they accept, and what a wrong one is told."""

from __future__ import annotations

import datetime
import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from afield.errors import InvalidOptionError
from afield.runtime.face.strategies import strategy_problem
from afield.runtime.process.serialization import serialize
from afield.runtime.wire.messages import STREAMING
from afield.scheduler.resources import ResourceSet
from afield.text import is_text

Check = Callable[[Any], str]  # returns what was expected, or "" if the value is fine


def _whole(minimum: int) -> Check:
    def check(value: Any) -> str:
        fine = isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= minimum
        return "" if fine else f"a whole number, at least {minimum}"

    return check


def _kind(kind: type | tuple[type, ...], what: str) -> Check:
    return lambda value: "" if isinstance(value, kind) else what


def _num_returns(value: Any) -> str:
    if value in ("streaming", "dynamic"):
        return ""
    return _whole(0)(value) and "a whole number, at least 0, or 'streaming'"


def _backpressure(value: Any) -> str:
    return "" if value == -1 else _whole(1)(value) and "a whole number, at least 1, or -1 for no bound"


def _retry_exceptions(value: Any) -> str:
    if isinstance(value, bool):
        return ""
    kinds = isinstance(value, (list, tuple)) and all(
        isinstance(kind, type) and issubclass(kind, BaseException) for kind in value
    )
    return "" if kinds else "True, False or a list of exception types"


def _name(value: Any) -> str:
    return "" if is_text(value) and value else "a string that is not empty, without lone surrogates"


def _text(value: Any) -> str:
    return "" if is_text(value) else "a string, without lone surrogates"


def _groups(value: Any) -> str:
    fine = isinstance(value, dict) and all(is_text(k) and not _whole(1)(v) for k, v in value.items())
    return "" if fine else "a dict of group names and their numbers of concurrent calls"


def _one_of(*choices: str) -> Check:
    return lambda value: "" if value in choices else " or ".join(repr(choice) for choice in choices)


def _resource(value: Any) -> str:
    return ""  # `ResourceSet.from_options` checks it, and names the option


def _environment(value: Any) -> str:
    return ""  # `strategies.with_environment` checks it, and names the key


_COMMON: dict[str, Check] = {
    "num_cpus": _resource,
    "num_gpus": _resource,
    "memory": _resource,
    "gpu_memory": _resource,
    "resources": _resource,
    "name": _text,
    "runtime_env": _environment,
    "scheduling_strategy": strategy_problem,
}
TASK_OPTIONS: dict[str, Check] = _COMMON | {
    "num_returns": _num_returns,
    "max_retries": _whole(-1),
    "max_calls": _whole(0),
    "retry_exceptions": _retry_exceptions,
    "_generator_backpressure_num_objects": _backpressure,
}
ACTOR_OPTIONS: dict[str, Check] = _COMMON | {
    "name": _name,
    "max_restarts": _whole(-1),
    "max_task_retries": _whole(-1),
    "max_pending_calls": _whole(-1),
    "max_concurrency": _whole(1),
    "concurrency_groups": _groups,
    "namespace": _name,
    "lifetime": _one_of("detached", "non_detached"),
    "get_if_exists": _kind(bool, "True or False"),
}
METHOD_OPTIONS: dict[str, Check] = {
    "num_returns": _num_returns,
    "name": _text,
    "max_task_retries": _whole(-1),
    "retry_exceptions": _retry_exceptions,
    "concurrency_group": _kind(str, "a string"),
    "_generator_backpressure_num_objects": _backpressure,
}

#: Options that Ray has and we have not: the values that ask for nothing (None always does), and why others are refused.
_NOT_HERE: dict[str, tuple[tuple[Any, ...], str]] = {
    "accelerator_type": ((), "all devices of a machine are of one kind; use num_gpus="),
    "label_selector": (({},), "there are no node labels; use resources="),
    "fallback_strategy": (([],), "there are no node labels"),
    "placement_group": (("default",), "there are no placement groups"),
    "placement_group_bundle_index": ((-1,), "there are no placement groups"),
    "placement_group_capture_child_tasks": ((False,), "there are no placement groups"),
    "enable_task_events": ((True, False), "there are no task events"),
    "allow_out_of_order_execution": ((True,), "calls keep their order where one runs at a time, and only there"),
    "tensor_transport": (("object_store",), "device arrays stay on their device without it"),
    "_metadata": (({},), "there is nobody to read it"),
    "_labels": (({},), "there are no labels"),
}


def validate(options: dict[str, Any], known: Mapping[str, Check], what: str) -> None:
    """Raise `InvalidOptionError` for an option that is not known or has a wrong value; None stands for the default.

    NumPy's whole numbers become plain ones, as options travel; what asks for nothing that we lack is taken out.
    """
    for name, value in list(options.items()):
        check = known.get(name)
        if check is None and name in _NOT_HERE:
            neutral, instead = _NOT_HERE[name]
            if value is not None and not any(type(value) is type(each) and value == each for each in neutral):
                raise InvalidOptionError(f"{what}: {name}={value!r} is not supported: {instead}")
            del options[name]
            continue
        if check is None:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise InvalidOptionError(f"{what} has no option {name!r}{hint} It takes: {', '.join(sorted(known))}")
        expected = check(value) if value is not None else ""
        if expected:
            raise InvalidOptionError(f"{what}: {name}={value!r} is not valid; expected {expected}")
        if isinstance(value, np.integer):
            options[name] = int(value)
        elif name == "concurrency_groups" and value is not None:
            options[name] = {group: int(number) for group, number in value.items()}


def check_task(function: Callable[..., Any]) -> None:
    """Raise `InvalidOptionError` for a function that can be no task."""
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise InvalidOptionError(
            f"{function.__name__}() is `async def`, and tasks have no event loop: make it a method of an actor, or a plain "
            "function that calls asyncio.run()"
        )


def seconds(timeout: Any, what: str) -> float | None:
    """Return a timeout in seconds; None for none.

    Raises:
        TypeError: it is no number and no timedelta.
        ValueError: it is not a number (NaN).
    """
    if timeout is None or type(timeout) is int:
        return timeout
    if isinstance(timeout, datetime.timedelta):
        return timeout.total_seconds()
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float, np.integer, np.floating)):
        raise TypeError(
            f"{what}: timeout={timeout!r} is a {type(timeout).__name__}; expected seconds, a timedelta, or None"
        )
    if timeout != timeout:
        raise ValueError(f"{what}: timeout={timeout!r} is no number of seconds; None waits without a limit")
    return float(timeout)


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


def returns_of(options: Mapping[str, Any], function: Callable[..., Any]) -> int:
    """Return the number of outputs that the options, or else the kind of function, mean."""
    given = options.get("num_returns")
    if given in ("streaming", "dynamic"):
        return STREAMING
    if given is not None:
        number: int = given
        return number
    streams = inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
    return STREAMING if streams else 1


def backpressure_of(options: Mapping[str, Any]) -> int:
    """Return how many items a generator may be ahead of its consumer; 0 for any number."""
    return max(0, options.get("_generator_backpressure_num_objects") or 0)


def retry_on(options: Mapping[str, Any]) -> bool | bytes:
    """Return which exceptions of the user's code are retried: types are packed, as only the worker compares them."""
    given = options.get("retry_exceptions")
    if given is None or isinstance(given, bool):
        return bool(given)
    return bool(given) and serialize(tuple(given), "retry_exceptions", stored=False).pack()
