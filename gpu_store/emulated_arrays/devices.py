"""An emulated device as its arrays see it: where memory comes from, how much is in use, and which device is current.

Theory of operation. `DeviceMemory` is one device: it asks its allocator for bytes, keeps account of what lives, and lays
NumPy arrays over them. Each allocation has one `Holder`, the object at the root of every view's chain of `base`s: so
that any NumPy array can be asked whether it lies in device memory (`holder_of`), and so that the allocation goes back
when the last view, of whatever kind, is gone; `account` counts their bytes.

`DeviceSet` is what one process can see: numbered devices, and the current one of each thread, as in CUDA. Arrays that
are unpickled have nobody to tell them where to go, so a process may name one set as its own (`set_process_devices`).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol, cast

import numpy as np

from afield.errors import NoDeviceError
from afield.gpu_store.emulated_arrays.account import ALIGNMENT, Account

#: A device that a process makes for itself, because it unpickles a device array and was given no devices.
STANDALONE_BYTES = 4 << 30

#: What `deviceGetAttribute` and `Device.attributes` tell: CUDA's number of an attribute, and its value here.
ATTRIBUTES = {
    "MaxThreadsPerBlock": (1, 1024),
    "MaxBlockDimX": (2, 1024),
    "MaxBlockDimY": (3, 1024),
    "MaxBlockDimZ": (4, 64),
    "MaxGridDimX": (5, 2147483647),
    "MaxGridDimY": (6, 65535),
    "MaxGridDimZ": (7, 65535),
    "MaxSharedMemoryPerBlock": (8, 49152),
    "TotalConstantMemory": (9, 65536),
    "WarpSize": (10, 32),
    "MaxRegistersPerBlock": (12, 65536),
    "MultiProcessorCount": (16, 1),
    "Integrated": (18, 0),
    "ConcurrentKernels": (31, 1),
    "PciBusId": (33, 0),
    "PciDeviceId": (34, 0),
    "UnifiedAddressing": (41, 1),
    "PciDomainId": (50, 0),
    "ManagedMemory": (83, 0),
    "ConcurrentManagedAccess": (89, 0),
    "MemoryPoolsSupported": (115, 0),
}

Array = np.ndarray[Any, np.dtype[Any]]

_UNLIMITED = 1 << 62

# CuPy's dtypes: bool, integers, floats up to 64 bits, complex up to 128 bits.
_LARGEST_ITEM = {"b": 1, "i": 8, "u": 8, "f": 8, "c": 16}

# The usual ones, so that they are known at a glance.
_PLAIN_DTYPES = frozenset("?bBhHiIlLqQefdFD")

# Zero-size arrays need some address; nobody reads it.
_NOTHING = np.empty(ALIGNMENT, np.uint8)


class Allocator(Protocol):
    """Where a device's memory comes from.

    `allocate` returns at least `nbytes` (> 0) writable bytes, aligned for any dtype, and an object that keeps them
    allocated for as long as it is referred to. It raises OutOfDeviceMemoryError when there is no room. With an attribute
    `knows_the_limit` that is true, its word is the last: arrays are counted, but not against the device's memory.
    """

    def allocate(self, nbytes: int) -> tuple[memoryview, object]: ...


class DeviceLike(Protocol):
    """What describes a device; `afield.scheduler.devices.Device` does."""

    @property
    def uuid(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def memory_bytes(self) -> int: ...


class CUDARuntimeError(NoDeviceError, RuntimeError):
    """What the CUDA runtime would refuse: `cuda.runtime.CUDARuntimeError`."""


class CappedAllocator:
    """An allocator for stand-alone use: private memory of this process with a hard capacity in bytes."""

    def __init__(self, capacity_bytes: int, label: str = "the emulated device") -> None:
        self._account = Account(label, capacity_bytes)

    @property
    def used_bytes(self) -> int:
        return self._account.used_bytes

    def allocate(self, nbytes: int) -> tuple[memoryview, object]:
        lease = self._account.take(nbytes)
        block = np.empty(nbytes + ALIGNMENT, np.uint8)
        start = -block.ctypes.data % ALIGNMENT
        return memoryview(cast(Any, block))[start : start + nbytes], lease


class Holder:
    """The root of all views of one allocation: keeps it alive, and tells whose memory it is."""

    __slots__ = ("__array_interface__", "__weakref__", "device", "lease", "memory", "owner")

    def __init__(self, device: DeviceMemory, interface: dict[str, Any], memory: Any, owner: object, lease: object):
        self.device = device
        self.__array_interface__ = interface
        self.memory = memory
        self.owner = owner
        self.lease = lease


def holder_of(array: Array) -> Holder | None:
    """Return the allocation that a NumPy array is a view of, None where it does not lie in device memory."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if type(base) is Holder else None


