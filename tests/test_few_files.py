"""Processes that run out of file descriptors: connections wait, or fail with an error that says so; the session goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import afield
from afield.errors import TaskUnschedulableError
from afield.transport.channel import Channel
from afield.transport.endpoint import ACCEPT_PAUSE_S, Endpoint
from afield.transport.loop import Loop
from afield.transport.shortage import PAUSE_S, PRINT_EVERY_S, Shortage
from tests.helpers import poll, program

HANG_S = 60.0


def process_called(name: str) -> psutil.Process:
    """A process of this session."""
    [found] = [child for child in psutil.Process().children(recursive=True) if child.name() == name]
    return found


@contextlib.contextmanager
def few_files(pid: int, spare: int) -> Iterator[None]:
    """Let a process open only so many more files."""
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    listed = os.listdir(f"/proc/{pid}/fd")  # with our own of the listing itself, if it is us
    used = {int(number) for number in listed if os.path.exists(f"/proc/{pid}/fd/{number}")}
    free = [number for number in range(max(used) + spare + 2) if number not in used]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free[spare], limits[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


@afield.remote(num_cpus=0)
class Local:
    """An actor, which is a process with a connection of its own."""

    def pid(self) -> int:
        """Return which."""
        return os.getpid()

    def get(self, refs: list[object]) -> object:
        """Read what another process owns."""
        return afield.get(refs[0])


@pytest.mark.slow
def test_a_daemon_without_files_survives_the_need_of_a_mapping(runtime: afield.ClusterInfo) -> None:
    """Each process has a row in shared memory of which 64 are mapped at once, and a mapping costs a descriptor."""
    first = Local.remote()
    afield.get(first.pid.remote(), timeout=HANG_S)
    with few_files(process_called("afield-node").pid, 0):
        failed = 0
        while failed < 24:  # each fails after three attempts, and each attempt takes a row
            for ref in [Local.remote().pid.remote() for _ in range(8)]:
                with contextlib.suppress(afield.ActorDiedError):
                    afield.get(ref, timeout=HANG_S)
                    continue
                failed += 1
        with pytest.raises(afield.ActorDiedError, match=r"node daemon ran out of file descriptors.*ulimit -n"):
            afield.get(Local.remote().pid.remote(), timeout=HANG_S)
        afield.get(first.pid.remote(), timeout=HANG_S)
    poll(lambda: afield.get(Local.remote().pid.remote(), timeout=HANG_S))


@pytest.mark.parametrize("spare", [0, 1, 2, 5])
def test_a_daemon_without_files_serves_those_that_it_has(runtime: afield.ClusterInfo, spare: int) -> None:
    first = [Local.remote() for _ in range(2)]
    afield.get([actor.pid.remote() for actor in first], timeout=HANG_S)
    with few_files(process_called("afield-node").pid, spare):
        if spare < 2:  # not enough for what a worker prints, and says
            with pytest.raises(afield.ActorDiedError, match=r"node daemon ran out of file descriptors.*ulimit -n"):
                afield.get(Local.remote().pid.remote(), timeout=HANG_S)
        refs = [Local.remote().pid.remote() for _ in range(4)] + [afield.remote(lambda: 1).remote()]
        for ref in refs:
            with contextlib.suppress(afield.ActorDiedError, TaskUnschedulableError):
                afield.get(ref, timeout=HANG_S)
        afield.get([actor.pid.remote() for actor in first], timeout=HANG_S)
    more = [Local.remote() for _ in range(3)]
    assert len(set(afield.get([actor.pid.remote() for actor in more], timeout=HANG_S))) == 3


class Pair:
    """A process that listens and one that connects to it, on one loop; the errors and the channels of both."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.errors: list[OSError] = []
        self.ready: list[Channel] = []
        self.server, self.client = self._endpoint(b"server!!"), self._endpoint(b"client!!")
        self.name = f"afield-test-{os.getpid()}-{time.monotonic_ns()}"
        self.server.listen(self.name)

    def _endpoint(self, process_id: bytes) -> Endpoint:
        return Endpoint(
            self.loop,
            b"t" * 32,
            process_id,
            lambda data: [],
            lambda channel, messages: None,
            lambda channel: None,
            on_ready=self.ready.append,
            on_error=self.errors.append,
        )

    def both_are_ready(self) -> bool:
        """Wait until each has its channel."""
        deadline = time.monotonic() + HANG_S
        while len(self.ready) < 2 and time.monotonic() < deadline:
            self.loop.step(1.0)
        return len(self.ready) == 2


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two endpoints."""
    made = Pair()
    yield made
    made.client.close()
    made.server.close()
    made.loop.close()


def test_who_cannot_accept_sleeps_and_accepts_later(pair: Pair) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        began = time.monotonic()
        with few_files(os.getpid(), 0):
            peer.connect("\0" + pair.name)
            steps = 0
            while len(pair.errors) < 4:
                pair.loop.step(HANG_S)
                steps += 1
        assert steps <= 2 * len(pair.errors)  # the listener, and the clock
        assert time.monotonic() - began >= 3 * ACCEPT_PAUSE_S
        assert {error.errno for error in pair.errors} == {errno.EMFILE}
    pair.client.open(pair.name)
    assert pair.both_are_ready() and len(pair.errors) == 4


def test_a_patient_channel_gets_its_socket_later(pair: Pair) -> None:
    with few_files(os.getpid(), 0):
        with pytest.raises(OSError, match="Too many open files"):
            pair.client.open(pair.name)
        channel = pair.client.open(pair.name, patient=True)
        while len(pair.errors) < 5:
            pair.loop.step(HANG_S)
    assert pair.both_are_ready() and channel in pair.ready


def test_a_worker_without_files_is_reached_later(shared_runtime: None, tmp_path: Path) -> None:
    @afield.remote(num_cpus=0)
    class Full:
        async def fill(self) -> int:
            used = max(map(int, os.listdir("/proc/self/fd")))
            self.limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 10, self.limits[1]))
            self.taken: list[int] = []
            with contextlib.suppress(OSError):
                while True:
                    self.taken.append(os.dup(2))
            return len(self.taken)

        async def free(self) -> None:
            for fd in self.taken:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, self.limits)

    @afield.remote(num_cpus=0)
    class Caller:
        async def call(self, other: Any, path: str) -> Any:
            ref = other.fill.remote()
            Path(path).touch()
            return await ref

    full, caller = Full.remote(), Caller.remote()
    assert afield.get(full.fill.remote(), timeout=HANG_S) > 0
    answer = caller.call.remote(full, str(tmp_path / "called"))
    assert poll((tmp_path / "called").exists)
    assert afield.wait([answer], timeout=0.3)[0] == []
    afield.get(full.free.remote(), timeout=HANG_S)
    assert afield.get(answer, timeout=HANG_S) > 0


@pytest.mark.slow
def test_a_driver_without_files_reaches_them_later() -> None:
    source = textwrap.dedent("""
        import resource, threading
        afield.init(num_cpus=4)

        @afield.remote(num_cpus=0)
        class Local:
            def pid(self):
                return os.getpid()

            def get(self, refs):
                return afield.get(refs[0])

        @afield.remote
        def task(number):
            return number

        @afield.remote
        def of_driver(refs):
            return afield.get(refs[0])

        first = Local.remote()
        afield.get(first.pid.remote())
        taken = take_descriptors()
        actors = [Local.remote() for _ in range(3)]
        refs = [actor.pid.remote() for actor in actors]
        refs += [task.remote(i) for i in range(100)]
        refs += [of_driver.remote([afield.put(5)])]
        refs += [actor.get.remote([afield.put(6)]) for actor in actors]
        ready, rest = afield.wait(refs, num_returns=len(refs), timeout=1)
        alive = afield.get(first.pid.remote(), timeout=60) > 0
        for fd in taken:
            os.close(fd)
        values = afield.get(refs, timeout=60)
        report(waited=len(rest) > 0, alive=alive, pids=len(set(values[:3])), rest=values[3:] == [*range(100), 5, 6, 6, 6])
    """)
    with program(source) as driver:
        facts = driver.read()
    assert facts == {"waited": True, "alive": True, "pids": 3, "rest": True}


@pytest.mark.slow(8)
def test_a_driver_that_stays_without_files_fails_what_it_cannot_reach() -> None:
    source = textwrap.dedent("""
        afield.init(num_cpus=1)

        @afield.remote(num_cpus=0)
        class Local:
            def pid(self):
                return os.getpid()

        first = Local.remote()
        afield.get(first.pid.remote())
        taken = take_descriptors()
        said = []
        second = Local.remote()
        task = afield.remote(num_cpus=0.5)(lambda: 1)
        for ref in [second.pid.remote(), task.remote()]:
            try:
                afield.get(ref, timeout=60)
            except afield.AfieldError as error:
                said.append([type(error).__name__, "ulimit -n" in str(error)])
        alive = afield.get(first.pid.remote(), timeout=60) > 0
        for fd in taken:
            os.close(fd)
        report(said=said, alive=alive, later=[afield.get(second.pid.remote()) > 0, afield.get(task.remote())])
    """)
    with program(source) as driver:
        facts = driver.read()
    assert facts == {
        "said": [["ActorUnavailableError", True], ["TaskUnschedulableError", True]],
        "alive": True,
        "later": [True, 1],
    }


def test_it_is_said_once_a_minute_and_a_pause_begins_anew() -> None:
    now = 100.0
    said: list[str] = []
    shortage = Shortage("somebody", lambda: now, said.append)
    error = OSError(24, "Too many open files")
    assert shortage.met(error) == 0.0
    for _ in range(10):
        now += PAUSE_S
        lasted = shortage.met(error)
    assert lasted == 10 * PAUSE_S and len(said) == 1
    now += 2 * PAUSE_S
    assert shortage.met(error) == 0.0 and len(said) == 1
    now = 100.0 + PRINT_EVERY_S
    shortage.met(error)
    assert len(said) == 2 and "somebody ran out of file descriptors" in said[0] and "ulimit -n" in said[0]
