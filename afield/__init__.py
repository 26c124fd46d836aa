"""afield: a GPU-aware accelerator runtime for Python on distributed futures."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from afield.version import VERSION as _VERSION

if TYPE_CHECKING:
    from afield._face import *  # noqa: F403 - type checkers read the names there
    from afield.errors import *  # noqa: F403 - the same

# Each of these needs a partner, or is a library of its own: loaded on first use.
_LAZY = {
    "Executor": "libraries.executor",
    "dask_get": "libraries.dask_scheduler",
    "progress": "libraries.progress",
    "register_joblib": "libraries.joblib_backend",
}


def __getattr__(name: str) -> Any:
    """Import the runtime when the first of its names is used; see `_face`."""
    if name in _LAZY:
        return getattr(importlib.import_module("afield." + _LAZY[name]), name)
    if name in ("actor", "exceptions", "util"):
        return importlib.import_module("afield." + name)
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module 'afield' has no attribute {name!r}")
    modules = [importlib.import_module("afield." + module) for module in ("errors", "_face")]
    public = {each: getattr(module, each) for module in modules for each in module.__all__}
    globals().update(public, __all__=[*_LAZY, *public])
    if name not in globals():  # modules of the package are there by now as well
        raise AttributeError(f"module 'afield' has no attribute {name!r}")
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})


__version__ = _VERSION