def checked_dtype(dtype: Any) -> np.dtype[Any]:
    """Return the dtype in native byte order; raises ValueError for one that no device array can have."""
    checked: np.dtype[Any] = np.dtype(dtype)
    if checked.char in _PLAIN_DTYPES and checked.isnative:
        return checked
    if checked.itemsize > _LARGEST_ITEM.get(checked.kind, -1):
        raise ValueError(f"Unsupported dtype {checked}: device arrays hold bools, integers, floats and complex numbers")
    native: np.dtype[Any] = checked.newbyteorder("=")
    return native


def bytes_of(array: Array) -> Array:
    """Return the bytes of the allocation that a device array is a view of, as far as any view of it reaches."""
    root: Any = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    holder = root.base
    assert type(holder) is Holder, "device arrays lie in device memory"
    start, end = np.lib.array_utils.byte_bounds(root)
    nbytes = end - start if root.size else 0
    interface = {
        "version": 3,
        "data": (start, not root.flags.writeable),
        "shape": (nbytes,),
        "typestr": "|u1",
        "strides": None,
    }
    return np.asarray(Holder(holder.device, interface, holder.memory, holder.owner, (holder.lease, root)))


def dtype_in_place(dtype: Any) -> np.dtype[Any]:
    """Return the dtype that bytes in device memory are to be read as; raises ValueError for one that no array can have.

    Unlike `checked_dtype` it refuses a foreign byte order: values can be converted while they are copied, bytes that are
    there already would silently be other values.
    """
    wanted: np.dtype[Any] = np.dtype(dtype)
    if wanted.char in _PLAIN_DTYPES and wanted.isnative:
        return wanted
    if checked_dtype(wanted) != wanted:
        raise ValueError(
            f"Unsupported dtype {wanted.str}: device arrays are in the byte order of the machine; copy with astype(x) instead"
        )
    return wanted


