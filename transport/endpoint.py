"""This process among the others: its listener, its channels, and what is done when a socket of theirs breaks.

Theory of operation. The side that opened a channel makes its next socket: at once, then with a pause that doubles from
`FIRST_PAUSE_S` to `LAST_PAUSE_S`; the side that accepted it waits. A new socket is for an `Introduction` first, which carries
the hello of the link under the proofs of both sides, so a channel is resumed only by the process that it belongs to.

A break says nothing of the process behind it. What ends a channel is a word: the peer's goodbye, or its answer that it does not
know the link any more (`on_closed`), or the owner's `died`, once whoever knows has told it so. So that nobody waits for a word
that has been said before, the owner is asked to find out (`on_absent`), once for each break: when the peer's name is gone, or
after `ABSENT_S` without it. A peer that lives and with whom no introduction succeeds in `MAX_FAILURES` attempts has broken the
protocol: the channel is closed with its `fault`.

Where this process has no descriptors left (`on_error`) it is nobody's end either: the listener is left alone for
`ACCEPT_PAUSE_S`, and those who connect wait in the kernel's queue; a socket of ours is tried again like one that broke.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

from afield.transport.auth import AuthenticationError, Handshake
from afield.transport.channel import Channel, Messages
from afield.transport.introduction import Introduction
from afield.transport.link import Answer, Link, LinkError, Links
from afield.transport.loop import Loop
from afield.transport.shortage import OUT_OF_FILES
from afield.transport.sockets import connect, listen, same_user

FIRST_PAUSE_S = 0.001
LAST_PAUSE_S = 1.0
#: The longest pause where the peer proves itself each time, and the socket breaks before a frame has passed: large frames over
#: sockets that break all the time need many.
BROKEN_PAUSE_S = 0.008
#: A peer that opened a channel and has not come back for so long may be dead without our having heard of it.
ABSENT_S = 1.0
#: A process without descriptors looks so often whether it has some again, for those who want to connect.
ACCEPT_PAUSE_S = 0.1
#: So many are accepted before others get their turn: another user's, who are turned away only after it, take a turn too.
MAX_ACCEPTS = 16
#: Connections whose peers have not proven themselves yet, and how long they have for it.
MAX_UNPROVEN, PROVE_S = 1024, 5.0
#: Introductions that fail in a row, with pauses between them: about a second. Each alone may be bad luck.
MAX_FAILURES = 10


class Endpoint:
    """The channels of one process.

    Args:
        loop: drives them.
        token: the cluster's secret.
        process_id: who we are.
        decoder: decodes one frame into a list of messages.
        on_messages: called with (channel, messages) for each received frame.
        on_closed: called once with a channel that its peer has closed, or that cannot go on.
        on_ready: called once with each channel when its peer is proven.
        on_absent: called with a channel and whether the peer's name is gone, for the owner to find out whether it is dead.
        on_error: called, each time, when this process cannot have another socket for want of descriptors.
        on_refused: see `Channel.on_refused`.
    """

    def __init__(
        self,
        loop: Loop,
        token: bytes,
        process_id: bytes,
        decoder: Callable[[Any], Messages],
        on_messages: Callable[[Channel, Messages], None],
        on_closed: Callable[[Channel], None],
        on_ready: Callable[[Channel], None] = lambda channel: None,
        on_absent: Callable[[Channel, bool], None] = lambda channel, name_is_gone: None,
        on_error: Callable[[OSError], None] = lambda error: None,
        on_refused: Callable[[Channel, Any, str], Any] | None = None,
    ) -> None:
        self.loop = loop
        self.links = Links()
        self.on_absent = on_absent
        self.on_error = on_error
        self._on_refused = on_refused
        self._token = token
        self._process_id = process_id
        self._decode = decoder
        self._on_messages = on_messages
        self._on_closed = on_closed
        self._on_ready = on_ready
        self._channels: dict[int, Channel] = {}  # by the identity of their links
        self._introductions: set[Introduction] = set()
        self._unproven: dict[Introduction, None] = {}  # those on sockets that we accepted, the oldest first
        self._listener: socket.socket | None = None

    # -- channels that we open -------------------------------------------------------------------------------------

    def open(self, name: str, peer_id: bytes = b"", *, fleeting: bool = False, patient: bool = False) -> Channel:
        """Return a new channel to whoever listens on `name`, who must be `peer_id` if that is given.

        Raises:
            ConnectionRefusedError: nobody listens there.
            OSError: this process has no descriptors left; a `patient` one is told so, and the socket is made later.
        """
        try:
            sock = connect(name)
        except BlockingIOError:
            sock = None
        except OSError as error:
            if error.errno not in OUT_OF_FILES:
                raise
            self.on_error(error)
            if not patient:
                raise
            sock = None
        dialer = _Dialer(self, name)
        link = self.links.open(fleeting=fleeting)
        dialer.channel = channel = self._channel(link, peer_id, dialer.on_broken, dialer.on_over)
        if sock is None:
            dialer.retry()
        else:
            dialer.introduce(sock)
        return channel

    def opened(self, channel: Channel) -> None:
        """The peer of a channel of ours is proven for the first time."""
        self._on_ready(channel)

    def introduce(self, sock: socket.socket, on_proven: Any, on_failed: Any, **sides: Any) -> Introduction:
        """Begin the exchange on a new socket."""

        def proven(sock: socket.socket, handshake: Handshake) -> None:
            self._forget(introduction)
            on_proven(sock, handshake)

        def failed(error: Exception) -> None:
            self._forget(introduction)
            on_failed(error)

        handshake = Handshake(self._token, self._process_id, os.urandom(32), **sides)
        introduction = Introduction(self.loop, sock, handshake, proven, failed)
        self._introductions.add(introduction)
        return introduction

    # -- channels that others open ---------------------------------------------------------------------------------

    def listen(self, name: str) -> None:
        """Accept channels on an abstract name.

        Raises:
            OSError: the name is taken, or this process has no descriptors left.
        """
        self._listener = listen(name)
        self.loop.register(self._listener.fileno(), self._accept)

    def _accept(self, events: int) -> None:
        assert self._listener is not None
        for _ in range(MAX_ACCEPTS):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in OUT_OF_FILES:
                    self._pause(error)
                    return
                continue  # who connected is gone already
            sock.setblocking(False)
            if same_user(sock):
                self.accepted(sock)
            else:
                sock.close()

    def _pause(self, error: OSError) -> None:
        """Nobody can be accepted for a while; whoever listens all the same would find the same over and over."""
        assert self._listener is not None
        self.loop.unregister(self._listener.fileno())
        self.loop.after(ACCEPT_PAUSE_S, self._accept_again)
        self.on_error(error)

    def _accept_again(self) -> None:
        if self._listener is not None:
            self.loop.register(self._listener.fileno(), self._accept)

    def accepted(self, sock: socket.socket) -> None:
        """Somebody has connected, who is to prove soon what it is."""
        if len(self._unproven) >= MAX_UNPROVEN:
            self.give_up(next(iter(self._unproven)))  # the oldest: it has had the most time
        answers: list[Answer] = []

        def answer(peer_id: bytes, hello: bytes) -> bytes:
            answers.append(self.links.answer(peer_id, hello))
            return answers[0].reply

        def proven(sock: socket.socket, handshake: Handshake) -> None:
            self._resume(sock, handshake.peer_id, answers[0])

        def late() -> None:
            if introduction in self._unproven:
                introduction.handle(0)  # it may have come while this process was stopped
            if introduction in self._unproven:
                self.give_up(introduction)

        introduction = self.introduce(sock, proven, lambda error: None, server=True, answer=answer)
        self._unproven[introduction] = None
        self.loop.after(PROVE_S, late)

    def _resume(self, sock: socket.socket, peer_id: bytes, answer: Answer) -> None:
        link = answer.link
        if link is None:
            sock.close()
        elif answer.begins:
            channel = self._channel(link, peer_id, self._await, self.over)
            channel.attach(sock, answer.again)
            self._on_ready(channel)
        else:
            self._channels[id(link)].attach(sock, answer.again)

    def _await(self, channel: Channel) -> None:
        """Its peer will make the next socket; if it does not, it may be dead."""
        link = channel.link
        attempt = link.attempt

        def look() -> None:
            if not (channel.closed or channel.ready) and link.attempt == attempt:
                self.on_absent(channel, False)

        self.loop.after(ABSENT_S, look)

    # -- all -------------------------------------------------------------------------------------------------------

    def _channel(
        self,
        link: Link,
        peer_id: bytes,
        on_broken: Callable[[Channel], None],
        on_over: Callable[[Channel], None],
    ) -> Channel:
        channel = Channel(
            self.loop, link, peer_id, self._decode, self._on_messages, self._on_closed, on_broken, on_over
        )
        if self._on_refused is not None:
            channel.on_refused = self._on_refused
        self._channels[id(link)] = channel
        return channel

    def over(self, channel: Channel) -> None:
        """A channel has come to its end."""
        self._channels.pop(id(channel.link), None)
        self.links.forget(channel.link, channel.peer_id)

    def give_up(self, introduction: Introduction) -> None:
        """Nobody needs this socket any more."""
        introduction.close()
        self._forget(introduction)

    def _forget(self, introduction: Introduction) -> None:
        self._introductions.discard(introduction)
        self._unproven.pop(introduction, None)

    def channels(self) -> list[Channel]:
        """Return all channels that are not over."""
        return list(self._channels.values())

    def died(self, peer_id: bytes) -> None:
        """A process is dead, says who knows: handle what it had sent; its channels are over, and nobody is told."""
        channels = [channel for channel in self._channels.values() if channel.peer_id == peer_id]
        for channel in channels:
            channel.drain()
        for channel in channels:
            channel.died()

    def close(self) -> None:
        """Close everything on purpose."""
        for channel in self.channels():
            channel.close()
        for introduction in list(self._introductions):
            self.give_up(introduction)
        if self._listener is not None:
            self.loop.unregister(self._listener.fileno())
            self._listener.close()
            self._listener = None

    def abandon(self) -> None:
        """Close this process's copies of the sockets of the one that it was forked from; not a word is said."""
        for sock in [each.sock for each in self.channels()] + [each.sock for each in self._introductions]:
            if sock is not None:
                sock.close()
        if self._listener is not None:
            self._listener.close()


