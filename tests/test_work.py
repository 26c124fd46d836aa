"""The core of a worker's queue and cancellation: its table, a model under hypothesis, and every interleaving of two threads."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from afield.errors import InternalError
from afield.runtime.cores import work as core
from afield.runtime.cores.work import (
    ANSWER,
    ANSWERED,
    CANCELLED,
    DROPPED,
    FAILING,
    FINISHING,
    FLAGGED,
    HANDED_BACK,
    INTERRUPT,
    INTERRUPTIBLE,
    NOTHING,
    PREPARING,
    QUEUED,
    REPLYING,
    RUNNING,
    TABLE,
    Work,
)

DOCS = Path(__file__).resolve().parent.parent / "docs" / "state-machines.md"


@dataclass(eq=False)
class Job:
    """A call as the core sees it."""

    caller: str
    sequence: int
    state: str = QUEUED
    cancel: Any = None


def begin(work: Work[Job]) -> Job:
    """Take the oldest call, as the main thread does."""
    job = work.take()
    job.state = PREPARING
    return job


def end(work: Work[Job], job: Job) -> None:
    """Answer a call, as the main thread does."""
    job.state = REPLYING
    job.state = CANCELLED if job.cancel is not None else ANSWERED
    work.current = None


def push(work: Work[Job], *sequences: int, caller: str = "a") -> list[Job]:
    """Let pushes arrive."""
    jobs = [Job(caller, sequence) for sequence in sequences]
    for job in jobs:
        work.arrived(job)
    return jobs


# -- the table --------------------------------------------------------------------------------------------------------


def test_the_diagram_in_the_docs_is_drawn_from_the_table() -> None:
    assert TABLE.diagram() in DOCS.read_text()


def test_a_call_ends_in_one_of_four_ways() -> None:
    assert set(TABLE.final()) == {ANSWERED, CANCELLED, HANDED_BACK, DROPPED}


def test_every_started_call_can_be_cancelled_and_no_other_state_changes_by_it() -> None:
    for state in core.STARTED:
        assert TABLE.after(state, "cancel") == state
    assert set(core.STARTED) >= set(INTERRUPTIBLE)


def test_what_must_not_happen_raises_with_the_story() -> None:
    work: Work[Job] = Work()
    first, second = push(work, 1, 2)
    work.recall("a", 1)
    first.state = RUNNING  # while it waits
    with pytest.raises(InternalError, match="call at a worker 1: recall in state running") as caught:
        work.recall("a", 1)
    assert "2 recall queued -> handed_back" in str(caught.value)
    assert second.state == HANDED_BACK


def test_validate_complains() -> None:
    work: Work[Job] = Work()
    first, second = push(work, 1, 2)
    assert work.validate() == []
    first.state = RUNNING
    second.cancel = True
    work.due = Job("a", 3)
    work.blocked = True
    work.open["a", 4] = Job("b", 4, DROPPED)
    assert len(work.validate()) == 7, work.validate()


def test_validate_looks_at_a_bounded_number() -> None:
    work: Work[Job] = Work()
    for job in push(work, *range(core.MAX_VALIDATED + 500)):
        job.state = RUNNING
    assert len(work.validate()) == core.MAX_VALIDATED


# -- cases ------------------------------------------------------------------------------------------------------------


def test_a_burst_does_not_spare_the_running_one() -> None:
    work: Work[Job] = Work()
    jobs = push(work, *range(25))
    running = begin(work)
    running.state = RUNNING
    decisions = [work.cancel("a", job.sequence, "please")[1] for job in jobs]
    assert decisions == [INTERRUPT] + [ANSWER] * 24
    assert work.may_interrupt()
    assert work.take_interrupt()
    assert not work.take_interrupt(), "it is interrupted once"
    assert [job.state for job in jobs] == [RUNNING] + [CANCELLED] * 24


@pytest.mark.parametrize("state", [PREPARING, RUNNING, FINISHING, FAILING, REPLYING])
def test_a_late_signal_finds_another_call(state: str) -> None:
    work: Work[Job] = Work()
    first, second = push(work, 1, 2)
    begin(work).state = RUNNING
    assert work.cancel("a", 1, "please")[1] == INTERRUPT
    end(work, first)
    assert not work.may_interrupt()
    begin(work).state = state
    assert not work.may_interrupt()
    assert work.cancel("a", 1, "please") == (None, NOTHING)
    assert second.cancel is None
    assert work.cancel("a", 2, "please")[1] == INTERRUPT
    assert work.may_interrupt() == (state in INTERRUPTIBLE)


def test_a_request_that_comes_between_two_calls_is_forgotten() -> None:
    work: Work[Job] = Work()
    push(work, 1, 2)
    end(work, begin(work))
    assert work.cancel("a", 1, "please") == (None, NOTHING)
    assert work.missed
    assert begin(work).cancel is None
    assert not work.missed


def test_blocking_hands_each_caller_its_own_calls_back() -> None:
    work: Work[Job] = Work()
    push(work, 1, 2)
    push(work, 1, caller="b")
    begin(work)
    assert work.block() == {"a": [2], "b": [1]}
    assert work.blocked
    assert work.unblock()
    assert not work.unblock()


def test_recalling_takes_the_newest_of_one_caller() -> None:
    work: Work[Job] = Work()
    push(work, 1, 2, 3)
    push(work, 1, caller="b")
    assert work.recall("a", 2) == [2, 3]
    assert work.recall("a", 5) == [1]
    assert work.recall("a", 5) == []
    assert [job.caller for job in work.queue] == ["b"]


# -- a model ----------------------------------------------------------------------------------------------------------

CALLERS = ["a", "b"]


class Machine(RuleBasedStateMachine):
    """The core beside a model: what has become of each push, as its caller sees it."""

    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.work: Work[Job] = Work()
        self.number = 0
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        #: Calls that were cancelled before their outcome was there: they must end so.
        self.doomed: set[Job] = set()
        self.interrupted: set[Job] = set()

    @initialize(concurrent=st.booleans())
    def begin(self, concurrent: bool) -> None:
        self.work.concurrent = concurrent

    @rule(target=jobs, caller=st.sampled_from(CALLERS))
    def push(self, caller: str) -> Job:
        self.number += 1
        job = Job(caller, self.number)
        if self.work.arrived(job):
            self.waiting.append(job)
        else:
            assert self.work.left and job.state == DROPPED
        return job

    @precondition(lambda self: not self.work.concurrent and self.work.current is None)
    @rule()
    def take(self) -> None:
        if not self.waiting:
            with pytest.raises(IndexError):
                self.work.take()
            return
        job = begin(self.work)
        assert job is self.waiting.pop(0)
        assert job.cancel is None
        self.running.append(job)

    @rule(job=jobs)
    def start(self, job: Job) -> None:
        if self.work.concurrent:
            assert self.work.start(job) == (job in self.waiting)
            if job in self.waiting:
                self.waiting.remove(job)
                self.running.append(job)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def advance(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.running))
        nexts = {
            PREPARING: [RUNNING, FAILING],
            RUNNING: [FINISHING, FAILING],
            FINISHING: [REPLYING, FAILING],
            FAILING: [REPLYING],
            REPLYING: [ANSWERED],
        }
        job.state = data.draw(st.sampled_from(nexts[job.state]))
        if job.state == ANSWERED:
            assert (job.cancel is not None) == (job in self.doomed)
            job.state = CANCELLED if job.cancel is not None else ANSWERED
            self.running.remove(job)
            if self.work.concurrent:
                self.work.ended(job)
            else:
                self.work.current = None
                self.work.unblock()

    @rule(job=jobs)
    def cancel(self, job: Job) -> None:
        found, decision = self.work.cancel(job.caller, job.sequence, "please")
        if job in self.waiting:
            assert (found, decision) == (job, ANSWER) and job.state == CANCELLED
            self.waiting.remove(job)
        elif job in self.running and job not in self.doomed:
            assert found is job
            assert decision == (FLAGGED if self.work.concurrent else INTERRUPT)
            self.doomed.add(job)
        else:
            assert decision == NOTHING

    @rule()
    def signal(self) -> None:
        """The handler of a signal runs, whether it was meant for this moment or not."""
        expected = [job for job in self.running if job.state in INTERRUPTIBLE and job in self.doomed - self.interrupted]
        if self.work.concurrent:
            expected = []
        assert self.work.may_interrupt() == bool(expected)
        assert self.work.take_interrupt() == bool(expected)
        self.interrupted.update(expected)

    @rule(caller=st.sampled_from(CALLERS), count=st.integers(0, 3))
    def recall(self, caller: str, count: int) -> None:
        mine = [job for job in self.waiting if job.caller == caller]
        expected = mine[max(0, len(mine) - count) :] if not self.work.concurrent else []
        assert self.work.recall(caller, count) == [job.sequence for job in expected]
        self._gone(expected, HANDED_BACK)

    @precondition(lambda self: self.work.current is not None and not self.work.blocked)
    @rule()
    def block(self) -> None:
        taken = self.work.block()
        assert sorted(sequence for each in taken.values() for sequence in each) == [
            job.sequence for job in self.waiting
        ]
        self._gone(list(self.waiting), HANDED_BACK)

    @rule()
    def unblock(self) -> None:
        was = self.work.blocked
        assert self.work.unblock() == was

    @rule(caller=st.sampled_from(CALLERS))
    def lose(self, caller: str) -> None:
        expected = [job for job in self.waiting if job.caller == caller]
        assert set(self.work.caller_gone(caller)) == set(expected)
        self._gone(expected, DROPPED)

    @precondition(lambda self: self.number > 12)
    @rule()
    def leave(self) -> None:
        dropped = self.work.leave()
        if not self.work.concurrent:
            assert dropped == self.waiting
            self._gone(list(self.waiting), DROPPED)
        else:
            assert dropped == []  # of concurrent calls those end that are here

    def _gone(self, jobs: list[Job], state: str) -> None:
        for job in jobs:
            assert job.state == state
            self.waiting.remove(job)

    @invariant()
    def nothing_is_wrong(self) -> None:
        assert self.work.validate() == []
        known = list(self.work.open.values()) if self.work.concurrent else list(self.work.queue)
        assert [job for job in known if job.state == QUEUED] == self.waiting
        for job in self.running:
            assert self.work.find(job.caller, job.sequence) is job
        if not self.work.concurrent:
            assert self.work.current is (self.running[0] if self.running else None)


TestMachine = Machine.TestCase
TestMachine.pytestmark = [pytest.mark.slow]
TestMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


# -- every interleaving of two threads --------------------------------------------------------------------------------


class Steps:
    """Runs a function on a thread of its own, bytecode by bytecode of the core."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.result: Any = None
        self._function = function
        self._go, self._came = threading.Semaphore(0), threading.Semaphore(0)
        self._left = 0
        self.over = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != core.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            if self._left == 0:
                self._came.release()
                self._go.acquire()
            self._left -= 1
        return self._trace

    def _run(self) -> None:
        self._go.acquire()
        sys.settrace(self._trace)
        try:
            self.result = self._function()
        except IndexError:
            self.result = None
        finally:
            sys.settrace(None)
            self.over = True
            self._came.release()

    def run(self, bytecodes: int) -> None:
        """Run that many bytecodes (-1: to the end); those of C functions count as part of the call."""
        if not self.over:
            self._left = bytecodes
            self._go.release()
            assert self._came.acquire(timeout=60)
        if bytecodes < 0:
            self._thread.join(60)


