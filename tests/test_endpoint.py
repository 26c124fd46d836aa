"""Channels that lose their sockets, over real ones in one process: cuts at every moment, of a handshake as well."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from afield.transport import endpoint as module
from afield.transport import link
from afield.transport.channel import Channel
from afield.transport.endpoint import Endpoint
from afield.transport.loop import Loop
from tests.helpers import open_files

TOKEN = b"t" * 32
SERVER, CLIENT = b"server!!", b"client!!"
_names = itertools.count()
PATIENCE_S = 20.0
#: Small frames, while nothing moves.
MOST_KEPT = link.OWED_BYTES // link.FRAME_COST_BYTES


class Peer:
    """A process: its endpoint, and what happened to its channels."""

    def __init__(self, loop: Loop, process_id: bytes, token: bytes = TOKEN) -> None:
        self.loop = loop
        self.received: list[Any] = []
        self.ready: list[Channel] = []
        self.closed: list[Channel] = []
        self.absent: list[bool] = []
        self.endpoint = Endpoint(
            loop,
            token,
            process_id,
            msgspec.msgpack.decode,
            self._on_messages,
            self.closed.append,
            on_ready=self.ready.append,
            on_absent=lambda channel, name_is_gone: self.absent.append(name_is_gone),
        )

    def _on_messages(self, channel: Channel, messages: list[Any]) -> None:
        self.received += messages

    @property
    def channel(self) -> Channel:
        """The channel that became ready first."""
        return self.ready[0]

    def cut(self, how: int = socket.SHUT_RDWR) -> None:
        """Cut the channel's socket, and whatever is being introduced."""
        for sock in [each.sock for each in self.endpoint.channels()] + [
            each.sock for each in self.endpoint._introductions
        ]:
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(how)


