"""One NumPy call on device arrays: operands are checked and unwrapped, results are put into device memory.

Theory of operation. A `Call` lowers arguments (device arrays become their inner NumPy arrays) and lifts results. Lowering
is where mixing is refused: a host array anywhere among the arguments. Operands may lie on any devices, which are peers: as
with CuPy the current device computes, and where one lies elsewhere there is a `PerformanceWarning`. Lifting tells three
kinds of result apart: the inner array of an argument (`out=`) is that argument again; a view of device memory becomes an
array that shares it; anything else was made on the host by NumPy, and is copied into device memory. Scalars that a
reduction returns become 0-d device arrays, as in CuPy, because on a real device nobody has waited for their value.

For the commonest call, an elementwise ufunc, the result's shape and dtype are known beforehand, so it is computed straight
into device memory.

Lists. NumPy takes a list wherever it takes an array, CuPy mostly does not. Which arguments are meant as arrays is known to
NumPy's own dispatchers, and they tell: lists are replaced by a type that takes part in dispatch, and if it shows among the
`types` then a list stood where an array belongs.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import numpy as np

from afield.gpu_store.emulated_arrays import indexing
from afield.gpu_store.emulated_arrays.devices import Array, DeviceMemory, dtype_in_place, holder_of
from afield.gpu_store.emulated_arrays.names import OF_MODULE, UFUNCS, words

_PACKAGE = __name__.rpartition(".")[0]
#: Values that may be mixed with device arrays: they are passed to a kernel by value.
SCALARS = (bool, int, float, complex, np.bool_, np.number)

#: Functions whose result NumPy gives as a Python scalar and CuPy as a 0-d array.
_COUNTED_ON_DEVICE = frozenset({"allclose", "array_equal", "array_equiv", "count_nonzero"})

#: Functions that CuPy, too, lets take a list where NumPy's dispatcher sees an array.
_TAKE_LISTS = words(
    "append array_split split hsplit vsplit dsplit delete insert place put percentile quantile tile compress"
)

#: Functions that do something else than NumPy's where an index lies outside.
_BY_CUPYS_RULE: dict[str, Callable[..., Any]] = {
    "take": indexing.wrapped_take,
    "take_along_axis": indexing.wrapped_take_along_axis,
    "put": indexing.wrapped_put,
}

#: Functions that call back with arrays.
_CALL_BACK = frozenset({"apply_along_axis", "apply_over_axes", "piecewise"})


class Held:
    """What this module needs of a device array: an inner array, and whose memory it lies in."""

    __slots__ = ("__weakref__", "_array", "_home")

    _array: Array
    _home: DeviceMemory

    @classmethod
    def _hold(cls, array: Array, home: DeviceMemory) -> Self:
        held = object.__new__(cls)
        held._array = array
        held._home = home
        return held


def mixing_refused(name: str, value: object) -> TypeError:
    """The error for a host value where a device array is needed."""
    kind = next((base for base in (list, tuple) if isinstance(value, base)), type(value))
    what = "arrays" if isinstance(value, np.ndarray) else "values"
    return TypeError(
        f"{name}: Unsupported type <class {kind.__name__!r}>: device arrays do not mix with host {what}; "
        "copy to the device with asarray(x), or to the host with asnumpy(x) or x.get()"
    )


class HostList(list[Any]):
    """A list that NumPy's dispatchers notice where it stands for an array."""

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        raise mixing_refused(func.__name__, list(self))


class HostTuple(tuple[Any, ...]):
    """The same for a tuple."""

    __slots__ = ()

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        raise mixing_refused(func.__name__, tuple(self))


def _mark(value: Any) -> Any:
    if type(value) is list:
        return HostList(_mark(item) for item in value)
    if type(value) is tuple:
        return HostTuple(_mark(item) for item in value)
    return value


def find(value: Any, kind: type | tuple[type, ...]) -> Any:
    """Return the first instance of `kind` in nested lists, tuples and dicts, None where there is none."""
    if isinstance(value, kind):
        return value
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return None
    return next((found for item in value if (found := find(item, kind)) is not None), None)


