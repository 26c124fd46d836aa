"""Where the files of a session may lie: in directories in which no other user can put something in their place.

Theory of operation. Whoever may write to a directory may rename what is in it, unless the directory is *sticky*, as /tmp is:
then only the owners may. So each directory from the root down to the one that is asked for has to belong to this user or to
root, and nobody else may write to it unless it is sticky. A group that holds this user alone (many systems give everybody one
of his own, and write permission to it) is nobody else.

What lies in such a directory is opened from a descriptor of it and without following links, so that what was looked at is what
is used.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import stat

from afield.transport.sockets import OVERFLOW_UID, is_us


def complaint(path: str) -> str | None:
    """Return why files of ours are not safe in a directory, or None if they are.

    Raises:
        OSError: there is no such directory, or it may not be looked at.
    """
    real = os.path.realpath(path)
    status = os.stat(real)
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(20, "it is not a directory", path)
    while True:
        found = _complaint(real, os.lstat(real))
        if found is not None or real == os.path.dirname(real):
            return found
        real = os.path.dirname(real)


def _complaint(path: str, status: os.stat_result) -> str | None:
    if not is_us(status.st_uid):
        return f"{path} belongs to the user {_name(status.st_uid)}, who could put other files in the place of ours"
    if status.st_mode & stat.S_ISVTX:
        return None
    if status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and not _is_private(status.st_gid)):
        return (
            f"other users may write to {path} (its mode is {stat.S_IMODE(status.st_mode):04o}, without the sticky bit) "
            f"and could put other files in the place of ours"
        )
    return None


def _name(uid: int) -> str:
    if uid == OVERFLOW_UID:
        return f"{uid} (nobody)"
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return str(uid)


def _is_private(gid: int) -> bool:
    """Tell whether this user is alone in a group, or there with root only."""
    if gid == 0:
        return True
    try:
        group = grp.getgrgid(gid)
        user = pwd.getpwuid(os.geteuid())
    except KeyError:
        return False  # a directory service that does not answer, perhaps: nobody knows who else is in it
    alone = set(group.gr_mem) <= {user.pw_name, "root"}
    # It is everybody's whose first group it is too, which no list says: one's own group has one's own name.
    return alone and gid == user.pw_gid and group.gr_name == user.pw_name


def open_directory(path: str) -> int:
    """Open a directory that is this user's and nobody else's; return its descriptor.

    Raises:
        OSError: there is none, it is a link, or it belongs or is open to others.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise PermissionError(1, "it belongs to another user, or is open to others", path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def create_file(name: str, base: int, flags: int = os.O_WRONLY) -> int:
    """Create a file for this user alone in the directory `base`, where there is none of that name; return its descriptor."""
    return os.open(name, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=base)


def read_file(name: str, base: int, most_bytes: int = 1 << 16) -> bytes:
    """Read a file in the directory `base` that is no link, up to `most_bytes`."""
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=base)
    try:
        return os.read(fd, most_bytes)
    finally:
        os.close(fd)