class Pair:
    """Two processes with a channel between them."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.name = f"afield-test-endpoint-{os.getpid()}-{next(_names)}"
        self.server, self.client = Peer(loop, SERVER), Peer(loop, CLIENT)
        self.server.endpoint.listen(self.name)

    def open(self, **options: Any) -> None:
        """Join them."""
        self.client.endpoint.open(self.name, **options)
        self.until(lambda: self.server.ready and self.client.ready)

    def until(self, condition: Callable[[], Any]) -> None:
        """Drive the loop until something is true."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, "it never came true"
            self.loop.flush()
            self.loop.step(0.05)

    def kept(self) -> int:
        """Return how many frames are kept on both sides."""
        return sum(link.kept for peer in (self.server, self.client) for link in peer.endpoint.links.all())


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two processes in one loop; no descriptor is left afterwards."""
    files = open_files().keys()
    loop = Loop()
    both = Pair(loop)
    yield both
    both.client.endpoint.close()
    both.server.endpoint.close()
    loop.close()
    assert open_files().keys() == files


@pytest.mark.parametrize("how", [socket.SHUT_RDWR, socket.SHUT_RD, socket.SHUT_WR])
@pytest.mark.parametrize("who", ["server", "client"])
def test_a_cut_is_nobody_s_business(pair: Pair, who: str, how: int) -> None:
    pair.open()
    server, client = pair.server, pair.client
    for index in range(50):
        client.channel.send(["up", index])
        client.channel.flush()
        server.channel.send(["down", index])
        getattr(pair, who).cut(how)
        pair.until(lambda: len(server.received) == len(client.received) == index + 1)  # noqa: B023 - called at once
    assert server.received == [["up", index] for index in range(50)]
    assert client.received == [["down", index] for index in range(50)]
    assert not (server.closed or client.closed or server.absent or client.absent)
    assert len(server.ready) == len(client.ready) == 1
    assert not server.endpoint.links.validate() and not client.endpoint.links.validate()


def test_a_socket_that_is_closed_behind_our_back(pair: Pair) -> None:
    """The kernel forgets that we watch it: only the next write tells."""
    pair.open()
    for index, peer in enumerate([pair.client, pair.server] * 3):
        assert peer.channel.sock is not None
        peer.channel.sock.close()
        peer.channel.send(index)
        pair.until(lambda: len(pair.client.received + pair.server.received) == index + 1)  # noqa: B023 - called at once
    assert pair.server.received == [0, 2, 4] and pair.client.received == [1, 3, 5]


def test_a_half_that_takes_nothing_more_is_as_good_as_broken(pair: Pair) -> None:
    """The other half is silent and whole, as far as its reader can tell."""
    pair.open()
    sock = pair.client.channel.sock
    assert sock is not None
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        ours.setblocking(False)
        ours.shutdown(socket.SHUT_WR)
        pair.client.channel.attach(ours, [])
        pair.client.channel.send("hello")
        pair.until(lambda: pair.server.received == ["hello"])


def test_a_cut_in_the_middle_of_a_frame(pair: Pair) -> None:
    pair.open()
    big = os.urandom(5 << 20)
    pair.client.channel.send(big)
    pair.client.channel.send("after")
    pair.client.channel.flush()
    assert pair.client.channel.unsent
    pair.loop.step(0.05)
    assert pair.server.channel._partial and not pair.server.received
    pair.client.channel.send("behind what is unsent")
    pair.server.cut()
    pair.until(lambda: len(pair.server.received) == 3)
    assert pair.server.received == [big, "after", "behind what is unsent"]
    pair.until(lambda: not pair.kept())


@pytest.mark.parametrize("seed", range(12))
def test_cuts_at_random(pair: Pair, seed: int) -> None:
    """Also during the handshake of the next socket, of one direction alone, and with frames that no socket takes at once."""
    rng = random.Random(seed)
    channel = pair.client.endpoint.open(pair.name)
    up, down = 0, 0
    for _ in range(300):
        what = rng.random()
        if what < 0.4:
            channel.send([up, b"x" * rng.choice([0, 10, 1000, 1 << 20] if rng.random() < 0.1 else [0, 10])])
            up += 1
        elif what < 0.7 and pair.server.ready:
            pair.server.channel.send([down, b""])
            down += 1
        elif what < 0.8:
            rng.choice([pair.server, pair.client]).cut(rng.choice([socket.SHUT_RDWR, socket.SHUT_RD, socket.SHUT_WR]))
        pair.loop.flush()
        if rng.random() < 0.5:
            pair.loop.step(0)
    pair.until(lambda: len(pair.server.received) == up and len(pair.client.received) == down)
    assert [number for number, _ in pair.server.received] == list(range(up))
    assert [number for number, _ in pair.client.received] == list(range(down))
    assert len(pair.server.ready) == 1 and not pair.server.closed and not pair.client.closed
    assert all(one.kept < MOST_KEPT for peer in (pair.server, pair.client) for one in peer.endpoint.links.all())


def test_one_way_traffic_is_acknowledged(pair: Pair) -> None:
    pair.open()
    for index in range(1000):
        pair.client.channel.send(index)
        pair.client.channel.flush()
        pair.loop.step(0)
        assert pair.client.channel.link.kept <= 2 * MOST_KEPT
    pair.until(lambda: len(pair.server.received) == 1000)


# -- who ends a channel ----------------------------------------------------------------------------------------------


def test_a_goodbye_ends_it_and_a_break_does_not(pair: Pair) -> None:
    pair.open()
    pair.client.channel.send("last words")
    pair.client.channel.flush()
    pair.client.endpoint.close()
    pair.until(lambda: pair.server.closed)
    assert pair.server.received == ["last words"]
    assert not pair.server.endpoint.links.all()


def test_a_goodbye_that_could_not_be_said_is_asked_for(pair: Pair) -> None:
    """The socket broke, then the acceptor closed: the opener comes back and hears that nobody knows the link."""
    pair.open()
    pair.server.cut()
    pair.server.channel.close()
    pair.until(lambda: pair.client.closed)
    assert not pair.client.endpoint.links.all() and not pair.client.channel.fault


def test_what_the_dead_had_sent_is_read(pair: Pair) -> None:
    pair.open()
    pair.client.channel.send("last words")
    pair.client.channel.flush()
    pair.server.channel.send("never to be acknowledged")
    pair.server.channel.flush()
    pair.server.endpoint.died(CLIENT)
    assert pair.server.received == ["last words"] and pair.server.channel.closed
    assert not pair.server.closed and not pair.server.endpoint.links.all()


def test_a_name_that_is_gone_is_told_once_for_each_break(pair: Pair) -> None:
    pair.open()
    pair.server.endpoint.abandon()  # as the kernel does when a process dies: not a word
    pair.until(lambda: pair.client.absent)
    deadline = time.monotonic() + 0.05
    pair.until(lambda: time.monotonic() > deadline)
    assert pair.client.absent == [True] and not pair.client.closed
    pair.client.endpoint.died(SERVER)
    assert pair.client.channel.closed


def test_a_peer_that_does_not_come_back_is_told(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ABSENT_S", 0.02)
    pair.open()
    pair.client.endpoint._channels.clear()  # it lives, and has forgotten
    pair.client.channel.died()
    pair.until(lambda: pair.server.absent)
    assert pair.server.absent == [False] and not pair.server.closed and not pair.server.channel.ready


def test_a_fleeting_channel_ends_with_its_socket(pair: Pair) -> None:
    pair.open(fleeting=True)
    pair.server.cut()
    pair.until(lambda: pair.server.closed and pair.client.closed)
    assert not pair.server.endpoint.links.all() and not pair.client.endpoint.links.all()


def test_another_process_cannot_resume_a_link(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says the right hello, under its own proof."""
    pair.open()
    pair.server.cut()
    pair.server.channel.send("not for others")
    other = Peer(pair.loop, b"another!")
    make = other.endpoint.links.open

    def forged(**options: Any) -> link.Link:
        same = make(**options)
        assert same.number == pair.client.channel.link.number
        same._answered, same.attempt = True, 7
        return same

    monkeypatch.setattr(other.endpoint.links, "open", forged)
    channel = other.endpoint.open(pair.name)
    pair.until(lambda: other.closed and pair.client.received)
    assert channel.closed and not other.received and pair.client.received == ["not for others"]