class DeviceMemory:
    """One device, as arrays know it: its number in this process, its UUID, and its memory."""

    def __init__(self, index: int, description: DeviceLike, allocator: Allocator) -> None:
        self.id = index
        self.uuid = description.uuid
        self.name = description.name
        self.memory_bytes = description.memory_bytes
        self.allocator = allocator
        #: What the account says no at, unless the user sets a limit of his own.
        self.limit_bytes = _UNLIMITED if getattr(allocator, "knows_the_limit", False) else description.memory_bytes
        #: What this process's arrays hold; the allocator has limits of its own.
        self.account = Account(f"the memory pool of device {index} ({self.uuid})", self.limit_bytes)
        self.set: DeviceSet | None = None
        #: Called before an operation on this device's memory; raises where the device was lost.
        self.on_use: Callable[[], None] | None = None

    def __repr__(self) -> str:
        return f"<memory of device {self.id}, {self.uuid}>"

    @property
    def current(self) -> DeviceMemory:
        """Where a call that is made now puts its results: the thread's current device, whose arrays it takes or not."""
        return self if self.set is None else self.set.current

    def touch(self) -> None:
        """An operation begins; raises what `on_use` raises."""
        if self.on_use is not None:
            self.on_use()

    def empty(self, shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None = None) -> Array:
        """Return an uninitialised array; `strides` must be a dense layout of `shape`. Raises OutOfDeviceMemoryError."""
        checked = checked_dtype(dtype)
        if shape and min(shape) < 0:
            raise ValueError("negative dimensions are not allowed")
        self.touch()
        nbytes = math.prod(shape) * checked.itemsize
        if nbytes == 0:
            return self._lay(None, None, None, shape, checked, strides, 0)
        lease = self.account.take(nbytes)
        memory, owner = self.allocator.allocate(nbytes)
        return self._lay(memory, owner, lease, shape, checked, strides, 0)

    def empty_like(self, array: Array, dtype: Any = None) -> Array:
        """Return an uninitialised array of the shape and, as far as it is dense, the layout of `array`."""
        dtype = checked_dtype(array.dtype if dtype is None else dtype)
        return self.empty(array.shape, dtype, dense_strides(array, dtype.itemsize))

    def copy_in(self, array: Array) -> Array:
        """Return a copy of `array` in this device's memory."""
        target = self.empty_like(array)
        np.copyto(target, array)
        return target

    def adopt(
        self,
        memory: memoryview,
        owner: object,
        shape: tuple[int, ...],
        dtype: Any,
        strides: tuple[int, ...] | None = None,
        offset_bytes: int = 0,
    ) -> Array:
        """Return an array over memory that is this device's already; read-only if `memory` is.

        Raises ValueError where the array would reach outside `memory`.
        """
        checked = dtype_in_place(dtype)
        if 0 not in shape:
            layout = strides if strides is not None else _c_strides(shape, checked.itemsize)
            spans = [(extent - 1) * stride for extent, stride in zip(shape, layout, strict=True)]
            first = offset_bytes + sum(span for span in spans if span < 0)
            end = offset_bytes + sum(span for span in spans if span > 0) + checked.itemsize
            if first < 0 or end > memory.nbytes:
                raise ValueError(f"bytes {first} to {end} do not lie in a memory of {memory.nbytes} bytes")
        return self._lay(memory, owner, None, shape, checked, strides, offset_bytes)

    def adopt_array(self, array: Array) -> Array:
        """Return the same memory as an array of this device; `array` is kept alive by it."""
        dtype_in_place(array.dtype)
        return np.asarray(Holder(self, array.__array_interface__, None, array, None))

    def _lay(
        self,
        memory: memoryview | None,
        owner: object,
        lease: object,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        strides: tuple[int, ...] | None,
        offset_bytes: int,
    ) -> Array:
        raw = _NOTHING if memory is None else np.frombuffer(memory, np.uint8)
        interface = {
            "version": 3,
            "data": (raw.ctypes.data + offset_bytes, not raw.flags.writeable),
            "shape": shape,
            "typestr": dtype.str,
            "strides": strides,
        }
        return np.asarray(Holder(self, interface, raw, owner, lease))


def _c_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def dense_strides(array: Array, itemsize: int) -> tuple[int, ...] | None:
    """Return strides that order the axes in memory as `array` does, without gaps; None for plain C order."""
    if array.flags.c_contiguous:
        return None
    strides = [0] * array.ndim
    step = itemsize
    # Of equal strides the later axis is the inner one, as in C order.
    for axis in sorted(range(array.ndim), key=lambda axis: (abs(array.strides[axis]), -axis)):
        strides[axis] = step
        step *= max(array.shape[axis], 1)
    return tuple(strides)


