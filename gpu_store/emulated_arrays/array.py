"""`EmulatedArray`: an array in emulated device memory that behaves like a CuPy array.

Theory of operation. The inner NumPy array lies in device memory and never leaves this class, except as a copy (`get`) or,
to those who ask for it by name, as DLPack. Operators come from NumPy's mixin and arrive in `__array_ufunc__`, NumPy's
functions arrive in `__array_function__`, methods are made from a list of names; all three go through `delegation`, which
refuses to mix host and device. Indexing gives views where NumPy gives views, and 0-d views where NumPy gives scalars.

An array over read-only memory is read-only: whatever would write to it raises ValueError, as NumPy does.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from afield.gpu_store.emulated_arrays import dlpack
from afield.gpu_store.emulated_arrays.attributes import Flags, FlatIterator
from afield.gpu_store.emulated_arrays.delegation import (
    SCALARS,
    Call,
    Held,
    mixing_refused,
    run_function,
    run_ufunc,
)
from afield.gpu_store.emulated_arrays.devices import (
    Array,
    Device,
    DeviceMemory,
    Holder,
    checked_dtype,
    dense_strides,
    dtype_in_place,
    holder_of,
    process_devices,
)
from afield.gpu_store.emulated_arrays.indexing import wrapped_key, wrapped_put, wrapped_take
from afield.gpu_store.emulated_arrays.names import words
from afield.gpu_store.emulated_arrays.pointers import MemoryPointer, laid_over, pointer_to

Read = TypeVar("Read")

_METHODS = words(
    """
    all any argmax argmin argpartition argsort choose clip compress conj conjugate cumprod cumsum diagonal dot fill
    flatten max mean min nonzero partition prod put ravel repeat reshape round sort squeeze std sum swapaxes take trace
    transpose var
    """
)

_ABSENT = {
    "__cuda_array_interface__": "the memory of an emulated device is host memory, and a CUDA library would take its "
    "address for a device address; exchange arrays by DLPack, or copy with x.get()",
    "__array_interface__": "implicit conversion to a NumPy array is not allowed; use x.get() or asnumpy(x)",
    "__array_struct__": "implicit conversion to a NumPy array is not allowed; use x.get() or asnumpy(x)",
    "ctypes": "device memory has no address that host code may use",
}

_BY_CUPYS_RULE: dict[str, Callable[..., Any]] = {"take": wrapped_take, "put": wrapped_put}

_EQUAL: Any = np.equal
_NOT_EQUAL: Any = np.not_equal


class EmulatedArray(NDArrayOperatorsMixin, Held):
    """An array in the memory of an emulated device.

    `EmulatedArray(shape, dtype)` is uninitialised memory of the process's current device; arrays are usually made with
    the functions of the array module. Raises OutOfDeviceMemoryError when the device has no room.
    """

    __slots__ = ()
    __array_priority__ = 100.0
    __hash__ = None  # type: ignore[assignment]

    def __new__(
        cls,
        shape: int | tuple[int, ...],
        dtype: Any = float,
        memptr: MemoryPointer | None = None,
        strides: tuple[int, ...] | None = None,
        order: str = "C",
    ) -> EmulatedArray:
        if memptr is not None:
            extents = (shape,) if isinstance(shape, int) else tuple(shape)
            kind = checked_dtype(dtype)
            if strides is None and order == "F":
                strides = tuple(kind.itemsize * math.prod(extents[:axis]) for axis in range(len(extents)))
            return cls._hold(laid_over(memptr, extents, kind, strides), memptr.mem._home)
        home = process_devices().current
        if strides is not None:
            raise ValueError("strides are for memory that there is already: give memptr as well")
        model = np.broadcast_to(np.empty((), checked_dtype(dtype)), shape)
        dense = None if order in ("C", None) else dense_strides(model.T, model.itemsize)
        return cls._hold(home.empty(model.shape, model.dtype, dense and dense[::-1]), home)

    # ---- what it is ---------------------------------------------------------------------------------------------

    @property
    def device(self) -> Device:
        devices = self._home.set
        assert devices is not None, "a device belongs to a set before it has arrays"
        return devices.handle_type(self._home.id)

    @property
    def shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self._array.shape
        return shape

    @shape.setter
    def shape(self, shape: int | tuple[int, ...]) -> None:
        self._array = self._array.view().reshape(shape, copy=False)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._array.dtype

    @property
    def strides(self) -> tuple[int, ...]:
        return self._array.strides

    @property
    def ndim(self) -> int:
        return self._array.ndim

    @property
    def size(self) -> int:
        return self._array.size

    @property
    def itemsize(self) -> int:
        return self._array.itemsize

    @property
    def nbytes(self) -> int:
        return self._array.nbytes

    @property
    def T(self) -> EmulatedArray:  # noqa: N802 - NumPy's name
        return self._like(self._array.T)

    @property
    def mT(self) -> EmulatedArray:  # noqa: N802 - NumPy's name
        return self._like(self._array.mT)

    @property
    def base(self) -> EmulatedArray | None:
        base = self._array.base
        return self._like(base) if isinstance(base, np.ndarray) else None

    @property
    def flags(self) -> Flags:
        flags = self._array.flags
        return Flags(flags.c_contiguous, flags.f_contiguous, self.base is None, flags.writeable)

    @property
    def data(self) -> MemoryPointer:
        """Where the array begins. The address is one of the host, of no use to CUDA."""
        return pointer_to(self._array, self._home)

    @property
    def flat(self) -> FlatIterator:
        return FlatIterator(self)

    @flat.setter
    def flat(self, value: Any) -> None:
        FlatIterator(self)[:] = value

    @property
    def real(self) -> EmulatedArray:
        return self._like(self._array.real)

    @real.setter
    def real(self, value: Any) -> None:
        self._array.real = self._assigned("real", value)

    @property
    def imag(self) -> EmulatedArray:
        return self._like(self._array.imag)

    @imag.setter
    def imag(self, value: Any) -> None:
        self._array.imag = self._assigned("imag", value)

    # ---- to and from the host -----------------------------------------------------------------------------------

    def get(self, stream: Any = None, order: Any = "C", out: Array | None = None, blocking: bool = True) -> Array:
        """Return a copy in host memory, in `out` if that is given (same dtype and shape)."""
        self._home.touch()
        if out is None:
            return self._intact(np.array(self._array, order=order))
        if not isinstance(out, np.ndarray):
            raise TypeError("Only numpy.ndarray can be obtained from device arrays")
        if out.dtype != self.dtype:
            raise TypeError(f"{out.dtype} array cannot be obtained from {self.dtype} array")
        if out.shape != self.shape:
            raise ValueError(f"Shape mismatch. Expected shape: {self.shape}, actual shape: {out.shape}")
        np.copyto(out, self._array)
        return self._intact(out)

    def set(self, arr: Array, stream: Any = None) -> None:
        """Copy a host array of the same dtype and shape into this one."""
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to device arrays")
        if arr.dtype != self.dtype:
            raise TypeError(f"{arr.dtype} array cannot be set to {self.dtype} array")
        if arr.shape != self.shape:
            raise ValueError(f"Shape mismatch. Old shape: {self.shape}, new shape: {arr.shape}")
        self._home.touch()
        np.copyto(self._array, arr)

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` or `asnumpy(x)` to construct a NumPy array explicitly."
        )

    def item(self, *args: Any) -> Any:
        return self._intact(self._array.item(*args))

    def tolist(self) -> Any:
        return self._intact(self._array.tolist())

    def tobytes(self, order: Any = "C") -> bytes:
        return self._intact(self._array.tobytes(order))

    def __bool__(self) -> bool:
        return self._intact(bool(self._array))

    def __int__(self) -> int:
        return self._intact(int(self._array))

    def __float__(self) -> float:
        return self._intact(float(self._array))

    def __complex__(self) -> complex:
        return self._intact(complex(self._array))

    def __index__(self) -> int:
        return self._intact(operator.index(self._array))

    def __repr__(self) -> str:
        return self._intact(repr(self._array))

    def __str__(self) -> str:
        return self._intact(str(self._array))

    def __format__(self, specification: str) -> str:
        return self._intact(format(self._array, specification))

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_pickle, (type(self), self.get(order="A"), self._home.uuid)

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: Any = dlpack.LEFT_OUT,
        copy: Any = dlpack.LEFT_OUT,
    ) -> Any:
        return self._intact(dlpack.export(self, max_version, dl_device, copy))

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CPU_DEVICE

    # ---- computing ----------------------------------------------------------------------------------------------

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return run_ufunc(type(self), ufunc, method, inputs, kwargs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return run_function(type(self), func, types, args, kwargs)

    def __eq__(self, other: object) -> Any:
        return _EQUAL(self, other) if _comparable(other) else NotImplemented

    def __ne__(self, other: object) -> Any:
        return _NOT_EQUAL(self, other) if _comparable(other) else NotImplemented

    def astype(
        self, dtype: Any, order: Any = "K", casting: Any = "unsafe", subok: Any = None, copy: bool = True
    ) -> EmulatedArray:
        """Return the array with another dtype: a copy, or this one if `copy` is false and nothing changes."""
        wanted = checked_dtype(dtype)
        if not copy and wanted == self.dtype and (order == "K" or _has_order(self._array, order)):
            return self
        if order == "K":
            target = self._home.current.empty_like(self._array, wanted)
        else:
            target = self._empty(order, wanted)
        call = Call("astype", type(self))
        call._see(self)
        call.warn()
        with np.errstate(all="ignore"):
            np.copyto(target, self._array, casting=casting)
        return self._like(target)

    def copy(self, order: Any = "C") -> EmulatedArray:
        """Return a copy on the current device, which need not be the array's own."""
        home = self._home.current
        source = self._array
        target = home.empty_like(source) if order == "K" else self._empty(order, source.dtype, home)
        np.copyto(target, source)
        return self._intact(self._hold(target, home))

    def __copy__(self) -> EmulatedArray:
        return self.copy("K")

    def __deepcopy__(self, memo: Any) -> EmulatedArray:
        return self.copy("K")

    def view(self, dtype: Any = None, array_class: Any = None) -> EmulatedArray:
        """Return the same memory as another dtype; raises ValueError for one that no device array can have."""
        for kind in (dtype, array_class):
            if isinstance(kind, type) and issubclass(kind, np.ndarray):
                raise TypeError(
                    f"{kind.__name__} is a host array's type: a device array is not viewed as one; use x.get()"
                )
        wanted = self.dtype if dtype is None else dtype_in_place(dtype)
        self._home.touch()
        return self._like(self._array.view(wanted))

    # ---- parts --------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._array)

    def __iter__(self) -> Iterator[EmulatedArray]:
        if self.ndim == 0:
            raise TypeError("iteration over a 0-d array")
        return (self[index] for index in range(len(self)))

    def __getitem__(self, key: Any) -> EmulatedArray:
        call, key = self._key(key)
        result: EmulatedArray = call.lift(self._array[key])
        return result

    def __setitem__(self, key: Any, value: Any) -> None:
        call, key = self._key(key)
        if not isinstance(value, (Held, *SCALARS)):
            raise mixing_refused("__setitem__", value)
        with np.errstate(all="ignore"):
            self._array[key] = call.lower(value)
        call.warn()

    def scatter_add(self, slices: Any, value: Any) -> None:
        """Add to each place as often as it is named."""
        self._scatter(np.add, slices, value)

    def scatter_max(self, slices: Any, value: Any) -> None:
        """Leave the largest value in each place."""
        self._scatter(np.maximum, slices, value)

    def scatter_min(self, slices: Any, value: Any) -> None:
        """Leave the smallest value in each place."""
        self._scatter(np.minimum, slices, value)

    def _scatter(self, ufunc: np.ufunc, slices: Any, value: Any) -> None:
        call, key = self._key(slices)
        if not isinstance(value, (Held, *SCALARS)):
            raise mixing_refused(f"scatter_{ufunc.__name__}", value)
        if not self._array.flags.writeable:
            raise ValueError("output array is read-only")
        with np.errstate(all="ignore"):
            ufunc.at(self._array, key, np.asarray(call.lower(value)).astype(self.dtype))
        call.warn()

    def __getattr__(self, name: str) -> Any:
        # For names that nothing else here answers to; NumPy looks for its protocols in this way.
        why = _ABSENT.get(name, "it is not emulated")
        raise AttributeError(f"the emulated device array has no {name!r}: {why}", name=name, obj=self)

    # ---- inside -------------------------------------------------------------------------------------------------

    def _intact(self, value: Read) -> Read:
        """Return what was read here, unless the device was lost by then: what was wiped must not pass for data."""
        self._home.touch()
        return value

    def _key(self, key: Any) -> tuple[Call, Any]:
        """Index arrays may come from the host, as with CuPy; a trailing ellipsis keeps scalars 0-d arrays."""
        call = Call("__getitem__", type(self), self._home)
        parts = [
            part if part is None or isinstance(part, np.ndarray) else call.lower(part)
            for part in (key if isinstance(key, tuple) else (key,))
        ]
        call._see(self)
        if not any(part is Ellipsis for part in parts):
            parts.append(Ellipsis)
        return call, tuple(wrapped_key(parts, self._array.shape))

    def _assigned(self, name: str, value: Any) -> Any:
        if not isinstance(value, (Held, *SCALARS)):
            raise mixing_refused(name, value)
        call = Call(name, type(self))
        call._see(self)
        lowered = call.lower(value)
        call.warn()
        return lowered

    def _like(self, array: Array) -> EmulatedArray:
        lifted: EmulatedArray = Call("view", type(self), self._home).lift(array)
        return lifted

    def _empty(self, order: Any, dtype: Any, home: DeviceMemory | None = None) -> Array:
        shape = self.shape
        home = self._home.current if home is None else home
        if order == "F" or (order == "A" and np.isfortran(self._array)):
            return home.empty(shape[::-1], dtype).T
        return home.empty(shape, dtype)


