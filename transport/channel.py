"""A message channel: length-prefixed msgspec frames on a stream socket, batched in both directions, in order and once.

Theory of operation. One frame is a header (its length, and how many frames have arrived here) and a msgpack array of messages,
so that any number of messages costs one encode, one system call and one wake-up of the peer. `send` only appends to the
outbox; `flush` encodes what is there and writes it. A socket buffer that is full leaves the rest in `unsent`, and the loop
flushes again when the socket can take more.

A channel outlives its sockets: its `Link` numbers the frames, keeps those that the peer may not have, and knows what is to be
sent again. Between two sockets the channel is not `ready`, and what is sent waits in the outbox. Who makes the next socket, and
who is told of what, is the business of `endpoint`. A socket is here only after its peer was proven (`introduction`).

No frame leaves that the peer would refuse. A batch that is too large is sent in parts, and the batches after it are smaller
(`_most`). One message that is too large, or that cannot be encoded, fails alone: it is handed to `on_refused`, and what stands
before and behind it is sent.

A channel is used by one thread at a time: whoever holds its loop's lock.
"""

from __future__ import annotations

import select
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

import msgspec

from afield.transport.link import COUNT_MASK, GOODBYE, HEADER, OWED_BYTES, Link, LinkError
from afield.transport.loop import Loop

#: No frame is larger: a length beyond it is a bug or an attack, not a message.
MAX_FRAME_BYTES = 256 << 20
#: Characters of what is said about a peer's fault.
MOST_FAULT = 500
#: The buffer of `drain`.
DRAIN_BYTES = 1 << 16
#: One encode never takes more messages, which bounds the frame and the time until the first byte leaves.
MAX_BATCH = 1024
#: It takes so many at first, and as many as make up so many bytes once their size is known: what is encoded is memory.
FIRST_BATCH, BATCH_BYTES = 64, 4 << 20

Messages = list[Any]
_HEADER_BYTES = HEADER.size
_read_header = HEADER.unpack_from


class UnexpectedMessageError(Exception):
    """A peer has sent what is not for it to send: it costs the channel, as all that cannot be handled."""


