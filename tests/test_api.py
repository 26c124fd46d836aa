"""The public API by behaviour: tasks, futures, `get`, `put`, `wait`, options, resources, devices.

Remote functions are defined inside the tests, so that they travel by value and workers need not import this module.
"""

from __future__ import annotations

import inspect
import os
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import afield
from tests.helpers import HANG_S, poll, remote_with

PATIENCE_S = 30.0


def gate(folder: Path, name: str = "gate") -> tuple[Any, Any]:
    """Return a task that ends when `open_gate` is called, and that function."""
    path = folder / name

    @afield.remote
    def wait_at_gate(value: Any = None) -> Any:
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        return value

    return wait_at_gate, path.touch


# -- functions ----------------------------------------------------------------------------------------------------


def test_remote_with_and_without_options(shared_runtime: None) -> None:
    @afield.remote
    def plain(a: int, b: int = 10) -> int:
        return a + b

    @remote_with(num_cpus=0.5, max_retries=0, name="other name")
    def with_options(a: int, *rest: int, **named: int) -> tuple[int, tuple[int, ...], dict[str, int]]:
        return a, rest, named

    assert afield.get(plain.remote(1)) == 11
    assert afield.get(plain.remote(1, b=2)) == 3
    assert afield.get(with_options.remote(1, 2, 3, x=4)) == (1, (2, 3), {"x": 4})


def test_a_remote_function_keeps_the_name_and_text_of_its_function() -> None:
    def documented(x: int) -> int:
        """Say what it does."""
        return x

    remote = afield.remote(documented)
    assert remote.__name__ == "documented" and remote.__doc__ == "Say what it does."
    assert remote.__wrapped__(3) == 3
    assert inspect.signature(remote.__wrapped__) == inspect.signature(documented)


def test_options_make_another_function_and_leave_the_first_as_it_is(shared_runtime: None) -> None:
    @afield.remote
    def pair() -> tuple[int, int]:
        return 1, 2

    two = pair.options(num_returns=2)
    assert afield.get(pair.remote()) == (1, 2)
    assert afield.get(two.remote()) == [1, 2]
    assert afield.get(pair.remote()) == (1, 2)
    # Options add up: the second call keeps what the first one set.
    assert afield.get(two.options(num_cpus=0.5).remote()) == [1, 2]


@pytest.mark.parametrize("make", [lambda: (1, "two", None), lambda: [1, "two", None]])
def test_several_returns(shared_runtime: None, make: Any) -> None:
    refs = afield.remote(num_returns=3)(make).remote()
    assert isinstance(refs, list) and len(refs) == 3 and len(set(refs)) == 3
    assert afield.get(refs) == [1, "two", None]
    assert afield.get(refs[1]) == "two"


def test_a_generator_s_items_are_no_several_returns(shared_runtime: None) -> None:
    refs = afield.remote(num_returns=2)(lambda: {1, 2}).remote()
    with pytest.raises(ValueError, match="num_returns=2 and must return 2 values, not a set"):
        afield.get(refs[0])


@pytest.mark.parametrize("count", [1, 3])
def test_a_wrong_number_of_returns_is_the_error_of_each(shared_runtime: None, count: int) -> None:
    def several() -> list[int]:
        return list(range(count))

    for ref in afield.remote(num_returns=2)(several).remote():
        with pytest.raises(ValueError, match=f"num_returns=2 and must return 2 values, not {count} values"):
            afield.get(ref)


def test_no_returns(shared_runtime: None, tmp_path: Path) -> None:
    path = tmp_path / "ran"

    @remote_with(num_returns=0)
    def touch() -> tuple[()]:
        path.touch()
        return ()

    assert touch.remote() is None
    assert poll(path.exists)


def test_functions_see_what_they_capture(shared_runtime: None) -> None:
    offset = 100

    def helper(x: int) -> int:
        return x + offset

    assert afield.get(afield.remote(lambda x: helper(x)).remote(1)) == 101


