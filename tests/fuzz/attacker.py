"""What somebody does to a listener of a session: before the proof as a stranger, after it as one of us with a fault.

Theory of operation. Each attack opens a socket, says what its random numbers tell it to, and closes it (or lets it hang until
the next few attacks are done). Nothing here uses the code that it attacks, but for the proof and the names of the messages.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import types
import typing
from collections.abc import Callable
from typing import Any

import msgspec

from afield.runtime.wire import messages
from afield.transport.auth import Handshake

_LENGTH = struct.Struct("<I")
_HEADER = struct.Struct("<II")
_HELLO = struct.Struct("<BQQQ")
_NUMBERS = (0, 1, -1, 2, 127, 128, 255, 256, 65535, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63))
#: A listener may take so long to answer, on a machine that others use as well.
PATIENCE_S = 20.0
#: Sockets that are left open, so that some attacks are unfinished while others go on.
MOST_OPEN = 64
#: What a session does because it is told to is no fault of it.
ORDERS = (messages.Shutdown,)


class Attacker:
    """Attacks one listener.

    Args:
        seed: of the random numbers.
        address: the abstract name that is listened on.
        token: the session's secret, for what comes after the proof.
    """

    def __init__(self, seed: str, address: str, token: bytes) -> None:
        self.rng = random.Random(seed)
        self._address = address
        self._token = token
        self._open: list[socket.socket] = []
        self._said: bytes = b""  # a proof that was accepted once
        self.attacks: list[Callable[[], None]] = [
            self.noise,
            self.truncated,
            self.huge_handshake,
            self.slow,
            self.many,
            self.replayed,
            self.garbage_frame,
            self.truncated_frame,
            self.huge_frame,
            self.nested,
            self.no_text,
            self.wrong_count,
            *[self.wrongly_typed] * 3,
            *[self.well_typed] * 6,
            self.odd_hello,
        ]

    def attack(self) -> str:
        """Do one thing; return its name."""
        kind = self.rng.choice(self.attacks)
        with contextlib.suppress(ConnectionError, BrokenPipeError, TimeoutError, EOFError):
            kind()
        while len(self._open) > MOST_OPEN:
            self._open.pop(self.rng.randrange(len(self._open))).close()
        return kind.__name__

    def close(self) -> None:
        """Close what hangs."""
        while self._open:
            self._open.pop().close()

    # -- before the proof ------------------------------------------------------------------------------------------

    def _connected(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(PATIENCE_S)
        self._open.append(sock)
        sock.connect("\0" + self._address)
        return sock

    def _done(self, sock: socket.socket) -> None:
        """Close a socket, or leave it hanging."""
        if self.rng.random() < 0.7:
            self._open.remove(sock)
            sock.close()

    def noise(self) -> None:
        sock = self._connected()
        sock.sendall(self.rng.randbytes(self.rng.randrange(1, 5000)))
        self._done(sock)

    def truncated(self) -> None:
        sock = self._connected()
        size = self.rng.randrange(1, 256)
        sock.sendall((_LENGTH.pack(size) + self.rng.randbytes(size))[: self.rng.randrange(4 + size)])
        self._done(sock)

    def huge_handshake(self) -> None:
        sock = self._connected()
        sock.sendall(_LENGTH.pack(self.rng.randrange(257, 1 << 32)) + bytes(self.rng.randrange(100_000)))
        self._done(sock)

    def slow(self) -> None:
        sock = self._connected()
        for byte in _LENGTH.pack(40) + self.rng.randbytes(self.rng.randrange(20)):
            sock.sendall(bytes([byte]))

    def many(self) -> None:
        socks = [self._connected() for _ in range(self.rng.randrange(2, 40))]
        for sock in socks:
            self._done(sock)

    def replayed(self) -> None:
        if not self._said:
            self._proven()
        sock = self._connected()
        sock.sendall(_LENGTH.pack(len(self._said)) + self._said)
        assert not _answers(sock), "a replayed proof was accepted"

    # -- the proof -------------------------------------------------------------------------------------------------

    def _proven(self, hello: bytes | None = None) -> socket.socket:
        """Return a socket whose other end takes us for a process of the session."""
        sock = self._connected()
        if hello is None:
            hello = _HELLO.pack(4, self.rng.getrandbits(60), 1, 0)
        ours = Handshake(self._token, self.rng.randbytes(8), self.rng.randbytes(32), server=False, hello=hello)
        said = ours.feed(_frame(sock))
        sock.sendall(_LENGTH.pack(len(said)) + said)
        ours.feed(_frame(sock))
        self._said = said
        return sock

    # -- after it --------------------------------------------------------------------------------------------------

    def _sent(self, body: bytes, *, received: int = 0) -> None:
        sock = self._proven()
        sock.sendall(_HEADER.pack(len(body), received) + body)
        self._done(sock)

    def garbage_frame(self) -> None:
        self._sent(self.rng.randbytes(self.rng.randrange(1, 2000)))

    def truncated_frame(self) -> None:
        sock = self._proven()
        body = self._batch()
        sock.sendall((_HEADER.pack(len(body), 0) + body)[: self.rng.randrange(8 + len(body))])
        self._done(sock)

    def huge_frame(self) -> None:
        sock = self._proven()
        sock.sendall(_HEADER.pack(self.rng.randrange(256 << 20, 1 << 32), 0) + bytes(1000))
        self._done(sock)

    def nested(self) -> None:
        self._sent(b"\x91" * self.rng.choice([10, 600, 5000, 100_000]) + b"\xc0")

    def no_text(self) -> None:
        # A question (tag 60 or so) whose text is no UTF-8.
        what = messages.Query(1, "total", None)
        body = msgspec.msgpack.encode([messages.Register("client", 1), what])
        self._sent(body.replace(b"total", b"\xff\xfe\xfdal"))

    def wrong_count(self) -> None:
        sock = self._proven()
        sock.sendall(_HEADER.pack(0, self.rng.randrange(1, 1 << 32)))
        self._done(sock)

    def wrongly_typed(self) -> None:
        """Send messages with the right tags and whatever fields."""
        batch = []
        for _ in range(self.rng.randrange(1, 4)):
            kind = self._kind()
            count = max(0, len(kind.__struct_fields__) + self.rng.choice([-1, 0, 0, 0, 1]))
            batch.append([kind.__struct_config__.tag, *[self._anything() for _ in range(count)]])
        self._sent(msgspec.msgpack.encode(batch))

    def well_typed(self) -> None:
        """Send messages that can be decoded, and make no sense."""
        self._sent(self._batch())

    def odd_hello(self) -> None:
        flags, large = self.rng.randrange(256), (1 << 64) - 1
        hello = _HELLO.pack(
            flags, self.rng.choice([0, 1, large]), self.rng.choice([0, 1, large]), self.rng.choice([0, 7, large])
        )
        self._proven(hello[: self.rng.choice([25, 25, 24, 0])])

    def _batch(self) -> bytes:
        batch: list[Any] = []
        if self.rng.random() < 0.7:
            batch.append(messages.Register(self.rng.choice(["driver", "worker", "store", "client"]), self._number()))
        batch += [self.value(self._kind()) for _ in range(self.rng.randrange(1, 5))]
        try:
            return msgspec.msgpack.encode(batch)
        except (OverflowError, TypeError, ValueError):
            return b"\x90"

    def send(self, batch: list[Any]) -> None:
        """Send messages as a process of the session."""
        with contextlib.suppress(ConnectionError, BrokenPipeError, TimeoutError, EOFError):
            self._sent(msgspec.msgpack.encode(batch))

    # -- values ----------------------------------------------------------------------------------------------------

    def _kind(self) -> Any:
        kinds = [kind for kind in typing.get_args(messages.Message) if kind not in ORDERS]
        return self.rng.choice(kinds)

    def _number(self) -> int:
        number = self.rng.choice(_NUMBERS)
        return number if self.rng.random() < 0.5 else self.rng.randrange(1000)

    def _anything(self, depth: int = 0) -> Any:
        choices: list[Callable[[], Any]] = [
            lambda: None,
            lambda: self.rng.random() < 0.5,
            self._number,
            lambda: self.rng.choice([0.0, -1.0, 1e308, float("nan"), float("inf")]),
            lambda: self.rng.randbytes(self.rng.choice([0, 1, 8, 16, 20, 24, 28, 300])),
            lambda: self.rng.choice(["", "x", "driver", "\x1b[2J", "n" * 3000, "é"]),
        ]
        if depth < 4:
            choices.append(lambda: [self._anything(depth + 1) for _ in range(self.rng.randrange(5))])
            choices.append(
                lambda: {str(self._number()): self._anything(depth + 1) for _ in range(self.rng.randrange(4))}
            )
        return self.rng.choice(choices)()

    def value(self, kind: Any, depth: int = 0) -> Any:
        """Return a random value of a type, as message fields have them."""
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin in (typing.Union, types.UnionType):
            return self.value(self.rng.choice(arguments), depth)
        if origin is typing.Literal:
            return self.rng.choice(arguments)
        if origin is typing.Annotated:
            return self.value(arguments[0], depth)
        few = self.rng.randrange(4) if depth < 5 else 0
        if origin is tuple and arguments[-1] is not Ellipsis:
            return tuple(self.value(one, depth + 1) for one in arguments)
        if origin is not None and issubclass(origin, dict | typing.Mapping):
            return {self.value(arguments[0], depth + 1): self.value(arguments[1], depth + 1) for _ in range(few)}
        if origin is not None:  # a list, a set, a tuple of any length
            return [self.value(arguments[0], depth + 1) for _ in range(few)]
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            hints = typing.get_type_hints(kind, include_extras=True)
            return kind(**{name: self.value(hints[name], depth + 1) for name in kind.__struct_fields__})
        plain: dict[Any, Callable[[], Any]] = {
            bool: lambda: self.rng.random() < 0.5,
            int: self._number,
            float: lambda: self.rng.choice([0.0, -1.0, 0.5, 1e308, float("nan"), float("inf")]),
            str: lambda: self.rng.choice(["", "x", "total", "node", "cuda", "\x1b[2J", "n" * 3000, "é"]),
            bytes: lambda: self.rng.randbytes(self.rng.choice([0, 1, 8, 16, 20, 24, 28, 300])),
            type(None): lambda: None,
        }
        return plain[kind]() if kind in plain else self._anything(depth)


def _frame(sock: socket.socket) -> bytes:
    """Return the next frame of a handshake."""
    return _exactly(sock, _LENGTH.unpack(_exactly(sock, 4))[0])


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def _answers(sock: socket.socket) -> bool:
    """Tell whether the peer says more than its challenge."""
    try:
        _frame(sock)
        return bool(sock.recv(1))
    except (EOFError, ConnectionError):
        return False
