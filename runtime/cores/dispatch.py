"""The owner's side of leases: a core without I/O that decides which worker gets which task, and when.

Theory of operation. Tasks of one resource shape wait in a `Lane`. The lane tells the node daemon how many leases it wants
(`demand`), pushes tasks straight to the workers it has leased, several at a time, and gives leases back when idle.

- *How many at a time*: a lease has a window of tasks in flight. It starts at one and follows the measured time per task, so
  that about `WINDOW_S` of work lies at the worker: hundreds of no-op tasks, one long task.
- *Tasks of uneven length*: when a lease runs dry while another one still has tasks waiting behind a long one, they are
  recalled and pushed to the idle worker. A worker that blocks inside a task hands its waiting tasks back by itself, and what
  was on its way to it meanwhile is recalled, so that no task ever waits behind the one that waits for it.
- *Tasks that wear their worker out* (`max_calls`): their lane has leases of a few tasks each, pushed one at a time. A lease
  that has had them is spent, gets no more, and is given back with word that its worker is to end.
- *Demand* is sent when it has doubled or ended, not for each task.

`LEASE` is the life of one lease; pushes and replies do not change it. Methods are called under the process's lock. `Actions` is
what the shell does for a lane.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import msgspec

from afield.machines import FlightRecorder, Table

#: Work that may lie in front of a worker, in seconds: long enough to hide a round trip, short enough to stay fair.
WINDOW_S = 0.005
MAX_WINDOW = 512
#: A lease without work is given back after this time, or at once when the daemon asks.
IDLE_LEASE_S = 0.25
#: So many lanes, and tasks of a lane, are looked at when the state is checked.
CHECKED = 1000

LEASE = Table(
    "lease, as its owner sees it",
    "open",
    {
        ("open", "recall"): "recalled",
        ("open", "block"): "blocked",
        ("open", "give_back"): "over",
        ("open", "lose"): "over",
        ("recalled", "hand_back"): "open",
        ("recalled", "block"): "blocked",
        ("recalled", "give_back"): "over",
        ("recalled", "lose"): "over",
        ("blocked", "unblock"): "open",
        ("blocked", "recall"): "blocked_recalled",
        ("blocked", "lose"): "over",
        ("blocked_recalled", "hand_back"): "blocked",
        ("blocked_recalled", "unblock"): "recalled",
        ("blocked_recalled", "lose"): "over",
        ("open", "spend"): "spent",
        ("spent", "give_back"): "over",
        ("spent", "lose"): "over",
    },
    {
        "open": "the worker takes tasks, as many as the window allows",
        "recalled": "it takes tasks, and was asked to hand back some that have not started",
        "blocked": "its task waits for something: it gets no others",
        "blocked_recalled": "the same, and it was asked to hand back what had been on its way",
        "spent": "it has had all the tasks that a worker of its lane may have, and gets no others",
        "over": "given back, or its worker is gone",
    },
    late=[
        # The answer to a recall comes after the worker has handed all back by itself, or to an earlier lease of the worker.
        ("open", "hand_back"),
        ("blocked", "hand_back"),
        # A wait that was interrupted ends without a word, and the next one says the same again.
        ("blocked", "block"),
        ("blocked_recalled", "block"),
        ("open", "unblock"),
        ("recalled", "unblock"),
        ("over", "lose"),
        # The last task of a worker waits for something, and goes on.
        ("spent", "block"),
        ("spent", "unblock"),
    ],
)


class Task(msgspec.Struct, gc=False, eq=False):
    """A submitted task, kept by its owner until its outcome is known."""

    task_id: bytes
    function: Any
    arguments: bytes
    lane: Any
    num_returns: int = 1
    retries_left: int = 0
    location: Any = None
    dependencies: list[bytes] | None = None  # top-level arguments
    pinned: list[bytes] | None = None  # every object that must live until the reply
    unresolved: int = 0
    retries_used: int = 0
    rounds: int = 0  # how often a worker could not read its arguments
    cancelled: bool = False
    again: bool = False  # it runs again since its stored result was lost
    actor: bytes = b""  # of an actor's call that may run again: whose
    output: bytes = b""  # the object that it makes, if that is one; the very bytes that are its key in the table


class Lease:
    """The right to push to one worker. `blocked` and `recalled` say what `state` does, for those who ask often.

    `blocked` also stands for "spent": either gets no tasks.
    """

    __slots__ = (
        "blocked",
        "channel",
        "idle_since",
        "inflight",
        "lane",
        "lease_id",
        "mark",
        "recalled",
        "state",
        "used",
        "window",
        "worker",
    )

    def __init__(self, lease_id: int, worker: bytes, lane: Lane, channel: Any) -> None:
        self.lease_id = lease_id
        self.worker = worker
        self.lane = lane
        self.channel = channel
        self.inflight: dict[int, Task] = {}
        self.window = 1
        self.state = LEASE.initial
        self.blocked = False
        self.recalled = False
        self.mark = 0.0  # when the oldest task in flight can have started
        self.idle_since = 0.0
        self.used = 0  # tasks that it has had, where the lane counts them

    @property
    def wears_out(self) -> bool:
        """Whether its worker is to end with it: it has run tasks of a lane that counts them."""
        return self.used > 0


class Actions(Protocol):
    """What a lane asks of the shell."""

    def push(self, lease: Lease, tasks: Sequence[Task]) -> None:
        """Send the tasks to the lease's worker and enter them into `lease.inflight`."""

    def demand(self, lane: Lane, count: int) -> None:
        """Tell the daemon how many more leases the lane wants."""

    def return_lease(self, lease: Lease) -> None:
        """Give the lease back."""

    def recall(self, lease: Lease, count: int) -> None:
        """Ask the worker to hand back up to `count` tasks that have not started."""


