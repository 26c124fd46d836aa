"""The simulated network: one ordered channel for each ordered pair of processes.

Theory of operation. The runtime's transport is a stream socket per pair: it neither reorders nor duplicates, and a lost
connection is a dead peer, never a reconnect. So the messages of one pair stay in order here too, whatever the delays, and
only messages of different pairs overtake each other. Whoever drives the world decides when a channel's head is delivered.

*Duplicates* cannot come from such a transport, but the core promises to tolerate a control message that is handled twice,
and here it has to. A copy of an `Added`, `Took`, `Subscribe` or `Value` may arrive at any later time (`resend`). A copy of an
`Add` or a `Release` follows the original directly (`send_twice`): they say "from now on", and a stale one that came after
the next registration would undo it, which is why rule 3 of the core asks for one ordered connection. Pushes and replies
run and finish tasks: their duplicates are the business of the shell's sequence numbers, and are not modelled.

*Death*: what is on its way to a dead process is lost. What it had sent is a prefix that arrives and a rest that is lost;
the driver chooses where to cut.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from afield.runtime.wire import messages

Pair = tuple[bytes, bytes]

#: A late copy of these is harmless.
RESENDABLE = (messages.Added, messages.Took, messages.Subscribe, messages.Value)
#: A copy of these is harmless only directly behind the original.
REPEATABLE = (messages.Add, messages.Release)


class Network:
    """Messages on their way: (sender, receiver) -> in order."""

    def __init__(self) -> None:
        self.channels: dict[Pair, deque[Any]] = {}

    def send(self, source: bytes, target: bytes, message: Any) -> None:
        """Append to the channel."""
        self.channels.setdefault((source, target), deque()).append(message)

    def take(self, source: bytes, target: bytes) -> Any:
        """Remove and return the oldest message of a channel; None if there is none (any more)."""
        channel = self.channels.get((source, target))
        if not channel:
            return None
        message = channel.popleft()
        if not channel:
            del self.channels[source, target]
        return message

    def lose(self, source: bytes, target: bytes, keep: int) -> int:
        """Lose all but the `keep` oldest messages of a channel; return how many were lost."""
        channel = self.channels.get((source, target))
        if channel is None:
            return 0
        lost = 0
        while len(channel) > keep:
            channel.pop()
            lost += 1
        if not channel:
            del self.channels[source, target]
        return lost

    def to(self, target: bytes) -> list[bytes]:
        """Return who has messages on their way to `target`."""
        return [pair[0] for pair in self.channels if pair[1] == target]

    def messages(self) -> list[tuple[Pair, Any]]:
        """Return everything that is on its way."""
        return [(pair, message) for pair, channel in self.channels.items() for message in channel]
