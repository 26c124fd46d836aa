"""Functions and classes at those who run them: one for each content, and none that nobody can call any more."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import afield
from afield.runtime.calls import participation, pushes
from afield.runtime.calls.callee import Callee
from afield.runtime.calls.pushes import PeerState
from afield.runtime.cores.dispatch import Lanes
from afield.runtime.node.actors import Classes
from afield.runtime.values.definitions import Definition
from afield.runtime.wire import messages
from afield.runtime.worker.executor import Executor
from tests.helpers import poll

CAPTURED_BYTES = 50_000


def known() -> tuple[int, int, int]:
    """Return how many callees and definitions this worker has, and how many bytes of them that are still pickles."""
    [executor] = [each for each in gc.get_objects() if type(each) is Executor]
    codes = executor._codes.values()
    return len(executor._callees), len(codes), sum(len(code._blob) for code in codes)


def make(number: int) -> Callable[[], int]:
    """Return a function that captures something of its own."""
    captured = number.to_bytes(2, "little") * (CAPTURED_BYTES // 2)
    return lambda: int.from_bytes(captured[:2], "little") + len(captured)


@pytest.fixture
def ask(shared_runtime: None) -> Any:
    """Have a worker look what it knows; all tasks of the test run there."""
    return afield.remote(num_cpus=2)(known)


def at_worker(**options: Any) -> Any:
    """Make a remote function of it whose tasks run where `ask` looks."""
    return afield.remote(num_cpus=2, **options)


def test_what_options_make_of_a_function_shares_its_definition(ask: Any) -> None:
    function = at_worker()(make(7))
    assert afield.get(function.remote()) == 7 + CAPTURED_BYTES
    callees, codes, _ = afield.get(ask.remote())
    for number in range(30):
        assert afield.get(function.options(name=f"named {number}").remote()) == 7 + CAPTURED_BYTES

    def settled() -> bool:
        now = afield.get(ask.remote())
        assert now[1] == codes
        return bool(now[0] <= callees + 1)

    assert poll(settled)
    alive = [function.options(name=f"kept {number}") for number in range(5)]
    afield.get([each.remote() for each in alive])
    assert afield.get(ask.remote())[1:] == (codes, 0)


def test_functions_of_equal_content_are_one(ask: Any) -> None:
    afield.get(ask.remote())
    codes = afield.get(ask.remote())[1]
    functions = [at_worker()(make(9)) for _ in range(5)]
    assert afield.get([each.remote() for each in functions]) == [9 + CAPTURED_BYTES] * 5
    assert afield.get(ask.remote())[1] == codes + 1
    del functions[1:]
    gc.collect()
    assert afield.get(functions[0].remote()) == 9 + CAPTURED_BYTES


def test_a_function_that_nobody_has_is_forgotten(ask: Any) -> None:
    afield.get(ask.remote())
    before = afield.get(ask.remote())
    for number in range(20):
        assert afield.get(at_worker()(make(number)).remote()) == number + CAPTURED_BYTES
    assert poll(lambda: afield.get(ask.remote()) == before)


def test_a_definition_that_comes_again_before_the_first_is_forgotten(ask: Any) -> None:
    for _ in range(20):
        function = at_worker()(make(11))
        refs = [function.remote(), function.options(name="other").remote()]
        del function  # the next one has the same content
        assert afield.get(refs) == [11 + CAPTURED_BYTES] * 2


def test_beyond_the_bound_the_oldest_is_sent_again(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushes, "MAX_CODE_BYTES", 3 * CAPTURED_BYTES)
    functions = [at_worker()(make(number)) for number in range(8)]
    for _ in range(2):
        for number, function in enumerate(functions):
            assert afield.get(function.remote()) == number + CAPTURED_BYTES
            assert afield.get(ask.remote())[1] <= 4
    refs = [function.remote() for function in functions * 5]  # forgotten while calls wait at the worker
    assert afield.get(refs) == [number + CAPTURED_BYTES for number in range(8)] * 5


def test_handles_that_are_passed_on_leave_nothing(shared_runtime: None) -> None:
    @afield.remote(num_cpus=0)
    class Target:
        def known(self) -> tuple[int, int, int]:
            return known()

    @afield.remote(num_cpus=0)
    class User:
        def use(self, target: Any) -> Any:
            return afield.get(target.known.remote())

    target, user = Target.remote(), User.remote()
    first = afield.get(user.use.remote(target))
    for _ in range(30):
        last = afield.get(user.use.remote(target))
    assert last[0] <= first[0] + 2


def test_what_a_peer_knows() -> None:
    """The bytes are counted; what was forgotten is defined with its code the next time."""
    state = PeerState()
    first, second = Definition(b"x" * 10, None, b"1"), Definition(b"y" * 20, None, b"2")
    a, b, c = Callee("a", first, 1), Callee("b", first, 1), Callee("c", second, 1)
    assert [state.knows(each).blob for each in (a, b, c)] == [first.blob, b"", second.blob]
    assert state.code_bytes == 30
    assert state.forget([a.index, 10**9], []) == messages.Forget([a.index], [])
    assert state.forget([], [b"1", b"3"]) == messages.Forget([], [b"1"])
    assert state.code_bytes == 20 and state.forget([a.index], [b"1"]) is None
    assert state.knows(a).blob == first.blob
    state.unknown(c.index)
    assert state.code_bytes == 10 and state.knows(c).blob == second.blob


def test_the_end_of_an_earlier_definition_is_not_that_of_its_equal(shared_runtime: None) -> None:
    def definition() -> Definition:
        return Definition(b"code", None, b"digest")

    sender = participation.ensure().submitter.pushes
    first = definition()
    with sender.process.pump.lock:
        sender._watch(b"digest", first)
        del first
        second = definition()
        sender._watch(b"digest", second)
        sender.forget_gone()
        assert sender._known[b"digest"]() is second
        del second
        sender.forget_gone()
        assert b"digest" not in sender._known


def test_large_definitions_of_equal_content_are_stored_once(shared_runtime: None) -> None:
    definitions = participation.ensure().definitions
    captured = os.urandom(3 << 20)
    first = definitions.define(lambda: captured, "a function")
    assert first.ref is not None
    again = definitions.define(captured, "another")
    assert again is not first and definitions.define(captured, "another") is again
    digest = again.digest
    del again
    assert digest not in definitions._known


def test_what_a_forgotten_function_has_captured_is_let_go_by_idle_workers(shared_runtime: None) -> None:
    captured = np.ones(3 << 17)

    @afield.remote
    def function() -> float:
        return float(captured.sum())

    assert afield.get(function.remote()) == captured.sum()
    assert any(entry.size > captured.nbytes for entry in afield.memory())
    del function  # no task runs after it: the worker that has run it is idle
    assert poll(lambda: not any(entry.size > captured.nbytes for entry in afield.memory()))


def test_actor_classes_share(shared_runtime: None) -> None:
    class Actor:
        def hello(self) -> int:
            return 1

    first = afield.remote(num_cpus=0)(Actor)
    second = first.options(max_concurrency=2)
    assert afield.get([first.remote().hello.remote(), second.remote().hello.remote()]) == [1, 1]
    assert second._defined is first._defined

    classes = Classes()

    def spec(blob: bytes) -> messages.CreateActor:
        return messages.CreateActor(b"id", "A", blob, {}, b"", None, None, {})

    specs = [spec(bytes(bytearray(b"class"))), spec(bytes(bytearray(b"class"))), spec(b"other")]
    for each in specs:
        classes.take(each)
    assert specs[0].blob is specs[1].blob
    for each in specs:
        classes.give_back(each)
    assert not classes._users


def test_lanes_live_as_long_as_somebody_may_use_them(shared_runtime: None) -> None:
    lanes: Lanes = participation.ensure().submitter.core

    @afield.remote(num_cpus=0.5)
    def function(value: int) -> int:
        return value

    assert afield.get(function.remote(1)) == 1
    gc.collect()
    before = len(lanes.by_need)
    for number in range(50):
        assert afield.get(function.options(memory=1000 + number).remote(number)) == number
    assert poll(lambda: gc.collect() >= 0 and len(lanes.by_need) <= before and len(lanes.by_key) <= before)

    kept = function.options(memory=77)
    assert afield.get(kept.remote(1)) == 1
    lane = participation.ensure().submitter.lane(kept._shape)
    assert poll(lambda: not lane.leases)
    assert kept._bound[2] is lane  # no other one for the same need, though it is idle
    assert afield.get([function.options(memory=77).remote(2), kept.remote(3)]) == [2, 3]


def test_a_lane_whose_tasks_are_cancelled_takes_no_lease(shared_runtime: None) -> None:
    lanes: Lanes = participation.ensure().submitter.core
    function = afield.remote(num_cpus=2)(lambda: 1)
    for number in range(20):
        ref = function.options(memory=5000 + number).remote()
        afield.cancel(ref)
        del ref
    gc.collect()
    assert afield.get(function.remote()) == 1
    assert poll(lambda: not lanes.validate() and len(lanes.by_need) < 20)
