"""Classes of errors that are two things: an error of ours, and the type of what the user's code raised.

Theory of operation. `mixed(base, kind)` derives a class from both, once for each pair, so that both `except` clauses match.
Nothing of the user's runs for that: no metaclass is called, no type is hashed. What `_OURS` holds is found before what the
user's type has under the same name. Some types are not mixed in, and `base` itself is the class then:

- what ends the program, a coroutine or an iteration (`_NEVER_MIXED_IN`): raised from `get` it would end more than the task;
- a group that holds more than `Exception`s, which Python allows no `Exception` to be;
- what `base` is already, and what cannot be derived from.
"""

from __future__ import annotations

import sys
from abc import ABCMeta
from typing import Any

from afield.causes import INNATE, class_attribute, name_of, new, state_of


class Own:
    """An attribute of ours, whatever the user's type has under the same name."""

    __slots__ = ("name",)

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, error: BaseException | None, owner: type) -> Any:
        if error is None:
            return self
        try:
            return state_of(error)[self.name]
        except KeyError:
            raise AttributeError(self.name) from None

    def __set__(self, error: BaseException, value: Any) -> None:
        state_of(error)[self.name] = value


def own() -> Any:
    """Return an attribute of our own for a class of errors that may be mixed with a type of the user's."""
    return Own()


#: Raised from `get` these would end more than the task: the program, the reader's coroutine, or the iteration it is in.
_NEVER_MIXED_IN = (
    SystemExit,
    KeyboardInterrupt,
    GeneratorExit,
    StopIteration,
    StopAsyncIteration,
)
#: Found before what the user's type has of the same name: an error that has arrived runs none of its code but that of its
#: own methods and properties.
_OURS: dict[str, Any] = {
    **{name: vars(BaseException)[name] for name in INNATE},
    **{name: vars(BaseException)[name] for name in ("__setattr__", "__delattr__", "__getattribute__")},
    **{
        name: vars(object)[name]
        for name in ("__eq__", "__ne__", "__hash__", "__class__", "__reduce_ex__", "__format__")
    },
    "__bool__": lambda self: True,
    "__notes__": Own(),
    "__module__": "afield.errors",
}
#: What a class of exceptions is tried with, before it is trusted.
_TRIAL = {False: (), True: ("", (Exception(),))}
#: By the base and the number of the user's type, which the derived one keeps alive; no type is hashed.
_derived: dict[tuple[type, int], tuple[type, type]] = {}


def mixed(base: type[Any], kind: type[BaseException]) -> type[Any]:
    """Return the class that is `base` and the user's `kind`, or `base` where that is not to be."""
    if issubclass(base, kind) or issubclass(kind, _NEVER_MIXED_IN) or _is_of_asyncio(kind):
        return base
    if issubclass(kind, BaseExceptionGroup) and not issubclass(kind, ExceptionGroup):
        return base
    known = _derived.get((base, id(kind)))
    if known is None:
        known = _derived[base, id(kind)] = kind, _derive(base, kind)
    return known[1]


def _is_of_asyncio(kind: type[BaseException]) -> bool:
    """Tell whether it is asyncio's `CancelledError`; a process without asyncio has none, and need not import it for this."""
    asyncio = sys.modules.get("asyncio.exceptions")
    return asyncio is not None and issubclass(kind, asyncio.CancelledError)


def _derive(base: type[Any], kind: type[BaseException]) -> type[Any]:
    # A metaclass of the user's is not asked, as it may want more than other classes do; but that of abstract classes has to be.
    metaclass: Any = type(kind)
    maker = metaclass if metaclass is ABCMeta else type
    name = f"{base.__name__}({name_of(kind)[1].rpartition('.')[2]})"
    namespace = _OURS | ({"__getattr__": _attribute_of_cause} if class_attribute(kind, "__getattr__") else {})
    try:
        derived: type[Any] = maker.__new__(metaclass, name, (base, kind), namespace)
        new(derived, _TRIAL[issubclass(kind, BaseExceptionGroup)])
    except Exception:  # layout conflict, or a type that refuses to be derived from
        return base
    return derived


def _attribute_of_cause(error: Any, name: str) -> Any:
    """What the user's type makes up when it is asked for, it is asked for itself; it may rely on what it has only there."""
    if not (name.startswith("__") and name.endswith("__")):
        return getattr(error.cause, name)
    raise AttributeError(name)
