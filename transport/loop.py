"""An epoll loop for one thread at a time, with a kick to wake it from others.

`step` waits for events once, runs their handlers, and flushes every channel that has something to send. Handlers are
called with the epoll event mask. The loop itself takes no lock: `pump` decides which thread drives it.

`after` calls something later. Its clock is a descriptor as all others (`timerfd`), so it also wakes those who only watch
`fileno`: the standby thread and event loops of the user's. It is opened at once: who has none left waits by it.

Order among channels: `first` is flushed before all others, and while it has no socket, or its socket is full, the others wait,
so that what it carries stays ahead of what they say. Hence nothing but `flush` has the others send.
"""

from __future__ import annotations

import ctypes
import heapq
import itertools
import os
import select
import time
from collections.abc import Callable
from typing import Any, Protocol

from afield.transport.interrupts import interruptible

RECEIVE_BUFFER_BYTES = 1 << 20
MAX_EVENTS = 64
#: One wait takes no longer: epoll refuses what does not fit its milliseconds (24 days), such as infinity.
LONGEST_WAIT_S = 86_400.0


_libc = ctypes.CDLL(None, use_errno=True)


class _Timer(ctypes.Structure):
    """`struct itimerspec`: the interval, and the time until it fires, each in seconds and nanoseconds."""

    _fields_ = [(name, ctypes.c_long) for name in ("every_s", "every_ns", "in_s", "in_ns")]


class Outgoing(Protocol):
    """Something with messages to send: a channel."""

    outbox: list[Any]
    unsent: memoryview
    ready: bool

    @property
    def drained(self) -> bool:
        """Tell whether a socket has taken everything that was sent, or none ever will."""

    def flush(self) -> None:
        """Send what the outbox has, as far as the socket takes it."""


class Loop:
    """Waits on file descriptors and runs their handlers."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self.buffer = memoryview(bytearray(RECEIVE_BUFFER_BYTES))
        #: Flushed before all others: what it announces must be known before anybody else can refer to it.
        self.first: Outgoing | None = None
        #: Channels with something in their outbox.
        self.dirty: list[Outgoing] = []
        self._held: list[Outgoing] = []  # dirty, and wait for `first`
        self._timer = _timer_fd()
        self._later: list[tuple[float, int, Callable[[], object]]] = []  # a heap: when due, a number, what to call
        self._numbers = itertools.count()
        self._kick = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._kicked = False
        self.register(self._kick, self._absorb_kick)
        self.register(self._timer, self._on_timer)

    def register(self, fd: int, handler: Callable[[int], None]) -> None:
        """Call `handler(events)` whenever `fd` can be read."""
        self._handlers[fd] = handler
        self._epoll.register(fd, select.EPOLLIN)

    def modify(self, fd: int, events: int) -> None:
        """Change the events that `fd` is watched for."""
        self._epoll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        """Forget `fd`, before it is closed."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    @interruptible
    def wait(self, timeout_s: float | None) -> list[tuple[int, int]]:
        """Block until something happens, at most `timeout_s` (None: no limit); releases the interpreter lock.

        It may return earlier with nothing.
        """
        if timeout_s is not None and timeout_s > LONGEST_WAIT_S:
            timeout_s = LONGEST_WAIT_S
        return self._epoll.poll(timeout_s, MAX_EVENTS)

    def run(self, events: list[tuple[int, int]]) -> None:
        """Run the handlers of what `wait` returned."""
        handlers = self._handlers
        for fd, mask in events:
            handler = handlers.get(fd)
            if handler is not None:
                handler(mask)

    def flush(self) -> None:
        """Send what the channels have queued."""
        first = self.first
        if first is not None and (first.outbox or first.unsent or not first.ready):
            first.flush()
            if not first.drained:
                self._held += self.dirty
                self.dirty.clear()
        while self.dirty:
            dirty, self.dirty = self.dirty, []
            for channel in dirty:
                channel.flush()

    def step(self, timeout_s: float | None) -> None:
        """Wait once, handle what happened, send what that produced."""
        self.run(self.wait(timeout_s))
        self.flush()

    def sends_again(self, channel: Outgoing) -> None:
        """A channel has a socket again, one that is not full any more, or never will: what waits for it may leave."""
        if channel is not self.first:
            if channel.outbox:
                self.dirty.append(channel)
            return
        channel.flush()
        if self._held:
            self.dirty, self._held = [*self._held, *self.dirty], []

    def after(self, delay_s: float, callback: Callable[[], object]) -> None:
        """Call `callback` once, as a handler, when so much time has passed."""
        heapq.heappush(self._later, (time.monotonic() + delay_s, next(self._numbers), callback))
        self._set_timer()

    def _on_timer(self, events: int) -> None:
        try:
            os.read(self._timer, 8)
        except BlockingIOError:
            pass
        now = time.monotonic()
        while self._later and self._later[0][0] <= now:
            heapq.heappop(self._later)[2]()
        self._set_timer()

    def _set_timer(self) -> None:
        if self._later and self._timer >= 0:
            left_ns = max(1, int((self._later[0][0] - time.monotonic()) * 1e9))
            value = _Timer(0, 0, left_ns // 1_000_000_000, left_ns % 1_000_000_000)
            _libc.timerfd_settime(self._timer, 0, ctypes.byref(value), None)

    def kick(self) -> None:
        """Wake the thread that waits in `wait`; safe from any thread and from `__del__`."""
        if not self._kicked:
            self._kicked = True
            os.eventfd_write(self._kick, 1)

    def fileno(self) -> int:
        """Return a descriptor that can be read while `wait` would not block."""
        return self._epoll.fileno()

    def _absorb_kick(self, events: int) -> None:
        try:
            os.eventfd_read(self._kick)
        except BlockingIOError:
            pass
        # Only now: reading lets other threads run, and a kick that comes before it would be swallowed with its flag set. One
        # that finds the flag set is for something that this round sees.
        self._kicked = False

    def close(self) -> None:
        """Release the loop's own descriptors."""
        self._kicked = True  # a later `kick` must not write to a descriptor that is another file's by then
        self.unregister(self._kick)
        os.close(self._kick)
        self.unregister(self._timer)
        os.close(self._timer)
        self._timer = -1
        self._epoll.close()


def _timer_fd() -> int:
    """Return a new timer on the monotonic clock. (`os.timerfd_create` came with Python 3.13.)"""
    fd = int(_libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return fd
