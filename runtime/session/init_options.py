"""The arguments of `init`: what they mean for a session, and what becomes of those that only Ray's `init` takes.

Of the latter each has another name here, or is accepted where it asks for what is so anyway, or is refused with the reason.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from afield.errors import InvalidOptionError, NoClusterError, NoDeviceError
from afield.gpu_store.backends.base import DeviceInfo, DeviceUsageError
from afield.gpu_store.backends.select import EMULATED_LINK, link_speed
from afield.runtime.process.configuration import LINEAGE_VALUE_BYTES, LINEAGE_VALUE_SHARE
from afield.runtime.process.environment import Environment
from afield.runtime.process.limits import usable_cpus, usable_memory_bytes
from afield.runtime.session.bootstrap import STORE_SHARE, SessionOptions
from afield.scheduler.devices import Device, parse_devices, visible_devices
from afield.scheduler.resources import ResourceSet
from afield.text import is_text
from afield.units import format_bytes, parse_bytes

#: How many bytes of values each process keeps for lineage alone: a variable of the environment.
LINEAGE_MEMORY = "AFIELD_LINEAGE_MEMORY"
#: Another name for an argument of ours.
_ALIASES = {"object_store_memory": "host_memory", "_temp_dir": "spill_dir"}
#: Name -> the values that ask for nothing (None always does), and what to do instead.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "include_dashboard": ((False,), "there is no dashboard; see `afield status`"),
    "dashboard_host": (("127.0.0.1", "localhost"), "there is no dashboard; see `afield status`"),
    "local_mode": ((False,), "tasks always run in workers; call f.__wrapped__(...) to run one here"),
    "job_config": ((), "pass runtime_env= and namespace= themselves"),
    "labels": (({},), "there are no node labels; use resources="),
    "enable_resource_isolation": ((False,), "workers are not confined"),
    "_system_config": (({},), "there is nothing of the kind to set"),
    "_plasma_directory": ((), "values are in memory that has no name; spill_dir= says where they spill"),
    "_driver_object_store_memory": ((), "there is one store for all; use host_memory="),
    "_memory": ((), "memory for tasks is what the machine has"),
    "_node_ip_address": (("127.0.0.1",), "the runtime is on this machine only"),
}
#: A port of a dashboard or of metrics that is not there binds nothing, and nobody asks for a password. The others say how Ray's
#: own messages are logged; afield has none, and leaves the logging of the program alone.
_IGNORED = (
    "dashboard_port",
    "_metrics_export_port",
    "_redis_username",
    "_redis_password",
    "configure_logging",
    "logging_level",
    "logging_format",
    "logging_config",
)

_KINDS: tuple[tuple[str, Any, str], ...] = (
    ("address", str, "a string"),
    ("namespace", str, "a string"),
    ("spill_dir", (str, os.PathLike), "the path of a directory"),
    ("log_to_driver", bool, "True or False"),
    ("resources", Mapping, "a dict of names and amounts"),
)


def _translate(others: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Return what `others` means in arguments of `init`, whose names are `known`."""
    meant = {}
    for name, value in others.items():
        if name in _ALIASES:
            if value is not None:  # Ray takes 1e9 and 0.5 * total as well
                meant[_ALIASES[name]] = int(value) if isinstance(value, float) and math.isfinite(value) else value
        elif name in _REFUSED:
            harmless, instead = _REFUSED[name]
            if value is not None and value not in harmless:
                raise InvalidOptionError(f"init({name}={value!r}) is not supported: {instead}")
        elif name not in _IGNORED:
            near = difflib.get_close_matches(name, [*known, *_ALIASES], 1)
            hint = f"; did you mean {near[0]!r}?" if near else "; leave it out."
            raise InvalidOptionError(f"init() has no argument {name!r}{hint} It takes: {', '.join(sorted(known))}")
    return meant


