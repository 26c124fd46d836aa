"""Which adapter a type of array has, decided from the type alone, without importing any library.

Theory of operation. Every object in every value passes `adapter_of`, so the answer is kept for each type. A library's own
array type is known by its module and name; of any other type it is enough that it has `__cuda_array_interface__` or
`__dlpack__`. A class derived from a library's array type is left to that library's own pickling (which may well contain
the array type itself, as torch's parameters do), because an adapter could only give the base class back.

An adapter is loaded with the first array that needs it: most sessions have no devices, and every process starts with this.
"""

from __future__ import annotations

import functools
import importlib

import numpy as np

from afield.gpu_store.interop.places import Adapter

#: The adapters by what pickles call them: module of this package, and class.
_ADAPTERS = {
    "emulated": ("emulated", "EmulatedAdapter"),
    "cupy": ("interop_cupy", "CupyAdapter"),
    "cuda": ("interop_cupy", "InterfaceAdapter"),
    "dlpack": ("interop_cupy", "DlpackAdapter"),
    "numba": ("interop_numba", "NumbaAdapter"),
    "torch": ("interop_torch", "TorchAdapter"),
}
_KNOWN = {
    ("afield", "EmulatedArray"): "emulated",
    ("cupy", "ndarray"): "cupy",
    ("torch", "Tensor"): "torch",
    ("numba", "DeviceNDArray"): "numba",
    ("numba_cuda", "DeviceNDArray"): "numba",
}

#: Libraries whose types hold device memory and more (an index, a mask, a pool): they know best how to pickle them.
_LEFT_ALONE = frozenset({"cudf", "cuml", "cupyx", "pandas", "polars", "pyarrow", "rmm"})

#: Values have few types; a program that makes types without end starts over now and then.
_MAX_TYPES = 4096
_cache: dict[type, Adapter | None] = {}


def adapter_of(kind: type) -> Adapter | None:
    """Return the adapter for arrays of this type; None for all other types, NumPy's among them."""
    try:
        return _cache[kind]
    except KeyError:
        if len(_cache) >= _MAX_TYPES:
            _cache.clear()
        found = _cache[kind] = _decide(kind)
        return found


def adapter_for(kind: str, *, emulated: bool) -> Adapter:
    """Return the adapter that a pickle names ("torch:grad"); all arrays of an emulated device are the emulated type.

    Raises KeyError for one that this version of afield does not have.
    """
    return _adapter("emulated" if emulated else kind.partition(":")[0])


@functools.cache
def _adapter(kind: str) -> Adapter:
    module, name = _ADAPTERS[kind]
    adapter: Adapter = getattr(importlib.import_module(f"{__package__}.{module}"), name)()
    return adapter


def _decide(kind: type) -> Adapter | None:
    if issubclass(kind, (np.ndarray, np.generic, type)):
        return None
    for base in kind.__mro__:
        known = _KNOWN.get((_root(base), base.__name__))
        if known is not None:
            return _adapter(known) if base is kind else None
    if _root(kind) in _LEFT_ALONE:
        return None
    if hasattr(kind, "__cuda_array_interface__"):
        return _adapter("cuda")
    if hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__"):
        return _adapter("dlpack")
    return None


def _root(kind: type) -> str:
    return str(getattr(kind, "__module__", "")).partition(".")[0]
