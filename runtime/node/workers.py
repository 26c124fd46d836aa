"""The worker pool: forks workers, matches them with grants, reads their output, notices their end.

A worker is bound to the devices of its first lease before anything can initialise a device library, and keeps this binding
for life; it is used again for later leases of the same devices, so that device start-up is paid once.
"""

from __future__ import annotations

import os
import signal
import socket
from collections import deque
from typing import TYPE_CHECKING

import msgspec

from afield.ids import new_process_id
from afield.scheduler.leases import Grant
from afield.transport.channel import Channel

if TYPE_CHECKING:
    from afield.runtime.node.daemon import NodeDaemon

NAME_MARK = b"\x1e"
#: A line of a worker's output that is longer is cut into pieces.
MAX_LINE_BYTES = 1 << 16
MAX_MESSAGE = 1 << 16


class Worker:
    """One worker process as the daemon knows it."""

    __slots__ = ("actor_id", "devices", "grant", "id", "name", "output", "partial", "pid", "ready")

    def __init__(self, worker_id: bytes, devices: tuple[str, ...]) -> None:
        self.id = worker_id
        self.devices = devices
        self.pid = 0
        self.ready = False
        self.grant: Grant | None = None
        self.actor_id = b""
        self.name = "worker"
        self.output = -1
        self.partial = b""

    @property
    def lease_id(self) -> int:
        """The present lease, or 0."""
        return self.grant.lease_id if self.grant is not None else 0


