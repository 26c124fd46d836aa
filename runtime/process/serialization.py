"""Values to bytes and back: pickle protocol 5 with out-of-band buffers, cloudpickle where pickle does not suffice.

Theory of operation. A serialised value has one of three forms, told apart by its first byte:

    (empty)     None
    0x80 ...    a pickle without out-of-band buffers (0x80 is pickle's own first opcode)
    0x01 ...    a packed value: header, pickle, and buffers, each buffer 64-byte aligned relative to the start

The packed form is the same inline and in the store, so writing an object is one pass into its extent and reading it maps
the buffers in place. A buffer whose data was born in the store is not copied: its table entry names the part of the object
that it is in instead.

    header: u8 0x01, 3 zero bytes, u32 number of buffers, u64 length of the pickle
    table:  per buffer u64 offset (highest bit set: in the part whose number the next 15 bits tell), u64 length

Device arrays leave a mark in the pickle, and what they are made of in `Serialized.device` (`gpu_store.interop`). What is
never stored (functions, classes, errors) carries a copy of them, which becomes a device array again where there is a device.

Refs inside a value are found while it is pickled and unpickled: `ObjectRef.__reduce__` and its rebuilding function report to
the `Collector` of the running thread. Pickled anywhere else, a ref has no carrier, and is pinned for its owner's life.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import struct
import threading
from collections.abc import Callable, Sequence
from types import CodeType, FunctionType
from typing import Any

import cloudpickle
import numpy as np

from afield.causes import NOTHING_CARRIED, Cause, carried, load_unopened
from afield.code_names import reduce_code, remember_source
from afield.errors import CapacityError, DeserializationError, LossError, SerializationError
from afield.gpu_store.interop import DevicePacker, HostTensors, adapter_of
from afield.gpu_store.private_views import aligned_empty
from afield.runtime.process import current
from afield.runtime.process.culprits import find_culprit
from afield.tracebacks import trim
from afield.transport.interrupts import interruptible

ALIGNMENT = 64
PACKED = 1
IN_PART = 1 << 63
_PART_SHIFT = 48
_OFFSET_MASK = (1 << _PART_SHIFT) - 1
_HEADER = struct.Struct("<B3xIQ")
_PLACE = struct.Struct("<QQ")


class Arg:
    """Stands in the pickled arguments for top-level ref number `index`."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index

    def __reduce__(self) -> tuple[Any, ...]:
        return Arg, (self.index,)


#: Types that plain pickle treats exactly as cloudpickle does, so the slower pickler is not needed.
_PLAIN = frozenset([int, float, str, bytes, bool, type(None), complex, bytearray, Arg])
_MAX_PLAIN_ITEMS = 128

Buffers = list[pickle.PickleBuffer]


class Collector(threading.local):
    """What (de)serialisation on this thread reports to; None outside of the runtime's own (de)serialisation."""

    #: Appended to by refs that are pickled.
    refs: list[bytes] | None = None
    #: Called by refs that are unpickled: (object id, owner).
    on_ref: Callable[[bytes, bytes], None] | None = None


collector = Collector()


class Serialized:
    """A pickled value: the pickle, its out-of-band buffers, the ids of the refs inside it, and its device arrays."""

    __slots__ = ("buffers", "device", "pickled", "refs")

    def __init__(
        self, pickled: bytes, buffers: list[memoryview], refs: list[bytes], device: DevicePacker | None = None
    ) -> None:
        self.pickled = pickled
        self.buffers = buffers
        self.refs = refs
        self.device = device

    def fits(self, inline_bytes: int) -> bool:
        """Tell whether the value can travel inside a message of that size."""
        return self.device is None and self.size <= inline_bytes

    @property
    def size(self) -> int:
        """Bytes that the value takes inline or in one extent."""
        if not self.buffers:
            return len(self.pickled)
        size = _HEADER.size + _PLACE.size * len(self.buffers) + len(self.pickled)
        for buffer in self.buffers:
            size = aligned(size) + buffer.nbytes
        return size

    def pack(self) -> bytes:
        """Return the inline form."""
        if not self.buffers:
            return self.pickled
        out = bytearray(self.size)
        self.write(memoryview(out))
        return bytes(out)

    def write(self, target: memoryview, born: Sequence[tuple[int, int] | None] | None = None) -> int:
        """Write the packed form into `target` and return its length; `born[i]` is (part, offset) of a buffer that stays."""
        count = len(self.buffers)
        if not count:
            copy_bytes(target[: len(self.pickled)], memoryview(self.pickled))
            return len(self.pickled)
        start = _HEADER.size + _PLACE.size * count
        _HEADER.pack_into(target, 0, PACKED, count, len(self.pickled))
        position = start + len(self.pickled)
        copy_bytes(target[start:position], memoryview(self.pickled))
        for index, buffer in enumerate(self.buffers):
            place = born[index] if born else None
            if place is not None:
                where = IN_PART | place[0] << _PART_SHIFT | place[1]
                _PLACE.pack_into(target, _HEADER.size + _PLACE.size * index, where, buffer.nbytes)
                continue
            position = aligned(position)
            _PLACE.pack_into(target, _HEADER.size + _PLACE.size * index, position, buffer.nbytes)
            copy_bytes(target[position : position + buffer.nbytes], buffer)
            position += buffer.nbytes
        return position


