"""The emulated array module: NumPy's API on device memory, under the name `cupy` or any other.

Theory of operation. `make_module` builds a tree of modules for one set of devices. A name is looked up when it is first used,
in the tables of `names`; a NumPy function becomes a `Delegate`, which calls NumPy and lets the device arrays among its
operands take over (`__array_function__`, `__array_ufunc__`). Where there are none, NumPy has computed on the host: a result
made of plain numbers is put on the device, a result made of lists or host arrays is refused, since CuPy would.

A module is pickled by its name. Where it arrives it is what that name imports there, CuPy itself included, else an emulated
module of that process's devices.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from operator import attrgetter
from types import ModuleType
from typing import Any, NoReturn

import numpy as np

from afield.errors import OutOfDeviceMemoryError
from afield.gpu_store.emulated_arrays import creation, cuda_namespace, names
from afield.gpu_store.emulated_arrays.array import EmulatedArray
from afield.gpu_store.emulated_arrays.delegation import Call, Held, PerformanceWarning, find, mixing_refused
from afield.gpu_store.emulated_arrays.devices import (
    Allocator,
    CappedAllocator,
    CUDARuntimeError,
    DeviceLike,
    DeviceMemory,
    DeviceSet,
    process_devices,
)
from afield.gpu_store.emulated_arrays.extras import extra_names, scipy_names
from afield.gpu_store.emulated_arrays.names import words
from afield.gpu_store.emulated_arrays.random_numbers import XORWOW, BitGenerator, MRG32k3a, Philox4x3210, RandomNumbers
from afield.gpu_store.emulated_arrays.runtime_calls import RuntimeCalls
from afield.gpu_store.emulated_arrays.streams import stream_names
from afield.gpu_store.emulated_arrays.strided import as_strided

#: What `__version__` says: the API that is emulated, and that it is.
VERSION = "14.0.0+afield.emulated"


class EmulatedModule(ModuleType):
    """A module whose names are found when they are first used; `_modules` of the root holds the whole tree."""

    def __init__(
        self, name: str, doc: str, resolve: Callable[[EmulatedModule, str], Any], known: Iterable[str]
    ) -> None:
        super().__init__(name, doc)
        self.__dict__["_resolve"] = resolve
        self.__dict__["_known"] = frozenset(known)
        # Makes `import cupy.cuda` and `from cupy.random import rand` work once the tree is in sys.modules.
        self.__path__: list[str] = []
        # Programs ask importlib.util.find_spec whether they may import CuPy.
        self.__spec__ = ModuleSpec(name, None, is_package=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}", name=name, obj=self)
        value = self.__dict__["_resolve"](self, name)
        self.__dict__[name] = value
        return value

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__["_known"], *super().__dir__()})

    def __reduce__(self) -> tuple[Any, ...]:
        return _module_named, (self.__name__,)


class Delegate:
    """`cupy.<name>`: NumPy's function, on device arrays."""

    def __init__(self, module: EmulatedModule, function: Callable[..., Any], name: str, devices: DeviceSet) -> None:
        self.__name__ = self.__qualname__ = name
        self.__module__ = module.__name__
        self.__doc__ = function.__doc__
        self.__wrapped__ = function
        self._module = module
        self._devices = devices

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self.__wrapped__, args, kwargs)

    def _call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operands = (args, kwargs)
        if find(operands, Held) is not None:
            return function(*args, **kwargs)
        host = find(operands, np.ndarray)
        if host is not None:
            raise mixing_refused(self.__name__, host)
        with np.errstate(all="ignore"):
            result = function(*args, **kwargs)
        if find(result, (np.ndarray, np.generic)) is not None:
            listed = next((value for value in (*args, *kwargs.values()) if isinstance(value, list)), None)
            if listed is not None:
                raise mixing_refused(self.__name__, listed)
        return Call(self.__name__, EmulatedArray, self._devices.current).lift(result)

    def __repr__(self) -> str:
        return f"<emulated function {self.__module__}.{self.__name__}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._module, self.__name__)


