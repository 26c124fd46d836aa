"""What the tests of real processes share: finding what a session left behind, running programs, polling with a deadline.

Theory of operation. Everything that a session has can be found from outside by three names. Its fork server, daemon and stores
are in one session of the operating system, whose number is the fork server's pid, and its workers, the children of the fork
server, lead one each; all its sockets and its shared memory carry the session's name; and its directory is known. `Traces`
holds these names and `leftovers` looks for them, so a test can ask about a session whose driver is dead as well as its own.
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from afield.runtime.face import api, lifecycle

ROOT = Path(__file__).resolve().parent.parent
#: A program that runs longer than this hangs.
HANG_S = 60.0
#: After the driver is gone, everything of it is gone within this time.
GONE_S = 5.0


def remote_with(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`afield.remote` with options, as a decorator that has a type."""
    decorate: Callable[[Callable[..., Any]], Any] = api.remote(**options)
    return decorate


def poll(condition: Callable[[], Any], timeout_s: float = 30.0, interval_s: float = 0.01) -> Any:
    """Return the first true value of `condition`, or its last value when the time is over."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value or time.monotonic() > deadline:
            return value
        time.sleep(interval_s)


def without_waiting(limit_s: float, work: Callable[[], Any], tries: int = 10) -> Any:
    """Return the result of work that takes less than `limit_s` at least once: on a busy machine anything is slow at times.

    For what would wait for `limit_s` each time if it waited.
    """
    took_s = []
    for _ in range(tries):
        begun = time.monotonic()
        result = work()
        took_s.append(time.monotonic() - begun)
        if took_s[-1] < limit_s:
            return result
    raise AssertionError(f"it should not wait for {limit_s} s: {took_s}")


@dataclass(frozen=True)
class Traces:
    """The names by which everything of a session can be found."""

    name: str
    fork_server: int  # its pid, and the number of the operating system's session
    directory: str


def traces() -> Traces:
    """Return the traces of the running session."""
    session = lifecycle._session
    assert session is not None
    return Traces(session.name, session._process.pid, session.directory)


def _pids() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            yield int(name)


#: The sessions of the operating system that belonged to a fork server when somebody looked: it may be gone since.
_leaders: dict[int, set[int]] = {}


def processes(found: Traces) -> dict[int, str]:
    """Return the living processes of a session, the driver excepted: pid and what `ps` calls them."""
    alive = {}
    leaders = _leaders.setdefault(found.fork_server, {found.fork_server})
    stats = {}
    for pid in _pids():
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            continue
        name, _, rest = stat.partition("(")[2].rpartition(")")
        state, parent, _, session = rest.split()[:4]
        stats[pid] = name, state, int(session)
        if int(parent) == found.fork_server:
            leaders.add(int(session))
    for pid, (name, state, session) in stats.items():
        if session in leaders and state not in "ZX":
            alive[pid] = name
    return alive


def process_named(found: Traces, name: str) -> int:
    """Return the pid of the session's only process with this name: afield-fork, afield-node."""
    if name == "afield-fork":  # a process that was forked this moment has the same name
        return found.fork_server
    (pid,) = [pid for pid, comm in processes(found).items() if comm == name]
    return pid


def sockets(found: Traces) -> list[str]:
    """Return the session's abstract unix sockets."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return [line.split()[-1] for line in lines if f"afield-{found.name}" in line]


def mappings(found: Traces, pid: int) -> list[str]:
    """Return the lines of a process's memory map that show the session's shared memory."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return []
    return [line for line in lines if f"memfd:afield-{found.name}" in line]


def segments(found: Traces) -> list[str]:
    """Return who still holds the session's shared memory, open or mapped."""
    holders = []
    for pid in _pids():
        try:
            links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            links = []
        if any(f"memfd:afield-{found.name}" in link for link in links):
            holders.append(f"{pid} (open)")
        if mappings(found, pid):
            holders.append(f"{pid} (mapped)")
    return holders


def leftovers(found: Traces, *, memory: bool = True) -> list[str]:
    """Return everything that there is of a session besides its driver; empty when it is gone."""
    left = [f"process {pid} {name}" for pid, name in processes(found).items()]
    left += [f"socket {name}" for name in sockets(found)]
    if memory:
        left += [f"shared memory of process {holder}" for holder in segments(found)]
    if os.path.exists(found.directory):
        left.append(f"directory {found.directory}")
    return left


