"""numba's kernels on emulated device arrays: what numba's own CUDA simulator lacks for that.

Theory of operation. numba has a simulator, which runs each thread of a kernel as a thread of the host. `install` switches it
on, and waits for `numba.cuda` to be imported: a finder at the head of `sys.meta_path` lets the others find the module and
has it adapted once it is loaded. Nothing here imports numba, so a process that never uses it pays nothing.

What is adapted, so that a program written for CuPy arrays and numba kernels runs unchanged:

- A kernel takes emulated arrays and works on their memory; a write to a stored array, which is read-only, raises.
- numba's own device arrays (`to_device`, `device_array`, ...) lie in the memory of the current emulated device, are pickled
  as device arrays, and share their memory with the array module (`as_cuda_array`, and `asarray` of the module).
- The simulator knows one launch at a time, and keeps a launch's shape in the kernel: launches of several threads are
  put in order, and `kernel[blocks, threads]` is an object of its own.

Where `numba.cuda` was imported before, it is numba's real one, and stays so; only its kernels are made to travel:
a kernel that such a process pickles arrives as one of the simulator where that is in use.
"""

from __future__ import annotations

import copy
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np

from afield.gpu_store.emulated_arrays.array import EmulatedArray, allocation_of, inner_array
from afield.gpu_store.emulated_arrays.delegation import Call
from afield.gpu_store.emulated_arrays.devices import holder_of, process_devices

SWITCH = "NUMBA_ENABLE_CUDASIM"
_MODULE = "numba.cuda"

#: The simulator has one place for "the kernel that runs".
_launching = threading.Lock()


def install() -> bool:
    """Let `import numba.cuda` give the simulator, adapted; False where numba's real one was imported already.

    What the user has set in NUMBA_ENABLE_CUDASIM stays: with 0 there is no simulator.
    """
    loaded = sys.modules.get(_MODULE)
    if loaded is not None:
        adapt(loaded)
        return is_simulator(loaded)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    return os.environ.get(SWITCH, "1") == "1"