def aligned(size: int) -> int:
    """Round up to the alignment of buffers."""
    return (size + ALIGNMENT - 1) & -ALIGNMENT


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Copy equally long buffers; large copies release the interpreter lock."""
    if source.nbytes < 65536:
        target[:] = source
    else:
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def _room_after(value: Any, room: int) -> int:
    """Return how many more plain items there may be after `value`; less than 0 if it is not plain or has too many.

    So it also comes to an end with a list that contains itself.
    """
    kind = type(value)
    if kind in _PLAIN:
        return room - 1
    if (kind is not tuple and kind is not list and kind is not dict) or len(value) > room:
        return -1
    if kind is dict:
        value = [*value, *value.values()]
    room -= 1
    for item in value:
        room = room - 1 if type(item) in _PLAIN else _room_after(item, room)
        if room < 0:
            return -1
    return room


def dumps_plain(value: Any) -> bytes | None:
    """Return the pickle of a small value made of builtins, which contains no refs; None if it is not one."""
    if value is None:
        return b""
    if type(value) in _PLAIN or _room_after(value, _MAX_PLAIN_ITEMS) >= 0:
        return pickle.dumps(value, 5)
    return None


@interruptible
def serialize(value: Any, what: str, *, stored: bool = True) -> Serialized:
    """Pickle any value; `what` names it in errors. One that cannot be `stored` carries copies of its device arrays.

    Raises:
        SerializationError: it cannot be pickled; names the attribute that is to blame.
    """
    buffers: Buffers = []
    packer: DevicePacker | None = None
    outer = collector.refs
    refs: list[bytes] = []
    collector.refs = refs
    try:
        if type(value) is np.ndarray and not value.dtype.hasobject:
            pickled = pickle.dumps(value, 5, buffer_callback=buffers.append)
        else:
            packer = DevicePacker() if stored else None
            if packer is not None and _is_of_arrays(value):
                pickled = _pickle_arrays(value, buffers, packer)
            else:
                pickled = _pickle(value, buffers, packer)
        raw = [buffer.raw() for buffer in buffers]
    except Exception as error:
        if packer is not None:
            packer.close()
        trim(error, foreseen=True)
        raise unpicklable(value, what, error) from error
    finally:
        collector.refs = outer
    return Serialized(pickled, raw, refs, packer or None)


class _Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
    """Cloudpickle's pickler, with device arrays left to a packer, and code that keeps the name of its file."""

    packer: DevicePacker | None
    tensors: HostTensors | None = None

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is CodeType:
            return reduce_code(self, obj)
        if kind is FunctionType:
            reduced = super().reducer_override(obj)
            if reduced is not NotImplemented:
                remember_source(obj)
            return reduced
        adapter = adapter_of(kind)
        if adapter is not None:
            if self.packer is not None:
                reduced = self.packer.reduce(obj)
                if reduced is not None:
                    return reduced
            elif adapter.kind in _COPIED:
                return array_here, (obj.get(),)
            if adapter.kind == "torch":
                if self.tensors is None:
                    self.tensors = HostTensors()
                reduced = self.tensors.reduce(obj)
                if reduced is not None:
                    return reduced
        return super().reducer_override(obj)


#: Adapters of arrays that `array_here` makes; those of other libraries are left to them where they are not stored.
_COPIED = frozenset({"emulated", "cupy"})


def array_here(host: np.ndarray[Any, Any]) -> Any:
    """Return a copied array on this process's device, or as it is where there is none; named in pickles."""
    return host if current.values is None else current.values.array_here(host)


@interruptible
def _pickle(value: Any, buffers: Buffers | None, packer: DevicePacker | None) -> bytes:
    """Return the pickle; what refers to the value's parts is gone with this frame, but for the buffers."""
    out = io.BytesIO()
    pickler = _Pickler(out, 5, None if buffers is None else buffers.append)
    pickler.packer = packer
    pickler.dump(value)
    return out.getvalue()


class _ArrayPickler(pickle.Pickler):
    """Pickle's own pickler, which is made in a tenth of the time."""

    packer: DevicePacker

    def reducer_override(self, obj: Any) -> Any:
        reduced = self.packer.reduce(obj)
        return NotImplemented if reduced is None else reduced


def _is_of_arrays(value: Any) -> bool:
    """Tell whether a value is a device array, or a few of them with plain items in a container: no matter for cloudpickle."""
    kind = type(value)
    if (kind is tuple or kind is list or kind is dict) and len(value) <= _MAX_PLAIN_ITEMS:
        items = value if kind is not dict else [*value, *value.values()]
        return all(type(item) in _PLAIN or _is_array(type(item)) for item in items)
    return _is_array(kind)


