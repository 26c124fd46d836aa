"""Whom a process talks to: one listener, and one channel for each peer.

Theory of operation. What we send to a peer always goes through one and the same channel, so that it stays in order; it is
opened by whoever first has something to say, or by the peer. A peer whose channel is gone, or to whom none can be made, is
dead: nothing reconnects. Of some deaths the node daemon tells first; then what the peer had sent still counts (`forget`).

The channel to the daemon is flushed before all others: what we tell it must be known before anybody else can refer to it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

from afield.runtime.process.configuration import SessionConfig
from afield.runtime.wire import messages
from afield.transport.auth import Handshake
from afield.transport.channel import Channel, connect, listen, same_user
from afield.transport.loop import Loop


class Channels:
    """The connections of one process.

    Args:
        config: the session.
        process_id: who we are.
        loop: drives them.
        on_batch: handles one frame: called with its channel and its messages.
        on_disconnected: called with the id of a process that cannot be reached any more.
        on_out_of_files: called with a text when this process has no descriptors left.
    """

    def __init__(
        self,
        config: SessionConfig,
        process_id: bytes,
        loop: Loop,
        on_batch: Callable[[Channel, list[Any]], None],
        on_disconnected: Callable[[bytes], None],
        on_out_of_files: Callable[[str], None],
    ) -> None:
        self._config = config
        self._process_id = process_id
        self._loop = loop
        self._on_batch = on_batch
        self._on_disconnected = on_disconnected
        self._on_out_of_files = on_out_of_files
        #: Called with (channel, message, why) for a message that cannot be sent; set by whoever knows what follows.
        self.on_refused: Callable[[Channel, Any, str], Any] | None = None
        self._of: dict[bytes, Channel] = {}
        self._listener = listen(config.address(process_id))
        loop.register(self._listener.fileno(), self._accept)
        self.daemon = self._open(connect(config.address(b"")), server=False)
        loop.first = self.daemon

    def to(self, process_id: bytes) -> Channel | None:
        """Return the channel to a process, connecting if needed; None if the process is gone."""
        channel = self._of.get(process_id)
        if channel is None:
            try:
                channel = self._open(connect(self._config.address(process_id)), server=False)
            except OSError as error:
                self._check_files(error)
                self._on_disconnected(process_id)
                return None
            channel.peer_id = process_id
            self._of[process_id] = channel
        return channel

    def forget(self, process_id: bytes) -> None:
        """A process is dead: handle what it had sent, and use its channel no more."""
        channel = self._of.get(process_id)
        if channel is not None:
            channel.drain()
        self._of.pop(process_id, None)

    def close(self) -> None:
        """Close all connections in good order."""
        for channel in [self.daemon, *self._of.values()]:
            channel.close()
        self._loop.unregister(self._listener.fileno())
        self._listener.close()

    def abandon(self) -> None:
        """Close this process's copies of the connections of the one that it was forked from."""
        for channel in [self.daemon, *self._of.values()]:
            channel.sock.close()
        self._listener.close()

    def _open(self, sock: Any, *, server: bool) -> Channel:
        handshake = Handshake(self._config.token, self._process_id, os.urandom(32), server=server)
        channel = Channel(self._loop, sock, handshake, messages.decode, self._on_batch, self._closed, self._ready)
        channel.on_refused = self._refused
        return channel

    def _refused(self, channel: Channel, message: Any, why: str) -> Any:
        assert self.on_refused is not None, f"{type(message).__name__} was refused too early: {why}"
        return self.on_refused(channel, message, why)

    def _accept(self, events: int) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                self._check_files(error)
                return
            sock.setblocking(False)
            if same_user(sock):
                self._open(sock, server=True)
            else:
                sock.close()

    def _ready(self, channel: Channel) -> None:
        self._of.setdefault(channel.peer_id, channel)

    def _closed(self, channel: Channel) -> None:
        if channel.peer_id:
            self._of.pop(channel.peer_id, None)
            self._on_disconnected(channel.peer_id)

    def _check_files(self, error: OSError) -> None:
        """Without descriptors there are no connections: this process can take no further part."""
        if error.errno in (errno.EMFILE, errno.ENFILE):
            self._on_out_of_files(
                f"this process ran out of file descriptors ({error}); it needs one for each worker and actor that it "
                "talks to: raise the limit (ulimit -n), then call afield.shutdown() and afield.init()"
            )
