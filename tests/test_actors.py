"""Actors by behaviour: creation, order, state, handles that travel, several returns, the end by `kill`."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import afield
from tests.helpers import HANG_S, poll, process_named, remote_with, traces

PATIENCE_S = 30.0


def make_counter() -> Any:
    """Return an actor class that is defined here, so that it travels by value."""

    class Counter:
        """Counts."""

        def __init__(self, start: int = 0) -> None:
            self.value = start
            self.log: list[Any] = []

        def add(self, amount: int = 1) -> int:
            self.value += amount
            return self.value

        def note(self, item: Any) -> None:
            self.log.append(item)

        def read(self) -> list[Any]:
            return self.log

        def pid(self) -> int:
            return os.getpid()

        @afield.method(num_returns=2)
        def pair(self) -> tuple[int, int]:
            return self.value, -self.value

        @staticmethod
        def twice(x: int) -> int:
            return 2 * x

        def fail(self) -> None:
            raise KeyError("missing")

    return Counter


def test_an_actor_keeps_its_state(shared_runtime: None) -> None:
    counter = afield.remote(make_counter()).remote(10)
    assert afield.get([counter.add.remote(), counter.add.remote(5), counter.add.remote(amount=-1)]) == [11, 16, 15]
    assert afield.get(counter.twice.remote(4)) == 8


def test_actor_classes_take_options(shared_runtime: None) -> None:
    remote = afield.remote(num_cpus=0.5, max_restarts=0)(make_counter())
    assert remote.__doc__ == "Counts."
    a, b = remote.remote(), remote.options(num_cpus=0).remote(start=5)
    assert afield.get([a.add.remote(), b.add.remote()]) == [1, 6]
    assert afield.get(a.pid.remote()) != afield.get(b.pid.remote())
    assert a != b and a == a and len({a, b}) == 2


def test_methods_with_several_returns(shared_runtime: None) -> None:
    counter = afield.remote(make_counter()).remote(3)
    refs = counter.pair.remote()
    assert afield.get(refs) == [3, -3]
    assert afield.get(counter.pair.options(num_returns=1).remote()) == (3, -3)


def test_refs_as_arguments_of_constructors_and_methods(shared_runtime: None) -> None:
    start = afield.remote(lambda: 40).remote()
    counter = afield.remote(make_counter()).remote(start)
    assert afield.get(counter.add.remote(afield.put(2))) == 42


def test_calls_of_one_caller_keep_their_order(shared_runtime: None, tmp_path: Path) -> None:
    """Also when an argument of an early call comes late: the calls behind it wait."""
    path = tmp_path / "gate"

    @afield.remote
    def late() -> str:
        poll(path.exists)
        return "late"

    counter = afield.remote(make_counter()).remote()
    counter.note.remote(late.remote())
    for i in range(300):
        counter.note.remote(i)
    path.touch()
    assert afield.get(counter.read.remote(), timeout=HANG_S) == ["late", *range(300)]


def test_each_caller_keeps_its_own_order(shared_runtime: None) -> None:
    @afield.remote
    def call(counter: Any, name: str) -> None:
        refs = [counter.note.remote((name, i)) for i in range(100)]
        afield.get(refs)

    counter = afield.remote(make_counter()).remote()
    afield.get([call.remote(counter, "a"), call.remote(counter, "b")], timeout=HANG_S)
    log = afield.get(counter.read.remote())
    assert len(log) == 200
    for name in "ab":
        assert [i for who, i in log if who == name] == list(range(100))


def test_an_actor_runs_one_call_at_a_time(shared_runtime: None) -> None:
    class Slow:
        busy = False

        def work(self) -> bool:
            was_busy, self.busy = self.busy, True
            time.sleep(0.002)
            self.busy = False
            return was_busy

    @afield.remote
    def call(actor: Any) -> list[bool]:
        return afield.get([actor.work.remote() for _ in range(10)])

    actor = afield.remote(Slow).remote()
    assert afield.get([call.remote(actor) for _ in range(3)], timeout=HANG_S) == [[False] * 10] * 3


def test_handles_travel_nested_and_through_several_hands(shared_runtime: None) -> None:
    class Holder:
        def __init__(self, boxed: dict[str, Any]) -> None:
            self.counter = boxed["counter"]

        def add(self) -> int:
            return int(afield.get(self.counter.add.remote()))

        def pass_on(self) -> Any:
            return self.counter

    counter = afield.remote(make_counter()).remote()
    holder = afield.remote(Holder).remote({"counter": counter})
    assert afield.get(holder.add.remote(), timeout=HANG_S) == 1
    again = afield.get(holder.pass_on.remote())
    assert again == counter
    assert afield.get(again.add.remote()) == 2
    assert afield.get(counter.add.remote()) == 3


def test_a_task_creates_an_actor_and_uses_it(shared_runtime: None) -> None:
    counter_class = afield.remote(make_counter())

    @afield.remote
    def use() -> int:
        counter = counter_class.remote(1)
        return int(afield.get(counter.add.remote()))

    assert afield.get(use.remote(), timeout=HANG_S) == 2


def test_an_actor_submits_tasks(shared_runtime: None) -> None:
    double = afield.remote(lambda x: 2 * x)

    class Boss:
        def work(self, n: int) -> list[int]:
            return list(afield.get([double.remote(i) for i in range(n)]))

    assert afield.get(afield.remote(Boss).remote().work.remote(20), timeout=HANG_S) == [2 * i for i in range(20)]


def test_more_actors_than_cpus(shared_runtime: None) -> None:
    counters = [afield.remote(make_counter()).remote(i) for i in range(6)]
    assert afield.get([counter.add.remote() for counter in counters], timeout=HANG_S) == [1, 2, 3, 4, 5, 6]
    assert len(set(afield.get([counter.pid.remote() for counter in counters]))) == 6
    for counter in counters:
        afield.kill(counter)


def test_an_actor_holds_its_resources_until_its_end(runtime: afield.ClusterInfo) -> None:
    counter = afield.remote(num_cpus=1)(make_counter()).remote()
    afield.get(counter.add.remote())
    assert poll(lambda: afield.available_resources().get("CPU", 0) == 1, PATIENCE_S)
    afield.kill(counter)
    assert poll(lambda: afield.available_resources().get("CPU", 0) == 2, PATIENCE_S)


def test_an_actor_sees_its_devices(shared_runtime: None) -> None:
    class Device:
        def devices(self) -> str:
            return os.environ["AFIELD_VISIBLE_DEVICES"]

    actor = afield.remote(num_gpus=1)(Device).remote()
    assert afield.get(actor.devices.remote()).count("EMU-") == 1
    afield.kill(actor)


def test_a_callable_instance_and_private_names(shared_runtime: None) -> None:
    class Adder:
        def __call__(self, x: int) -> int:
            return x + 1

        def _private(self) -> str:
            return "private"

    actor = afield.remote(Adder).remote()
    assert afield.get(actor.__call__.remote(1)) == 2
    assert afield.get(actor._private.remote()) == "private"


def test_methods_of_base_classes(shared_runtime: None) -> None:
    base = make_counter()

    class Special(base):  # type: ignore[misc,valid-type]
        def add(self, amount: int = 1) -> int:
            return int(super().add(10 * amount))

    actor = afield.remote(Special).remote()
    assert afield.get(actor.add.remote()) == 10
    assert afield.get(actor.twice.remote(2)) == 4


# -- the end ------------------------------------------------------------------------------------------------------


def test_kill_fails_what_is_pending_and_all_later_calls(runtime: afield.ClusterInfo, tmp_path: Path) -> None:
    class Stuck:
        def run(self, path: Path) -> None:
            path.touch()
            time.sleep(60)

        def other(self) -> None:
            pass

    actor = afield.remote(Stuck).remote()
    running, waiting = actor.run.remote(tmp_path / "started"), actor.other.remote()
    assert poll((tmp_path / "started").exists)
    afield.kill(actor)
    for ref in (running, waiting, actor.other.remote()):
        with pytest.raises(afield.ActorDiedError, match=r"Stuck is dead: it was ended by kill\(\)"):
            afield.get(ref, timeout=PATIENCE_S)
    afield.kill(actor)  # a second time does nothing


def test_a_call_after_kill_does_not_run_although_the_daemon_is_slow(
    runtime: afield.ClusterInfo, tmp_path: Path
) -> None:
    """It once was sent to the worker, which ran it if it had not been ended yet."""

    class Writer:
        def touch(self, path: Path) -> None:
            path.touch()

    actor = afield.remote(Writer).remote()
    afield.get(actor.touch.remote(tmp_path / "before"), timeout=PATIENCE_S)
    daemon = process_named(traces(), "afield-node")
    os.kill(daemon, signal.SIGSTOP)
    try:
        afield.kill(actor)
        late = actor.touch.remote(tmp_path / "after")
        assert afield.wait([late], timeout=0.2) == ([], [late])
    finally:
        os.kill(daemon, signal.SIGCONT)
    with pytest.raises(afield.ActorDiedError, match="kill"):
        afield.get(late, timeout=PATIENCE_S)
    assert os.listdir(tmp_path) == ["before"]


def test_kill_before_the_constructor_has_run(runtime: afield.ClusterInfo) -> None:
    actor = afield.remote(make_counter()).remote()
    afield.kill(actor)
    with pytest.raises(afield.ActorDiedError, match="kill"):
        afield.get(actor.add.remote(), timeout=PATIENCE_S)


@pytest.mark.parametrize("who", ["its creator", "who has a handle", "who knows its name"])
@pytest.mark.parametrize("lifetime", [None, "detached"])
def test_kill_while_an_argument_of_the_constructor_is_not_there(
    runtime: afield.ClusterInfo, who: str, lifetime: str | None
) -> None:
    """It may never be: whoever calls the actor hears that it is dead, and its name is free."""

    @remote_with(num_cpus=0)
    def never() -> None:
        threading.Event().wait()

    @remote_with(num_cpus=0)
    def call_and_kill(handles: list[Any]) -> Any:
        actor = handles[0] if handles else afield.get_actor("waits")
        late = actor.add.remote()
        afield.kill(actor)
        return late

    counter_class = afield.remote(make_counter())
    actor = counter_class.options(name="waits", lifetime=lifetime).remote(never.remote())
    refs = [actor.add.remote()]
    if who == "its creator":
        afield.kill(actor)
    else:
        refs += afield.get([call_and_kill.remote([actor] if who == "who has a handle" else [])], timeout=PATIENCE_S)
    for ref in [*refs, actor.add.remote()]:
        with pytest.raises(afield.ActorDiedError, match=r"it was ended by kill\(\)") as died:
            afield.get(ref, timeout=PATIENCE_S)
        assert died.value.actor_id == actor._actor_id.hex()
    again = counter_class.options(name="waits").remote(never.remote())
    assert afield.get_actor("waits")._actor_id == again._actor_id
    del again  # no call is pending, and nobody can reach it any more
    assert poll(lambda: not afield.util.list_named_actors())


def test_an_actor_whose_creator_is_dead_is_gone(runtime: afield.ClusterInfo) -> None:
    counter_class = afield.remote(make_counter())

    class Parent:
        def make(self) -> Any:
            self.child = counter_class.remote()
            afield.get(self.child.add.remote())
            return self.child

    parent = afield.remote(Parent).remote()
    child = afield.get(parent.make.remote(), timeout=PATIENCE_S)
    afield.kill(parent)

    def reason() -> str:
        try:
            afield.get(child.add.remote(), timeout=PATIENCE_S)
        except afield.ActorDiedError as error:
            return str(error)
        return ""

    assert "the process that created it ended" in poll(reason, PATIENCE_S)


def test_a_restarted_actor_serves_again(runtime: afield.ClusterInfo) -> None:
    actor = afield.remote(max_restarts=1, max_task_retries=-1)(make_counter()).remote(5)
    first = afield.get(actor.pid.remote())
    os.kill(first, 9)
    second = afield.get(actor.pid.remote(), timeout=PATIENCE_S)
    assert second != first
    assert afield.get(actor.add.remote()) == 6  # the constructor ran again, with its arguments
    os.kill(second, 9)
    with pytest.raises(afield.ActorDiedError, match="killed by signal 9"):
        afield.get(actor.add.remote(), timeout=PATIENCE_S)


def test_what_waits_for_a_call_that_a_restart_cuts_short_fails_and_what_comes_after_runs(
    runtime: afield.ClusterInfo, tmp_path: Path
) -> None:
    class Stuck:
        def run(self, path: Path) -> None:
            path.touch()
            time.sleep(60)

        def take(self, value: Any) -> Any:
            return value

        def pid(self) -> int:
            return os.getpid()

    actor = afield.remote(max_restarts=1)(Stuck).remote()
    pid = afield.get(actor.pid.remote(), timeout=PATIENCE_S)
    running = actor.run.remote(tmp_path / "started")
    waiting = actor.take.remote(running)
    after = [actor.take.remote(i) for i in range(3)]
    assert poll((tmp_path / "started").exists)
    os.kill(pid, signal.SIGKILL)
    for ref in (running, waiting):
        with pytest.raises(afield.ActorUnavailableError, match=r"run\(\) was on its way"):
            afield.get(ref, timeout=PATIENCE_S)
    assert afield.get(after, timeout=PATIENCE_S) == [0, 1, 2]


# -- calls that never leave ---------------------------------------------------------------------------------------


def test_a_call_that_is_cancelled_while_it_waits_never_runs_and_holds_up_nothing(
    runtime: afield.ClusterInfo, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    late = afield.remote(lambda: poll(gate.exists)).remote()
    counter = afield.remote(make_counter()).remote()
    waiting = counter.note.remote(late)
    after = counter.note.remote("after")
    afield.cancel(waiting)
    with pytest.raises(afield.TaskCancelledError, match="before it started"):
        afield.get(waiting, timeout=PATIENCE_S)
    assert afield.get(after, timeout=PATIENCE_S) is None
    gate.touch()
    assert afield.get(late, timeout=PATIENCE_S)
    assert afield.get(counter.read.remote(), timeout=PATIENCE_S) == ["after"]


@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_an_actor_ends_with_its_handle_although_its_last_call_never_left(
    runtime: afield.ClusterInfo, tmp_path: Path, how: str
) -> None:
    def argument() -> None:
        poll((tmp_path / "gate").exists)
        raise ValueError("no argument")

    counter = afield.remote(num_cpus=1)(make_counter()).remote()
    afield.get(counter.add.remote(), timeout=PATIENCE_S)
    given = afield.remote(num_cpus=0)(argument).remote()
    call = counter.note.remote(given)
    if how == "cancelled":
        afield.cancel(call)
    (tmp_path / "gate").touch()
    with pytest.raises(afield.TaskCancelledError if how == "cancelled" else ValueError):
        afield.get(call, timeout=PATIENCE_S)
    del counter
    assert poll(lambda: afield.available_resources().get("CPU", 0) == 2, PATIENCE_S)
