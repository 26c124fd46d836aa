"""A message channel over a unix stream socket: length-prefixed msgspec frames, batched in both directions.

Theory of operation. One frame is a 4-byte little-endian length and a msgpack array of messages, so that any number of
messages costs one encode, one system call and one wake-up of the peer. `send` only appends to the outbox; `flush` encodes
what is there and writes it. A socket buffer that is full leaves the rest in `_unsent`, and the loop flushes again when
the socket can take more. Nothing received is decoded before the handshake of `auth` is done; what is sent before that
waits in the outbox.

No frame leaves that the peer would refuse. A batch that is too large is sent in parts, and the batches after it are smaller
(`_most`). One message that is too large, or that cannot be encoded, fails alone: it is handed to `on_refused`, and what stands
before and behind it is sent.

A channel is used by one thread at a time: whoever holds its loop's lock.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from afield.transport.auth import AuthenticationError, Handshake
from afield.transport.loop import Loop

#: No frame is larger: a length beyond it is a bug or an attack, not a message.
MAX_FRAME_BYTES = 256 << 20
#: Before the handshake is done nothing larger is accepted.
MAX_HANDSHAKE_BYTES = 256
#: The buffer of `drain`.
DRAIN_BYTES = 1 << 16
#: One encode never takes more messages, which bounds the frame and the time until the first byte leaves.
MAX_BATCH = 1024
#: It takes so many at first, and as many as make up so many bytes once their size is known: what is encoded is memory.
FIRST_BATCH, BATCH_BYTES = 64, 4 << 20

Messages = list[Any]
_PEER_CREDENTIALS = struct.Struct("3i")


class Channel:
    """One authenticated connection to a peer process.

    Args:
        loop: drives the socket.
        sock: a connected, non-blocking unix stream socket.
        handshake: proves the peer; its `peer_id` names the peer afterwards.
        decoder: decodes one frame into a list of messages.
        on_messages: called with (channel, messages) for each received frame.
        on_closed: called once with the channel when the peer is gone, in whatever way.
        on_ready: called once with the channel when the peer is proven.

    Attributes:
        on_refused: called with (channel, message, why) for a message that cannot be sent: it is too large, or not one that
            can be encoded. What it returns, if it is not None, leaves in its place. The channel goes on.
    """

    __slots__ = (
        "_decode",
        "_encode",
        "_handshake",
        "_loop",
        "_most",
        "_needed",
        "_partial",
        "_unsent",
        "closed",
        "context",
        "on_closed",
        "on_messages",
        "on_ready",
        "on_refused",
        "outbox",
        "peer_id",
        "ready",
        "sock",
    )

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        handshake: Handshake,
        decoder: Callable[[Any], Messages],
        on_messages: Callable[[Channel, Messages], None],
        on_closed: Callable[[Channel], None],
        on_ready: Callable[[Channel], None] | None = None,
    ) -> None:
        self._loop = loop
        self.sock = sock
        self._handshake = handshake
        self._decode = decoder
        self._encode = msgspec.msgpack.Encoder().encode
        self.on_messages = on_messages
        self.on_closed = on_closed
        self.on_ready = on_ready
        self.on_refused: Callable[[Channel, Any, str], Any] = _lost
        self.outbox: Messages = []
        self.peer_id = b""
        self.ready = False
        self.closed = False
        self.context: Any = None
        self._partial = bytearray()  # the beginning of a frame whose end has not arrived
        self._needed = 4  # bytes that must be there before parsing it again is worth while
        self._unsent = memoryview(b"")
        self._most = FIRST_BATCH  # messages that the next frame may have
        loop.register(sock.fileno(), self.handle)
        greeting = handshake.greeting()
        if greeting:
            self._write(_frame(greeting))

    def send(self, message: Any) -> None:
        """Queue a message; it leaves with the next `flush`."""
        if not self.outbox:
            self._loop.dirty.append(self)
        self.outbox.append(message)

    def flush(self) -> None:
        """Write what is queued, as far as the socket takes it."""
        while self.outbox and self.ready and not self._unsent and not self.closed:
            if len(self.outbox) <= self._most:
                batch, self.outbox = self.outbox, []
            else:
                batch, self.outbox = self.outbox[: self._most], self.outbox[self._most :]
            body = self._encoded(batch)
            if body is not None:
                self._write(_frame(body))

    def _encoded(self, batch: Messages) -> bytes | None:
        """Encode messages as one frame; None if that cannot be: they are in the outbox again, to leave in parts, or refused."""
        try:
            body: bytes = self._encode(batch)
            size, fault = len(body), ""
        except Exception as error:  # of whatever a message has in it; MemoryError is one too
            size, fault = 0, f"it cannot be encoded: {type(error).__name__}: {error}"
        if not fault and size <= MAX_FRAME_BYTES:
            if size > BATCH_BYTES:
                self._most = max(1, len(batch) * BATCH_BYTES // size)
            elif len(batch) == self._most < MAX_BATCH:
                self._most *= 2
            return body
        self._most = max(1, len(batch) // 2)
        if len(batch) > 1:
            self.outbox = batch + self.outbox
        else:
            why = fault or f"it has {size} bytes, and a message may have {MAX_FRAME_BYTES}"
            instead = self.on_refused(self, batch[0], why)
            if instead is not None:
                self.outbox.insert(0, instead)
        return None

    @property
    def drained(self) -> bool:
        """Tell whether the socket has taken everything that was sent."""
        return self.closed or not (self.outbox or self._unsent)

    def handle(self, events: int) -> None:
        """React to what epoll reported for the socket."""
        if events & select.EPOLLOUT:
            unsent, self._unsent = self._unsent, memoryview(b"")
            self._loop.modify(self.sock.fileno(), select.EPOLLIN)
            self._write(unsent)
            self.flush()
        if events & ~select.EPOLLOUT and not self.closed:
            self._receive()

    def drain(self) -> None:
        """Handle what the peer sent before it died, now that another channel told of its death first."""
        # The loop's buffer is in use: we are called from the handling of another channel's messages.
        buffer, self._loop.buffer = self._loop.buffer, memoryview(bytearray(DRAIN_BYTES))
        try:
            while not self.closed and self.ready and self._receive():
                pass
        finally:
            self._loop.buffer = buffer

    def close(self) -> None:
        """Close without calling `on_closed`; what is queued is dropped."""
        if not self.closed:
            self.closed = True
            self._loop.unregister(self.sock.fileno())
            self.sock.close()
            self.outbox = []

    def _disconnected(self) -> None:
        if not self.closed:
            self.close()
            self.on_closed(self)

    def _write(self, data: bytes | memoryview) -> None:
        try:
            sent = self.sock.send(data, socket.MSG_NOSIGNAL)  # whatever the program does about SIGPIPE
        except BlockingIOError:
            sent = 0
        except OSError:
            # The peer is gone. What it sent before it went may still be readable, so the loss is reported by the read
            # side, which epoll wakes with a hang-up.
            return
        if sent < len(data):
            self._unsent = memoryview(data)[sent:]
            self._loop.modify(self.sock.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def _receive(self) -> bool:
        """Read once and handle what is complete; return whether there was anything."""
        buffer = self._loop.buffer
        try:
            count = self.sock.recv_into(buffer)
        except BlockingIOError:
            return False
        except OSError:
            count = 0
        if not count:
            self._disconnected()
            return False
        if not self._partial:
            self._parse(buffer[:count])
            return True
        self._partial += buffer[:count]
        if len(self._partial) >= self._needed:
            whole, self._partial = self._partial, bytearray()
            self._parse(memoryview(whole))
        return True

    def _parse(self, data: memoryview) -> None:
        position, end = 0, len(data)
        self._needed = 4
        while end - position >= 4:
            size = int.from_bytes(data[position : position + 4], "little")
            start = position + 4
            if size > (MAX_FRAME_BYTES if self.ready else MAX_HANDSHAKE_BYTES):
                self._disconnected()
                return
            if end - start < size:
                self._needed = 4 + size
                break
            position = start + size
            if self.ready:
                try:
                    messages = self._decode(data[start:position])
                except msgspec.MsgspecError:  # not one of our messages: another version, or an intruder with the token
                    self._disconnected()
                    return
                self.on_messages(self, messages)
            else:
                self._prove(bytes(data[start:position]))
            if self.closed:
                return
        if position < end:
            self._partial = bytearray(data[position:])

    def _prove(self, frame: bytes) -> None:
        try:
            answer = self._handshake.feed(frame)
        except AuthenticationError:
            self._disconnected()
            return
        if answer:
            self._write(_frame(answer))
        if self._handshake.done:
            self.ready = True
            self.peer_id = self._handshake.peer_id
            if self.on_ready is not None:
                self.on_ready(self)
            self.flush()


def _lost(channel: Channel, message: Any, why: str) -> None:
    """Nobody has said what is to follow from a message that cannot be sent: its loss must not go unseen."""
    print(f"afield: a {type(message).__name__} was not sent: {why}", file=sys.stderr)


def _frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


def connect(name: str) -> socket.socket:
    """Connect to the abstract unix socket `name`; raise `ConnectionRefusedError` if nobody listens there.

    Abstract sockets live exactly as long as the process that listens, so no way of dying leaves one behind; the kernel
    tells who the peer is, and the handshake proves that it belongs to the cluster.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.connect("\0" + name)
        sock.setblocking(False)
        if not same_user(sock):
            raise ConnectionRefusedError(f"another user listens on {name}")
    except BaseException:
        sock.close()
        raise
    return sock


def listen(name: str) -> socket.socket:
    """Return a non-blocking listening socket with the abstract name `name`."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.bind("\0" + name)
        sock.listen(512)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def same_user(sock: socket.socket) -> bool:
    """Tell whether the kernel says that the peer runs as this user (or as root)."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    return _PEER_CREDENTIALS.unpack(credentials)[1] in (os.getuid(), 0)
