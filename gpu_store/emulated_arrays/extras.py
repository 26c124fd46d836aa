"""`cupyx` on emulated devices: what of it works without CUDA, and for the rest why it does not.

Names and meaning are CuPy's: `scatter_add` and its kind change an array in place, "pinned" arrays are NumPy's, in host memory
(which no copy of an emulated device needs to have page-locked).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import numpy as np

from afield.gpu_store.emulated_arrays.array import EmulatedArray


def extra_names() -> dict[str, Any]:
    """Return the names of `cupyx`."""
    return {
        **{name: _scatter(name) for name in ("scatter_add", "scatter_max", "scatter_min")},
        "rsqrt": rsqrt,
        "empty_pinned": empty_pinned,
        "zeros_pinned": zeros_pinned,
        "empty_like_pinned": empty_like_pinned,
        "zeros_like_pinned": zeros_like_pinned,
    }


def _scatter(name: str) -> Callable[[EmulatedArray, Any, Any], None]:
    def scatter(a: EmulatedArray, slices: Any, value: Any) -> None:
        getattr(a, name)(slices, value)

    scatter.__name__ = scatter.__qualname__ = name
    scatter.__doc__ = f"As `a.{name}(slices, value)`."
    return scatter


def rsqrt(x: EmulatedArray, out: EmulatedArray | None = None) -> Any:
    """Return one over the square root of each element."""
    roots: Any = np.sqrt(cast(Any, x))
    return np.reciprocal(roots, out=cast(Any, out))


def empty_pinned(shape: Any, dtype: Any = float, order: Any = "C") -> np.ndarray[Any, Any]:
    """Return an uninitialised array in host memory."""
    return np.empty(shape, dtype, order)


def zeros_pinned(shape: Any, dtype: Any = float, order: Any = "C") -> np.ndarray[Any, Any]:
    """Return an array of zeros in host memory."""
    return np.zeros(shape, dtype, order)


def empty_like_pinned(
    a: Any, dtype: Any = None, order: Any = "K", subok: Any = None, shape: Any = None
) -> np.ndarray[Any, Any]:
    """Return an uninitialised array in host memory, like a host or device array."""
    if subok is not None:
        raise TypeError("subok is not supported yet")
    model = a._array if isinstance(a, EmulatedArray) else a
    return np.array(np.empty_like(model, dtype, order, subok=False, shape=shape), copy=None)


def zeros_like_pinned(
    a: Any, dtype: Any = None, order: Any = "K", subok: Any = None, shape: Any = None
) -> np.ndarray[Any, Any]:
    """Return an array of zeros in host memory, like a host or device array."""
    made = empty_like_pinned(a, dtype, order, subok, shape)
    made.fill(0)
    return made


def scipy_names(module: Callable[[], ModuleType]) -> dict[str, Any]:
    """Return the names of `cupyx.scipy`, which `module()` returns."""

    def get_array_module(*args: Any) -> ModuleType:
        """Return `cupyx.scipy` if a device array is among the arguments, else SciPy."""
        if any(isinstance(value, EmulatedArray) for value in args):
            return module()
        return importlib.import_module("scipy")

    return {"get_array_module": get_array_module}
