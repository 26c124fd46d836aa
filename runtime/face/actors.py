"""`ActorClass`, what `@afield.remote` makes of a class, and the actors that have names."""

from __future__ import annotations

import inspect
from typing import Any

from afield.errors import InvalidOptionError
from afield.runtime.calls import participation
from afield.runtime.calls.participant import Participant
from afield.runtime.cores.caller import life_of
from afield.runtime.cores.dispatch import Task
from afield.runtime.face.handles import (
    OWN_HANDLE_OPTIONS,
    ActorHandle,
    check_group,
    describe_actor,
    groups_in_order,
    methods_of,
)
from afield.runtime.face.options import ACTOR_OPTIONS, shape_of, validate
from afield.runtime.face.runtime_context import get_runtime_context
from afield.runtime.face.strategies import placement_of, with_environment
from afield.runtime.process.context import calling_context
from afield.runtime.process.facts import inherited_environment
from afield.runtime.process.refs import ObjectRef
from afield.runtime.values.definitions import Defined, Definition
from afield.runtime.wire import messages
from afield.text import is_text
from afield.tracebacks import trim


class ActorClass:
    """A class whose instances live in a worker of their own: `C.remote(...)` returns a handle at once."""

    def __init__(self, cls: type, options: dict[str, Any]) -> None:
        validate(options, ACTOR_OPTIONS, f"@remote on class {cls.__name__}")
        self._set(cls, with_environment(options))

    def _set(self, cls: type, options: dict[str, Any], defined: Defined | None = None) -> None:
        self._cls = cls
        self._options = options
        self._shape = shape_of(options, default_cpus=0)
        self._defined = defined or Defined(cls, f"the class {cls.__name__}")
        self.__doc__ = cls.__doc__
        self.__name__ = cls.__name__
        self.__qualname__ = cls.__qualname__
        self.__module__ = cls.__module__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"the actor class {self.__name__} cannot be instantiated directly; use {self.__name__}.remote(...)"
        )

    def __getattr__(self, name: str) -> Any:
        """Look up what the class itself has: its attributes, its class methods and its static methods."""
        cls = self.__dict__.get("_cls")
        if cls is None or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        try:
            return getattr(cls, name)
        except AttributeError:
            raise AttributeError(f"the actor class {self.__name__} has no attribute {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the class itself: actors that are made from now on have it."""
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        elif hasattr(ActorClass, name):
            raise AttributeError(f"{name!r} of the actor class {self.__name__} is afield's own and cannot be set")
        else:
            setattr(self._cls, name, value)
            self._defined.has_changed()

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        raise TypeError(
            f"{self.__name__} is an actor class, and cannot be derived from: derive from the plain class, and decorate "
            f"what is derived (keep it under another name: {self.__name__}Actor = afield.remote({self.__name__}))"
        )

    def options(self, **options: Any) -> ActorClass:
        """Return the same class with other options; see `afield.remote`."""
        validate(options, ACTOR_OPTIONS, f"{self.__name__}.options()")
        made = ActorClass.__new__(ActorClass)
        made._set(self._cls, with_environment(self._options | options), self._defined)
        return made

    def _remote(self, args: Any = (), kwargs: Any = None, **options: Any) -> ActorHandle:
        """Do what `remote` does, with options: the form that Ray's older programs use."""
        return (self.options(**options) if options else self).remote(*args, **(kwargs or {}))

    def remote(self, /, *args: Any, **kwargs: Any) -> ActorHandle:
        """Create an actor; return its handle without waiting for the constructor.

        Raises:
            TypeError: the arguments do not fit the constructor.
            SerializationError: an argument or the class cannot be pickled.
        """
        try:
            return self._create(args, kwargs)
        except BaseException as error:
            trim(error)
            raise  # without a frame of this method

    def _create(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ActorHandle:
        participant = participation.participant or participation.ensure()
        _check_signature(self._cls, args, kwargs, self.__name__)
        self._check_options()
        definition = self._defined.within(participant.key, participant.definitions)
        process = participant.process
        process.check_usable()
        actor_id = calling_context().next_task_id()
        description = self._describe(actor_id, process.process_id)
        name = self._options.get("name")
        if not name:
            return self._create_as(participant, definition, description, args, kwargs)
        participant.actors.expect(actor_id)  # others can find it from here on
        try:
            taken = _reserve(participant, name, self._options, description)
            if taken is None:
                return self._create_as(participant, definition, description, args, kwargs)
        except BaseException as error:
            participant.actors.give_up(actor_id, error)
            raise
        participant.actors.give_up(actor_id, None)
        return ActorHandle.from_description(taken)

    def _create_as(
        self,
        participant: Participant,
        definition: Definition,
        description: dict[str, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> ActorHandle:
        actor_id, name = description["actor_id"], self._options.get("name")
        restarts = self._options.get("max_restarts") or 0
        task = Task(actor_id, None, b"", None, retries_left=restarts)
        if args or kwargs:
            participant.arguments.encode(task, args, kwargs, f"{self.__name__}.__init__")
        if definition.ref is not None:  # kept with the arguments: as long as the actor may start again
            task.pinned = [*(task.pinned or ()), definition.ref.id]
        detached = self._options.get("lifetime") == "detached"
        options = {
            "max_restarts": restarts,
            "name": name or "",
            "detached": detached,
            "max_concurrency": self._options.get("max_concurrency") or 0,
            "concurrency_groups": self._options.get("concurrency_groups") or {},
            **{option: description[option] for option in OWN_HANDLE_OPTIONS},
        }
        placement = placement_of(self._options, inherited_environment())
        spec = messages.CreateActor(
            actor_id, self.__name__, definition.blob, dict(self._shape), b"", None, None, options, placement
        )
        participant.actors.create(spec, task, detached)
        return ActorHandle(description, None if detached else ObjectRef(life_of(actor_id)))

    def _describe(self, actor_id: bytes, creator: bytes) -> dict[str, Any]:
        """Return what a handle must know, in a form that travels."""
        own = {
            "max_task_retries": self._options.get("max_task_retries") or 0,
            "max_pending_calls": max(0, self._options.get("max_pending_calls") or 0),
            "groups": list(self._options.get("concurrency_groups") or {}),
            "in_order": groups_in_order(self._cls, self._options),
        }
        owner = b"" if self._options.get("lifetime") == "detached" else creator
        return describe_actor(actor_id, self.__name__, self._cls, own, owner)

    def _check_options(self) -> None:
        """What can be told only of all options together, once they are all there."""
        if self._options.get("get_if_exists") and not self._options.get("name"):
            raise InvalidOptionError(f"{self.__name__}: get_if_exists=True needs a name")
        groups = self._options.get("concurrency_groups") or {}
        for name, known in methods_of(self._cls).items():
            check_group(known.get("group"), groups, f"{self.__name__}.{name}()")

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


def _reserve(
    participant: Participant, name: str, options: dict[str, Any], description: dict[str, Any]
) -> dict[str, Any] | None:
    """Take a name for an actor; return the description of the one that has it already, if that is allowed."""
    namespace = options.get("namespace")
    argument = {"namespace": namespace, "name": name, "description": description}
    taken: dict[str, Any] | None = participant.process.requests.ask(
        lambda n: messages.Query(n, "reserve_actor_name", argument)
    )
    if taken is not None and not options.get("get_if_exists"):
        raise ValueError(
            f"an actor named {name!r} exists already; use another name, get_actor({name!r}), or get_if_exists=True"
        )
    return taken


def get_actor(name: str, namespace: str | None = None) -> ActorHandle:
    """Return a handle to the living actor with this name; it does not keep the actor alive, nor do copies of it.

    Raises:
        ValueError: there is none in the namespace (the session's by default).
    """
    participant = participation.participant or participation.ensure()
    given: tuple[tuple[str, object], ...] = (("name", name), ("namespace", namespace))
    for what, value in given:
        if not isinstance(value, str) and not (value is None and what == "namespace"):
            raise TypeError(f"get_actor(): {what}={value!r} is a {type(value).__name__}; expected a string")
        if value is not None and not is_text(value):
            raise ValueError(f"get_actor(): {what}={value!r} has lone surrogates, which no name has")
    argument = {"namespace": namespace, "name": name}
    description = participant.process.requests.ask(lambda n: messages.Query(n, "find_actor", argument))
    if description is None:
        raise ValueError(
            f"there is no living actor named {name!r}"
            + (f" in namespace {namespace!r}" if namespace else "")
            + "; it was not created with this name, has ended, or lives in another namespace"
        )
    return ActorHandle(description, None)


def list_named_actors(all_namespaces: bool = False) -> list[str] | list[dict[str, str]]:
    """Return the names of the living actors that have one, or for all namespaces dicts of `namespace` and `name`."""
    participant = participation.participant or participation.ensure()
    namespace = None if all_namespaces else get_runtime_context().namespace
    named: list[dict[str, str]] = participant.process.requests.ask(
        lambda n: messages.Query(n, "actor_names", namespace)
    )
    return named if all_namespaces else [each["name"] for each in named]