def interleavings(
    setup: Callable[[], tuple[Work[Job], Callable[[], Any], Callable[[], Any]]],
    check: Callable[[Work[Job], Any, Any], None],
) -> int:
    """Run two functions as two threads: the first up to each of its bytecodes, the second up to each of its, then each of
    them to its end in both orders; return how many ways there were.
    """
    ways = 0
    first_at, first_over = 0, False
    while not first_over:
        second_at, second_over = 0, False
        while not second_over:
            for order in (0, 1):
                work, one, two = setup()
                first, second = Steps(one), Steps(two)
                first.run(first_at)
                second.run(second_at)
                first_over, second_over = first.over, second.over
                for each in (first, second) if order == 0 else (second, first):
                    each.run(-1)
                check(work, first.result, second.result)
                ways += 1
            second_at += 1
        first_at += 1
    return ways


@pytest.mark.slow
def test_a_cancellation_at_every_moment_of_the_taking() -> None:
    """It is never lost, and a call that was answered for never starts."""

    def setup() -> tuple[Work[Job], Callable[[], Any], Callable[[], Any]]:
        work: Work[Job] = Work()
        push(work, 1, 2)
        return work, work.take, lambda: work.cancel("a", 1, "please")

    def check(work: Work[Job], taken: Job, answer: tuple[Job | None, str]) -> None:
        found, decision = answer
        if decision == ANSWER:
            assert found is not None and found.state == CANCELLED
            assert taken.sequence == 2 and taken.cancel is None
        else:
            assert taken.sequence == 1
            assert taken.cancel == "please", decision
            assert [job.sequence for job in work.queue] == [2]
        if decision == INTERRUPT:
            assert work.due is taken
        assert work.current is taken

    assert interleavings(setup, check) > 200


