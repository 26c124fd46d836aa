"""The relay of workers' output in the daemon: reads pipes, and passes lines on to the drivers that want them.

Theory of operation. The daemon always reads what workers write, so a worker is never held up by a driver that does not
print; and it never keeps more than a bounded amount. To each driver at most `WINDOW_BYTES` are on the way: the driver says
`Printed` for what it has put out. What comes meanwhile waits, up to `WAITING_PER_WORKER_BYTES` of one worker (so that one which
floods does not silence the others) and `WAITING_BYTES` of all. Beyond that lines are dropped, and a line in their place says
how many. One pipe gets at most `READS_PER_TURN` reads before the daemon does something else.

At the end of the session all that was written before reaches the drivers, as long as they take it.
"""

from __future__ import annotations

import itertools
import operator
import os
import time
from collections import deque
from typing import TYPE_CHECKING

from afield.runtime.wire import messages
from afield.runtime.wire.records import LineParser
from afield.transport.channel import Channel

if TYPE_CHECKING:
    from afield.runtime.node.daemon import NodeDaemon
    from afield.runtime.node.workers import Worker

READ_BYTES = 1 << 16
READS_PER_TURN = 4
#: At the end no pipe is read further than this: a worker that prints for ever has no last line.
FINAL_READS = 32
WINDOW_BYTES = 1 << 20
WAITING_PER_WORKER_BYTES = 4 << 20
WAITING_BYTES = 32 << 20
#: How long the last lines may take to reach the drivers.
FINAL_WAIT_S = 1.5
#: A line costs this much beside its text.
LINE_OVERHEAD_BYTES = 32


class Pipe:
    """One end of a worker's stdout or stderr."""

    __slots__ = ("fd", "lines", "stream", "worker")

    def __init__(self, worker: Worker, stream: str, fd: int) -> None:
        self.worker = worker
        self.stream = stream
        self.fd = fd
        self.lines = LineParser()


class _Waiting:
    """Lines of one worker on their way to one driver; `dropped` of them are represented by a count."""

    __slots__ = ("dropped", "message", "size")

    def __init__(self, message: messages.Log, size: int) -> None:
        self.message = message
        self.size = size
        self.dropped = 0


class _Driver:
    """What is on its way to one driver, in bytes."""

    __slots__ = ("dropping", "total", "unprinted", "waiting", "waiting_bytes")

    def __init__(self) -> None:
        self.unprinted = 0
        self.total = 0
        self.waiting: deque[_Waiting] = deque()
        self.waiting_bytes: dict[int, int] = {}  # pid -> bytes in `waiting`
        self.dropping: dict[tuple[int, str], _Waiting] = {}