def _comparable(other: object) -> bool:
    """Host arrays and lists are refused by the ufunc; what is no number at all is merely not equal."""
    return isinstance(other, (Held, np.ndarray, list, tuple, *SCALARS)) or hasattr(other, "__array_ufunc__")


def _has_order(array: Array, order: str) -> bool:
    if order == "A":
        return array.flags.forc
    return array.flags.f_contiguous if order == "F" else array.flags.c_contiguous


def _from_pickle(kind: type[EmulatedArray], host: Array, uuid: str) -> EmulatedArray:
    """The device of that UUID if this process sees it, else its current device."""
    devices = process_devices()
    home = devices.by_uuid(uuid) or devices.current
    return kind._hold(home.copy_in(host), home)


def array_over(
    home: DeviceMemory,
    memory: memoryview,
    owner: object,
    shape: tuple[int, ...],
    dtype: Any,
    strides: tuple[int, ...] | None = None,
    offset_bytes: int = 0,
) -> EmulatedArray:
    """Return a device array over memory that the device's store handed out; read-only if `memory` is.

    `owner` lives as long as any view. Raises ValueError where the array would reach outside `memory`.
    """
    return EmulatedArray._hold(home.adopt(memory, owner, shape, dtype, strides, offset_bytes), home)


def inner_array(array: EmulatedArray) -> Array:
    """Return the NumPy array inside, for afield's own adapters (the store's copies, kernels in a simulator)."""
    return array._array


def allocation_of(array: EmulatedArray) -> tuple[DeviceMemory, object, int]:
    """Return whose memory an array lies in, the owner that its allocator gave, and the offset in that allocation."""
    holder = holder_of(array._array)
    assert type(holder) is Holder, "device arrays lie in device memory"
    start: int = holder.__array_interface__["data"][0]
    return holder.device, holder.owner, array._array.__array_interface__["data"][0] - start


def _method(name: str) -> Callable[..., Any]:
    def method(self: EmulatedArray, *args: Any, **kwargs: Any) -> Any:
        if name == "dot" and not isinstance(args[0] if args else None, Held):
            raise mixing_refused(name, args[0] if args else None)
        call = Call(name, type(self))
        call._see(self)
        rule = _BY_CUPYS_RULE.get(name)
        function = getattr(self._array, name) if rule is None else functools.partial(rule, self._array)
        return call.run(function, args, kwargs)

    method.__name__ = name
    method.__qualname__ = f"EmulatedArray.{name}"
    method.__doc__ = getattr(np.ndarray, name).__doc__
    return method


for _name in _METHODS:
    setattr(EmulatedArray, _name, _method(_name))
