"""Challenge-response authentication of a new connection: a core without I/O.

Theory of operation. A cluster has one secret token. Neither side sends it; each proves that it knows it by keying a
hash over both sides' nonces with it, and names itself:

    server -> client   nonce_s                                     (32 bytes)
    client -> server   nonce_c, id_c, H(token, "client", nonces, id_c)
    server -> client   id_s, H(token, "server", nonces, id_s)

Until `done`, a side hands no received byte to anything but this class, so nothing from an unproven peer is ever decoded.
The proofs differ by role, so a proof cannot be reflected. The hash is BLAKE2b in keyed mode (RFC 7693).
"""

from __future__ import annotations

import hashlib
import hmac

from afield.ids import PROCESS_ID_BYTES

NONCE_BYTES = 32
PROOF_BYTES = 32


class AuthenticationError(Exception):
    """The peer does not know the cluster's token: it belongs to another cluster, or it is an intruder."""


def _proof(token: bytes, role: bytes, nonce_s: bytes, nonce_c: bytes, process_id: bytes) -> bytes:
    return hashlib.blake2b(role + nonce_s + nonce_c + process_id, key=token, digest_size=PROOF_BYTES).digest()


class Handshake:
    """One side of the exchange; `feed` takes each received frame and returns the frame to answer with, if any.

    Args:
        token: the cluster's secret, at most 64 bytes.
        process_id: this side's id.
        nonce: 32 fresh random bytes, handed in so that the core has no randomness of its own.
        server: whether this side accepted the connection.
    """

    __slots__ = ("_nonce", "_process_id", "_server", "_server_nonce", "_token", "done", "peer_id")

    def __init__(self, token: bytes, process_id: bytes, nonce: bytes, *, server: bool) -> None:
        self._token = token
        self._process_id = process_id
        self._nonce = nonce
        self._server = server
        self._server_nonce = nonce if server else b""
        self.done = False
        self.peer_id = b""

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
            proof = _proof(self._token, b"client", frame, self._nonce, self._process_id)
            return self._nonce + self._process_id + proof
        peer_id, proof = frame[:PROCESS_ID_BYTES], frame[PROCESS_ID_BYTES:]
        expected = _proof(self._token, b"server", self._server_nonce, self._nonce, peer_id)
        self._finish(peer_id, proof, expected)
        return b""

    def _feed_server(self, frame: bytes) -> bytes:
        nonce_c = frame[:NONCE_BYTES]
        peer_id = frame[NONCE_BYTES : NONCE_BYTES + PROCESS_ID_BYTES]
        expected = _proof(self._token, b"client", self._nonce, nonce_c, peer_id)
        self._finish(peer_id, frame[NONCE_BYTES + PROCESS_ID_BYTES :], expected)
        return self._process_id + _proof(self._token, b"server", self._nonce, nonce_c, self._process_id)

    def _finish(self, peer_id: bytes, proof: bytes, expected: bytes) -> None:
        if not hmac.compare_digest(proof, expected):
            raise AuthenticationError("the peer does not know this cluster's token")
        self.peer_id = peer_id
        self.done = True
