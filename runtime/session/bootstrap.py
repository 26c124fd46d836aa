"""Starting and ending a session: the driver makes the shared memory, starts the fork server, and waits for its end.

Everything a session leaves outside of process memory is in one directory (mode 0700), which the fork server removes.
Shared memory is a `memfd` and sockets are abstract: both end with the last process that uses them, however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import subprocess
import sys
import time
from dataclasses import dataclass

from afield.errors import AfieldError, InvalidOptionError, RuntimeDiedError, VersionMismatchError
from afield.gpu_store import shared_memory
from afield.gpu_store.rings import SHARED_BYTES
from afield.runtime.calls.participant import Participant
from afield.runtime.process.configuration import (
    STORE_WAIT_S,
    VERSION_MISMATCH_STATUS,
    ForkServerConfig,
    ProcessConfig,
    SessionConfig,
)
from afield.runtime.process.environment import Environment
from afield.runtime.process.limits import usable_memory_bytes
from afield.runtime.session import sessions
from afield.scheduler.devices import Device
from afield.transport.sockets import connect, is_us

#: Share of the machine's memory that the host store may use unless told otherwise.
STORE_SHARE = 0.3
#: A session that has not started is given up when its processes have not computed for so long, or when the latter is over.
START_TIMEOUT_S = 30.0
MOST_START_S = 300.0
_LOOK_S = 1.0
#: So much of its end is shown when the runtime fails.
LOG_BYTES = 4000

#: What the fork server's interpreter runs. Where afield is must come first, and apart from what only afield can read. `-P`:
#: before it, nothing is to be imported from the directory where we happen to be, in which others may be able to write.
_FORK_SERVER = """
import os, sys
paths, _, raw = sys.stdin.buffer.read().partition(b"\\0\\0")
sys.path[:] = os.fsdecode(paths).split("\\0")
from afield.runtime.main import main
main(raw)
"""


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """What `init` asks for."""

    num_cpus: float
    devices: list[Device]
    emulated_link: str
    resources: dict[str, float]
    store_bytes: int
    spill_dir: str | None
    namespace: str
    log_to_driver: bool
    environment: Environment
    lineage_bytes: int  # see `SessionConfig`


class Session:
    """A running session, as its driver holds it."""

    def __init__(self, options: SessionOptions) -> None:
        self.options = options
        if not is_us(os.geteuid()):
            raise RuntimeDiedError(
                f"the runtime does not run as the user {os.geteuid()} (nobody): the kernel shows users of other containers as "
                f"that one too, so a session could not tell them from its own processes; run as a user of your own"
            )
        _open_standard_streams()
        sessions.sweep(options.spill_dir)
        self.name = secrets.token_hex(8)
        self.node_id = secrets.token_hex(8)
        self._files = _make_directory(self.name, options.spill_dir)
        self.directory = self._files.path
        with contextlib.ExitStack() as failed, contextlib.ExitStack() as opened:
            failed.callback(self._files.remove)
            try:
                self._open(options, failed, opened)
            except OSError as error:
                raise _unable(error) from error
            except RuntimeError as error:
                if isinstance(error, AfieldError) or "thread" not in str(error):
                    raise
                raise RuntimeDiedError(
                    f"the runtime could not start: {error}; raise the limit of processes and threads (ulimit -u) or of "
                    f"address space (ulimit -v)"
                ) from error
            failed.pop_all()

    def _open(self, options: SessionOptions, failed: contextlib.ExitStack, opened: contextlib.ExitStack) -> None:
        """Make what the processes share, start them and join them; `opened` is closed in any case, `failed` after errors."""
        token = secrets.token_bytes(32)
        driver_id = secrets.token_bytes(8)
        lock_fd = self._files.lock()
        opened.callback(os.close, lock_fd)
        slab_fd = shared_memory.create(f"afield-{self.name}", options.store_bytes)
        opened.callback(os.close, slab_fd)
        pins_fd = shared_memory.create(f"afield-pins-{self.name}", SHARED_BYTES)
        opened.callback(os.close, pins_fd)
        lifeline_read, self._lifeline = os.pipe()
        opened.callback(os.close, lifeline_read)
        failed.callback(os.close, self._lifeline)
        config = SessionConfig(
            self.name,
            token,
            slab_fd,
            options.store_bytes,
            pins_fd,
            store_wait_s=float(os.environ.get("AFIELD_STORE_WAIT_S") or STORE_WAIT_S),
            record_call_sites=os.environ.get("AFIELD_RECORD_CALL_SITES") == "1",
            threads_by_cpus="OMP_NUM_THREADS" not in os.environ,
            lineage_bytes=options.lineage_bytes,
        )
        self._files.write_token(token)
        # Open until the end: the directory goes with the fork server, and what was printed last says why.
        self._log_file = self._files.open_log()
        failed.callback(self._log_file.close)
        self._process = self._start(config, lifeline_read, lock_fd, driver_id)
        failed.callback(self._stop)
        self.participant = self._join(config, driver_id)

    def _start(self, config: SessionConfig, lifeline: int, lock: int, driver_id: bytes) -> subprocess.Popen[bytes]:
        options = self.options
        directory = _working_directory()
        paths = [path or directory for path in sys.path if path or directory]
        message = ForkServerConfig(
            session=config,
            directory=os.fsencode(self.directory),
            lifeline_fd=lifeline,
            lock_fd=lock,
            working_directory=os.fsencode(directory),
            arguments=list(map(os.fsencode, sys.argv or [""])),
            node_id=bytes.fromhex(self.node_id),
            num_cpus=options.num_cpus,
            memory=usable_memory_bytes(),
            resources=options.resources,
            devices=options.devices,
            emulated_link=options.emulated_link,
            driver=driver_id,
            namespace=options.namespace,
            environment=options.environment.encode(),
        )
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _FORK_SERVER],
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=self._log_file,
            stderr=self._log_file,
            pass_fds=(config.slab_fd, config.pins_fd, lifeline, lock),
            start_new_session=True,
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it could not start; `_join` says why
            process.stdin.write(b"\0".join(map(os.fsencode, paths)) + b"\0\0" + message.encode())
            process.stdin.close()
        return process

    def _join(self, config: SessionConfig, driver_id: bytes) -> Participant:
        """Connect to the daemon as soon as it listens."""
        patience = _Patience(self._process.pid)
        while True:
            try:
                connect(config.address(b"")).close()
                break
            except (ConnectionRefusedError, BlockingIOError):  # not yet, or many at once
                if self._process.poll() is not None or patience.is_over():
                    self._stop()
                    if self._process.returncode == VERSION_MISMATCH_STATUS:
                        raise VersionMismatchError(self._log().strip()) from None
                    words = self._log() or f"its fork server ended with status {self._process.returncode}"
                    raise RuntimeDiedError(f"the runtime did not start:\n{words}") from None
                time.sleep(0.003)
        participant = Participant(
            config,
            ProcessConfig(),
            driver_id,
            log_to_driver=self.options.log_to_driver,
            last_words=self._log,
        )
        participant.process.start()
        return participant

    def _log(self) -> str:
        """Return the last of what the fork server and the daemon have printed."""
        size = os.fstat(self._log_file.fileno()).st_size
        return os.pread(self._log_file.fileno(), LOG_BYTES, max(0, size - LOG_BYTES)).decode(errors="replace")

    def _stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def abandon(self) -> None:
        """In a forked child of the driver: no longer stand for the driver's life."""
        os.close(self._lifeline)
        self._files.close()

    def end(self) -> None:
        """End all processes of the session and wait until they are gone."""
        os.close(self._lifeline)
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log_file.close()
        self._files.remove()


