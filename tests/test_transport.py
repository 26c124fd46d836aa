"""Channels between two loops in one process: framing, authentication, loss."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afield.transport.auth import AuthenticationError, Handshake
from afield.transport.channel import MAX_FRAME_BYTES, Channel
from afield.transport.endpoint import Endpoint
from afield.transport.introduction import MAX_HANDSHAKE_BYTES
from afield.transport.link import HEADER, Links
from afield.transport.loop import RECEIVE_BUFFER_BYTES, Loop
from afield.transport.sockets import connect, listen, same_user
from tests.helpers import open_files

TOKEN = b"t" * 32
SERVER, CLIENT = b"server!!", b"client!!"


class End:
    """One end of a connection, and what happened to it."""

    channel: Channel

    def __init__(self, loop: Loop, *, server: bool, token: bytes = TOKEN) -> None:
        self.received: list[Any] = []
        self.batches: list[int] = []
        self.decoded = 0
        self.closed = 0
        self.ready = 0
        self.endpoint = Endpoint(
            loop,
            token,
            SERVER if server else CLIENT,
            self._decode,
            self._on_messages,
            self._on_closed,
            on_ready=self._on_ready,
        )

    def carry(self, sock: socket.socket) -> None:
        """Have a channel on a socket as after the handshake; its peer is the test."""
        sock.setblocking(False)
        link = Links().open()
        link.attached(0)
        self.channel = self.endpoint._channel(link, CLIENT, lambda channel: channel.refused(), self.endpoint.over)
        self.channel.attach(sock, [])

    def _decode(self, data: Any) -> list[Any]:
        self.decoded += 1
        messages: list[Any] = msgspec.msgpack.decode(data)
        return messages

    def _on_messages(self, channel: Channel, messages: list[Any]) -> None:
        self.received += messages
        self.batches.append(len(messages))

    def _on_closed(self, channel: Channel) -> None:
        self.closed += 1

    def _on_ready(self, channel: Channel) -> None:
        self.channel = channel
        self.ready += 1


def framed(body: bytes, arrived: int = 0) -> bytes:
    """Return a frame as a channel sends it."""
    return HEADER.pack(len(body), arrived) + body


@contextlib.contextmanager
def a_loop() -> Iterator[Loop]:
    """A loop that is closed afterwards."""
    loop = Loop()
    try:
        yield loop
    finally:
        loop.close()


_names = itertools.count()


def a_name() -> str:
    """Return a name to listen on."""
    return f"afield-test-{os.getpid()}-{next(_names)}"


@contextlib.contextmanager
def connected(*, client_token: bytes = TOKEN) -> Iterator[tuple[Loop, End, End]]:
    """A loop with both ends of a connection; the server has its channel once the client is proven."""
    name = a_name()
    with a_loop() as loop:
        server, client = End(loop, server=True), End(loop, server=False, token=client_token)
        server.endpoint.listen(name)
        client.channel = client.endpoint.open(name)
        try:
            yield loop, server, client
        finally:
            server.endpoint.close()
            client.endpoint.close()


def run_until(loop: Loop, condition: Any) -> None:
    """Drive a loop until something is true."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        loop.flush()
        loop.step(0.05)


# -- framing ------------------------------------------------------------------------------------------------------


def test_messages_sent_before_the_handshake_wait_for_it() -> None:
    with connected() as (loop, server, client):
        client.channel.send(["early", 2])
        run_until(loop, lambda: server.ready)
        server.channel.send(["early", 1])
        run_until(loop, lambda: server.received and client.received)
        assert client.received == [["early", 1]] and server.received == [["early", 2]]
        assert (server.ready, client.ready) == (1, 1)
        assert server.channel.peer_id == CLIENT and client.channel.peer_id == SERVER


def test_a_burst_travels_in_few_frames_and_in_order() -> None:
    with connected() as (loop, server, client):
        for i in range(5000):
            client.channel.send(i)
        run_until(loop, lambda: len(server.received) == 5000)
        assert server.received == list(range(5000))
        assert len(server.batches) < 20


