"""An actor's caller: the core without I/O that decides which calls leave when, and which fail, as seen from one process.

Theory of operation. A `Caller` stands for one actor in one process. Calls that the actor runs one at a time are of one *order*
(`Callee.order`): they stand in one queue, as they were made; the head leaves as soon as its arguments are there and the actor
is alive, so the order of one caller is kept end to end. A plain actor's calls are all of one order; with concurrency groups
each group that runs one call at a time has its own. All other calls (order None) are `late` until their arguments are there,
and then queue for the actor alone: they hold back nobody. `CALLER` is the actor's life as this process is told of it, `CALL`
the life of one call.

A call that has left belongs to one *incarnation* of the actor, one process that it lives in: `on_way` is that incarnation's
alone. It is emptied when the incarnation is over, and the next one gets another, so an answer that comes from an earlier one
finds nothing there, and settles nothing that was sent again.

What was on its way when the process died is sent again, before all that wait, if it may be retried; else it fails, since it
may have run. A call that could not read an argument, because its stored value is lost, goes back to the head of its queue
until the value has been made again, unless others of its order were on their way already: they have run or will, so it cannot
take its place any more.

A call that runs again because its *result* was lost has no order any more, whatever its method's is: what waits may wait for
just this result, and the call itself for another that its own actor has to make again first.

A call that is made while the actor restarts waits only if it may be retried; else it fails at once, without having run, so
that nobody hangs on an actor that may be long in coming back. This holds as well for calls that were made before the daemon
had been heard (`asked`), if it answers that the actor restarts. What waited before the actor died goes on waiting.

The actor lives at least until its calls have ended: while any is pending the caller holds the object that stands for its life.
Once this process has ended the actor (`ending`) nothing leaves any more, though its worker may still be there: what waits
fails as soon as the daemon says that it is dead.

Methods are called under the process's lock. They decide, and note it here; what follows for others is returned as effects,
which the shell (`calls.actor_calls`) executes afterwards, in their order. What is done for every call is quick: the shell asks
`leaves_at_once`, and enters what it has sent into `on_way` itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from afield.ids import FIRST_RETURN
from afield.machines import FlightRecorder, Table
from afield.runtime.cores.dispatch import Task

CALLER = Table(
    "actor as its caller sees it",
    "asked",
    {
        ("asked", "waits"): "pending",
        ("asked", "lives"): "alive",
        ("asked", "restarts"): "restarting",
        ("asked", "dies"): "dead",
        ("asked", "ends"): "ending",
        ("pending", "lives"): "alive",
        ("pending", "restarts"): "restarting",
        ("pending", "dies"): "dead",
        ("pending", "ends"): "ending",
        ("alive", "gone"): "gone",
        ("alive", "ends"): "ending",
        ("gone", "restarts"): "restarting",
        ("gone", "dies"): "dead",
        ("restarting", "lives"): "alive",
        ("restarting", "restarts"): "restarting",  # it died again before it was reached
        ("restarting", "dies"): "dead",
        ("restarting", "ends"): "ending",
        ("ending", "dies"): "dead",
    },
    {
        "asked": "the daemon has been asked for it, and has not answered: calls wait",
        "pending": "is being made: calls wait",
        "alive": "calls leave, in their order",
        "gone": "its process has ended; what it had answered before still counts, and nothing leaves",
        "restarting": "it is constructed again in another process: what was called before, or may be retried, waits",
        "ending": "this process has ended it, or nothing can reach it: nothing leaves; the daemon will say that it is dead",
        "dead": "every call fails, with the reason",
    },
    # What the daemon had sent before it heard that we end the actor; and what is said of one whose death is known.
    late=[
        *(("ending", event) for event in ("waits", "lives", "gone", "restarts", "ends")),
        *(("dead", event) for event in ("waits", "lives", "restarts", "ends", "dies")),
    ],
)

CALL = Table(
    "actor's call",
    "waiting",
    {
        ("waiting", "leaves"): "on_its_way",
        ("waiting", "fails"): "over",
        ("waiting", "cancelled"): "over",
        ("on_its_way", "answered"): "over",
        ("on_its_way", "runs_again"): "waiting",
        ("on_its_way", "argument_lost"): "waiting",
        ("on_its_way", "overtaken"): "over",
        ("on_its_way", "interrupted"): "waiting",
        ("on_its_way", "cut_short"): "over",
        ("on_its_way", "cancelled"): "on_its_way",
    },
    {
        "waiting": "for its arguments, for the actor, or for the calls that were made before it",
        "on_its_way": "to one incarnation of the actor, whose answer alone counts; it may have run",
        "over": "its outcome is known",
    },
    # An earlier incarnation's answer, and whoever cancels what has just ended.
    late=[("over", "answered"), ("over", "cancelled")],
)

#: Why a call ended without an answer: its actor is dead, or restarts, or it was cancelled.
DIED, UNAVAILABLE, CANCELLED = "died", "unavailable", "cancelled"

#: So many actors, and so many calls of each, are looked at when the state is checked.
CHECKED = 1000


@dataclass(frozen=True, slots=True)
class Ended:
    """A call ends without an answer. `worker` may have been running it; b"": it was never sent."""

    task: Task
    why: str
    worker: bytes = b""


@dataclass(frozen=True, slots=True)
class Again:
    """A call that `worker` may have been running stands in the queue again, which takes one of its retries."""

    task: Task
    worker: bytes


@dataclass(frozen=True, slots=True)
class Interrupt:
    """The actor is to be told that a call on its way was cancelled; with `recursive`, and all that it has submitted."""

    sequence: int
    recursive: bool


@dataclass(frozen=True, slots=True)
class LetGo:
    """Nothing of ours is pending: the actor need not live for our sake."""


@dataclass(frozen=True, slots=True)
class ForgetCreation:
    """The actor is not constructed again: its constructor's arguments are not needed any more."""

    task: Task