def test_a_burst_keeps_every_result_apart(shared_runtime: None) -> None:
    @afield.remote
    def double(x: int) -> int:
        return 2 * x

    assert afield.get([double.remote(i) for i in range(2000)]) == [2 * i for i in range(2000)]


def test_tasks_run_at_the_same_time(shared_runtime: None, tmp_path: Path) -> None:
    def meet(mine: str, other: str) -> bool:
        (tmp_path / mine).touch()
        return bool(poll((tmp_path / other).exists))

    meet_remote = afield.remote(meet)
    assert afield.get([meet_remote.remote("a", "b"), meet_remote.remote("b", "a")]) == [True, True]


# -- refs as arguments --------------------------------------------------------------------------------------------


def test_top_level_refs_are_resolved(shared_runtime: None) -> None:
    @afield.remote
    def add(a: int, b: int) -> int:
        return a + b

    one, two = afield.put(1), add.remote(1, 1)
    assert afield.get(add.remote(one, two)) == 3
    assert afield.get(add.remote(one, b=two)) == 3
    assert afield.get(add.remote(a=one, b=one)) == 2


def test_nested_refs_arrive_as_refs(shared_runtime: None) -> None:
    @afield.remote
    def look(items: list[Any], *, named: dict[str, Any]) -> tuple[list[str], int]:
        kinds = [type(item).__name__ for item in items] + [type(named["ref"]).__name__]
        return kinds, sum(afield.get(items)) + afield.get(named["ref"])

    a, b = afield.put(1), afield.put(2)
    assert afield.get(look.remote([a, b], named={"ref": a})) == (["ObjectRef", "ObjectRef", "ObjectRef"], 4)


def test_a_chain_and_a_fan_of_futures(shared_runtime: None) -> None:
    @afield.remote
    def add(*numbers: int) -> int:
        return sum(numbers)

    ref = add.remote(0)
    for _ in range(50):
        ref = add.remote(ref, 1)
    assert afield.get(ref) == 50
    assert afield.get(add.remote(*[add.remote(i) for i in range(100)])) == sum(range(100))


def test_a_task_returns_refs_of_its_own_making(shared_runtime: None) -> None:
    @afield.remote
    def inner(x: int) -> int:
        return x * x

    @afield.remote
    def outer() -> list[Any]:
        return [inner.remote(3), afield.put(4)]

    refs = afield.get(outer.remote())
    assert afield.get(refs) == [9, 4]


def test_a_ref_inside_a_put_value(shared_runtime: None) -> None:
    inner = afield.put([1, 2])
    outer = afield.put({"ref": inner})
    del inner
    assert afield.get(afield.get(outer)["ref"]) == [1, 2]


# -- nesting ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_recursion_does_not_deadlock_on_one_cpu(no_runtime: None) -> None:
    afield.init(num_cpus=1)

    @afield.remote
    def fib(n: int) -> int:
        if n < 2:
            return n
        return sum(afield.get([fib.remote(n - 1), fib.remote(n - 2)]))

    assert afield.get(fib.remote(7), timeout=HANG_S) == 13


def test_a_deep_chain_of_nested_tasks(no_runtime: None) -> None:
    afield.init(num_cpus=1)

    @afield.remote
    def dig(depth: int) -> int:
        return 0 if depth == 0 else 1 + afield.get(dig.remote(depth - 1))

    assert afield.get(dig.remote(12), timeout=HANG_S) == 12


def test_wait_and_put_inside_a_task(shared_runtime: None) -> None:
    @afield.remote
    def leaf(x: int) -> int:
        return x

    @afield.remote
    def parent() -> int:
        refs = [leaf.remote(i) for i in range(5)]
        total = 0
        while refs:
            (ready,), refs = afield.wait(refs)
            total += afield.get(afield.put(afield.get(ready)))
        return total

    assert afield.get(parent.remote()) == 10


# -- get ----------------------------------------------------------------------------------------------------------