@pytest.mark.slow
@pytest.mark.parametrize("event", ["recall", "caller gone"])
def test_a_call_leaves_the_queue_once(event: str) -> None:
    def setup() -> tuple[Work[Job], Callable[[], Any], Callable[[], Any]]:
        work: Work[Job] = Work()
        push(work, 1)
        return work, work.take, lambda: work.recall("a", 1) if event == "recall" else work.caller_gone("a")

    def check(work: Work[Job], taken: Job | None, gone: list[Any]) -> None:
        assert (taken is None) == bool(gone)
        assert not work.queue

    assert interleavings(setup, check) > 50


@pytest.mark.slow
def test_a_cancellation_while_calls_end_and_begin() -> None:
    """Of the call that ends: it may come too late. Of no other: the next call is never marked."""

    def setup() -> tuple[Work[Job], Callable[[], Any], Callable[[], Any]]:
        work: Work[Job] = Work()
        push(work, 1, 2)

        def go_on() -> Job:
            end(work, begin(work))
            return begin(work)

        return work, go_on, lambda: work.cancel("a", 1, "please")

    def check(work: Work[Job], second: Job | None, answer: tuple[Job | None, str]) -> None:
        found, decision = answer
        if decision == ANSWER:
            assert second is None
            assert work.current is None or work.current.sequence == 2
            return
        assert second is not None and second.sequence == 2 and second.cancel is None
        assert not work.may_interrupt()
        assert found is None or found.sequence == 1

    assert interleavings(setup, check) > 200
