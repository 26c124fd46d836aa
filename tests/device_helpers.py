"""What the tests of device memory share: runtimes with emulated devices, what moved, what is left, and faults.

Theory of operation. A module's tests share a runtime, and each ends with the books of all tiers at zero (`settled`): that is
how a pin, a lease or a copy that nobody gives back shows. Leased bytes are no leak: a process keeps some room for what it
allocates next.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import afield
from afield.gpu_store.backends.base import DeviceInfo
from afield.gpu_store.backends.emulated import EmulatedBackend
from afield.gpu_store.emulated_arrays import make_module
from afield.gpu_store.emulated_arrays.module import EmulatedModule
from afield.runtime.face.api import query
from afield.scheduler.devices import emulated_device, parse_devices
from tests.helpers import no_leaks, poll, processes, remote_with, traces

MIB = 1 << 20
#: Nothing here takes longer, unless it hangs.
PATIENCE_S = 30.0
#: What was let go of is gone from all tiers within this time on a loaded machine.
GRACE_S = 10.0

on_device = remote_with(num_gpus=1)


def emulated_devices(count: int, memory_bytes: int) -> list[DeviceInfo]:
    """Return like devices for a machine of a test's own, as the node daemon describes them."""
    devices = [emulated_device(index, memory_bytes) for index in range(count)]
    return [DeviceInfo(one.uuid, one.index, one.name, one.memory_bytes, one.kind) for one in devices]


def module_with(devices: int = 1, memory: str = "64MiB") -> EmulatedModule:
    """Return an array module of emulated devices that no runtime has."""
    return make_module(parse_devices(f"emulated:{devices}:{memory}"))


@contextmanager
def runtime_with(devices: str, host_memory: str = "64MiB", num_cpus: int = 2) -> Iterator[None]:
    """A runtime with emulated devices, which leaves nothing behind."""
    afield.shutdown()
    with no_leaks():
        afield.init(num_cpus=num_cpus, devices=devices, host_memory=host_memory)
        yield


def tiers() -> dict[str, dict[str, Any]]:
    """Return the figures of all tiers: "host", "disk", and the devices that are in use by UUID."""
    figures: dict[str, dict[str, Any]] = query("store")["tiers"]
    return figures


def uuids() -> list[str]:
    """Return the UUIDs of the node's devices."""
    return [device["uuid"] for device in query("devices")["devices"]]


def sealed(tier: str) -> int:
    """Return the bytes of stored objects in a tier."""
    figures = tiers().get(tier)
    return int(figures["sealed"]) if figures is not None else 0


def held() -> list[str]:
    """Return what is in memory: all objects, and the bytes that are left in tiers."""
    gc.collect()
    left = [f"{entry.object_id} in {entry.tier}: {', '.join(entry.why)}" for entry in afield.memory()]
    return left + [f"{name}: {figures['sealed']} bytes" for name, figures in tiers().items() if figures["sealed"]]


def assert_settled() -> None:
    """Fail unless every object goes, and with them the bytes of all tiers."""
    poll(lambda: not held(), GRACE_S)
    left = held()
    assert not left, left


class Moved(dict[str, float]):
    """Bytes by kind of movement that a block caused; complete when the block has ended."""


@contextmanager
def movement() -> Iterator[Moved]:
    """Count the bytes that a block moves."""
    moved = Moved()
    before = afield.stats()
    yield moved
    moved.update({name: count - before.get(name, 0) for name, count in afield.stats().items()})


@contextmanager
def machine() -> Iterator[EmulatedBackend]:
    """The emulated machine of the session, for faults."""
    backend = EmulatedBackend.attach(query("devices")["backend"].partition(":")[2])
    try:
        yield backend
    finally:
        backend.close()


def wait_for_devices(count: int) -> None:
    """Block until the scheduler has so many devices."""
    assert poll(lambda: query("total").get("GPU", 0) == count, PATIENCE_S), query("total")


def store_pids() -> set[int]:
    """Return the store processes of the session."""
    return {pid for pid, name in processes(traces()).items() if name == "afield-store"}


def spill_files(pattern: str = "*[0-9]") -> list[Path]:
    """Return the spill files of the session; "*" finds those that are being written, too."""
    return list((Path(traces().directory) / "spill").glob(pattern))


def raised_by(call: Callable[[], Any], kind: type[BaseException]) -> str:
    """Return the text of the error that a call raises, and let go of the error: its frames hold what they worked on."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__} was raised")