class CreatingDelegate(Delegate):
    """A function that makes device arrays out of host values."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return Call(self.__name__, EmulatedArray, self._devices.current).run(self.__wrapped__, args, kwargs)


class UfuncDelegate(Delegate):
    """`cupy.<ufunc>`, with its methods."""

    __wrapped__: np.ufunc

    def __getattr__(self, name: str) -> Any:
        if name in ("nin", "nout", "nargs", "types"):
            return getattr(self.__wrapped__, name)
        if name in ("reduce", "accumulate", "outer", "at", "reduceat"):
            method = getattr(self.__wrapped__, name)
            return lambda *args, **kwargs: self._call(method, args, kwargs)
        if name == "name":
            return f"cupy_{self.__wrapped__.__name__}"
        raise AttributeError(f"the emulated ufunc {self.__name__!r} has no {name!r}", name=name, obj=self)


class Lacking:
    """Stands for something of CuPy's that cannot be emulated: it can be imported, and says so when it is used."""

    def __init__(self, name: str, reason: str) -> None:
        self.__name__ = name
        self._reason = reason

    def _refuse(self) -> NoReturn:
        raise NotImplementedError(f"{self.__name__} is not there on emulated devices: {self._reason}")

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse()

    def __getitem__(self, key: Any) -> NoReturn:
        self._refuse()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()


# ---- the tree ---------------------------------------------------------------------------------------------------------


def make_module(
    devices: Sequence[DeviceLike],
    allocator_for_device: Callable[[DeviceLike], Allocator] | None = None,
    current_device: Callable[[], int] | None = None,
    *,
    name: str = "cupy",
) -> EmulatedModule:
    """Return an array module over these devices, which it numbers from 0 in their order.

    `allocator_for_device(device)` gives the memory (default: private memory up to the device's `memory_bytes`);
    `current_device()` gives the number of the device that is current for a thread that chose none (default: 0). Raises
    NoDeviceError where there is no device.
    """
    make = allocator_for_device or (lambda device: CappedAllocator(device.memory_bytes, f"device {device.uuid}"))
    memories = [DeviceMemory(index, device, make(device)) for index, device in enumerate(devices)]
    return module_of(DeviceSet(memories, current_device), name)


def module_of(devices: DeviceSet, name: str = "cupy") -> EmulatedModule:
    """Return the array module of a set of devices."""
    made = creation.Creation(devices)

    def resolve(module: EmulatedModule, attribute: str) -> Any:
        if attribute in names.CREATED:
            return getattr(made, attribute)
        return _resolve(module, attribute, devices)

    known = {
        *names.CREATED,
        *names.CONSTANTS,
        *names.ALIASES,
        *names.CONSTANTS_AND_TYPES,
        *names.QUESTIONS,
        *names.CREATION,
        *names.UFUNCS,
        *names.FUNCTIONS,
    }
    root = EmulatedModule(name, f"NumPy's API on {len(devices.devices)} emulated devices.", resolve, known)
    pool, pinned = cuda_namespace.MemoryPool(devices), cuda_namespace.PinnedMemoryPool()

    def get_array_module(*args: Any) -> ModuleType:
        return root if any(isinstance(value, EmulatedArray) for value in args) else np

    root.__dict__.update(
        __version__=VERSION,
        ndarray=EmulatedArray,
        ufunc=UfuncDelegate,
        get_array_module=get_array_module,
        get_default_memory_pool=lambda: pool,
        get_default_pinned_memory_pool=lambda: pinned,
        is_available=lambda: True,
        _devices=devices,
    )
    submodules = _submodules(name, devices)
    for full_name, module in submodules.items():
        parent, _, last = full_name.rpartition(".")
        if not parent:
            continue  # `cupyx` stands beside `cupy`
        (root if parent == name else submodules[parent]).__dict__[last] = module
    root.__dict__["_modules"] = {name: root, **submodules}
    return root


