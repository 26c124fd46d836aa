"""Cancelling, as its caller sees it: wherever the task or call is at that moment, and whatever it does about it."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import afield
from afield.runtime.calls import participation
from afield.runtime.calls.participant import Participant
from afield.runtime.wire import messages
from tests.helpers import poll, remote_with
from tests.test_recovery import stored_objects

pytestmark = pytest.mark.usefixtures("shared_runtime")

#: A task that is not interrupted sleeps this long; the tests wait for less.
LONG_S = 300.0
HANG_S = 60.0


def cancelled(ref: Any) -> None:
    """Fail unless the task or call of `ref` ends as cancelled, long before it would have ended by itself."""
    with pytest.raises(afield.TaskCancelledError):
        afield.get(ref, timeout=HANG_S)


def appeared(path: Path) -> None:
    """Wait for a file."""
    assert poll(path.exists, HANG_S), path


def sleep_marking(path: str) -> None:
    """Sleep for long; leave a file at the start, and another if the sleep was interrupted."""
    try:
        Path(path).touch()  # whoever cancels when he sees it must find us in here
        time.sleep(LONG_S)
    except BaseException as error:
        Path(path + "." + type(error).__name__).touch()
        raise


class SlowToRebuild:
    """An argument whose unpickling takes long, and (`stubborn`) goes on when it is interrupted."""

    def __init__(self, path: str, stubborn: bool = False) -> None:
        self.path = path
        self.stubborn = stubborn

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        try:
            sleep_marking(self.path)
        except KeyboardInterrupt:
            if not self.stubborn:
                raise


class SlowToPickle:
    """A result whose pickling takes long, and (`stubborn`) goes on, to a large value, when it is interrupted."""

    def __init__(self, path: str, stubborn: bool = False) -> None:
        self.path = path
        self.stubborn = stubborn

    def __reduce__(self) -> tuple[Any, ...]:
        try:
            sleep_marking(self.path)
        except KeyboardInterrupt:
            if not self.stubborn:
                raise
        return np.ones, (1 << 17,) if not self.stubborn else (1,), {}


# -- where the task is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stubborn", [False, True])
def test_while_its_arguments_are_unpickled(tmp_path: Path, stubborn: bool) -> None:
    @afield.remote
    def body(argument: Any, path: str) -> None:
        Path(path).touch()

    ref = body.remote(SlowToRebuild(str(tmp_path / "arguments"), stubborn), str(tmp_path / "body"))
    appeared(tmp_path / "arguments")
    afield.cancel(ref)
    cancelled(ref)
    assert (tmp_path / "arguments.KeyboardInterrupt").exists()
    assert not (tmp_path / "body").exists()


def test_while_its_function_is_unpickled(tmp_path: Path) -> None:
    captured = SlowToRebuild(str(tmp_path / "function"))

    @afield.remote
    def body() -> Any:
        return captured

    ref = body.remote()
    appeared(tmp_path / "function")
    afield.cancel(ref)
    cancelled(ref)


@pytest.mark.parametrize("stubborn", [False, True])
def test_while_its_result_is_pickled(tmp_path: Path, stubborn: bool) -> None:
    @afield.remote
    def body(path: str) -> Any:
        return SlowToPickle(path, stubborn)

    ref = body.remote(str(tmp_path / "result"))
    appeared(tmp_path / "result")
    afield.cancel(ref)
    cancelled(ref)
    assert (tmp_path / "result.KeyboardInterrupt").exists()


@pytest.mark.parametrize("num_returns", [1, 2])
def test_what_it_has_stored_in_vain_is_freed(tmp_path: Path, num_returns: int) -> None:
    """Swallows the interrupt and returns large values: they are stored, and nobody gets them."""

    @remote_with(num_returns=num_returns)
    def body(path: str) -> Any:
        try:
            sleep_marking(path)
        except KeyboardInterrupt:
            pass
        values = [[np.ones(1 << 17), afield.put(1)] for _ in range(num_returns)]
        return values if num_returns > 1 else values[0]

    assert poll(lambda: stored_objects() == 0)
    refs = body.remote(str(tmp_path / "body"))
    refs = refs if num_returns > 1 else [refs]
    appeared(tmp_path / "body")
    afield.cancel(refs[0])
    for ref in refs:
        cancelled(ref)
    del ref, refs
    assert poll(lambda: stored_objects() == 0)


def test_all_of_a_burst(tmp_path: Path) -> None:
    """Requests for what waits behind a running task come in one frame with its own, and do not take its place."""

    @afield.remote(num_cpus=2)
    def quick() -> None:
        pass

    @afield.remote(num_cpus=2)
    def body(path: str) -> None:
        sleep_marking(path)

    found = participation.participant
    assert isinstance(found, Participant)
    in_one_frame = 0
    for turn in range(5):
        before = [quick.remote() for _ in range(1000)]  # who is quick gets many tasks at once
        paths = [tmp_path / f"{turn}.{number}" for number in range(25)]
        refs = [body.remote(str(path)) for path in paths]
        afield.get(before, timeout=HANG_S)
        appeared(paths[0])
        [lease] = [lease for lease in found.submitter.leases.values() if lease.inflight]
        in_one_frame += len(lease.inflight) > 1

        def cancel_all(refs: list[Any] = refs) -> None:
            for ref in refs:
                found.cancellation.cancel(ref.id, False, True)

        found.process.locked(cancel_all)
        for ref in refs:
            cancelled(ref)
        assert [path.exists() for path in paths] == [True] + [False] * 24
        assert Path(f"{paths[0]}.KeyboardInterrupt").exists()
    assert in_one_frame, "no two of these tasks were at one worker: this has shown nothing"


def test_never_the_next_task() -> None:
    """Requests reach tasks at every moment, most of them at their end: nothing but these tasks sees them."""

    @afield.remote
    def short(number: int, spin: int) -> tuple[int, int]:
        for _ in range(spin):
            pass
        return number, os.getpid()

    rng = random.Random(5)
    workers: set[int] = set()
    gone = 0
    for turn in range(40):
        refs = [short.remote(turn * 100 + number, rng.choice([0, 100, 20_000])) for number in range(50)]
        doomed = set(rng.sample(range(50), 12))
        for number in sorted(doomed):
            afield.cancel(refs[number])
            if rng.random() < 0.3:
                afield.wait([refs[number - 1]])
        for number, ref in enumerate(refs):
            try:
                value, pid = afield.get(ref, timeout=HANG_S)
            except afield.TaskCancelledError:
                assert number in doomed
                gone += 1
            else:
                assert value == turn * 100 + number
                workers.add(pid)
    assert gone
    assert len(workers) <= 2, "a worker has died"


def test_in_a_get_that_blocks(tmp_path: Path) -> None:
    """Its worker is of use afterwards: it says that it computes again."""

    @afield.remote
    def inner(path: str) -> None:
        sleep_marking(path)

    @afield.remote
    def outer(path: str) -> Any:
        return afield.get(inner.remote(path))

    @afield.remote
    def pid() -> int:
        return os.getpid()

    for turn in range(4):
        path = tmp_path / str(turn)
        ref = outer.remote(str(path))
        appeared(path)
        time.sleep(0.1)  # it blocks for longer than a moment: not to synchronise, either case is right
        afield.cancel(ref)
        cancelled(ref)
        assert poll(Path(f"{path}.KeyboardInterrupt").exists, HANG_S)
    assert len(set(afield.get([pid.remote() for _ in range(20)], timeout=HANG_S))) <= 2


def test_a_task_that_comes_back_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker hands a task back while the request to cancel it is on its way there: it does not run elsewhere."""

    @afield.remote
    def body() -> int:
        return 1

    found = participation.participant
    assert isinstance(found, Participant)
    process, submitter = found.process, found.submitter
    assert afield.get(body.remote()) == 1

    def meet() -> Any:
        ref = body.remote()
        for lease in submitter.leases.values():
            for sequence, task in list(lease.inflight.items()):
                if ref.id.startswith(task.task_id):
                    task.cancelled = True  # as `cancel` does, which then sends the request
                    process.handlers[messages.HandBack](lease.channel, messages.HandBack([sequence], False))
                    return ref
        return None

    monkeypatch.setattr(process, "in_transition", lambda: False)  # we know what we do under the lock
    ref = poll(lambda: process.locked(meet), HANG_S)
    cancelled(ref)


