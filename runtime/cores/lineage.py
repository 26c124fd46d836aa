"""Lineage: a core that knows from which tasks stored objects can be made again, and what has to be kept for that.

Theory of operation. A task with a stored output leaves a `Record`: the task itself and its *inputs*, the objects among its
arguments. It keeps the entry of an input in the table, and its value only where it must: what can be made again itself
is freed when nothing else needs it, and its entry stays in the state FREED until it is needed for making something else.

    LOCATED --nothing but lineage holds it, and it can be made again--> FREED
    LOCATED --lost, can be made again--> PENDING     FREED --needed--> PENDING     (effect `Recompute`)
    LOCATED --lost, cannot be made again--> FAILED   PENDING --the task ends--> whatever came of it
    PENDING --nothing can run the task now--> FAILED, *postponed* --asked for anew--> PENDING

A record goes with the last of its outputs, and its inputs with it, so that nothing is kept for an object that nobody can reach.

*Postponed.* A task that is to run again may be refused, as the devices that it needs are lost. Who waits gets that error; but
the device may be reset, so how to make the value is not forgotten, and whoever asks later has it tried anew. Nobody is kept
waiting for a reset that may never come. What needs a postponed value is postponed with it.

*It always ends.* At most one execution of a task is under way. Each one that lineage asks for uses up one of `left`, which
began as the task's `max_retries`; when none is left, the object fails with an error that says so.

*It is bounded, and decided by cost.* `bytes` counts what lineage alone keeps: arguments, and values that nothing else holds.
What can be made again costs nothing, as it is freed. Another value that nothing else holds is kept only while it is cheap:

- in memory of a device it is let go at once: it would go with the device in most cases anyway, and sooner or later live data
  would be moved out of the device for it;
- of those on the host at most `value_bytes` are kept, and the largest go first, among equals the oldest;
- the store is told of them (effect `Spare`): where memory is short they go before anything that lives has to move, and are
  reported lost with kind SPARE.

The records that would need such a value are emptied with it, and so are those that need what those had made and freed: nothing
is held for a task that cannot run. Above `limit_bytes` in all, the oldest records are emptied in the same way. A loss then is
an error that says that the lineage was dropped for its size (`DROPPED`).

*What cannot be made again*: what no task made (`put`), what was made by a task that must not run twice, and values that
contain refs to objects which a process that still lives made in that task: a second execution would make other objects under
the same ids. Such an output leaves a record too, which only says why (`refused`).

A loss can be heard of before the reply that tells of the value: it waits in `_early` until then.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import Any

from afield.gpu_store.tiers import SPARE
from afield.runtime.cores.lineage_books import LineageBooks
from afield.runtime.cores.lineage_records import (
    ASKED,
    CONTAINS_OTHERS,
    DROPPED,
    NO_TASK,
    NOT,
    RECORD_BYTES,
    STARTED,
    USED_UP,
    Explain,
    Loss,
    Record,
)
from afield.runtime.cores.objects import FAILED, FREED, INLINE, LOCATED, PENDING, Entry, Recompute, Spare
from afield.runtime.cores.ownership import OwnershipTable


class Lineage(LineageBooks):
    """What one process's stored objects were made from.

    Args:
        table: the process's objects. It asks here before it forgets one that is in `table.lineage_knows`.
        limit_bytes: how much may be kept for the sake of lineage alone.
        explain: makes errors.
        value_bytes: how much of that may be values; `limit_bytes` if it is not given.
    """

    def __init__(
        self, table: OwnershipTable, limit_bytes: int, explain: Explain, value_bytes: int | None = None
    ) -> None:
        super().__init__(table, limit_bytes, explain, value_bytes)
        table.lineage = self

    # -- tasks ---------------------------------------------------------------------------------------------------

    def keep(
        self,
        task: Any,
        outputs: Iterable[bytes],
        inputs: Sequence[bytes] = (),
        *,
        size: int = 0,
        left: int = 0,
        freeable: bool = True,
        refused: str = "",
    ) -> None:
        """A task has ended, its outcome is in the table and its arguments are still pinned: keep what made its outputs.

        Args:
            task: comes back in a `Recompute` effect.
            outputs: all of them; those that are stored count.
            inputs: the objects among its arguments.
            size: bytes that the task itself keeps.
            left: how often it may run again; -1 for any number of times.
            freeable: see `Record`.
            refused: why it must not run again, if that is so.
        """
        stored = {output for output in outputs if self._is_stored(output)}
        if not stored:
            return
        if refused:
            record = Record(task, stored, [], 0, 0, 0, False, refused)
        else:
            self._count += 1
            record = Record(task, stored, list(inputs), self._count, RECORD_BYTES + size, left, freeable)
            for each in record.inputs:
                self._known.add(each)
                self.inputs[each] = self.inputs.get(each, 0) + 1
                self._users.setdefault(each, {})[record.number] = record
            self._by_age[record.number] = record
            self.bytes += record.size
        for output in stored:
            self._known.add(output)
            self._records[output] = record
        self._hear_of_early_losses(stored)
        self._keep_to_limit()

    def started(self, record: Record) -> None:
        """An execution that lineage asked for begins."""
        record.running = STARTED
        self.recorder.note(("record", record.number, "starts"))

    def ended(self, record: Record, outputs: Iterable[bytes]) -> None:
        """An execution that lineage asked for has ended, and its outcome is in the table."""
        record.running = NOT
        self.recorder.note(("record", record.number, "has ended"))
        for output in sorted(record.outputs):
            state = self.table.entries[output].state
            if state == INLINE or (state == FAILED and output not in self.postponed):
                self._forget_output(record, output)
        stored = [output for output in outputs if self._is_stored(output)]
        for output in stored:
            if output not in self._records:  # it was not stored the last time
                self._known.add(output)
                self._records[output] = record
                record.outputs.add(output)
        if not record.outputs:
            self._drop(record)
        self._hear_of_early_losses(stored)

    def postpone(self, record: Record) -> None:
        """An execution that lineage asked for is about to end with an error, as it cannot be done now; it uses up nothing."""
        pending = {each for each in record.outputs if self.table.entries[each].state == PENDING}
        if pending <= self.postponed:
            return
        self.postponed |= pending
        record.left += 1 if record.left >= 0 else 0
        self.recorder.note(("record", record.number, "is postponed, left", record.left))

    def records(self) -> list[Record]:
        """Return the records of tasks that can run again, for tools."""
        return list(self._by_age.values())

    def clear(self) -> None:
        """The process leaves its cluster: forget everything."""
        for kept in (self._records, self._by_age, self._users, self._kept, self._early):
            kept.clear()
        for held in (self.inputs, self._known, self._remains, self._dearest, self.postponed):
            held.clear()

    def _is_stored(self, object_id: bytes) -> bool:
        entry = self.table.entries.get(object_id)
        return entry is not None and entry.state == LOCATED and not entry.owner

    # -- losses --------------------------------------------------------------------------------------------------

    def lost(self, object_id: bytes, entry: Entry, cause: str, kind: str) -> None:
        """The stored value of an object of ours is gone."""
        if kind == SPARE and object_id in self._kept:
            self.recorder.note((object_id, "was let go by the store"))
            self._empty(self._users_of(object_id))
            return
        self._lost(object_id, entry, Loss(cause, kind))

    def _lost(self, object_id: bytes, entry: Entry, loss: Loss) -> None:
        if entry.state == PENDING:  # the reply that tells of the value is still on its way
            self._early[object_id] = loss
            self._known.add(object_id)
            self.recorder.note((object_id, "is lost before its reply:", loss.cause))
        elif entry.state == LOCATED:
            self._known.add(object_id)
            self._remains.add(object_id)
            self._keep_no_longer(object_id)
            self._make_again(object_id, entry, loss)

    def revive(self, object_id: bytes, entry: Entry) -> None:
        """A value that was freed, or whose making was postponed, is needed after all."""
        record = self._records.get(object_id)
        together = {object_id}
        if object_id in self.postponed and record is not None:
            together |= record.outputs & self.postponed  # one execution makes them all
        for each in sorted(together):
            self.postponed.discard(each)
            self._keep_no_longer(each)
            loss = Loss("its value was freed because it could be made again")
            self._make_again(each, self.table.entries[each], loss)

    def not_yet(self, object_ids: Iterable[bytes]) -> None:
        """The task that makes these objects starts afresh: what was lost before says nothing about what will come."""
        if self._early:
            for object_id in object_ids:
                self._early.pop(object_id, None)

    def _hear_of_early_losses(self, object_ids: Iterable[bytes]) -> None:
        if self._early:
            for object_id in sorted(object_ids):
                loss = self._early.pop(object_id, None)
                if loss is not None:
                    self._lost(object_id, self.table.entries[object_id], loss)

    def _make_again(self, object_id: bytes, entry: Entry, loss: Loss) -> None:
        record = self._records.get(object_id)
        why = self._why_not(record, entry)
        if why or record is None:
            self.recorder.note((object_id, "is not made again:", why, loss.cause))
            error = self._explain(object_id, record, why, loss)
            if record is not None:
                self._forget_output(record, object_id)
                if not record.outputs and not record.running:
                    self._drop(record)
            if entry.state != FAILED:  # else it was postponed, and stays as it is
                self.table.fail(object_id, entry, error)
        elif entry.state == LOCATED and not (entry.handles or entry.pins or entry.borrowers):
            self.table.free(object_id, entry, lost=True)  # only lineage holds it: perhaps nobody will need it
        else:
            self.table.make_again(object_id, entry, record.task)
            if record.running == STARTED:
                # What is under way may have stored it already, and that may be what is lost.
                self._early[object_id] = loss
            elif record.running == NOT:
                record.running = ASKED
                record.left -= 1 if record.left > 0 else 0
                for each in record.inputs:
                    self._needed(each)
                    self.table.pin(each)
                self.recorder.note((object_id, "makes record", record.number, "run again, left", record.left))
                self.table.effects.append(Recompute(record))

    def _needed(self, object_id: bytes) -> None:
        """More than lineage is about to hold an input."""
        if object_id in self._kept:
            self._keep_no_longer(object_id)
            self._tell(object_id, False)

    def _tell(self, object_id: bytes, spare: bool) -> None:
        """Let the store know of a value that lineage alone holds, or holds no longer alone."""
        entry = self.table.entries[object_id]
        if entry.state == LOCATED and not entry.owner:
            self.table.effects.append(Spare(object_id, spare))

    def _why_not(self, record: Record | None, entry: Entry) -> str:
        if record is None:
            return NO_TASK
        if record.refused:
            return record.refused
        if not record.left and not record.running:
            return USED_UP
        return "" if self._repeatable(record, entry) else CONTAINS_OTHERS

    def _repeatable(self, record: Record, entry: Entry) -> bool:
        """Tell whether a second execution would put the same refs into the value."""
        for inner in entry.contained or ():
            held = self.table.entries[inner]
            if held.owner and inner not in record.inputs and not self.table.is_dead(held.owner):
                return False
        return True

    # -- what the table asks -------------------------------------------------------------------------------------

    def retain(self, object_id: bytes, entry: Entry) -> bool:
        """Nothing but lineage can hold the object any more: tell whether its entry stays, and free its value if it may."""
        if object_id not in self.inputs:
            return False
        if entry.state in (PENDING, FREED):
            return True
        dear = self._is_dear(entry.value)
        if entry.state == LOCATED and not entry.owner:
            record = self._records.get(object_id)
            if record is not None and (record.freeable or dear) and not self._why_not(record, entry):
                self._free(object_id, entry)
                return True
        if dear:
            self.recorder.note((object_id, "is too dear to be kept for lineage"))
            self._empty(self._users_of(object_id))
        elif object_id not in self._kept:
            self._kept[object_id] = size = _size_of(entry.value)
            self.bytes += size
            self.kept_bytes += size
            self._count += 1
            heapq.heappush(self._dearest, (-size, self._count, object_id))
            self._keep_to_limit()
            if object_id in self._kept:
                self._tell(object_id, True)
        return True

    def _is_dear(self, value: Any) -> bool:
        """Tell whether a value that only lineage needs is not to be kept in any case: see the module's docstring."""
        if _size_of(value) > self.value_bytes:
            return True
        return not isinstance(value, bytes) and any(part.home or part.arena for part in value.parts)

    def _free(self, object_id: bytes, entry: Entry) -> None:
        self._remains.discard(object_id)
        self._keep_no_longer(object_id)
        self.table.free(object_id, entry)

    def _keep_no_longer(self, object_id: bytes) -> None:
        size = self._kept.pop(object_id, 0)
        self.bytes -= size
        self.kept_bytes -= size
        if len(self._dearest) > 2 * len(self._kept) + 64:
            self._dearest = [each for each in self._dearest if self._kept.get(each[2]) == -each[0]]
            heapq.heapify(self._dearest)

    def unwanted(self, object_id: bytes, entry: Entry) -> bool:
        """An execution has stored a value that is not waited for: tell whether to free it now, else that comes in the end."""
        if entry.state == FREED:
            self._remains.discard(object_id)
            return True
        if entry.state != LOCATED:  # somebody may still read what is left of an earlier value
            self.may_be_stored(object_id)
        return False

    def may_be_stored(self, object_id: bytes) -> None:
        """Something is, or may be, in the store for an object that is not located: it is freed in the end."""
        self._known.add(object_id)
        self._remains.add(object_id)

    def has_remains(self, object_id: bytes) -> bool:
        """Tell whether the store may have something of an object that is not located (any more)."""
        return object_id in self._remains

    def gone(self, object_id: bytes) -> None:
        """The table has forgotten the object."""
        self._known.discard(object_id)
        self._remains.discard(object_id)
        self.postponed.discard(object_id)
        self._early.pop(object_id, None)
        record = self._records.get(object_id)
        if record is not None:
            self._forget_output(record, object_id)
            if not record.outputs and not record.running:
                self._drop(record)

    # -- letting go ----------------------------------------------------------------------------------------------

    def _forget_output(self, record: Record, object_id: bytes) -> None:
        record.outputs.discard(object_id)
        del self._records[object_id]

    def _keep_to_limit(self) -> None:
        """Let go of the dearest values, then of the oldest records, until what is kept is within the limits."""
        if self._limiting or self._dropping:  # a loop further up the stack looks again
            return
        self._limiting = True
        while self.kept_bytes > self.value_bytes and self._dearest:
            size, _, object_id = heapq.heappop(self._dearest)
            if self._kept.get(object_id) == -size:
                self._empty(self._users_of(object_id))
        while self.bytes > self.limit_bytes and self._by_age:
            self._empty([next(iter(self._by_age.values()))])
        self._limiting = False

    def _users_of(self, object_id: bytes) -> list[Record]:
        return list(self._users.get(object_id, {}).values())

    def _empty(self, records: list[Record]) -> None:
        """These records are too dear: they do not run again, nor do those that would need what they had made."""
        freed: list[bytes] = []
        while records:
            record = records.pop()
            if record.number not in self._by_age:
                continue  # it goes already
            record.refused = DROPPED
            self.recorder.note(("record", record.number, "is dropped for its size, of", self.bytes, "bytes"))
            for output in sorted(record.outputs):
                if self._is_freed(output):
                    freed.append(output)
                    records += self._users_of(output)
            self._drop(record)
        for output in freed:
            if self._is_freed(output):  # somebody has asked for it
                self.revive(output, self.table.entries[output])  # which says why it cannot be

    def _is_freed(self, object_id: bytes) -> bool:
        entry = self.table.entries.get(object_id)
        return entry is not None and entry.state == FREED

    def _drop(self, record: Record) -> None:
        """Let go of what a record holds. What that frees may be the last output of another record, and so on."""
        if self._by_age.pop(record.number, None) is None:
            return
        self.bytes -= record.size
        for each in dict.fromkeys(record.inputs):
            users = self._users[each]
            del users[record.number]
            if not users:
                del self._users[each]
        self._doomed.append(record)
        if self._dropping:
            return  # the loop below is further up the stack
        self._dropping = True
        while self._doomed:
            doomed = self._doomed.pop()
            inputs, doomed.inputs = doomed.inputs, []
            for each in inputs:
                self._release(each)
        self._dropping = False
        self._keep_to_limit()

    def _release(self, object_id: bytes) -> None:
        self.inputs[object_id] -= 1
        if not self.inputs[object_id]:
            del self.inputs[object_id]
            self._keep_no_longer(object_id)
            self.table.reconsider(object_id)


def _size_of(value: Any) -> int:
    """Return the bytes of an entry's value."""
    size: int = len(value) if isinstance(value, bytes) else value.size
    return size
