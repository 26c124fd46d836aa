"""Whom a process talks to: one listener, and one channel for each peer.

Theory of operation. What we send to a peer always goes through one and the same channel, so that it stays in order; it is
opened by whoever first has something to say, or by the peer. A socket that breaks is nobody's death: `transport.endpoint` makes
another, the channel goes on, and what is above never hears of it. Who is dead is said by one authority for each pair, and what
the dead had sent before still counts (`died`):

| pair | makes the sockets | says that the other is dead |
|---|---|---|
| driver - daemon | driver | of the daemon: [name]; of the driver: the lifeline, and with it the session ends |
| worker - daemon | worker | of the daemon: [name], and the fork server ends the worker; of the worker: [reaped] |
| store - daemon | store | of the daemon: [name], and the store ends itself; of the store: [reaped] |
| driver - worker, worker - worker | who speaks first | of a worker: the daemon, to all (`ProcessDied`), when it is [reaped] |
| command line - daemon | command line | nobody: the channel is *fleeting*, it ends with its socket, and a new one asks again |

[name]: the kernel says that nobody listens on the daemon's name any more, which is so exactly when the daemon is gone.
[reaped]: the fork server is the parent of all and learns of each end. Who cannot reach a peer asks the daemon (`Unreachable`),
since the peer may have died before we were there to be told. The fork server and the daemon share a pair of sockets without
a name, which nothing can make again: its end is the session's.

A channel is closed on purpose by a goodbye: a process leaves, or the peer broke the protocol. The latter is told to the daemon,
which ends the peer (or us, where the peer is a driver): nobody waits for what cannot be said.

The channel to the daemon is flushed before all others, which wait while it has no socket or a full one: what we tell it must be
known before anybody else can refer to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from afield.runtime.process.configuration import SessionConfig
from afield.runtime.wire import messages
from afield.transport.channel import Channel
from afield.transport.endpoint import Endpoint
from afield.transport.loop import Loop
from afield.transport.shortage import OUT_OF_FILES, Shortage

#: After so long without descriptors a process that others wait for is given up.
STARVED_S = 60.0

#: Whoever cannot wait for descriptors tries again after the first of these times, and gives up after the second.
AGAIN_S, PATIENCE_S = 0.2, 5.0


class Channels:
    """The connections of one process.

    Args:
        config: the session.
        process_id: who we are.
        loop: drives them.
        on_batch: handles one frame: called with its channel and its messages.
        on_left: called with the id of a process that has closed its channel with us, or broke the protocol.
        on_out_of_files: called with a text when this process has had no descriptors left for `STARVED_S`.

    Raises:
        ConnectionRefusedError: the daemon is gone.
        OSError: this process has no descriptors for the first connections.
    """

    def __init__(
        self,
        config: SessionConfig,
        process_id: bytes,
        loop: Loop,
        on_batch: Callable[[Channel, list[Any]], None],
        on_left: Callable[[bytes], None],
        on_out_of_files: Callable[[str], None],
    ) -> None:
        self._config = config
        self._loop = loop
        self._on_left = on_left
        self._on_out_of_files = on_out_of_files
        self.shortage = Shortage("this process")
        #: Called with (channel, message, why) for a message that cannot be sent; set by whoever knows what follows.
        self.on_refused: Callable[[Channel, Any, str], Any] | None = None
        self._of: dict[bytes, Channel] = {}
        self.endpoint = Endpoint(
            loop,
            config.token,
            process_id,
            messages.decode,
            on_batch,
            self._closed,
            on_ready=self._ready,
            on_absent=self._absent,
            on_error=self._without_files,
            on_refused=self._refused,
        )
        self.endpoint.listen(config.address(process_id))
        self.daemon = loop.first = self.endpoint.open(config.address(b""))

    def to(self, process_id: bytes, *, patient: bool = True) -> Channel | None:
        """Return the channel to a process, opening it if needed; None if it is gone: the daemon will say so.

        Without descriptors the channel gets its socket later, unless the caller is not `patient`.

        Raises:
            OSError: this process has no descriptors left, and the caller is not patient.
        """
        channel = self._of.get(process_id)
        if channel is None:
            address = self._config.address(process_id)
            try:
                channel = self._of[process_id] = self.endpoint.open(address, process_id, patient=patient)
            except OSError as error:
                if error.errno in OUT_OF_FILES:
                    raise
                self.daemon.send(messages.Unreachable(process_id))
                return None
        return channel

    def try_again(self, error: OSError, again: Callable[[], object], give_up: Callable[[str], object]) -> None:
        """There were no descriptors for a channel: call `again` soon, or `give_up`, with a text, after `PATIENCE_S`."""
        if self.shortage.lasts_s < PATIENCE_S:
            self._loop.after(AGAIN_S, again)
        else:
            give_up(self.shortage.describe(error))

    def died(self, process_id: bytes) -> None:
        """A process is dead: handle what it had sent, and use its channels no more."""
        self.endpoint.died(process_id)
        self._of.pop(process_id, None)

    def close(self) -> None:
        """Close all connections in good order."""
        self.endpoint.close()

    def abandon(self) -> None:
        """Close this process's copies of the connections of the one that it was forked from."""
        self.endpoint.abandon()

    def _refused(self, channel: Channel, message: Any, why: str) -> Any:
        assert self.on_refused is not None, f"{type(message).__name__} was refused too early: {why}"
        return self.on_refused(channel, message, why)

    def _ready(self, channel: Channel) -> None:
        if channel is not self.daemon:
            self._of.setdefault(channel.peer_id, channel)

    def _absent(self, channel: Channel, name_is_gone: bool) -> None:
        if channel is not self.daemon:
            self.daemon.send(messages.Unreachable(channel.peer_id))
        elif name_is_gone:
            channel.refused()

    def _closed(self, channel: Channel) -> None:
        self._of.pop(channel.peer_id, None)
        if channel.fault:
            self.daemon.send(messages.Unreachable(channel.peer_id, channel.fault))
        self._on_left(channel.peer_id)

    def _without_files(self, error: OSError) -> None:
        """Connections wait; who can have none for long is of no use to others, and must not keep them waiting for ever."""
        if self.shortage.met(error) > STARVED_S:
            self._on_out_of_files(self.shortage.describe(error))