def test_get_of_one_and_of_lists(shared_runtime: None) -> None:
    refs = [afield.put(i) for i in range(3)]
    assert afield.get(refs[0]) == 0
    assert afield.get(refs) == [0, 1, 2]
    assert afield.get(tuple(refs)) == [0, 1, 2]
    assert afield.get([refs[1], refs[1]]) == [1, 1]
    assert afield.get([]) == []
    assert afield.get(refs[0]) == 0  # as often as one likes


def test_get_with_a_timeout(shared_runtime: None, tmp_path: Path) -> None:
    wait_at_gate, open_gate = gate(tmp_path)
    ref = wait_at_gate.remote("through")
    for timeout in (0, 0.05):
        started = time.monotonic()
        with pytest.raises(afield.GetTimeoutError, match="was not ready"):
            afield.get(ref, timeout=timeout)
        assert timeout <= time.monotonic() - started < timeout + 5
    with pytest.raises(TimeoutError):  # the builtin one too
        afield.get([afield.put(1), ref], timeout=0.01)
    open_gate()
    assert afield.get(ref, timeout=PATIENCE_S) == "through"
    assert afield.get(ref, timeout=0) == "through"


def test_get_of_an_early_result_does_not_wait_for_a_later_one(shared_runtime: None, tmp_path: Path) -> None:
    wait_at_gate, open_gate = gate(tmp_path)
    blocked = wait_at_gate.remote()
    quick = afield.remote(lambda: "quick")
    assert afield.get([quick.remote() for _ in range(20)], timeout=PATIENCE_S) == ["quick"] * 20
    open_gate()
    assert afield.get(blocked) is None


def test_get_in_many_threads(shared_runtime: None) -> None:
    square = afield.remote(lambda x: x * x)
    results: dict[int, Any] = {}

    def work(i: int) -> None:
        results[i] = afield.get([square.remote(i), afield.put(-i)])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    assert results == {i: [i * i, -i] for i in range(8)}


# -- wait ---------------------------------------------------------------------------------------------------------


def test_wait_keeps_the_order_and_returns_at_most_what_was_asked_for(shared_runtime: None) -> None:
    refs = [afield.put(i) for i in range(5)]
    assert afield.wait(refs) == (refs[:1], refs[1:])
    assert afield.wait(refs, num_returns=3) == (refs[:3], refs[3:])
    assert afield.wait(refs, num_returns=5) == (refs, [])
    assert afield.wait(tuple(refs), num_returns=2, timeout=0) == (refs[:2], refs[2:])


def test_wait_for_done_failed_and_pending(shared_runtime: None, tmp_path: Path) -> None:
    wait_at_gate, open_gate = gate(tmp_path)

    @afield.remote
    def fail() -> None:
        raise ValueError("no")

    pending, failed, done = wait_at_gate.remote("late"), fail.remote(), afield.put("done")
    refs = [pending, failed, done]
    assert afield.wait(refs, num_returns=2, timeout=PATIENCE_S) == ([failed, done], [pending])
    assert afield.wait(refs, num_returns=3, timeout=0) == ([failed, done], [pending])
    started = time.monotonic()
    assert afield.wait([pending], timeout=0.05) == ([], [pending])
    assert 0.05 <= time.monotonic() - started < 5
    open_gate()
    assert afield.wait(refs, num_returns=3, timeout=PATIENCE_S) == (refs, [])
    assert afield.get(pending) == "late"
    with pytest.raises(ValueError, match="no"):
        afield.get(failed)


def test_wait_takes_results_as_they_come(shared_runtime: None, tmp_path: Path) -> None:
    first, open_first = gate(tmp_path, "first")
    second, open_second = gate(tmp_path, "second")
    a, b = first.remote("a"), second.remote("b")
    open_second()
    ready, rest = afield.wait([a, b], timeout=PATIENCE_S)
    assert (ready, rest) == ([b], [a])
    open_first()
    assert afield.wait(rest, timeout=PATIENCE_S) == ([a], [])


