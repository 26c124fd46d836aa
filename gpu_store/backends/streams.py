"""Streams of an emulated device: each a queue of work on a thread of its own, so that asynchronous really is.

Theory of operation. A `Lane` is the queue and its thread; work is numbered by tickets from 1, and `finished` counts the
tickets that are behind. Everything else is told in tickets: a stream is synchronised when the last ticket is finished, an
event is a ticket, and waiting for another stream's event is a piece of work that waits for that lane's ticket. The thread
knows only the lane, so a stream that nobody holds any more finishes its work and ends.

A **lazy** lane starts a piece of work only once somebody waits for it (or asks an event about it): the latest moment that
the rules allow, where a real device might be anywhere between now and then. A program that forgot to synchronise sees
wrong data there every time and not once in a while.

When work raises, what follows in the lane is skipped, and whoever waits for the failed ticket or a later one gets the error.
The work of users (kernels) may raise anything: as on a device, that is a launch failure that breaks the process's context.

A `Wire` makes a copy take the time that its link takes. A copy goes over it in chunks; every chunk first reserves the
wire for as long as it needs, behind what others have reserved, waits for its time to pass, and is then written. So two
copies in two streams of a process share a link as they would share a real one (processes do not see each other's
copies), bytes arrive one after the other, and a copy ends no earlier than the link allows.
"""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

import numpy as np
import numpy.typing as npt

from afield.clock import Clock
from afield.errors import AfieldError
from afield.gpu_store.backends.base import DeviceUsageError, Event, Link, PoisonedContextError

Bytes = npt.NDArray[np.uint8]

#: What a link carries at a time where it has a limit: small enough to share it, large enough to be copied well.
CHUNK_BYTES = 4 << 20

#: CUDA says: unspecified launch failure.
_LAUNCH_FAILURE = 719


class Lane:
    """A queue of work and the thread that does it, which starts with the first piece of work."""

    def __init__(self, device_uuid: str, *, lazy: bool, on_failure: WeakMethod[Callable[[AfieldError], None]]) -> None:
        """Have `on_failure` called, in the lane's thread, with the first error of the lane.

        It is weak: the thread does not keep a device that nobody has any more.
        """
        self.device_uuid = device_uuid
        self._lazy = lazy
        self._on_failure = on_failure
        self._pid = os.getpid()
        # Unbounded on purpose: a device's queue blocks its caller when it is full, and what would be lost by memory
        # used here is nothing: every piece of work is a few hundred bytes and names memory that exists already.
        self._work: queue.SimpleQueue[tuple[int, Callable[[], None]] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._submitted = 0
        self._demanded: float = 0
        self._finished = 0
        self._failure: tuple[int, AfieldError] | None = None
        self._stopping = False

    @property
    def stopped(self) -> bool:
        """True when the lane takes no more work and has done all it had."""
        return self._stopping and (self._thread is None or not self._thread.is_alive())

    def submit(self, work: Callable[[], None] | None) -> int:
        """Queue work (None: just a mark) and return its ticket."""
        self._check_process()
        with self._changed:
            if self._stopping:
                raise DeviceUsageError(f"a stream of device {self.device_uuid} was used after it was closed")
            if work is None:
                return self._submitted
            self._submitted += 1
            self._work.put((self._submitted, work))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"stream of {self.device_uuid}", daemon=True)
                self._thread.start()
            return self._submitted

    def reached(self, ticket: int) -> bool:
        """Tell whether a ticket is finished, and let a lazy lane go that far; raises its failure."""
        self._check_process()
        with self._changed:
            self._demand(ticket)
            if self._finished < ticket:
                return False
        self._raise_failure(ticket)
        return True

    def reach(self, ticket: int | None = None, *, quietly: bool = False) -> None:
        """Block until a ticket is finished (without one, all there are); raises its failure unless `quietly`."""
        self._check_process()
        if threading.current_thread() is self._thread:
            raise DeviceUsageError("work in a stream may not wait for its own stream")
        with self._changed:
            ticket = self._submitted if ticket is None else ticket
            self._demand(ticket)
            while self._finished < ticket:
                self._changed.wait()
        if not quietly:
            self._raise_failure(ticket)

    def stop(self) -> None:
        """Take no more work, and end the thread when all there is was done; does not block."""
        with self._changed:
            if not self._stopping:
                self._stopping = True
                self._demand(float("inf"))
                self._work.put(None)

    def join(self) -> None:
        """Block until the thread ended; call `stop` first."""
        if self._thread is not None and self._pid == os.getpid():
            self._thread.join()

    def _demand(self, ticket: float) -> None:
        if ticket > self._demanded:
            self._demanded = ticket
            if self._lazy:
                self._changed.notify_all()

    def _raise_failure(self, ticket: int) -> None:
        if self._failure is not None and self._failure[0] <= ticket:
            error = self._failure[1]
            # A new one for each reader: a raised exception collects the frames of everybody who raises it.
            raise type(error)(*error.args) from error

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise DeviceUsageError("a stream does not survive a fork: open the device in the process that uses it")

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            ticket, work = item
            if self._lazy:
                with self._changed:
                    while self._demanded < ticket:
                        self._changed.wait()
            if self._failure is None:
                self._do(ticket, work)
            # What the work refers to must not live until the next piece of work comes.
            del item, work
            with self._changed:
                self._finished = ticket
                self._changed.notify_all()

    def _do(self, ticket: int, work: Callable[[], None]) -> None:
        try:
            work()
        except AfieldError as error:
            self._fail(ticket, error)
        except BaseException as error:
            failure = PoisonedContextError(
                f"device {self.device_uuid}: launch failure ({_LAUNCH_FAILURE}): a kernel raised "
                f"{type(error).__name__}: {error}; this process can do nothing more on the device"
            )
            failure.__cause__ = error
            self._fail(ticket, failure)

    def _fail(self, ticket: int, error: AfieldError) -> None:
        self._failure = (ticket, error)
        tell = self._on_failure()
        if tell is not None:
            tell(error)


