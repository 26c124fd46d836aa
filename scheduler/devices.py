"""Which devices this node has: the inventory, read from one setting.

Theory of operation. `devices=` (or AFIELD_DEVICES) says which backend provides devices and how many. A device is
named by its UUID everywhere, never by an index: what index 0 means depends on what a process is allowed to see. The
UUIDs of emulated devices are made from their number alone, so that a test, a log and a re-run name the same device
alike. What CUDA devices there are is asked of a callable that is handed in, and only where the setting says "cuda".
Nothing is guessed: a setting that names no backend, or a backend that cannot serve, is an error with the remedy in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from afield.errors import InvalidOptionError, NoDeviceError
from afield.units import parse_bytes

# Emulated memory is taken from the host only as far as it is touched; this much is a small real device.
DEFAULT_EMULATED_BYTES = 4 * 2**30

# Device memory is held in slabs of multiples of this, as on a CUDA device.
SMALLEST_EMULATED_BYTES = 2 * 2**20

# The largest machines have 16 devices; the bound keeps a typing error from making a million.
MAX_EMULATED_DEVICES = 256

_EMULATED = re.compile(r"emulated:([0-9]{1,6})(?::([^:]+))?\Z", re.ASCII)
_EXAMPLES = (
    'write devices="emulated:2", devices="emulated:2:16GiB" (memory of each), devices="cuda" (all), devices="cuda:2" '
    '(the first two), devices="cuda:GPU-...,GPU-..." (by UUID) or devices="none"'
)
_INSTEAD = 'use emulated devices instead: devices="emulated:2" or AFIELD_DEVICES=emulated:2'

# A part of a UUID that is shorter names nothing: "G" would be any device.
_SHORTEST_PREFIX = len("GPU-") + 1


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator; `index` is its place in this node's inventory, for people only; `kind` is the backend's name."""

    uuid: str
    index: int
    name: str
    memory_bytes: int
    kind: str