# -- what it does about it --------------------------------------------------------------------------------------------


def test_who_swallows_the_interrupt_is_cancelled_all_the_same(tmp_path: Path) -> None:
    @afield.remote
    def returns(path: str) -> str:
        try:
            sleep_marking(path)
        except KeyboardInterrupt:
            return "done all the same"
        return ""

    @afield.remote
    def raises(path: str) -> None:
        try:
            sleep_marking(path)
        except KeyboardInterrupt:
            raise ValueError("on the way out") from None

    for body in (returns, raises):
        path = tmp_path / body.__name__
        ref = body.remote(str(path))
        appeared(path)
        afield.cancel(ref)
        cancelled(ref)
        assert Path(f"{path}.KeyboardInterrupt").exists()


def test_it_is_interrupted_once(tmp_path: Path) -> None:
    """Cleaning up is not interrupted, however long it takes."""

    @afield.remote
    def body(path: str) -> None:
        try:
            sleep_marking(path)
        finally:
            for _ in range(50):
                time.sleep(0.01)
            Path(path + ".clean").touch()

    ref = body.remote(str(tmp_path / "body"))
    appeared(tmp_path / "body")
    afield.cancel(ref)
    afield.cancel(ref)
    cancelled(ref)
    assert (tmp_path / "body.clean").exists()