class OutputRelay:
    """All pipes of the node's workers, and the drivers that see what comes out of them."""

    def __init__(self, daemon: NodeDaemon) -> None:
        self._daemon = daemon
        self._pipes: dict[int, list[Pipe]] = {}  # pid -> its pipes
        self._drivers: dict[bytes, _Driver] = {}

    # -- pipes ---------------------------------------------------------------------------------------------------

    def open(self, worker: Worker, stream: str, fd: int) -> None:
        """Begin to read a pipe: `stream` is "out" or "err"."""
        os.set_blocking(fd, False)
        pipe = Pipe(worker, stream, fd)
        self._pipes.setdefault(worker.pid, []).append(pipe)
        self._daemon.loop.register(fd, lambda events: self._read(pipe, READS_PER_TURN))

    def close(self, worker: Worker) -> None:
        """The worker has ended: pass on its last words."""
        for pipe in self._pipes.pop(worker.pid, ()):
            self._read(pipe, FINAL_READS)
            self._end(pipe)

    def _read(self, pipe: Pipe, reads: int) -> None:
        for _ in range(reads):
            if pipe.fd < 0:
                return
            try:
                data = os.read(pipe.fd, READ_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._end(pipe)
                return
            if self._wanting():
                self._pass_on(pipe, pipe.lines.feed(data))

    def _end(self, pipe: Pipe) -> None:
        if pipe.fd >= 0:
            self._daemon.loop.unregister(pipe.fd)
            os.close(pipe.fd)
            pipe.fd = -1
            self._pass_on(pipe, pipe.lines.finish())

    def _pass_on(self, pipe: Pipe, lines: list[tuple[str, str]]) -> None:
        """Send the lines, those of one task in one message."""
        worker = pipe.worker
        wanting = self._wanting()
        for name, group in itertools.groupby(lines, operator.itemgetter(0)):
            self._spread(
                wanting, messages.Log(name or worker.name, worker.pid, pipe.stream, [line for _, line in group])
            )

    def _wanting(self) -> list[bytes]:
        return [driver for driver, wanted in self._daemon.drivers.items() if wanted]

    # -- drivers -------------------------------------------------------------------------------------------------

    def _spread(self, wanting: list[bytes], message: messages.Log) -> None:
        size = sum(map(len, message.lines)) + LINE_OVERHEAD_BYTES * len(message.lines)
        for driver_id in wanting:
            driver = self._drivers.setdefault(driver_id, _Driver())
            if not driver.waiting and driver.unprinted < WINDOW_BYTES:
                self._send(driver_id, driver, message, size)
            else:
                self._hold(driver, message, size)

    def _send(self, driver_id: bytes, driver: _Driver, message: messages.Log, size: int) -> None:
        driver.unprinted += size
        self._daemon.send(driver_id, messages.Log(message.name, message.pid, message.stream, message.lines, size))

    def _hold(self, driver: _Driver, message: messages.Log, size: int) -> None:
        before = driver.waiting_bytes.get(message.pid, 0)
        if before + size <= WAITING_PER_WORKER_BYTES and driver.total + size <= WAITING_BYTES:
            driver.waiting.append(_Waiting(message, size))
            driver.waiting_bytes[message.pid] = before + size
            driver.total += size
            return
        marker = driver.dropping.get((message.pid, message.stream))
        if marker is None:
            marker = _Waiting(messages.Log(message.name, message.pid, message.stream, []), 0)
            driver.dropping[message.pid, message.stream] = marker
            driver.waiting.append(marker)
        marker.dropped += len(message.lines)

    def on_printed(self, channel: Channel, message: messages.Printed) -> None:
        """A driver has put out `size` bytes of what we sent."""
        driver = self._drivers.get(channel.peer_id)
        if driver is not None:
            driver.unprinted -= message.size
            self._send_waiting(channel.peer_id, driver, WINDOW_BYTES)

    def _send_waiting(self, driver_id: bytes, driver: _Driver, window: int) -> None:
        while driver.waiting and driver.unprinted < window:
            item = driver.waiting.popleft()
            message = item.message
            driver.total -= item.size
            if item.dropped:
                del driver.dropping[message.pid, message.stream]
                message.lines = [f"… {item.dropped} lines dropped: they came faster than this driver prints"]
            else:
                driver.waiting_bytes[message.pid] -= item.size
                if not driver.waiting_bytes[message.pid]:
                    del driver.waiting_bytes[message.pid]
            self._send(driver_id, driver, message, item.size)

    def driver_left(self, process_id: bytes) -> None:
        """A driver is gone."""
        self._drivers.pop(process_id, None)

    def finish(self) -> None:
        """Pass on what workers wrote before the end, and see it off."""
        for pipes in self._pipes.values():
            for pipe in pipes:
                self._read(pipe, FINAL_READS)
                self._pass_on(pipe, pipe.lines.finish())
        for driver_id, driver in self._drivers.items():
            self._send_waiting(driver_id, driver, WAITING_BYTES * 4)
        loop = self._daemon.loop
        loop.flush()
        deadline = time.monotonic() + FINAL_WAIT_S
        while time.monotonic() < deadline:
            channels = [self._daemon.channels.get(driver_id) for driver_id in self._drivers]
            if all(channel is None or channel.drained for channel in channels):
                return
            loop.step(0.05)
