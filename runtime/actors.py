"""Actors as users see them: `ActorClass` (what `@afield.remote` makes of a class), `ActorHandle` and its methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from afield.errors import NotInitializedError
from afield.ids import FIRST_RETURN
from afield.runtime import current
from afield.runtime import messages as m
from afield.runtime.context import calling_context
from afield.runtime.dispatch import Task
from afield.runtime.options import ACTOR_OPTIONS, METHOD_OPTIONS, shape_of, validate
from afield.runtime.serialization import serialize
from afield.runtime.submission import Function

if TYPE_CHECKING:
    from afield.runtime.participant import Participant

_METHOD_OPTIONS_ATTRIBUTE = "__afield_method_options__"


def method(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Set options of one actor method, for example ``@afield.method(num_returns=2)``."""
    validate(options, METHOD_OPTIONS, "@method")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        setattr(function, _METHOD_OPTIONS_ATTRIBUTE, options)
        return function

    return decorate


class ActorClass:
    """A class whose instances live in a worker of their own: `C.remote(...)` returns a handle at once."""

    def __init__(self, cls: type, options: dict[str, Any]) -> None:
        validate(options, ACTOR_OPTIONS, f"@remote on class {cls.__name__}")
        self._set(cls, options)

    def _set(self, cls: type, options: dict[str, Any]) -> None:
        self._cls = cls
        self._options = options
        self._shape = shape_of(options, default_cpus=0)
        self._session: Participant | None = None
        self._blob = b""
        self.__doc__ = cls.__doc__
        self.__name__ = cls.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"the actor class {self.__name__} cannot be instantiated directly; use {self.__name__}.remote(...)"
        )

    def options(self, **options: Any) -> ActorClass:
        """Return the same class with other options; see `afield.remote`."""
        validate(options, ACTOR_OPTIONS, f"{self.__name__}.options()")
        return ActorClass(self._cls, self._options | options)

    def remote(self, *args: Any, **kwargs: Any) -> ActorHandle:
        """Create an actor; return its handle without waiting for the constructor.

        Raises:
            TypeError: the arguments do not fit the constructor.
            SerializationError: an argument or the class cannot be pickled.
        """
        participant = current.participant or current.ensure()
        _check_signature(self._cls, args, kwargs, self.__name__)
        if self._session is not participant:
            serialized = serialize(self._cls, f"the class {self.__name__}")
            for ref in serialized.refs:
                participant.process.pin_for_ever(ref)
            self._blob, self._session = serialized.pack(), participant
        process = participant.process
        process.check_alive()
        actor_id = calling_context().next_task_id()
        restarts = self._options.get("max_restarts") or 0
        task = Task(actor_id, None, b"", None, retries_left=restarts)
        if args or kwargs:
            participant.submitter.encode_arguments(task, args, kwargs, f"{self.__name__}.__init__")
        options = {"max_restarts": restarts, "name": self._options.get("name") or ""}
        spec = m.CreateActor(actor_id, self.__name__, self._blob, dict(self._shape), b"", None, None, options)
        participant.actors.create(spec, task)
        return ActorHandle(actor_id, self.__name__, _methods(self._cls), self._options.get("max_task_retries") or 0)

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty_actor_class, (), (self._cls, self._options)

    def __setstate__(self, state: tuple[type, dict[str, Any]]) -> None:
        self._set(*state)

    def __repr__(self) -> str:
        return f"ActorClass({self.__name__})"


def _empty_actor_class() -> ActorClass:
    return ActorClass.__new__(ActorClass)


def _check_signature(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
    try:
        signature = inspect.signature(cls)
    except (ValueError, TypeError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name}.remote(): {error}") from None


def _methods(cls: type) -> dict[str, int]:
    """Return the names of an actor class's methods and their number of returns."""
    methods = {}
    for name in dir(cls):
        if name.startswith("__") and name != "__call__":
            continue
        member = inspect.getattr_static(cls, name)
        if isinstance(member, (staticmethod, classmethod)):
            member = member.__func__
        if callable(member):
            methods[name] = getattr(member, _METHOD_OPTIONS_ATTRIBUTE, {}).get("num_returns") or 1
    return methods


class ActorHandle:
    """Names an actor; `handle.method.remote(...)` calls it. Can be passed to tasks and other actors."""

    def __init__(self, actor_id: bytes, class_name: str, methods: dict[str, int], retries: int) -> None:
        self._actor_id = actor_id
        self._class_name = class_name
        self._methods = methods
        self._retries = retries

    def __getattr__(self, name: str) -> ActorMethod:
        if name.startswith("__") and name != "__call__":
            raise AttributeError(name)
        num_returns = self._methods.get(name)
        if num_returns is None:
            import difflib

            near = difflib.get_close_matches(name, self._methods, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise AttributeError(f"the actor {self._class_name} has no method {name!r}{hint}")
        bound = ActorMethod(self, name, num_returns, self._retries)
        # Found directly from now on: a call in a loop does not come here again.
        self.__dict__[name] = bound
        return bound

    def __reduce__(self) -> tuple[Any, ...]:
        return ActorHandle, (self._actor_id, self._class_name, self._methods, self._retries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ActorHandle) and self._actor_id == other._actor_id

    def __hash__(self) -> int:
        return hash(self._actor_id)

    def __repr__(self) -> str:
        return f"ActorHandle({self._class_name}, {self._actor_id.hex()})"


class ActorMethod:
    """A method of an actor; call it with `.remote(...)`."""

    def __init__(self, handle: ActorHandle, name: str, num_returns: int, retries: int) -> None:
        self._actor_id = handle._actor_id
        self._owner_name = handle._class_name
        self._name = name
        self._num_returns = num_returns
        self._retries = retries
        self._function = Function(name, b"", num_returns)
        #: The handle keeps the actor alive while a method of it is held.
        self._handle = handle

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"the actor method {self._owner_name}.{self._name}() cannot be called directly; use .{self._name}.remote(...)"
        )

    def options(self, **options: Any) -> ActorMethod:
        """Return the method with other options: `num_returns`, `name`, `max_task_retries`."""
        validate(options, METHOD_OPTIONS, f"{self._owner_name}.{self._name}.options()")
        num_returns, retries = options.get("num_returns"), options.get("max_task_retries")
        return ActorMethod(
            self._handle,
            self._name,
            self._num_returns if num_returns is None else num_returns,
            self._retries if retries is None else retries,
        )

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method; return its `ObjectRef`, or a list of them if `num_returns` is not 1, without waiting."""
        participant = current.participant
        if participant is None:
            raise NotInitializedError(f"the actor {self._owner_name} belongs to a runtime that was shut down")
        refs = participant.actors.submit(self._actor_id, self._function, args, kwargs, self._num_returns, self._retries)
        return refs[0] if self._num_returns == 1 else refs if refs else None


def actor_ref_id(actor_id: bytes) -> bytes:
    """Return the id of the object that stands for an actor's life."""
    return actor_id + FIRST_RETURN
