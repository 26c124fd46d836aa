"""Index arrays of device arrays: CuPy's rule for what lies outside, and what writes through several equal indices.

Theory of operation. A kernel cannot raise, so CuPy takes an index in an array modulo the length of its axis: 5 of an axis of 3
is 2. NumPy would raise; so the indices are wrapped before NumPy sees them. A single number is looked at on the host, and
raises IndexError in both.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from afield.gpu_store.emulated_arrays.devices import Array


def wrapped(indices: Any, extent: int) -> Any:
    """Return integer indices that lie within an axis of so many items; nothing lies within an axis of none."""
    found = np.asarray(indices)
    if found.dtype.kind not in "iu" or found.size == 0 or extent == 0:
        return indices
    inside = -extent <= int(found.min()) and int(found.max()) < extent
    return indices if inside else found % extent


def wrapped_key(parts: list[Any], shape: tuple[int, ...]) -> list[Any]:
    """Wrap the arrays in a key; parts that stand for several axes, or for none, are stepped over."""
    if not any(isinstance(part, np.ndarray | list) for part in parts):
        return parts
    taken = sum(_axes(part) for part in parts)
    result, axis = [], 0
    for part in parts:
        axes = max(len(shape) - taken, 0) if part is Ellipsis else _axes(part)
        wraps = isinstance(part, np.ndarray | list) and axes == 1 and axis < len(shape)
        result.append(wrapped(part, shape[axis]) if wraps else part)
        axis += axes
    return result


def _axes(part: Any) -> int:
    """How many axes of the array a part of a key stands for."""
    if part is None or part is Ellipsis:
        return 0
    if isinstance(part, bool | np.bool_):
        return 0
    if isinstance(part, np.ndarray | list):
        found = np.asarray(part)
        return found.ndim if found.dtype == bool else 1
    return 1


def wrapped_take(array: Array, indices: Any, axis: int | None = None, out: Array | None = None) -> Any:
    """NumPy's `take` by CuPy's rule."""
    extent = array.size if axis is None else array.shape[axis]
    return np.take(array, wrapped(indices, extent), axis=axis, out=out)


def wrapped_take_along_axis(array: Array, indices: Array, axis: int | None = -1) -> Any:
    """NumPy's `take_along_axis` by CuPy's rule."""
    extent = array.size if axis is None else array.shape[axis]
    return np.take_along_axis(array, wrapped(indices, extent), axis)


def wrapped_put(array: Array, indices: Any, values: Any, mode: Any = "wrap") -> None:
    """NumPy's `put`, which wraps unless it is told otherwise."""
    np.put(array, indices, values, mode=mode)