def test_wait_for_a_thousand(shared_runtime: None) -> None:
    @afield.remote
    def nothing() -> None:
        pass

    refs = [nothing.remote() for _ in range(1000)]
    ready, rest = afield.wait(refs, num_returns=1000, timeout=HANG_S)
    assert ready == refs and rest == []


# -- refs ---------------------------------------------------------------------------------------------------------


def test_refs_are_hashable_and_comparable(shared_runtime: None) -> None:
    a, b = afield.put(1), afield.put(1)
    assert a == a and a != b and hash(a) == hash(a)
    assert a != 1 and a != a.hex()
    assert {a: "a", b: "b"}[a] == "a"
    assert len({a, b, a}) == 2
    assert a.hex() in repr(a)
    # The same object, come back from elsewhere, is the same ref.
    (again,) = afield.get(afield.remote(lambda refs: refs).remote([a]))
    assert again == a and hash(again) == hash(a)


def test_a_ref_pickles_as_a_reference_only(shared_runtime: None) -> None:
    ref = afield.put(b"x" * 50_000)
    with pytest.warns(UserWarning, match="pickled outside of afield"):
        data = pickle.dumps(ref)
    assert len(data) < 500
    again = pickle.loads(data)
    assert again == ref
    del ref
    assert afield.get(again) == b"x" * 50_000


def test_tasks_give_their_submissions_the_same_ids_each_time(shared_runtime: None) -> None:
    @afield.remote
    def scope() -> str:
        return afield.put(None).hex()

    assert len(set(afield.get([scope.remote() for _ in range(5)]))) == 5


# -- resources and devices ----------------------------------------------------------------------------------------


def test_cpus_are_counted_and_come_back(no_runtime: None, tmp_path: Path) -> None:
    info = afield.init(num_cpus=2, resources={"licence": 3}, host_memory="64MiB")
    assert info.num_cpus == 2 and info.devices == [] and info.host_memory == 64 << 20
    assert "2 CPUs" in str(info) and "64 MiB" in str(info)
    total = afield.cluster_resources()
    assert total["CPU"] == 2 and total["licence"] == 3 and total["memory"] > 0 and "GPU" not in total
    wait_at_gate, open_gate = gate(tmp_path)
    ref = wait_at_gate.options(num_cpus=1.5, resources={"licence": 2}).remote()
    assert poll(lambda: afield.available_resources().get("CPU", 0) == 0.5, PATIENCE_S)
    assert afield.available_resources()["licence"] == 1
    open_gate()
    afield.get(ref)
    assert poll(lambda: afield.available_resources() == total, PATIENCE_S)


def test_a_task_that_waits_gives_its_cpus_back(no_runtime: None, tmp_path: Path) -> None:
    afield.init(num_cpus=1)
    wait_at_gate, open_gate = gate(tmp_path)

    @afield.remote
    def parent() -> str:
        return str(afield.get(wait_at_gate.options(num_cpus=0).remote("child")))

    ref = parent.remote()
    assert poll(lambda: afield.available_resources().get("CPU", 0) == 1, PATIENCE_S)
    assert afield.get(afield.remote(lambda: "other").remote(), timeout=PATIENCE_S) == "other"
    open_gate()
    assert afield.get(ref, timeout=PATIENCE_S) == "child"


def test_custom_resources_limit_what_runs_at_once(no_runtime: None, tmp_path: Path) -> None:
    afield.init(num_cpus=4, resources={"token": 1})
    path = str(tmp_path / "busy")

    @remote_with(num_cpus=0, resources={"token": 1})
    def alone() -> None:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        time.sleep(0.01)
        os.unlink(path)

    afield.get([alone.remote() for _ in range(8)], timeout=HANG_S)


@pytest.mark.parametrize("by_environment", [False, True])
def test_devices_are_counted(no_runtime: None, monkeypatch: pytest.MonkeyPatch, by_environment: bool) -> None:
    if by_environment:
        monkeypatch.setenv("AFIELD_DEVICES", "emulated:2")
        info = afield.init(num_cpus=2)
    else:
        info = afield.init(num_cpus=2, devices="emulated:2")
    assert len(info.devices) == 2
    assert afield.cluster_resources()["GPU"] == 2