def test_what_is_too_large_or_no_message_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afield.transport.channel.MAX_FRAME_BYTES", 100_000)
    with connected() as (loop, server, client):
        refused: list[tuple[Any, str]] = []
        client.channel.on_refused = lambda channel, message, why: refused.append((message, why))
        sent = [bytes(90_000), bytes(100_000), 1 << 70, "\ud800", object(), 5]
        for i in range(300):
            client.channel.send(i)
            client.channel.send(sent[i % 6])
        run_until(loop, lambda: server.received[-1:] == [5])
        assert server.received == [x for i in range(300) for x in (i, *[sent[i % 6]] * (i % 6 in (0, 5)))]
        assert [message for message, _ in refused] == [sent[i % 6] for i in range(300) if i % 6 in (1, 2, 3, 4)]
        assert "100000" in refused[0][1] and "100006" in refused[0][1]
        assert "OverflowError" in refused[1][1] and server.closed == client.closed == 0


def test_a_batch_over_the_limit_leaves_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afield.transport.channel.MAX_FRAME_BYTES", 100_000)
    with connected() as (loop, server, client):
        sent = [bytes([i]) * 30_000 for i in range(200)]
        for message in sent:
            client.channel.send(message)
        run_until(loop, lambda: len(server.received) == 200)
        assert server.received == sent
        assert max(server.batches) == 3 or max(server.batches) == 2


def test_what_takes_the_place_of_a_refused_message_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afield.transport.channel.MAX_FRAME_BYTES", 1000)
    with connected() as (loop, server, client):
        client.channel.on_refused = lambda channel, message, why: ["too large", len(message)]
        for message in ("before", bytes(2000), "after"):
            client.channel.send(message)
        run_until(loop, lambda: len(server.received) == 3)
        assert server.received == ["before", ["too large", 2000], "after"]


def test_a_refusal_that_nobody_handles_is_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("afield.transport.channel.MAX_FRAME_BYTES", 1000)
    with connected() as (loop, server, client):
        client.channel.send(bytes(2000))
        client.channel.send("next")
        run_until(loop, lambda: server.received)
        assert server.received == ["next"]
        assert "a bytes was not sent: it has 2004 bytes" in capsys.readouterr().err


@pytest.mark.parametrize("size", [RECEIVE_BUFFER_BYTES - 20, RECEIVE_BUFFER_BYTES, 3 * RECEIVE_BUFFER_BYTES + 7])
def test_frames_larger_than_the_buffers(size: int) -> None:
    with connected() as (loop, server, client):
        big = os.urandom(size)
        client.channel.send("before")
        client.channel.send(big)
        client.channel.flush()
        client.channel.send("after")
        run_until(loop, lambda: server.ready)
        server.channel.send(big)
        run_until(loop, lambda: len(server.received) == 3 and len(client.received) == 1)
        assert server.received == ["before", big, "after"] and client.received == [big]


@given(
    messages=st.lists(
        st.one_of(st.integers(0, 2**40), st.binary(max_size=300), st.lists(st.integers(0, 9))), max_size=8
    ),
    cuts=st.lists(st.integers(1, 400), max_size=12),
)
@settings(max_examples=80, deadline=None)
def test_any_cut_of_the_stream_gives_the_same_messages(messages: list[Any], cuts: list[int]) -> None:
    frames = [msgspec.msgpack.encode([message]) for message in messages]
    stream = b"".join(map(framed, frames))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with a_loop() as loop, theirs:
        end = End(loop, server=True)
        end.carry(ours)
        position = 0
        for cut in [*cuts, len(stream)]:
            theirs.sendall(stream[position : position + cut])
            position += cut
            end.channel.handle(select.EPOLLIN)
        assert end.received == messages
        end.channel.close()


