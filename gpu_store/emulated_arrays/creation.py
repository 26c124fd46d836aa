"""Making device arrays, and bringing them back: the functions of the module that are not NumPy's.

Theory of operation. `Creation` belongs to one set of devices; what it makes lies on the calling thread's current device.
`array` and `asarray` are the one way in for host values and copy them; `asnumpy` is the way back.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from afield.gpu_store.emulated_arrays import dlpack
from afield.gpu_store.emulated_arrays.array import EmulatedArray
from afield.gpu_store.emulated_arrays.delegation import Call, Held, find
from afield.gpu_store.emulated_arrays.devices import Array, DeviceSet, checked_dtype


class Grid:
    """`mgrid` and `ogrid`: NumPy's, with the result on the device."""

    def __init__(self, name: str, devices: DeviceSet) -> None:
        self._name = name
        self._devices = devices

    def __getitem__(self, key: Any) -> Any:
        return Call(self._name, EmulatedArray, self._devices.current).lift(getattr(np, self._name)[key])


class Creation:
    """The functions, as methods."""

    def __init__(self, devices: DeviceSet) -> None:
        self._devices = devices
        self.mgrid = Grid("mgrid", devices)
        self.ogrid = Grid("ogrid", devices)

    # ---- from values --------------------------------------------------------------------------------------------

    def array(
        self,
        obj: Any,
        dtype: Any = None,
        copy: bool | None = True,
        order: Any = "K",
        subok: bool = False,
        ndmin: int = 0,
        *,
        blocking: bool = False,
    ) -> EmulatedArray:
        """Return `obj` (a host array, numbers, nested lists, device arrays) as an array of the current device."""
        home = self._devices.current
        if hasattr(type(obj), "__emulated_array__"):  # another library's array in emulated device memory
            obj = obj.__emulated_array__()
        if isinstance(obj, EmulatedArray) and (not copy or ndmin <= obj.ndim):
            return self._of_device_array(obj, dtype, bool(copy), order, ndmin)
        if isinstance(obj, Held) or find(obj, Held) is not None:
            obj = Call("array", EmulatedArray).lower(obj)
        host = np.array(obj, dtype=dtype, copy=None, order=order, ndmin=ndmin)
        checked_dtype(host.dtype)
        return EmulatedArray._hold(home.copy_in(host), home)

    def _of_device_array(self, obj: EmulatedArray, dtype: Any, copy: bool, order: Any, ndmin: int) -> EmulatedArray:
        if copy or obj.device.uuid != self._devices.current.uuid:
            target = obj.copy(order)
            return target if dtype is None else target.astype(dtype, copy=False)
        same = obj.astype(obj.dtype if dtype is None else dtype, order, copy=False)
        missing = max(ndmin - same.ndim, 0)
        return same[(None,) * missing] if missing else same

    def asarray(self, a: Any, dtype: Any = None, order: Any = "K", *, blocking: bool = False) -> EmulatedArray:
        return self.array(a, dtype, copy=False, order=order)

    def asanyarray(self, a: Any, dtype: Any = None, order: Any = "K", *, blocking: bool = False) -> EmulatedArray:
        return self.array(a, dtype, copy=False, order=order)

    def ascontiguousarray(self, a: Any, dtype: Any = None) -> EmulatedArray:
        return self.array(a, dtype, copy=False, order="C", ndmin=1)

    def asfortranarray(self, a: Any, dtype: Any = None) -> EmulatedArray:
        return self.array(a, dtype, copy=False, order="F", ndmin=1)

    def copy(self, a: EmulatedArray, order: Any = "K") -> EmulatedArray:
        return a.copy(order)

    def from_dlpack(self, x: Any, /, *, device: Any = None, copy: bool | None = None) -> Any:
        """Return a tensor of another library, or a device array, as a device array that shares its memory."""
        taken = dlpack.take(EmulatedArray, x, self._devices.current)
        return taken.copy() if copy else taken  # type: ignore[attr-defined]

    # ---- from shapes --------------------------------------------------------------------------------------------

    def empty(self, shape: Any, dtype: Any = float, order: Any = "C", **_: Any) -> EmulatedArray:
        home = self._devices.current
        extents = _extents(shape)
        if order not in ("C", "F", None):
            raise TypeError(f"order must be 'C' or 'F', not {order!r}")
        array = home.empty(extents[::-1], dtype).T if order == "F" else home.empty(extents, dtype)
        return EmulatedArray._hold(array, home)

    def zeros(self, shape: Any, dtype: Any = float, order: Any = "C") -> EmulatedArray:
        return self._filled(self.empty(shape, dtype, order), 0)

    def ones(self, shape: Any, dtype: Any = float, order: Any = "C") -> EmulatedArray:
        return self._filled(self.empty(shape, dtype, order), 1)

    def full(self, shape: Any, fill_value: Any, dtype: Any = None, order: Any = "C") -> EmulatedArray:
        if dtype is None:
            dtype = fill_value.dtype if isinstance(fill_value, EmulatedArray) else np.asarray(fill_value).dtype
        return self._filled(self.empty(shape, dtype, order), fill_value)

    def empty_like(
        self, a: EmulatedArray, dtype: Any = None, order: Any = "K", subok: Any = None, shape: Any = None
    ) -> Any:
        _need_device_array("empty_like", a)
        if shape is not None or order in ("C", "F"):
            layout = order if order in ("C", "F") else "C"
            return self.empty(a.shape if shape is None else shape, a.dtype if dtype is None else dtype, layout)
        home = self._devices.current
        return EmulatedArray._hold(home.empty_like(a._array, dtype), home)

    def zeros_like(
        self, a: EmulatedArray, dtype: Any = None, order: Any = "K", subok: Any = None, shape: Any = None
    ) -> Any:
        return self._filled(self.empty_like(a, dtype, order, subok, shape), 0)

    def ones_like(
        self, a: EmulatedArray, dtype: Any = None, order: Any = "K", subok: Any = None, shape: Any = None
    ) -> Any:
        return self._filled(self.empty_like(a, dtype, order, subok, shape), 1)

    def full_like(
        self,
        a: EmulatedArray,
        fill_value: Any,
        dtype: Any = None,
        order: Any = "K",
        subok: Any = None,
        shape: Any = None,
    ) -> Any:
        return self._filled(self.empty_like(a, dtype, order, subok, shape), fill_value)

    def _filled(self, array: EmulatedArray, value: Any) -> EmulatedArray:
        array.fill(value)
        return array

    # ---- to the host and to files -------------------------------------------------------------------------------

    def asnumpy(
        self, a: Any, stream: Any = None, order: Any = "C", out: Array | None = None, *, blocking: bool = True
    ) -> Array:
        """Return a host copy of a device array; other values become NumPy arrays as `numpy.asarray` makes them."""
        if isinstance(a, EmulatedArray):
            return a.get(order=order, out=out)
        host = np.asarray(Call("asnumpy", EmulatedArray).lower(a) if find(a, Held) is not None else a, order=order)
        if out is None:
            return host
        np.copyto(out, host)
        return out

    def load(self, file: Any, mmap_mode: Any = None, allow_pickle: Any = None) -> Any:
        loaded = np.load(file, mmap_mode=mmap_mode, allow_pickle=bool(allow_pickle))
        if isinstance(loaded, np.ndarray):
            return self.array(loaded)
        with loaded:
            return {name: self.array(loaded[name]) for name in loaded.files}

    def save(self, file: Any, arr: Any, allow_pickle: Any = None) -> None:
        np.save(file, self.asnumpy(arr))

    def savez(self, file: Any, *args: Any, **kwds: Any) -> None:
        hosts: dict[str, Any] = {name: self.asnumpy(value) for name, value in kwds.items()}
        np.savez(file, *map(self.asnumpy, args), **hosts)

    def savez_compressed(self, file: Any, *args: Any, **kwds: Any) -> None:
        hosts: dict[str, Any] = {name: self.asnumpy(value) for name, value in kwds.items()}
        np.savez_compressed(file, *map(self.asnumpy, args), **hosts)

    def savetxt(self, fname: Any, X: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N803 - NumPy's name
        np.savetxt(fname, self.asnumpy(X), *args, **kwargs)

    def fuse(self, *args: Any, **kwargs: Any) -> Any:
        """`@fuse()` makes one kernel out of several; the function's meaning is the same without."""
        if args and callable(args[0]):
            return args[0]

        def unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
            return function

        return unchanged


def _extents(shape: Any) -> tuple[int, ...]:
    if isinstance(shape, tuple | list):
        return tuple(operator.index(extent) for extent in shape)
    return (operator.index(shape),)


def _need_device_array(name: str, value: object) -> None:
    if not isinstance(value, Held):
        raise TypeError(f"{name} takes a device array, not {type(value)}; copy it to the device with asarray(x)")
