"""The worker pool: forks workers, matches them with grants, notices their end.

A worker is bound to the devices of its first lease before anything can initialise a device library, and keeps this binding
for life; it is used again for later leases of the same devices, so that device start-up is paid once. In the same way it
keeps the runtime environment that it was forked for. Idle workers with another environment than the job's are bounded: the
one that was idle longest is asked to end, and does unless somebody depends on what it owns.

A worker that ends before it has connected is replaced, a few times, and then its lease is given up.
"""

from __future__ import annotations

import os
import select
import signal
import socket
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from afield.ids import new_process_id
from afield.runtime.process.configuration import DRIVER_INDEX, ProcessConfig
from afield.runtime.process.limits import usable_cpus
from afield.runtime.wire import messages
from afield.scheduler.leases import Grant
from afield.transport.channel import Channel
from afield.transport.shortage import OUT_OF_FILES

if TYPE_CHECKING:
    from afield.runtime.node.daemon import NodeDaemon

MAX_MESSAGE = 1 << 16
#: Why a worker is ended that the daemon has no descriptors for.
OUT_OF_FILES_TEXT = "the node daemon ran out of file descriptors; raise the limit (ulimit -n)"
#: So long after the daemon could not prepare for a worker it tries again.
PREPARE_PAUSE_S = 0.1
#: A lease is given up when this many workers for it have ended before they connected.
START_ATTEMPTS = 3
#: Workers that are started before anybody asks, for each CPU of the machine: `num_cpus` may be any number.
PRESTART_PER_CPU = 4
#: So many idle workers are kept in any case.
MIN_SPARE = 4

#: What idle workers are found by: their devices and their environment.
Pool = tuple[tuple[str, ...], bytes]


class Worker:
    """One worker process as the daemon knows it."""

    __slots__ = (
        "actor_id",
        "devices",
        "ended_for",
        "environment",
        "grant",
        "id",
        "index",
        "name",
        "pid",
        "ready",
        "used",
    )

    def __init__(self, worker_id: bytes, pool: Pool, index: int) -> None:
        self.id = worker_id
        #: Its row of the pin board.
        self.index = index
        self.devices, self.environment = pool
        self.pid = 0
        self.ready = False
        #: It has had a lease.
        self.used = False
        self.grant: Grant | None = None
        self.actor_id = b""
        self.name = "worker"
        #: Why the daemon ended it, where that says more than the signal.
        self.ended_for = ""

    @property
    def lease_id(self) -> int:
        """The present lease, or 0."""
        return self.grant.lease_id if self.grant is not None else 0

    @property
    def pool(self) -> Pool:
        """The idle workers that this one belongs to when it has no lease."""
        return self.devices, self.environment