def test_a_peer_that_does_not_read_does_not_block_the_sender() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with a_loop() as loop, theirs:
        end = End(loop, server=True)
        end.carry(ours)
        started = time.monotonic()
        for _ in range(20):
            end.channel.send(b"x" * (1 << 20))
            loop.flush()
        assert time.monotonic() - started < 5
        assert end.channel.outbox  # waits here, and not in a system call
        end.channel.close()
        assert not end.channel.outbox


def test_a_frame_that_cannot_be_is_the_end_of_the_connection() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with a_loop() as loop, theirs:
        end = End(loop, server=True)
        end.carry(ours)
        theirs.sendall(HEADER.pack(MAX_FRAME_BYTES + 1, 0) + b"x" * 100)
        run_until(loop, lambda: end.closed)
        assert not end.decoded and "a frame of" in end.channel.fault
        assert theirs.recv(100) == end.channel.link.goodbye()


def test_a_frame_that_is_no_message_is_the_end_of_the_connection() -> None:
    """It would be sent again over any other socket."""
    with connected() as (loop, server, client):
        client.channel._encode = lambda batch: b"\xc1"  # type: ignore[method-assign]
        client.channel.send("x")
        run_until(loop, lambda: server.closed and client.closed)
        assert "no message" in server.channel.fault and not client.channel.fault
        assert not server.received and not server.endpoint.links.all() and not client.endpoint.links.all()


# -- the handshake ------------------------------------------------------------------------------------------------


