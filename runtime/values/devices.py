"""This process's devices: which they are, their memory, and the array module on them.

Theory of operation. A worker is bound to the devices of its lease before anything can start one, by the variables that it is
forked with; the driver may use all devices of the node, but reads into host memory unless asked otherwise. Nothing is
started before it is used: the first allocation, or the first value with a device array, opens the backend, maps the device's
slab, which its store process owns, and makes the arena that this process's device arrays are allocated from.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Mapping
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

import msgspec

from afield.errors import AfieldError, DeviceLostError, NoDeviceError, NotInitializedError
from afield.gpu_store.arena import DeviceArena
from afield.gpu_store.backends.base import (
    Device,
    DeviceBackend,
    DeviceUsageError,
    PoisonedContextError,
    Slab,
    SlabExport,
    SlabImportError,
)
from afield.gpu_store.backends.select import open_backend
from afield.gpu_store.client import ViewPin
from afield.gpu_store.interop import DevicePlace
from afield.gpu_store.interop.interop_cupy import cupy_module, cupy_stream, install_cupy
from afield.gpu_store.interop.interop_numba import install_numba
from afield.gpu_store.tiers import HOST
from afield.runtime.process.process import Process
from afield.runtime.wire import messages
from afield.transport.interrupts import uninterruptible

#: The daemon hears of the death of a store process within this time.
NEWS_S = 1.0


class Devices:
    """The devices of one process.

    Args:
        process: this process.
        lease: blocks for bytes of a life of an arena, for so many seconds (None: as usual); returns (offset, size).
        give_back: returns leased bytes of a life of an arena.
        lease_ahead: asks for bytes of a life of an arena without waiting; what is granted comes by `granted_ahead`.
    """

    def __init__(
        self,
        process: Process,
        lease: Callable[[int, int, int, float | None], tuple[int, int]],
        give_back: Callable[[int, int, int, int], None],
        lease_ahead: Callable[[int, int, int], None],
    ) -> None:
        self._process = process
        self._lease = lease
        self._lease_ahead = lease_ahead
        self._give_back = give_back
        self._lock = threading.RLock()
        self._backend: DeviceBackend | None = None
        self._arenas: dict[int, DeviceArena] = {}  # number -> arena
        self._module: Any = None
        self._stands_in = False
        self._library_allocator: Any = None  # alive as long as the library uses it
        self._on_close = contextlib.ExitStack()
        self.bytes_shared = 0
        #: Of a worker: why its device could not be used when it was asked for.
        self.unusable = ""
        #: Arena number -> UUID of the devices that values are read into; of a worker.
        self.bound = process.own.bound
        self._in_worker = process.own.kind == "worker"
        self._spec = process.own.device_backend
        self._known: dict[int, str] | None = None  # the same of the node's devices, in the driver

    # -- which devices ---------------------------------------------------------------------------------------------

    def readable(self, home: int) -> int:
        """Return the arena that parts of device `home` are read in: that device's, another of ours, or the host's."""
        if home in self.bound:
            return home
        return next(iter(self.bound), HOST)

    def arena_named(self, device: str | int) -> int:
        """Return the arena that a user names: "host", a UUID, or a number in `array_module().cuda.Device`.

        Raises:
            NoDeviceError: this process cannot use such a device.
        """
        if device == "host":
            return HOST
        mine = self._mine()
        for number, (arena, uuid) in enumerate(mine.items()):
            if device == uuid or (device == number and not isinstance(device, bool)):
                return arena
        there = ", ".join(f"{number} ({uuid})" for number, uuid in enumerate(mine.values())) or "none"
        raise NoDeviceError(
            f'device={device!r}: this process can use "host" and these devices: {there}; ask for more with num_gpus='
        )

    def _mine(self) -> Mapping[int, str]:
        """Return arena number -> UUID of the devices that this process may use: those of its lease, or the driver's."""
        if self._in_worker:
            return self.bound
        if self._known is None:
            answer = self._process.requests.ask(lambda request: messages.Query(request, "devices"))
            self._spec = answer["backend"]
            self._known = {device["arena"]: device["uuid"] for device in answer["devices"]}
        return self._known

    # -- their memory ----------------------------------------------------------------------------------------------

    def arena(self, number: int) -> DeviceArena:
        """Return this process's share of a device's memory, mapping the device's slab on first use.

        Raises:
            NoDeviceError: this process may not use it.
            DeviceLostError: the device was lost.
        """
        with self._lock:
            arena = self._arenas.get(number)
            if arena is None:
                try:
                    arena = self._arenas[number] = self._open(number)
                except DeviceLostError as error:
                    self.unusable = str(error)
                    raise
            return arena

    def renew(self) -> None:
        """Map the devices anew that got a new life; a worker does not outlive its devices, but the driver does.

        Comes before parts are pinned: then what is pinned and what is mapped are of one life.
        """
        if self.bound or self._backend is None:
            return
        with self._lock:
            for number, arena in list(self._arenas.items()):
                if self._backend.epoch(arena.slab.device_uuid) != arena.device.epoch:
                    # Without a new life all stays as it is, for the sake of the other devices.
                    with contextlib.suppress(DeviceLostError):
                        self._arenas[number] = self._open(number)
                        self._module = None

    def arenas(self) -> dict[str, DeviceArena]:
        """Return UUID -> arena of the devices that are in use in this process."""
        return {arena.slab.device_uuid: arena for arena in list(self._arenas.values())}

    def _open(self, number: int) -> DeviceArena:
        mine = self._mine()
        if number not in mine:
            raise NoDeviceError(f"arena {number} is no device of this process; it has: {mine or 'none'}")
        if self._backend is None:
            self._backend = open_backend(self._spec)
        backend, uuid = self._backend, mine[number]
        device, slab, life = self._import(backend, number, uuid)

        process = self._process

        def check() -> None:
            if process.dead:
                # Emulated memory could be used still, but by nobody's leave: in a forked child also by the parent.
                raise NotInitializedError(f"this device memory cannot be used any more: {process.dead}")
            if backend.epoch(uuid) != device.epoch:
                device.memory_info()  # raises, with the cause

        def give_back(offset: int, size: int) -> None:
            self._give_back(number, life, offset, size)

        return DeviceArena(
            device,
            slab,
            number,
            lambda size: self._lease(number, life, size, None),
            give_back,
            check,
            lease_now=lambda size: self._lease(number, life, size, 0.0),
            lease_ahead=lambda size: self._lease_ahead(number, life, size),
            current_stream=None if device.info.kind == "emulated" else cupy_stream,
            life=life,
        )

    def _import(self, backend: DeviceBackend, number: int, uuid: str) -> tuple[Device, Slab, int]:
        """Open a device and map its slab; return also the number of the life that it is of."""
        while True:
            life, raw = self._export(number)
            device = backend.open(uuid)
            try:
                return device, device.import_slab(msgspec.msgpack.decode(raw, type=SlabExport)), life
            except SlabImportError as error:
                if not self._is_replaced(number, life):
                    raise
                if self.bound:  # then its workers end
                    raise DeviceLostError(str(error)) from error

    def _export(self, number: int) -> tuple[int, bytes]:
        """Return the number of an arena's present life, and its slab as the backend exports it."""
        try:
            life, raw = self._process.requests.ask(lambda request: messages.Query(request, "slab", number))
        except AfieldError as error:
            raise DeviceLostError(str(error)) from None
        return life, raw

    def _is_replaced(self, number: int, life: int) -> bool:
        """Tell whether a slab that cannot be mapped went with its store process, of which the daemon hears soon."""
        deadline = time.monotonic() + NEWS_S
        while time.monotonic() < deadline:
            if self._export(number)[0] != life:
                return True
            time.sleep(NEWS_S / 50)
        return False

    def granted_ahead(self, number: int, life: int, offset: int, size: int) -> bool:
        """Take memory that an arena has asked for ahead; False if that life of the arena is gone, or it cannot take it now."""
        arena = self._arenas.get(number)
        if arena is None or arena.life != life:
            return False
        try:
            arena.put_back(offset, size)
        except DeviceUsageError:  # we run in a finaliser that has interrupted it
            return False
        return True

    def trim(self, number: int) -> None:
        """Memory of an arena is short: give back what this process leases and does not use."""
        arena = self._arenas.get(number)
        if arena is not None:
            with contextlib.suppress(AfieldError):  # of a device that is lost there is nothing to give back
                arena.trim()

    def place(self, number: int, life: int, offset: int, size: int, view_pin: ViewPin) -> DevicePlace | None:
        """Return what arrays over stored device memory are built on; None if that life of the arena is over."""
        arena = self.arena(number)
        if arena.life != life:  # there is a later one than is mapped here, or than the memory is of
            self.renew()
            arena = self.arena(number)
            if arena.life != life:
                return None
        self._present_module()  # arrays belong to a module's devices
        self.bytes_shared += size
        return DevicePlace(arena, offset, size, _let_go, view_pin)

    def home(self, into: int | None = None) -> DeviceArena | None:
        """Return the device that arrays of size 0 are read into: `into`, by default our first; None for host memory."""
        number = next(iter(self.bound), HOST) if into is None else into
        if number == HOST:
            return None
        self._present_module()  # arrays belong to a module's devices
        return self.arena(number)

    def broken(self) -> str:
        """Return why this process cannot go on with its devices, or ""."""
        if self.unusable:
            return self.unusable
        for arena in list(self._arenas.values()):
            try:
                arena.device.memory_info()
            except (DeviceLostError, PoisonedContextError) as error:
                return str(error)
            except AfieldError:
                continue  # not a matter of life and death
        return ""

    def synchronize(self) -> None:
        """Wait for what arrays compute, so that the memory which they do not use any more can be given up."""
        for arena in list(self._arenas.values()):
            arena.synchronize()

    # -- what user code sees ---------------------------------------------------------------------------------------

    def module(self) -> Any:
        """Return the array module on this process's devices; see `afield.array_module`.

        The driver's is another one after a device got a new life: arrays of the old one stay with the old module.
        """
        self.renew()
        return self._present_module()

    def _present_module(self) -> Any:
        with self._lock:
            if self._module is None:
                mine = self._mine()
                if not mine:
                    raise NoDeviceError(_no_devices(self._in_worker))
                self._module = self._make_module([self.arena(number) for number in mine])
            return self._module

    def _make_module(self, arenas: list[DeviceArena]) -> Any:
        if arenas[0].device.info.kind != "emulated":
            if importlib.util.find_spec("numba") is not None:
                install_numba(arenas)
            self._library_allocator = install_cupy(arenas)
            return cupy_module()
        # Only where devices are emulated: every process of a session without any would load these in vain.
        arrays = importlib.import_module("afield.gpu_store.emulated_arrays")
        uninterruptible(arrays.account.Lease.__del__)
        module = importlib.import_module("afield.gpu_store.interop.emulated").emulated_module(arenas)
        if self._stands_in:
            self._on_close.enter_context(arrays.installed_as_import(module))
        else:
            self._on_close.close()
            before = arrays.set_process_devices(module._devices)
            self._on_close.callback(arrays.set_process_devices, before)
        return module

    def prepare(self) -> None:
        """Before user code runs: let `import cupy` give this process's array module, also where CuPy is not installed."""
        if not self.bound or not self._spec.startswith("emulated:"):
            return
        if importlib.util.find_spec("cupy") is None:
            self._stands_in = True
            sys.meta_path.append(_StandIn(self.module))

    def counters(self) -> dict[str, float]:
        """Return bytes by kind of movement in this process."""
        arenas = list(self._arenas.values())
        return {
            "device_bytes_shared": self.bytes_shared,
            "device_bytes_born": sum(arena.bytes_born for arena in arenas),
            "device_bytes_copied": sum(arena.bytes_copied for arena in arenas),
        }

    def close(self) -> None:
        """Let go of all device memory."""
        self._on_close.close()
        self._arenas.clear()
        self._module = None
        if self._backend is not None:
            self._backend.close()
            self._backend = None


def _let_go(view_pin: ViewPin) -> None:
    """The last reference to a view pin is dropped with this call."""


class _StandIn(MetaPathFinder, Loader):
    """Makes the emulated array module when somebody imports `cupy` or `cupyx`, and not before: it starts the devices."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname in ("cupy", "cupyx") else None

    def create_module(self, spec: ModuleSpec) -> Any:
        return self._make()._modules[spec.name]

    def exec_module(self, module: Any) -> None:
        """It is complete."""


def _no_devices(worker: bool) -> str:
    if worker:
        return "this task has no device: ask for one with @afield.remote(num_gpus=1)"
    return 'this session has no devices: pass devices="emulated:2" to afield.init(), or set AFIELD_DEVICES=emulated:2'
