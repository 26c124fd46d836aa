"""From a string to a device backend: the one place where a process learns which devices its session has.

Theory of operation. A session's processes are handed one string (`AFIELD_DEVICE_BACKEND`): "emulated:<address of the board>",
or "cuda:", after which devices that had more than one life are listed with their epoch ("cuda:GPU-1=2,GPU-2=3"), since no
driver counts lives. CUDA is imported only when it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from afield.gpu_store.backends.base import DeviceBackend, DeviceInfo, DeviceUsageError
from afield.units import parse_bytes

if TYPE_CHECKING:
    from afield.gpu_store.backends.emulated import EmulatedBackend


#: The speed of an emulated machine's links, such as "25GB/s"; without it they are as fast as the host's memory.
EMULATED_LINK = "AFIELD_EMULATED_LINK"


def open_backend(spec: str) -> DeviceBackend:
    """Return the backend that `spec` names, for this process.

    Raises NoDeviceError where it is not there (no CUDA, or the process that made the emulated machine has ended), and
    DeviceUsageError for a string that names none.
    """
    kind, _, rest = spec.partition(":")
    if kind == "emulated":
        from afield.gpu_store.backends.emulated import EmulatedBackend

        return EmulatedBackend.attach(rest)
    if kind == "cuda":
        epochs = _epochs(spec, rest)
        from afield.gpu_store.backends.cuda import CudaBackend

        return CudaBackend(epochs=epochs)
    raise _unknown(spec)


def create_emulated(devices: Sequence[DeviceInfo], link: str = "") -> EmulatedBackend:
    """Make a machine with emulated devices; its links carry `link` bytes a second ("25GB/s"), without that any number.

    Raises DeviceUsageError for a speed that is none, and for a device without room for a slab.
    """
    from afield.gpu_store.backends.emulated import EmulatedBackend, LinkSpeed

    speed = LinkSpeed(link_speed(link)) if link else LinkSpeed()
    return EmulatedBackend.create(devices, host_link=speed, peer_link=speed)


def link_speed(link: str) -> float:
    """Return the bytes a second that a text such as "25GB/s" means; raises DeviceUsageError if it is no speed."""
    try:
        speed = float(parse_bytes(link.removesuffix("/s")))
    except ValueError:
        raise DeviceUsageError(f"a link of {link[:40]!r} is no speed; write one such as 25GB/s") from None
    if not speed:
        raise DeviceUsageError("a link that carries nothing is of no use; write a speed such as 25GB/s")
    return speed


def cuda_spec(epochs: Mapping[str, int]) -> str:
    """Return the string for CUDA devices in these epochs; a device that is not among them is in its first."""
    return "cuda:" + ",".join(f"{uuid}={epoch}" for uuid, epoch in epochs.items() if epoch != 1)


def _epochs(spec: str, rest: str) -> dict[str, int]:
    epochs = {}
    for entry in filter(None, rest.split(",")):
        uuid, _, epoch = entry.partition("=")
        if not uuid or not epoch.isdecimal():
            raise _unknown(spec)
        epochs[uuid] = int(epoch)
    return epochs


def _unknown(spec: str) -> DeviceUsageError:
    return DeviceUsageError(f'{spec[:80]!r} names no device backend: there are "emulated:<address>" and "cuda:"')
