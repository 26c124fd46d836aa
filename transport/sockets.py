"""Abstract unix sockets by name, and the kernel's word on who is at the other end.

An abstract name lives exactly as long as the process that listens on it, so no way of dying leaves one behind, and
`ConnectionRefusedError` is the kernel's word that nobody listens there any more.
"""

from __future__ import annotations

import os
import socket
import struct

#: Who the kernel says it is when it has no number for a user (`fs.overflowuid`; its default): many, so nobody to be trusted.
OVERFLOW_UID = 65534
_PEER_CREDENTIALS = struct.Struct("3i")


def connect(name: str) -> socket.socket:
    """Connect to the abstract unix socket `name`, without blocking.

    Raises:
        ConnectionRefusedError: nobody listens there, or another user does.
        BlockingIOError: too many wait to be accepted there; try again later.
        OSError: this process has no descriptors left.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.connect("\0" + name)
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
    """Tell whether the kernel says that the peer runs as this user (or as root).

    A user of another namespace for whom the kernel has no number here is shown as the overflow uid: that is nobody, also where
    we are nobody ourselves.
    """
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    return is_us(_PEER_CREDENTIALS.unpack(credentials)[1])


def is_us(uid: int) -> bool:
    """Tell whether a user is this one, or root."""
    return uid in (os.geteuid(), 0) and uid != OVERFLOW_UID