class EmulatedEvent:
    """A ticket of a lane; see `base.Event`."""

    __slots__ = ("lane", "ticket")

    def __init__(self, lane: Lane, ticket: int) -> None:
        self.lane = lane
        self.ticket = ticket

    def query(self) -> bool:
        return self.lane.reached(self.ticket)

    def synchronize(self) -> None:
        self.lane.reach(self.ticket)


class EmulatedStream:
    """A stream of an emulated device; see `base.Stream`. `launch` is what this device has instead of kernels."""

    def __init__(self, lane: Lane, check: Callable[[], None]) -> None:
        """Have `check` raise when the device can be used no more."""
        self.lane = lane
        self._check = check
        weakref.finalize(self, lane.stop)

    def launch(self, kernel: Callable[[], None]) -> None:
        """Run `kernel` in the stream's thread, in order; what it raises breaks the process's context."""
        self._check()
        self.lane.submit(kernel)

    def synchronize(self) -> None:
        self.lane.reach()
        self._check()

    def record(self) -> EmulatedEvent:
        self._check()
        return EmulatedEvent(self.lane, self.lane.submit(None))

    def wait(self, event: Event) -> None:
        self._check()
        if not isinstance(event, EmulatedEvent):
            raise DeviceUsageError(f"a stream of an emulated device cannot wait for a {type(event).__name__}")
        if event.lane is not self.lane:  # its own past has happened by then anyway
            self.lane.submit(event.synchronize)

    def close(self) -> None:
        self.lane.stop()
        self.lane.join()


class Wire:
    """One link as this process uses it."""

    def __init__(self, link: Link, clock: Clock, sleep: Callable[[float], Any], slowness: Callable[[], float]) -> None:
        """Take times from `clock` and pass them with `sleep`; `slowness` tells by how much the link is slower now."""
        self._link = link
        self._clock = clock
        self._sleep = sleep
        self._slowness = slowness
        self._lock = threading.Lock()
        self._free_at_s = 0.0

    def carry(self, target: Bytes, source: Bytes, check: Callable[[], None]) -> None:
        """Copy `source` to `target` as fast as the link allows; `check` raises when the device is gone meanwhile."""
        check()
        if not is_limited(self._link):
            np.copyto(target, source)
            return
        self._pass(self._clock() + self._link.latency_s * self._slowness())
        for start in range(0, source.size, CHUNK_BYTES):
            chunk = slice(start, start + CHUNK_BYTES)
            self._pass(self._reserve(source[chunk].size))
            check()
            np.copyto(target[chunk], source[chunk])

    def _reserve(self, size_bytes: int) -> float:
        duration_s = size_bytes * self._slowness() / self._link.bandwidth_bytes_per_s
        with self._lock:
            self._free_at_s = max(self._clock(), self._free_at_s) + duration_s
            return self._free_at_s

    def _pass(self, until_s: float) -> None:
        remaining_s = until_s - self._clock()
        if remaining_s > 0:
            self._sleep(remaining_s)


def is_limited(link: Link) -> bool:
    """Tell whether a copy over the link takes longer than the copy itself."""
    return link.latency_s > 0 or link.bandwidth_bytes_per_s != float("inf")