def assert_gone(found: Traces, *, memory: bool = True) -> None:
    """Fail unless nothing of the session is left within the time that is promised."""
    poll(lambda: not leftovers(found, memory=memory), GONE_S)
    left = leftovers(found, memory=memory)
    assert not left, left


def open_files() -> dict[int, str]:
    """Return this process's open file descriptors and what they are."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            pass  # the descriptor of the listing itself
    return found


@contextmanager
def no_leaks() -> Iterator[None]:
    """Run a block that starts and ends sessions; afterwards nothing of them may be left in this process or beside it."""
    files_before = open_files()
    yield
    if lifecycle._session is not None:
        session = traces()
        lifecycle.shutdown()
        assert_gone(session, memory=False)
    gc.collect()
    extra = {fd: what for fd, what in open_files().items() if files_before.get(fd) != what}
    assert not extra, f"file descriptors were left open: {extra}"


# -- interrupts -------------------------------------------------------------------------------------------------


class Interrupter:
    """Ctrl-C at random moments of a piece of work, and at no other.

    Theory of operation. Each `until_interrupted` asks for one SIGINT, which the thread sends after a random time, and goes on
    with the work until it is raised. So it is raised where it is caught, however late the thread or the signal is.
    """

    def __init__(self, most_delay_s: float = 0.008) -> None:
        self.hits = 0
        self._is_wanted = False
        self._is_over = False
        self._most_delay_s = most_delay_s
        self._random = random.Random(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def until_interrupted(self, work: Callable[[], Any]) -> None:
        """Do some work again and again."""
        try:
            self._is_wanted = True
            while True:
                work()
        except KeyboardInterrupt:
            self.hits += 1

    def stop(self) -> None:
        """End the thread."""
        self._is_over = True
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over:
            time.sleep(self._random.uniform(0, self._most_delay_s))
            if self._is_wanted:
                self._is_wanted = False
                os.kill(os.getpid(), signal.SIGINT)


# -- programs -----------------------------------------------------------------------------------------------------

_PREAMBLE = """
import itertools, json, os, signal, sys, threading, time
import numpy as np
import afield
from tests.helpers import *

# Whoever starts the tests in the background may have them ignore it, and so what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

def own_entries():
    from afield.runtime.calls import participation
    return len(participation.participant.process.table.entries)

def report(**facts):
    print(json.dumps(facts), flush=True)

def report_traces():
    report(**describe_traces())
"""


def describe_traces() -> dict[str, Any]:
    """Return the running session's traces as a program reports them to its test."""
    return asdict(traces())


class Program:
    """A driver program of its own, of which the test reads one JSON object per line."""

    def __init__(self, source: str, **environment: str) -> None:
        text = _PREAMBLE + textwrap.dedent(source)
        self.process = subprocess.Popen(
            [sys.executable, "-c", text],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid
        # Whoever reads from a program that hangs sees its end, and says so.
        self._guard = threading.Timer(HANG_S, self.process.kill)
        self._guard.daemon = True
        self._guard.start()

    def read(self) -> dict[str, Any]:
        """Return the next thing that the program reports."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            _, error = self.process.communicate(timeout=HANG_S)
            raise AssertionError(f"the program ended with status {self.process.returncode}:\n{error}")
        facts: dict[str, Any] = json.loads(line)
        return facts

    def read_traces(self) -> Traces:
        """Return the traces that the program reports next."""
        return Traces(**self.read())

    def tell(self) -> None:
        """Let a program go on that waits in `input()`."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> tuple[int, str, str]:
        """Wait for the program's end; return its exit status, and the rest of its output and of its errors."""
        out, error = self.process.communicate(timeout=HANG_S)
        self._guard.cancel()
        return self.process.returncode, out, error


@contextmanager
def program(source: str, **environment: str) -> Iterator[Program]:
    """Run a driver program beside the test; it does not outlive the block."""
    started = Program(source, **environment)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.process.kill()
        started.end()


def take_descriptors() -> list[int]:
    """Take all descriptors that this process may have, of which there are few from here on; return them."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_files()) + 8, hard))
    taken = []
    with suppress(OSError):
        while True:
            taken.append(os.dup(2))
    return taken


class MeetingLock:
    """A process's lock, which says that the main thread comes for it."""

    def __init__(self, lock: Any, came: threading.Event) -> None:
        self._lock, self._came = lock, came

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._came.set()
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()
