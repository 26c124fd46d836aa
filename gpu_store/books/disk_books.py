"""Core books of the disk tier: which part lies at which offset of which spill file, and when a file may be deleted.

Theory of operation. Parts that leave the host store together go into one *fused* file; a file is written once, as a whole,
and deleted as a whole, when nothing in it is needed and nobody reads it. Until then the room of freed parts in it is not used
again. A part has at most one piece on disk. It stays there when the part is brought back to memory, so that the part can
leave once more without being written.

    new_file --written--> live --last piece removed--> (readers?) --> deleted
        \\--failed--> deleted

When a write failed the disk is *bad* for a while: nothing is written until something on it was freed or the time is over, the
longer the more writes failed in a row. A limit on the bytes of all files works the same way, after the files of which every
part is in memory too were given up.
"""

from __future__ import annotations

from collections.abc import Iterable

from afield.gpu_store.books.records import DiskPiece, Part
from afield.units import format_bytes

ALIGNMENT = 4096
#: A fused file is closed at this size; a larger part has one of its own.
MAX_FILE_BYTES = 64 << 20
MAX_FILE_PARTS = 2000
#: After a failed write the disk is left alone for this long, doubled for each failure in a row.
RETRY_S = 1.0
MAX_RETRY_S = 30.0


def padded(size: int) -> int:
    """Return the bytes that a piece of `size` bytes takes in a file."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class SpillFile:
    """One file: its size in bytes, what is needed of it, and how many jobs read or write it."""

    __slots__ = ("jobs", "pieces", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.pieces: dict[Part, DiskPiece] = {}
        self.jobs = 1  # the one that writes it


class DiskBooks:
    """Accounts for the spill files of one node; all sizes in bytes, all times on the caller's clock in seconds."""

    __slots__ = (
        "_deleted",
        "_failures",
        "_next_file",
        "bad",
        "due",
        "error",
        "files",
        "limit",
        "live_bytes",
        "revived",
        "used",
    )

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.files: dict[int, SpillFile] = {}
        self.used = 0
        self.live_bytes = 0
        self.bad = False
        self.revived = False  # it was bad, and has room again: whoever sees this first clears it
        self.error = ""  # of the last write, if it failed
        #: When to try again; None: the next `expire` sets it.
        self.due: float | None = None
        self._failures = 0
        self._next_file = 1
        self._deleted: list[int] = []

    # -- writing --------------------------------------------------------------------------------------------------

    def new_file(self, sizes: Iterable[int]) -> tuple[int, list[int]] | None:
        """Lay out a file of pieces of these sizes; return its number and their offsets, or None beyond the limit."""
        offsets: list[int] = []
        end = 0
        for size in sizes:
            offsets.append(end)
            end += padded(size)
        if not self._fits(end):
            self.fail(f"the files would take more than the limit of {format_bytes(self.limit or 0)}", was_tried=False)
            return None
        number = self._next_file
        self._next_file += 1
        self.files[number] = SpillFile(end)
        self.used += end
        return number, offsets

    def written(self) -> None:
        """A file is whole: `add` what is still needed of it, then let it `rest`."""
        if not self.bad:  # else it was begun before the one that failed, and says nothing of the disk as it is now
            self._failures = 0
            self.error = ""

    def add(self, part: Part, number: int, offset: int) -> None:
        """Enter a part's piece."""
        piece = part.disk = DiskPiece(part, number, offset)
        self.files[number].pieces[part] = piece
        self.live_bytes += padded(part.size)

    def fail(self, error: str, was_tried: bool = True) -> None:
        """Nothing can be written for now."""
        self._failures += was_tried
        self.error = error
        self.bad = True
        self.due = None

    # -- reading and freeing --------------------------------------------------------------------------------------

    def use(self, number: int) -> None:
        """A job reads the file."""
        self.files[number].jobs += 1

    def rest(self, number: int) -> None:
        """The job on the file is done."""
        self.files[number].jobs -= 1
        self._delete_if_done(number)

    def remove(self, part: Part) -> None:
        """The part's piece is not needed any more."""
        piece = part.disk
        if piece is not None:
            part.disk = None
            self.live_bytes -= padded(part.size)
            del self.files[piece.file].pieces[part]
            self._delete_if_done(piece.file)

    def deleted(self) -> list[int]:
        """Return the files to delete, once."""
        deleted, self._deleted = self._deleted, []
        return deleted

    # -- time -----------------------------------------------------------------------------------------------------

    def expire(self, now: float) -> None:
        """Let the disk be tried again when its time has come."""
        if self.bad and self.due is None:
            self.due = now + min(RETRY_S * 2 ** max(self._failures - 1, 0), MAX_RETRY_S)
        elif self.bad and self.due is not None and self.due <= now:
            self.bad = False
            self.revived = True

    def describe(self) -> str:
        """Return a clause for error messages."""
        limit = "" if self.limit is None else f" of at most {format_bytes(self.limit)}"
        trouble = f"; it cannot be written to now: {self.error}" if self.bad else ""
        return f"the disk holds {format_bytes(self.used)}{limit} in {len(self.files)} files{trouble}"

    # -- inside ---------------------------------------------------------------------------------------------------

    def _fits(self, size: int) -> bool:
        if self.limit is None or self.used + size <= self.limit:
            return True
        for file in list(self.files.values()):
            if not file.jobs and all(part.copies for part in file.pieces):
                for part in list(file.pieces):
                    self.remove(part)
                if self.used + size <= self.limit:
                    return True
        return False

    def _delete_if_done(self, number: int) -> None:
        file = self.files[number]
        if not file.pieces and not file.jobs:
            del self.files[number]
            self.used -= file.size
            self._deleted.append(number)
            self.revived |= self.bad
            self.bad = False