class ReadyQueue:
    """Tasks that can start: first those that take results of others, then the rest, each in their order.

    What consumes comes before what produces: it lets go of memory, where more producers would fill the store until
    nobody can go on.
    """

    __slots__ = ("_consumers", "_others")

    def __init__(self) -> None:
        self._consumers: deque[Task] = deque()
        self._others: deque[Task] = deque()

    def append(self, task: Task) -> None:
        """Add a task behind its like."""
        (self._others if task.dependencies is None else self._consumers).append(task)

    def put_back(self, tasks: Sequence[Task]) -> None:
        """Add tasks that were taken, in their order, before all others of their kind."""
        for task in reversed(tasks):
            (self._others if task.dependencies is None else self._consumers).appendleft(task)

    def popleft(self) -> Task:
        """Take the next task."""
        return (self._consumers or self._others).popleft()

    def take_all(self) -> list[Task]:
        """Take all tasks in their order."""
        tasks = list(self)
        self.clear()
        return tasks

    def clear(self) -> None:
        """Forget all tasks."""
        self._consumers.clear()
        self._others.clear()

    def remove(self, task: Task) -> None:
        """Take a certain task out; raise ValueError if it is not here."""
        (self._others if task.dependencies is None else self._consumers).remove(task)

    def __contains__(self, task: Task) -> bool:
        return task in (self._others if task.dependencies is None else self._consumers)

    def __iter__(self) -> Iterator[Task]:
        yield from self._consumers
        yield from self._others

    def __len__(self) -> int:
        return len(self._consumers) + len(self._others)

    def __bool__(self) -> bool:
        return bool(self._consumers or self._others)


