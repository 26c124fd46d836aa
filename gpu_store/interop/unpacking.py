"""From parts back to device arrays.

Theory of operation. The pickle of a value names `rebuild` for each device array. Before it unpickles, the runtime says, for
the running thread, where parts are (`resolving`): the parts of one value are asked for by their number, each as often as
there are arrays in it, and the resolver gives the same place each time, so that arrays which shared memory share it again.
A part in host memory becomes a read-only NumPy array of the same shape and strides.

    record: i64 number of the part (NOWHERE for an array of size 0), i64 offset of the first element, i64 per stride
"""

from __future__ import annotations

import functools
import struct
import threading
from collections.abc import Callable
from typing import Any

from afield.errors import DeserializationError
from afield.gpu_store.arena import DeviceArena
from afield.gpu_store.interop.places import DevicePlace, HostPlace, Layout, Place, host_array
from afield.gpu_store.interop.registry import adapter_for

#: The part of an array that has no bytes.
NOWHERE = -1
#: The part of an array whose value was never committed.
UNCOMMITTED = -2


class _Running(threading.local):
    """What unpickling on this thread asks; None outside of the runtime's own unpickling."""

    resolve: Callable[[int], Place] | None = None
    home: Callable[[], DeviceArena | None] | None = None


_running = _Running()


class resolving:  # noqa: N801 - used as a function is
    """Let device arrays that are unpickled in this block, on this thread, find their memory.

    `resolve(part)` returns where a part is; arrays of size 0 belong to no part and are made on the device of `home()`, or
    as NumPy arrays where that is None.
    """

    __slots__ = ("_before", "_here")

    def __init__(self, resolve: Callable[[int], Place], home: Callable[[], DeviceArena | None] | None = None) -> None:
        self._here = resolve, home
        self._before: tuple[Callable[[int], Place] | None, Callable[[], DeviceArena | None] | None] = (None, None)

    def __enter__(self) -> None:
        self._before = _running.resolve, _running.home
        _running.resolve, _running.home = self._here

    def __exit__(self, *_: object) -> None:
        _running.resolve, _running.home = self._before


@functools.cache
def record_struct(dimensions: int) -> struct.Struct:
    """Return the layout of the record of an array with so many dimensions."""
    return struct.Struct(f"<{2 + dimensions}q")


def rebuild(kind: str, shape: tuple[int, ...], dtype: str, record: Any) -> Any:
    """Return the array that a pickle describes; named in pickles, so it stays where it is.

    Raises DeserializationError outside of `resolving`.
    """
    resolve, find_home = _running.resolve, _running.home
    if resolve is None:
        raise DeserializationError(
            "device arrays inside a value of afield's store are rebuilt by get() and as arguments of tasks only; pickle the "
            "array by itself to move it otherwise"
        )
    part, offset, *steps = record_struct(len(shape)).unpack(record)
    if part == UNCOMMITTED:
        raise DeserializationError("this value was pickled but never stored: its device memory was not kept")
    if part != NOWHERE:
        place = resolve(part)
    else:
        home = find_home() if find_home is not None else None
        place = DevicePlace(home, 0, 0) if home is not None else HostPlace(memoryview(b""))
    layout = Layout(shape, tuple(steps), dtype, offset, kind)
    if isinstance(place, HostPlace):
        return host_array(place, layout)
    return adapter_for(kind, emulated=place.arena.device.info.kind == "emulated").build(place, layout)
