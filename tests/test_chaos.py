"""Wrong use and bad luck that once broke the runtime: copies by `os.fork`, Ctrl-C in odd places, limits of the system.

Theory of operation. Each test is a small program of a user's, run as a process of its own where it would endanger the test
process. It fails if the program hangs, ends with the wrong error, or leaves something behind. The last tests are random, with
fixed seeds: they end processes while work of all kinds is on the way.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from typing import Any

import pytest

import afield
from afield.runtime.face import lifecycle
from afield.runtime.session import bootstrap
from tests.helpers import HANG_S, Traces, assert_gone, poll, processes, program, traces

#: Most of them start a program or a runtime of their own.
pytestmark = pytest.mark.slow

PATIENCE_S = 30.0


def run(source: str) -> dict[str, Any]:
    """Return what a program reports, which must end well."""
    with program(source) as driver:
        facts = driver.read()
        status, _, error = driver.end()
    assert status == 0, error
    return facts


# -- copies made by os.fork ---------------------------------------------------------------------------------------


@afield.remote(max_retries=0)
def fork_and(what: str) -> int:
    """Return the exit status of a copy of the worker that returns from this function in its own way."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if what == "exit":
        raise SystemExit(7)
    if what == "raise":
        raise ValueError("in the copy")
    if what == "use afield":
        return int(afield.get(afield.put(3)))
    return 5


@pytest.mark.parametrize(("what", "status"), [("return", 0), ("exit", 7), ("raise", 1), ("use afield", 1)])
def test_a_copy_of_a_worker_that_leaves_its_task_ends(shared_runtime: None, what: str, status: int) -> None:
    """It once went on as a second worker on the same sockets, and both hung."""
    assert afield.get(fork_and.remote(what), timeout=PATIENCE_S) == status
    assert afield.get(fork_and.remote("return"), timeout=PATIENCE_S) == 0


@afield.remote(max_concurrency=2)
class Threaded:
    """An actor with threads."""

    def fork(self) -> int | None:
        """Let a copy of the worker leave this call."""
        pid = os.fork()
        return os.waitpid(pid, 0)[1] if pid else None


@afield.remote
class Asynchronous:
    """An actor with an event loop."""

    async def fork(self) -> int | None:
        """Let a copy of the worker leave this call."""
        pid = os.fork()
        return os.waitpid(pid, 0)[1] if pid else None


@pytest.mark.parametrize("kind", [Threaded, Asynchronous])
def test_a_copy_of_an_actor_that_leaves_its_call_ends(shared_runtime: None, kind: Any) -> None:
    assert afield.get(kind.remote().fork.remote(), timeout=PATIENCE_S) == 0


def test_what_tasks_have_started_ends_with_the_session(no_runtime: None) -> None:
    afield.init(num_cpus=1)
    session = traces()

    @afield.remote
    def start() -> int:
        pid = os.fork()
        if not pid:
            time.sleep(300)
            os._exit(0)
        return pid

    pid = afield.get(start.remote(), timeout=PATIENCE_S)
    assert pid in processes(session)
    afield.shutdown()
    assert_gone(session, memory=False)


def test_a_copy_of_the_driver_is_told_that_it_has_no_part() -> None:
    """It once started a session of its own at the first use, and said that the ref belonged to one that was shut down."""
    facts = run("""
    afield.init(num_cpus=1)
    echo = afield.remote(lambda value: value)
    ref = echo.remote(3)
    read, write = os.pipe()
    if os.fork() == 0:
        said = []
        for use in (lambda: afield.get(ref), lambda: echo.remote(1), lambda: afield.put(1)):
            try:
                use()
            except afield.NotInitializedError as error:
                said.append("forked" in str(error))
        afield.init(num_cpus=1)
        said.append(afield.get(echo.remote("own")))
        afield.shutdown()
        os.write(write, json.dumps(said).encode())
        os._exit(0)
    os.wait()
    report(said=json.loads(os.read(read, 1000)), value=afield.get(ref, timeout=30))
    """)
    assert facts == {"said": [True, True, True, "own"], "value": 3}


