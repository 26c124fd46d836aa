"""The emulated array module under the name that programs import.

Theory of operation. In a process that is bound to emulated devices, `import cupy` is to give the stand-in, and `import
cupyx` what there is of that. The tree of modules is put into `sys.modules`; a finder at the end of `sys.meta_path`, asked
only for what nobody else could find, says why the rest of CuPy is missing. It raises ModuleNotFoundError, so that a program
which can do without them still can. What was imported under these names before comes back at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from afield.gpu_store.emulated_arrays.devices import DeviceSet, set_process_devices
from afield.gpu_store.emulated_arrays.module import EmulatedModule


class MissingParts(MetaPathFinder):
    """Explains why a part of CuPy cannot be imported."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        root = fullname.partition(".")[0]
        if root not in (self._name, f"{self._name}x"):
            return None
        raise ModuleNotFoundError(
            f"{fullname!r} is not there: {self._name!r} is emulated by afield on devices without CUDA, as far as NumPy's "
            "API goes; raw kernels, sparse arrays and CUDA libraries need a real device",
            name=fullname,
        )


@contextmanager
def installed_as_import(module: EmulatedModule) -> Iterator[EmulatedModule]:
    """Make `import <name of module>` give `module`, and unpickled arrays go to its devices, until the end of the block."""
    devices: DeviceSet = module._devices
    modules: dict[str, EmulatedModule] = module._modules
    finder = MissingParts(module.__name__)
    before = {name: sys.modules.get(name) for name in modules}
    devices_before = set_process_devices(devices)
    sys.modules.update(modules)
    sys.meta_path.append(finder)
    try:
        yield module
    finally:
        sys.meta_path.remove(finder)
        set_process_devices(devices_before)
        for name, previous in before.items():
            if previous is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = previous
