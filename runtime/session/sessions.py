"""The directories that sessions leave traces in: what tools find there, and how those of dead sessions are swept.

Theory of operation. A session has one directory (mode 0700) named `afield-<name>-<random>` in the temporary directory, with

- `token`: the cluster's secret (mode 0600);
- `info.json`: what tools want to know before they connect;
- `lock`: locked (`flock`) for as long as any process of the session lives, since all inherit the open file.

The lock file gets its name only once it is locked: a `lock` that can be locked belongs to a session whose processes are all
dead, so that its directory may be removed. A directory without one is being made at this moment, or its maker died in that
moment, which its age tells. Directories of other users are never looked into.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import stat
import tempfile
import time
from dataclasses import asdict, dataclass

_NAME = re.compile(r"afield-([0-9a-f]{16})-")
#: A directory without a lock is left alone for this long.
UNLOCKED_AGE_S = 3600.0


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session as its directory describes it; `started_at` is in seconds since 1970."""

    name: str
    directory: str
    driver_pid: int
    started_at: float

    def token(self) -> bytes:
        """Return the session's secret."""
        with open(os.path.join(self.directory, "token"), encoding="ascii") as file:
            return bytes.fromhex(file.read())


def lock(directory: str) -> int:
    """Lock a new session's directory; return the descriptor that its processes inherit."""
    making = os.path.join(directory, "lock.new")
    fd = os.open(making, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    os.rename(making, os.path.join(directory, "lock"))
    return fd


def write_info(info: SessionInfo) -> None:
    """Describe a session in its directory."""
    path = os.path.join(info.directory, "info.json")
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(asdict(info), file)
    os.rename(path + ".new", path)


def find_sessions(base: str | None = None) -> list[SessionInfo]:
    """Return this user's living sessions whose directories are in `base` (the temporary directory), the oldest first."""
    found = []
    for directory in _directories(base):
        if _is_held(directory):
            try:
                with open(os.path.join(directory, "info.json"), encoding="utf-8") as file:
                    found.append(SessionInfo(**json.load(file)))
            except (OSError, ValueError, TypeError):
                pass  # it is starting or ending at this moment
    return sorted(found, key=lambda info: info.started_at)


def sweep(base: str | None = None) -> list[str]:
    """Remove the directories of this user's dead sessions in `base`; return which."""
    swept = []
    for directory in _directories(base):
        if _is_held(directory):
            continue
        shutil.rmtree(directory, ignore_errors=True)
        swept.append(directory)
    return swept


def _directories(base: str | None) -> list[str]:
    """Return the directories of sessions of ours; links and other people's are none."""
    found = []
    try:
        with os.scandir(base or tempfile.gettempdir()) as entries:
            for entry in entries:
                if _NAME.match(entry.name) and entry.is_dir(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    if status.st_uid == os.getuid() and not stat.S_IMODE(status.st_mode) & 0o077:
                        found.append(entry.path)
    except OSError:
        pass
    return found


def _is_held(directory: str) -> bool:
    """Tell whether a process of the session lives, or may be about to."""
    try:
        fd = os.open(os.path.join(directory, "lock"), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        try:
            return time.time() - os.stat(directory).st_mtime < UNLOCKED_AGE_S
        except OSError:
            return True  # gone at this moment
    except OSError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False
