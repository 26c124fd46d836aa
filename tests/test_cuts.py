"""Sockets that break between living processes: nobody above hears of it. Cuts come from outside (`cuts`)."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import afield
from afield.runtime.calls import participation
from afield.runtime.process.events import PROCESS_DIED
from afield.runtime.session import sessions
from afield.runtime.tools.client import Client
from tests.cuts import Cutter, can_cut, channel_sockets, cut_all
from tests.helpers import assert_gone, poll, processes, program, traces

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_cut(), reason="the system does not let us reach the sockets of other processes"),
]

PATIENCE_S = 30.0
ALL = ("driver", "afield-node", "afield-worker")


def pids_of(*names: str) -> list[int]:
    """Return the processes of these kinds in the running session."""
    found = [os.getpid()] if "driver" in names else []
    return found + [pid for pid, name in processes(traces()).items() if name in names]


def cut_everything() -> int:
    """Cut every channel of the session."""
    return sum(cut_all(pid) for pid in pids_of(*ALL, "afield-store"))


@afield.remote
def add(x: int) -> int:
    """A small task."""
    return x + 1


@afield.remote
def when_open(path: str) -> int:
    """Return once the file is there."""
    return bool(poll(lambda: os.path.exists(path), PATIENCE_S))


@afield.remote
class Counter:
    """Counts its calls: each must come once."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def call(self, number: int) -> int:
        """Note a call."""
        self.calls.append(number)
        return len(self.calls)

    def wait(self, path: str) -> bool:
        """Return once the file is there."""
        return bool(poll(lambda: os.path.exists(path), PATIENCE_S))

    def seen(self) -> list[int]:
        """Return all."""
        return self.calls


@contextlib.contextmanager
def gate(tmp_path: Any) -> Iterator[tuple[str, Callable[[], None]]]:
    """A file that tasks wait for, and what makes it."""
    path = tmp_path / "open"
    yield str(path), path.touch
    path.touch()


@pytest.mark.parametrize("who", ALL)
def test_what_runs_while_its_sockets_break_is_answered(runtime: afield.ClusterInfo, tmp_path: Any, who: str) -> None:
    """The task, the call, the lease and the wait: each hung for ever, or the runtime was declared dead."""
    counter = Counter.options(num_cpus=0).remote()
    assert afield.get(counter.call.remote(0), timeout=PATIENCE_S) == 1
    with gate(tmp_path) as (path, open_gate):
        task, call = when_open.remote(path), counter.wait.remote(path)
        afield.wait([task], timeout=0.2)
        assert sum(map(cut_all, pids_of(who))) > 0
        later = [counter.call.remote(number) for number in range(1, 20)]
        open_gate()
        assert afield.get([task, call], timeout=PATIENCE_S) == [True, True]
        assert afield.get(later, timeout=PATIENCE_S) == list(range(2, 21))
    assert afield.get([add.remote(i) for i in range(50)], timeout=PATIENCE_S) == list(range(1, 51))
    assert afield.get(counter.seen.remote(), timeout=PATIENCE_S) == list(range(20))


def test_an_idle_session_whose_sockets_break_goes_on(runtime: afield.ClusterInfo) -> None:
    held = afield.put(np.arange(100_000))
    counter = Counter.remote()
    for number in range(10):
        assert cut_everything() > 0
        assert afield.get(add.remote(number), timeout=PATIENCE_S) == number + 1
        assert afield.get(counter.call.remote(number), timeout=PATIENCE_S) == number + 1
        assert afield.get(held, timeout=PATIENCE_S).sum() == 4_999_950_000


def test_shutdown_after_a_cut(no_runtime: None) -> None:
    afield.init(num_cpus=2)
    session = traces()
    afield.get(add.remote(1), timeout=PATIENCE_S)
    assert cut_everything() > 0
    afield.shutdown()
    assert_gone(session)


def test_what_breaks_is_seen_by_who_looks(runtime: afield.ClusterInfo) -> None:
    """The core of the links is there for `afield stack --debug`, and says what happened."""
    afield.get(add.remote(1), timeout=PATIENCE_S)
    cut_all(os.getpid())
    afield.get(add.remote(1), timeout=PATIENCE_S)
    participant: Any = participation.participant
    links = participant.process.cores["links"]
    assert any("broke connected -> disconnected" in line for line in links.recorder.story())
    assert not links.validate()


