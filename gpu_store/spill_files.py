"""Spill files: many small parts of the host store fused into one file on disk, each with a checksum.

Theory of operation. A file is written once, whole, read piece by piece, and deleted when nothing in it is needed any more;
which piece lies where is decided elsewhere. It ends with an index: for each piece its offset, size and CRC-32, then how many
there are, a CRC-32 of the index and a mark. So a file explains itself to a store process that starts after the one that wrote
it has died. A file gets its name when it is complete: a name without an index behind it is damage, not a write in progress.

Files are not synchronised: they need not outlive the machine, not even the session, whose directory they are in. Every
failure is a `SpillError` that says which kind it is:

- "disk_full": nothing was kept, there is no room (or the file system or a quota allows no more);
- "unreadable": the file is not there, or reading it failed;
- "corrupt": what was read is not what was written;
- "failed": the system refused a write for another reason.

Usable from several threads.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Sequence
from contextlib import suppress

from afield.errors import SpillError
from afield.units import format_bytes

#: Written, read and checked at a time, so that the checksum finds the bytes in the processor's cache.
CHUNK_BYTES = 4 << 20

_UNFINISHED = ".part"
_MARK = b"afspill1"
_ENTRY = struct.Struct("<QQI")  # offset in the file, size, CRC-32
_TAIL = struct.Struct("<QII8s")  # the file's number, entries, CRC-32 of the entries, mark

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

#: offset in the file -> (size, CRC-32)
_Index = dict[int, tuple[int, int]]


class SpillFiles:
    """The spill files of a session, by number."""

    def __init__(self, directory: str) -> None:
        """Keep files in `directory`, which is made where it is missing; nobody else may be writing there.

        From here on it is known by its descriptor: another one that somebody puts in its place is none of ours.

        Raises SpillError where that cannot be.
        """
        self.directory = directory
        self._indices: dict[int, _Index] = {}
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            if os.fstat(self._fd).st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, "it belongs to another user", directory)
            for name in os.listdir(self._fd):
                if name.endswith(_UNFINISHED):  # whoever was writing it has died
                    os.unlink(name, dir_fd=self._fd)
        except OSError as error:
            raise _failure(error, f"no directory for spill files at {directory}") from error

    def path(self, file: int) -> str:
        """Return where a file is, for messages."""
        return os.path.join(self.directory, str(file))

    def free_bytes(self) -> int:
        """Return how much the disk has room for."""
        found = os.statvfs(self._fd)
        return found.f_bavail * found.f_frsize

    def write(self, file: int, pieces: Sequence[tuple[int, int, int]], memory: memoryview) -> None:
        """Write pieces of `memory`, each (offset there, size, offset in the file), as a new file.

        Raises SpillError; then there is no such file.
        """
        unfinished = f"{file}{_UNFINISHED}"
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(unfinished, flags, 0o600, dir_fd=self._fd)
            try:
                index = {at: (size, _write(fd, memory[start : start + size], at)) for start, size, at in pieces}
                end = max((at + size for _, size, at in pieces), default=0)
                _write(fd, memoryview(_encode(file, index)), end)
            finally:
                os.close(fd)
            os.rename(unfinished, str(file), src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except OSError as error:
            with suppress(OSError):
                os.unlink(unfinished, dir_fd=self._fd)
            size = sum(size for _, size, _ in pieces)
            raise _failure(error, f"{format_bytes(size)} could not be spilled to {self.path(file)}") from error
        self._indices[file] = index

    def read(self, file: int, offset: int, target: memoryview) -> None:
        """Read the piece that was written at `offset`, all of it, into `target`; raises SpillError if it is not intact."""
        path = self.path(file)
        try:
            fd = os.open(str(file), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._fd)
            try:
                index = self._indices.get(file)
                if index is None:
                    index = self._indices[file] = _decode(fd, file, path)
                size, expected = index.get(offset, (-1, 0))
                if size != target.nbytes:
                    raise _corrupt(path, f"there is no piece of {target.nbytes} bytes at offset {offset}")
                if _read(fd, target, offset, path) != expected:
                    raise _corrupt(path, f"the checksum of {size} bytes at offset {offset} is wrong")
            finally:
                os.close(fd)
        except OSError as error:
            text = f"the spill file {path} cannot be read ({error.strerror}); look at the disk, and at who deletes files there"
            raise _error("unreadable", text) from error

    def delete(self, file: int) -> None:
        """Delete a file; one that is not there is no error. Raises SpillError where the system refuses."""
        self._indices.pop(file, None)
        try:
            os.unlink(str(file), dir_fd=self._fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _failure(error, f"the spill file {self.path(file)} could not be deleted") from error


def _write(fd: int, data: memoryview, offset: int) -> int:
    """Write all of `data` at `offset`; return its CRC-32."""
    checksum = 0
    for start in range(0, data.nbytes, CHUNK_BYTES):
        chunk = data[start : start + CHUNK_BYTES]
        checksum = zlib.crc32(chunk, checksum)
        done = 0
        while done < chunk.nbytes:
            done += os.pwrite(fd, chunk[done:], offset + start + done)
    return checksum


def _read(fd: int, target: memoryview, offset: int, path: str) -> int:
    """Fill `target` from `offset`; return the CRC-32 of what came."""
    checksum = 0
    for start in range(0, target.nbytes, CHUNK_BYTES):
        chunk = target[start : start + CHUNK_BYTES]
        done = 0
        while done < chunk.nbytes:
            count = os.preadv(fd, [chunk[done:]], offset + start + done)
            if not count:
                raise _corrupt(path, f"it ends at {offset + start + done} bytes")
            done += count
        checksum = zlib.crc32(chunk, checksum)
    return checksum


def _encode(file: int, index: _Index) -> bytes:
    entries = b"".join(_ENTRY.pack(at, size, checksum) for at, (size, checksum) in index.items())
    return entries + _TAIL.pack(file, len(index), zlib.crc32(entries), _MARK)


def _decode(fd: int, file: int, path: str) -> _Index:
    """Read a file's index from its end."""
    end = os.fstat(fd).st_size - _TAIL.size
    tail = bytearray(_TAIL.size)
    if end < 0:
        raise _corrupt(path, "it has no index")
    _read(fd, memoryview(tail), end, path)
    number, count, checksum, mark = _TAIL.unpack(tail)
    start = end - count * _ENTRY.size
    if mark != _MARK or number != file or start < 0:
        raise _corrupt(path, "it has no index")
    entries = bytearray(count * _ENTRY.size)
    if _read(fd, memoryview(entries), start, path) != checksum:
        raise _corrupt(path, "its index is damaged")
    return {at: (size, piece) for at, size, piece in _ENTRY.iter_unpack(entries)}


def _error(kind: str, text: str) -> SpillError:
    error = SpillError(text)
    error.kind = kind
    return error


def _corrupt(path: str, what: str) -> SpillError:
    return _error(
        "corrupt",
        f"the spill file {path} is not what afield wrote ({what}); something else writes there, or the disk is bad",
    )


def _failure(error: OSError, what: str) -> SpillError:
    if error.errno in _FULL:
        return _error("disk_full", f"{what}: {error.strerror}; make room on that disk, or pass another spill_dir")
    return _error("failed", f"{what}: {error.strerror}; pass a spill_dir that this user can write to")
