"""The raw copies that the device cases are held against: the same backend, in this process, without a runtime around it.

Theory of operation. What a copy can cost at best is asked of the `DeviceBackend` itself: two devices, a slab on each, host
memory that is shared and page-locked as the host store is, one stream; a sample is one copy from its start until the
stream is synchronised. All memory is touched once before, as that of a runtime that has been up for a while, and each copy
is of other bytes than the one before: what a processor's cache still has would be copied twice as fast. Emulated devices
are made with the same speed of links as the runtime's are.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from typing import Any

from afield.gpu_store.backends.base import SLAB_GRANULE_BYTES, Device, DeviceBackend, DeviceInfo, Slab, Stream
from afield.gpu_store.backends.select import create_emulated, open_backend

_SAMPLES = 3


class RawCopies:
    """Copies within `size_bytes` of the host and of one or two devices of `kind` ("emulated" or "cuda").

    Raises NoDeviceError where there is no such device.
    """

    def __init__(self, kind: str, size_bytes: int, link: str = "") -> None:
        size = -(-size_bytes // SLAB_GRANULE_BYTES) * SLAB_GRANULE_BYTES
        self._backend = _backend(kind, size, link)
        self._opened: list[tuple[Device, Slab]] = []
        for info in self._backend.inventory()[:2]:
            device = self._backend.open(info.uuid)
            self._opened.append((device, device.allocate_slab(size)))
        fd = os.memfd_create("limit")
        try:
            os.ftruncate(fd, size)
            self._host = memoryview(mmap.mmap(fd, size))
        finally:
            os.close(fd)
        device, slab = self._opened[0]
        device.pin_host(self._host)
        self._size = size
        self._at = 0
        self._stream: Stream = device.new_stream()
        self._ways: dict[str, Callable[[int, int], None]] = {
            "from host": lambda at, n: device.copy_from_host(
                slab, at, self._host[at : at + n].toreadonly(), self._stream
            ),
            "to host": lambda at, n: device.copy_to_host(slab, at, self._host[at : at + n], self._stream),
        }
        if len(self._opened) > 1:
            peer = self._opened[1][1]
            self._ways["peer"] = lambda at, n: device.copy_from_peer(slab, at, peer, at, n, self._stream)
        for way in self._ways:
            self.seconds(way, size)

    def seconds(self, way: str, size_bytes: int) -> float:
        """Time one copy of so many bytes; `way` is "to host", "from host" or "peer".

        Raises NotImplementedError for "peer" where there is only one device.
        """
        if way not in self._ways:
            raise NotImplementedError("a second device is needed to copy from")
        at = self._at if self._at + size_bytes <= self._size else 0
        self._at = at + size_bytes
        started = time.perf_counter()
        self._ways[way](at, size_bytes)
        self._stream.synchronize()
        return time.perf_counter() - started

    def gb_s(self, way: str, size_bytes: int) -> list[float]:
        """Measure some copies, in GB/s."""
        return [size_bytes / 1e9 / self.seconds(way, size_bytes) for _ in range(_SAMPLES)]

    def close(self) -> None:
        """Give everything back."""
        self._stream.close()
        self._ways.clear()
        self._opened.clear()
        self._backend.close()


def _backend(kind: str, size_bytes: int, link: str) -> DeviceBackend:
    if kind == "cuda":
        return open_backend("cuda:")
    infos = [DeviceInfo(f"EMU-limit-{index}", index, "limit", size_bytes, "emulated") for index in range(2)]
    return create_emulated(infos, link)


def first_cuda_device() -> Any:
    """Return what is known of the first CUDA device, without starting it; raises NoDeviceError with the remedy."""
    from afield.gpu_store.backends import cuda

    return cuda.find_devices()[0]