def _is_array(kind: type) -> bool:
    adapter = adapter_of(kind)
    return adapter is not None and adapter.takes_all


@interruptible
def _pickle_arrays(value: Any, buffers: Buffers, packer: DevicePacker) -> bytes:
    """As `_pickle`, for what `_is_of_arrays` accepts."""
    out = io.BytesIO()
    pickler = _ArrayPickler(out, 5, buffer_callback=buffers.append)
    pickler.packer = packer
    pickler.dump(value)
    return out.getvalue()


class Failure:
    """A stored error that stands for a value: whoever reads it raises it."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return Failure, (self.error,)


@interruptible
def serialize_error(error: BaseException) -> bytes:
    """Return the inline form of an error that stands for a value."""
    return serialize(error, "the error", stored=False).pack()


@interruptible
def _reduce_cause(cause: Cause) -> tuple[Any, ...]:
    """Pickle a user's exception by itself; of several attempts the last one counts, also for the refs that are in it."""
    outer = collector.refs
    try:
        reduced = carried(cause.error, _dumps_afresh)
        if outer is not None and collector.refs is not None and reduced != NOTHING_CARRIED:
            outer += collector.refs
        return reduced
    finally:
        collector.refs = outer


copyreg.pickle(Cause, _reduce_cause)


def _dumps_afresh(value: Any) -> bytes:
    if collector.refs is not None:
        collector.refs = []
    return _pickle(value, None, None)


def deserialize_unopened(data: bytes, what: str) -> Any:
    """Rebuild an error without running code of the user's: what a task raised is passed on as it is."""
    return deserialize(data, what, None, load=load_unopened)


@interruptible
def deserialize(
    data: bytes | memoryview,
    what: str,
    on_ref: Callable[[bytes, bytes], None] | None,
    parts: Sequence[Any] = (),
    load: Callable[..., Any] = pickle.loads,
) -> Any:
    """Rebuild a value from any of the three forms.

    Args:
        data: the serialised value; its buffers become read-only views of it, so it must stay unchanged while they live.
        what: names the value in errors.
        on_ref: called for each ref inside the value.
        parts: the memory of the object's parts, of which the born buffers are memoryviews.
        load: what unpickles.

    Raises:
        DeserializationError: a class cannot be found here, or its code raised.
        LossError, CapacityError: the device on which it was to be rebuilt is lost, or has no room.
    """
    if not len(data):
        return None
    outer = collector.on_ref
    collector.on_ref = on_ref
    try:
        if data[0] != PACKED:
            return load(data)
        view = memoryview(data) if type(data) is not bytes else _aligned_copy(data)
        _, count, length = _HEADER.unpack_from(view, 0)
        start = _HEADER.size + _PLACE.size * count
        buffers = []
        for index in range(count):
            offset, size = _PLACE.unpack_from(view, _HEADER.size + _PLACE.size * index)
            if offset & IN_PART:
                start_in_part = offset & _OFFSET_MASK
                buffers.append(parts[(offset ^ IN_PART) >> _PART_SHIFT][start_in_part : start_in_part + size])
            else:
                buffers.append(view[offset : offset + size])
        return load(view[start : start + length], buffers=buffers)
    except (LossError, CapacityError):
        raise  # a device on which it was to be rebuilt is lost or full: its classes have nothing to do with that
    except Exception as error:
        trim(error, foreseen=True)
        if isinstance(error, ImportError | AttributeError):
            remedy = (
                "Its classes must be importable here: install the module that defines them, or pass it with "
                "runtime_env={'py_modules': [...]}."
            )
        else:
            remedy = (
                "The code that rebuilds it raised this: see the __reduce__ or __setstate__ of its class. An exception without "
                "a __reduce__ of its own is rebuilt by a call of its class with its `args`."
            )
        raise DeserializationError(
            f"{what} cannot be rebuilt in this process: {type(error).__name__}: {error}. {remedy}"
        ) from error
    finally:
        collector.on_ref = outer


def _aligned_copy(data: bytes) -> memoryview:
    """Return an inline value where its buffers, which are aligned within it, are aligned in memory too."""
    room = aligned_empty(len(data))
    room.data[:] = data
    return room.data.toreadonly()


def unpicklable(value: Any, what: str, error: BaseException) -> SerializationError:
    """Make the error that names the part of `value` that is to blame."""
    if isinstance(error, SerializationError):
        return error
    path, culprit = find_culprit(value, what)
    kind = type(culprit)
    return SerializationError(
        f"cannot pickle {what}: {path} is a {kind.__module__}.{kind.__qualname__} ({type(error).__name__}: {error}). "
        "Create it inside the task, keep it in an actor, or give its class a __reduce__ method."
    )
