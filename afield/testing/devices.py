"""Handles of emulated devices that make faults happen.

Theory of operation. The emulated machine is shared memory that any process of the user can attach to by its address, which the
node daemon tells; a fault is written there and meets whichever process comes along (`gpu_store/backends/faults.py`). The
runtime hears of it as it would of a real device's: from its store process, or from a call that fails. A handle opens no
device and allocates nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from afield.errors import NoDeviceError
from afield.gpu_store.backends import faults
from afield.gpu_store.backends.emulated import EmulatedBackend
from afield.runtime.face import api, lifecycle
from afield.scheduler.resources import GPU

#: A device that is in use is polled for news every 50 ms by its store process.
NOTICED_S = 2.0
#: A new life begins with a new store process.
BACK_S = 10.0
_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What a device's memory is used for, in bytes; what a device that no task has used yet holds is 0."""

    #: The device's memory.
    total: int
    #: Of stored objects.
    sealed: int
    #: Leased to processes that allocate from it.
    leased: int


class DeviceHandle:
    """One device of the runtime. Faults need an emulated device; NoDeviceError on any other."""

    def __init__(
        self,
        uuid: str,
        index: int,
        memory_bytes: int,
        arena: int,
        backend: EmulatedBackend | None,
        query: Callable[..., Any] = api.query,
    ) -> None:
        self.uuid = uuid
        self.index = index
        self._arena = arena
        self._memory_bytes = memory_bytes
        self._backend = backend
        self._query = query

    def __repr__(self) -> str:
        return f"DeviceHandle({self.uuid!r})"

    @property
    def memory(self) -> DeviceMemory:
        """What its memory is used for now."""
        figures = self._query("store")["tiers"].get(self.uuid, {})
        return DeviceMemory(self._memory_bytes, int(figures.get("sealed", 0)), int(figures.get("leased", 0)))

    def lose(self) -> None:
        """Lose the device with all its memory, as when it falls off the bus, until `reset`.

        If tasks have used the device this waits until the runtime has noticed.
        """
        before = self._devices_of_runtime()
        self._machine().inject(faults.lost(self.uuid))
        self._wait_for(lambda: self._devices_of_runtime() < before, NOTICED_S)

    def xid(self, code: int) -> None:
        """Let the driver write an Xid: 79 (fallen off the bus), 48 (double-bit ECC error) and others lose the device."""
        lost_before, before = self.is_lost, self._devices_of_runtime()
        self._machine().inject(faults.xid(self.uuid, code))
        if self.is_lost and not lost_before:
            self._wait_for(lambda: self._devices_of_runtime() < before, NOTICED_S)

    def reset(self) -> None:
        """Begin a new life of the device, which is empty and usable again; waits until the runtime offers a lost one again."""
        before = self._devices_of_runtime()
        was_withdrawn = self.is_lost and before < len(self._query("devices")["devices"])
        self._machine().reset(self.uuid)
        if was_withdrawn:
            self._wait_for(lambda: self._devices_of_runtime() > before, BACK_S)

    def fail_next_allocation(self, n: int = 1) -> None:
        """Let the next `n` allocations of device memory, in whichever process, find no room."""
        machine = self._machine()
        # The device's store process allocates all of the memory when it starts, and is not who is meant.
        self._query("slab", self._arena)
        for at in range(1, n + 1):
            machine.inject(faults.out_of_memory(self.uuid, at))

    def fail_next_import(self, n: int = 1) -> None:
        """Let the next `n` processes that map the device's memory be refused."""
        for at in range(1, n + 1):
            self._machine().inject(faults.failed_import(self.uuid, at))

    def poison(self, code: int = 700) -> None:
        """Break the context of the process that uses the device next (700: illegal address); the device stays."""
        self._machine().inject(faults.sticky_error(self.uuid, code))

    def slow_link(self, factor: float) -> None:
        """Let the device's links take `factor` times as long from now on; 1.0 mends them.

        Raises DeviceUsageError where links are unlimited, as they are unless AFIELD_EMULATED_LINK gives them a bandwidth.
        """
        self._machine().inject(faults.slow_link(self.uuid, factor))

    @property
    def is_lost(self) -> bool:
        """Whether it was lost and not reset since."""
        board = self._machine().board
        return board.lost(board.index(self.uuid))

    def mend(self, devices: int) -> None:
        """Undo what lasts, and wait until the runtime has its `devices` again: for the tests that come after this one."""
        if self._backend is None:
            return
        board = self._backend.board
        board.disarm(board.index(self.uuid))
        board.set_slowness(board.index(self.uuid), 1.0)
        if self.is_lost:
            self.reset()
            self._wait_for(lambda: self._devices_of_runtime() >= devices, BACK_S)

    def _machine(self) -> EmulatedBackend:
        if self._backend is None:
            raise NoDeviceError(
                f"device {self.uuid} is not emulated, and faults cannot be made on it: run pytest with "
                "--afield-devices=emulated:2"
            )
        return self._backend

    def _devices_of_runtime(self) -> float:
        return float(self._query("total").get(GPU, 0))

    @staticmethod
    def _wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition() and time.monotonic() < deadline:
            time.sleep(_POLL_S)


@contextmanager
def handles() -> Iterator[list[DeviceHandle]]:
    """Handles of the devices of the runtime that runs, in the order of their index; afterwards the devices are mended."""
    answer = api.query("devices")
    kind, _, address = answer["backend"].partition(":")
    backend = EmulatedBackend.attach(address) if kind == "emulated" else None
    try:
        found = [
            DeviceHandle(one["uuid"], one["index"], one["memory"], one["arena"], backend) for one in answer["devices"]
        ]
        yield found
        if lifecycle.is_initialized():
            for handle in found:
                handle.mend(len(found))
    finally:
        if backend is not None:
            backend.close()