def test_a_signal_that_cuts_nothing_short_is_sent_again(tmp_path: Path) -> None:
    """One that comes just before a system call is seen after it. Here the first one is not sent at all."""

    @afield.remote
    def body(path: str) -> None:
        send = signal.pthread_kill

        def send_later(thread: int, number: int) -> None:
            signal.pthread_kill = send
            Path(path + ".unsent").touch()

        signal.pthread_kill = send_later
        try:
            sleep_marking(path)
        finally:
            signal.pthread_kill = send

    path = tmp_path / "body"
    ref = body.remote(str(path))
    appeared(path)
    afield.cancel(ref)
    cancelled(ref)
    assert Path(f"{path}.unsent").exists() and Path(f"{path}.KeyboardInterrupt").exists()


def test_a_generator(tmp_path: Path) -> None:
    @remote_with(num_returns="streaming", _generator_backpressure_num_objects=1)
    def items(path: str) -> Any:
        try:
            yield from range(1000)
        except GeneratorExit:
            Path(path).touch()
            raise

    stream = items.remote(str(tmp_path / "closed"))
    assert afield.get(next(stream), timeout=HANG_S) == 0
    afield.cancel(stream.completed())
    with pytest.raises(afield.TaskCancelledError):
        for ref in stream:
            afield.get(ref, timeout=HANG_S)
    assert poll((tmp_path / "closed").exists, HANG_S)


# -- calls of actors --------------------------------------------------------------------------------------------------


_numbers = itertools.count()


def has_outlived(path: str) -> bool:
    """Tell whether this process was called by the one that the file names, and has seen its end."""
    found = participation.participant
    assert isinstance(found, Participant)
    if not os.path.exists(path):
        return False
    caller = bytes.fromhex(Path(path).read_text())
    work = found.process.handlers[messages.Push].__self__.work  # type: ignore[attr-defined]
    waiting = [call for call in [*work.queue, *work.open.values()] if call.channel.peer_id == caller]
    if len(waiting) == 10:
        Path(path + ".known").touch()
    return os.path.exists(path + ".known") and caller not in found.process.channels._of


class Worker:
    """Calls that take long, and cancellable children."""

    def sleep(self, path: str) -> None:
        sleep_marking(path)

    def wait_for(self, path: str) -> str:
        """Return when a file is there; nothing interrupts it."""
        Path(path + ".started").touch()
        while not os.path.exists(path):
            time.sleep(0.005)
        return "returned"

    def outlive(self, path: str) -> bool:
        """Return when the process that the file names has called this one and is gone."""
        Path(f"{path}.started{next(_numbers)}").touch()
        while not has_outlived(path):
            time.sleep(0.005)
        return True

    def parent(self, path: str) -> Any:
        return afield.get(child.remote(path))

    def mark(self, path: str) -> None:
        Path(path).touch()


class AsyncWorker:
    """The same on an event loop."""

    async def wait_for(self, path: str) -> str:
        """Return when a file is there, whatever is raised meanwhile."""
        Path(path + ".started").touch()
        while not os.path.exists(path):
            try:
                await asyncio.sleep(0.005)
            except asyncio.CancelledError:
                Path(path + ".CancelledError").touch()
        return "returned"

    async def outlive(self, path: str) -> bool:
        """Return when the process that the file names has called this one and is gone."""
        Path(f"{path}.started{next(_numbers)}").touch()
        while not has_outlived(path):
            await asyncio.sleep(0.005)
        return True

    async def parent(self, path: str) -> Any:
        return await child.remote(path)

    async def mark(self, path: str) -> None:
        Path(path).touch()


@afield.remote
def child(path: str) -> None:
    """A task that an actor's call submits."""
    sleep_marking(path)


