"""The public names of CuPy, as facts: what `cupy_names.json` records, and how it is made.

Theory of operation. `python -m tests.cupy_names`, with a CuPy installed (a driver is not needed), asks its modules and classes
for their names and writes the record. The emulated module must offer no name that is not in there; a contract test compares the
record with a CuPy, where there is one.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

RECORD = Path(__file__).with_suffix(".json")

MODULES = (
    "cupy",
    "cupy.linalg",
    "cupy.fft",
    "cupy.random",
    "cupy.cuda",
    "cupy.cuda.runtime",
    "cupy.cuda.memory",
    "cupy.cuda.stream",
    "cupy.testing",
    "cupy.lib",
    "cupy.lib.stride_tricks",
    "cupy.exceptions",
    "cupyx",
    "cupyx.scipy",
)

CLASSES = {
    "ndarray": "cupy.ndarray",
    "flatiter": "cupy.flatiter",
    "ufunc": "cupy.ufunc",
    "Generator": "cupy.random.Generator",
    "RandomState": "cupy.random.RandomState",
    **{
        name: f"cupy.cuda.{name}"
        for name in (
            "Device",
            "Event",
            "ExternalStream",
            "MemoryPointer",
            "MemoryPool",
            "PinnedMemoryPool",
            "Stream",
            "UnownedMemory",
        )
    },
}

#: Attributes that only instances have, and an instance needs a device: from CuPy's reference.
OF_INSTANCES = {
    "Stream": ("device_id", "ptr"),
    "ExternalStream": ("device_id", "ptr"),
    "Event": ("ptr",),
    "UnownedMemory": ("device", "device_id", "ptr", "size"),
}


def names_of(thing: Any) -> list[str]:
    """Public names, without the modules that a module happens to import."""
    found = [name for name in dir(thing) if not name.startswith("_") and name != "annotations"]
    if isinstance(thing, ModuleType):
        found = [name for name in found if not _foreign(getattr(thing, name))]
    return found


def _foreign(value: Any) -> bool:
    return isinstance(value, ModuleType) and value.__name__.partition(".")[0] not in ("cupy", "cupyx", "cupy_backends")


def from_cupy() -> dict[str, list[str]]:
    """Ask the CuPy that is installed; raises ImportError where there is none."""
    modules = {name: importlib.import_module(name) for name in MODULES}
    names = {name: names_of(module) for name, module in modules.items()}
    for short, path in CLASSES.items():
        where, _, last = path.rpartition(".")
        # Some are found only when they are asked for.
        names[where] = sorted({*names[where], last}) if hasattr(modules[where], last) else names[where]
        names[short] = sorted({*names_of(getattr(modules[where], last)), *OF_INSTANCES.get(short, ())})
    return names


def recorded() -> dict[str, frozenset[str]]:
    """The record: by module or class, its public names."""
    content = json.loads(RECORD.read_text())
    return {where: frozenset(text.split()) for where, text in content["names"].items()}


def _write() -> None:
    version = importlib.import_module("cupy").__version__
    names = {where: " ".join(found) for where, found in from_cupy().items()}
    RECORD.write_text(json.dumps({"cupy": version, "names": names}, indent=1) + "\n")


if __name__ == "__main__":
    _write()
