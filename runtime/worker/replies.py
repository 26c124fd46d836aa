"""What a worker answers, on its way out: replies and items gather here and leave together.

Theory of operation. A reply is appended to `waiting` by the thread that made it, without a lock (one operation in C), and
moved to its channel by whoever drives the loop next, or by `flush`. So a burst of small tasks is answered in few frames;
while a task takes long the standby thread sends what has gathered. A reply whose call keeps refs from its arguments waits
until these are registered with their owners.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from afield.runtime.cores.objects import Obligation
from afield.runtime.process.events import OBLIGATION_MET, TICK
from afield.runtime.process.process import Process
from afield.transport.channel import Channel
from afield.transport.interrupts import uninterruptible

#: Replies are held back no longer than this while further tasks run.
MAX_REPLY_DELAY_S = 0.0005


class Replies:
    """The replies and items of one worker."""

    __slots__ = ("last_flush", "process", "waiting")

    def __init__(self, process: Process) -> None:
        self.process = process
        self.waiting: deque[tuple[Channel, Any]] = deque()
        self.last_flush = 0.0
        process.subscribe(TICK, self.queue)
        process.subscribe(OBLIGATION_MET, self._send_met)

    def wait_for_registration(self, obligation: Obligation, channel: Channel, reply: Any) -> bool:
        """Tell whether a reply has to wait for registrations; then it leaves by itself after the last one."""
        with self.process.pump.lock:
            if not obligation.remaining:
                return False
            obligation.token = (channel, reply)
            return True

    def queue(self, now: float = 0.0) -> None:
        """Move replies to their channels; the caller holds the lock."""
        waiting = self.waiting
        while waiting:
            channel, reply = waiting.popleft()
            channel.send(reply)

    def _send_met(self, token: Any) -> None:
        channel, reply = token
        self.queue()
        channel.send(reply)

    @uninterruptible
    def flush(self) -> None:
        """Send what has gathered."""
        process = self.process
        with process.pump.lock:
            process.after_events()
            if process.loop.dirty:
                process.loop.flush()
        self.last_flush = time.monotonic()
