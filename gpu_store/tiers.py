"""Core vocabulary of the tiers: arenas, copies of parts, the pin board's interface, and the effects that the books ask for.

Theory of operation. A node's memory is numbered arenas: 0 is the host slab, 1 + i the slab of device i, and -1 stands for the
files on disk. The books (`residency`) take events and return effects; whoever runs them executes each effect and, for a job,
reports once that it is `finished`. What is defined here is all that books and shell have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

HOST: Final = 0
DISK: Final = -1
#: Where a part is said to be of which no copy is left.
NOWHERE: Final = -2

#: An arena's life has a number: the slab of a device that was lost, or whose store process ended, is followed by another one.
FIRST_LIFE: Final = 1

#: A kind of loss: see `Lost`.
SPARE: Final = "spare"

#: Who is served first: who needs a little more to finish, and be of use to all others; a `get`; a task's argument or output;
#: what is only expected to be needed.
FINISH, GET, ARGUMENT, PREFETCH = -1, 0, 1, 2


class StoreUsageError(AssertionError):
    """A client named space that is not leased to it, or repeated a request id: its bug; nothing was changed."""


@dataclass(frozen=True, slots=True)
class PartCopy:
    """One copy of a part: `size` bytes, exactly, at `offset` of `arena`; slot 0: it has no slot and never moves.

    `home` is the arena that the part was made in. In arena DISK the offset is that in some file. `life` is the arena's at that
    time: after a loss or a reset the same number stands for other memory.
    """

    arena: int
    offset: int
    size: int
    slot: int = 0
    serial: int = 0
    home: int = HOST
    life: int = FIRST_LIFE


class Pins(Protocol):
    """The pin board, as the books see it."""

    def take(self) -> tuple[int, int]:
        """Return a free (slot, serial) for a copy that the books make, or (0, 0) when there is none."""

    def publish(self, slot: int, serial: int) -> None:
        """Let the copy be pinned from now on."""

    def close(self, copies: Sequence[tuple[int, int]], /) -> list[bool]:
        """For each (slot, serial): True, nobody has it pinned nor can pin it; or False, it is pinned and stays open."""

    def holders(self, slots: Sequence[int], /) -> dict[int, list[bool]]:
        """Return, by the row of each process that has pinned any of these slots, which of them: as seen now, by a glance."""

    def release(self, slot: int) -> None:
        """The slot is free again, and what was in it can be pinned no more."""


@dataclass(frozen=True, slots=True)
class Granted:
    """`client` may write to [offset, offset + size) of this life of the arena; `size` is what it asked for, rounded up."""

    client: bytes
    request_id: int
    arena: int
    offset: int
    size: int
    life: int = FIRST_LIFE


@dataclass(frozen=True, slots=True)
class Refused:
    """`client` gets no room; `never_fits` says that waiting longer or freeing objects would not help.

    `lost`: the life of the arena that it asked for is over.
    """

    client: bytes
    request_id: int
    arena: int
    reason: str
    never_fits: bool = False
    lost: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """The parts (index, copy) that `client` needs stay where they are until it has pinned them and says `mapped`."""

    client: bytes
    request_id: int
    parts: list[tuple[int, PartCopy]]


@dataclass(frozen=True, slots=True)
class NotFound:
    """`client` does not get the parts.

    `kind`: "unknown": never sealed, or freed; "lost": no copy is left; "full", "device_full": there was no room for them in
    time, or there never can be; "device_lost": the device that they were wanted on is gone; "failed": they could not be moved.
    """

    client: bytes
    request_id: int
    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class Move:
    """Copy `size` bytes from (arena, offset) to (arena, offset); the source stays as it is."""

    job: int
    source: tuple[int, int]
    target: tuple[int, int]
    size: int


@dataclass(frozen=True, slots=True)
class WriteFile:
    """Make file number `file` out of pieces (offset in the host slab, size, offset in the file); 4096-aligned there."""

    job: int
    file: int
    pieces: list[tuple[int, int, int]]


@dataclass(frozen=True, slots=True)
class ReadFile:
    """Read `size` bytes, one whole piece, at `file_offset` of a file to `host_offset` of the host slab."""

    job: int
    file: int
    file_offset: int
    size: int
    host_offset: int


@dataclass(frozen=True, slots=True)
class DeleteFile:
    """Nothing in the file is needed any more, or it was not written whole; it may not even be there."""

    file: int


@dataclass(frozen=True, slots=True)
class Lost:
    """Of these objects of `owner` a part is gone for good; `kind` SPARE: they were let go, as only lineage needed them."""

    owner: bytes
    object_ids: list[bytes]
    cause: str
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Trim:
    """Memory of the arena is short: who has leased some and does not use it is asked to give it back."""

    arena: int


@dataclass(frozen=True, slots=True)
class Collect:
    """Nothing of the arena may go: all are asked to look for values that only garbage refers to."""

    arena: int


Effect = Granted | Refused | Found | NotFound | Move | WriteFile | ReadFile | DeleteFile | Lost | Trim | Collect


@dataclass(frozen=True, slots=True)
class ArenaUsage:
    """How one arena is used, in bytes; `used` is the sum of leased, sealed and moving.

    Of the disk, `used` is what the files take, `sealed` what of it is needed, and a capacity of 0 stands for no limit.
    """

    label: str
    capacity: int
    used: int
    leased: int
    sealed: int
    #: Reserved for copies that are being made, or freed and still read by a job or promised to a process.
    moving: int
    #: Of `sealed`: copies besides the one at home, which go first.
    secondary: int
    #: Of `sealed`: on its way to a lower tier.
    leaving: int
    #: For tasks' own use.
    reserved: int
    largest_free: int
    high_water: int
    waiting: int
