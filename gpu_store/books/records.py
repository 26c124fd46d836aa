"""Core records of the books: objects, their parts and copies, and those who wait for room or for a copy.

Theory of operation. An object has parts, a part has copies, at most one *regular* copy in each arena and at most one piece on
disk. What a second execution of the object's task sealed, while the first one's parts were whole, is kept in `extras`: its
readers may have it mapped, nobody is ever sent to it, and it goes when the object is freed.

A copy is always on exactly one *shelf* of its arena, an ordered set with the least recently used copy first (see
`arena_books`). It may not be freed while a job reads or writes it (`busy`) or a process was told that it will stay
(`promised`); if its object is freed before, its bytes follow as soon as nobody needs them. A copy that is `held` by needs that
wait for other parts too may go, but only to make room for somebody who comes before all of them: so the first in line always
gets on, and those behind it have their parts brought again. The life of a copy, of a making and of a need are tables (`lives`).

All who wait have a key, (priority, number of arrival): smaller comes first.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

from afield.gpu_store.books.lives import COPY, MAKING, NEED
from afield.gpu_store.tiers import PREFETCH, PartCopy

Key = tuple[int, int]
#: Comes after everybody who waits: the key of what is done only because an arena is too full.
LAST: Key = (PREFETCH + 1, 0)


class Place(Protocol):
    """What a copy knows of its arena's books."""

    number: int
    life: int


class Copy:
    """One copy of a part in an arena; `room` is its size in bytes, rounded up."""

    __slots__ = (
        "arena",
        "busy",
        "held",
        "life",
        "offset",
        "part",
        "promised",
        "room",
        "serial",
        "shelf",
        "slot",
        "state",
    )

    def __init__(self, part: Part, books: Place, offset: int, room: int, slot: int, serial: int) -> None:
        self.part = part
        self.arena = books.number
        self.life = books.life
        self.offset = offset
        self.room = room
        self.slot = slot
        self.serial = serial
        self.state = COPY.initial
        self.shelf: OrderedDict[Copy, None] | None = None
        self.busy = 0  # jobs
        self.promised = 0  # requests
        self.held: dict[Need, None] | None = None

    @property
    def dead(self) -> bool:
        """True if nobody can read it any more."""
        return self.state not in ("kept", "leaving")

    @property
    def in_use(self) -> bool:
        """True if its bytes may not be freed now, whatever becomes of the object."""
        return self.busy > 0 or self.promised > 0

    def may_leave(self, key: Key) -> bool:
        """Tell whether it may go for somebody with this key, as far as the books know: it may be pinned still."""
        if self.busy or self.promised or self.state != "kept":
            return False
        return not self.held or all(key < need.key for need in self.held)

    def public(self) -> PartCopy:
        part = self.part
        return PartCopy(self.arena, self.offset, part.size, self.slot, self.serial, part.home, self.life)


class DiskPiece:
    """A part's bytes in a spill file."""

    __slots__ = ("file", "offset", "part")

    def __init__(self, part: Part, file: int, offset: int) -> None:
        self.part = part
        self.file = file
        self.offset = offset


class Part:
    """One immutable range of bytes of an object; `lost` tells why no copy is left."""

    __slots__ = ("copies", "disk", "home", "index", "lost", "makings", "object", "size")

    def __init__(self, owner: StoredObject, index: int, size: int, home: int) -> None:
        self.object = owner
        self.index = index
        self.size = size
        self.home = home
        self.copies: dict[int, Copy] = {}  # arena -> copy
        self.disk: DiskPiece | None = None
        self.makings: dict[int, Making] | None = None  # arena -> the copy that is being made there
        self.lost = ""

    @property
    def backed(self) -> bool:
        """True if one copy of it in memory can be done without."""
        return len(self.copies) > 1 or self.disk is not None

    def making(self, arena: int) -> Making | None:
        return self.makings.get(arena) if self.makings else None


