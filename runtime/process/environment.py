"""The runtime environment of tasks and actors: what `runtime_env=` accepts, its canonical form, and its application.

Theory of operation. `Environment.of` checks what the user wrote, where it was written, and makes it absolute. An option
is laid over the environment of the process that submits (`over`): a driver has that of its job, a worker the one that it
was forked for, so children inherit it. What travels is `encode()`: equal environments have equal bytes, which are part
of the key of a lane and of an idle worker; nobody but the worker looks inside. A worker is forked, applies its
environment before it runs any code of the user, and keeps it for life; the pool uses it again only for leases that ask
for the same one.

Applied to a fork, variables are too late for what was imported before: the thread pools that numpy's libraries make as
they load do not see `OMP_NUM_THREADS`.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
import time
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import msgspec

from afield.errors import InvalidOptionError

KEYS = ("env_vars", "working_dir", "py_modules")
#: An encoded environment travels with each lease and each fork; this is far above any real one.
MAX_ENCODED_BYTES = 64 * 1024
#: Set by the runtime for each worker: which devices it may see, and who it is.
RESERVED_VARIABLES = ("CUDA_VISIBLE_DEVICES", "AFIELD_VISIBLE_DEVICES", "AFIELD_WORKER")

_EXPANSION = re.compile(r"\$\{(\w+)\}")


class Environment(msgspec.Struct, frozen=True, array_like=True):
    """A checked runtime environment: paths are absolute, and variables are in order. Empty fields inherit."""

    variables: tuple[tuple[str, str], ...] = ()
    working_dir: str = ""
    modules: tuple[str, ...] = ()

    @classmethod
    def of(cls, value: Any) -> Environment:
        """Return the environment that a `runtime_env=` option (a dict, or None) describes.

        Raises:
            InvalidOptionError: a key is unknown, a value has the wrong type, or a path does not exist.
        """
        if value is None:
            return cls()
        if isinstance(value, Environment):
            return value
        if not isinstance(value, Mapping):
            raise InvalidOptionError(f"runtime_env={value!r}: expected a dict with {_names(KEYS)}")
        for key in value:
            if key not in KEYS:
                near = difflib.get_close_matches(str(key), KEYS, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ";"
                raise InvalidOptionError(f"runtime_env has no key {key!r}{hint} it takes {_names(KEYS)}")
        environment = cls(
            _variables(value.get("env_vars")), _working_dir(value.get("working_dir")), _modules(value.get("py_modules"))
        )
        size = len(environment.encode())
        if size > MAX_ENCODED_BYTES:
            raise InvalidOptionError(
                f"runtime_env is {size} bytes large and may have {MAX_ENCODED_BYTES}; pass data as arguments or with put()"
            )
        return environment

    def described(self) -> dict[str, Any]:
        """Return it in the form that `runtime_env=` takes."""
        whole = {
            "env_vars": dict(self.variables),
            "working_dir": self.working_dir,
            "py_modules": list(self.modules),
        }
        return {key: value for key, value in whole.items() if value}

    def over(self, base: Environment) -> Environment:
        """Return this environment on top of another: variables are added, the other fields replaced where given."""
        if self == Environment():
            return base
        variables = dict(base.variables) | dict(self.variables)
        return Environment(
            tuple(sorted(variables.items())), self.working_dir or base.working_dir, self.modules or base.modules
        )

    def encode(self) -> bytes:
        """Return the canonical form: equal for equal environments, and empty for one that changes nothing."""
        return b"" if self == Environment() else msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Environment:
        """Return the environment with this canonical form."""
        return msgspec.msgpack.decode(data, type=cls) if data else cls()

    def problem(self) -> str:
        """Return why it cannot be applied on this machine any more, or ""."""
        paths = [self.working_dir, *self.modules] if self.working_dir else self.modules
        gone = [path for path in paths if not os.path.exists(path)]
        return f"runtime_env: {_names(tuple(gone))} is gone; keep it as long as tasks and actors use it" if gone else ""

    def apply(self) -> None:
        """Make it this process's environment; raises OSError if the working directory cannot be entered."""
        for name, text in self.variables:
            os.environ[name] = _EXPANSION.sub(lambda found: os.environ.get(found[1], ""), text)
        names = dict(self.variables)
        if "TZ" in names:
            time.tzset()
        paths = [os.path.dirname(path) for path in self.modules]
        if self.working_dir:
            os.chdir(self.working_dir)
            paths.insert(0, self.working_dir)
        if "PYTHONPATH" in names:  # a new interpreter would have read it
            paths += [path for path in os.environ["PYTHONPATH"].split(os.pathsep) if path]
        if paths:
            added = list(dict.fromkeys(paths))
            sys.path[:] = added + [path for path in sys.path if path not in added]
            importlib.invalidate_caches()


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(repr(name) for name in names)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _variables(value: Any) -> tuple[tuple[str, str], ...]:
    if value is None:
        return ()
    if not isinstance(value, Mapping):
        raise InvalidOptionError(f"runtime_env: env_vars={value!r}: expected a dict of names and texts")
    for name, text in value.items():
        if not isinstance(name, str) or not name or "=" in name or "\0" in name:
            raise InvalidOptionError(f"runtime_env: env_vars has {name!r}, which cannot be a variable's name")
        if not isinstance(text, str) or "\0" in text:
            raise InvalidOptionError(f"runtime_env: env_vars[{name!r}]={text!r}: expected a text; write {str(text)!r}")
        if not _is_text(name + text):
            raise InvalidOptionError(f"runtime_env: env_vars[{name!r}]={text!r} cannot be written as UTF-8")
        if name in RESERVED_VARIABLES:
            raise InvalidOptionError(
                f"runtime_env: env_vars may not set {name}, which follows from the worker's lease; "
                "ask for devices with num_gpus= or gpu_memory="
            )
    return tuple(sorted(value.items()))


def _path(value: Any, key: str) -> str:
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise InvalidOptionError(f"runtime_env: {key}: expected a path, not {value!r}")
    path = os.path.abspath(os.path.expanduser(os.fsdecode(value)))
    if not _is_text(path):
        raise InvalidOptionError(f"runtime_env: {key}: the path {path!r} cannot be written as UTF-8")
    return path


def _working_dir(value: Any) -> str:
    if value is None:
        return ""
    path = _path(value, "working_dir")
    if not os.path.isdir(path):
        raise InvalidOptionError(
            f"runtime_env: working_dir={os.fspath(value)!r} is not a directory (looked for {path}); "
            "give an existing directory of this machine; archives and addresses are not fetched"
        )
    return path


def _modules(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise InvalidOptionError(f"runtime_env: py_modules={value!r}: expected a list of paths or imported modules")
    return tuple(_module(item) for item in value)


def _module(value: Any) -> str:
    """Return the path of a package's folder or of a module's file; its parent will be on `sys.path`."""
    if isinstance(value, ModuleType):
        # A package of several parts is found by the first part of its name.
        top = sys.modules.get(value.__name__.partition(".")[0], value)
        places: list[str | None] = [*getattr(top, "__path__", ()), getattr(top, "__file__", None)]
        place = next((place for place in places if place), None)
        if place is None:
            raise InvalidOptionError(f"runtime_env: py_modules: the module {value.__name__} has no file; leave it out")
        return os.path.abspath(place)
    path = _path(value, "py_modules")
    if not os.path.isdir(path) and not (os.path.isfile(path) and path.endswith(".py")):
        raise InvalidOptionError(
            f"runtime_env: py_modules has {os.fspath(value)!r} (looked for {path}), which is neither a package's folder "
            "nor a .py file; give the path of one, or the imported module itself"
        )
    return path