def test_calls_of_all_kinds_come_once_and_in_order(no_runtime: None) -> None:
    afield.init(num_cpus=3, host_memory="256MiB")
    counter = Counter.options(num_cpus=0).remote()
    nest = afield.remote(lambda depth: 0 if depth == 0 else 1 + afield.get(nest.remote(depth - 1)))
    stream = afield.remote(num_returns="streaming")(lambda n: (np.full(50_000, i, np.uint8) for i in range(n)))
    borrow = afield.remote(lambda box: int(afield.get(box[0]).sum()))
    calls: list[Any] = []
    end = time.monotonic() + 2.0
    with Cutter(7, lambda: pids_of(*ALL), (0.0, 0.01)) as cutter:
        while time.monotonic() < end or cutter.counts["cuts"] < 50:
            assert afield.get([add.remote(i) for i in range(100)], timeout=PATIENCE_S) == list(range(1, 101))
            calls += [counter.call.remote(len(calls) + i) for i in range(20)]
            assert afield.get(nest.remote(2), timeout=PATIENCE_S) == 2
            assert [afield.get(ref, timeout=PATIENCE_S)[0] for ref in stream.remote(5)] == list(range(5))
            boxes = [borrow.remote([afield.put(np.ones(1000 * (i + 1), np.uint8))]) for i in range(5)]
            assert afield.get(boxes, timeout=PATIENCE_S) == [1000, 2000, 3000, 4000, 5000]
            assert afield.get(calls[-1], timeout=PATIENCE_S) == len(calls)
    assert afield.get(calls, timeout=PATIENCE_S) == list(range(1, len(calls) + 1))
    assert afield.get(counter.seen.remote(), timeout=PATIENCE_S) == list(range(len(calls)))
    del boxes
    assert poll(lambda: not afield.runtime.face.api.query("store")["objects"], PATIENCE_S)


def test_large_frames_are_cut_in_the_middle(no_runtime: None) -> None:
    """Arguments that are near to what the store takes, many at once: frames that no socket buffer takes as a whole."""
    afield.init(num_cpus=2)
    size_of = afield.remote(lambda data: len(data))
    end = time.monotonic() + 2.0
    with Cutter(11, lambda: pids_of("driver", "afield-worker"), (0.0, 0.005)):
        while time.monotonic() < end:
            refs = [size_of.remote(bytes(90_000 + i)) for i in range(100)]
            assert afield.get(refs, timeout=PATIENCE_S) == [90_000 + i for i in range(100)]


def test_devices_and_their_stores_survive_cuts(no_runtime: None) -> None:
    afield.init(num_cpus=2, devices="emulated:2", host_memory="256MiB")

    @afield.remote(num_gpus=1)
    def make(value: int) -> Any:
        return afield.array_module().full(200_000, value, dtype="float32")

    total = afield.remote(num_gpus=1)(lambda array: float(array.sum()))
    afield.get(total.remote(make.remote(1)), timeout=PATIENCE_S)
    end = time.monotonic() + 2.0
    with Cutter(13, lambda: pids_of(*ALL, "afield-store"), (0.0, 0.02)) as cutter:
        while time.monotonic() < end or cutter.counts["cuts"] < 30:
            refs = [make.remote(value) for value in range(1, 5)]
            sums = afield.get([total.remote(ref) for ref in refs], timeout=PATIENCE_S)
            assert sums == [200_000.0 * value for value in range(1, 5)]
            assert [float(afield.get(ref, timeout=PATIENCE_S)[0]) for ref in refs] == [1, 2, 3, 4]


