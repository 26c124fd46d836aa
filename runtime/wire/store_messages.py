"""The messages between the node daemon and its store processes; tags 60 to 69 of `messages`.

A job is a number that the daemon chose; each job has one `MoveDone`, or is in one `MovesDone`. Arenas: 0 is the host store,
1 + i is device i of the node, -1 is the disk. All offsets and sizes are in bytes.
"""

from __future__ import annotations

import msgspec

from afield.gpu_store.backends.base import SlabExport


class StoreReady(msgspec.Struct, array_like=True, tag=60):
    """A store serves `arena`: a slab of `capacity` bytes, or a disk with so much room; `export` maps the slab elsewhere."""

    arena: int
    life: int
    capacity: int
    export: SlabExport | None


class StoreFailed(msgspec.Struct, array_like=True, tag=61):
    """A store cannot serve `arena` and ends; `kind` as in `MoveDone`, and "full" where there is no room for a slab."""

    arena: int
    life: int
    kind: str
    text: str


class Move(msgspec.Struct, array_like=True, tag=62):
    """Copy between the host store and the receiver's arena, or into it from that of a peer, which `peer` maps."""

    job: int
    source_arena: int
    source_offset: int
    target_arena: int
    target_offset: int
    size: int
    peer: SlabExport | None = None


class WriteFile(msgspec.Struct, array_like=True, tag=63):
    """Write pieces of the host store, each (offset there, size, offset in the file), as one new file."""

    job: int
    file: int
    pieces: list[tuple[int, int, int]]


class ReadFile(msgspec.Struct, array_like=True, tag=64):
    """Read one piece of a file, whole, into the host store."""

    job: int
    file: int
    file_offset: int
    size: int
    host_offset: int


class DeleteFile(msgspec.Struct, array_like=True, tag=65):
    """Delete a file that no job uses; nothing is answered."""

    file: int


class MoveDone(msgspec.Struct, array_like=True, tag=66):
    """A job is done: `kind` is empty, or what failed, as in `gpu_store.mover`, with `text` in words."""

    job: int
    kind: str = ""
    text: str = ""


class MovesDone(msgspec.Struct, array_like=True, tag=68):
    """These jobs are done, and all went well."""

    jobs: list[int]


class DeviceNews(msgspec.Struct, array_like=True, tag=67):
    """Something happened to the store's device; `fatal`: the life with this epoch is over."""

    uuid: str
    epoch: int
    kind: str
    code: int
    fatal: bool
    text: str


StoreMessage = StoreReady | StoreFailed | Move | WriteFile | ReadFile | DeleteFile | MoveDone | MovesDone | DeviceNews
