"""The messages about stored values: where they are, and what processes and their node daemon say about room for them.

Part of `messages`, whose tags these share: 30 to 35, 49 and 55 to 59. All offsets and sizes are in bytes.
"""

from __future__ import annotations

import msgspec


class Part(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """One copy of one part of a stored object: `size` bytes at `offset` of an arena (0: the host's slab, 1 + i: device i's).

    `slot` and `serial` name the copy on the pin board (`gpu_store.pins`); slot 0: it never moves. `home` is the arena that
    the part was made in: 0 for host bytes, a device's for the memory of a device array. `life` is the number of the arena's
    life: after a loss or a reset the same offset is other memory.
    """

    arena: int
    offset: int
    size: int
    slot: int = 0
    serial: int = 0
    home: int = 0
    life: int = 1


class Location(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """Where a value lies: its parts, the last one at home in the host's slab the serialised frame; a small one is `frame`.

    It is a hint: what it names may have moved; the pin board tells, and the node daemon knows where to.
    """

    parts: list[Part]
    frame: bytes = b""

    @property
    def size(self) -> int:
        """Bytes of the value."""
        return len(self.frame) + sum(part.size for part in self.parts)


#: The number of a request that nobody waits for: it is granted only where there is plenty.
AHEAD = 0


class StoreLease(msgspec.Struct, array_like=True, tag=30):
    """Ask for `size` bytes of this life of an arena, waiting at most `timeout_s`."""

    request: int
    size: int
    timeout_s: float
    arena: int = 0
    life: int = 1


class StoreGrant(msgspec.Struct, array_like=True, tag=31):
    """The extent for request `request`, or the `refusal` with its arithmetic; `lost`: that life of the arena is over."""

    request: int
    offset: int
    size: int
    refusal: str
    arena: int = 0
    life: int = 1
    lost: bool = False


class GiveBack(msgspec.Struct, array_like=True, tag=32):
    """An unused part of an extent that was granted."""

    offset: int
    size: int
    arena: int = 0
    life: int = 1


class Seal(msgspec.Struct, array_like=True, tag=33):
    """The parts, written into extents of the sender's, are object `object_id`, complete.

    Left as a note (`gpu_store.rings`), and sent only where there is no room for that.
    """

    object_id: bytes
    owner: bytes
    parts: list[Part]


class Free(msgspec.Struct, array_like=True, tag=34):
    """The owner says that nobody can reach these objects any more; `sealer` is who would have sealed them, if that is known.

    What is not sealed yet is freed as soon as it is, by `sealer` if it is given: a later execution seals the same ids.
    """

    object_ids: list[bytes]
    sealer: bytes = b""


class Spare(msgspec.Struct, array_like=True, tag=49):
    """The owner says that nothing but lineage needs these objects: they go first when memory is short. Or that more does."""

    object_ids: list[bytes]
    spare: bool


class Held(msgspec.Struct, array_like=True, tag=35):
    """Question from the daemon (owner died): which of these are mapped by live values? The answer has the same form."""

    question: int
    object_ids: list[bytes]


class Need(msgspec.Struct, array_like=True, tag=55):
    """The sender needs parts (index, arena) of an object where they are not, or no longer. Priority 0: for a `get`."""

    request: int
    object_id: bytes
    wants: list[tuple[int, int]]
    priority: int
    timeout_s: float


class Found(msgspec.Struct, array_like=True, tag=56):
    """The parts that request `request` asked for stay where they are until `Mapped`; or why they cannot be had.

    `kind` is empty, or as in `gpu_store.tiers.NotFound`, with a `reason`.
    """

    request: int
    parts: list[tuple[int, Part]]
    kind: str = ""
    reason: str = ""


class Mapped(msgspec.Struct, array_like=True, tag=57):
    """The sender has pinned what `Found(request)` named."""

    request: int


class Trim(msgspec.Struct, array_like=True, tag=58):
    """Memory of an arena is short: give back the chunks of it that you do not use."""

    arena: int


class Collect(msgspec.Struct, array_like=True, tag=59):
    """Somebody waits for memory of an arena, and all of it is in use: let go of what only garbage refers to."""

    arena: int


TierMessage = StoreLease | StoreGrant | GiveBack | Seal | Free | Spare | Held | Need | Found | Mapped | Trim | Collect
