"""Real processes: however one of them ends, the others settle it, and nothing of a dead driver's session is left."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import afield
from tests.helpers import (
    HANG_S,
    assert_gone,
    leftovers,
    mappings,
    poll,
    process_named,
    processes,
    program,
    remote_with,
    segments,
    sockets,
    traces,
)

#: Most of them start a program or a runtime of their own.
pytestmark = pytest.mark.slow

PATIENCE_S = 30.0

#: A driver with work on the way: a task that runs long, an actor, values in the store, a task in the queue.
BUSY = """
afield.init(num_cpus=2)

@afield.remote
def long(path):
    open(path, "w").close()
    time.sleep(300)

@afield.remote
class Keeper:
    def keep(self, value):
        self.value = value

kept = afield.put(np.ones(1 << 20))
keeper = Keeper.remote()
afield.get(keeper.keep.remote(kept))
started = sys.argv[0] if False else os.environ["STARTED"]
refs = [long.remote(started) for _ in range(4)]
while not os.path.exists(started):
    time.sleep(0.002)
report_traces()
"""


def busy(end: str, tmp_path: Path) -> Any:
    """Run a driver with work on the way, and then `end`."""
    return program(BUSY + end, STARTED=str(tmp_path / "started"))


# -- how a session shows itself -----------------------------------------------------------------------------------


def test_the_traces_of_a_session_are_found(no_runtime: None) -> None:
    """The other tests look for what is left with the same functions; these must be able to find it."""
    afield.init(num_cpus=2)
    session = traces()
    afield.get(afield.remote(lambda: None).remote())
    # A process that was forked this moment is still called like the fork server.
    assert poll(lambda: list(processes(session).values()).count("afield-worker") >= 2)
    assert {"afield-fork", "afield-node"} <= set(processes(session).values())
    assert len(sockets(session)) >= 4  # of the driver, the daemon and the workers
    assert f"{os.getpid()} (mapped)" in segments(session)
    assert mappings(session, os.getpid())
    assert os.path.isdir(session.directory)
    assert len(leftovers(session)) >= 8
    afield.shutdown()
    assert not processes(session) and not sockets(session) and not os.path.exists(session.directory)


def test_the_directory_is_ours_alone(runtime: afield.ClusterInfo) -> None:
    directory = traces().directory
    assert os.stat(directory).st_mode & 0o777 == 0o700
    assert os.stat(os.path.join(directory, "token")).st_mode & 0o777 == 0o600


def test_files_go_where_the_user_says(no_runtime: None, tmp_path: Path) -> None:
    afield.init(num_cpus=1, spill_dir=str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 1
    afield.shutdown()
    assert not list(tmp_path.iterdir())


# -- the driver ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("", 0),
        ("afield.shutdown()", 0),
        ("raise ValueError('the driver failed')", 1),
        ("sys.exit(5)", 5),
        ("os._exit(6)", 6),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("threading.Thread(target=os.abort).start(); time.sleep(60)", -signal.SIGABRT),
    ],
    ids=["exit", "shutdown", "exception", "sys.exit", "os._exit", "SIGTERM", "SIGKILL", "abort"],
)
def test_nothing_is_left_of_a_driver_that_ended(end: str, status: int, tmp_path: Path) -> None:
    quiet = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); "
    with busy(quiet + end, tmp_path) as driver:
        session = driver.read_traces()
        assert driver.end()[0] == status
        assert_gone(session)


def test_nothing_is_left_of_a_driver_that_is_killed_while_it_waits(tmp_path: Path) -> None:
    with busy("afield.get(refs)", tmp_path) as driver:
        session = driver.read_traces()
        assert len(processes(session)) >= 5
        os.kill(driver.pid, signal.SIGKILL)
        driver.end()
        assert_gone(session)


def test_nothing_is_left_when_a_forked_child_outlives_the_driver(tmp_path: Path) -> None:
    """A child by `os.fork` holds copies of the driver's descriptors; they must not keep the session alive."""
    end = """
if os.fork() == 0:
    os.close(0), os.close(1), os.close(2)
    time.sleep(20)
    os._exit(0)
report()
os.kill(os.getpid(), signal.SIGKILL)
"""
    with busy(end, tmp_path) as driver:
        session = driver.read_traces()
        driver.read()
        driver.end()
        # The child still maps the shared memory, as it would any other memory of its parent.
        assert_gone(session, memory=False)


