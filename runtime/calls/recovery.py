"""Recovery: the shell around `lineage` that runs tasks again whose stored results were lost, and says why others are not.

Theory of operation. The daemon tells the owner of a stored value that it is gone (`Lost`). The table's lineage decides; a
task that is to run again takes its old place: same id, same outputs, its arguments pinned, in the same lane (an actor's
call: beside those that wait, see `cores.caller`). Arguments that were freed or lost are made again first, by the same means.

A worker that finds an argument lost answers `ARGUMENT_LOST` instead of running the task. The task is taken back as if it
had never been sent, waits until its arguments are there again, and is pushed again, `MAX_ROUNDS` times at most: the news of
a loss and the worker's answer come by different ways, so that a round or two may pass before the loss is known here.

Items of generators are not made again: their stream may be consumed, and its consumer gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import msgspec

from afield.errors import AfieldError, DeviceLostError, ObjectLostError
from afield.ids import ARGUMENTS_INDEX, PUT_INDEX, TASK_ID_BYTES, object_id
from afield.runtime.cores.dispatch import Task
from afield.runtime.cores.lineage import Lineage
from afield.runtime.cores.lineage_records import CONTAINS_OTHERS, DROPPED, NO_TASK, USED_UP, Loss, Record
from afield.runtime.cores.objects import LOCATED
from afield.runtime.process.events import RECOMPUTE
from afield.runtime.process.process import Process
from afield.runtime.process.serialization import serialize_error
from afield.runtime.values.arguments import Arguments
from afield.runtime.wire import messages
from afield.transport.channel import Channel
from afield.units import format_bytes

#: What lineage alone may keep in one process, in bytes, and the share of the host store that it may be at most. How much
#: of that may be values is a setting of the session's (`SessionConfig.lineage_bytes`).
LINEAGE_BYTES = 1 << 30
LINEAGE_SHARE = 0.25
#: How often a task is pushed whose worker could not read an argument.
MAX_ROUNDS = 16

_RUN_ONCE = "once"
_ACTOR = "actor"


class Runner(Protocol):
    """What recovery asks of whoever submits tasks."""

    def resolved(self, task: Task) -> None:
        """The arguments of a task are there."""

    def fail(self, task: Task, error: bytes) -> None:
        """The task ends with a serialised error."""

    def fail_with(self, task: Task, error: Exception) -> None:
        """The task ends with an exception."""


class Recovery:
    """Makes lost results of this process's tasks again.

    Attributes:
        running: tasks that run again, by id.
        call_again: enters an actor's call again.
    """

    def __init__(self, process: Process, arguments: Arguments, runner: Runner) -> None:
        self.process = process
        self.arguments = arguments
        self.runner = runner
        limit = min(LINEAGE_BYTES, int(process.config.capacity * LINEAGE_SHARE))
        self.lineage = process.cores["lineage"] = Lineage(
            process.table, limit, self._explain, process.config.lineage_bytes
        )
        self.running: dict[bytes, Record] = {}
        self.call_again: Callable[[Task], None] = lambda task: None
        self.tasks_recomputed = 0
        process.register(messages.Lost, lambda channel, message: process.table.on_lost(message))
        process.subscribe(RECOMPUTE, self._recompute)

    def close(self) -> None:
        """Let go of all tasks: the garbage collector does not look into them."""
        self.running.clear()
        self.lineage.clear()

    # -- what is kept --------------------------------------------------------------------------------------------

    def ended(self, task: Task) -> None:
        """A task has stored an output, or has run again, and its outcome is in the table; call before its arguments go."""
        outputs = [object_id(task.task_id, index) for index in range(task.num_returns)]
        record = self.running.pop(task.task_id, None)
        if record is not None:
            self.lineage.ended(record, outputs)
            return
        entries = self.process.table.entries
        left = _retries(task)
        refused = "" if left else (_ACTOR if task.lane is None else _RUN_ONCE)
        self.lineage.keep(
            task,
            outputs,
            # An actor is not kept alive for this: a task that runs again without it finds it dead.
            [each for each in task.pinned or () if not entries[each].life],
            size=len(task.arguments),
            left=left,
            freeable=task.lane is not None,  # an actor may be gone by the time that it is needed
            refused=refused,
        )

    def postpone(self, task: Task) -> None:
        """A task is about to fail as nothing can run it now; if it is one that runs again, that is not for ever."""
        record = self.running.get(task.task_id)
        if record is not None:
            self.lineage.postpone(record)

    def fails(self, task: Task) -> None:
        """A task that runs again is about to fail: for now, if that is so of what it takes."""
        if any(each in self.lineage.postponed for each in task.dependencies or ()):
            self.postpone(task)

    def starts_afresh(self, task: Task) -> None:
        """An execution has come to nothing: so have the losses of what it stored."""
        self.lineage.not_yet(object_id(task.task_id, index) for index in range(task.num_returns))

    def forget_stored(self, worker: bytes, outputs: Iterable[bytes]) -> None:
        """A worker died before its reply: free what it may have stored.

        Of what an earlier execution had stored something may be left that is still read: that is freed in the end.
        """
        entries = self.process.table.entries
        unwanted = []
        for oid in outputs:
            entry = entries.get(oid)
            if entry is None or (entry.state != LOCATED and not self.lineage.has_remains(oid)):
                unwanted.append(oid)
        if unwanted:
            self.process.daemon.send(messages.Free(unwanted, worker))

    # -- what is lost --------------------------------------------------------------------------------------------

    def _recompute(self, record: Record) -> None:
        """Run a task again; the caller holds the lock."""
        old: Task = record.task
        # A task of its own: what still waits for arguments of the last execution must not take part in this one.
        task = record.task = msgspec.structs.replace(
            old,
            pinned=list(record.inputs) or None,
            retries_left=_retries(old),
            retries_used=0,
            unresolved=0,
            rounds=0,
            cancelled=False,
            again=True,
        )
        self.process.table.run_again(record.outputs, old, task)
        self.lineage.started(record)
        self.running[task.task_id] = record
        self.tasks_recomputed += 1
        if task.lane is None:
            self.call_again(task)
        elif task.dependencies is not None:
            self.arguments.when_resolved(task, self.runner.resolved)
        else:
            task.lane.submit(task, time.monotonic())

    def argument_lost(self, channel: Channel, task: Task) -> bool:
        """A worker could not read an argument: return True if the task is to be run again, False if it has failed."""
        self._ask_owners(task)
        error = self.arguments.failure(task)
        if error is not None:
            self.runner.fail(task, error)
        elif task.rounds > MAX_ROUNDS:
            self._give_up(task, f"its worker found an argument lost {task.rounds} times")
        elif task.lane is not None:
            self.arguments.when_resolved(task, self.runner.resolved)
            return True
        elif channel.context.argument_lost is not None and channel.context.argument_lost(task):
            return True
        else:
            self._give_up(task, "an argument was lost on its way, and later calls of this caller have overtaken it")
        return False

    def creation_lost(self, creation: Task, why: str) -> bytes | None:
        """An actor was not constructed for such a loss; return an error if its arguments are not to be tried once more."""
        self._ask_owners(creation)
        if creation.rounds > MAX_ROUNDS:
            return serialize_error(
                ObjectLostError(f"{creation.function.name}() has not run: {why}, for the {creation.rounds}th time")
            )
        return None

    def _ask_owners(self, task: Task) -> None:
        """Something among a task's arguments is lost; which of them it was is not known."""
        table = self.process.table
        task.rounds += 1
        for dependency in task.dependencies or ():
            entry = table.entries[dependency]
            if entry.owner and entry.state == LOCATED:
                table.lost(dependency)  # what is ours, the daemon has told us of

    def _give_up(self, task: Task, why: str) -> None:
        names = ", ".join(oid.hex() for oid in task.dependencies or ()) or "stored as one object"
        self.runner.fail_with(
            task, ObjectLostError(f"{task.function.name}() has not run: {why} (arguments: {names}); call it again")
        )

    # -- errors --------------------------------------------------------------------------------------------------

    def _explain(self, oid: bytes, record: Record | None, why: str, loss: Loss) -> bytes:
        kind: type[AfieldError] = DeviceLostError if loss.kind == "device" else ObjectLostError
        what, remedy = self._describe(oid, record, why, loss.kind)
        cause = loss.cause or "the store does not have it any more"
        return serialize_error(kind(f"{what} (object {oid.hex()}) is lost: {cause}. {remedy}"))

    def _describe(self, oid: bytes, record: Record | None, why: str, kind: str) -> tuple[str, str]:
        """Return what an object was, and why it is not made again."""
        index = oid[TASK_ID_BYTES:]
        if record is None:
            if index == PUT_INDEX:
                instead = "put what must survive as numpy arrays, or make it" if kind == "device" else "make it"
                return "a value that was given to put()", (
                    f"No task made it, so it cannot be made again: {instead} in a task"
                )
            if index == ARGUMENTS_INDEX:
                return "the arguments of a task", "They were stored once and cannot be made again: call the task again"
            return "an item of a generator", "Items are not made again one by one: call the generator again"
        task: Task = record.task
        tries = _retries(task)
        reasons = {
            NO_TASK: "",
            _RUN_ONCE: "Its task must not run twice (max_retries=0)",
            _ACTOR: "Calls of actors are not repeated unless max_task_retries allows it",
            DROPPED: (
                "How to make it again was dropped, as that would have needed values which nothing else "
                f"holds: these are not kept in memory of a device, and on the "
                f"host at most {format_bytes(self.lineage.value_bytes)} of them "
                f"(AFIELD_LINEAGE_MEMORY), of {format_bytes(self.lineage.limit_bytes)} in all. Hold refs to the arguments, or "
                "make them in tasks that may run again"
            ),
            USED_UP: f"It was made again {tries} times already; raise max_retries if it is to be made more often",
            CONTAINS_OTHERS: "It contains refs to objects that its task made, which a second execution would not make again",
        }
        return f"the result of {task.function.name}()", reasons[why]


def _retries(task: Any) -> int:
    """Return how many retries a task had at first; -1 for any number."""
    retries: int = task.retries_left + task.retries_used
    return retries
