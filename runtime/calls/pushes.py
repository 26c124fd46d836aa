"""What a worker is sent: a push, after the definition of its function and those of its arguments that are too many for it.

Theory of operation. A peer is told of each callee once (`Define`), and gets what it is defined as with the first callee that
has this digest. What it knows stands in `PeerState`, and is exactly what it has: messages of one channel stay in order. When a
callee or a definition is garbage here, no push can name it any more, and all who know it are told (`Forget`). So what a worker
keeps is bounded by what its callers keep. Beyond `MAX_CODE_BYTES` at one peer the oldest definition is forgotten there as well,
and sent again with the next push that needs it.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from afield.runtime.calls.callee import Callee
from afield.runtime.cores.dispatch import Lease, Task
from afield.runtime.process.process import Process
from afield.runtime.values.arguments import Arguments
from afield.runtime.wire import messages
from afield.transport.channel import Channel

#: So many arguments of a push, each of at most `INLINE_BYTES`, are no matter; more of them are sent in portions.
FEW_DEPENDENCIES = 16
PORTION_BYTES = 1 << 20
#: What one takes beside its data: ids, and the location of what is stored.
DEPENDENCY_BYTES = 100

#: Definitions of one process at one peer; where functions have captured that much, they are sent again now and then.
MAX_CODE_BYTES = 64 << 20


class PeerState:
    """What we keep with a channel to a worker: what it knows, and what it owes us."""

    __slots__ = ("argument_lost", "code_bytes", "codes", "defined", "go_on", "inflight", "lease", "on_batch", "retry")

    def __init__(self) -> None:
        #: The callees that it knows, by number, and the digest of what each is defined as.
        self.defined: dict[int, bytes] = {}
        #: The definitions that it has, the oldest first, and their sizes; and all of these together.
        self.codes: dict[bytes, int] = {}
        self.code_bytes = 0
        self.inflight: dict[int, Task] = {}
        self.lease: Lease | None = None
        #: An actor's caller: called after a batch of messages with the number of replies in it, and to run a call again.
        self.on_batch: Callable[[int], None] | None = None
        self.retry: Callable[[Task], None] | None = None
        #: Called when a call may leave that has waited for something other than its arguments.
        self.go_on: Callable[[], None] | None = None
        self.argument_lost: Callable[[Task], bool] | None = None

    def unknown(self, index: int) -> None:
        """The peer was not told of a callee after all."""
        digest = self.defined.pop(index, b"")
        self.code_bytes -= self.codes.pop(digest, 0)

    def knows(self, callee: Callee) -> messages.Define:
        """The peer is told of a callee: return what it is to be told."""
        definition = callee.definition
        known = definition.digest in self.codes
        if definition.digest and not known:
            self.codes[definition.digest] = len(definition.blob)
            self.code_bytes += len(definition.blob)
        self.defined[callee.index] = definition.digest
        return callee.define(known)

    def forget(self, indexes: Iterable[int], digests: Iterable[bytes]) -> messages.Forget | None:
        """These are not needed any more: return what the peer is to be told, if it knows any."""
        forgotten = [index for index in indexes if self.defined.pop(index, None) is not None]
        dropped = [digest for digest in digests if digest in self.codes]
        for digest in dropped:
            self.code_bytes -= self.codes.pop(digest)
        return messages.Forget(forgotten, dropped) if forgotten or dropped else None

    def too_many(self) -> messages.Forget | None:
        """The peer has more than it should: return what it is to forget, with all callees that are defined so."""
        oldest = next(iter(self.codes))
        if self.code_bytes <= MAX_CODE_BYTES or len(self.codes) == 1:
            return None
        return self.forget([index for index, digest in self.defined.items() if digest == oldest], [oldest])


class Pushes:
    """Sends the pushes of one process."""

    def __init__(self, process: Process, arguments: Arguments) -> None:
        self.process = process
        self.arguments = arguments
        #: Callees and definitions that peers know of, by number and digest; they live, or are in `gone`.
        self._known: dict[int | bytes, weakref.ref[Any]] = {}
        #: Those that are garbage, and what stood for them; left by the collector, wherever it ran.
        self.gone: deque[tuple[int | bytes, weakref.ref[Any]]] = deque()
        self._next_sequence = itertools.count(1).__next__

    def send(self, channel: Channel, state: PeerState, task: Task) -> int:
        """Send one push, preceded by its function's definition where the peer does not know it yet."""
        function = task.function
        if function.index not in state.defined:
            self._define(channel, state, function)
        sequence = self._next_sequence()
        dependencies = None if task.dependencies is None else self.arguments.describe(task)
        if dependencies is not None and len(dependencies) > FEW_DEPENDENCIES:
            *before, dependencies = _in_portions(dependencies)
            for portion in before:
                channel.send(messages.MoreDependencies(sequence, portion))
        channel.send(messages.Push(sequence, task.task_id, function.index, task.arguments, task.location, dependencies))
        return sequence

    def _define(self, channel: Channel, state: PeerState, callee: Callee) -> None:
        definition = callee.definition
        self._watch(callee.index, callee)
        channel.send(state.knows(callee))
        if definition.digest:
            self._watch(definition.digest, definition)
            while (forget := state.too_many()) is not None:
                channel.send(forget)

    def _watch(self, key: int | bytes, known: Any) -> None:
        """Hear of the end of what peers know."""
        before = self._known.get(key)
        if before is None or before() is None:
            self._known[key] = weakref.ref(known, partial(self._ended, key))

    def _ended(self, key: int | bytes, reference: weakref.ref[Any]) -> None:
        self.gone.append((key, reference))

    def forget_gone(self) -> None:
        """Have peers forget what is garbage; the caller holds the lock."""
        indexes, digests = [], []
        while self.gone:
            key, reference = self.gone.popleft()
            if self._known.get(key) is reference:  # else there is another definition of the same content by now
                del self._known[key]
                if isinstance(key, int):
                    indexes.append(key)
                else:
                    digests.append(key)
        for channel in self.process.channels.endpoint.channels():
            if isinstance(channel.context, PeerState):
                forget = channel.context.forget(indexes, digests)
                if forget is not None:
                    channel.send(forget)


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