class StoredObject:
    """One sealed object and who answers for it."""

    __slots__ = ("extras", "id", "needs", "owner", "parts", "sealer", "spare")

    def __init__(self, object_id: bytes, owner: bytes) -> None:
        self.id = object_id
        self.owner = owner
        self.sealer = b""  # the last one
        self.parts: list[Part] = []
        self.extras: list[Copy] = []
        self.needs: dict[Need, None] | None = None  # those that wait
        self.spare = False  # its owner keeps it for lineage alone: it goes before anything else has to move


class Request:
    """Somebody who waits for `room` bytes of an arena, in its queue."""

    __slots__ = ("key", "room")

    def __init__(self, key: Key, room: int) -> None:
        self.key = key
        self.room = room


class LeaseRequest(Request):
    """A process that waits for room to write in."""

    __slots__ = ("arena", "client", "deadline", "request_id", "size")

    def __init__(
        self, key: Key, room: int, client: bytes, request_id: int, arena: int, size: int, deadline: float | None
    ) -> None:
        super().__init__(key, room)
        self.client = client
        self.request_id = request_id
        self.arena = arena
        self.size = size
        self.deadline = deadline


class Making(Request):
    """A copy of `part` that is to come to `arena`: waits for room, or for a copy in the host store to start from, or runs.

    It is made for those in `needs`, for `child` (the making on a device that starts from this copy), for the copy that is
    `leaving` its device, or as a `prefetch`; when nobody wants it any more, it is cancelled, unless it runs.
    """

    __slots__ = (
        "arena",
        "attempts",
        "children",
        "leaving",
        "needs",
        "offset",
        "parent",
        "part",
        "prefetch",
        "state",
    )

    def __init__(self, key: Key, room: int, part: Part, arena: int) -> None:
        super().__init__(key, room)
        self.part = part
        self.arena = arena
        self.state = MAKING.initial
        self.offset = -1  # of its place in the arena, once it has one
        self.attempts = 0
        self.needs: dict[Need, None] = {}
        self.children: dict[Making, None] = {}
        self.parent: Making | None = None
        self.leaving: Copy | None = None
        self.prefetch = False

    @property
    def current(self) -> bool:
        """True as long as a copy may come of it: it can be joined."""
        return self.state not in ("void", "over")

    @property
    def only_spills(self) -> bool:
        return not (self.needs or self.children or self.prefetch)

    @property
    def wanted(self) -> bool:
        return self.leaving is not None or not self.only_spills


class Need:
    """A process that waits for parts of an object to be in certain arenas."""

    __slots__ = (
        "client",
        "deadline",
        "due",
        "held",
        "key",
        "missing",
        "object",
        "object_id",
        "promised",
        "request_id",
        "state",
        "wants",
    )

    def __init__(
        self,
        key: Key,
        client: bytes,
        request_id: int,
        object_id: bytes,
        wants: list[tuple[int, int]],
        deadline: float | None,
    ) -> None:
        self.key = key
        self.client = client
        self.request_id = request_id
        self.object_id = object_id
        self.object: StoredObject | None = None
        self.wants = wants
        self.deadline = deadline
        self.due: float | None = None  # while the object is not known: how long its seal is waited for
        self.state = NEED.initial
        self.promised: list[Copy] = []
        self.held: dict[tuple[int, int], Copy] = {}
        self.missing: dict[tuple[int, int], Making] = {}


class Job:
    """Something that the shell is doing between `arenas`; `sources` are busy until it is done."""

    __slots__ = ("arenas", "file", "kind", "making", "number", "offsets", "piece", "size", "sources")

    def __init__(self, number: int, kind: str, sources: list[Copy], size: int, arenas: tuple[int, ...]) -> None:
        self.number = number
        self.kind = kind  # as in `Residency.moved_bytes`
        self.sources = sources
        self.size = size
        self.arenas = arenas
        self.making: Making | None = None
        self.piece: DiskPiece | None = None  # what is read
        self.file = 0  # what is written, and the offset in it for each source
        self.offsets: list[int] = []