# -- starting and ending ------------------------------------------------------------------------------------------


def test_the_first_uses_of_several_threads_start_one_runtime(no_runtime: None) -> None:
    facts = run(
        """
    barrier, names = threading.Barrier(6), []

    def use():
        barrier.wait()
        afield.put(1)
        names.append(afield.runtime.face.lifecycle._session.name)

    threads = [threading.Thread(target=use) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    children = [name for name in os.listdir("/proc") if name.isdigit() and parent_of(name) == os.getpid()]
    report(names=len(set(names)), children=len(children))
    """.replace(
            "barrier,",
            "parent_of = lambda pid: int(open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[1])\n    barrier,",
            1,
        )
    )
    assert facts == {"names": 1, "children": 1}


def test_threads_that_use_a_runtime_while_it_ends_get_errors_of_ours(no_runtime: None) -> None:
    echo = afield.remote(lambda value: value)
    wrong: list[str] = []
    stop = threading.Event()

    def use() -> None:
        while not stop.is_set():
            try:
                assert afield.get(echo.remote(1)) == 1
                afield.wait([echo.remote(afield.put(i)) for i in range(5)], num_returns=5)
            except afield.AfieldError:
                pass
            except BaseException:
                wrong.append(traceback.format_exc())

    threads = [threading.Thread(target=use) for _ in range(4)]
    for _ in range(3):
        afield.init(num_cpus=1, ignore_reinit_error=True)
        if not threads[0].ident:
            for thread in threads:
                thread.start()
        time.sleep(0.1)
        afield.shutdown()
    stop.set()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert not wrong, "".join(wrong)


def test_a_spill_dir_that_cannot_be_used_is_named(no_runtime: None) -> None:
    with pytest.raises(afield.InvalidOptionError, match=r"spill_dir='/nonexistent/x'.*can write to"):
        afield.init(num_cpus=1, spill_dir="/nonexistent/x")


def test_a_deleted_working_directory_is_no_obstacle(tmp_path: Any) -> None:
    where = tmp_path / "gone"
    where.mkdir()
    facts = run(f"""
    os.chdir({str(where)!r})
    os.rmdir({str(where)!r})
    afield.init(num_cpus=1)
    report(value=afield.get(afield.remote(lambda: 5).remote(), timeout=30))
    """)
    assert facts == {"value": 5}


def test_many_cpus_do_not_start_as_many_workers(no_runtime: None) -> None:
    afield.init(num_cpus=100_000)
    assert afield.get(afield.remote(lambda: 1).remote(), timeout=PATIENCE_S) == 1
    assert len(processes(traces())) < 100


@pytest.mark.parametrize(("soft", "hard"), [(8, 8), (24, 24), (24, 4096)], ids=["start", "daemon", "driver"])
def test_too_few_open_files_are_an_error_that_says_so(soft: int, hard: int, tmp_path: Any) -> None:
    facts = run(f"""
    import resource, tempfile
    tempfile.tempdir = {str(tmp_path)!r}
    resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
    actor = afield.remote(type("A", (), {{"f": lambda self: 1}}))
    try:
        afield.init(num_cpus=1)
        actors = [actor.remote() for _ in range(40)]
        afield.get([a.f.remote() for a in actors], timeout=30)
    except (afield.RuntimeDiedError, afield.ActorUnavailableError, afield.ActorDiedError) as error:
        report(said=str(error))
    """)
    assert "open files" in facts["said"] or "file descriptors" in facts["said"], facts
    assert "ulimit -n" in facts["said"] or "Errno 24" in facts["said"], facts
    assert poll(lambda: not os.listdir(tmp_path), 5.0), os.listdir(tmp_path)


def test_no_place_for_files_is_an_error_that_says_so() -> None:
    facts = run("""
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # so no directory passes the test of `tempfile`
    try:
        afield.init(num_cpus=1)
    except afield.RuntimeDiedError as error:
        report(said=str(error))
    """)
    assert "no place for its files" in facts["said"] and "spill_dir" in facts["said"], facts


