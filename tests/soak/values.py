"""Values that a soak stores, as specifications: made with NumPy for the model, and with a device's array module for afield.

Theory of operation. A `Leaf` is an array that follows from a few numbers: seed, dtype, shape, layout. A `Step` is what a task
makes of other values. `model` computes either with NumPy alone; `differs` says where a value that came out of afield is not
that. Nothing here calls afield, but for `make`, which is handed the array module to make a leaf with.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

DTYPES = ("u1", "i4", "f4", "f8", "i8", "?")
LAYOUTS = ("c", "fortran", "every other", "reversed", "transposed", "slice", "row of many")
#: Elements: of what travels inline, of what is stored, and around the limit between the two (100 KiB).
SIZES = ((0, 3), (1, 200), (10_000, 14_000), (100_000, 300_000), (500_000, 1_200_000))


@dataclass(frozen=True)
class Leaf:
    """An array that follows from its seed; `on_device` says where it is made."""

    seed: int
    dtype: str
    shape: tuple[int, ...]
    layout: str
    on_device: bool


@dataclass(frozen=True)
class Step:
    """What the operation `name` makes of its arguments."""

    name: str
    arguments: tuple[Spec, ...]


Spec = Leaf | Step


def random_leaf(rng: random.Random, *, devices: bool) -> Leaf:
    """Draw an array; small ones are drawn more often than large ones."""
    low, high = rng.choices(SIZES, (2, 6, 3, 3, 1))[0]
    count = rng.randint(low, high)
    shape: tuple[int, ...] = (count,)
    if rng.random() < 0.05:
        shape = ()
    elif count and rng.random() < 0.5:
        rows = rng.choice([1, 2, 3, 7])
        shape = (rows, -(-count // rows))
    return Leaf(rng.getrandbits(32), rng.choice(DTYPES), shape, rng.choice(LAYOUTS), devices and rng.random() < 0.6)


def _base(leaf: Leaf) -> np.ndarray[Any, Any]:
    """Return the array that a leaf's layout is a view of."""
    shape = leaf.shape
    if shape:
        if leaf.layout == "every other":
            shape = (*shape[:-1], 2 * shape[-1])
        elif leaf.layout == "slice":
            shape = (*shape[:-1], shape[-1] + 5)
        elif leaf.layout == "row of many":
            shape = (3, *shape)
        elif leaf.layout == "transposed":
            shape = shape[::-1]
    count = int(np.prod(shape, dtype=np.int64))
    numbers = (np.arange(count, dtype=np.uint32) * np.uint32(2654435761) + np.uint32(leaf.seed)) >> np.uint32(7)
    if leaf.dtype == "?":
        return (numbers % 2 == 1).reshape(shape)
    return (numbers % 251).astype(leaf.dtype).reshape(shape)


def _view(base: Any, leaf: Leaf) -> Any:
    if not leaf.shape:
        return base
    views: Mapping[str, Callable[[Any], Any]] = {
        "every other": lambda x: x[..., ::2],
        "slice": lambda x: x[..., 2:-3],
        "row of many": lambda x: x[1],
        "transposed": lambda x: x.T,
        "reversed": lambda x: x[..., ::-1],
    }
    return views.get(leaf.layout, lambda x: x)(base)


def make(leaf: Leaf, module: Any) -> Any:
    """Return a leaf as an array of `module`, NumPy or a device's."""
    base = _base(leaf)
    if leaf.layout == "fortran":
        base = np.asfortranarray(base)
    return _view(base if module is np else module.asarray(base), leaf)


def module_of(array: Any, here: Callable[[], Any]) -> Any:
    """Return NumPy for its arrays, and for others what `here` returns."""
    return np if isinstance(array, np.ndarray | np.generic) else here()


def apply(name: str, arguments: list[Any], here: Callable[[], Any]) -> Any:
    """Do an operation, in a task as in the model; `here` returns the array module of device arrays."""
    first = arguments[0]
    while isinstance(first, dict):
        first = first["a"]
    if name == "same":
        return arguments[0]
    if name == "more":
        return ~first if first.dtype == np.dtype("?") else first + first.dtype.type(1)
    if name == "turn":
        return first.T
    if name == "flat":
        return first.reshape(-1)
    if name == "copy":
        return first.copy()
    if name == "twice":
        flat = first.reshape(-1)
        return module_of(flat, here).concatenate([flat, flat])
    if name == "dict":
        return {"a": first, "rest": list(arguments[1:]), "shape": tuple(first.shape)}
    raise AssertionError(name)


OPERATIONS = ("same", "more", "turn", "flat", "copy", "twice", "dict")


def model(spec: Spec) -> Any:
    """Return what a value must be, computed with NumPy."""
    if isinstance(spec, Leaf):
        return make(spec, np)
    return apply(spec.name, [model(argument) for argument in spec.arguments], lambda: np)


def to_host(value: Any) -> Any:
    """Return a value with its device arrays as NumPy arrays."""
    if isinstance(value, dict):
        return {key: to_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_host(item) for item in value)
    return value.get() if hasattr(value, "get") and not isinstance(value, np.ndarray | np.generic) else value


def differs(found: Any, expected: Any, where: str = "value") -> str:
    """Return where two values differ, or ""."""
    if isinstance(expected, np.ndarray | np.generic):
        if not isinstance(found, np.ndarray | np.generic):
            return f"{where} is a {type(found).__name__}"
        if found.dtype != expected.dtype or found.shape != expected.shape:
            return f"{where} is {found.dtype} {found.shape}, not {expected.dtype} {expected.shape}"
        wrong = np.flatnonzero(np.ravel(found != expected))
        if len(wrong):
            at = int(wrong[0])
            return f"{where}: {len(wrong)} of {found.size} items, at first [{at}] {np.ravel(found)[at]!r}"
        return ""
    if type(found) is not type(expected) or (hasattr(expected, "__len__") and len(found) != len(expected)):
        return f"{where} is a {type(found).__name__}, not a {type(expected).__name__} of that length"
    if isinstance(expected, dict):
        parts = [(f"{where}[{key!r}]", found.get(key), item) for key, item in expected.items()]
    elif isinstance(expected, list | tuple):
        parts = [(f"{where}[{at}]", found[at], item) for at, item in enumerate(expected)]
    else:
        return "" if found == expected else f"{where} is {found!r}, not {expected!r}"
    return next(filter(None, (differs(one, other, name) for name, one, other in parts)), "")
