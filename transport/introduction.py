"""The first words on a new socket: both sides prove themselves; only then does the socket carry a channel.

Theory of operation. Here a frame is a 4-byte little-endian length and its bytes, and no longer than `MAX_HANDSHAKE_BYTES`. What
it holds is for `auth` alone, so nothing of an unproven peer is decoded. Exactly what belongs to the exchange is read, so the
first frame of the channel is still in the socket when `on_proven` gets it. Whatever goes wrong (the socket breaks, the peer
proves nothing, or what it asks for is refused) closes the socket and ends in `on_failed`, once.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from afield.transport.auth import AuthenticationError, Handshake
from afield.transport.link import LinkError
from afield.transport.loop import Loop

#: Before the handshake is done nothing larger is accepted.
MAX_HANDSHAKE_BYTES = 256
_LENGTH_BYTES = 4


class Introduction:
    """One socket until its peer is proven.

    Args:
        loop: drives it.
        sock: a connected, non-blocking stream socket.
        handshake: this side of the exchange.
        on_proven: called with the socket, which belongs to the callee from then on, and the handshake.
        on_failed: called with why, after the socket was closed.
    """

    __slots__ = ("_handshake", "_loop", "_on_failed", "_on_proven", "_partial", "sock")

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        handshake: Handshake,
        on_proven: Callable[[socket.socket, Handshake], None],
        on_failed: Callable[[Exception], None],
    ) -> None:
        self._loop = loop
        self.sock = sock
        self._handshake = handshake
        self._on_proven = on_proven
        self._on_failed = on_failed
        self._partial = b""
        loop.register(sock.fileno(), self.handle)
        greeting = handshake.greeting()
        if greeting:
            self._write(greeting)

    def handle(self, events: int) -> None:
        """Read what has come, up to the end of the exchange."""
        try:
            while self.sock.fileno() >= 0:
                frame = self._read()
                if frame is None:
                    return
                answer = self._handshake.feed(frame)
                if answer:
                    self._write(answer)
                if self._handshake.done:
                    self._loop.unregister(self.sock.fileno())
                    self._on_proven(self.sock, self._handshake)
                    return
        except (AuthenticationError, LinkError, OSError) as error:
            self.close()
            self._on_failed(error)

    def close(self) -> None:
        """Give up; nobody is told."""
        if self.sock.fileno() >= 0:
            self._loop.unregister(self.sock.fileno())
            self.sock.close()

    def _read(self) -> bytes | None:
        """Return the next whole frame, None if it has not come yet."""
        while True:
            have = len(self._partial)
            size = int.from_bytes(self._partial[:_LENGTH_BYTES], "little") if have >= _LENGTH_BYTES else 0
            if size > MAX_HANDSHAKE_BYTES:
                raise AuthenticationError("this is no handshake")
            missing = _LENGTH_BYTES + size - have
            if not missing and have >= _LENGTH_BYTES:
                frame, self._partial = self._partial[_LENGTH_BYTES:], b""
                return frame
            try:
                data = self.sock.recv(missing)
            except BlockingIOError:
                return None
            if not data:
                raise ConnectionResetError("the socket broke during the handshake")
            self._partial += data

    def _write(self, frame: bytes) -> None:
        # A new socket takes these few bytes at once; one that does not is as good as broken, which the read side tells.
        try:
            self.sock.send(len(frame).to_bytes(_LENGTH_BYTES, "little") + frame, socket.MSG_NOSIGNAL)
        except OSError:
            pass
