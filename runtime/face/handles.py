"""Handles to actors: `ActorHandle` and its methods, what must be known of an actor to make one, and `@method`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection
from typing import Any

from afield.errors import InvalidOptionError, NotInitializedError
from afield.runtime.calls import participation
from afield.runtime.calls.callee import Callee
from afield.runtime.cores.caller import life_of
from afield.runtime.face.options import METHOD_OPTIONS, backpressure_of, retry_on, returns_of, validate
from afield.runtime.face.parameters import Parameters, describe
from afield.runtime.process.refs import ObjectRef, rebuild_ref
from afield.runtime.values.definitions import Definition
from afield.tracebacks import trim

_METHOD_OPTIONS_ATTRIBUTE = "__afield_method_options__"
_METHOD_FIELDS = {
    "group": "concurrency_group",
    "backpressure": "_generator_backpressure_num_objects",
    "retries": "max_task_retries",
    "title": "name",
}
#: Options of an actor that each handle to it must know.
OWN_HANDLE_OPTIONS = ("max_task_retries", "max_pending_calls", "groups", "in_order")
#: A method is looked up by its name.
METHOD = Definition(b"")
#: Methods that every actor has: ready when the constructor is done; ends the actor after the calls before it; runs a function
#: on the actor, which is its first argument.
SPECIAL_METHODS = ("__afield_ready__", "__afield_terminate__", "__afield_call__")
SPECIAL_METHODS_BY_ALIAS = {f"__ray_{name[len('__afield_') :]}": name for name in SPECIAL_METHODS}


def method(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Set options of one actor method, for example ``@afield.method(num_returns=2)``."""
    validate(options, METHOD_OPTIONS, "@method")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        setattr(function, _METHOD_OPTIONS_ATTRIBUTE, options)
        return function

    return decorate


def check_group(group: str | None, groups: Collection[str], what: str) -> None:
    if group and group not in groups:
        declared = ", ".join(map(repr, groups)) or "none"
        raise InvalidOptionError(
            f"{what}: there is no concurrency group {group!r}; concurrency_groups declares {declared}"
        )


def is_async(cls: type) -> bool:
    """Tell whether an actor class has a method that is a coroutine or an asynchronous generator."""
    members = (inspect.getattr_static(cls, name) for name in dir(cls))
    functions = (member.__func__ if isinstance(member, (staticmethod, classmethod)) else member for member in members)
    return any(inspect.iscoroutinefunction(f) or inspect.isasyncgenfunction(f) for f in functions)


def groups_in_order(cls: type, options: dict[str, Any]) -> list[str]:
    """Return the concurrency groups whose calls run one at a time, and so in order; "" is that of all other methods."""
    if is_async(cls):
        return []
    sizes = {"": options.get("max_concurrency") or 1} | (options.get("concurrency_groups") or {})
    return [group for group, size in sizes.items() if size == 1]


def describe_actor(
    actor_id: bytes, class_name: str, cls: type, options: dict[str, Any], owner: bytes
) -> dict[str, Any]:
    """Return what a handle must know of an actor, in a form that travels; `options` are the `OWN_HANDLE_OPTIONS`."""
    described = {"actor_id": actor_id, "class_name": class_name, "methods": methods_of(cls), "owner": owner}
    return described | {option: options[option] for option in OWN_HANDLE_OPTIONS}


def methods_of(cls: type) -> dict[str, dict[str, Any]]:
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
                "title": options.get("name") or "",
                "group": options.get("concurrency_group") or "",
                "backpressure": backpressure_of(options),
                "retries": options.get("max_task_retries"),
                "retry_on": retry_on(options),
                "parameters": describe(member, bound=bound) if inspect.isfunction(member) else None,
            }
    return methods


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
        """Make a handle of what the actor directory told, which keeps the actor alive."""
        owner = description["owner"]
        return cls(description, rebuild_ref(life_of(description["actor_id"]), owner) if owner else None)

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

    def __copy__(self) -> ActorHandle:
        """Return the handle itself, which never changes: nothing leaves the process, so nothing is kept for it."""
        return self

    def __deepcopy__(self, memo: Any) -> ActorHandle:
        return self

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
        self._function = Callee(
            known.get("title") or name,
            METHOD,
            known["num_returns"],
            backpressure=max(0, known.get("backpressure") or 0),
            group=known.get("group") or "",
            retry_on=known.get("retry_on") or False,
            order=group if (group := known.get("group") or "") in description["in_order"] else None,
            method=name,
        )
        #: A reference to the object of the actor's life, not to the handle, which would be a cycle.
        self._life = handle._life
        self._handle_description = description

    def __copy__(self) -> ActorMethod:
        """Return the method itself, as a copy of its handle is the handle."""
        return self

    def __deepcopy__(self, memo: Any) -> ActorMethod:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"the actor method {self._owner_name}.{self._name}() cannot be called directly; "
            f"use .{self._name}.remote(...)"
        )

    def options(self, **options: Any) -> ActorMethod:
        """Return the method with other options; see `afield.method`."""
        validate(options, METHOD_OPTIONS, f"{self._owner_name}.{self._name}.options()")
        known = dict(self._known)
        check_group(options.get("concurrency_group"), self._handle_description["groups"], f"{self._name}.options()")
        if options.get("num_returns") is not None:
            known["num_returns"] = returns_of(options, self.options)
        for name, option in _METHOD_FIELDS.items():
            if options.get(option) is not None:
                known[name] = options[option]
        if options.get("retry_exceptions") is not None:
            known["retry_on"] = retry_on(options)
        return ActorMethod(ActorHandle(self._handle_description, self._life), self._name, known)

    def _remote(self, args: Any = (), kwargs: Any = None, **options: Any) -> Any:
        """Call the method with options: the form that Ray's older programs use."""
        return (self.options(**options) if options else self).remote(*args, **(kwargs or {}))

    def remote(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call the method; return its outcome's `ObjectRef` without waiting (see `RemoteFunction.remote`).

        Raises:
            TypeError: the arguments do not fit the method.
            PendingCallsLimitExceededError: `max_pending_calls` of the actor are reached.
        """
        try:
            self._parameters.check(args, kwargs)
            participant = participation.participant
            if participant is None:
                raise NotInitializedError(f"the actor {self._owner_name} belongs to a runtime that was shut down")
            actors = participant.actors
            return actors.submit(self._actor_id, self._function, args, kwargs, self._retries, self._max_pending)
        except BaseException as error:
            trim(error)
            raise  # without a frame of this method
