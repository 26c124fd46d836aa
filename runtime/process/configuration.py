"""What the processes of a session are told when they begin.

Theory of operation. There are two kinds of knowledge. What *every* process of a session knows is a `SessionConfig`. What *one*
process was told at its fork is a `ProcessConfig` (drivers and workers) or a `StoreConfig` (store processes): it travels as
variables of the environment, since tasks may read some of them, and is written and parsed here alone.

The driver writes a `ForkServerConfig` to the fork server, which is a new interpreter that looks for afield by itself: when the
package is upgraded in this moment, or another one is found first, the two are of different versions. So each such message
begins with a `Header`, which every version can read, and is decoded strictly after that. Paths and arguments are bytes: the
system has names that are no text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from afield.errors import VersionMismatchError
from afield.scheduler.devices import Device
from afield.version import PACKAGE, VERSION

#: A producer waits this long for room in the host store unless told otherwise.
STORE_WAIT_S = 10.0
#: How many bytes of values one process keeps for lineage alone, and the share of the host store that it may be at most.
LINEAGE_VALUE_BYTES = 256 << 20
LINEAGE_VALUE_SHARE = 1 / 16
#: The rows of the pin board: the node daemon's is 0, workers have those after the driver's.
DRIVER_INDEX = 1

#: The form of `ForkServerConfig`: raised when its fields, or those of what it holds, change.
FORM = 2
#: What a fork server and its driver must have in common.
STAMP = f"{VERSION}/{FORM}"
#: The fork server's exit status when its driver is of another version: EX_PROTOCOL of sysexits.h.
VERSION_MISMATCH_STATUS = 76

#: What a worker is told at its fork, in variables of its environment: its row of the pin board; the devices that it is bound to
#: (UUIDs, which its tasks may read too, and their numbers on the node); and what `open_backend` needs.
PROCESS_INDEX = "AFIELD_PROCESS_INDEX"
VISIBLE_DEVICES, VISIBLE_DEVICE_NUMBERS = "AFIELD_VISIBLE_DEVICES", "AFIELD_VISIBLE_DEVICE_NUMBERS"
DEVICE_BACKEND = "AFIELD_DEVICE_BACKEND"
#: What a store process is told at its fork, beside `DEVICE_BACKEND`: variables of its environment.
ARENA, LIFE, DEVICE = "AFIELD_STORE_ARENA", "AFIELD_STORE_LIFE", "AFIELD_STORE_DEVICE"
#: What CUDA goes by in both.
CUDA_VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


class SessionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What every process of a session knows: its name and secret, the shared memory, and some settings of the user's."""

    name: str
    token: bytes
    slab_fd: int
    capacity: int
    pins_fd: int
    store_wait_s: float = STORE_WAIT_S
    record_call_sites: bool = False
    #: Whether OMP_NUM_THREADS follows the CPUs of a worker's lease: the user has not set it.
    threads_by_cpus: bool = False
    lineage_bytes: int = LINEAGE_VALUE_BYTES

    def address(self, process_id: bytes) -> str:
        """Return the socket name of a process; the daemon's id is empty."""
        return address_of(self.name, self.token, process_id)


def address_of(session: str, token: bytes, process_id: bytes = b"") -> str:
    """Return the socket name of a process in the session of this name; the daemon's id is empty.

    Whoever does not know the session's secret cannot tell the name before the socket is there, and so cannot take it.
    """
    where = hashlib.blake2b(process_id, key=token, digest_size=16, person=b"afield address").hexdigest()
    return f"afield-{session}-{where}"


@dataclass(frozen=True, slots=True)
class ProcessConfig:
    """What a driver or a worker was told for itself."""

    kind: str = "driver"
    #: Its row of the pin board.
    index: int = DRIVER_INDEX
    #: Of a worker: arena number -> UUID of the devices that it is bound to for life, and what `open_backend` needs for them.
    bound: Mapping[int, str] = field(default_factory=dict)
    device_backend: str = ""

    def variables(self) -> dict[str, str]:
        """Return what a worker finds in its environment. Empty lists hide devices, so that none is used by accident."""
        uuids = ",".join(self.bound.values())
        return {
            CUDA_VISIBLE_DEVICES: uuids,
            VISIBLE_DEVICES: uuids,
            VISIBLE_DEVICE_NUMBERS: ",".join(str(arena - 1) for arena in self.bound),
            PROCESS_INDEX: str(self.index),
            DEVICE_BACKEND: self.device_backend,
        }

    @classmethod
    def of_worker(cls, variables: Mapping[str, str]) -> ProcessConfig:
        """Parse a worker's variables."""
        uuids = filter(None, variables[VISIBLE_DEVICES].split(","))
        numbers = filter(None, variables[VISIBLE_DEVICE_NUMBERS].split(","))
        bound = {1 + int(number): uuid for number, uuid in zip(numbers, uuids, strict=True)}
        return cls("worker", int(variables[PROCESS_INDEX]), bound, variables[DEVICE_BACKEND])


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """What a store process was told for itself: which arena in which of its lives, and the device, if it is not the disk."""

    arena: int
    life: int
    device: str = ""
    device_backend: str = ""
    #: UUIDs of all devices of the node: a store copies from the slabs of the others.
    visible: tuple[str, ...] = ()

    def variables(self) -> dict[str, str]:
        """Return what the process finds in its environment."""
        return {
            ARENA: str(self.arena),
            LIFE: str(self.life),
            DEVICE: self.device,
            DEVICE_BACKEND: self.device_backend,
            CUDA_VISIBLE_DEVICES: ",".join(self.visible),
        }

    @classmethod
    def of_store(cls, variables: Mapping[str, str]) -> StoreConfig:
        """Parse a store's variables."""
        visible = tuple(filter(None, variables[CUDA_VISIBLE_DEVICES].split(",")))
        return cls(int(variables[ARENA]), int(variables[LIFE]), variables[DEVICE], variables[DEVICE_BACKEND], visible)


class Header(msgspec.Struct, frozen=True):
    """What stays readable in every version: who has written this."""

    version: str = "that has no number"
    package: str = "an unknown place"


class ForkServerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the driver writes to the fork server's standard input, in msgpack."""

    version: str = STAMP
    package: str = PACKAGE
    session: SessionConfig
    #: The session's.
    directory: bytes
    lifeline_fd: int
    lock_fd: int
    #: Where workers begin, and `sys.argv` there.
    working_directory: bytes
    arguments: list[bytes]
    #: The node's id and what it has; the speed of emulated devices' links as `devices=` says it.
    node_id: bytes
    num_cpus: float
    memory: int
    resources: dict[str, float]
    devices: list[Device]
    emulated_link: str
    #: The job: its driver's id, the namespace of its actors, its environment as `Environment` encodes it.
    driver: bytes
    namespace: str
    environment: bytes

    def encode(self) -> bytes:
        """Return this as bytes."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, raw: bytes) -> ForkServerConfig:
        """Decode what a driver has written.

        Raises:
            VersionMismatchError: the driver's afield is another version than this one.
        """
        try:
            header = msgspec.msgpack.decode(raw, type=Header)
        except msgspec.DecodeError:
            header = Header()  # from before there were headers
        if header.version != STAMP:
            raise VersionMismatchError(
                f"two versions of afield are mixed: the program runs {header.version} from {header.package}, and its "
                f"session's processes found {STAMP} in {PACKAGE}. If the package was upgraded while the program ran, "
                f"start the program again; otherwise remove one of the two from sys.path (PYTHONPATH, site-packages)"
            )
        return msgspec.msgpack.decode(raw, type=cls)
