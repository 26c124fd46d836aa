"""What a device arena hands out: blocks of leased memory, and claims on what becomes of them; see `arena`."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

from afield.gpu_store.backends.base import Slab

#: Blocks start at multiples of this and are counted in multiples of it, as on a CUDA device.
ALIGNMENT = 512


class Home(Protocol):
    """The arena that a block is in."""

    arena: int
    slab: Slab
    #: (offset, size, stream) of blocks that died, and claims that were released; appended to at any moment.
    dead: deque[tuple[int, int, int] | Claim]

    def claim(self, block: Block) -> Claim:
        """Note that the memory of `block` may become an object; ends with `release`."""

    def release(self, claim: Claim) -> None:
        """End a claim."""

    def check(self) -> None:
        """Raise if the memory is gone."""


class Block:
    """Leased memory of a device; it is free again when the last reference to this object is gone."""

    __slots__ = ("__weakref__", "home", "offset", "size", "stream")

    def __init__(self, home: Home, offset: int, size: int, stream: int) -> None:
        self.home = home
        self.offset = offset
        #: Bytes, a multiple of ALIGNMENT; 0 once the memory has left the arena.
        self.size = size
        self.stream = stream

    @property
    def arena(self) -> int:
        return self.home.arena

    @property
    def address(self) -> int:
        return self.home.slab.address + self.offset

    def __del__(self) -> None:
        if self.size:
            self.home.dead.append((self.offset, self.size, self.stream))


class Claim:
    """Notes that somebody may want to keep the memory of a block when the block dies; see `DeviceArena.claim`."""

    __slots__ = ("count", "dead", "home", "offset", "size", "stream", "taken")

    def __init__(self, block: Block) -> None:
        self.home = block.home
        self.offset = block.offset
        self.size = block.size
        self.stream = block.stream
        self.count = 1
        self.dead = False
        self.taken = False


@dataclass(frozen=True, slots=True)
class ArenaStats:
    """What one process holds of one device, in bytes; `round_trips` counts leases."""

    leased_bytes: int
    used_bytes: int
    round_trips: int
    bytes_born: int
    bytes_copied: int

    @property
    def fragmentation(self) -> float:
        """The part of the leased bytes that nothing uses."""
        return 1 - self.used_bytes / self.leased_bytes if self.leased_bytes else 0.0