Effect = Ended | Again | Interrupt | LetGo | ForgetCreation


def life_of(actor_id: bytes) -> bytes:
    """Return the id of the object that stands for an actor's life."""
    return actor_id + FIRST_RETURN


def _order(task: Task) -> str | None:
    """Return the order that a call stands in: its method's, unless it runs again since its result was lost."""
    order: str | None = task.function.order
    return None if task.again else order


class Caller:
    """One actor, as seen from one process.

    Args:
        actor_id: which.
        recorder: where its transitions are noted.
        creation: in the process that creates it: the constructor's call, whose arguments stay pinned as long as the actor
            may be constructed again, and whose retries are the restarts that it has.
    """

    __slots__ = (
        "_recorder",
        "_restarts_left",
        "actor_id",
        "channel",
        "creation",
        "error",
        "life_pinned",
        "incarnation",
        "late",
        "life",
        "on_way",
        "open",
        "queues",
        "state",
        "worker",
    )

    def __init__(self, actor_id: bytes, recorder: FlightRecorder, creation: Task | None = None) -> None:
        self.actor_id = actor_id
        self.state = CALLER.initial if creation is None else "pending"
        #: Calls may leave; true just while it is alive.
        self.open = False
        #: Calls that wait, by their order and as they leave; those of no order have their arguments. No queue is empty.
        self.queues: dict[str | None, deque[Task]] = {}
        #: Calls of no order that wait for arguments, by their id.
        self.late: dict[bytes, Task] = {}
        #: What this incarnation owes an answer, by sequence number.
        self.on_way: dict[int, Task] = {}
        #: How often it has come to life, and in which process it did last.
        self.incarnation = 0
        self.worker = b""
        #: Where calls are sent; the shell's, and meaningless unless `open`.
        self.channel: Any = None
        #: Serialised, once it is dead.
        self.error = b""
        #: The object that stands for it, and whether it is pinned for the sake of calls that are pending.
        self.life = life_of(actor_id)
        self.life_pinned = False
        self.creation = creation
        self._restarts_left = creation.retries_left if creation is not None else 0
        self._recorder = recorder

    # -- calls ----------------------------------------------------------------------------------------------------

    def leaves_at_once(self, task: Task) -> bool:
        """Tell whether a call that is made now can be sent: nothing waits before it, and it waits for nothing."""
        if not self.open or task.dependencies is not None or task.location is not None:
            return False
        return not self.queues or task.function.order not in self.queues

    def enter(self, task: Task) -> list[Effect]:
        """A call is made that does not leave at once, or is to run again, since its result was lost."""
        if self.state == "dead":
            return [self._end(task, "waiting", "fails", DIED), *self._conclude()]
        if self.state == "restarting" and not task.retries_left and not task.again:
            return [self._end(task, "waiting", "fails", UNAVAILABLE), *self._conclude()]
        if _order(task) is None and task.dependencies is not None:
            self.late[task.task_id] = task
        else:
            self.queues.setdefault(_order(task), deque()).append(task)
        return []

    def ready(self, task: Task) -> None:
        """The arguments of a call are there: one of no order queues from now on; see `take`."""
        if self.late.pop(task.task_id, None) is not None:
            self.queues.setdefault(None, deque()).append(task)

    def take(self) -> Task | None:
        """Take a call that is next to leave, if one may: send it, fail it, or `put_back`."""
        if self.open:
            for order, queue in self.queues.items():
                if not queue[0].unresolved:
                    task = queue.popleft()
                    if not queue:
                        del self.queues[order]
                    return task
        return None

    def put_back(self, task: Task) -> None:
        """The call that was taken waits for an argument once more, which was lost meanwhile."""
        if _order(task) is None:
            self.late[task.task_id] = task
        else:
            self._queue_first(task)

    def run_again(self, task: Task) -> None:
        """An answer says that the call raised what is to be retried: it is the next to leave."""
        self._note(task, "on_its_way", "runs_again")
        self._queue_first(task)

    def argument_lost(self, task: Task) -> bool:
        """An answer says that the call has not run, as an argument was lost; False: it was overtaken, and has to fail."""
        order = _order(task)
        if order is not None and any(_order(other) == order for other in self.on_way.values()):
            self._note(task, "on_its_way", "overtaken")
            return False
        self._note(task, "on_its_way", "argument_lost")
        self.put_back(task)
        return True

    def _queue_first(self, task: Task) -> None:
        self.queues.setdefault(_order(task), deque()).appendleft(task)

    def cancel(self, task: Task, recursive: bool) -> list[Effect] | None:
        """Cancel a call; None: it is not one of this actor, or is over."""
        if self._withdraw(task):
            return [self._end(task, "waiting", "cancelled", CANCELLED), *self._conclude()]
        for sequence, other in self.on_way.items():
            if other is task:
                self._note(task, "on_its_way", "cancelled")
                return [Interrupt(sequence, recursive)]
        return None

    def _withdraw(self, task: Task) -> bool:
        """Take a call out of those that wait; False: it does not."""
        if self.late.pop(task.task_id, None) is not None:
            return True
        order = _order(task)
        queue = self.queues.get(order)
        if queue is None or task not in queue:
            return False
        queue.remove(task)
        if not queue:
            del self.queues[order]
        return True

    def waiting(self) -> Iterator[Task]:
        """Return the calls that have not left, those of one order as they will."""
        return chain(*self.queues.values(), self.late.values())

    @property
    def pending(self) -> int:
        """How many calls have no outcome yet."""
        return sum(map(len, self.queues.values())) + len(self.late) + len(self.on_way)

    def lets_go(self) -> bool:
        """Let go of the actor's life if nothing is pending, and tell whether it was: to be asked when a call has ended."""
        if self.life_pinned and not (self.queues or self.on_way or self.late):
            self.life_pinned = False
            return True
        return False

    # -- the actor ------------------------------------------------------------------------------------------------

    def waits(self) -> None:
        """The daemon has been asked, and the actor is still being made."""
        self._go("waits")

    def lives(self, worker: bytes) -> list[Effect]:
        """It is alive, and its process was reached: see `take`."""
        if not self._go("lives"):
            return []
        self.incarnation += 1
        self.worker = worker
        self.on_way = {}  # one of its own: see above
        return self._forget_creation() if not self._restarts_left else []

    def gone(self) -> None:
        """Its process has ended; what it had answered is read next."""
        self._go("gone")

    def restarts(self) -> list[Effect]:
        """It is constructed again in another process: what was on its way goes back into the queue, or fails."""
        asked = self.state == "asked"
        if not self._go("restarts"):
            return []
        if self._restarts_left > 0:
            self._restarts_left -= 1
        effects: list[Effect] = []
        for task in [task for task in self.waiting() if asked and not task.retries_left]:
            self._withdraw(task)
            effects.append(self._end(task, "waiting", "fails", UNAVAILABLE))
        again = []
        for task in self._interrupted():
            if task.cancelled:
                effects.append(self._end(task, "on_its_way", "cut_short", CANCELLED))
            elif task.retries_left:
                self._note(task, "on_its_way", "interrupted")
                again.append(task)
                effects.append(Again(task, self.worker))
            else:
                effects.append(self._end(task, "on_its_way", "cut_short", UNAVAILABLE))
        for task in reversed(again):
            self._queue_first(task)
        return [*effects, *self._conclude()]

    def ends(self) -> None:
        """This process has ended it for good, or nothing can reach it any more."""
        self._go("ends")

    def dies(self, error: bytes) -> list[Effect]:
        """It is dead, for the reason given (serialised): so are all its calls."""
        if not self._go("dies"):
            return []
        self.error = error
        effects: list[Effect] = [self._end(task, "on_its_way", "cut_short", DIED) for task in self._interrupted()]
        effects += [self._end(task, "waiting", "fails", DIED) for task in self.waiting()]
        self.queues.clear()
        self.late.clear()
        return [*effects, *self._forget_creation(), *self._conclude()]

    # -- inside ---------------------------------------------------------------------------------------------------

    def _go(self, event: str) -> bool:
        """Move on; False: the event came late, and changes nothing."""
        before = self.state
        self.state = CALLER.after(before, event, self.actor_id, self._recorder)
        self.open = self.state == "alive"
        return not CALLER.is_late(before, event)

    def _interrupted(self) -> list[Task]:
        """Return what was on its way, and expect no answer to it."""
        tasks = list(self.on_way.values())
        self.on_way.clear()
        return tasks

    def _end(self, task: Task, state: str, event: str, why: str) -> Ended:
        self._note(task, state, event)
        return Ended(task, why, self.worker if state == "on_its_way" else b"")

    def _note(self, task: Task, state: str, event: str) -> None:
        CALL.after(state, event, task.task_id, self._recorder)

    def _conclude(self) -> list[Effect]:
        return [LetGo()] if self.lets_go() else []

    def _forget_creation(self) -> list[Effect]:
        creation, self.creation = self.creation, None
        return [ForgetCreation(creation)] if creation is not None else []

    def complaints(self) -> list[str]:
        """Return what is wrong here, none if all is well; to be asked between transitions."""
        found = []
        if self.state not in CALLER.states or self.open != (self.state == "alive"):
            found.append(f"is {self.state}, and {'open' if self.open else 'not open'}")
        if self.on_way and self.state not in ("alive", "gone", "ending"):
            found.append(f"is {self.state}, and {len(self.on_way)} calls are on their way to it")
        waiting = list(islice(self.waiting(), CHECKED))
        if self.state == "dead" and (waiting or self.life_pinned or self.creation is not None):
            found.append(f"is dead, and {len(waiting)} calls wait, its life or its constructor's arguments are held")
        if self.life_pinned and not self.pending:
            found.append("is held, and no call is pending")
        if not all(self.queues.values()):
            found.append("keeps an empty queue")
        elif self.open and any(not queue[0].unresolved for queue in self.queues.values()):
            found.append("is alive, and the first of the calls that wait could leave")
        if any(not task.unresolved for task in islice(self.late.values(), CHECKED)):
            found.append("has a call that waits for its arguments, and the arguments are there")
        seen: set[int] = set()
        for task in (*waiting, *islice(self.on_way.values(), CHECKED)):
            if id(task) in seen:
                found.append(f"has the call {task.task_id.hex()} twice")
            seen.add(id(task))
        return [f"actor {self.actor_id.hex()} {complaint}" for complaint in found]


class Callers:
    """All actors that a process calls, by id."""

    __slots__ = ("by_id", "recorder")

    def __init__(self) -> None:
        self.by_id: dict[bytes, Caller] = {}
        self.recorder = FlightRecorder()

    def add(self, actor_id: bytes, creation: Task | None = None) -> Caller:
        """Begin to call an actor; `creation` where it is created here."""
        caller = self.by_id[actor_id] = Caller(actor_id, self.recorder, creation)
        return caller

    def validate(self) -> list[str]:
        """Return what is wrong with the actors' state, none if all is well."""
        return [complaint for caller in islice(self.by_id.values(), CHECKED) for complaint in caller.complaints()]
