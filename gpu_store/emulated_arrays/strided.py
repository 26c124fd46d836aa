"""`lib.stride_tricks.as_strided`: a view of any layout, within its allocation."""

from __future__ import annotations

from typing import Any

import numpy as np

from afield.gpu_store.emulated_arrays.array import EmulatedArray
from afield.gpu_store.emulated_arrays.delegation import Call
from afield.gpu_store.emulated_arrays.devices import bytes_of


def as_strided(x: EmulatedArray, shape: Any = None, strides: Any = None) -> EmulatedArray:
    """Return a view with this shape and these strides in bytes; raises ValueError where it would leave the allocation."""
    call = Call("as_strided", EmulatedArray)
    source = call.lower(x)
    extents = source.shape if shape is None else tuple(np.atleast_1d(shape).tolist())
    steps = source.strides if strides is None else tuple(np.atleast_1d(strides).tolist())
    memory = bytes_of(source)
    offset_bytes = source.__array_interface__["data"][0] - memory.__array_interface__["data"][0]
    # NumPy checks what is laid over a buffer; its own as_strided does not.
    lifted: EmulatedArray = call.lift(np.ndarray(extents, source.dtype, memory, offset_bytes, steps))
    return lifted
