"""Cancelling tasks: what waits never starts, what runs is interrupted, and what it has submitted goes with it."""

from __future__ import annotations

import contextlib

from afield.errors import TaskCancelledError
from afield.ids import TASK_ID_BYTES, Scope
from afield.runtime.calls.actor_calls import ActorCalls
from afield.runtime.calls.streams import Streams
from afield.runtime.calls.submission import Submitter
from afield.runtime.cores.dispatch import Task
from afield.runtime.process.process import Process
from afield.runtime.wire import messages
from afield.transport.channel import Channel


class Cancellation:
    """Cancels tasks that this process owns, and asks the owners of others to."""

    def __init__(self, process: Process, submitter: Submitter, actors: ActorCalls, streams: Streams) -> None:
        self.process = process
        self.submitter = submitter
        self.actors = actors
        self.streams = streams
        process.register(messages.CancelObject, self._on_cancel_object)

    def _on_cancel_object(self, channel: Channel, message: messages.CancelObject) -> None:
        with contextlib.suppress(ValueError):  # the borrower's own call was checked there
            self.cancel(message.object_id, message.force, message.recursive)

    def cancel(self, object_id: bytes, force: bool, recursive: bool) -> None:
        """Cancel the task that makes an object; does nothing if it has ended. The caller holds the lock.

        Raises:
            ValueError: `force` for an actor's call: it would end the actor.
        """
        entry = self.process.table.entries.get(object_id)
        if entry is None:
            return
        if entry.owner:
            channel = self.process.channel_to(entry.owner)
            if channel is not None:
                channel.send(messages.CancelObject(object_id, force, recursive))
        elif entry.task is not None:
            self.cancel_task(entry.task, force, recursive)

    def cancel_task(self, task: Task, force: bool, recursive: bool) -> None:
        """Cancel a task of ours wherever it is."""
        if task.lane is None and force:
            raise ValueError("force=True would end the whole actor: use afield.kill(actor) for that")
        if task.cancelled and not force:
            return
        task.cancelled = True
        if task.lane is None:
            self.actors.cancel(task, recursive)
        elif task.unresolved:
            self._end(task)
        elif task in task.lane.ready:
            task.lane.ready.remove(task)
            self._end(task)
        else:
            self._interrupt(task, force, recursive)

    def _end(self, task: Task) -> None:
        self.submitter.fail_with(task, TaskCancelledError(f"{task.function.name}() was cancelled before it started"))

    def _interrupt(self, task: Task, force: bool, recursive: bool) -> None:
        for lease in task.lane.leases:
            for position, (sequence, other) in enumerate(lease.inflight.items()):
                if other is task:
                    if force and position == 0:
                        self.process.daemon.send(messages.KillWorker(lease.lease_id))
                    else:
                        lease.channel.send(messages.Cancel(sequence, recursive))
                    return

    def cancel_children(self, task_id: bytes) -> None:
        """Cancel what a task has submitted from this process and what is not finished; the caller holds the lock."""
        prefix = Scope(task_id).prefix
        children = {
            id(entry.task): entry.task
            for object_id, entry in self.process.table.entries.items()
            if entry.task is not None and object_id.startswith(prefix)
        }
        for child in children.values():
            self.cancel_task(child, False, True)

    def drop_stream(self, life: bytes) -> None:
        """The consumer of a stream is gone: free what it did not take and stop the producer."""
        task = self.streams.drop(life[:TASK_ID_BYTES])
        if task is not None:
            self.cancel_task(task, False, False)
