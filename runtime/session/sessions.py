"""The directories that sessions leave traces in: what tools find there, and how those of dead sessions are swept.

Theory of operation. A session has one directory (mode 0700) named `afield-<name>-<random>` in the temporary directory, with

- `info.json`: the *record*: which directory of which session this is, on which machine, and what tools want to know;
- `token`: the cluster's secret (mode 0600);
- `node.log`: what the fork server and the daemon print;
- `lock`: locked (`flock`) for as long as any process of the session lives, since all inherit the open file.

The lock file gets its name only once it is locked: a `lock` that can be locked belongs to a session whose processes are all
dead, so that its directory may be removed. A directory without one is being made at this moment, or its maker died in that
moment, which its age tells.

Nothing is removed but what holds a valid record: one that names the session as the directory's name does, and the directory
itself by its inode. A directory of this user's that somebody has given such a name is none. Nor is one of another machine,
on a disk that several share: its lock may not be seen here.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import BinaryIO

from afield.runtime.session import directories

_NAME = re.compile(r"afield-([0-9a-f]{16})-")
#: A directory without a lock is left alone for this long.
UNLOCKED_AGE_S = 3600.0


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session as its record describes it; `started_at` is in seconds since 1970, `inode` that of the directory."""

    name: str
    directory: str
    driver_pid: int
    started_at: float
    inode: int = 0
    host: str = ""
    boot: str = ""

    def token(self) -> bytes:
        """Return the session's secret."""
        with _opened(self.directory) as fd:
            return bytes.fromhex(directories.read_file("token", fd).decode("ascii"))


class SessionDirectory:
    """The directory of a new session, as its driver holds it.

    Args:
        name: the session's.
        base: where; the temporary directory by default.

    Attributes:
        path: where it is.

    Raises:
        UnsafeDirectoryError: other users could put something else in its place.
        OSError: it cannot be made.
    """

    def __init__(self, name: str, base: str | None = None) -> None:
        real = os.path.realpath(base or tempfile.gettempdir())
        complaint = directories.complaint(real)
        if complaint is not None:
            raise UnsafeDirectoryError(complaint)
        self.path = os.path.join(real, f"afield-{name}-{secrets.token_hex(4)}")
        os.mkdir(self.path, 0o700)
        self._fd = directories.open_directory(self.path)
        info = SessionInfo(name, self.path, os.getpid(), time.time(), os.fstat(self._fd).st_ino, host(), boot())
        self._write("info.json.new", json.dumps(asdict(info)).encode())
        os.rename("info.json.new", "info.json", src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def _write(self, name: str, data: bytes) -> None:
        fd = directories.create_file(name, self._fd)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)

    def write_token(self, token: bytes) -> None:
        """Leave the session's secret for tools of this user."""
        self._write("token", token.hex().encode())

    def open_log(self) -> BinaryIO:
        """Create the log, and return it open for reading and writing."""
        return os.fdopen(directories.create_file("node.log", self._fd, os.O_RDWR), "w+b")

    def lock(self) -> int:
        """Lock the directory; return the descriptor that the session's processes inherit."""
        fd = directories.create_file("lock.new", self._fd, os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.rename("lock.new", "lock", src_dir_fd=self._fd, dst_dir_fd=self._fd)
        return fd

    def close(self) -> None:
        """Let go of it; closing twice is allowed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """Remove it with all that is in it, and close it."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)


class UnsafeDirectoryError(Exception):
    """Other users could put something else in the place of a session's directory."""


def find_sessions(base: str | None = None) -> list[SessionInfo]:
    """Return this user's living sessions whose directories are in `base` (the temporary directory), the oldest first."""
    return sorted((info for info, held in _records(base) if held), key=lambda info: info.started_at)


def sweep(base: str | None = None) -> list[str]:
    """Remove the directories of this user's dead sessions in `base`; return which."""
    swept = []
    for info, held in _records(base):
        if not held and (info.boot == boot() or info.host == host()):
            shutil.rmtree(info.directory, ignore_errors=True)
            swept.append(info.directory)
    return swept


def _records(base: str | None) -> Iterator[tuple[SessionInfo, bool]]:
    """Yield the valid records of this user's sessions, and whether a process of the session lives or may be about to."""
    try:
        where = os.path.realpath(base or tempfile.gettempdir())
        if directories.complaint(where) is not None:
            return  # no session is there, and nothing that is there is ours for sure
        names = os.listdir(where)
    except OSError:
        return
    for found in filter(None, map(_NAME.match, sorted(names))):
        directory = os.path.join(where, found.string)
        with contextlib.suppress(OSError, ValueError, TypeError), _opened(directory) as fd:
            info = SessionInfo(**json.loads(directories.read_file("info.json", fd)))
            if info.name == found[1] and info.inode == os.fstat(fd).st_ino:
                yield replace(info, directory=directory), _is_held(fd)


@contextlib.contextmanager
def _opened(directory: str) -> Iterator[int]:
    fd = directories.open_directory(directory)
    try:
        yield fd
    finally:
        os.close(fd)


def _is_held(directory: int) -> bool:
    try:
        fd = os.open("lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=directory)
    except FileNotFoundError:
        return time.time() - os.fstat(directory).st_mtime < UNLOCKED_AGE_S
    except OSError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def host() -> str:
    """Return what tells this machine, or container, from others that may see the same disk."""
    return f"{os.uname().nodename} {_line('/etc/machine-id')}"


def boot() -> str:
    """Return what tells this run of the machine's kernel from all others."""
    return _line("/proc/sys/kernel/random/boot_id") or "unknown " + secrets.token_hex(8)


def _line(path: str) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError), open(path, encoding="ascii") as file:
        return file.readline().strip()
    return ""
