"""Challenge-response authentication of a new connection: a core without I/O.

Theory of operation. A cluster has one secret token. Neither side sends it; each proves that it knows it by keying a
hash over both sides' nonces with it, and names itself:

    server -> client   nonce_s                                     (32 bytes)
    client -> server   nonce_c, id_c, H(token, "client", nonces, id_c, hello), hello
    server -> client   id_s, H(token, "server", nonces, id_s, answer), answer

`hello` and `answer` are what the two have to say about the connection that begins (`link`). They travel with the proofs and
under them: a hello is looked at only once its sender is proven, and nobody on the way can change it.

Until `done`, a side hands no received byte to anything but this class, so nothing from an unproven peer is ever decoded.
The proofs differ by role, so a proof cannot be reflected. The hash is BLAKE2b in keyed mode (RFC 7693).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable

from afield.ids import PROCESS_ID_BYTES

NONCE_BYTES = 32
PROOF_BYTES = 32


class AuthenticationError(Exception):
    """The peer does not know the cluster's token: it belongs to another cluster, or it is an intruder."""


def _proof(token: bytes, role: bytes, nonce_s: bytes, nonce_c: bytes, process_id: bytes, words: bytes) -> bytes:
    # All but the last part have a fixed size, so that no two messages hash the same bytes.
    message = role + nonce_s + nonce_c + process_id + words
    return hashlib.blake2b(message, key=token, digest_size=PROOF_BYTES).digest()


class Handshake:
    """One side of the exchange; `feed` takes each received frame and returns the frame to answer with, if any.

    Args:
        token: the cluster's secret, at most 64 bytes.
        process_id: this side's id.
        nonce: 32 fresh random bytes, handed in so that the core has no randomness of its own.
        server: whether this side accepted the connection.
        hello: what a client has to say.
        answer: returns what a server answers to (the proven client's id, its hello).

    Attributes:
        done: the peer is proven.
        peer_id: its id, then.
        peer_words: what it said: a client's hello, a server's answer.
    """

    __slots__ = (
        "_answer",
        "_hello",
        "_nonce",
        "_process_id",
        "_server",
        "_server_nonce",
        "_token",
        "done",
        "peer_id",
        "peer_words",
    )

    def __init__(
        self,
        token: bytes,
        process_id: bytes,
        nonce: bytes,
        *,
        server: bool,
        hello: bytes = b"",
        answer: Callable[[bytes, bytes], bytes] = lambda peer_id, hello: b"",
    ) -> None:
        self._token = token
        self._process_id = process_id
        self._nonce = nonce
        self._server = server
        self._server_nonce = nonce if server else b""
        self._hello = hello
        self._answer = answer
        self.done = False
        self.peer_id = b""
        self.peer_words = b""

    def greeting(self) -> bytes:
        """Return what this side sends before it has received anything (empty for a client)."""
        return self._nonce if self._server else b""

    def feed(self, frame: bytes) -> bytes:
        """Take one frame from the peer; raise `AuthenticationError` if it proves nothing."""
        if self._server:
            return self._feed_server(frame)
        if not self._server_nonce:
            if len(frame) != NONCE_BYTES:
                raise AuthenticationError("the server sent no challenge")
            self._server_nonce = frame
            proof = _proof(self._token, b"client", frame, self._nonce, self._process_id, self._hello)
            return self._nonce + self._process_id + proof + self._hello
        self._check(b"server", self._nonce, frame)
        return b""

    def _feed_server(self, frame: bytes) -> bytes:
        nonce_c = frame[:NONCE_BYTES]
        self._check(b"client", nonce_c, frame[NONCE_BYTES:])
        answer = self._answer(self.peer_id, self.peer_words)
        proof = _proof(self._token, b"server", self._nonce, nonce_c, self._process_id, answer)
        return self._process_id + proof + answer

    def _check(self, role: bytes, nonce_c: bytes, frame: bytes) -> None:
        """Take who the peer says it is, its proof of that, and its words."""
        peer_id, rest = frame[:PROCESS_ID_BYTES], frame[PROCESS_ID_BYTES:]
        proof, words = rest[:PROOF_BYTES], rest[PROOF_BYTES:]
        expected = _proof(self._token, role, self._server_nonce, nonce_c, peer_id, words)
        if not hmac.compare_digest(proof, expected):
            raise AuthenticationError("the peer does not know this cluster's token")
        self.peer_id, self.peer_words = peer_id, words
        self.done = True
