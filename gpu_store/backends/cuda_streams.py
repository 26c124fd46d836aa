"""Streams and events of a CUDA device.

Theory of operation. Copies are asynchronous, and the driver does not know about Python's references: a stream keeps the host
memory of its copies alive, each behind an event, until they are done. Events destroy themselves; a stream belongs to its
device until it is closed, because what it still has to do may refer to that memory.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from afield.errors import AfieldError
from afield.gpu_store.backends.base import DeviceInfo, DeviceUsageError, Event

#: CUDA says: what was asked about is not done yet.
NOT_READY = 600


class Caller(Protocol):
    """What streams and events need of their device."""

    @property
    def info(self) -> DeviceInfo: ...

    @property
    def runtime(self) -> Any: ...

    def call(self, function: Callable[..., Any], *args: Any) -> Any: ...

    def translate(self, code: int, text: str) -> AfieldError: ...


class CudaEvent:
    """A mark in a stream; see `base.Event`."""

    def __init__(self, device: Caller, stream_handle: int) -> None:
        runtime = device.runtime
        self.device = device
        self.handle: int = device.call(runtime.eventCreateWithFlags, runtime.eventDisableTiming)
        # A context that is gone has taken its events with it.
        weakref.finalize(self, _quietly, runtime, runtime.eventDestroy, self.handle).atexit = False
        device.call(runtime.eventRecord, self.handle, stream_handle)

    def query(self) -> bool:
        # CuPy hands on the status of this call: "not ready" is an answer.
        code = int(self.device.call(self.device.runtime.eventQuery, self.handle))
        if code not in (0, NOT_READY):
            raise self.device.translate(code, f"an event failed with {code}")
        return code == 0

    def synchronize(self) -> None:
        self.device.call(self.device.runtime.eventSynchronize, self.handle)


class CudaStream:
    """A stream that is in order with no other, the default stream included; see `base.Stream`."""

    def __init__(self, device: Caller, handle: int) -> None:
        self.device = device
        self.handle = handle
        self.closed = False
        self._lock = threading.Lock()
        #: Host memory that the driver may still use, each behind the event that says when it does not.
        self._held: deque[tuple[CudaEvent, memoryview]] = deque()

    def hold(self, memory: memoryview) -> None:
        """Keep host memory alive until what was put into the stream so far is done."""
        event = CudaEvent(self.device, self.handle)
        with self._lock:
            self._held.append((event, memory))
        self._let_go()

    def _let_go(self) -> None:
        with self._lock:
            while self._held and self._held[0][0].query():
                self._held.popleft()

    def check_open(self) -> None:
        """Raise DeviceUsageError after `close`."""
        if self.closed:
            raise DeviceUsageError(f"a stream of device {self.device.info.uuid} was used after it was closed")

    def synchronize(self) -> None:
        self.check_open()
        self.device.call(self.device.runtime.streamSynchronize, self.handle)
        self._let_go()

    def record(self) -> CudaEvent:
        self.check_open()
        return CudaEvent(self.device, self.handle)

    def wait(self, event: Event) -> None:
        self.check_open()
        if not isinstance(event, CudaEvent):
            raise DeviceUsageError(f"a stream of a CUDA device cannot wait for a {type(event).__name__}")
        self.device.call(self.device.runtime.streamWaitEvent, self.handle, event.handle)

    def close(self) -> None:
        if self.closed:
            return
        with suppress(AfieldError):
            self.synchronize()
            self.device.call(self.device.runtime.streamDestroy, self.handle)
        self.closed = True
        self._held.clear()


def _quietly(runtime: Any, function: Callable[..., Any], *args: Any) -> None:
    with suppress(runtime.CUDARuntimeError):
        function(*args)