def test_a_wrong_token_is_refused_and_nothing_is_decoded() -> None:
    with connected(client_token=b"w" * 32) as (loop, server, client):
        client.channel.send("let me in")
        run_until(loop, lambda: client.closed)
        assert (client.closed, client.channel.closed, server.endpoint.channels()) == (1, True, [])
        assert (server.ready, client.ready, server.decoded, client.decoded) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    "stream",
    [
        b"\x05\x00\x00\x00hello",
        (MAX_HANDSHAKE_BYTES + 1).to_bytes(4, "little") + bytes(MAX_HANDSHAKE_BYTES + 1),
        b"\xff\xff\xff\xff",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00\x00\x00\x00",
        len(msgspec.msgpack.encode(["message"])).to_bytes(4, "little") + msgspec.msgpack.encode(["message"]),
        framed(msgspec.msgpack.encode(["message"])),
    ],
)
def test_an_intruder_is_refused_and_nothing_is_decoded(stream: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with a_loop() as loop, theirs:
        end = End(loop, server=True)
        ours.setblocking(False)
        end.endpoint.accepted(ours)
        theirs.sendall(stream)
        run_until(loop, lambda: ours.fileno() < 0)
        assert (end.ready, end.decoded, end.received) == (0, 0, [])
        theirs.settimeout(5)
        sent = b""
        with contextlib.suppress(ConnectionResetError):  # it did not even read all
            while part := theirs.recv(1000):
                sent += part
        assert len(sent) == 4 + 32  # the challenge and nothing else
        assert b"secret" not in sent


def exchange(server: Handshake, client: Handshake) -> None:
    """Run the exchange to its end."""
    answer = client.feed(server.greeting())
    client.feed(server.feed(answer))


def handshakes(client_token: bytes = TOKEN) -> tuple[Handshake, Handshake]:
    """Return both sides; the server answers with the hello backwards."""
    return (
        Handshake(TOKEN, SERVER, b"s" * 32, server=True, answer=lambda peer_id, hello: hello[::-1]),
        Handshake(client_token, CLIENT, b"c" * 32, server=False, hello=b"hello"),
    )


def test_both_sides_prove_themselves() -> None:
    server, client = handshakes()
    assert client.greeting() == b""
    exchange(server, client)
    assert server.done and client.done
    assert (server.peer_id, client.peer_id) == (CLIENT, SERVER)
    assert (server.peer_words, client.peer_words) == (b"hello", b"olleh")


@pytest.mark.parametrize("at", [0, 31, 32, 39, 40, 71, 72, 76])
def test_what_a_proven_peer_says_cannot_be_changed_on_the_way(at: int) -> None:
    server, client = handshakes()
    said = bytearray(client.feed(server.greeting()))
    said[at] ^= 1
    with pytest.raises(AuthenticationError):
        server.feed(bytes(said))
    server, client = handshakes()
    answered = bytearray(server.feed(client.feed(server.greeting())))
    if at < len(answered):
        answered[at] ^= 1
        with pytest.raises(AuthenticationError):
            client.feed(bytes(answered))
        assert not client.done


def test_a_server_that_does_not_know_the_token_is_refused_by_the_client() -> None:
    server, client = handshakes()
    answer = client.feed(server.greeting())
    server.feed(answer)
    impostor = Handshake(b"w" * 32, SERVER, b"s" * 32, server=True)
    with pytest.raises(AuthenticationError):
        impostor.feed(answer)
    with pytest.raises(AuthenticationError):
        client.feed(SERVER + bytes(32))
    assert not client.done


def test_proofs_cannot_be_replayed_or_reflected() -> None:
    server, client = handshakes()
    answer = client.feed(server.greeting())
    later = Handshake(TOKEN, SERVER, b"another nonce".ljust(32), server=True)
    with pytest.raises(AuthenticationError):
        later.feed(answer)
    with pytest.raises(AuthenticationError):  # the client's own proof, sent back to it
        client.feed(answer[32:])
    assert not later.done and not client.done


@given(st.binary(max_size=200))
def test_no_bytes_make_a_handshake_do_anything_but_refuse(data: bytes) -> None:
    for side in handshakes():
        with contextlib.suppress(AuthenticationError):
            side.feed(data)
        assert not side.done


# -- loss ---------------------------------------------------------------------------------------------------------


def test_a_peer_s_death_is_told_once_after_what_it_sent() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with a_loop() as loop:
        end = End(loop, server=True)
        end.carry(ours)
        frame = msgspec.msgpack.encode(["last words"])
        theirs.sendall(framed(frame) + b"\x10")  # and half a frame
        theirs.close()
        end.channel.send("to nobody")
        loop.flush()  # the write fails; what was received is still read first
        run_until(loop, lambda: end.closed)
        assert end.received == ["last words"] and end.closed == 1
        end.channel.send("later")
        loop.flush()
        assert end.closed == 1


def test_closing_says_nothing_to_the_closer_and_drops_what_is_queued() -> None:
    with connected() as (loop, server, client):
        run_until(loop, lambda: server.ready and client.ready)
        client.channel.send("unsent")
        client.channel.close()
        client.channel.close()
        run_until(loop, lambda: server.closed)
        assert client.closed == 0 and server.received == []
        assert not server.endpoint.links.all() and not client.endpoint.links.all()


def test_a_handler_may_close_its_channel_between_two_frames() -> None:
    with connected() as (loop, server, client):
        run_until(loop, lambda: server.ready and client.ready)

        def receive_and_close(channel: Channel, messages: list[Any]) -> None:
            server.received += messages
            channel.close()

        server.channel.on_messages = receive_and_close
        client.channel.send(1)
        client.channel.flush()
        client.channel.send(2)
        client.channel.flush()
        run_until(loop, lambda: client.closed)
        assert server.received == [1]


# -- names --------------------------------------------------------------------------------------------------------


def test_listening_and_connecting_by_name() -> None:
    name = a_name()
    files = open_files()
    with pytest.raises(ConnectionRefusedError):
        connect(name)
    listener = listen(name)
    client = connect(name)
    accepted, _ = listener.accept()
    assert same_user(accepted) and same_user(client)
    assert not client.getblocking() and not listener.getblocking()
    with pytest.raises(OSError, match="in use"):
        listen(name)
    for sock in (accepted, client, listener):
        sock.close()
    with pytest.raises(ConnectionRefusedError):
        connect(name)
    assert open_files().keys() == files.keys()
