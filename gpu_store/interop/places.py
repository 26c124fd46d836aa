"""Where stored bytes are when they are read, and what an adapter tells about an array.

Theory of operation. A `DevicePlace` stands for one part of an object in device memory that this process has mapped; every
array over it, and every view of those, keeps it alive, and when it dies the runtime may unpin the part. A `HostPlace` is
the same in host memory, where the memory itself keeps count.

An `Adapter` knows one library's arrays: `describe` them, `build` one over a place, and copy a scattered one together
(`gather`). Everything else about memory is the arena's business.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from afield.gpu_store.arena import DeviceArena
from afield.gpu_store.backends.base import Slab
from afield.gpu_store.blocks import Block


class DevicePlace:
    """`size` bytes at `offset` of a mapped slab; `on_death(view_pin)` is called when no array uses them any more.

    It is called from any thread at any moment, and on CUDA not before the kernels that were begun are done (see
    `DeviceArena.retire`).
    """

    __slots__ = ("__weakref__", "arena", "offset", "on_death", "size", "view_pin")

    def __init__(
        self,
        arena: DeviceArena,
        offset: int,
        size: int,
        on_death: Callable[[Any], None] | None = None,
        view_pin: Any = None,
    ) -> None:
        self.arena = arena
        self.offset = offset
        self.size = size
        self.on_death = on_death
        self.view_pin = view_pin

    @property
    def address(self) -> int:
        return self.arena.slab.address + self.offset

    @property
    def memory(self) -> memoryview:
        """The bytes, read-only; raises DeviceUsageError where the host cannot see them."""
        return self.arena.view(self.offset, self.size)

    def __del__(self) -> None:
        if self.on_death is not None:
            self.arena.retire(self.on_death, self.view_pin)


@dataclass(frozen=True, slots=True)
class HostPlace:
    """A part in host memory; `memory` is read-only, and whatever it exports is alive as long as a view of it."""

    memory: memoryview


Place = DevicePlace | HostPlace


@dataclass(frozen=True, slots=True)
class Layout:
    """How an array lies in a place; strides in bytes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    #: As in `Description`.
    dtype: str
    #: Of the first element, from the beginning of the place.
    offset: int = 0
    #: What `Adapter.kind_of` said of the array that went in.
    kind: str = ""

    @property
    def is_empty(self) -> bool:
        """Tell whether there is not one element."""
        return 0 in self.shape


@dataclass(slots=True)
class Description:
    """A device array, without a reference to it; strides in bytes."""

    #: The device's UUID, or CUDA's number of it in this process.
    device: str | int
    #: Of the first element.
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    #: As NumPy writes it ("<f4"), or "torch.<name>/<bytes>" for what NumPy does not have.
    dtype: str
    itemsize: int
    #: The arena's block that the array lies in; None for any other memory.
    block: Block | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize

    @property
    def span(self) -> tuple[int, int]:
        """The addresses [first, end) of all bytes between the array's first and last."""
        first, end = self.address, self.address + self.itemsize
        for extent, stride in zip(self.shape, self.strides, strict=True):
            if stride < 0:
                first += (extent - 1) * stride
            else:
                end += (extent - 1) * stride
        return first, end


class Adapter(ABC):
    """What afield knows about one type of device array."""

    #: Names the adapter in pickles.
    kind: str
    #: Whether `describe` describes every array of its type, and leaves none to pickle.
    takes_all = False

    @abstractmethod
    def describe(self, array: Any) -> Description | None:
        """Describe a device array; None for one that this adapter leaves to pickle (it is in host memory, say)."""

    def kind_of(self, array: Any) -> str:
        """Return what `build` needs to know to make an array of the same type: `kind`, and a variant after a colon."""
        return self.kind

    @abstractmethod
    def build(self, place: DevicePlace, layout: Layout) -> Any:
        """Return an array over stored memory.

        It is read-only where the library has such arrays; it and all of its views keep `place` alive.
        """

    def foreign(self, arena: DeviceArena, address: int, size: int) -> Slab:
        """Return memory of the arena's device that lies outside of its slab in a form that the device copies from."""
        return replace(arena.slab, address=address, size_bytes=size, imported=True)

    @abstractmethod
    def gather(self, description: Description, arena: DeviceArena, target_offset: int) -> None:
        """Copy an array, element by element, into the slab in C order; it is done when this returns."""


def c_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the strides of an array without gaps in C order, in bytes."""
    strides = []
    for extent in reversed(shape):
        strides.append(itemsize)
        itemsize *= max(extent, 1)
    return tuple(reversed(strides))


def host_dtype(dtype: str) -> np.dtype[Any]:
    """Return NumPy's dtype for `Description.dtype`.

    torch's types that NumPy lacks are those of `ml_dtypes` where that is installed; else they come as unsigned integers of
    the same size, bit by bit: `x.astype(np.uint32) << 16` viewed as float32 is the value of a bfloat16.
    """
    if not dtype.startswith("torch."):
        return np.dtype(dtype)
    name, _, itemsize = dtype.removeprefix("torch.").partition("/")
    try:
        found = getattr(importlib.import_module("ml_dtypes"), name, None)
    except ImportError:
        found = None
    return np.dtype(f"u{itemsize}" if found is None else found)


def host_array(place: HostPlace, layout: Layout) -> np.ndarray[Any, np.dtype[Any]]:
    """Return a read-only NumPy array over host memory; raises ValueError where it would reach outside."""
    shape, dtype = layout.shape, host_dtype(layout.dtype)
    if layout.is_empty:
        array = np.empty(shape, dtype)
    else:
        # Not over `place.memory` itself: of a memoryview NumPy keeps the innermost array of the plain type alone, and what
        # keeps the part in its place (`View`) is no plain array.
        array = np.ndarray(shape, dtype, np.frombuffer(place.memory, np.uint8), layout.offset, layout.strides)
    array.flags.writeable = False
    return array