def session_options(others: Mapping[str, Any], **given: Any) -> SessionOptions:
    """Check the arguments of `init` (`others` are those that it does not name) and return what they mean.

    Raises:
        InvalidOptionError: an argument is unknown or not valid.
        NoDeviceError: `num_gpus` exceeds the devices, or `devices` asks for some that are not here.
    """
    given |= _translate(others, [*given, "ignore_reinit_error"])
    for name, kind, expected in _KINDS:
        if given[name] is not None and not isinstance(given[name], kind):
            raise InvalidOptionError(f"init({name}={given[name]!r}): expected {expected}")
    if not is_text(given["namespace"] or ""):
        raise InvalidOptionError(f"init(namespace={given['namespace']!r}): expected a string without lone surrogates")
    address, num_cpus, num_gpus = given["address"], given["num_cpus"], given["num_gpus"]
    if address not in (None, "local"):
        raise NoClusterError(f"address={address!r}: joining another runtime is not supported yet; leave it out")
    cpus = num_cpus if num_cpus is not None else float(usable_cpus())
    resources: dict[str, float] | None = given["resources"]
    ResourceSet.from_options(num_cpus=cpus, num_gpus=num_gpus, resources=resources)
    devices = given["devices"]
    found = parse_devices(devices if devices is not None else os.environ.get("AFIELD_DEVICES"), _cuda_inventory)
    if num_gpus is not None and num_gpus > len(found):
        raise NoDeviceError(
            f"num_gpus={num_gpus} but there are {len(found)} devices; "
            f'pass devices="emulated:{int(num_gpus)}" or set AFIELD_DEVICES=emulated:{int(num_gpus)}'
        )
    amounts = {name: float(amount) for name, amount in (resources or {}).items()}
    store_bytes = _store_bytes(given["host_memory"])
    return SessionOptions(
        float(cpus),
        found,
        _emulated_link(found),
        amounts,
        store_bytes,
        None if given["spill_dir"] is None else os.fspath(given["spill_dir"]),
        given["namespace"] or "",
        given["log_to_driver"],
        Environment.of(given["runtime_env"]),
        _lineage_bytes(store_bytes),
    )


def _cuda_inventory() -> list[DeviceInfo]:
    """Return the CUDA devices that this process may use, without starting any; raises NoDeviceError with the remedy."""
    from afield.gpu_store.backends import cuda

    order = os.environ.get("CUDA_DEVICE_ORDER")
    return visible_devices(cuda.find_devices(), os.environ.get("CUDA_VISIBLE_DEVICES"), order == "PCI_BUS_ID")


def _emulated_link(devices: Sequence[Device]) -> str:
    """Return the speed that the user gives the links of emulated devices; "" for none."""
    link = os.environ.get(EMULATED_LINK, "")
    if not link or not devices or devices[0].kind != "emulated":
        return ""
    try:
        link_speed(link)  # here, and not in the daemon, where it would end the session
    except DeviceUsageError as error:
        raise InvalidOptionError(f"{EMULATED_LINK}: {error}") from None
    return link


def _lineage_bytes(store_bytes: int) -> int:
    """Return how many bytes of values each process keeps for lineage alone."""
    text = os.environ.get(LINEAGE_MEMORY, "")
    if not text:
        return min(LINEAGE_VALUE_BYTES, int(store_bytes * LINEAGE_VALUE_SHARE))
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise InvalidOptionError(f"{LINEAGE_MEMORY}: {error}") from None


def _store_bytes(host_memory: int | str | None) -> int:
    """Return the capacity of the host store, in whole pages."""
    try:
        size = parse_bytes(host_memory) if host_memory is not None else int(usable_memory_bytes() * STORE_SHARE)
    except (ValueError, TypeError) as error:
        raise InvalidOptionError(f"host_memory={host_memory!r}: {error}") from None
    if size < 1 << 20:
        raise InvalidOptionError(f"host_memory={host_memory!r}: at least 1 MiB is needed")
    there_is = usable_memory_bytes()
    if host_memory is not None and size > there_is:
        raise InvalidOptionError(
            f"host_memory={host_memory!r} is more than the {format_bytes(there_is)} of memory that may be used here; "
            "what does not fit into the store spills to disk"
        )
    return size & -4096
