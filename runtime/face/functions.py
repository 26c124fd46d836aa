"""`RemoteFunction`: what `@afield.remote` makes of a function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from afield.runtime.calls import participation
from afield.runtime.calls.callee import Callee
from afield.runtime.face.options import (
    TASK_OPTIONS,
    backpressure_of,
    check_task,
    retry_on,
    returns_of,
    shape_of,
    validate,
)
from afield.runtime.face.parameters import Parameters, describe
from afield.runtime.face.strategies import placement_of, with_environment
from afield.runtime.process.facts import inherited_environment
from afield.runtime.values.definitions import Defined
from afield.tracebacks import trim

if TYPE_CHECKING:
    from afield.runtime.calls.participant import Participant
    from afield.runtime.cores.dispatch import Lane

DEFAULT_MAX_RETRIES = 3

P = ParamSpec("P")
R = TypeVar("R")


class RemoteFunction(Generic[P, R]):
    """A function that runs elsewhere: `f.remote(...)` returns a future at once."""

    def __init__(self, function: Callable[P, R], options: dict[str, Any]) -> None:
        validate(options, TASK_OPTIONS, f"@remote on {function.__name__}()")
        check_task(function)
        self._set(function, with_environment(options))

    def _set(self, function: Callable[P, R], options: dict[str, Any], defined: Defined | None = None) -> None:
        self._function = function
        self._options = options
        retries = options.get("max_retries")
        self._num_returns = returns_of(options, function)
        self._retries: int = DEFAULT_MAX_RETRIES if retries is None else retries
        self._name: str = options.get("name") or function.__qualname__.replace("<locals>.", "")
        self._parameters = Parameters(describe(function), self._name)
        self._shape = shape_of(options, default_cpus=1)
        self._defined = defined or Defined(function, f"the function {self._name}()")
        # Known once the function is used in a session: its key, what is pushed, and the lane for its shape. One tuple, as
        # another thread may use the function in the next session already.
        self._bound: tuple[object, Callee, Lane] | None = None
        functools.update_wrapper(self, function, updated=())

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        raise TypeError(
            f"the remote function {self._name}() cannot be called directly; "
            f"use {self._name}.remote(...) for a future, or {self._name}.__wrapped__(...) to run it here"
        )

    def options(self, **options: Any) -> RemoteFunction[P, R]:
        """Return the same function with other options; see `afield.remote`."""
        validate(options, TASK_OPTIONS, f"{self._name}.options()")
        made: RemoteFunction[P, R] = RemoteFunction.__new__(RemoteFunction)
        made._set(self._function, with_environment(self._options | options), self._defined)
        return made

    def _remote(self, args: Any = (), kwargs: Any = None, **options: Any) -> Any:
        """Do what `remote` does, with options: the form that Ray's older programs use."""
        return (self.options(**options) if options else self).remote(*args, **(kwargs or {}))

    def remote(self, /, *args: Any, **kwargs: Any) -> Any:
        """Submit a call; return its outcome's `ObjectRef` without waiting.

        With `num_returns=N` that is a list of N refs; a generator function returns an `ObjectRefGenerator`.

        Raises:
            TypeError: the arguments do not fit the function.
            SerializationError: an argument cannot be pickled.
        """
        try:
            participant = participation.participant or participation.ensure()
            self._parameters.check(args, kwargs)
            bound = self._bound
            if bound is None or bound[0] is not participant.key:
                bound = self._bind(participant)
            return participant.submitter.submit(bound[1], bound[2], args, kwargs, self._retries)
        except BaseException as error:
            trim(error)
            raise  # without a frame of this method

    def _bind(self, participant: Participant) -> tuple[object, Callee, Lane]:
        pushed = Callee(
            self._name,
            self._defined.within(participant.key, participant.definitions),
            self._num_returns,
            backpressure=backpressure_of(self._options),
            retry_on=retry_on(self._options),
            once=not self._retries,
        )
        placement = placement_of(self._options, inherited_environment())
        lane = participant.submitter.lane(self._shape, placement, self._options.get("max_calls") or 0)
        self._bound = participant.key, pushed, lane
        return self._bound

    def __reduce__(self) -> tuple[Any, ...]:
        # State apart from construction, so that a function that refers to itself can be pickled.
        return _empty_remote_function, (), (self._function, self._options)

    def __setstate__(self, state: tuple[Callable[P, R], dict[str, Any]]) -> None:
        self._set(*state)

    def __repr__(self) -> str:
        return f"RemoteFunction({self._name})"


def _empty_remote_function() -> RemoteFunction[..., Any]:
    return RemoteFunction.__new__(RemoteFunction)