class Lane:
    """All tasks of one shape, and the leases for them.

    Args:
        key: names the lane to the daemon.
        shape: what a lease of it takes, resource to amount.
        actions: what is done for it.
        placement: what its workers need besides resources, for whoever sends the demand; None for nothing.
        recorder: where the transitions of its leases are noted; those of all lanes of a process stand together.
        max_calls: after so many tasks a worker ends; 0 for no limit.
    """

    def __init__(
        self,
        key: int,
        shape: dict[str, int],
        actions: Actions,
        placement: Any = None,
        recorder: FlightRecorder | None = None,
        max_calls: int = 0,
    ) -> None:
        self.key = key
        self.shape = shape
        self.placement = placement
        self.ready = ReadyQueue()
        self.leases: list[Lease] = []
        self.demanded = 0
        self.recorder = recorder if recorder is not None else FlightRecorder()
        self.max_calls = max_calls
        self._actions: Any = actions

    def close(self) -> None:
        """Nothing of this lane will ever run: let go of it all."""
        self.ready.clear()
        self._actions = None

    def submit(self, task: Task, now: float) -> None:
        """A task whose arguments are there."""
        if not self.ready:
            for lease in self.leases:
                if not lease.inflight and not lease.blocked:
                    lease.mark = now
                    self._actions.push(lease, (task,))
                    if self.max_calls:
                        self._count(lease, 1)
                    return
        self.ready.append(task)
        self._update_demand()

    def requeue(self, tasks: list[Task], now: float) -> None:
        """Tasks that came back unstarted, in their order: they go first."""
        self.ready.put_back(tasks)
        self.fill(now)

    def fill(self, now: float) -> None:
        """Push ready tasks as far as the windows allow, the emptiest worker first."""
        ready = self.ready
        while ready:
            best: Lease | None = None
            open_leases = 0
            for lease in self.leases:
                if not lease.blocked and len(lease.inflight) < lease.window:
                    open_leases += 1
                    if best is None or len(lease.inflight) < len(best.inflight):
                        best = lease
            if best is None:
                break
            inflight = len(best.inflight)
            # An equal share for each worker that could take more, so that the last tasks are not all on one of them.
            count = min(best.window - inflight, max(1, len(ready) // max(open_leases, len(self.leases))))
            if not inflight:
                best.mark = now
            if count == len(ready):
                batch = ready.take_all()
            else:
                batch = [ready.popleft() for _ in range(count)]
            self._actions.push(best, batch)
            if self.max_calls:
                self._count(best, len(batch))
        self._update_demand()

    def _count(self, lease: Lease, count: int) -> None:
        """A lease of a lane with `max_calls` has had tasks; its window stays at one."""
        lease.used += count
        if lease.used >= self.max_calls:
            self._go(lease, "spend")

    def _give_back(self, lease: Lease) -> None:
        self.leases.remove(lease)
        self._go(lease, "give_back")
        self._actions.return_lease(lease)

    def _update_demand(self) -> None:
        waiting = len(self.ready)
        if waiting and not self.demanded:
            self.demanded = max(1, waiting - sum(not lease.blocked for lease in self.leases))
        elif waiting > 2 * self.demanded:
            self.demanded = waiting
        elif not waiting and self.demanded:
            self.demanded = 0
        else:
            return
        self._actions.demand(self, self.demanded)

    def granted(self, lease: Lease, now: float) -> None:
        """The daemon granted a lease and its worker is connected."""
        self.demanded = max(0, self.demanded - 1)
        self.leases.append(lease)
        self.recorder.note((lease.lease_id, "granted"))
        lease.idle_since = now
        self.fill(now)
        if not lease.inflight:
            self._balance(lease)

    def grant_failed(self) -> None:
        """The daemon granted a lease, but its worker was gone before we reached it."""
        self.demanded = max(0, self.demanded - 1)
        self._update_demand()

    def replied(self, lease: Lease, count: int, now: float) -> None:
        """`count` replies came in one batch and are removed from `lease.inflight`."""
        per_task = (now - lease.mark) / count
        lease.mark = now
        work = per_task * lease.window
        if self.max_calls:
            pass
        elif work <= WINDOW_S / 2:
            if lease.window < MAX_WINDOW:
                lease.window *= 2
        elif work > WINDOW_S * 2:
            lease.window = max(1, int(WINDOW_S / per_task))
        if self.ready and len(lease.inflight) <= lease.window // 2:
            self.fill(now)
        if not lease.inflight:
            lease.idle_since = now
            if lease.state == "spent":
                self._give_back(lease)
                self._update_demand()
            elif not self.ready and len(self.leases) > 1:
                self._balance(lease)

    def handed_back(self, lease: Lease, tasks: list[Task], blocked: bool, now: float) -> None:
        """The worker handed back tasks that had not started."""
        self._go(lease, "block" if blocked else "hand_back")
        if blocked and len(lease.inflight) > 1 and not lease.recalled:
            # These came after it had handed back all that it had: the task that waits may wait for one of them.
            self._recall(lease, len(lease.inflight) - 1)
        if tasks:
            lease.window = 1
            self.requeue(tasks, now)

    def unblocked(self, lease: Lease, now: float) -> None:
        """The worker takes tasks again."""
        self._go(lease, "unblock")
        self.fill(now)

    def _balance(self, idle: Lease) -> None:
        """Recall tasks that wait behind others, for a worker that has nothing to do."""
        fullest = max(self.leases, key=lambda lease: len(lease.inflight))
        waiting = len(fullest.inflight) - 1
        if waiting > 0 and not fullest.recalled and not idle.blocked:
            self._recall(fullest, (waiting + 1) // 2)

    def _recall(self, lease: Lease, count: int) -> None:
        self._go(lease, "recall")
        self._actions.recall(lease, count)

    def _go(self, lease: Lease, event: str) -> None:
        state = lease.state = LEASE.after(lease.state, event, lease.lease_id, self.recorder)
        lease.blocked = state.startswith("blocked") or state == "spent"
        lease.recalled = state.endswith("recalled")

    def worker_died(self, lease: Lease) -> list[Task]:
        """The worker is gone; return what was in flight, oldest first."""
        if lease in self.leases:
            self.leases.remove(lease)
        self._go(lease, "lose")
        tasks = list(lease.inflight.values())
        lease.inflight.clear()
        return tasks

    def return_idle(self, now: float, max_idle_s: float) -> float | None:
        """Give back leases that were idle for `max_idle_s`; return when the next one will have been, if any."""
        soonest: float | None = None
        for lease in list(self.leases):
            if lease.inflight or lease.blocked:
                continue
            due = lease.idle_since + max_idle_s
            if due <= now and not self.ready:
                self._give_back(lease)
            elif soonest is None or due < soonest:
                soonest = due
        return soonest

    def complaints(self) -> list[str]:
        """Return what is wrong here, none if all is well; to be asked between events."""
        found = []
        seen = {id(task) for task in islice(self.ready, CHECKED)}
        for lease in islice(self.leases, CHECKED):
            flags = lease.blocked, lease.recalled
            idle_hands = lease.state.startswith("blocked") or lease.state == "spent"
            if lease.state == "over" or flags != (idle_hands, lease.state.endswith("recalled")):
                found.append(f"lease {lease.lease_id} is {lease.state}, with the flags {flags}")
            if (lease.state == "spent") != bool(self.max_calls and lease.used >= self.max_calls):
                found.append(f"lease {lease.lease_id} is {lease.state} after {lease.used} of {self.max_calls} tasks")
            if lease.state == "spent" and not lease.inflight:
                found.append(f"lease {lease.lease_id} is spent and idle, and was not given back")
            if not 1 <= lease.window <= MAX_WINDOW or len(lease.inflight) > MAX_WINDOW:
                found.append(f"lease {lease.lease_id}: {len(lease.inflight)} in flight, in a window of {lease.window}")
            if self.ready and not (lease.inflight or lease.blocked):
                found.append(f"lease {lease.lease_id} idles while {len(self.ready)} tasks wait")
            for task in islice(lease.inflight.values(), CHECKED):
                if id(task) in seen:
                    found.append(f"task {task.task_id.hex()} is in two places")
                seen.add(id(task))
        if self.ready and not self.demanded:
            found.append(f"{len(self.ready)} tasks wait, and no lease is demanded")
        return [f"lane {self.key}: {complaint}" for complaint in found]


class Lanes:
    """All lanes of a process: see `Submitter.lane`.

    A lane lives as long as a function is bound to it, a task may (again) run in it, or it has a lease. Until then there is no
    other one for the same need.
    """

    __slots__ = ("_next_key", "by_key", "by_need", "recorder")

    def __init__(self) -> None:
        #: By what their workers need, and by the number that names them to the daemon.
        self.by_need: weakref.WeakValueDictionary[Any, Lane] = weakref.WeakValueDictionary()
        self.by_key: weakref.WeakValueDictionary[int, Lane] = weakref.WeakValueDictionary()
        self._next_key = itertools.count(1).__next__
        self.recorder = FlightRecorder()

    def make(self, need: Any, shape: dict[str, int], actions: Actions, placement: Any, max_calls: int) -> Lane:
        """Make the lane for a need for which there is none."""
        key = self._next_key()
        lane = self.by_need[need] = self.by_key[key] = Lane(key, shape, actions, placement, self.recorder, max_calls)
        return lane

    def any_waits(self) -> bool:
        """Tell whether a task waits in any of them; needs no lock."""
        lanes = [reference() for reference in self.by_need.valuerefs()]
        return any(lane is not None and lane.ready for lane in lanes)

    def validate(self) -> list[str]:
        """Return what is wrong with the lanes, none if all is well."""
        return [complaint for lane in islice(self.by_need.values(), CHECKED) for complaint in lane.complaints()]