def test_cuts_beside_workers_that_are_killed(no_runtime: None) -> None:
    """A break and a death at once are told apart: what has died is done again, what was only cut is not."""
    afield.init(num_cpus=3)
    rng = random.Random(17)
    end = time.monotonic() + 2.0
    many = add.options(max_retries=-1)

    def kill() -> None:
        while time.monotonic() < end:
            time.sleep(rng.uniform(0.1, 0.4))
            workers = pids_of("afield-worker")
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(rng.choice(workers), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    with Cutter(17, lambda: pids_of(*ALL), (0.0, 0.02)):
        killer.start()
        while time.monotonic() < end:
            assert afield.get([many.remote(i) for i in range(200)], timeout=PATIENCE_S) == list(range(1, 201))
        killer.join()
    assert afield.get([many.remote(i) for i in range(200)], timeout=PATIENCE_S) == list(range(1, 201))


def test_a_death_is_found_out_by_who_comes_too_late_to_be_told(runtime: afield.ClusterInfo) -> None:
    """A process that began after another's death asks the daemon, as nobody will tell it."""

    @afield.remote
    class Owner:
        def make(self) -> list[Any]:
            return [afield.put(np.zeros(1000))]

        def pid(self) -> int:
            return os.getpid()

    owner = Owner.options(num_cpus=0).remote()
    pid = afield.get(owner.pid.remote(), timeout=PATIENCE_S)
    (ref,) = afield.get(owner.make.remote(), timeout=PATIENCE_S)
    participant: Any = participation.participant
    process = participant.process
    dead = process.owner_of(ref.id)
    told: list[str] = []
    process.subscribe(PROCESS_DIED, lambda peer, reason: told.append(reason) if peer == dead else None)
    os.kill(pid, signal.SIGKILL)
    assert poll(lambda: told, PATIENCE_S) and "killed by signal 9" in told[0]
    # As one that began only now: it has a name to connect to, and nobody will tell it of its own accord.
    afield.cluster_resources()  # what its broken channel had asked is answered before this
    told.clear()
    assert process.locked(process.channel_to, dead) is None
    assert poll(lambda: told, PATIENCE_S) and "had ended before" in told[0]
    with pytest.raises(afield.OwnerDiedError):
        afield.get(ref, timeout=PATIENCE_S)


def daemon_of_this_worker() -> tuple[Any, Any]:
    """Return the loop of this process and its channel to the daemon."""
    participant: Any = participation.participant
    return participant.process.loop, participant.process.daemon


def test_a_task_knows_its_lease_though_the_daemon_is_not_heard(no_runtime: None) -> None:
    """What a lease grants comes ahead of what runs under it; it once came on another channel, which may be late."""
    afield.init(num_cpus=1, resources={"first": 1, "second": 1})

    @afield.remote(resources={"first": 1})
    def go_deaf() -> int:
        loop, daemon = daemon_of_this_worker()
        loop.unregister(daemon.sock.fileno())
        return os.getpid()

    @afield.remote(resources={"second": 1})
    def resources() -> tuple[int, dict[str, float]]:
        found = afield.get_runtime_context().get_assigned_resources()
        loop, daemon = daemon_of_this_worker()
        loop.register(daemon.sock.fileno(), daemon.handle)
        return os.getpid(), found

    pid = afield.get(go_deaf.remote(), timeout=PATIENCE_S)
    assert afield.get(resources.remote(), timeout=PATIENCE_S) == (pid, {"CPU": 1.0, "second": 1.0})


def test_who_breaks_the_protocol_is_ended_and_its_work_done_elsewhere(
    runtime: afield.ClusterInfo, tmp_path: Any
) -> None:
    """It would send the same again over any socket; a closed channel alone left the task waiting for ever."""
    first = str(tmp_path / "first")

    @afield.remote(max_retries=1)
    def garble() -> str:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(first, os.O_CREAT | os.O_EXCL))
            participant: Any = participation.participant
            for channel in participant.process.channels.endpoint.channels():
                if channel is not participant.process.daemon:
                    channel._encode = lambda batch: b"\xc1"
            return "garbled"
        return "done elsewhere"

    assert afield.get(garble.remote(), timeout=PATIENCE_S) == "done elsewhere"
    assert afield.get(add.remote(1), timeout=PATIENCE_S) == 2


def test_a_tool_asks_again(runtime: afield.ClusterInfo) -> None:
    (info,) = [found for found in sessions.find_sessions() if found.name == traces().name]
    with Client(info) as client:
        for _ in range(5):
            assert client.ask("total")["CPU"] == 2
            assert client._channel.sock is not None
            client._channel.sock.shutdown(2)


LOAD = """
afield.init(num_cpus=2)
add = afield.remote(lambda x: x + 1)
report_traces()
deadline = time.monotonic() + 3
good = 0
while time.monotonic() < deadline:
    assert afield.get([add.remote(i) for i in range(100)], timeout=30) == list(range(1, 101))
    good += 1
report(good=good)
"""


@pytest.mark.parametrize("victim", ["afield-node", "driver"])
def test_death_amid_cuts_ends_the_session(victim: str) -> None:
    """Of the daemon and of the driver: a break is not taken for a death, nor a death for a break."""
    with program(LOAD.replace("time.monotonic() + 3", "time.monotonic() + 600")) as driver:
        session = driver.read_traces()
        pid = driver.process.pid

        def pids() -> list[int]:
            return [pid, *(each for each, name in processes(session).items() if name in ALL)]

        with Cutter(19, pids, (0.0, 0.02)) as cutter:
            assert poll(lambda: cutter.counts["cuts"] > 20, PATIENCE_S)
            if victim == "driver":
                driver.process.kill()
            else:
                os.kill(next(each for each, name in processes(session).items() if name == victim), signal.SIGKILL)
            status, _, error = driver.end()
        assert status != 0
        if victim != "driver":
            assert "RuntimeDiedError" in error, error
    assert_gone(session)


def test_the_helper_finds_the_channels_and_nothing_else(runtime: afield.ClusterInfo) -> None:
    afield.get(add.remote(1), timeout=PATIENCE_S)
    socks = channel_sockets(os.getpid())
    try:
        names = {name for sock in socks for name in (sock.getsockname(), sock.getpeername()) if isinstance(name, bytes)}
        assert socks and all(name.startswith(b"\0afield-" + traces().name.encode()) for name in names)
    finally:
        for sock in socks:
            sock.close()
