"""What a long life must not cost: no leaks over many sessions and connections, threads, forks, idle processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import numpy as np
import psutil
import pytest

import afield
from afield.runtime.face import api
from tests.helpers import (
    HANG_S,
    Traces,
    assert_gone,
    no_leaks,
    open_files,
    poll,
    process_named,
    processes,
    program,
    traces,
)

PATIENCE_S = 30.0


@pytest.mark.slow(5)
def test_ten_sessions_in_one_process_leak_nothing(no_runtime: None) -> None:
    def round_trip() -> Traces:
        afield.init(num_cpus=1)
        session = traces()
        assert afield.get(afield.remote(lambda x: x).remote(np.ones(1 << 20))).sum() == 1 << 20
        afield.shutdown()
        return session

    with no_leaks():
        round_trip()
    files, threads = open_files(), threading.active_count()
    with no_leaks():
        sessions = [round_trip() for _ in range(10)]
    assert len(open_files()) <= len(files)
    assert threading.active_count() <= threads
    for session in sessions:
        assert_gone(session)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_many_connections_leak_no_descriptors(runtime: afield.ClusterInfo) -> None:
    class Local:
        def work(self) -> int:
            return os.getpid()

    def generation() -> None:
        actors = [afield.remote(Local).remote() for _ in range(4)]
        afield.get([actor.work.remote() for actor in actors], timeout=PATIENCE_S)
        for actor in actors:
            afield.kill(actor)

    generation()
    node = psutil.Process(process_named(traces(), "afield-node"))
    poll(lambda: len(api.query("workers")) <= 3)
    mine, of_node = len(open_files()), node.num_fds()
    for _ in range(4):
        generation()
    assert poll(lambda: len(open_files()) <= mine and node.num_fds() <= of_node), (open_files(), node.num_fds())


@pytest.mark.slow
def test_a_forked_child_does_not_disturb_its_parent() -> None:
    source = """
    afield.init(num_cpus=2)
    square = afield.remote(lambda x: x * x)
    ref = afield.put(np.ones(1 << 20))
    afield.get(square.remote(1))
    pid = os.fork()
    if pid == 0:
        was_initialized = afield.is_initialized()
        del ref
        afield.shutdown()
        os._exit(3 if was_initialized else 0)
    status = os.waitpid(pid, 0)[1]
    pid = os.fork()
    if pid == 0:
        sys.exit(0)  # with all the handlers that run at the end of an interpreter
    os.waitpid(pid, 0)
    report(status=status, values=afield.get([square.remote(i) for i in range(100)], timeout=30)[-1])
    report(total=float(afield.get(ref).sum()))
    """
    with program(source) as driver:
        assert driver.read() == {"status": 0, "values": 99 * 99}
        assert driver.read() == {"total": float(1 << 20)}
        assert driver.end()[0] == 0


@pytest.mark.slow
def test_a_forked_child_may_have_a_runtime_of_its_own() -> None:
    source = """
    afield.init(num_cpus=1)
    afield.get(afield.remote(lambda: 1).remote())
    pid = os.fork()
    if pid == 0:
        afield.init(num_cpus=1)
        value = afield.get(afield.remote(lambda: 7).remote(), timeout=30)
        afield.shutdown()
        os._exit(value)
    report(status=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    report(value=afield.get(afield.remote(lambda: 2).remote(), timeout=30))
    """
    with program(source) as driver:
        assert driver.read() == {"status": 7}
        assert driver.read() == {"value": 2}
        assert driver.end()[0] == 0


def test_sixteen_threads_submit_at_once(runtime: afield.ClusterInfo) -> None:
    add = afield.remote(lambda x, y: x + y)

    class Local:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def note(self, who: int, i: int) -> int:
            self.seen.append((who, i))
            return i

        def read(self) -> list[Any]:
            return self.seen

    actor = afield.remote(Local).remote()
    failures: list[BaseException] = []

    def work(who: int) -> None:
        try:
            for i in range(5):
                refs = [add.remote(who, afield.put(j)) for j in range(20)]
                assert afield.get(refs, timeout=HANG_S) == [who + j for j in range(20)]
                assert afield.get(actor.note.remote(who, i), timeout=HANG_S) == i
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(who,)) for who in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    assert not failures and not any(thread.is_alive() for thread in threads)
    seen = afield.get(actor.read.remote())
    for who in range(16):
        assert [i for w, i in seen if w == who] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_idle_processes_use_no_cpu(runtime: afield.ClusterInfo) -> None:
    class Local:
        def work(self) -> None:
            pass

    actor = afield.remote(Local).remote()
    afield.get([actor.work.remote(), afield.remote(lambda: None).remote()])
    ref = afield.remote(lambda: time.sleep(30)).remote()  # one worker sleeps inside a task
    with pytest.raises(afield.GetTimeoutError):
        afield.get(ref, timeout=0.5)  # until leases are back and threads asleep
    family = [psutil.Process(pid) for pid in (os.getpid(), *processes(traces()))]

    def used() -> list[float]:
        return [sum(process.cpu_times()[:2]) for process in family]

    before = used()
    time.sleep(1)
    extra = {process.pid: after - b for process, b, after in zip(family, before, used(), strict=True)}
    assert sum(extra.values()) < 0.1, extra


def test_a_program_that_computes_is_still_answered(runtime: afield.ClusterInfo) -> None:
    """The driver owns what others wait for; it answers while its own code runs and calls nothing of afield."""

    class Reader:
        def read(self, boxed: list[Any]) -> Any:
            value = afield.get(boxed[0])
            self.value = value
            return value

        def has_read(self) -> Any:
            return self.value

    release = threading.Event()

    @afield.remote
    def late() -> int:
        time.sleep(0.1)
        return 5

    reader = afield.remote(Reader).remote()
    reader.read.remote([late.remote()])
    second = afield.remote(Reader).remote()
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        sum(range(1000))
    release.set()
    assert afield.get(reader.has_read.remote(), timeout=0.5) == 5
    assert second is not None
