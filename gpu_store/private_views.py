"""Views of stored bytes for libraries whose arrays cannot be read-only: what they write stays theirs.

Theory of operation. The slab is mapped read-only for readers, so a write into it would end the process. A *private view* is a
mapping of its own of the same pages, copy-on-write: it shares them with all others until its owner writes, and what he
writes nobody else sees. Every view has its own mapping, and that ends with it: pages that were copied are not seen by who
reads the same place of the slab later. The pin of the part lives as long as the mapping. Small views are copies, as a
mapping costs more.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from typing import Any

import numpy as np

from afield.gpu_store.client import ALIGNMENT, View

#: To map and unmap costs about as much as copying so much.
MAP_FROM_BYTES = 128 << 10

_Bytes = np.ndarray[Any, np.dtype[np.uint8]]
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value
#: Only what is written takes memory.
_FLAGS = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)


class _PrivateView(np.ndarray[Any, np.dtype[np.uint8]]):
    """Exports a mapping, and has what keeps the mapped part in its place."""

    pin: Any = None


def private_view(data: Any) -> _Bytes:
    """Return writable bytes with the content of a buffer, 64-byte aligned if that is; without a copy where it pays."""
    buffer = memoryview(data).cast("B") if not isinstance(data, memoryview) else data
    if buffer.nbytes >= MAP_FROM_BYTES and isinstance(buffer.obj, View) and buffer.obj.source is not None:
        mapped = _map(buffer, buffer.obj)
        if mapped is not None:
            return mapped
    copy = aligned_empty(buffer.nbytes)
    np.copyto(copy, np.frombuffer(buffer, np.uint8))
    return copy


def aligned_empty(size: int) -> _Bytes:
    """Return uninitialised bytes at a multiple of 64."""
    room = np.empty(size + ALIGNMENT - 1, np.uint8)
    start = -room.__array_interface__["data"][0] % ALIGNMENT
    return room[start : start + size]


def _map(buffer: memoryview, view: View) -> _Bytes | None:
    """Map the pages that a buffer over `view` lies in once more; None if the kernel does not."""
    assert view.source is not None
    file, offset = view.source
    here: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    offset += here - view.__array_interface__["data"][0]
    lead = offset % mmap.PAGESIZE
    length = lead + buffer.nbytes
    # Not `mmap.mmap`, which keeps a descriptor for each mapping.
    address = _libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, _FLAGS, file.fd, offset - lead)
    if address is None or address == _FAILED:
        return None
    memory = (ctypes.c_ubyte * length).from_address(address)
    mapped = np.frombuffer(memory, np.uint8, buffer.nbytes, lead).view(_PrivateView)
    mapped.pin = buffer
    weakref.finalize(mapped, _libc.munmap, address, length).atexit = False
    return mapped