def test_the_argument_goes_before_the_environment(no_runtime: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFIELD_DEVICES", "emulated:2")
    afield.init(num_cpus=1, devices="none")
    assert "GPU" not in afield.cluster_resources()


def visible() -> list[str]:
    """Return the devices that this process may use."""
    return [uuid for uuid in os.environ["AFIELD_VISIBLE_DEVICES"].split(",") if uuid]


def test_tasks_see_their_devices_and_no_others(shared_runtime: None, tmp_path: Path) -> None:
    def hold(folder: Path, mine: str, other: str) -> list[str]:
        (folder / mine).touch()
        assert poll((folder / other).exists)
        return [uuid for uuid in os.environ["AFIELD_VISIBLE_DEVICES"].split(",") if uuid]

    one = afield.remote(num_gpus=1)(hold)
    a, b = afield.get([one.remote(tmp_path, "a", "b"), one.remote(tmp_path, "b", "a")], timeout=HANG_S)
    assert len(a) == len(b) == 1 and a != b
    seen = afield.remote(lambda: [uuid for uuid in os.environ["AFIELD_VISIBLE_DEVICES"].split(",") if uuid])
    assert sorted(afield.get(seen.options(num_gpus=2).remote(), timeout=HANG_S)) == sorted(a + b)
    assert afield.get(seen.remote()) == []
    assert afield.available_resources() is not None


def test_fractions_share_a_device(no_runtime: None, tmp_path: Path) -> None:
    afield.init(num_cpus=4, devices="emulated:1")

    @remote_with(num_gpus=0.5)
    def meet(mine: str, other: str) -> str:
        (tmp_path / mine).touch()
        assert poll((tmp_path / other).exists)
        return os.environ["AFIELD_VISIBLE_DEVICES"]

    a, b = afield.get([meet.remote("a", "b"), meet.remote("b", "a")], timeout=HANG_S)
    assert a == b != ""


# -- the life of the runtime --------------------------------------------------------------------------------------


def test_the_first_use_initialises(no_runtime: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from afield.runtime.face import lifecycle

    monkeypatch.setattr(lifecycle, "_no_auto_init", "")
    assert not afield.is_initialized()
    ref = afield.put(7)
    assert afield.is_initialized()
    assert afield.get(ref) == 7


def test_init_again_can_be_ignored_and_shutdown_repeated(no_runtime: None) -> None:
    first = afield.init(num_cpus=1)
    assert afield.init(num_cpus=5, ignore_reinit_error=True) == first
    afield.shutdown()
    assert not afield.is_initialized()
    afield.shutdown()
    second = afield.init(num_cpus=1)
    assert second.session != first.session
    assert afield.get(afield.remote(lambda: 1).remote()) == 1


@pytest.mark.slow
def test_functions_serve_one_runtime_after_another(no_runtime: None) -> None:
    double = afield.remote(lambda x: 2 * x)
    for i in range(3):
        afield.init(num_cpus=1)
        assert afield.get(double.remote(i)) == 2 * i
        afield.shutdown()


def test_stats_count(runtime: afield.ClusterInfo) -> None:
    nothing = afield.remote(lambda: None)
    afield.get([nothing.remote() for _ in range(10)])
    assert afield.stats()["tasks_submitted"] == 10
    assert afield.stats()["tasks_retried"] == 0


def test_what_workers_print_arrives_with_their_name(runtime: afield.ClusterInfo, capfd: Any) -> None:
    def speak() -> None:
        print("good\nmorning")

    afield.get(afield.remote(name="speaker")(speak).remote())
    text = ""

    def arrived() -> bool:
        nonlocal text
        afield.available_resources()
        text += capfd.readouterr().out
        return "morning" in text

    assert poll(arrived, PATIENCE_S)
    assert all(line.startswith("(speaker pid=") for line in text.splitlines())
    assert [line.split(") ")[1] for line in text.splitlines()] == ["good", "morning"]
