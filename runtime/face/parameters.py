"""The parameters of a remote function or method, so that a wrong call fails where it is made.

Theory of operation. What is to be known of a function travels in handles as plain tuples (name, kind, whether it may be
left out), without defaults, which need not be picklable. Nearly all calls pass by two comparisons; `inspect` looks at the
others and words the complaint.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

Described = list[tuple[str, int, bool]]


def describe(function: Callable[..., Any], *, bound: bool = False) -> Described | None:
    """Return what a call must know, None if the function does not tell; the first parameter is left out if it is `bound`.

    A wrapper counts, not what it wraps: it may pass something else on.
    """
    try:
        parameters = list(inspect.signature(function, follow_wrapped=False).parameters.values())
    except (ValueError, TypeError):
        return None
    if bound and parameters and parameters[0].kind in _POSITIONAL:
        del parameters[0]
    return [(each.name, int(each.kind), each.default is not each.empty) for each in parameters]


class Parameters:
    """Checks calls of one function."""

    __slots__ = ("_described", "_least", "_most", "_what")

    def __init__(self, described: Iterable[tuple[str, int, bool]] | None, what: str) -> None:
        self._what = what
        self._described = described
        self._least, self._most = 0.0, float("inf")
        if described is None:
            return
        kinds = [kind for _, kind, _ in described]
        if inspect.Parameter.VAR_POSITIONAL not in kinds:
            self._most = sum(kind in _POSITIONAL for kind in kinds)
        self._least = sum(kind in _POSITIONAL and not optional for _, kind, optional in described)
        if any(kind == inspect.Parameter.KEYWORD_ONLY and not optional for _, kind, optional in described):
            self._least = float("inf")  # a call by position alone cannot be right

    def check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise TypeError if the function cannot take these arguments."""
        if (not kwargs and self._least <= len(args) <= self._most) or self._described is None:
            return
        parameters = [
            inspect.Parameter(name, inspect._ParameterKind(kind), default=None if optional else inspect.Parameter.empty)
            for name, kind, optional in self._described
        ]
        try:
            inspect.Signature(parameters).bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self._what}(): {error}") from None