@afield.remote
def parent(path: str) -> Any:
    """A task that submits another."""
    return afield.get(child.remote(path))


WAYS = ["plain", "threads", "event loop"]


def actor_of(way: str, concurrency: int = 2) -> Any:
    """Start an actor whose calls run in a certain way."""
    cls: Any = AsyncWorker if way == "event loop" else Worker
    options = {} if way == "plain" else {"max_concurrency": concurrency}
    return afield.remote(cls).options(num_cpus=0, **options).remote()


@pytest.mark.parametrize("way", ["task", *WAYS])
def test_what_a_call_has_submitted_goes_with_it(way: str, tmp_path: Path) -> None:
    actor = None if way == "task" else actor_of(way)
    path = tmp_path / "child"
    ref = parent.remote(str(path)) if actor is None else actor.parent.remote(str(path))
    appeared(path)
    afield.cancel(ref)
    cancelled(ref)
    assert poll(Path(f"{path}.KeyboardInterrupt").exists, HANG_S)


def test_what_it_submits_after_the_interrupt_goes_too(tmp_path: Path) -> None:
    @afield.remote
    def body(path: str) -> None:
        try:
            sleep_marking(path)
        except KeyboardInterrupt:
            kept.append(child.remote(path + ".child"))
            while not os.path.exists(path + ".child"):
                time.sleep(0.005)

    kept: list[Any] = []
    path = tmp_path / "body"
    ref = body.remote(str(path))
    appeared(path)
    afield.cancel(ref)
    cancelled(ref)
    assert poll(Path(f"{path}.child.KeyboardInterrupt").exists, HANG_S)


@pytest.mark.parametrize("way", ["threads", "event loop"])
def test_a_call_that_goes_on_ends_as_cancelled(way: str, tmp_path: Path) -> None:
    actor = actor_of(way)
    path = tmp_path / "call"
    ref = actor.wait_for.remote(str(path))
    appeared(Path(f"{path}.started"))
    afield.cancel(ref)
    if way == "event loop":
        appeared(Path(f"{path}.CancelledError"))
    else:
        afield.get(actor.mark.remote(str(tmp_path / "other")))  # a later message of ours: the request is there
    path.touch()
    cancelled(ref)


@pytest.mark.parametrize("way", WAYS)
def test_a_call_that_waits_never_starts(way: str, tmp_path: Path) -> None:
    actor = actor_of(way, 1) if way != "threads" else actor_of(way, 2)
    running = [actor.wait_for.remote(str(tmp_path / "go")) for _ in range(2 if way == "threads" else 1)]
    appeared(tmp_path / "go.started")
    waiting = [actor.mark.remote(str(tmp_path / f"waiting{number}")) for number in range(10)]
    for ref in waiting:
        afield.cancel(ref)
    for ref in waiting:
        with pytest.raises(afield.TaskCancelledError, match="before it started"):
            afield.get(ref, timeout=HANG_S)
    (tmp_path / "go").touch()
    assert afield.get(running, timeout=HANG_S) == ["returned"] * len(running)
    assert not list(tmp_path.glob("waiting*"))


@pytest.mark.parametrize("way", WAYS)
def test_calls_of_a_caller_that_died_never_start(way: str, tmp_path: Path) -> None:
    @afield.remote(num_cpus=0)
    class Caller:
        def call(self, actor: Any, directory: str) -> None:
            self.refs = [actor.mark.remote(f"{directory}/waiting{number}") for number in range(10)]
            Path(f"{directory}/caller.part").write_text(afield.get_runtime_context().get_worker_id())
            os.rename(f"{directory}/caller.part", f"{directory}/caller")

    slots = 2 if way == "threads" else 1
    actor = actor_of(way, slots)
    running = [actor.outlive.remote(str(tmp_path / "caller")) for _ in range(slots)]
    assert poll(
        lambda: len(list(tmp_path.glob("caller.started*"))) == slots, HANG_S
    )  # only one caller's calls have an order
    caller = Caller.remote()
    afield.get(caller.call.remote(actor, str(tmp_path)), timeout=HANG_S)
    assert poll(lambda: (tmp_path / "caller.known").exists(), HANG_S)  # its calls are there
    afield.kill(caller)
    assert afield.get(running, timeout=HANG_S) == [True] * slots
    afield.get(actor.mark.remote(str(tmp_path / "mine")), timeout=HANG_S)
    assert not list(tmp_path.glob("waiting*"))