def test_too_few_threads_are_an_error_that_says_so(tmp_path: Any) -> None:
    facts = run(f"""
    import tempfile, threading
    tempfile.tempdir = {str(tmp_path)!r}
    def fail(thread):
        raise RuntimeError("can't start new thread")
    threading.Thread.start = fail
    try:
        afield.init(num_cpus=1)
    except afield.RuntimeDiedError as error:
        report(said=str(error))
    """)
    assert "can't start new thread" in facts["said"] and "ulimit -u" in facts["said"], facts
    assert poll(lambda: not os.listdir(tmp_path), 5.0), os.listdir(tmp_path)


@pytest.mark.parametrize(("work", "over"), [("while True: pass", False), ("import time; time.sleep(60)", True)])
def test_a_start_is_waited_for_as_long_as_it_computes(work: str, over: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with dozens of busy processes for each CPU a start takes more than half a minute."""
    monkeypatch.setattr(bootstrap, "START_TIMEOUT_S", 0.5)
    monkeypatch.setattr(bootstrap, "_LOOK_S", 0.05)
    child = subprocess.Popen([sys.executable, "-c", work])
    try:
        time.sleep(0.5)  # what sleeps has started by now
        patience = bootstrap._Patience(child.pid)
        until = time.monotonic() + 1.5
        while time.monotonic() < until and not patience.is_over():
            time.sleep(0.01)
        assert patience.is_over() == over
        monkeypatch.setattr(patience, "_last", 0.0)
        assert patience.is_over()
    finally:
        child.kill()
        child.wait()


# -- signals ------------------------------------------------------------------------------------------------------


def test_sigpipe_with_its_default_action_does_not_end_the_driver() -> None:
    """Command line tools set it; a worker's death then once killed them."""
    facts = run("""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    afield.init(num_cpus=1)

    @afield.remote
    class Victim:
        def hello(self):
            return os.getpid()

    sys.setswitchinterval(1.0)
    died = 0
    for _ in range(10):
        victim = Victim.remote()
        pid = afield.get(victim.hello.remote())
        os.kill(pid, signal.SIGKILL)
        end = time.perf_counter() + 0.02
        while time.perf_counter() < end:
            pass  # its socket is closed by then, mostly, and no thread of ours has had the time to see it
        try:
            afield.get([victim.hello.remote() for _ in range(30)])
        except afield.ActorDiedError:
            died += 1
    report(died=died)
    """)
    assert facts["died"]


INTERRUPT = """
afield.init(num_cpus=1, host_memory="256MiB")
afield.get(afield.remote(lambda: 1).remote())
main = threading.main_thread().ident
large = np.ones(1_000_000)

def interrupts(work, times):
    '''Return how many of so many interrupts were raised while the work was done.'''
    raised = 0
    for index in range(times):
        timer = threading.Timer(0.005 + 0.0007 * index, signal.pthread_kill, (main, signal.SIGINT))
        try:
            timer.start()
            deadline = time.monotonic() + 10.0  # much more than a late timer needs
            while time.monotonic() < deadline:
                work()
        except KeyboardInterrupt:
            raised += 1
        timer.join()
    return raised
"""


def test_ctrl_c_is_not_lost_in_loops_that_never_wait() -> None:
    """Where a transition or `__del__` was interrupted, nobody raised it before the next blocking call."""
    source = """
    def put_and_get():
        for index in range(50):
            afield.get(afield.put(index))

    raised = interrupts(put_and_get, 30)
    afield.cluster_resources()  # a transition, which collects what was dropped
    report(raised=raised, entries=own_entries())
    """
    with program(INTERRUPT + "\n".join(line[4:] for line in source.splitlines())) as driver:
        facts = driver.read()
        status, _, error = driver.end()
    assert facts["raised"] == 30 and facts["entries"] < 10, facts
    assert status == 0 and "Exception ignored" not in error, error


def test_ctrl_c_in_put_of_large_arrays_loses_no_room() -> None:
    source = """
    raised = interrupts(lambda: afield.put(large), 20)
    gone = poll(lambda: afield.runtime.face.api.query("store")["used"] < 16 << 20)
    report(raised=raised, gone=bool(gone), store=afield.runtime.face.api.query("store"))
    """
    with program(INTERRUPT + "\n".join(line[4:] for line in source.splitlines())) as driver:
        facts = driver.read()
        assert driver.end()[0] == 0
    assert facts["raised"] == 20 and facts["gone"], facts


# -- random, with seeds -------------------------------------------------------------------------------------------

LOAD = """
import random
afield.init(num_cpus=2, host_memory="256MiB")
add = afield.remote(lambda x: x + 1)
ones = afield.remote(lambda n: np.ones(n, np.uint8))
total = afield.remote(lambda array: int(array.sum()))
stream = afield.remote(num_returns="streaming")(lambda n: (np.full(200_000, i, np.uint8) for i in range(n)))

@afield.remote
def nest(depth):
    return 0 if depth == 0 else 1 + afield.get(nest.remote(depth - 1))

@afield.remote(max_restarts=-1, max_task_retries=-1)
class Echo:
    def echo(self, value):
        return value

def cases(rng):
    size = rng.randrange(1, 1_000_000)
    yield lambda: afield.get([add.remote(i) for i in range(100)]) == list(range(1, 101))
    yield lambda: afield.get(total.remote(ones.remote(size))) == size
    yield lambda: afield.get(nest.remote(3)) == 3
    yield lambda: [afield.get(ref)[0] for ref in stream.remote(5)] == list(range(5))
    yield lambda: afield.get([echo.echo.remote(i) for i in range(30)]) == list(range(30))
    yield lambda: [ones.remote(300_000) for _ in range(4)] is not None

echo, rng, good, lost = Echo.remote(), random.Random(SEED), 0, 0
report_traces()
deadline, died = time.monotonic() + MOST_S, False
while time.monotonic() < deadline and not died:
    for case in cases(rng):
        try:
            assert case()
            good += 1
        except afield.RuntimeDiedError:
            died = True
            break
        except afield.exceptions.LossError:
            lost += 1
del echo, case
empty = died or poll(lambda: not afield.runtime.face.api.query("store")["objects"], 10.0)
report(good=good, lost=lost, died=died, empty=bool(empty))
"""


def under_fire(seed: int, victims: str) -> tuple[Traces, dict[str, Any]]:
    """Run the load while processes of it are ended at random; return what it reports."""
    rng = random.Random(seed)
    # What only the end of the session can end goes on until then, however late we are.
    most_s = 2.5 if victims == "afield-worker" else HANG_S
    with program(LOAD.replace("SEED", str(seed)).replace("MOST_S", str(most_s))) as driver:
        session = driver.read_traces()
        end = time.monotonic() + 2.0
        while time.monotonic() < end:
            time.sleep(rng.uniform(0.05, 0.4))
            found = [pid for pid, name in processes(session).items() if name == victims]
            if victims == "afield-fork":  # also the name of what it has forked this moment
                found = [session.fork_server]
            if found:
                try:
                    os.kill(rng.choice(found), signal.SIGKILL)
                except ProcessLookupError:
                    continue
                if victims != "afield-worker":
                    break
        facts = driver.read()
        status, _, error = driver.end()
    assert status == 0, error
    return session, facts


@pytest.mark.parametrize("seed", [1, 2])
def test_work_of_all_kinds_survives_workers_that_are_killed(seed: int) -> None:
    session, facts = under_fire(seed, "afield-worker")
    assert facts["good"] > 5 and not facts["died"] and facts["empty"], facts
    assert_gone(session)


@pytest.mark.parametrize("victim", ["afield-node", "afield-fork"])
def test_the_death_of_the_node_ends_everything_with_its_error(victim: str) -> None:
    session, facts = under_fire(3, victim)
    assert facts["died"], facts
    assert_gone(session)


def test_the_session_is_whole_after_this_module(shared_runtime: None) -> None:
    """The tests above that share a runtime have left it usable."""
    assert lifecycle._session is not None
    assert afield.get(afield.remote(lambda: 1).remote(), timeout=PATIENCE_S) == 1