class _Dialer:
    """Makes the sockets of one channel that this side opened."""

    __slots__ = ("_endpoint", "_failures", "_introduction", "_moved", "_name", "_pauses", "_told", "channel")

    channel: Channel

    def __init__(self, endpoint: Endpoint, name: str) -> None:
        self._endpoint = endpoint
        self._name = name
        self._introduction: Introduction | None = None
        self._failures = 0  # introductions that failed since the last socket that carried the channel
        self._pauses = 0  # since the last socket that was of use
        self._moved = -1  # frames that had moved when the last socket began
        self._told = False  # the owner knows of this break

    def on_broken(self, channel: Channel) -> None:
        """The channel's socket is gone."""
        self._told = False
        if channel.link.moved == self._moved:  # of no use; and a peer may accept and break for ever
            self.retry(BROKEN_PAUSE_S)
        else:
            self._pauses = 0
            self.dial()

    def on_over(self, channel: Channel) -> None:
        """The channel has come to its end, perhaps while a socket was offered that nobody will ever answer on."""
        if self._introduction is not None:
            self._endpoint.give_up(self._introduction)
        self._endpoint.over(channel)

    def dial(self) -> None:
        """Make the next socket, if the channel still needs one."""
        if self.channel.closed:
            return
        try:
            sock = connect(self._name)
        except ConnectionRefusedError:
            if not self._told:
                self._told = True
                self._endpoint.on_absent(self.channel, True)
            self.retry()
        except OSError as error:
            if error.errno in OUT_OF_FILES:
                self._endpoint.on_error(error)
            self.retry()
        else:
            self.introduce(sock)

    def retry(self, longest_s: float = LAST_PAUSE_S) -> None:
        """Dial again after a pause."""
        if not self.channel.closed:
            pause_s = min(longest_s, FIRST_PAUSE_S * 2 ** min(self._pauses, 20))
            self._pauses += 1
            self._endpoint.loop.after(pause_s, self.dial)

    def introduce(self, sock: socket.socket) -> None:
        """Offer a new socket to the peer."""
        hello = self.channel.link.hello()
        self._introduction = self._endpoint.introduce(sock, self._proven, self._failed, server=False, hello=hello)

    def _proven(self, sock: socket.socket, handshake: Handshake) -> None:
        channel = self.channel
        if channel.peer_id and channel.peer_id != handshake.peer_id:
            raise LinkError(f"{handshake.peer_id.hex()} answers in the place of {channel.peer_id.hex()}")
        first = channel.link.state == "opening"
        again = channel.link.on_answer(handshake.peer_words)
        if again is None:
            self._introduction = None
            sock.close()
            channel.unknown()
            return
        self._introduction = None
        channel.peer_id = handshake.peer_id
        self._failures = 0
        self._moved = channel.link.moved
        channel.attach(sock, again)
        if first:
            self._endpoint.opened(channel)

    def _failed(self, error: Exception) -> None:
        self._introduction = None
        if self.channel.link.fleeting or isinstance(error, (AuthenticationError, LinkError)):
            self.channel.refused(str(error))
            return
        self._failures += 1
        if self._failures >= MAX_FAILURES:
            self.channel.refused(f"no introduction succeeded in {self._failures} attempts: {error}")
        else:
            self.retry()