def test_a_program_of_the_driver_does_not_keep_the_session_alive(tmp_path: Path) -> None:
    end = """
import subprocess
child = subprocess.Popen(["sleep", "20"], close_fds=False, stdin=-3, stdout=-3, stderr=-3)
report(child=child.pid)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with busy(end, tmp_path) as driver:
        session = driver.read_traces()
        child = driver.read()["child"]
        try:
            driver.end()
            assert_gone(session)
        finally:
            os.kill(child, signal.SIGKILL)


def test_an_unhandled_ctrl_c_ends_the_driver(tmp_path: Path) -> None:
    with busy("afield.get(refs)", tmp_path) as driver:
        session = driver.read_traces()
        time.sleep(0.05)
        os.kill(driver.pid, signal.SIGINT)
        status, _, error = driver.end()
        assert status == -signal.SIGINT and "KeyboardInterrupt" in error
        assert_gone(session)


# -- Ctrl-C -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wait",
    [
        "afield.get(ref)",
        "afield.get([ref])",
        "afield.wait([ref])",
        "afield.get(ref, timeout=50)",
        "afield.put(full[:9 << 20])",  # waits for room, in the middle of a transition
        "time.sleep(50)",
    ],
)
def test_the_runtime_is_usable_after_ctrl_c(wait: str) -> None:
    source = f"""
    afield.init(num_cpus=2, host_memory="16MiB")
    full = afield.get(afield.put(np.ones(12 << 20, "u1")))
    ref = afield.remote(lambda: time.sleep(100)).remote()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    try:
        {wait}
    except KeyboardInterrupt:
        report(after=time.monotonic() - started)
    report(value=afield.get(afield.remote(lambda: 42).remote(), timeout=30))
    pending = afield.wait([ref], timeout=0)[1] == [ref]
    report(pending=pending)
    """
    with program(source) as driver:
        assert driver.read()["after"] < 5
        assert driver.read()["value"] == 42
        assert driver.read()["pending"]
        assert driver.end()[0] == 0


def test_ctrl_c_at_any_moment_leaves_the_state_whole() -> None:
    """Interrupts hit submissions, puts and gets; afterwards all that was not interrupted is right and the store is empty."""
    source = """
    afield.init(num_cpus=2)
    add = afield.remote(lambda x, y: x + y)
    big = afield.remote(lambda: np.ones(50_000))

    def work():
        refs = [add.remote(afield.put(i), i) for i in range(20)]
        assert afield.get(refs) == [2 * i for i in range(20)]
        assert afield.get(big.remote()).sum() == 50_000

    interrupter = Interrupter()
    while interrupter.hits < 200:
        interrupter.until_interrupted(work)
    interrupter.stop()
    value = afield.get(add.remote(1, 2), timeout=30)
    books = poll(lambda: afield.runtime.face.api.query("store")["sealed"] == 0)
    report(hits=interrupter.hits, value=value, empty=books, entries=own_entries())
    """
    with program(source) as driver:
        facts = driver.read()
        status, _, error = driver.end()
    assert facts["hits"] == 200 and facts["value"] == 3, facts
    assert facts["empty"], facts
    assert status == 0, error


def test_ctrl_c_at_any_moment_leaves_no_pin_and_no_promise() -> None:
    """Interrupts hit reads of values that have to be brought from a device, and puts of device arrays."""
    source = """
    afield.init(num_cpus=1, devices="emulated:1:32MiB", host_memory="32MiB")
    cp = afield.array_module()
    refs = [afield.put(cp.full(1 << 20, number, "u1")) for number in range(20)]
    numbers = itertools.cycle(range(20))

    def read():
        number = next(numbers)
        assert int(afield.get(refs[number])[0]) == int(afield.get(refs[number], device=0)[0].get()) == number
        afield.put([cp.ones(1000), np.ones(200_000)])

    interrupter = Interrupter()
    while interrupter.hits < 200:
        interrupter.until_interrupted(read)
    interrupter.stop()
    refs = None
    tiers = lambda: afield.runtime.face.api.query("store")["tiers"].values()
    report(hits=interrupter.hits, empty=poll(lambda: not any(tier["sealed"] or tier["moving"] for tier in tiers())))
    """
    with program(source) as driver:
        facts = driver.read()
        status, _, error = driver.end()
    assert facts["hits"] == 200 and facts["empty"], facts
    assert status == 0 and "ignored" not in error, error


def test_a_driver_that_a_task_has_started_is_no_worker() -> None:
    """It inherits the variables of the worker."""
    source = """
    afield.init(num_cpus=1, devices="emulated:1:8MiB")
    report(total=int(afield.array_module().ones(10).sum()))
    """
    inherited = {"AFIELD_WORKER": "00", "AFIELD_VISIBLE_DEVICES": "", "AFIELD_DEVICE_BACKEND": "emulated:nowhere"}
    with program(source, **inherited) as driver:
        assert driver.read()["total"] == 10
        assert driver.end()[0] == 0


def test_workers_do_not_see_the_drivers_ctrl_c() -> None:
    """The terminal sends SIGINT to the whole foreground group; tasks go on."""
    source = """
    afield.init(num_cpus=1)
    ref = afield.remote(lambda: [time.sleep(0.5), "done"][1]).remote()
    time.sleep(0.1)
    try:
        os.killpg(os.getpgrp(), signal.SIGINT)
        time.sleep(10)
    except KeyboardInterrupt:
        pass
    report(value=afield.get(ref, timeout=30))
    """
    with program("    os.setpgid(0, 0)\n" + source) as driver:
        assert driver.read()["value"] == "done"
        assert driver.end()[0] == 0


# -- the runtime's own processes are killed -----------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["afield-node", "afield-fork"])
def test_the_node_s_end_is_an_error_and_leaves_nothing(no_runtime: None, victim: str) -> None:
    afield.init(num_cpus=2)
    session = traces()

    class Local:
        def work(self) -> None:
            time.sleep(300)

    actor = afield.remote(Local).remote()
    pending = [afield.remote(lambda: time.sleep(300)).remote(), actor.work.remote()]
    done = afield.put(np.ones(1 << 20))
    threading.Timer(0.2, os.kill, (process_named(session, victim), signal.SIGKILL)).start()
    for ref in pending:
        with pytest.raises(afield.RuntimeDiedError, match=r"shutdown\(\) and afield\.init\(\)"):
            afield.get(ref, timeout=PATIENCE_S)
    uses: list[Any] = [
        lambda: afield.remote(lambda: 1).remote(),
        lambda: actor.work.remote(),
        lambda: afield.put(1),
        lambda: afield.cluster_resources(),
        lambda: afield.empty(1 << 24),
    ]
    for use in uses:
        with pytest.raises(afield.RuntimeDiedError):
            use()
    assert afield.get(done).sum() == 1 << 20  # what is mapped here can still be read
    poll(lambda: not processes(session), 5)
    assert not processes(session)
    afield.shutdown()
    assert_gone(session, memory=False)
    afield.init(num_cpus=1)
    assert afield.get(afield.remote(lambda: 1).remote(), timeout=PATIENCE_S) == 1


@pytest.mark.parametrize("victim", ["afield-node", "afield-fork"])
def test_a_driver_ends_well_after_the_nodes_end(victim: str, tmp_path: Path) -> None:
    end = f"""
