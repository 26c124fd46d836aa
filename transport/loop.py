"""An epoll loop for one thread at a time, with a kick to wake it from others.

`step` waits for events once, runs their handlers, and flushes every channel that has something to send. Handlers are
called with the epoll event mask. The loop itself takes no lock: `pump` decides which thread drives it.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from typing import Any, Protocol

from afield.transport.interrupts import interruptible

RECEIVE_BUFFER_BYTES = 1 << 20
MAX_EVENTS = 64


class Outgoing(Protocol):
    """Something with messages to send: a channel."""

    outbox: list[Any]

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
        self._kick = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._kicked = False
        self.register(self._kick, self._absorb_kick)

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
        """Block until something happens, at most `timeout_s` (None: no limit); releases the interpreter lock."""
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
        if self.first is not None and self.first.outbox:
            self.first.flush()
        while self.dirty:
            dirty, self.dirty = self.dirty, []
            for channel in dirty:
                channel.flush()

    def step(self, timeout_s: float | None) -> None:
        """Wait once, handle what happened, send what that produced."""
        self.run(self.wait(timeout_s))
        self.flush()

    def kick(self) -> None:
        """Wake the thread that waits in `wait`; safe from any thread and from `__del__`."""
        if not self._kicked:
            self._kicked = True
            os.eventfd_write(self._kick, 1)

    def fileno(self) -> int:
        """Return a descriptor that can be read while `wait` would not block."""
        return self._epoll.fileno()

    def _absorb_kick(self, events: int) -> None:
        self._kicked = False
        try:
            os.eventfd_read(self._kick)
        except BlockingIOError:
            pass

    def close(self) -> None:
        """Release the loop's own descriptors."""
        self._kicked = True  # a later `kick` must not write to a descriptor that is another file's by then
        self.unregister(self._kick)
        os.close(self._kick)
        self._epoll.close()