class Found(Protocol):
    """What an inventory says of a device."""

    @property
    def uuid(self) -> str: ...
    @property
    def index(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def memory_bytes(self) -> int: ...


AnyFound = TypeVar("AnyFound", bound=Found)
Inventory = Callable[[], Sequence[Found]]


def parse_devices(spec: str | int | None, cuda_inventory: Inventory | None = None) -> list[Device]:
    """Return the devices that `spec` asks for; "none", "", None and 0 give none.

    "emulated:N", "emulated:N:16GiB"; "cuda", "cuda:N", "cuda:UUID,UUID" (a UUID may be cut short where it still names
    one device), for which `cuda_inventory` is called once.

    Raises NoDeviceError for a backend that cannot serve here, or has too few devices, and InvalidOptionError, with
    examples, for anything else; and what `cuda_inventory` raises.
    """
    if spec is None or (spec == 0 and not isinstance(spec, bool)):
        return []
    if not isinstance(spec, str):
        raise InvalidOptionError(f"devices={spec!r} does not say which kind of device is meant: {_EXAMPLES}")
    text = spec.strip()
    if text in ("", "none"):
        return []
    kind, _, rest = text.partition(":")
    if kind == "cuda":
        return _cuda_devices(text, rest if ":" in text else None, cuda_inventory)
    match = _EMULATED.match(text)
    if match is None:
        raise InvalidOptionError(f"devices={spec[:80]!r} is not understood: {_EXAMPLES}")
    count = int(match[1])
    if not 1 <= count <= MAX_EMULATED_DEVICES:
        raise InvalidOptionError(
            f"devices={spec!r}: from 1 to {MAX_EMULATED_DEVICES} devices can be emulated: {_EXAMPLES}"
        )
    return [emulated_device(index, _memory(spec, match[2])) for index in range(count)]


def _cuda_devices(text: str, wanted: str | None, inventory: Inventory | None) -> list[Device]:
    """Choose from the inventory: all, the first so many, or those that are named."""
    names = None if wanted is None else [name.strip() for name in wanted.split(",")]
    count = int(wanted) if wanted is not None and re.fullmatch(r"[0-9]{1,6}", wanted, re.ASCII) else None
    if count == 0 or (names and count is None and any(not name.startswith("GPU-") for name in names)):
        raise InvalidOptionError(f"devices={text[:80]!r} is not understood: {_EXAMPLES}")
    if inventory is None:
        raise NoDeviceError(f'devices="{text}": nothing here can look for CUDA devices; {_INSTEAD}')
    found = list(inventory())
    if not found:
        raise NoDeviceError(f'devices="{text}": there is no CUDA device that this process may see; {_INSTEAD}')
    if count is not None and count > len(found):
        raise NoDeviceError(f'devices="{text}": there are {len(found)} CUDA devices: {_listed(found)}; {_INSTEAD}')
    chosen = found[:count] if names is None or count is not None else [_named(text, name, found) for name in names]
    if len({one.uuid for one in chosen}) < len(chosen):
        raise InvalidOptionError(f"devices={text[:200]!r} names a device twice")
    return [Device(one.uuid, index, one.name, one.memory_bytes, "cuda") for index, one in enumerate(chosen)]


def _named(text: str, name: str, found: Sequence[Found]) -> Found:
    matching = [one for one in found if len(name) >= _SHORTEST_PREFIX and one.uuid.startswith(name)]
    if len(matching) != 1:
        what = f"{len(matching)} devices have" if matching else "no device has"
        raise NoDeviceError(f'devices="{text[:200]}": {what} the UUID {name}; there are: {_listed(found)}')
    return matching[0]


def _listed(found: Sequence[Found]) -> str:
    return ", ".join(f"{one.uuid} ({one.name})" for one in found)


def visible_devices(found: Sequence[AnyFound], setting: str | None, bus_order: bool) -> list[AnyFound]:
    """Return those of `found` (in the order of the PCI bus) that CUDA shows a process with CUDA_VISIBLE_DEVICES=`setting`.

    As in CUDA the list ends at the first entry that names nothing. Numbers count in the order of the bus, which is
    CUDA's own where `bus_order` (CUDA_DEVICE_ORDER=PCI_BUS_ID) or where all devices are alike.

    Raises NoDeviceError where the setting has numbers and CUDA's order cannot be known.
    """
    if setting is None:
        return list(found)
    chosen: list[AnyFound] = []
    for entry in map(str.strip, setting.split(",")):
        if re.fullmatch(r"[0-9]{1,4}", entry, re.ASCII):
            if not bus_order and len({one.name for one in found}) > 1:
                raise NoDeviceError(
                    f"CUDA_VISIBLE_DEVICES={setting} has numbers, and the devices here are of several kinds, which CUDA "
                    f"numbers by speed: set CUDA_DEVICE_ORDER=PCI_BUS_ID as well, or write UUIDs: {_listed(found)}"
                )
            matching = [one for place, one in enumerate(found) if place == int(entry)]
        else:
            matching = [one for one in found if len(entry) >= _SHORTEST_PREFIX and one.uuid.startswith(entry)]
        if len(matching) != 1 or matching[0] in chosen:
            break
        chosen += matching
    return chosen


def emulated_device(index: int, memory_bytes: int = DEFAULT_EMULATED_BYTES) -> Device:
    """Return the description of the emulated device with this number."""
    return Device(f"EMU-{index:04d}-0000-0000-0000", index, f"emulated device {index}", memory_bytes, "emulated")


def _memory(spec: str, text: str | None) -> int:
    if text is None:
        return DEFAULT_EMULATED_BYTES
    try:
        size_bytes = parse_bytes(text)
    except ValueError as error:
        raise InvalidOptionError(f"devices={spec!r}: {error}; {_EXAMPLES}") from None
    if size_bytes < SMALLEST_EMULATED_BYTES:
        raise InvalidOptionError(f"devices={spec!r}: a device needs at least 2 MiB of memory; {_EXAMPLES}")
    return size_bytes