os.kill(process_named(traces(), "{victim}"), signal.SIGKILL)
try:
    afield.get(refs)
except afield.RuntimeDiedError:
    report()
"""
    with busy(end, tmp_path) as driver:
        session = driver.read_traces()
        driver.read()
        status, _, error = driver.end()
        assert status == 0, error
        assert_gone(session)


def test_an_idle_worker_that_is_killed_is_replaced(runtime: afield.ClusterInfo) -> None:
    square = afield.remote(lambda x: x * x)
    for _ in range(3):
        for pid, name in processes(traces()).items():
            if name == "afield-worker":
                os.kill(pid, signal.SIGKILL)
        assert afield.get([square.remote(i) for i in range(50)], timeout=HANG_S) == [i * i for i in range(50)]


def test_a_worker_killed_while_it_works_has_its_tasks_run_again(runtime: afield.ClusterInfo, tmp_path: Path) -> None:
    @afield.remote
    def work(i: int) -> int:
        if i % 50 == 7:
            with open(tmp_path / str(i), "a") as file:
                file.write(f"{os.getpid()}\n")
                file.flush()
            if (tmp_path / str(i)).read_text().count("\n") == 1:
                time.sleep(60)
        return i

    refs = [work.remote(i) for i in range(200)]
    for i in (7, 57, 107, 157):
        path = tmp_path / str(i)
        assert poll(lambda: path.exists() and path.read_text().endswith("\n"), PATIENCE_S)  # noqa: B023 - called at once
        os.kill(int(path.read_text().split()[0]), signal.SIGKILL)
    assert afield.get(refs, timeout=HANG_S) == list(range(200))
    assert afield.stats()["tasks_retried"] >= 4


def test_a_parent_whose_child_task_s_worker_dies(runtime: afield.ClusterInfo, tmp_path: Path) -> None:
    @remote_with(max_retries=0)
    def child() -> None:
        os._exit(1)

    @afield.remote
    def parent() -> str:
        try:
            afield.get(child.remote())
        except afield.WorkerCrashedError as error:
            return str(error)
        return ""

    assert "child() died" in afield.get(parent.remote(), timeout=HANG_S)


def test_children_of_a_killed_parent_end_with_it(runtime: afield.ClusterInfo, tmp_path: Path) -> None:
    @afield.remote
    def child() -> None:
        (tmp_path / "child").write_text(str(os.getpid()))
        time.sleep(300)

    @remote_with(max_retries=0)
    def parent() -> None:
        (tmp_path / "parent").write_text(str(os.getpid()))
        afield.get(child.remote())

    ref = parent.remote()
    assert poll(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text(), PATIENCE_S)
    os.kill(int((tmp_path / "parent").read_text()), signal.SIGKILL)
    with pytest.raises(afield.WorkerCrashedError, match="SIGKILL"):
        afield.get(ref, timeout=PATIENCE_S)
    pid = int((tmp_path / "child").read_text())
    assert poll(lambda: pid not in processes(traces()), 5)
    assert poll(lambda: afield.available_resources().get("CPU", 0) == 2, PATIENCE_S)


def test_a_stopped_worker_ends_with_its_session(no_runtime: None, tmp_path: Path) -> None:
    afield.init(num_cpus=1)
    session = traces()

    @afield.remote
    def stop() -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)

    stop.remote()
    assert poll((tmp_path / "pid").exists)
    afield.shutdown()
    assert_gone(session, memory=False)


def test_processes_that_a_task_left_behind_do_not_hold_shutdown_up(no_runtime: None) -> None:
    afield.init(num_cpus=1)
    session = traces()

    @afield.remote
    def spawn() -> int:
        import subprocess

        return subprocess.Popen(["sleep", "300"], close_fds=False).pid

    pid = afield.get(spawn.remote())
    started = time.monotonic()
    afield.shutdown()
    assert time.monotonic() - started < 30
    if psutil.pid_exists(pid):  # a program of the user's own; not ours to end, but it holds nothing of ours
        os.kill(pid, signal.SIGKILL)
    assert_gone(session, memory=False)


def test_a_stopped_fork_server_outlives_no_driver(tmp_path: Path) -> None:
    with busy("afield.get(refs)", tmp_path) as driver:
        session = driver.read_traces()
        os.kill(session.fork_server, signal.SIGSTOP)
        os.kill(driver.pid, signal.SIGKILL)
        driver.end()
        assert_gone(session)