class _Patience:
    """How long to wait for a session that starts: as long as its processes compute, within reason.

    A start takes some tenths of a second of CPU time, which is long on a machine with dozens of busy processes for each CPU.
    """

    def __init__(self, fork_server: int) -> None:
        self._pid = fork_server
        self._last = time.monotonic() + MOST_START_S
        self._until = time.monotonic() + START_TIMEOUT_S
        self._look_at = time.monotonic() + _LOOK_S
        self._used = 0

    def is_over(self) -> bool:
        """Tell whether nothing was computed for START_TIMEOUT_S, or MOST_START_S have passed."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + _LOOK_S
            used = self._computed()
            if used > self._used:
                self._used = used
                self._until = now + START_TIMEOUT_S
        return now > min(self._until, self._last)

    def _computed(self) -> int:
        """Return the CPU time of the fork server and of its children, in the kernel's ticks."""
        used = 0
        with contextlib.suppress(OSError):
            used += _cpu_ticks(self._pid)
            with open(f"/proc/{self._pid}/task/{self._pid}/children", encoding="ascii") as children:
                for child in children.read().split():
                    with contextlib.suppress(OSError):
                        used += _cpu_ticks(int(child))
        return used


def _cpu_ticks(pid: int) -> int:
    with open(f"/proc/{pid}/stat", "rb") as file:
        user, system = file.read().rpartition(b")")[2].split()[11:13]
    return int(user) + int(system)