class DeviceSet:
    """The devices that this process sees, and the current one of each thread (at first what `initial` says)."""

    def __init__(self, devices: Iterable[DeviceMemory], initial: Callable[[], int] | None = None) -> None:
        self.devices = tuple(devices)
        if not self.devices:
            raise NoDeviceError(
                "an array module needs a device: write devices='emulated:1' or AFIELD_DEVICES=emulated:1"
            )
        self._initial = initial or (lambda: 0)
        self._of_thread = threading.local()
        #: The array module that was made where a pickled one named no importable module.
        self.module: Any = None
        for device in self.devices:
            device.set = self
        #: `cuda.Device` of this set.
        self.handle_type: type[Device] = type("Device", (Device,), {"_devices": self, "__module__": Device.__module__})

    @property
    def current(self) -> DeviceMemory:
        chosen: int | None = getattr(self._of_thread, "index", None)
        return self[self._initial() if chosen is None else chosen]

    def __getitem__(self, index: int) -> DeviceMemory:
        if not 0 <= index < len(self.devices):
            raise CUDARuntimeError(
                f"there is no device {index}: this process sees {len(self.devices)}, numbered from 0"
            )
        return self.devices[index]

    def by_uuid(self, uuid: str) -> DeviceMemory | None:
        return next((device for device in self.devices if device.uuid == uuid), None)

    def choose(self, index: int | None) -> int | None:
        """Make a device this thread's current one (None: the initial one again); return what was chosen before."""
        if index is not None:
            self[index]
        before: int | None = getattr(self._of_thread, "index", None)
        self._of_thread.index = index
        return before

    def enter(self, index: int) -> None:
        """Make a device current until this thread's next `leave`."""
        stack = self._of_thread.__dict__.setdefault("stack", [])
        stack.append(self.choose(index))

    def leave(self) -> None:
        self.choose(self._of_thread.stack.pop())


class Device:
    """`cuda.Device`: a handle of one device, by its number; `with` makes it the thread's current one."""

    _devices: ClassVar[DeviceSet]

    def __init__(self, device: int | Device | None = None) -> None:
        self.id = self._devices.current.id if device is None else int(device)
        self._memory = self._devices[self.id]

    @property
    def uuid(self) -> str:
        return self._memory.uuid

    @property
    def mem_info(self) -> tuple[int, int]:
        """(free, total) bytes, counting what this process's arrays hold."""
        total = self._memory.memory_bytes
        return total - self._memory.account.used_bytes, total

    @property
    def compute_capability(self) -> str:
        """No kernel runs here, so no capability: less than any that a program may ask for."""
        return "00"

    @property
    def pci_bus_id(self) -> str:
        """An address that no bus of a machine has, a different one for each device."""
        return f"FFFF:{self.id:02X}:00.0"

    @classmethod
    def from_pci_bus_id(cls, pci_bus_id: str) -> Device:
        for memory in cls._devices.devices:
            if cls(memory.id).pci_bus_id == pci_bus_id:
                return cls(memory.id)
        raise CUDARuntimeError(f"cudaErrorInvalidValue: no device has the bus id {pci_bus_id!r}")

    @property
    def attributes(self) -> dict[str, int]:
        return {name: value for name, (_, value) in ATTRIBUTES.items()}

    def use(self) -> None:
        self._devices.choose(self.id)

    def synchronize(self) -> None:
        """Wait for the device; every call on emulated arrays is complete when it returns."""

    def __enter__(self) -> Device:
        self._devices.enter(self.id)
        return self

    def __exit__(self, *_: object) -> None:
        self._devices.leave()

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return self.uuid == other.uuid if isinstance(other, Device) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.uuid)

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _handle, (self.uuid,)


def _handle(uuid: str) -> Device:
    devices = process_devices()
    return devices.handle_type((devices.by_uuid(uuid) or devices.current).id)


class _Standalone:
    uuid = "EMU-0000-0000-0000-0000"
    name = "emulated device 0"
    memory_bytes = STANDALONE_BYTES


class _Process:
    """The one thing that belongs to a process: where arrays go that come out of a pickle."""

    devices: DeviceSet | None = None
    lock = threading.RLock()


def set_process_devices(devices: DeviceSet | None) -> DeviceSet | None:
    """Name the devices that unpickled arrays go to; return those named before."""
    before, _Process.devices = _Process.devices, devices
    return before


def process_devices() -> DeviceSet:
    """Return the process's devices; one of its own is made where none were named."""
    with _Process.lock:
        if _Process.devices is None:
            _Process.devices = DeviceSet([DeviceMemory(0, _Standalone(), CappedAllocator(STANDALONE_BYTES))])
        return _Process.devices
