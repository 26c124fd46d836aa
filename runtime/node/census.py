"""Questions to every process of the node: the daemon asks all at once and answers when all have, or when time is up.

Theory of operation. A client asks the daemon (`Query`); the daemon asks each driver and worker the same question, collects
what they say (`Answer`), and answers with everything together. A process that dies meanwhile is not waited for, and one that
does not answer within `PATIENCE_S`, because its code holds the interpreter, is left out and named; one that says that it is
`WORKING` on a long answer is given `LONG_PATIENCE_S`. Rounds are bounded.

What processes do ("stack") is asked of the store processes as well; the daemon adds what itself does, and what the kernel knows
of those that do not answer.

Counters ("stats") are summed. What a process that is gone had counted when it was last asked stays in the sum.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from afield.runtime.process.stacks import describe_activity, state_of
from afield.runtime.tools.memory import MAX_ROWS, largest
from afield.runtime.tools.stack import ProcessStack
from afield.runtime.wire import messages
from afield.transport.channel import Channel

if TYPE_CHECKING:
    from afield.runtime.node.daemon import NodeDaemon

PATIENCE_S = 1.0
LONG_PATIENCE_S = 60.0
#: Questions under way at the same time; more are refused.
MAX_ROUNDS = 64


class _Round:
    """One question on its way."""

    __slots__ = ("answers", "argument", "asked", "asker", "deadline", "request", "what", "working")

    def __init__(self, asker: Channel, message: messages.Query, asked: set[bytes], deadline: float) -> None:
        self.asker = asker
        self.request = message.request
        self.what = message.what
        self.argument = message.argument
        self.asked = asked
        self.answers: dict[bytes, Any] = {}
        self.deadline = deadline
        self.working: set[bytes] = set()  # those that make a long answer


class Census:
    """Asks all processes."""

    def __init__(self, daemon: NodeDaemon) -> None:
        self._daemon = daemon
        #: What is asked of all -> what makes one answer of theirs.
        self.questions = {"stats": self._stats, "memory": self._memory, "stack": self._stack}
        self._rounds: dict[int, _Round] = {}
        self._next_round = 0
        self._last_stats: dict[bytes, dict[str, float]] = {}
        self._departed: Counter[str] = Counter()

    def ask(self, asker: Channel, message: messages.Query) -> None:
        """Begin a round; `asker` gets the answer."""
        if len(self._rounds) >= MAX_ROUNDS:
            asker.send(messages.Answer(message.request, None, "too many questions at once; ask again"))
            return
        self._next_round += 1
        number = self._next_round
        channels = list(self._daemon.channels.values())
        if message.what == "stack":
            channels += [channel for channel, _, _ in self._daemon.tiers.stores.processes()]
        asked = {channel.peer_id for channel in channels}
        self._rounds[number] = _Round(asker, message, asked, time.monotonic() + PATIENCE_S)
        for channel in channels:
            channel.send(messages.Query(number, message.what, message.argument))
        if not asked:
            self._finish(number)

    def on_answer(self, channel: Channel, message: messages.Answer) -> None:
        """One process has answered."""
        current = self._rounds.get(message.request)
        if current is None or channel.peer_id not in current.asked:
            return  # too late
        if message.error == messages.WORKING:
            current.working.add(channel.peer_id)
            return
        current.asked.discard(channel.peer_id)
        if not message.error:
            current.answers[channel.peer_id] = message.value
        if not current.asked:
            self._finish(message.request)

    def process_died(self, process_id: bytes) -> None:
        """A process is gone: nobody waits for it."""
        self._departed.update(self._last_stats.pop(process_id, {}))
        for number, current in list(self._rounds.items()):
            current.asked.discard(process_id)
            if not current.asked:
                self._finish(number)

    def expire(self, now: float) -> None:
        """End the rounds whose time is over."""
        for number, current in list(self._rounds.items()):
            if current.deadline > now:
                continue
            if current.asked & current.working:
                current.deadline = now + LONG_PATIENCE_S
                current.working.clear()
            else:
                self._finish(number)

    def next_deadline(self) -> float | None:
        """Return when the first round ends at the latest."""
        return min((current.deadline for current in self._rounds.values()), default=None)

    def _finish(self, number: int) -> None:
        current = self._rounds.pop(number)
        if current.asker.closed:
            return
        current.asker.send(messages.Answer(current.request, self.questions[current.what](current)))

    def _stats(self, current: _Round) -> dict[str, float]:
        self._last_stats.update(
            (process_id, counters)
            for process_id, counters in current.answers.items()
            if process_id in self._daemon.channels
        )
        total = Counter(self._departed)
        for counters in self._last_stats.values():  # of one that did not answer in time, what it said before
            total.update(counters)
        return {**total, **self._daemon.tiers.books.moved_bytes}

    def _memory(self, current: _Round) -> dict[str, Any]:
        return {
            "processes": self.processes(),
            "tables": list(current.answers.items()),
            "silent": sorted(current.asked),
            "store": largest(self._daemon.tiers.books.objects(), MAX_ROWS, lambda stored: sum(stored[2].values())),
            "stored": self._daemon.tiers.books.counts(),
        }

    def _stack(self, current: _Round) -> list[ProcessStack]:
        """Say what each process does, this one and those that do not answer or are just starting included."""
        daemon = self._daemon
        own = describe_activity(daemon.cores() if current.argument else None)
        found = [ProcessStack(os.getpid(), "daemon", "", activity=own)]
        stores = [(channel.peer_id, pid, "store", name) for channel, pid, name in daemon.tiers.stores.processes()]
        for process_id, pid, kind, name in [*self.processes(), *stores]:
            if process_id in current.answers:
                found.append(ProcessStack(pid, kind, name, activity=current.answers[process_id]))
            elif process_id in current.asked:
                found.append(ProcessStack(pid, kind, name, f"does not answer; {state_of(pid)}"))
        for worker in daemon.workers.by_id.values():
            if not worker.ready and worker.pid:
                found.append(ProcessStack(worker.pid, "worker", worker.name, f"is starting; {state_of(worker.pid)}"))
        return found

    def processes(self) -> list[tuple[bytes, int, str, str]]:
        """List the processes: id, pid, "driver" or "worker", and a worker's name."""
        daemon = self._daemon
        listed = []
        for process_id in daemon.channels:
            worker = daemon.workers.by_id.get(process_id)
            kind, name = ("worker", worker.name) if worker is not None else ("driver", "driver")
            listed.append((process_id, daemon.pids.get(process_id, 0), kind, name))
        return listed
