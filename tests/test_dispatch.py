"""The owner's side of leases: windows, demand, recall, hand-back and lost workers, without any process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from afield.errors import InternalError
from afield.runtime.cores.dispatch import IDLE_LEASE_S, MAX_WINDOW, WINDOW_S, Lane, Lanes, Lease, ReadyQueue, Task


class Shell:
    """Does what a lane asks for by writing it down."""

    def __init__(self) -> None:
        self.pushed: list[tuple[Lease, list[Task]]] = []
        self.demands: list[int] = []
        self.returned: list[Lease] = []
        self.recalled: list[tuple[Lease, int]] = []
        self.sequence = 0

    def push(self, lease: Lease, tasks: Sequence[Task]) -> None:
        """Send tasks."""
        self.pushed.append((lease, list(tasks)))
        for task in tasks:
            self.sequence += 1
            lease.inflight[self.sequence] = task

    def demand(self, lane: Lane, count: int) -> None:
        """Tell the daemon."""
        self.demands.append(count)

    def return_lease(self, lease: Lease) -> None:
        """Give back."""
        self.returned.append(lease)

    def recall(self, lease: Lease, count: int) -> None:
        """Ask for tasks."""
        self.recalled.append((lease, count))


def make_lane(max_calls: int = 0) -> tuple[Lane, Shell]:
    """Return an empty lane and its shell."""
    shell = Shell()
    return Lane(1, {"CPU": 10_000}, shell, max_calls=max_calls), shell


def task(name: str) -> Task:
    """Return a task."""
    return Task(name.encode(), None, b"", None)


def grant(lane: Lane, number: int = 1, now: float = 0.0) -> Lease:
    """Grant the lane a lease."""
    lease = Lease(number, b"worker %d" % number, lane, None)
    lane.granted(lease, now)
    return lease


def add(lane: Lane, tasks: Iterable[Task]) -> None:
    for one in tasks:
        lane.ready.append(one)


def names(tasks: list[Task]) -> list[str]:
    """Return the names of tasks."""
    return [one.task_id.decode() for one in tasks]


def reply(lane: Lane, lease: Lease, count: int, now: float) -> list[Task]:
    """The oldest tasks of a lease end."""
    done = [lease.inflight.pop(sequence) for sequence in list(lease.inflight)[:count]]
    lane.replied(lease, len(done), now)
    return done


def submit(lane: Lane, count: int, now: float = 0.0) -> None:
    """Submit tasks that are named by their numbers."""
    for i in range(count):
        lane.submit(task(str(i)), now)


def test_without_a_lease_a_task_waits_and_asks_for_one() -> None:
    lane, shell = make_lane()
    submit(lane, 1)
    assert shell.demands == [1] and not shell.pushed
    lease = grant(lane)
    assert [(leased, names(tasks)) for leased, tasks in shell.pushed] == [(lease, ["0"])]
    assert not lane.ready and lane.demanded == 0


def test_demand_is_told_when_it_doubles_and_when_it_ends() -> None:
    lane, shell = make_lane()
    submit(lane, 1000)
    assert shell.demands == sorted(shell.demands) and len(shell.demands) < 12
    assert shell.demands[-1] >= 500
    leases = [grant(lane, i) for i in range(3)]
    told = len(shell.demands)
    while any(lease.inflight for lease in leases):
        for lease in leases:
            if lease.inflight:
                reply(lane, lease, len(lease.inflight), 0.0)
    assert shell.demands[-1] == 0 and len(shell.demands) <= told + 2


def test_a_new_lease_gets_one_task_then_more_if_tasks_are_short() -> None:
    lane, shell = make_lane()
    submit(lane, 2000)
    lease = grant(lane)
    sizes, now = [], 0.0
    while lease.inflight:
        sizes.append(len(lease.inflight))
        now += 1e-6 * len(lease.inflight)
        reply(lane, lease, len(lease.inflight), now)
    assert sizes[:4] == [1, 2, 4, 8]
    assert max(sizes) <= MAX_WINDOW == lease.window
    assert [name for _, tasks in shell.pushed for name in names(tasks)] == [str(i) for i in range(2000)]


def test_the_window_shrinks_when_tasks_turn_out_long() -> None:
    lane, _ = make_lane()
    submit(lane, 100)
    lease = grant(lane)
    lease.window = 64
    reply(lane, lease, 1, 1.0)  # one second for one task
    assert lease.window == 1
    reply(lane, lease, 1, 2.0)
    assert len(lease.inflight) <= 1


def test_long_tasks_are_never_queued_behind_one_another() -> None:
    lane, _ = make_lane()
    submit(lane, 10)
    lease, now = grant(lane), 0.0
    while lease.inflight:
        assert len(lease.inflight) == 1
        now += 10 * WINDOW_S
        reply(lane, lease, 1, now)
    assert not lane.ready


def test_a_submission_goes_straight_to_an_idle_worker() -> None:
    lane, shell = make_lane()
    lane.submit(task("a"), 0.0)
    lease = grant(lane)
    reply(lane, lease, 1, 0.1)
    told = list(shell.demands)
    lane.submit(task("b"), 0.2)
    assert names(shell.pushed[-1][1]) == ["b"] and lease.mark == 0.2
    assert shell.demands == told


def test_work_is_shared_among_open_leases() -> None:
    lane, shell = make_lane()
    leases = [grant(lane, i) for i in range(4)]
    for lease in leases:
        lease.window = 64
    add(lane, (task(str(i)) for i in range(40)))
    lane.fill(0.0)
    counts = sorted(len(lease.inflight) for lease in leases)
    assert sum(counts) == 40 and counts[-1] <= 2 * counts[0] + 1
    assert shell.pushed


def test_tasks_behind_a_long_one_are_recalled_for_an_idle_worker() -> None:
    lane, shell = make_lane()
    busy = grant(lane, 1)
    busy.window = 16
    add(lane, (task(str(i)) for i in range(9)))
    lane.fill(0.0)
    assert len(busy.inflight) == 9
    idle = grant(lane, 2)
    assert shell.recalled == [(busy, 4)]
    grant(lane, 3)
    assert len(shell.recalled) == 1  # one recall at a time
    newest = list(busy.inflight)[-4:]
    tasks = [busy.inflight.pop(sequence) for sequence in newest]
    lane.handed_back(busy, tasks, False, 1.0)
    assert not busy.recalled and idle.inflight
    everywhere = [
        *busy.inflight.values(),
        *lane.ready,
        *(t for lease in lane.leases[1:] for t in lease.inflight.values()),
    ]
    assert sorted(names(everywhere)) == [str(i) for i in range(9)]


def test_a_single_task_in_flight_is_never_recalled() -> None:
    lane, shell = make_lane()
    lane.submit(task("a"), 0.0)
    grant(lane, 1)
    grant(lane, 2)
    assert not shell.recalled


def test_a_blocked_worker_gets_nothing_until_it_goes_on() -> None:
    lane, shell = make_lane()
    lease = grant(lane)
    lease.window = 8
    add(lane, (task(str(i)) for i in range(3)))
    lane.fill(0.0)
    tasks = [lease.inflight.pop(sequence) for sequence in list(lease.inflight)[1:]]
    lane.handed_back(lease, tasks, True, 0.1)
    assert lease.blocked and names(list(lane.ready)) == ["1", "2"]
    assert shell.demands[-1] >= 1  # somebody else has to run them
    lane.submit(task("3"), 0.2)
    assert len(lease.inflight) == 1
    lane.unblocked(lease, 0.3)
    assert len(lease.inflight) >= 1
    reply(lane, lease, len(lease.inflight), 0.3)
    assert lease.inflight or not lane.ready


def test_handed_back_tasks_go_first_and_in_their_order() -> None:
    lane, _ = make_lane()
    add(lane, [task("3"), task("4")])
    lane.requeue([task("1"), task("2")], 0.0)
    assert names(list(lane.ready)) == ["1", "2", "3", "4"]


def test_a_lost_worker_s_tasks_come_back_oldest_first() -> None:
    lane, shell = make_lane()
    lease = grant(lane)
    lease.window = 8
    add(lane, (task(str(i)) for i in range(5)))
    lane.fill(0.0)
    assert names(lane.worker_died(lease)) == ["0", "1", "2", "3", "4"]
    assert lane.leases == [] and not lease.inflight
    assert lane.worker_died(lease) == []
    lane.requeue([task("0")], 0.0)
    assert shell.demands[-1] >= 1


def test_idle_leases_are_given_back_after_a_while() -> None:
    lane, shell = make_lane()
    a, b = grant(lane, 1, 10.0), grant(lane, 2, 10.1)
    assert lane.return_idle(10.15, IDLE_LEASE_S) == pytest.approx(10.0 + IDLE_LEASE_S)
    assert not shell.returned
    assert lane.return_idle(10.0 + IDLE_LEASE_S, IDLE_LEASE_S) == pytest.approx(10.1 + IDLE_LEASE_S)
    assert shell.returned == [a]
    assert lane.return_idle(10.2, 0.0) is None  # the daemon wants it now
    assert shell.returned == [a, b] and not lane.leases


def test_a_lease_with_work_or_a_blocked_one_is_kept() -> None:
    lane, shell = make_lane()
    lane.submit(task("a"), 0.0)
    lease = grant(lane)
    assert lane.return_idle(100.0, 0.0) is None
    reply(lane, lease, 1, 100.0)
    lane.handed_back(lease, [], True, 100.0)
    assert lane.return_idle(200.0, 0.0) is None and not shell.returned


class LaneMachine(RuleBasedStateMachine):
    """Workers come, work, block, hand back and die in any order; every task ends exactly once and none is forgotten."""

    max_calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.lane, self.shell = make_lane(self.max_calls)
        self.now = 0.0
        self.submitted: set[str] = set()
        self.done: list[str] = []
        self.granted = 0
        self.answered: list[int] = []  # leases whose workers have answered recalls

    def lease(self, data: st.DataObject) -> Lease:
        lease: Lease = data.draw(st.sampled_from(self.lane.leases))
        return lease

    @rule(count=st.integers(1, 30))
    def submit(self, count: int) -> None:
        for _ in range(count):
            name = str(len(self.submitted))
            self.submitted.add(name)
            self.lane.submit(task(name), self.now)

    @precondition(lambda self: self.lane.demanded and len(self.lane.leases) < 5)
    @rule(window=st.sampled_from([1, 4, 16]))
    def grant(self, window: int = 1) -> None:
        """A lease; `window`: as if it had been measured before that tasks are short."""
        self.granted += 1
        lease = Lease(self.granted, b"worker %d" % self.granted, self.lane, None)
        lease.window = 1 if self.max_calls else window
        self.lane.granted(lease, self.now)

    @precondition(lambda self: self.lane.leases)
    @rule(data=st.data(), seconds=st.sampled_from([1e-6, 1e-4, 1e-2, 1.0]))
    def finish(self, data: st.DataObject, seconds: float) -> None:
        lease = self.lease(data)
        if lease.inflight and not lease.blocked:
            count = data.draw(st.integers(1, len(lease.inflight)))
            self.now += seconds * count
            self.done += names(reply(self.lane, lease, count, self.now))

    @precondition(lambda self: self.lane.leases)
    @rule(data=st.data(), blocked=st.booleans())
    def hand_back(self, data: st.DataObject, blocked: bool) -> None:
        """A recall is answered, perhaps late, or the running task blocks; the running one stays."""
        lease = self.lease(data)
        answered = self.answered.count(lease.lease_id)
        owed = sum(recalled is lease for recalled, _ in self.shell.recalled) - answered
        if blocked and not lease.inflight:
            return
        if not blocked:
            if not owed:
                return
            self.answered.append(lease.lease_id)
        waiting = list(lease.inflight)[1:]
        first = data.draw(st.integers(0, len(waiting)))
        # What is older was there, and goes back; what is newer has not arrived yet. (A recall goes by the newest.)
        going = waiting[:first] if blocked else waiting[first:]
        tasks = [lease.inflight.pop(sequence) for sequence in going]
        self.lane.handed_back(lease, tasks, blocked, self.now)

    @precondition(lambda self: any(lease.blocked for lease in self.lane.leases))
    @rule(data=st.data())
    def unblock(self, data: st.DataObject) -> None:
        lease = self.lease(data)
        if lease.blocked:
            self.lane.unblocked(lease, self.now)

    @precondition(lambda self: self.lane.leases)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        self.lane.requeue(self.lane.worker_died(self.lease(data)), self.now)

    @rule(seconds=st.floats(0, 1), all_at_once=st.booleans())
    def pass_time(self, seconds: float, all_at_once: bool) -> None:
        self.now += seconds
        self.lane.return_idle(self.now, 0.0 if all_at_once else IDLE_LEASE_S)

    @invariant()
    def it_has_no_complaints(self) -> None:
        assert self.lane.complaints() == []

    @invariant()
    def every_task_is_in_one_place(self) -> None:
        places = [*names(list(self.lane.ready)), *self.done]
        for lease in self.lane.leases:
            places += names(list(lease.inflight.values()))
            assert len(lease.inflight) <= MAX_WINDOW
        assert sorted(places) == sorted(self.submitted)

    @invariant()
    def no_worker_has_more_than_it_may(self) -> None:
        had: dict[int, int] = {}
        for lease, tasks in self.shell.pushed if self.max_calls else ():
            had[lease.lease_id] = had.get(lease.lease_id, 0) + len(tasks)
        assert max(had.values(), default=0) <= self.max_calls
        assert all(lease.wears_out == (lease.lease_id in had) for lease in self.shell.returned)

    @invariant()
    def nobody_idles_beside_waiting_tasks(self) -> None:
        if self.lane.ready:
            assert self.lane.demanded > 0
            assert not any(not lease.inflight and not lease.blocked for lease in self.lane.leases)

    def teardown(self) -> None:
        for lease in list(self.lane.leases):
            if lease.blocked:
                self.lane.unblocked(lease, self.now)
        for _ in range(10 * len(self.submitted) + 10):
            if self.lane.ready and self.lane.demanded and not self.lane.leases:
                self.grant()
            for lease in list(self.lane.leases):
                if lease.recalled:
                    tasks = [lease.inflight.pop(sequence) for sequence in list(lease.inflight)[1:]]
                    self.lane.handed_back(lease, tasks, False, self.now)
                if lease.inflight:
                    self.now += 1e-5
                    self.done += names(reply(self.lane, lease, 1, self.now))
        assert sorted(self.done) == sorted(self.submitted)
        self.lane.return_idle(self.now + IDLE_LEASE_S, 0.0)
        assert not self.lane.leases


class WearingLaneMachine(LaneMachine):
    """The same where a worker ends after three tasks."""

    max_calls = 3


def test_a_lease_with_max_calls_takes_one_task_at_a_time_and_is_spent_after_the_last() -> None:
    lane, shell = make_lane(max_calls=2)
    lease = grant(lane)
    submit(lane, 5)
    for now in (0.0001, 0.0002):
        assert len(lease.inflight) == 1 and not shell.returned
        reply(lane, lease, 1, now)
    assert lease.state == "over" and shell.returned == [lease] and lease.wears_out
    assert len(lane.ready) == 3 and lane.demanded
    again = grant(lane, 2)
    reply(lane, again, 1, 0.0003)
    assert len(lane.worker_died(again)) == 1  # the worker went with the second
    assert shell.returned == [lease] and len(lane.ready) == 1


def test_the_last_task_of_a_worker_may_wait_inside() -> None:
    lane, shell = make_lane(max_calls=1)
    lease = grant(lane)
    submit(lane, 2)
    lane.handed_back(lease, [], True, 0.1)
    lane.unblocked(lease, 0.2)
    assert lease.state == "spent" and len(lease.inflight) == 1 and lane.complaints() == []
    reply(lane, lease, 1, 0.3)
    assert shell.returned == [lease]


def test_a_lease_that_was_not_used_up_wears_its_worker_out_all_the_same() -> None:
    lane, shell = make_lane(max_calls=3)
    used, unused = grant(lane, 1), grant(lane, 2)
    submit(lane, 1)
    reply(lane, used, 1, 0.1)
    lane.return_idle(1.0, IDLE_LEASE_S)
    assert [(lease, lease.wears_out) for lease in shell.returned] == [(used, True), (unused, False)]


def test_what_was_on_its_way_to_a_worker_that_blocks_is_recalled() -> None:
    """It came after the worker had handed back all that it had, and would wait behind a task that may wait for it."""
    lane, shell = make_lane()
    lease = grant(lane)
    lease.window = 8
    add(lane, (task(str(i)) for i in range(4)))
    lane.fill(0.0)
    there = list(lease.inflight)[1:2]
    lane.handed_back(lease, [lease.inflight.pop(sequence) for sequence in there], True, 0.1)
    assert shell.recalled == [(lease, 2)] and lease.state == "blocked_recalled"
    rest = [lease.inflight.pop(sequence) for sequence in list(lease.inflight)[1:]]
    lane.handed_back(lease, rest, False, 0.2)
    assert lease.state == "blocked" and names(list(lane.ready)) == ["2", "3", "1"]
    assert lane.demanded  # somebody else has to run them


def test_a_lease_whose_story_is_impossible_says_so() -> None:
    lane, _ = make_lane()
    lease = grant(lane)
    lane.worker_died(lease)
    with pytest.raises(InternalError, match=r"(?s)unblock in state over.*1 granted.*1 lose open -> over"):
        lane.unblocked(lease, 0.0)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda lane, lease: setattr(lease, "blocked", True), "with the flags"),
        (lambda lane, lease: setattr(lease, "window", 0), "in a window of 0"),
        (lambda lane, lease: lane.ready.append(task("x")), "idles while 1 tasks wait"),
        (
            lambda lane, lease: (setattr(lease, "state", "spent"), setattr(lease, "blocked", True)),
            "spent after 0 of 0 tasks",
        ),
        (lambda lane, lease: (setattr(lease, "state", "spent"), setattr(lease, "blocked", True)), "was not given back"),
        (lambda lane, lease: lane.ready.append(task("x")), "no lease is demanded"),
        (lambda lane, lease: lease.inflight.update(dict.fromkeys((1, 2), task("x"))), "in two places"),
    ],
)
def test_complaints(spoil: Any, complaint: str) -> None:
    lane, _ = make_lane()
    lease = grant(lane)
    lanes = Lanes()
    lanes.by_need["any"] = lane
    assert lanes.validate() == []
    spoil(lane, lease)
    assert complaint in "\n".join(lanes.validate())


LaneMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestLane: Any = pytest.mark.slow(LaneMachine.TestCase)
WearingLaneMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestWearingLane: Any = pytest.mark.slow(WearingLaneMachine.TestCase)


def test_what_consumes_comes_before_what_produces() -> None:
    queue = ReadyQueue()
    producers = [task(str(i)) for i in range(3)]
    consumers = [task(f"c{i}") for i in range(2)]
    for one in consumers:
        one.dependencies = [b"an argument"]
    for one in (producers[0], consumers[0], producers[1], consumers[1], producers[2]):
        queue.append(one)
    assert len(queue) == 5 and consumers[0] in queue
    assert queue.popleft() is consumers[0]
    queue.put_back([consumers[0]])
    queue.remove(producers[1])
    assert names(list(queue)) == ["c0", "c1", "0", "2"]
    assert names(queue.take_all()) == ["c0", "c1", "0", "2"] and not queue
