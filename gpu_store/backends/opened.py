"""The devices that a backend has open in its process: one object for each life of a device.

Theory of operation. `open` of a device that is open gives what is there; one that was closed, or whose life is over, is made
anew. What was made is closed with the backend. A lock is held while a device is made, so that two threads get the same one;
the backend may hold it as well while it changes what `open` goes by.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class _Closable(Protocol):
    """What is needed of a device."""

    closed: bool
    epoch: int

    def close(self) -> None: ...


AnyDevice = TypeVar("AnyDevice", bound=_Closable)


class OpenDevices(Generic[AnyDevice]):
    """The open devices of one backend, by UUID."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._devices: dict[str, AnyDevice] = {}

    def get(self, uuid: str, epoch: int, make: Callable[[], AnyDevice]) -> AnyDevice:
        """Return the device as it is open in this epoch, or what `make` gives."""
        with self.lock:
            device = self._devices.get(uuid)
            if device is None or device.closed or device.epoch != epoch:
                device = self._devices[uuid] = make()
            return device

    def close(self, uuid: str | None = None) -> None:
        """Close a device if it is open; without a name, all."""
        with self.lock:
            for name in list(self._devices) if uuid is None else [uuid]:
                device = self._devices.pop(name, None)
                if device is not None:
                    device.close()
