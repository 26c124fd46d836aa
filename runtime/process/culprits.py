"""Which part of a value cannot be pickled: what a `SerializationError` names.

Theory of operation. What cannot be pickled is taken apart as pickle does it (items, attributes, what a function captures, what
a class is made of), and each part is tried by itself. The search goes down into a part that fails until it comes to one all of
whose parts can be pickled: that is the culprit, and the way to it is its name. A part that is met again on the way, as a class
is in its own methods, tells nothing new, and the search goes on beside it. Code of the user's runs while parts are pickled and
looked at; what it raises only means that there is nothing to see there. Values have any size, so the trials are counted.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

import cloudpickle

from afield.transport.interrupts import interruptible

#: After so many trials, and at this depth, the part that the search has come to is named as a whole.
MAX_TRIALS = 10_000
MAX_DEPTH = 16
#: Keys are shown up to this length.
_MAX_KEY = 60
#: Attributes of a class that are not the user's, or are pickled in another way.
_OF_EVERY_CLASS = {"__dict__", "__weakref__", "__module__", "__doc__", "__qualname__", "__annotations__"}

#: What has been taken apart when it comes to what its `__reduce__` gives.
_TAKEN_APART = (dict, list, tuple, set, frozenset, MethodType, functools.partial, staticmethod, classmethod, property)

#: A part of a value: what is added to the path to it, and the part.
Part = tuple[str, Any]


def find_culprit(value: Any, path: str) -> Part:
    """Return the path to the part of `value` that cannot be pickled, and the part."""
    return _Search().find(value, path, 0) or (path, value)


class _Search:
    """One search for a culprit."""

    def __init__(self) -> None:
        self.trials = 0
        #: All that was found to fail, by its id; kept, so that no other value gets the same id meanwhile.
        self.failed: dict[int, Any] = {}

    def find(self, value: Any, path: str, depth: int) -> Part | None:
        """Look at the parts of what cannot be pickled; None: it fails only through what is being looked at already."""
        self.failed[id(value)] = value
        is_whole = True
        for name, part in _parts(value):
            if id(part) in self.failed:
                is_whole = False
            elif self.trials >= MAX_TRIALS or depth >= MAX_DEPTH:
                break
            elif not self._can_pickle(part):
                is_whole = False
                found = self.find(part, path + name, depth + 1)
                if found is not None:
                    return found
        return (path, value) if is_whole else None

    @interruptible
    def _can_pickle(self, value: Any) -> bool:
        self.trials += 1
        try:
            cloudpickle.dumps(value, 5)
        except Exception:
            return False
        return True


@interruptible
def _parts(value: Any) -> list[Part]:
    """Return what a value is made of, as far as that can be seen."""
    parts: list[Part] = []
    try:
        parts.extend(_look(value))
    except Exception:  # code of the user's
        return parts
    return parts


def _look(value: Any) -> Iterator[Part]:
    if isinstance(value, dict):
        for key, item in list(value.items()):
            yield f" (key {_shown(key)})", key
            yield f"[{_shown(key)}]", item
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, FunctionType):
        yield from _of_function(value)
    elif isinstance(value, MethodType):
        yield " (its object)", value.__self__
        yield "", value.__func__
    elif isinstance(value, functools.partial):
        yield " (its function)", value.func
        yield " (its arguments)", value.args
        yield " (its arguments)", value.keywords
    elif isinstance(value, (staticmethod, classmethod)):
        yield "", value.__func__
    elif isinstance(value, property):
        yield from (("", each) for each in (value.fget, value.fset, value.fdel) if each is not None)
    if isinstance(value, type):
        own = type.__dict__["__dict__"].__get__(value)
        yield from ((f".{name}", item) for name, item in list(own.items()) if name not in _OF_EVERY_CLASS)
        yield from ((f" (its base {base.__name__})", base) for base in value.__bases__)
    elif not isinstance(value, FunctionType):
        yield from _of_instance(value)
        if not isinstance(value, _TAKEN_APART):
            yield from _reduced(value)


def _of_function(function: FunctionType) -> Iterator[Part]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield f" (captured {name!r})", cell.cell_contents
        except ValueError:  # it has no value yet
            continue
    for name in _globals_of(function.__code__):
        if name in function.__globals__:
            yield f" (global {name!r})", function.__globals__[name]
    defaults = function.__defaults__ or ()
    count = function.__code__.co_argcount
    names = function.__code__.co_varnames[count - len(defaults) : count]
    yield from ((f" (default of {name!r})", item) for name, item in zip(names, defaults, strict=False))
    yield from ((f" (default of {name!r})", item) for name, item in (function.__kwdefaults__ or {}).items())
    yield from ((f".{name}", item) for name, item in function.__dict__.items())


def _globals_of(code: CodeType) -> Iterator[str]:
    """Yield the names that a function, and the functions inside it, take from its module."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals_of(constant)


def _of_instance(value: Any) -> Iterator[Part]:
    state = getattr(value, "__dict__", None)
    if isinstance(state, dict):
        yield from ((f".{name}", item) for name, item in list(state.items()))
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                yield f".{name}", getattr(value, name)
    yield f" (its class {type(value).__name__})", type(value)


def _reduced(value: Any) -> Iterator[Part]:
    reduced = value.__reduce_ex__(5)
    if isinstance(reduced, tuple):
        yield " (what its __reduce__ gives)", reduced[:3]
        yield from ((f"[{index}]", item) for index, item in enumerate(reduced[3] or () if len(reduced) > 3 else ()))
        yield from ((f"[{_shown(key)}]", item) for key, item in (reduced[4] or () if len(reduced) > 4 else ()))


def _shown(key: Any) -> str:
    try:
        text = repr(key)
    except Exception:
        text = f"<{type(key).__name__}>"
    return text if len(text) <= _MAX_KEY else text[:_MAX_KEY] + "..."
