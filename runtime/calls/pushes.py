"""What a worker is sent: a push, after the definition of its function and those of its arguments that are too many for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from afield.runtime.cores.dispatch import Lease, Task
from afield.runtime.values.arguments import Arguments
from afield.runtime.wire import messages
from afield.transport.channel import Channel

#: So many arguments of a push, each of at most `INLINE_BYTES`, are no matter; more of them are sent in portions.
FEW_DEPENDENCIES = 16
PORTION_BYTES = 1 << 20
#: What one takes beside its data: ids, and the location of what is stored.
DEPENDENCY_BYTES = 100


class PeerState:
    """What we keep with a channel to a worker: what it knows, and what it owes us."""

    __slots__ = ("argument_lost", "defined", "go_on", "inflight", "lease", "on_batch", "retry")

    def __init__(self) -> None:
        self.defined: set[int] = set()
        self.inflight: dict[int, Task] = {}
        self.lease: Lease | None = None
        #: An actor's caller: called after a batch of messages with the number of replies in it, and to run a call again.
        self.on_batch: Callable[[int], None] | None = None
        self.retry: Callable[[Task], None] | None = None
        #: Called when a call may leave that has waited for something other than its arguments.
        self.go_on: Callable[[], None] | None = None
        self.argument_lost: Callable[[Task], bool] | None = None


class Pushes:
    """Sends the pushes of one process."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        self._next_sequence = itertools.count(1).__next__

    def send(self, channel: Channel, state: PeerState, task: Task) -> int:
        """Send one push, preceded by its function's definition where the peer does not know it yet."""
        function = task.function
        if function.index not in state.defined:
            state.defined.add(function.index)
            channel.send(function.define())
        sequence = self._next_sequence()
        dependencies = None if task.dependencies is None else self.arguments.describe(task)
        if dependencies is not None and len(dependencies) > FEW_DEPENDENCIES:
            *before, dependencies = _in_portions(dependencies)
            for portion in before:
                channel.send(messages.MoreDependencies(sequence, portion))
        channel.send(messages.Push(sequence, task.task_id, function.index, task.arguments, task.location, dependencies))
        return sequence


def _in_portions(dependencies: list[messages.Dependency]) -> list[list[messages.Dependency]]:
    """Divide arguments into lists of which each makes a message of bounded size."""
    portions: list[list[messages.Dependency]] = [[]]
    size = 0
    for dependency in dependencies:
        if size > PORTION_BYTES:
            portions.append([])
            size = 0
        portions[-1].append(dependency)
        size += len(dependency.data) + DEPENDENCY_BYTES
    return portions