class PerformanceWarning(RuntimeWarning):
    """Something works, and slowly: CuPy has the same under the same name."""

    __module__ = "cupy._util"


def _depth_here() -> int:
    """Return how many frames above the caller's caller are of this package, to show a warning where the user's code is."""
    depth, frame = 0, sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith((_PACKAGE, "numpy.")):
        depth, frame = depth + 1, frame.f_back
    return depth


class Call:
    """The operands of one call on their way in, and its results on their way out."""

    def __init__(self, name: str, kind: type[Held], home: DeviceMemory | None = None) -> None:
        self.name = name
        self.kind = kind
        #: Where results go: the current device of whoever makes the call. Views stay where they are.
        self.home = home
        self._elsewhere: Held | None = None  # an operand on another device
        self._operand: Held | None = None
        self._lowered: dict[int, Held] = {}

    def lower(self, value: Any) -> Any:
        """Return `value` with inner arrays in place of device arrays; TypeError where it has host arrays."""
        if isinstance(value, Held):
            self._see(value)
            return value._array
        if isinstance(value, np.ndarray):
            raise mixing_refused(self.name, value)
        if isinstance(value, list):
            return [self.lower(item) for item in value]
        if type(value) is tuple or type(value) is HostTuple:
            return tuple([self.lower(item) for item in value])
        if isinstance(value, dict):
            return {key: self.lower(item) for key, item in value.items()}
        if self.name in _CALL_BACK and callable(value) and not isinstance(value, type):
            return self._called_back(value)
        return value

    def warn(self) -> None:
        """Elements are read by the current device: those of another one come over the link, which is slow."""
        there, self._elsewhere = self._elsewhere, None
        if there is not None and self.home is not None:
            warnings.warn(
                f"{self.name}: an operand resides on device {there._home.id}, and the current device is {self.home.id}, "
                f"which reads it by peer access; compute within `with cuda.Device({there._home.id})`, or copy it first",
                PerformanceWarning,
                stacklevel=2 + _depth_here(),
            )

    def lift(self, result: Any) -> Any:
        """Return `result` with device arrays in place of NumPy's arrays and scalars."""
        if isinstance(result, np.ndarray):
            known = self._lowered.get(id(result))
            if known is not None:
                self.warn()
                return known
            holder = holder_of(result)
            if holder is not None:
                dtype_in_place(result.dtype)  # NumPy makes views of any dtype
                return self.kind._hold(result, holder.device)
            self.warn()
            return self.kind._hold(self._target().copy_in(result), self._target())
        if isinstance(result, np.generic):
            self.warn()
            return self.kind._hold(self._target().copy_in(np.asarray(result)), self._target())
        if isinstance(result, bool | int) and self.name in _COUNTED_ON_DEVICE:
            return self.lift(np.asarray(result))
        if isinstance(result, list):
            return [self.lift(item) for item in result]
        if isinstance(result, tuple):
            items = [self.lift(item) for item in result]
            # Named tuples, such as the results of linalg, keep their type.
            return type(result)(*items) if hasattr(result, "_fields") else tuple(items)
        return result

    def run(self, function: Callable[..., Any], args: Iterable[Any], kwargs: Mapping[str, Any]) -> Any:
        """Lower, call, lift. A device raises no floating-point warnings, so none are raised here."""
        lowered = [self.lower(value) for value in args]
        named = {key: self.lower(value) for key, value in kwargs.items()}
        with np.errstate(all="ignore"):
            return self.lift(function(*lowered, **named))

    def _target(self) -> DeviceMemory:
        assert self.home is not None, "a call without device arrays names the device that its results go to"
        return self.home

    def _see(self, operand: Held) -> None:
        operand._home.touch()
        if self._operand is None:
            self._operand = operand
            self.home = operand._home.current
        if self.home is not None and operand._home.uuid != self.home.uuid:
            self._elsewhere = operand
        self._lowered[id(operand._array)] = operand

    def _called_back(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def on_inner(*args: Any, **kwargs: Any) -> Any:
            return self.lower(function(*[self.lift(a) for a in args], **{k: self.lift(v) for k, v in kwargs.items()}))

        return on_inner


def run_ufunc(
    kind: type[Held],
    ufunc: np.ufunc,
    method: str,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    home: DeviceMemory | None = None,
) -> Any:
    """Do what `__array_ufunc__` is asked for; raises TypeError for operands that CuPy would not take."""
    if ufunc.__name__ not in UFUNCS:
        return NotImplemented  # CuPy has no such function, and NumPy says so by a TypeError
    call = Call(ufunc.__name__, kind, home)
    for place, value in enumerate((*inputs, *kwargs.get("out", ()))):
        if isinstance(value, (Held, *SCALARS)) or (value is None and place >= len(inputs)):
            continue
        if method in ("at", "reduceat") and place == 1 and not isinstance(value, np.ndarray):
            continue  # indices
        if not isinstance(value, np.ndarray) and hasattr(value, "__array_ufunc__"):
            return NotImplemented
        raise mixing_refused(ufunc.__name__, value)
    function = getattr(ufunc, method)
    if method == "__call__" and ufunc.signature is None and not kwargs.keys() - {"where", "casting"}:
        return _run_elementwise(call, ufunc, inputs, kwargs)
    if method == "at" and isinstance(inputs[0], Held) and not inputs[0]._array.flags.writeable:
        # NumPy's `at` does not look at this flag: it would write into an immutable object, or into a page that is
        # mapped read-only, which ends the process.
        raise ValueError("output array is read-only")
    return call.run(function, inputs, kwargs)


def _run_elementwise(call: Call, ufunc: np.ufunc, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    operands = [call.lower(value) for value in inputs]
    named = {key: call.lower(value) for key, value in kwargs.items()}
    if call.home is None:
        raise TypeError(f"{ufunc.__name__} has no device array among its operands")
    call.warn()
    arrays = [operand for operand in operands if isinstance(operand, np.ndarray)]
    arrays += [named["where"]] if isinstance(named.get("where"), np.ndarray) else []
    shape = arrays[0].shape if len(arrays) == 1 else np.broadcast_shapes(*[array.shape for array in arrays])
    given = tuple(_weak_type(operand) for operand in operands)
    dtypes = ufunc.resolve_dtypes((*given, *[None] * ufunc.nout), casting=kwargs.get("casting", "same_kind"))
    model = next((array for array in arrays if array.shape == shape), None)
    results = []
    for dtype in dtypes[ufunc.nin :]:
        full = call.home.empty(shape, dtype) if model is None else call.home.empty_like(model, dtype)
        results.append(full)
    with np.errstate(all="ignore"):
        ufunc(*operands, out=tuple(results), **named)
    lifted = tuple([call.kind._hold(result, call.home) for result in results])
    return lifted[0] if ufunc.nout == 1 else lifted


def _weak_type(operand: Any) -> Any:
    """What decides the result's dtype: Python's own numbers give way to any array of their kind or above."""
    if isinstance(operand, np.ndarray | np.generic):
        return operand.dtype
    return np.dtype(np.bool_) if isinstance(operand, bool) else type(operand)


def run_function(
    kind: type[Held], func: Any, types: Iterable[type], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Do what `__array_function__` is asked for."""
    if func.__name__ not in OF_MODULE.get(func.__module__, ()):
        return NotImplemented
    for other in types:
        if not issubclass(other, Held | np.ndarray | HostList | HostTuple):
            return NotImplemented
    everything = (*args, *kwargs.values())
    listed = next((other for other in types if issubclass(other, HostList | HostTuple)), None)
    if listed is not None:
        raise mixing_refused(func.__name__, next(value for value in everything if find(value, listed) is not None))
    if func.__name__ not in _TAKE_LISTS and any(type(value) in (list, tuple) for value in everything):
        return func(*[_mark(value) for value in args], **{key: _mark(value) for key, value in kwargs.items()})
    return Call(func.__name__, kind).run(_BY_CUPYS_RULE.get(func.__name__, func), args, kwargs)