class Channel:
    """One conversation with a proven peer process.

    Args:
        loop: drives its sockets.
        link: its numbers, and what is kept of it.
        peer_id: who the peer is, as far as it is known before it is proven.
        decoder: decodes one frame into a list of messages.
        on_messages: called with (channel, messages) for each received frame.
        on_closed: called once with the channel when the peer has closed it, or it cannot go on.
        on_broken: called with the channel when its socket is gone.
        on_over: called once with the channel when it is closed, by whomever: it needs no socket any more.

    Attributes:
        ready: a socket carries it.
        unsent: what its socket has not taken yet.
        closed: it is over.
        fault: what the peer did against the protocol, if that is why it is closed.
        on_refused: called with (channel, message, why) for a message that cannot be sent: it is too large, or not one that
            can be encoded. What it returns, if it is not None, leaves in its place. The channel goes on.
    """

    __slots__ = (
        "_decode",
        "_encode",
        "_loop",
        "_most",
        "_needed",
        "_on_broken",
        "_on_over",
        "_partial",
        "closed",
        "context",
        "fault",
        "link",
        "on_closed",
        "on_messages",
        "on_refused",
        "outbox",
        "peer_id",
        "ready",
        "sock",
        "unsent",
    )

    def __init__(
        self,
        loop: Loop,
        link: Link,
        peer_id: bytes,
        decoder: Callable[[Any], Messages],
        on_messages: Callable[[Channel, Messages], None],
        on_closed: Callable[[Channel], None],
        on_broken: Callable[[Channel], None],
        on_over: Callable[[Channel], None],
    ) -> None:
        self._loop = loop
        self.link = link
        self.peer_id = peer_id
        self._decode = decoder
        self._encode = msgspec.msgpack.Encoder().encode
        self.on_messages = on_messages
        self.on_closed = on_closed
        self._on_broken = on_broken
        self._on_over = on_over
        self.on_refused: Callable[[Channel, Any, str], Any] = _lost
        self.outbox: Messages = []
        self.sock: socket.socket | None = None
        self.ready = False
        self.closed = False
        self.fault = ""
        self.context: Any = None
        self._partial = bytearray()  # the beginning of a frame whose end has not arrived
        self._needed = _HEADER_BYTES  # bytes that must be there before parsing it again is worth while
        self.unsent = memoryview(b"")
        self._most = FIRST_BATCH  # messages that the next frame may have

    # -- messages --------------------------------------------------------------------------------------------------

    def send(self, message: Any) -> None:
        """Queue a message; it leaves with the next `flush`."""
        if not self.outbox:
            self._loop.dirty.append(self)
        self.outbox.append(message)

    def flush(self) -> None:
        """Write what is queued, as far as the socket takes it."""
        while self.outbox and self.ready and not self.unsent:
            if len(self.outbox) <= self._most:
                batch, self.outbox = self.outbox, []
            else:
                batch, self.outbox = self.outbox[: self._most], self.outbox[self._most :]
            body = self._encoded(batch)
            if body is not None:
                self._write(self.link.frame(body))

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
        """Tell whether a socket has taken everything that was sent."""
        return self.closed or (self.ready and not (self.outbox or self.unsent))

    def handle(self, events: int) -> None:
        """React to what epoll reported for the socket."""
        if events & select.EPOLLOUT and self.sock is not None:
            unsent, self.unsent = self.unsent, memoryview(b"")
            self._loop.modify(self.sock.fileno(), select.EPOLLIN)
            self._write(unsent)
            self._loop.sends_again(self)
            self._settle_debt()
        if events & ~select.EPOLLOUT and self.ready:
            self._receive()

    def drain(self) -> None:
        """Handle what the peer sent before it died, now that another channel told of its death first."""
        # The loop's buffer is in use: we are called from the handling of another channel's messages.
        buffer, self._loop.buffer = self._loop.buffer, memoryview(bytearray(DRAIN_BYTES))
        try:
            while self.ready and self._receive():
                pass
        finally:
            self._loop.buffer = buffer

    # -- sockets, and the end --------------------------------------------------------------------------------------

    def attach(self, sock: socket.socket, again: list[bytes]) -> None:
        """Go on over a new socket of the proven peer; `again` is what it has not got of the frames that were sent."""
        self._let_go()
        self.sock = sock
        self._loop.register(sock.fileno(), self.handle)
        self.ready = True
        if again:
            self._write(b"".join(again))
        self._loop.sends_again(self)

    def close(self) -> None:
        """Close on purpose and tell the peer so, without calling `on_closed`; what is queued is dropped."""
        self._end("closed", say=True)

    def died(self) -> None:
        """The peer is dead, says who knows: nothing comes any more, and nothing is kept."""
        self._end("died", say=False)

    def refused(self, fault: str = "") -> None:
        """No socket can carry this any more, for a reason that is final."""
        self.fault = fault
        self._over("closed")

    def unknown(self) -> None:
        """The peer has told the link that it does not know it any more."""
        self._over("")

    def _let_go(self) -> None:
        sock, self.sock, self.ready = self.sock, None, False
        if sock is not None:
            self._loop.unregister(sock.fileno())
            sock.close()
        self._partial, self._needed, self.unsent = bytearray(), _HEADER_BYTES, memoryview(b"")

    def _end(self, event: str, *, say: bool) -> None:
        if self.closed:
            return
        self.closed = True
        if say and self.ready and not self.unsent:  # else it hears that we do not know the link any more
            self._write(self.link.goodbye())
        self._let_go()
        self.outbox = []
        if event:
            self.link.end(event)
        self._loop.sends_again(self)
        self._on_over(self)

    def _over(self, event: str, *, say: bool = False) -> None:
        """End, and tell the owner, who did not ask for it."""
        if not self.closed:
            self._end(event, say=say)
            self.on_closed(self)

    def _violated(self, fault: str) -> None:
        """The peer broke the protocol: it would send the same again over any socket."""
        self.fault = fault
        self._over("closed", say=True)

    def _break(self) -> None:
        self._let_go()
        self.link.broke()
        if self.link.fleeting:
            self._over("closed")
        else:
            self._on_broken(self)

    # -- bytes -----------------------------------------------------------------------------------------------------

    def _write(self, data: bytes | memoryview) -> None:
        sock = self.sock
        assert sock is not None
        try:
            sent = sock.send(data, socket.MSG_NOSIGNAL)  # whatever the program does about SIGPIPE
        except BlockingIOError:
            sent = 0
        except OSError:
            # The socket is broken. What the peer sent before may still be readable, and we may be in the middle of a
            # transition, so that is for the loop. The frame is kept, and nothing follows it over this socket.
            self.unsent = memoryview(data)
            self._loop.after(0.0, lambda: self._write_failed(sock))
            return
        if sent < len(data):
            self.unsent = memoryview(data)[sent:]
            self._loop.modify(sock.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def _write_failed(self, sock: socket.socket) -> None:
        """A socket takes nothing more: read what it still has, then it is as good as gone, whatever its other half says."""
        if self.sock is sock:
            while self.ready and self._receive():
                pass
            if self.sock is sock:
                self._break()

    def _settle_debt(self) -> None:
        """Tell the peer how much has arrived, if it must know and nothing else that leaves says so."""
        if self.link.owed_bytes >= OWED_BYTES and self.ready and not self.unsent:
            self._write(self.link.acknowledgement())

    def _receive(self) -> bool:
        """Read once and handle what is complete; return whether there was anything."""
        assert self.sock is not None
        buffer = self._loop.buffer
        try:
            count = self.sock.recv_into(buffer)
        except BlockingIOError:
            return False
        except OSError:
            count = 0
        if not count:
            self._break()
            return False
        if not self._partial:
            self._parse(buffer[:count])
            return True
        self._partial += buffer[:count]
        if len(self._partial) >= self._needed:
            whole, self._partial = self._partial, bytearray()
            self._parse(memoryview(whole))
        return True

    def _deliver(self, frame: memoryview) -> bool:
        """Handle a frame's messages; return whether more may follow."""
        try:
            messages = self._decode(frame)
        except Exception as error:  # MsgspecError, but also text that is none, or nested too deeply
            self._violated(f"it sent what is no message: {type(error).__name__}: {error}")
            return False
        return self.deliver(messages)

    def deliver(self, messages: Messages) -> bool:
        """Have messages handled, as if they had just arrived; return whether more may follow.

        One that makes no sense, whatever it does to its handler, is the fault of its sender, or a bug of ours that this sender
        has met: it costs this channel, and not the process.
        """
        try:
            self.on_messages(self, messages)
        except Exception as error:
            kinds = ", ".join(sorted({type(message).__name__ for message in messages})[:5])
            print(f"afield: what a peer sent ({kinds}) could not be handled:", file=sys.stderr)
            traceback.print_exc()
            self._violated(f"what it sent ({kinds}) could not be handled: {type(error).__name__}: {error}"[:MOST_FAULT])
            return False
        return self.ready

    def _parse(self, data: memoryview) -> None:
        position, end, link = 0, len(data), self.link
        self._needed = _HEADER_BYTES
        while end - position >= _HEADER_BYTES:
            size, acknowledged = _read_header(data, position)
            if acknowledged != link.acknowledged & COUNT_MASK:
                try:
                    link.on_acknowledged(acknowledged)
                except LinkError as error:
                    self._violated(f"it {error}")
                    return
            start = position + _HEADER_BYTES
            if size > MAX_FRAME_BYTES:
                if size == GOODBYE:
                    self._over("peer closed")
                else:
                    self._violated(f"it announced a frame of {size} bytes")
                return
            if end - start < size:
                self._needed = _HEADER_BYTES + size
                break
            position = start + size
            if size:
                link.arrived(size)
                if not self._deliver(data[start:position]):
                    return
        if position < end:
            self._partial = bytearray(data[position:])
        if link.owed_bytes >= OWED_BYTES:
            self._settle_debt()


def _lost(channel: Channel, message: Any, why: str) -> None:
    """Nobody has said what is to follow from a message that cannot be sent: its loss must not go unseen."""
    print(f"afield: a {type(message).__name__} was not sent: {why}", file=sys.stderr)
