"""Actors as users see them: `ActorClass` (what `@afield.remote` makes of a class), `ActorHandle` and its methods."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from afield.errors import InvalidOptionError, NotInitializedError
from afield.runtime import current
from afield.runtime import messages as m
from afield.runtime.actor_calls import actor_ref_id
from afield.runtime.context import calling_context
from afield.runtime.dispatch import Task
from afield.runtime.options import ACTOR_OPTIONS, METHOD_OPTIONS, retry_on, returns_of, shape_of, validate
from afield.runtime.parameters import Parameters, describe
from afield.runtime.refs import ObjectRef, rebuild_ref
from afield.runtime.runtime_context import get_runtime_context, inherited_environment
from afield.runtime.serialization import deserialize, serialize
from afield.runtime.strategies import placement_of, settle
from afield.runtime.submission import Function, RetryOn

if TYPE_CHECKING:
    from afield.runtime.participant import Participant

_METHOD_OPTIONS_ATTRIBUTE = "__afield_method_options__"
_METHOD_FIELDS = {
    "group": "concurrency_group",
    "backpressure": "_generator_backpressure_num_objects",
    "retries": "max_task_retries",
}
#: Options of an actor that each handle to it must know.
OWN_HANDLE_OPTIONS = ("max_task_retries", "max_pending_calls", "groups")
#: Methods that every actor has: ready when the constructor is done; ends the actor after the calls before it.
SPECIAL_METHODS = ("__afield_ready__", "__afield_terminate__")
SPECIAL_METHODS_BY_ALIAS = {"__ray_ready__": "__afield_ready__", "__ray_terminate__": "__afield_terminate__"}


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
        self._set(cls, settle(options))

    def _set(self, cls: type, options: dict[str, Any]) -> None:
        self._cls = cls
        self._options = options
        self._shape = shape_of(options, default_cpus=0)
        self._session: object = None
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
        self._check_options()
        if self._session is not participant.key:
            serialized = serialize(self._cls, f"the class {self.__name__}", stored=False)
            for ref in serialized.refs:
                participant.process.pin_for_ever(ref, f"captured by the class {self.__name__}")
            self._blob, self._session = serialized.pack(), participant.key
        process = participant.process
        process.check_alive()
        actor_id = calling_context().next_task_id()
        description = self._describe(actor_id, process.process_id)
        name = self._options.get("name")
        if name:
            taken = _reserve(participant, name, self._options, description)
            if taken is not None:
                return ActorHandle.from_description(taken)
        restarts = self._options.get("max_restarts") or 0
        task = Task(actor_id, None, b"", None, retries_left=restarts)
        if args or kwargs:
            participant.arguments.encode(task, args, kwargs, f"{self.__name__}.__init__")
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
        spec = m.CreateActor(
            actor_id, self.__name__, self._blob, dict(self._shape), b"", None, None, options, placement
        )
        participant.actors.create(spec, task, detached)
        return ActorHandle(description, None if detached else ObjectRef(actor_ref_id(actor_id)))

    def _describe(self, actor_id: bytes, creator: bytes) -> dict[str, Any]:
        """Return what a handle must know, in a form that travels."""
        own = {
            "max_task_retries": self._options.get("max_task_retries") or 0,
            "max_pending_calls": max(0, self._options.get("max_pending_calls") or 0),
            "groups": list(self._options.get("concurrency_groups") or {}),
        }
        owner = b"" if self._options.get("lifetime") == "detached" else creator
        return describe_actor(actor_id, self.__name__, self._cls, own, owner)

    def _check_options(self) -> None:
        """What can be told only of all options together, once they are all there."""
        if self._options.get("get_if_exists") and not self._options.get("name"):
            raise InvalidOptionError(f"{self.__name__}: get_if_exists=True needs a name")
        groups = self._options.get("concurrency_groups") or {}
        for name, known in _methods(self._cls).items():
            _check_group(known.get("group"), groups, f"{self.__name__}.{name}()")

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
    taken: dict[str, Any] | None = participant.process.request(lambda n: m.Query(n, "reserve_actor_name", argument))
    if taken is not None and not options.get("get_if_exists"):
        raise ValueError(
            f"an actor named {name!r} exists already; use another name, get_actor({name!r}), or get_if_exists=True"
        )
    return taken


def get_actor(name: str, namespace: str | None = None) -> ActorHandle:
    """Return a handle to the living actor with this name.

    Raises:
        ValueError: there is none in the namespace (the session's by default).
    """
    participant = current.participant or current.ensure()
    argument = {"namespace": namespace, "name": name}
    description = participant.process.request(lambda n: m.Query(n, "find_actor", argument))
    if description is None:
        raise ValueError(
            f"there is no living actor named {name!r}"
            + (f" in namespace {namespace!r}" if namespace else "")
            + "; it was not created with this name, has ended, or lives in another namespace"
        )
    return ActorHandle.from_description(description)


def list_named_actors(all_namespaces: bool = False) -> list[str] | list[dict[str, str]]:
    """Return the names of the living actors that have one, or for all namespaces dicts of `namespace` and `name`."""
    participant = current.participant or current.ensure()
    namespace = None if all_namespaces else get_runtime_context().namespace
    named: list[dict[str, str]] = participant.process.request(lambda n: m.Query(n, "actor_names", namespace))
    return named if all_namespaces else [each["name"] for each in named]


def _check_group(group: str | None, groups: Collection[str], what: str) -> None:
    if group and group not in groups:
        declared = ", ".join(map(repr, groups)) or "none"
        raise InvalidOptionError(
            f"{what}: there is no concurrency group {group!r}; concurrency_groups declares {declared}"
        )


def describe_actor(
    actor_id: bytes, class_name: str, cls: type, options: dict[str, Any], owner: bytes
) -> dict[str, Any]:
    """Return what a handle must know of an actor, in a form that travels; `options` are the `OWN_HANDLE_OPTIONS`."""
    described = {"actor_id": actor_id, "class_name": class_name, "methods": _methods(cls), "owner": owner}
    return described | {option: options[option] for option in OWN_HANDLE_OPTIONS}


def _methods(cls: type) -> dict[str, dict[str, Any]]:
    """Return what is to be known of each method of an actor class: parameters, returns, group, back-pressure, retries."""
    methods: dict[str, dict[str, Any]] = {name: {"num_returns": 1} for name in SPECIAL_METHODS}
    for name in dir(cls):
        if name.startswith("__") and any(name in vars(kind) for kind in ActorHandle.__mro__):
            continue  # what every object has: it means the handle
        member = inspect.getattr_static(cls, name)
        bound = not isinstance(member, staticmethod)
        if isinstance(member, (staticmethod, classmethod)):
            member = member.__func__
        if callable(member):
            options = getattr(member, _METHOD_OPTIONS_ATTRIBUTE, {})
            methods[name] = {
                "num_returns": returns_of(options, member),
                "group": options.get("concurrency_group") or "",
                "backpressure": options.get("_generator_backpressure_num_objects") or 0,
                "retries": options.get("max_task_retries"),
                "retry_on": _pack_types(retry_on(options)),
                "parameters": describe(member, bound=bound) if inspect.isfunction(member) else None,
            }
    return methods


def _pack_types(retry: RetryOn) -> bool | bytes:
    """The actor directory keeps descriptions and knows no classes of the user."""
    return retry if isinstance(retry, bool) else serialize(retry, "retry_exceptions", stored=False).pack()


def _unpack_types(packed: bool | bytes) -> RetryOn:
    retry: RetryOn = packed if isinstance(packed, bool) else deserialize(packed, "retry_exceptions", None)
    return retry


class ActorHandle:
    """Names an actor; `handle.method.remote(...)` calls it. Can be passed to tasks and other actors.

    The actor ends when all handles to it are gone, unless it is detached.
    """

    def __init__(self, description: dict[str, Any], life: ObjectRef | None) -> None:
        self._description = description
        self._actor_id: bytes = description["actor_id"]
        self._class_name: str = description["class_name"]
        self._life = life

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> ActorHandle:
        """Make a handle of what the actor directory told."""
        owner = description["owner"]
        return cls(description, rebuild_ref(actor_ref_id(description["actor_id"]), owner) if owner else None)

    def __getattr__(self, name: str) -> ActorMethod:
        methods = self.__dict__["_description"]["methods"]
        known = methods.get(SPECIAL_METHODS_BY_ALIAS.get(name, name))
        if known is None:
            if name.startswith("__"):
                raise AttributeError(name)
            near = difflib.get_close_matches(name, [n for n in methods if not n.startswith("__")], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise AttributeError(f"the actor {self._class_name} has no method {name!r}{hint}")
        bound = ActorMethod(self, SPECIAL_METHODS_BY_ALIAS.get(name, name), known)
        # Found directly from now on: a call in a loop does not come here again.
        self.__dict__[name] = bound
        return bound

    def __reduce__(self) -> tuple[Any, ...]:
        return ActorHandle, (self._description, self._life)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ActorHandle) and self._actor_id == other._actor_id

    def __hash__(self) -> int:
        return hash(self._actor_id)

    def __repr__(self) -> str:
        return f"ActorHandle({self._class_name}, {self._actor_id.hex()})"


class ActorMethod:
    """A method of an actor; call it with `.remote(...)`."""

    def __init__(self, handle: ActorHandle, name: str, known: dict[str, Any]) -> None:
        description = handle._description
        retries = known.get("retries")
        self._known = known
        self._actor_id = handle._actor_id
        self._owner_name = handle._class_name
        self._name = name
        self._retries: int = description["max_task_retries"] if retries is None else retries
        self._max_pending: int = description["max_pending_calls"]
        self._parameters = Parameters(known.get("parameters"), f"{handle._class_name}.{name}")
        self._function = Function(
            name,
            b"",
            known["num_returns"],
            backpressure=known.get("backpressure") or 0,
            group=known.get("group") or "",
            retry_on=_unpack_types(known.get("retry_on") or False),
        )
        #: A reference to the object of the actor's life, not to the handle, which would be a cycle.
        self._life = handle._life
        self._handle_description = description

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"the actor method {self._owner_name}.{self._name}() cannot be called directly; "
            f"use .{self._name}.remote(...)"
        )

    def options(self, **options: Any) -> ActorMethod:
        """Return the method with other options; see `afield.method`."""
        validate(options, METHOD_OPTIONS, f"{self._owner_name}.{self._name}.options()")
        known = dict(self._known)
        _check_group(options.get("concurrency_group"), self._handle_description["groups"], f"{self._name}.options()")
        if options.get("num_returns") is not None:
            known["num_returns"] = returns_of(options, self.options)
        for name, option in _METHOD_FIELDS.items():
            if options.get(option) is not None:
                known[name] = options[option]
        if options.get("retry_exceptions") is not None:
            known["retry_on"] = _pack_types(retry_on(options))
        return ActorMethod(ActorHandle(self._handle_description, self._life), self._name, known)

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method; return its outcome's `ObjectRef` without waiting (see `RemoteFunction.remote`).

        Raises:
            TypeError: the arguments do not fit the method.
            PendingCallsLimitExceededError: `max_pending_calls` of the actor are reached.
        """
        self._parameters.check(args, kwargs)
        participant = current.participant
        if participant is None:
            raise NotInitializedError(f"the actor {self._owner_name} belongs to a runtime that was shut down")
        return participant.actors.submit(self._actor_id, self._function, args, kwargs, self._retries, self._max_pending)