def test_a_peer_in_the_place_of_another_is_refused(pair: Pair) -> None:
    channel = pair.client.endpoint.open(pair.name, b"somebody")
    pair.until(lambda: pair.client.closed)
    assert "in the place of" in channel.fault and not pair.client.ready


def test_a_peer_that_breaks_every_socket_is_dialled_less_and_less_often(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.open()
    after, pauses = pair.loop.after, list[float]()

    def note(delay_s: float, callback: Callable[[], None]) -> None:
        dials = type(getattr(callback, "__self__", None)) is module._Dialer
        if dials:
            pauses.append(delay_s)
        after(0.0 if dials else delay_s, callback)

    monkeypatch.setattr(pair.loop, "after", note)
    while len(pauses) < 12:
        pair.server.cut()
        pair.until(lambda: not pair.client.channel.ready)
        pair.until(lambda: pair.client.channel.ready)
    assert pauses == [min(module.BROKEN_PAUSE_S, module.FIRST_PAUSE_S * 2**count) for count in range(12)]
    pair.server.channel.send("it is of use again")
    pair.until(lambda: pair.client.received)
    pauses.clear()
    pair.server.cut()
    pair.until(lambda: not pair.client.channel.ready)
    pair.until(lambda: pair.client.channel.ready)
    assert pauses == []


def test_a_listener_that_is_full_is_tried_again(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    full = [True] * 3
    connect = module.connect

    def refuse(name: str) -> socket.socket:
        if full:
            full.pop()
            raise BlockingIOError
        return connect(name)

    monkeypatch.setattr(module, "connect", refuse)
    pair.client.endpoint.open(pair.name).send("hello")
    pair.until(lambda: pair.server.received)
    assert not full


def test_a_name_that_somebody_has_inherited_and_nobody_serves_keeps_nothing(pair: Pair) -> None:
    """A worker is dead, and a process that its task had started still has its listener: it is connected to, in vain."""
    pair.open()
    listener = pair.server.endpoint._listener
    assert listener is not None
    pair.loop.unregister(listener.fileno())
    pair.server.cut()
    pair.until(lambda: pair.client.endpoint._introductions)
    pair.client.endpoint.died(SERVER)
    assert not pair.client.endpoint._introductions and not pair.client.endpoint.links.all()
    pair.loop.register(listener.fileno(), pair.server.endpoint._accept)


def test_nobody_listens(pair: Pair) -> None:
    with pytest.raises(ConnectionRefusedError):
        pair.client.endpoint.open("afield-test-nobody")
    assert not pair.client.endpoint.channels() and not pair.client.endpoint.links.all()


# -- the loop --------------------------------------------------------------------------------------------------------


def test_what_is_flushed_first_stays_ahead_while_it_has_no_socket(pair: Pair) -> None:
    """Nobody can refer to what the daemon has not been told yet."""
    pair.open()
    second = Pair(pair.loop)
    second.open()
    first = pair.loop.first = pair.client.channel
    pair.server.cut()
    pair.until(lambda: not first.ready)
    first.send("known")
    second.client.channel.send("refers to it")
    order: list[str] = []
    for peer in (pair.server, second.server):
        peer.channel.on_messages = lambda channel, messages: order.extend(messages)
    pair.loop.flush()
    assert second.client.channel.outbox
    pair.until(lambda: len(order) == 2)
    assert order == ["known", "refers to it"]
    pair.server.endpoint.abandon()
    pair.until(lambda: not first.ready)
    second.client.channel.send("later")
    pair.loop.flush()
    assert second.client.channel.outbox
    first.died()  # it will never have one: nobody waits for it
    pair.until(lambda: len(order) == 3)
    pair.loop.first = None
    second.client.endpoint.close()
    second.server.endpoint.close()


def until_order_is_safe(pair: Pair, second: Pair, order: list[str]) -> None:
    """While the first channel cannot say what it has to, the second says nothing, whatever happens to its own socket."""
    other = second.client.channel
    other.send("refers to it")
    pair.loop.flush()
    second.server.cut()
    pair.until(lambda: not other.ready)
    pair.until(lambda: other.ready)
    for _ in range(3):
        pair.loop.flush()
        pair.loop.step(0)
    assert order == [] and other.outbox


@pytest.mark.parametrize("why", ["it has no socket", "its socket is full", "its socket is broken"])
def test_what_is_flushed_first_stays_ahead_of_channels_that_get_new_sockets(pair: Pair, why: str) -> None:
    pair.open()
    second = Pair(pair.loop)
    second.open()
    first = pair.loop.first = pair.client.channel
    server = pair.server.channel
    order: list[str] = []
    server.on_messages = second.server.channel.on_messages = lambda channel, messages: order.extend(
        message for message in messages if type(message) is str
    )
    assert server.sock is not None and first.sock is not None
    if why == "it has no socket":
        assert pair.server.endpoint._listener is not None
        pair.loop.unregister(pair.server.endpoint._listener.fileno())
        pair.server.cut()
        pair.until(lambda: not first.ready)
        first.send("known")
        until_order_is_safe(pair, second, order)
        pair.loop.register(pair.server.endpoint._listener.fileno(), pair.server.endpoint._accept)
    elif why == "its socket is full":
        pair.loop.modify(server.sock.fileno(), 0)
        first.send(bytes(4 << 20))
        first.send("known")
        until_order_is_safe(pair, second, order)
        pair.loop.modify(server.sock.fileno(), select.EPOLLIN)
    else:
        first.sock.shutdown(socket.SHUT_WR)
        pair.loop.modify(server.sock.fileno(), 0)  # nobody has noticed yet
        first.send("known")
        second.client.channel.send("refers to it")
        pair.loop.flush()
        assert second.client.channel.outbox
    pair.until(lambda: len(order) == 2)
    assert order == ["known", "refers to it"]
    pair.loop.first = None
    second.client.endpoint.close()
    second.server.endpoint.close()


def test_later_comes_in_order_and_wakes_who_watches_the_descriptor() -> None:
    loop = Loop()
    came: list[int] = []
    poller = select.poll()
    poller.register(loop.fileno(), select.POLLIN)
    loop.after(0.02, lambda: came.append(2))
    loop.after(0.001, lambda: came.append(1))
    deadline = time.monotonic() + PATIENCE_S
    while len(came) < 2 and time.monotonic() < deadline:
        poller.poll(1000)
        loop.step(0)
    assert came == [1, 2] and poller.poll(0) == []
    loop.after(60, lambda: came.append(3))
    loop.close()