def _open_standard_streams() -> None:
    """Open what is closed of stdin, stdout and stderr, so that no descriptor of the session has their numbers.

    A program that is started has streams of its own there: what it was to inherit under these numbers would not reach it. And
    whatever prints without asking, such as code in C, would print into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            fd = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            if fd == number:
                os.set_inheritable(fd, True)
            else:  # another thread was faster, or we may not know better
                os.close(fd)


def _make_directory(name: str, spill_dir: str | None) -> sessions.SessionDirectory:
    try:
        return sessions.SessionDirectory(name, spill_dir)
    except sessions.UnsafeDirectoryError as error:
        if spill_dir is not None:
            raise InvalidOptionError(f"spill_dir={spill_dir!r}: {error}; pass a directory of your own") from None
        raise RuntimeDiedError(
            f"the runtime could not start, as there is no safe place for its files: {error}; set TMPDIR to a directory "
            f"of your own, or pass spill_dir"
        ) from None
    except OSError as error:
        if spill_dir is not None:
            raise InvalidOptionError(
                f"spill_dir={spill_dir!r}: {error.strerror}; it must be a directory that this user can write to"
            ) from None
        raise RuntimeDiedError(
            f"the runtime could not start, as there is no place for its files ({error}); set TMPDIR or pass spill_dir"
        ) from None


def _unable(error: OSError) -> RuntimeDiedError:
    """Say which limit of the system kept the runtime from starting, and what to do."""
    remedies = {
        errno.EMFILE: "; raise the limit of open files (ulimit -n)",
        errno.ENFILE: "; the machine has no file descriptors left",
        errno.EAGAIN: "; raise the limit of processes and threads (ulimit -u)",
        errno.ENOSPC: "; make room where the session's files are, or pass another spill_dir",
        errno.ENOMEM: "; pass a smaller host_memory",
        errno.EFBIG: "; pass a smaller host_memory, or raise the limit of the size of files (ulimit -f)",
        errno.EINVAL: "; pass a smaller host_memory",
    }
    return RuntimeDiedError(f"the runtime could not start: {error}{remedies.get(error.errno or 0, '')}")


def _working_directory() -> str:
    """Return where we are, or "" if that directory has been deleted: the session's processes are then there as well."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""


def _environment() -> dict[str, str]:
    """Return the environment of the session's processes.

    Workers run side by side, one for each CPU: a linear algebra library that starts a thread for each CPU in each of them
    makes all of them slower. What the user has set stays. For a task with more CPUs its worker sets OMP_NUM_THREADS, which
    libraries see that are loaded by it (see `Executor._on_assign`).
    """
    environment = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        environment.setdefault(name, "1")
    return environment
