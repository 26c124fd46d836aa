"""Streams and events of the emulated devices: names for an order in which everything is done already.

Theory of operation. All work on emulated arrays is complete when its call returns, so there is nothing to order and nothing to
wait for. What programs can tell is which stream is the current one: each thread has one for each device, at first the null
stream; `use` puts another in its place, `with` does so until the block ends. A handle (`ptr`) is a number that `cuda.runtime`
knows; it is the stream's or the event's for as long as that lives.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn, Self

from afield.clock import monotonic
from afield.gpu_store.emulated_arrays.devices import CUDARuntimeError, DeviceSet

#: CUDA's own handles: the null stream, the same by its explicit name, and each thread's.
NULL, LEGACY, PER_THREAD = 0, 1, 2

_handles = itertools.count(0x1000, 0x10)
#: By handle, what lives; `cuda.runtime` keeps what it created itself.
_alive: weakref.WeakValueDictionary[int, Event | StreamBase] = weakref.WeakValueDictionary()


def found(handle: int, kind: type[Any]) -> Any:
    """Return the event or stream of a handle; raises CUDARuntimeError where there is none."""
    if issubclass(kind, StreamBase) and handle in (NULL, LEGACY, PER_THREAD):
        return Stream.ptds if handle == PER_THREAD else Stream.null
    known = _alive.get(int(handle))
    if isinstance(known, kind):
        return known
    raise CUDARuntimeError(f"cudaErrorInvalidResourceHandle: {handle:#x} is no {kind.__name__.lower()} of this process")


class Event:
    """A point in a stream; `get_elapsed_time` tells the milliseconds between two."""

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        self.ptr = next(_handles)
        self._timed = not disable_timing
        self._at_s: float | None = None
        _alive[self.ptr] = self

    @property
    def done(self) -> bool:
        return True

    def record(self, stream: Any = None) -> None:
        self._at_s = monotonic()

    def synchronize(self) -> None:
        """Everything before the event is done already."""


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    """Return the milliseconds between two recorded events."""
    for event in (start_event, end_event):
        if event._at_s is None:
            raise CUDARuntimeError("cudaErrorInvalidResourceHandle: both events must have been recorded")
        if not event._timed:
            raise CUDARuntimeError("cudaErrorInvalidResourceHandle: an event was made with disable_timing")
    return ((end_event._at_s or 0.0) - (start_event._at_s or 0.0)) * 1e3


class _Current(threading.local):
    """The streams of one thread."""

    def __init__(self) -> None:
        self.of_device: dict[int, StreamBase] = {}
        self.left: list[tuple[int, StreamBase | None]] = []


class Currents:
    """The current stream of each thread, for each device of a set."""

    def __init__(self, devices: DeviceSet) -> None:
        self._devices = devices
        self._thread = _Current()

    def get(self, device_id: int = -1) -> StreamBase:
        device = self._devices.current.id if device_id < 0 else device_id
        return self._thread.of_device.get(device, Stream.null)

    def set(self, stream: StreamBase) -> tuple[int, StreamBase | None]:
        """Make a stream current; return the device, and what was current before."""
        device = self._devices.current.id
        if stream.device_id not in (-1, device):
            raise RuntimeError(
                f"this stream belongs to device {stream.device_id}, and device {device} is the current one: "
                "make and use a stream inside `with cuda.Device(n)`"
            )
        before = self._thread.of_device.get(device)
        self._thread.of_device[device] = stream
        return device, before

    def enter(self, stream: StreamBase) -> None:
        self._thread.left.append(self.set(stream))

    def leave(self) -> None:
        device, before = self._thread.left.pop()
        if before is None:
            self._thread.of_device.pop(device, None)
        else:
            self._thread.of_device[device] = before


class StreamBase:
    """What the two kinds of stream share."""

    #: Whose current streams `use` and `with` change; each module has classes of its own.
    _currents: ClassVar[Currents | None] = None

    ptr: int
    device_id: int

    @property
    def done(self) -> bool:
        return True

    @property
    def is_non_blocking(self) -> bool:
        return False

    @property
    def priority(self) -> int:
        return 0

    def is_capturing(self) -> bool:
        return False

    def use(self) -> Self:
        self._of_module().set(self)
        return self

    def synchronize(self) -> None:
        """Everything in the stream is done already."""

    def record(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        """Whatever the event stands for is done already."""

    def add_callback(self, callback: Callable[..., Any], arg: Any) -> None:
        """Call `callback(stream, 0, arg)`: what came before is done, so it is called here and now."""
        callback(self, 0, arg)

    def launch_host_func(self, callback: Callable[..., Any], arg: Any) -> None:
        callback(arg)

    def begin_capture(self, mode: Any = None) -> NoReturn:
        raise NotImplementedError("graphs are not there on emulated devices: there is no work left to be captured")

    def end_capture(self) -> NoReturn:
        raise NotImplementedError("graphs are not there on emulated devices: there is no work left to be captured")

    def __enter__(self) -> Self:
        self._of_module().enter(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._of_module().leave()

    def __eq__(self, other: object) -> bool:
        return self.ptr == other.ptr if isinstance(other, StreamBase) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.ptr)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.ptr} (device {self.device_id})>"

    def _of_module(self) -> Currents:
        assert self._currents is not None, "streams are made by the classes of a module"
        return self._currents


class Stream(StreamBase):
    """An order of work; every piece of work is done at once."""

    null: ClassVar[Stream]
    ptds: ClassVar[Stream]

    def __init__(
        self, null: bool = False, non_blocking: bool = False, ptds: bool = False, priority: Any = None
    ) -> None:
        self._non_blocking, self._priority = non_blocking, int(priority or 0)
        if null or ptds:
            self.ptr, self.device_id = (NULL if null else PER_THREAD), -1
            return
        self.ptr, self.device_id = next(_handles), self._of_module()._devices.current.id
        _alive[self.ptr] = self

    @property
    def is_non_blocking(self) -> bool:
        return self._non_blocking

    @property
    def priority(self) -> int:
        return self._priority

    @classmethod
    def from_external(cls, stream: Any) -> StreamBase:
        """Take a stream of another library, as `__cuda_stream__` gives it."""
        version, ptr = stream.__cuda_stream__()
        if version != 0:
            raise ValueError(f"version {version} of __cuda_stream__ is not known")
        return external_of(cls)(ptr)

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.ptr


class ExternalStream(StreamBase):
    """A stream that something else made, by its handle."""

    def __init__(self, ptr: int, device_id: int = -1) -> None:
        self.ptr, self.device_id = int(ptr), device_id


def external_of(stream_type: type[Stream]) -> type[ExternalStream]:
    """Return the class of external streams with the same current streams."""
    return type("ExternalStream", (ExternalStream,), {"_currents": stream_type._currents})


def stream_names(devices: DeviceSet) -> dict[str, Any]:
    """`cuda.stream`: the classes of one set of devices, and what is current there."""
    currents = Currents(devices)
    stream_type: type[Stream] = type("Stream", (Stream,), {"_currents": currents})
    stream_type.null, stream_type.ptds = stream_type(null=True), stream_type(ptds=True)

    def get_current_stream(device_id: int = -1) -> StreamBase:
        current = currents.get(device_id)
        return stream_type.null if current is Stream.null else current

    return {
        "Stream": stream_type,
        "ExternalStream": external_of(stream_type),
        "Event": Event,
        "get_current_stream": get_current_stream,
        "get_elapsed_time": get_elapsed_time,
    }


Stream.null = Stream(null=True)
Stream.ptds = Stream(ptds=True)
