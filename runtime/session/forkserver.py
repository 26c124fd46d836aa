"""The fork server: a small single-threaded process from which the daemon and all workers are forked.

Theory of operation. It has imported what every worker needs and nothing that owns threads or sockets, so a worker exists
within milliseconds and shares these pages. It is the parent of all processes of the node and therefore the one that learns
how each of them ended; it reports that to the daemon. It ends when the daemon ends, when the driver ends (the lifeline
pipe), or when it is told to, and takes every child with it, whatever they are doing.

The daemon talks to it over a socket pair: `("fork", kind, process id, variables, environment)` there, `("forked", process id,
pid)`, `("failed", process id, why)` and `("exited", pid, status)` back. The daemon never waits to send, so that it
always reads, and we may wait for it. A "worker" comes with the read ends of its output and error pipes; a "store" prints
into the node's log.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import resource
import select
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from afield.errors import VersionMismatchError
from afield.runtime.process.configuration import VERSION_MISMATCH_STATUS, ForkServerConfig, SessionConfig
from afield.runtime.session import offspring

_PR_SET_NAME = 15
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)

MAX_MESSAGE = 1 << 20


def name_process(name: str) -> None:
    """Set what `ps -o comm` and `top` show."""
    _libc.prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Roles:
    """What a forked child does, by the kind of process that it is; each returns when the process is to end."""

    #: Given the configuration and the daemon's end of the socket pair.
    daemon: Callable[[ForkServerConfig, socket.socket], None]
    #: Given the configuration, its process id, variables and runtime environment.
    worker: Callable[[ForkServerConfig, bytes, dict[str, str], bytes], None]
    #: Given the session's configuration and directory, its process id and variables.
    store: Callable[[SessionConfig, str, bytes, dict[str, str]], None]


class ForkServer:
    """Forks, reaps, reports."""

    def __init__(self, config: ForkServerConfig, roles: Roles) -> None:
        self.config = config
        self.roles = roles
        self.children: set[int] = set()
        self.workers: set[int] = set()
        self.daemon_pid = 0
        self.sock, self._daemon_sock = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def run(self) -> None:
        """Serve until the end of the session, then end all children."""
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self.daemon_pid = self._fork(self._run_daemon)
        self._daemon_sock.close()
        poller = select.poll()
        for fd in (self.sock.fileno(), self.config.lifeline_fd, self._wake_read):
            poller.register(fd, select.POLLIN)
        try:
            self._serve(poller)
        finally:
            self._end()

    def _serve(self, poller: select.poll) -> None:
        while True:
            for fd, _ in poller.poll():
                if fd == self.config.lifeline_fd:
                    return
                if fd == self._wake_read:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake_read, 4096)
                    if not self._reap():
                        return
                elif not self._on_message():
                    return

    def _on_message(self) -> bool:
        try:
            data = self.sock.recv(MAX_MESSAGE)
        except OSError:
            return False
        if not data:
            return False
        what, kind, process_id, variables, environment = msgspec.msgpack.decode(data)
        if what != "fork":
            return False
        try:
            if kind == "store":
                pid = self._fork(lambda: self._run_store(process_id, variables))
                self._say("forked", process_id, pid)
            else:
                self._fork_worker(process_id, variables, environment)
        except OSError as error:  # no more processes, memory or descriptors for now: it costs this one process
            self._say("failed", process_id, f"it could not be forked: {error}")
        return True

    def _say(self, what: str, which: bytes | int, value: int | str) -> None:
        """Tell the daemon, which always reads; one that is gone is noticed elsewhere."""
        with contextlib.suppress(OSError):
            self.sock.send(msgspec.msgpack.encode((what, which, value)))

    def _fork_worker(self, worker_id: bytes, variables: dict[str, str], environment: bytes) -> None:
        pipes: list[int] = []
        try:
            pipes += os.pipe2(os.O_CLOEXEC)
            pipes += os.pipe2(os.O_CLOEXEC)
            out_read, out, err_read, err = pipes

            def become_worker() -> None:
                os.close(out_read)
                os.close(err_read)
                self._run_worker(worker_id, variables, environment, out, err)

            pid = self._fork(become_worker)
            self.workers.add(pid)
            message = msgspec.msgpack.encode(("forked", worker_id, pid))
            with contextlib.suppress(OSError):
                socket.send_fds(self.sock, [message], [out_read, err_read])
        finally:
            for fd in pipes:
                os.close(fd)

    def _reap(self) -> bool:
        """Report children that ended, and end what they had started; return False if the daemon is one of them."""
        ended = {}
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if not pid:
                break
            self.children.discard(pid)
            if pid == self.daemon_pid:
                return False
            ended[pid] = status
        workers = self.workers & ended.keys()
        self.workers -= workers
        if workers:
            offspring.end(workers)
        for pid, status in ended.items():
            self._say("exited", pid, status)
        return True

    def _fork(self, child: Callable[[], None]) -> int:
        pid = os.fork()
        if pid:
            self.children.add(pid)
            return pid
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            die_with_parent()
            os.close(self._wake_read)
            os.close(self._wake_write)
            self.sock.close()
            child()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def _run_daemon(self) -> None:
        name_process("afield-node")
        self.roles.daemon(self.config, self._daemon_sock)

    def _run_worker(self, worker_id: bytes, variables: dict[str, str], environment: bytes, out: int, err: int) -> None:
        self._daemon_sock.close()
        os.close(self.config.lifeline_fd)
        offspring.lead()
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.close(out)
        os.close(err)
        name_process("afield-worker")
        self.roles.worker(self.config, worker_id, variables, environment)

    def _run_store(self, store_id: bytes, variables: dict[str, str]) -> None:
        self._daemon_sock.close()
        os.close(self.config.lifeline_fd)
        name_process("afield-store")
        self.roles.store(self.config.session, os.fsdecode(self.config.directory), store_id, variables)

    def _end(self) -> None:
        sessions = {os.getsid(0), *self.workers}
        for pid in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while self.children:
            try:
                pid, _ = os.waitpid(-1, 0)
            except ChildProcessError:
                break
            self.children.discard(pid)
        offspring.end(sessions)  # copies that tasks have made of their workers would keep the memory
        shutil.rmtree(self.config.directory, ignore_errors=True)


def _raise_file_limit() -> None:
    """Allow the session's processes as many open files as the system lets them: the daemon needs three for each worker."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def serve(raw: bytes, roles: Roles) -> None:
    """Run the fork server; `raw` is its configuration."""
    name_process("afield-fork")
    try:
        config = ForkServerConfig.decode(raw)
    except VersionMismatchError as error:
        print(error, file=sys.stderr)
        sys.exit(VERSION_MISMATCH_STATUS)
    _raise_file_limit()
    # Held as long as a process of the session lives, and by no program it starts.
    for fd in (config.lock_fd, config.lifeline_fd, config.session.slab_fd, config.session.pins_fd):
        os.set_inheritable(fd, False)
    with contextlib.suppress(OSError):
        os.chdir(config.working_directory)
    sys.argv = list(map(os.fsdecode, config.arguments))
    if any(device.kind == "emulated" for device in config.devices):
        importlib.import_module("afield.gpu_store.interop.emulated")
    # Everything imported so far is shared by all children: keep the collector from touching (and so copying) its pages.
    gc.collect()
    gc.freeze()
    ForkServer(config, roles).run()
    os._exit(0)
