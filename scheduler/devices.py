"""Which devices this node has: the inventory, read from one setting.

Theory of operation. `devices=` (or AFIELD_DEVICES) says which backend provides devices and how many. A device is
named by its UUID everywhere, never by an index: what index 0 means depends on what a process is allowed to see. The
UUIDs of emulated devices are made from their number alone, so that a test, a log and a re-run name the same device
alike. Nothing is guessed: a setting that names no backend, or a backend that cannot serve, is an error with the
remedy in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from afield.errors import InvalidOptionError, NoDeviceError
from afield.units import parse_bytes

# Emulated memory is taken from the host only as far as it is touched; this much is a small real device.
DEFAULT_EMULATED_BYTES = 4 * 2**30

# The largest machines have 16 devices; the bound keeps a typing error from making a million.
MAX_EMULATED_DEVICES = 256

_EMULATED = re.compile(r"emulated:([0-9]{1,6})(?::([^:]+))?\Z", re.ASCII)
_EXAMPLES = 'write devices="emulated:2", devices="emulated:2:16GiB" (memory of each) or devices="none"'


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator; `index` is its place in this node's inventory, for people only; `kind` is the backend's name."""

    uuid: str
    index: int
    name: str
    memory_bytes: int
    kind: str


def parse_devices(spec: str | int | None) -> list[Device]:
    """Return the devices that `spec` asks for: "emulated:N", "emulated:N:16GiB"; "none", "", None and 0 give none.

    Raises NoDeviceError for a backend that cannot serve here and InvalidOptionError, with examples, for anything
    else.
    """
    if spec is None or (spec == 0 and not isinstance(spec, bool)):
        return []
    if not isinstance(spec, str):
        raise InvalidOptionError(f"devices={spec!r} does not say which kind of device is meant: {_EXAMPLES}")
    text = spec.strip()
    if text in ("", "none"):
        return []
    if text.split(":", 1)[0] == "cuda":
        raise NoDeviceError(
            f'devices="{text}": this version of afield cannot use CUDA devices yet; '
            'use emulated ones instead: devices="emulated:2" or AFIELD_DEVICES=emulated:2'
        )
    match = _EMULATED.match(text)
    if match is None:
        raise InvalidOptionError(f"devices={spec[:80]!r} is not understood: {_EXAMPLES}")
    count = int(match[1])
    if not 1 <= count <= MAX_EMULATED_DEVICES:
        raise InvalidOptionError(
            f"devices={spec!r}: from 1 to {MAX_EMULATED_DEVICES} devices can be emulated: {_EXAMPLES}"
        )
    return [emulated_device(index, _memory(spec, match[2])) for index in range(count)]


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
    if size_bytes == 0:
        raise InvalidOptionError(f"devices={spec!r}: a device without memory is of no use; {_EXAMPLES}")
    return size_bytes