class WorkerPool:
    """All workers of the node."""

    def __init__(self, daemon: NodeDaemon, fork_sock: socket.socket) -> None:
        self._daemon = daemon
        self._sock = fork_sock
        self._sock.setblocking(False)
        self.by_id: dict[bytes, Worker] = {}
        self._by_pid: dict[int, Worker] = {}
        self._by_lease: dict[int, Worker] = {}
        self._idle: dict[tuple[str, ...], deque[Worker]] = {}
        self._early_exits: dict[int, int] = {}
        daemon.loop.register(fork_sock.fileno(), self._on_fork_server)

    def prestart(self) -> None:
        """Have a worker ready for each CPU before anybody asks."""
        for _ in range(max(1, int(self._daemon.config.num_cpus))):
            self._fork(())

    def provide(self, grant: Grant) -> None:
        """Find or make the worker for a grant."""
        idle = self._idle.get(grant.device_uuids)
        worker = idle.popleft() if idle else self._starting(grant.device_uuids) or self._fork(grant.device_uuids)
        worker.grant = grant
        self._by_lease[grant.lease_id] = worker
        if worker.ready:
            self._daemon.granted(worker)

    def _starting(self, devices: tuple[str, ...]) -> Worker | None:
        for worker in self.by_id.values():
            if not worker.ready and worker.grant is None and worker.devices == devices:
                return worker
        return None

    def _fork(self, devices: tuple[str, ...]) -> Worker:
        worker = Worker(new_process_id(), devices)
        self.by_id[worker.id] = worker
        # An empty list hides the devices: a worker without a lease of a device must not use one by accident.
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(devices), "AFIELD_VISIBLE_DEVICES": ",".join(devices)}
        self._sock.setblocking(True)
        try:
            self._sock.send(msgspec.msgpack.encode(("fork", worker.id, environment)))
        except OSError:
            self._daemon.stop()
        finally:
            self._sock.setblocking(False)
        return worker

    def on_registered(self, channel: Channel) -> None:
        """A forked worker has connected."""
        worker = self.by_id.get(channel.peer_id)
        if worker is None:
            return
        worker.ready = True
        if worker.grant is not None:
            self._daemon.granted(worker)
        else:
            self._idle.setdefault(worker.devices, deque()).append(worker)

    def on_lease_returned(self, lease_id: int) -> None:
        """A lease is over; its worker may serve another."""
        worker = self._by_lease.pop(lease_id, None)
        if worker is not None and worker.grant is not None and worker.grant.lease_id == lease_id:
            worker.grant = None
            if worker.ready and not worker.actor_id:
                self._idle.setdefault(worker.devices, deque()).append(worker)

    def end_lease_of_dead_owner(self, lease_id: int) -> None:
        """A task's owner is gone: nobody wants its outcome, so its worker ends with it."""
        worker = self._by_lease.get(lease_id)
        if worker is not None:
            self.kill(worker)

    def kill(self, worker: Worker) -> None:
        """End a worker's process; the fork server reports it."""
        if worker.pid:
            try:
                os.kill(worker.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    # -- the fork server -----------------------------------------------------------------------------------------

    def _on_fork_server(self, events: int) -> None:
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._sock, MAX_MESSAGE, 1)
            except BlockingIOError:
                return
            except OSError:
                data, fds = b"", []
            if not data:
                self._daemon.loop.unregister(self._sock.fileno())
                self._daemon.stop()
                return
            what, first, second = msgspec.msgpack.decode(data)
            if what == "forked":
                self._on_forked(first, second, fds[0])
            else:
                self._on_exit(first, second)

    def _on_forked(self, worker_id: bytes, pid: int, output: int) -> None:
        worker = self.by_id[worker_id]
        worker.pid = pid
        worker.output = output
        os.set_blocking(output, False)
        self._by_pid[pid] = worker
        self._daemon.loop.register(output, lambda events: self._read_output(worker))

    def _on_exit(self, pid: int, status: int) -> None:
        worker = self._by_pid.pop(pid, None)
        if worker is None:
            return
        self._read_output(worker)
        self._close_output(worker)
        del self.by_id[worker.id]
        idle = self._idle.get(worker.devices)
        if idle and worker in idle:
            idle.remove(worker)
        if worker.grant is not None:
            self._daemon.leases.release(worker.grant.lease_id)
            self._by_lease.pop(worker.grant.lease_id, None)
        reason = describe_exit(pid, status)
        self._daemon.actors.on_worker_died(worker, reason)
        self._daemon.process_died(worker.id, reason)

    # -- output --------------------------------------------------------------------------------------------------

    def drain_output(self) -> None:
        """Pass on what workers wrote before the end."""
        for worker in list(self.by_id.values()):
            self._read_output(worker)

    def _read_output(self, worker: Worker) -> None:
        while worker.output >= 0:
            try:
                data = os.read(worker.output, MAX_LINE_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._close_output(worker)
                data = b"\n" if worker.partial else b""
            *lines, worker.partial = (worker.partial + data).split(b"\n")
            if len(worker.partial) > MAX_LINE_BYTES:
                lines.append(worker.partial)
                worker.partial = b""
            self._pass_on(worker, lines)

    def _close_output(self, worker: Worker) -> None:
        if worker.output >= 0:
            self._daemon.loop.unregister(worker.output)
            os.close(worker.output)
            worker.output = -1

    def _pass_on(self, worker: Worker, lines: list[bytes]) -> None:
        name = worker.name
        group: list[str] = []
        for line in lines:
            mark, _, rest = line.partition(NAME_MARK)
            text = line
            line_name = worker.name
            if not mark and rest:
                named, _, text = rest.partition(NAME_MARK)
                line_name = named.decode("utf-8", "replace")
            if line_name != name and group:
                self._daemon.log(name, worker.pid, "out", group)
                group = []
            name = line_name
            group.append(text.decode("utf-8", "replace"))
        if group:
            self._daemon.log(name, worker.pid, "out", group)

    def describe(self) -> list[dict[str, object]]:
        """List the workers, for tools."""
        return [
            {
                "id": worker.id.hex(),
                "pid": worker.pid,
                "devices": list(worker.devices),
                "lease": worker.lease_id,
                "actor": worker.actor_id.hex(),
            }
            for worker in self.by_id.values()
        ]


def describe_exit(pid: int, status: int) -> str:
    """Say in words how a process ended."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = "unknown"
        return f"pid {pid} was killed by signal {number} ({name})"
    return f"pid {pid} exited with status {os.WEXITSTATUS(status)}"