class WorkerPool:
    """All workers of the node."""

    def __init__(self, daemon: NodeDaemon, fork_sock: socket.socket) -> None:
        self._daemon = daemon
        self._sock = fork_sock
        self._sock.setblocking(False)
        self.by_id: dict[bytes, Worker] = {}
        self._by_pid: dict[int, Worker] = {}
        self._by_lease: dict[int, Worker] = {}
        self._idle: dict[Pool, deque[Worker]] = {}
        #: Idle workers with an environment of their own that may be asked to end, the longest idle first.
        self._spare: OrderedDict[bytes, Worker] = OrderedDict()
        #: The same for workers that any task can use: many are forked while tasks wait inside for other tasks.
        self._spare_plain: OrderedDict[bytes, Worker] = OrderedDict()
        self._max_spare = max(1, int(daemon.config.num_cpus))
        self._default_environment = daemon.config.environment
        self._stores_starting: dict[bytes, tuple[Callable[[int], None], Callable[[str], None]]] = {}
        self._store_exits: dict[int, Callable[[str], None]] = {}
        self._failed_starts: dict[int, int] = {}  # lease -> workers that ended before they connected
        #: Requests that the fork server's socket has not taken yet: one for each process that is to be forked.
        self._requests: deque[bytes] = deque()
        self._last_index = DRIVER_INDEX
        self._ending = False  # the session ends: no worker takes another's place
        daemon.loop.register(fork_sock.fileno(), self._on_fork_server)

    def prestart(self) -> None:
        """Have a worker ready for each CPU before anybody asks, as far as the machine has as many."""
        for _ in range(max(1, int(min(self._daemon.config.num_cpus, PRESTART_PER_CPU * usable_cpus())))):
            self._fork(((), self._default_environment))

    def provide(self, grant: Grant) -> None:
        """Find or make the worker for a grant."""
        pool = (grant.device_uuids, self._daemon.environment_of(grant))
        idle = self._idle.get(pool)
        worker = idle.pop() if idle else self._starting(pool) or self._fork(pool)
        self._not_spare(worker)
        worker.grant = grant
        worker.used = True
        self._by_lease[grant.lease_id] = worker
        if worker.ready:
            self._daemon.granted(worker)

    def _starting(self, pool: Pool) -> Worker | None:
        for worker in self.by_id.values():
            if not worker.ready and worker.grant is None and worker.pool == pool:
                return worker
        return None

    def _fork(self, pool: Pool) -> Worker:
        self._last_index += 1
        worker = Worker(new_process_id(), pool, self._last_index)
        self.by_id[worker.id] = worker
        try:
            bound = self._daemon.tiers.begin_process(worker.id, worker.index, worker.devices)
        except OSError as error:
            # Its part of the shared memory could not be mapped: that costs this one process, in a moment.
            why = f"the node daemon could not prepare for it: {error}"
            if error.errno in OUT_OF_FILES:
                why = OUT_OF_FILES_TEXT
            self._daemon.loop.after(PREPARE_PAUSE_S, lambda: self._on_fork_failed(worker.id, why))
            return worker
        own = ProcessConfig("worker", worker.index, bound, self._daemon.tiers.stores.backend_spec)
        self._ask_for("worker", worker.id, own.variables(), worker.environment)
        return worker

    def fork_store(
        self,
        store_id: bytes,
        variables: dict[str, str],
        on_forked: Callable[[int], None],
        on_exit: Callable[[str], None],
    ) -> None:
        """Have a store process forked, which is no worker; `on_forked(pid)`, and at its end `on_exit(how it ended)`."""
        self._stores_starting[store_id] = on_forked, on_exit
        self._ask_for("store", store_id, variables, b"")

    def _ask_for(self, kind: str, process_id: bytes, variables: dict[str, str], environment: bytes) -> None:
        self._requests.append(msgspec.msgpack.encode(("fork", kind, process_id, variables, environment)))
        if len(self._requests) == 1:
            self._send_requests()

    def _send_requests(self) -> None:
        """Send what the socket takes, never waiting: the fork server may be waiting for us to read what it says."""
        while self._requests:
            try:
                self._sock.send(self._requests[0])
            except BlockingIOError:
                self._daemon.loop.modify(self._sock.fileno(), select.EPOLLIN | select.EPOLLOUT)
                return
            except OSError:
                self._daemon.stop()
                return
            self._requests.popleft()
        self._daemon.loop.modify(self._sock.fileno(), select.EPOLLIN)

    def on_registered(self, channel: Channel) -> None:
        """A forked worker has connected."""
        worker = self.by_id.get(channel.peer_id)
        if worker is None:
            return
        worker.ready = True
        if worker.grant is not None:
            self._failed_starts.pop(worker.grant.lease_id, None)
            self._daemon.granted(worker)
        else:
            self._set_idle(worker)

    def _set_idle(self, worker: Worker) -> None:
        self._idle.setdefault(worker.pool, deque()).append(worker)
        if worker.environment != self._default_environment:
            self._keep_spare(worker, self._spare, self._max_spare)
        elif not worker.devices:  # one that has started a device stays warm for it
            self._keep_spare(worker, self._spare_plain, max(MIN_SPARE, 2 * self._max_spare))

    def _keep_spare(self, worker: Worker, spare: OrderedDict[bytes, Worker], limit: int) -> None:
        """Keep so many idle workers and ask the one that was idle the longest to end."""
        spare[worker.id] = worker
        if len(spare) > limit:
            _, oldest = spare.popitem(last=False)
            self._remove_idle(oldest)
            self._daemon.send(oldest.id, messages.Retire())

    def _not_spare(self, worker: Worker) -> None:
        self._spare.pop(worker.id, None)
        self._spare_plain.pop(worker.id, None)

    def _remove_idle(self, worker: Worker) -> None:
        idle = self._idle.get(worker.pool)
        if idle and worker in idle:
            idle.remove(worker)
            if not idle:
                del self._idle[worker.pool]

    def on_retire_refused(self, channel: Channel, message: messages.Retire) -> None:
        """Somebody depends on a worker that was asked to end: it stays, and is not asked again before its next lease."""
        worker = self.by_id.get(channel.peer_id)
        if worker is not None:
            self._idle.setdefault(worker.pool, deque()).append(worker)

    def on_lease_returned(self, lease_id: int, wears_out: bool = False) -> None:
        """A lease is over; its worker may serve another, or has done what it may and ends once nobody depends on it."""
        worker = self._by_lease.pop(lease_id, None)
        if worker is not None and worker.grant is not None and worker.grant.lease_id == lease_id:
            worker.grant = None
            if not worker.ready or worker.actor_id:
                return
            if wears_out:
                self._daemon.send(worker.id, messages.Retire(True))
            else:
                self._set_idle(worker)

    def is_leased(self, lease_id: int) -> bool:
        """Tell whether a lease still has its worker."""
        return lease_id in self._by_lease

    def kill_leased(self, lease_id: int) -> None:
        """End the worker of a lease: its owner is gone, or wants what runs there to end."""
        worker = self._by_lease.get(lease_id)
        if worker is not None:
            self.kill(worker)

    def end_bound_to(self, uuid: str, reason: str) -> None:
        """End the workers of a device that is lost."""
        for worker in list(self.by_id.values()):
            if uuid in worker.devices:
                worker.ended_for = reason
                self.kill(worker)

    def on_unfit(self, channel: Channel, message: messages.Unfit) -> None:
        """A worker cannot go on with its devices."""
        worker = self.by_id.get(channel.peer_id)
        if worker is not None:
            worker.ended_for = worker.ended_for or message.reason
            self._daemon.tiers.look(worker.devices)
            self.kill(worker)

    def kill_process(self, process_id: bytes) -> None:
        """End a worker that broke the protocol."""
        worker = self.by_id.get(process_id)
        if worker is not None:
            self.kill(worker)

    def end_all(self) -> None:
        """The session ends: have all workers end, in good order where user code may have run."""
        self._ending = True
        for worker in list(self.by_id.values()):
            if worker.used and worker.ready:
                self._daemon.send(worker.id, messages.Terminate(True))
            else:
                worker.ended_for = "the session ends"  # also of one that is still to be forked
                self.kill(worker)

    def end_faulty(self, process_id: bytes, fault: str) -> None:
        """End a worker with which a channel had to be closed: nobody can talk to it any more."""
        worker = self.by_id.get(process_id)
        if worker is not None:
            worker.ended_for = worker.ended_for or f"a channel with it had to be closed: {fault}"
            self.kill(worker)

    def kill(self, worker: Worker) -> None:
        """End a worker's process; the fork server reports it."""
        if worker.pid:
            try:
                os.kill(worker.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def start_fewer(self) -> None:
        """The daemon cannot accept anybody: end the newest worker that has not connected, which leaves room for others."""
        for worker in reversed(self.by_id.values()):
            if not worker.ready and worker.pid and not worker.ended_for:
                worker.ended_for = OUT_OF_FILES_TEXT
                self.kill(worker)
                return

    # -- the fork server -----------------------------------------------------------------------------------------

    def _on_fork_server(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self._send_requests()
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._sock, MAX_MESSAGE, 2)
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
                self._on_forked(first, second, fds)
            elif what == "failed":
                self._on_fork_failed(first, second)
            else:
                self._on_exit(first, second)

    def _on_forked(self, worker_id: bytes, pid: int, outputs: list[int]) -> None:
        store = self._stores_starting.pop(worker_id, None)
        if store is not None:
            on_forked, self._store_exits[pid] = store
            on_forked(pid)
            return
        worker = self.by_id[worker_id]
        worker.pid = pid
        self._by_pid[pid] = worker
        if len(outputs) < 2:
            for fd in outputs:
                os.close(fd)
            worker.ended_for = OUT_OF_FILES_TEXT
            self.kill(worker)
            return
        for stream, fd in zip(("out", "err"), outputs, strict=True):
            self._daemon.output.open(worker, stream, fd)
        if worker.ended_for:  # its device was lost while it was being forked
            self.kill(worker)

    def _on_fork_failed(self, process_id: bytes, why: str) -> None:
        """A process could not be forked; what it was for is tried again, a few times."""
        store = self._stores_starting.pop(process_id, None)
        if store is not None:
            store[1](why)
        else:
            self._gone(self.by_id[process_id], why)

    def _on_exit(self, pid: int, status: int) -> None:
        worker = self._by_pid.pop(pid, None)
        if worker is None:
            on_exit = self._store_exits.pop(pid, None)
            if on_exit is not None:
                on_exit(describe_exit(pid, status))
            return
        self._daemon.output.close(worker)
        if worker.ready:
            self._daemon.hear_out(worker.id)
        self._gone(
            worker, f"pid {pid} was ended: {worker.ended_for}" if worker.ended_for else describe_exit(pid, status)
        )

    def _gone(self, worker: Worker, reason: str) -> None:
        """A worker is no more, or never was."""
        del self.by_id[worker.id]
        self._remove_idle(worker)
        self._not_spare(worker)
        if worker.grant is not None:
            self._by_lease.pop(worker.grant.lease_id, None)
            if worker.ready or self._ending or not self._replace(worker, worker.grant, reason):
                self._daemon.leases.release(worker.grant.lease_id)
        self._daemon.actors.on_worker_died(worker, reason)
        self._daemon.process_died(worker.id, reason)

    def _replace(self, worker: Worker, grant: Grant, reason: str) -> bool:
        """A worker ended before it could take its lease: find another one, or return False once too many have."""
        failed = self._failed_starts.pop(grant.lease_id, 0) + 1
        if failed < START_ATTEMPTS:
            self._failed_starts[grant.lease_id] = failed
            self.provide(grant)
            return True
        if failed == START_ATTEMPTS:
            # The owner is told once: its other leases that were granted for the same tasks end without a word.
            for other in self.by_id.values():
                if not other.ready and other.grant and (other.grant.owner, other.grant.key) == (grant.owner, grant.key):
                    self._failed_starts[other.grant.lease_id] = START_ATTEMPTS
            text = f"no worker for it could start in {failed} attempts; the last: {reason}"
            self._daemon.not_started(worker, grant, text)
        return False

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