def uninstall() -> None:
    """Let a later `import numba.cuda` give what it gives without afield; what was imported stays as it is."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]


@contextmanager
def _switched_on() -> Iterator[None]:
    """Have numba see the switch, for as long as it looks.

    It does not stay in the environment, which the processes of a later session inherit.
    """
    if SWITCH in os.environ:
        yield
        return
    os.environ[SWITCH] = "1"
    config = sys.modules.get("numba.core.config")
    if config is not None:  # numba itself was imported before, and has looked at the environment
        vars(config)["ENABLE_CUDASIM"] = 1
    try:
        yield
    finally:
        os.environ.pop(SWITCH, None)


def is_simulator(module: ModuleType) -> bool:
    """Tell whether `module`, which is `numba.cuda`, is the simulator."""
    return "numba.cuda.simulator.kernel" in sys.modules and hasattr(module, "FakeCUDAKernel")


class _Finder(MetaPathFinder):
    """Lets the other finders find `numba.cuda` (numba's own, or the package numba-cuda redirects to), and wraps its loader."""

    def __init__(self) -> None:
        self._searching = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODULE or getattr(self._searching, "now", False):
            return None
        self._searching.now = True  # finders ask each other
        try:
            for finder in sys.meta_path:
                spec = finder.find_spec(fullname, path, target) if finder is not self else None
                if spec is not None and spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                    return spec
        finally:
            self._searching.now = False
        return None


class _Loader(Loader):
    """Loads a module as its own loader does, and adapts it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        with _switched_on():
            self._loader.exec_module(module)
        adapt(module)


# ---- the simulator --------------------------------------------------------------------------------------------------


def adapt(cuda: ModuleType) -> None:
    """Teach `cuda`, which is `numba.cuda`, about emulated arrays; does nothing the second time."""
    if getattr(cuda, "_knows_emulated_arrays", False):
        return
    vars(cuda)["_knows_emulated_arrays"] = True
    if not is_simulator(cuda):
        _let_kernels_travel()
        return
    arrays: Any = sys.modules["numba.cuda.simulator.cudadrv.devicearray"]
    _adapt_arrays(arrays.FakeCUDAArray)
    _adapt_kernels(sys.modules["numba.cuda.simulator.kernel"], arrays.FakeCUDAArray)
    made = _functions(arrays)
    for module in (arrays, sys.modules["numba.cuda.simulator"], cuda):
        vars(module).update(made)


def _adapt_kernels(kernels: Any, fake: Any) -> None:
    kernel_type, thread_type = kernels.FakeCUDAKernel, kernels.BlockThread
    launch: Callable[..., Any] = kernel_type.__call__
    configure: Callable[..., Any] = kernel_type.__getitem__

    def call(self: Any, *args: Any) -> Any:
        if self._device or isinstance(threading.current_thread(), thread_type):
            return launch(self, *args)  # a device function, called by a kernel
        for array in args:
            if isinstance(array, EmulatedArray):
                allocation_of(array)[0].touch()
        with _launching:
            return launch(self, *[_lower(array, fake) for array in args])

    def getitem(self: Any, configuration: Any) -> Any:
        return configure(copy.copy(self), configuration)

    kernel_type.__call__, kernel_type.__getitem__ = call, getitem
    kernel_type.__reduce__ = lambda self: (_kernel, (self.fn, {"device": self._device}, _launch_of(self)))


def _launch_of(kernel: Any) -> Any:
    return None if kernel.grid_dim is None else (kernel.grid_dim, kernel.block_dim, 0, kernel.dynshared_size)


def _adapt_arrays(fake: Any) -> None:
    copy_to_device: Callable[..., Any] = fake.copy_to_device

    def from_device(self: Any, ary: Any, stream: Any = 0) -> None:
        copy_to_device(self, _lower(ary, fake), stream)

    fake.copy_to_device = from_device
    fake.__emulated_array__ = lambda self: as_emulated(self._ary)
    fake.__reduce__ = lambda self: (_array, (as_emulated(self._ary),))


def _functions(arrays: Any) -> dict[str, Any]:
    """Return the functions of `numba.cuda` that make device arrays, in emulated device memory."""
    fake: Any = arrays.FakeCUDAArray
    original_auto_device: Callable[..., Any] = arrays.auto_device

    def device_array(
        shape: Any, dtype: Any = np.float64, strides: Any = None, order: str = "C", stream: Any = 0, **_: Any
    ) -> Any:
        if strides is not None:
            home = process_devices().current
            extents = (shape,) if isinstance(shape, int) else tuple(shape)
            return fake(home.empty(extents, dtype, tuple(strides)), stream)
        return fake(inner_array(EmulatedArray(shape, dtype, order=order)), stream)

    def device_array_like(ary: Any, stream: Any = 0) -> Any:
        model = inner_array(ary) if isinstance(ary, EmulatedArray) else getattr(ary, "_ary", ary)
        return fake(process_devices().current.empty_like(model), stream)

    def to_device(obj: Any, stream: Any = 0, copy: bool = True, to: Any = None) -> Any:
        if to is not None:
            _lower(to, fake).copy_to_device(obj, stream)
            return to
        if isinstance(obj, (EmulatedArray, fake)):
            return as_cuda_array(obj)
        host = np.asarray(obj)
        arrays.sentry_contiguous(host)
        return fake(process_devices().current.copy_in(host), stream)

    def auto_device(obj: Any, stream: Any = 0, copy: bool = True, **options: Any) -> Any:
        if isinstance(obj, EmulatedArray):
            return _lower(obj, fake), False
        return original_auto_device(obj, stream, copy, **options)

    def is_cuda_array(obj: Any) -> bool:
        return isinstance(obj, (EmulatedArray, fake))

    def as_cuda_array(obj: Any, sync: bool = True) -> Any:
        if not is_cuda_array(obj):
            raise TypeError(f"*obj* is no device array but a {type(obj).__name__}; copy it with cuda.to_device(obj)")
        return _lower(obj, fake)

    made = (device_array, device_array_like, to_device, auto_device, is_cuda_array, as_cuda_array)
    return {function.__name__: function for function in made} | {"mapped_array": device_array}


def _lower(value: Any, fake: Any) -> Any:
    """An emulated array as numba's simulator has them, over the same memory; anything else as it is."""
    return fake(inner_array(value)) if isinstance(value, EmulatedArray) else value


def as_emulated(array: Any) -> EmulatedArray:
    """Return a NumPy array as a device array: the same memory if it lies on a device, else a copy on the current one."""
    holder = holder_of(array)
    home = holder.device if holder is not None else process_devices().current
    lifted: EmulatedArray = Call("asarray", EmulatedArray, home).lift(array)
    return lifted


# ---- what travels ---------------------------------------------------------------------------------------------------


def _array(stored: Any) -> Any:
    """Rebuild numba's device array over what the store gave; a process without a device was given host memory, and keeps it."""
    if not isinstance(stored, EmulatedArray):
        return stored
    from importlib import import_module

    cuda = import_module(_MODULE)
    return vars(cuda)["as_cuda_array"](stored)


def _kernel(function: Callable[..., Any], options: dict[str, Any], launch: Any) -> Any:
    """Compile a kernel anew where it arrived; `launch` is its shape if it had one."""
    from importlib import import_module

    kernel = vars(import_module(_MODULE))["jit"](**options)(function)
    return kernel if launch is None else kernel[launch]


def _let_kernels_travel() -> None:
    """Pickle the kernels of numba's real CUDA by their Python function: where they arrive there may be the simulator."""
    dispatcher: Any = getattr(sys.modules.get("numba.cuda.dispatcher"), "CUDADispatcher", None)
    if dispatcher is None:
        return

    def reduce(self: Any) -> Any:
        options = {name: self.targetoptions[name] for name in ("device", "fastmath") if name in self.targetoptions}
        return _kernel, (self.py_func, options, None)

    dispatcher.__reduce__ = reduce