def _submodules(name: str, devices: DeviceSet) -> dict[str, EmulatedModule]:
    def plain(
        last: str, doc: str, values: Mapping[str, Any], lacking: Mapping[str, str] | None = None
    ) -> EmulatedModule:
        def resolve(module: EmulatedModule, attribute: str) -> Any:
            if lacking and attribute in lacking:
                return Lacking(f"{module.__name__}.{attribute}", lacking[attribute])
            raise _no_such_name(module, attribute)

        module = EmulatedModule(last if last.startswith(f"{name}x") else f"{name}.{last}", doc, resolve, values)
        module.__dict__.update(values)
        return module

    def delegated(last: str, functions: frozenset[str], creating: frozenset[str], **values: Any) -> EmulatedModule:
        source = attrgetter(last)(np)

        def resolve(module: EmulatedModule, attribute: str) -> Any:
            kind = CreatingDelegate if attribute in creating else Delegate
            if attribute in functions | creating and hasattr(source, attribute):
                return kind(module, getattr(source, attribute), attribute, devices)
            raise _no_such_name(module, attribute)

        module = EmulatedModule(f"{name}.{last}", f"NumPy's {last} on device memory.", resolve, functions | creating)
        module.__dict__.update(values)
        return module

    numbers = RandomNumbers(devices)
    of_state = words("seed default_rng get_random_state set_random_state reset_states RandomState Generator")
    random = {key: getattr(numbers, key) for key in of_state} | {key: numbers.function(key) for key in names.RANDOM}
    random |= {kind.__name__: kind for kind in (BitGenerator, XORWOW, MRG32k3a, Philox4x3210)}
    exceptions = {key: getattr(np.exceptions, key) for key in names.EXCEPTIONS if hasattr(np.exceptions, key)}
    tricks = delegated("lib.stride_tricks", names.STRIDE_TRICKS, frozenset(), as_strided=as_strided)
    streams = stream_names(devices)
    memory = {**cuda_namespace.memory_names(devices), "OutOfMemoryError": OutOfDeviceMemoryError}
    memory["CUDARuntimeError"] = CUDARuntimeError
    calls = RuntimeCalls(devices, streams).names()
    tree = {
        "linalg": delegated("linalg", names.LINALG, frozenset(), LinAlgError=np.linalg.LinAlgError),
        "fft": delegated("fft", names.FFT, names.FFT_CREATION),
        "random": plain("random", "Random numbers in device memory.", random),
        "exceptions": plain("exceptions", "NumPy's.", exceptions),
        "_util": plain("_util", "A kind of warning.", {"PerformanceWarning": PerformanceWarning}),
        "lib": plain("lib", "Views.", {}),
        "lib.stride_tricks": tricks,
        "testing": plain("testing", "Assertions about device and host arrays.", _assertions()),
        "cuda": plain(
            "cuda", "The emulated devices.", cuda_namespace.cuda_names(devices, streams), names.LACKING_IN_CUDA
        ),
        "cuda.runtime": plain("cuda.runtime", "CUDA's calls.", calls, names.LACKING_IN_RUNTIME),
        "cuda.memory": plain("cuda.memory", "Memory pools.", memory, names.LACKING_IN_CUDA_MEMORY),
        "cuda.stream": plain("cuda.stream", "Streams.", streams),
    }
    tree = {f"{name}.{last}": module for last, module in tree.items()}
    extras = f"{name}x"
    tree[extras] = plain(extras, "More of CuPy's.", extra_names(), names.LACKING_IN_EXTRAS)
    more = scipy_names(lambda: tree[f"{extras}.scipy"])
    tree[f"{extras}.scipy"] = plain(f"{extras}.scipy", "SciPy's API.", more, names.LACKING_IN_SCIPY)
    return tree


def _resolve(module: EmulatedModule, attribute: str, devices: DeviceSet) -> Any:
    if attribute in names.LACKING:
        return Lacking(f"{module.__name__}.{attribute}", names.LACKING[attribute])
    if attribute in names.CONSTANTS:
        return names.CONSTANTS[attribute]
    if attribute in names.ALIASES:
        return Delegate(module, names.ALIASES[attribute], attribute, devices)
    if attribute in names.EXCEPTIONS and hasattr(np.exceptions, attribute):
        return getattr(np.exceptions, attribute)
    if attribute not in names.OF_NUMPY:
        raise _no_such_name(module, attribute)
    value = getattr(np, attribute, None)
    if attribute in names.CONSTANTS_AND_TYPES and hasattr(np, attribute):
        return value
    if value is None:
        raise _no_such_name(module, attribute)
    if attribute in names.QUESTIONS:
        return value
    if attribute in names.CREATION:
        return CreatingDelegate(module, value, attribute, devices)
    if attribute in names.UFUNCS:
        return UfuncDelegate(module, value, attribute, devices)
    if attribute in names.FUNCTIONS:
        return Delegate(module, value, attribute, devices)
    raise _no_such_name(module, attribute)


def _no_such_name(module: EmulatedModule, attribute: str) -> AttributeError:
    return AttributeError(
        f"module {module.__name__!r}, emulated by afield, has no {attribute!r}: CuPy does not have it, or it is not emulated",
        name=attribute,
        obj=module,
    )


def _assertions() -> dict[str, Callable[..., Any]]:
    def on_host(assertion: Callable[..., Any]) -> Callable[..., Any]:
        def check(*args: Any, **kwargs: Any) -> Any:
            return assertion(*[value.get() if isinstance(value, EmulatedArray) else value for value in args], **kwargs)

        return check

    return {key: on_host(getattr(np.testing, key)) for key in names.TESTING}


def _module_named(name: str) -> ModuleType:
    """What a pickled module becomes."""
    root = name.partition(".")[0]
    try:
        module = importlib.import_module(name)
    except ImportError:
        devices = process_devices()
        if devices.module is None:
            devices.module = module_of(devices, "cupy" if root == "cupyx" else root)
        made: dict[str, ModuleType] = devices.module._modules
        module = made[name]
    return module
