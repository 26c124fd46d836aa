"""Memory of an emulated device by its address: `x.data`, `cuda.alloc`, `ndarray(memptr=...)`.

Theory of operation. A `MemoryPointer` stands for a place in an allocation, and keeps that alive: it has the bytes of the whole
allocation as a NumPy array, and an offset in it, so every copy is checked against the allocation's bounds and against being
read-only. Addresses are those of the host; CUDA could do nothing with them.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from afield.gpu_store.emulated_arrays.devices import (
    Array,
    CUDARuntimeError,
    Device,
    DeviceMemory,
    Holder,
    bytes_of,
    holder_of,
)


class BaseMemory:
    """An allocation: `ptr`, `size` in bytes, and whose it is."""

    def __init__(self, content: Array, home: DeviceMemory) -> None:
        self._bytes = content
        self._home = home

    @property
    def ptr(self) -> int:
        address: int = self._bytes.__array_interface__["data"][0]
        return address

    @property
    def size(self) -> int:
        return self._bytes.nbytes

    @property
    def device_id(self) -> int:
        return self._home.id

    @property
    def device(self) -> Device:
        assert self._home.set is not None, "a device belongs to a set before it has memory"
        return self._home.set.handle_type(self._home.id)


class MemoryPointer:
    """A place in an allocation. Copies raise CUDARuntimeError where they would leave it."""

    def __init__(self, mem: BaseMemory, offset: int) -> None:
        self.mem = mem
        self._offset = offset

    @property
    def ptr(self) -> int:
        return self.mem.ptr + self._offset

    @property
    def device_id(self) -> int:
        return self.mem.device_id

    @property
    def device(self) -> Device:
        return self.mem.device

    def __int__(self) -> int:
        return self.ptr

    def __add__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self.mem, self._offset + offset)

    __radd__ = __add__

    def __sub__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self.mem, self._offset - offset)

    def copy_from_device(self, src: MemoryPointer, size: int) -> None:
        self._part(size, write=True)[...] = src._part(size)

    def copy_from_host(self, mem: Any, size: int) -> None:
        self._part(size, write=True)[...] = _host_bytes(mem, size)

    def copy_from(self, mem: Any, size: int) -> None:
        if isinstance(mem, MemoryPointer):
            self.copy_from_device(mem, size)
        else:
            self.copy_from_host(mem, size)

    def copy_to_host(self, mem: Any, size: int) -> None:
        _host_bytes(mem, size)[...] = self._part(size)

    def memset(self, value: int, size: int) -> None:
        self._part(size, write=True)[...] = value & 0xFF

    def copy_from_device_async(self, src: MemoryPointer, size: int, stream: Any = None) -> None:
        self.copy_from_device(src, size)

    def copy_from_host_async(self, mem: Any, size: int, stream: Any = None) -> None:
        self.copy_from_host(mem, size)

    def copy_from_async(self, mem: Any, size: int, stream: Any = None) -> None:
        self.copy_from(mem, size)

    def copy_to_host_async(self, mem: Any, size: int, stream: Any = None) -> None:
        self.copy_to_host(mem, size)

    def memset_async(self, value: int, size: int, stream: Any = None) -> None:
        self.memset(value, size)

    def _part(self, size: int, write: bool = False) -> Array:
        self.mem._home.touch()
        if self._offset < 0 or size < 0 or self._offset + size > self.mem.size:
            raise CUDARuntimeError(
                f"cudaErrorInvalidValue: {size} bytes at {self._offset} do not lie in an allocation of {self.mem.size}"
            )
        if write and not self.mem._bytes.flags.writeable:
            raise ValueError("assignment destination is read-only")
        return self.mem._bytes[self._offset : self._offset + size]


def _host_bytes(place: Any, size: int) -> Array:
    """The host memory at an address, a `ctypes.c_void_p`, or under a NumPy array."""
    if isinstance(place, np.ndarray):
        place = place.ctypes.data
    address = place.value if isinstance(place, ctypes.c_void_p) else int(place)
    if size and not address:
        raise CUDARuntimeError("cudaErrorInvalidValue: the address is null")
    if not size:
        return np.empty(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address or 0))


def pointer_to(array: Array, home: DeviceMemory) -> MemoryPointer:
    """Return where a device array begins."""
    holder = holder_of(array)
    whole = bytes_of(array) if holder is not None else array.reshape(-1).view(np.uint8)
    mem = BaseMemory(whole, home)
    return MemoryPointer(mem, array.__array_interface__["data"][0] - mem.ptr if array.size else 0)


def allocated(size: int, home: DeviceMemory) -> MemoryPointer:
    """Return new memory; raises OutOfDeviceMemoryError."""
    return MemoryPointer(BaseMemory(home.empty((int(size),), np.uint8), home), 0)


def unowned(ptr: int, size: int, owner: object, home: DeviceMemory) -> BaseMemory:
    """Return memory at an address of this process, which `owner` keeps."""
    interface = {"version": 3, "data": (int(ptr), False), "shape": (int(size),), "typestr": "|u1", "strides": None}
    return BaseMemory(np.asarray(Holder(home, interface, None, owner, None)), home)


def laid_over(
    pointer: MemoryPointer, shape: tuple[int, ...], dtype: np.dtype[Any], strides: tuple[int, ...] | None
) -> Array:
    """Return an array over memory; raises ValueError where it would leave the allocation."""
    return np.ndarray(shape, dtype, pointer.mem._bytes, pointer._offset, strides)
