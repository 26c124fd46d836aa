"""What the processes of a session are told when they begin: the session's configuration, and the variables of a fork."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

#: A producer waits this long for room in the host store unless told otherwise.
STORE_WAIT_S = 10.0
#: The rows of the pin board: the node daemon's is 0, workers have those after the driver's.
DRIVER_INDEX = 1

#: What a worker is told at its fork, in variables of its environment: its row of the pin board; the devices that it is bound to
#: (UUIDs, which its tasks may read too, and their numbers on the node); and what `open_backend` needs.
PROCESS_INDEX = "AFIELD_PROCESS_INDEX"
VISIBLE_DEVICES, VISIBLE_DEVICE_NUMBERS = "AFIELD_VISIBLE_DEVICES", "AFIELD_VISIBLE_DEVICE_NUMBERS"
DEVICE_BACKEND = "AFIELD_DEVICE_BACKEND"
#: What a store process is told at its fork, beside `DEVICE_BACKEND`: variables of its environment.
ARENA, LIFE, DEVICE = "AFIELD_STORE_ARENA", "AFIELD_STORE_LIFE", "AFIELD_STORE_DEVICE"


class SessionConfig:
    """What every process of a session must know."""

    __slots__ = (
        "bound",
        "capacity",
        "device_backend",
        "in_worker",
        "pins_fd",
        "process_index",
        "record_call_sites",
        "session",
        "slab_fd",
        "store_wait_s",
        "token",
    )

    def __init__(
        self, session: str, token: bytes, slab_fd: int, capacity: int, pins_fd: int, store_wait_s: float
    ) -> None:
        self.session = session
        self.token = token
        self.slab_fd = slab_fd
        self.capacity = capacity
        self.pins_fd = pins_fd
        self.store_wait_s = store_wait_s
        self.record_call_sites = False
        #: This process's row of the pin board.
        self.process_index = DRIVER_INDEX
        self.in_worker = False
        #: Of a worker: arena number -> UUID of the devices that it is bound to for life, and the session's device backend.
        self.bound: dict[int, str] = {}
        self.device_backend = ""

    def become_worker(self, variables: Mapping[str, str]) -> None:
        """Take in what the daemon tells a worker that is forked."""
        uuids = filter(None, variables[VISIBLE_DEVICES].split(","))
        numbers = filter(None, variables.get(VISIBLE_DEVICE_NUMBERS, "").split(","))
        self.in_worker = True
        self.process_index = int(variables[PROCESS_INDEX])
        self.bound = {1 + int(number): uuid for number, uuid in zip(numbers, uuids, strict=True)}
        self.device_backend = variables[DEVICE_BACKEND]

    def address(self, process_id: bytes) -> str:
        """Return the socket name of a process; the daemon's id is empty."""
        return f"afield-{self.session}-{process_id.hex() or 'node'}"


class ForkServerConfig(msgspec.Struct):
    """What the driver writes to the fork server's standard input, as JSON."""

    session: str
    directory: str
    token: str
    slab_fd: int
    capacity: int
    pins_fd: int
    lifeline_fd: int
    store_wait_s: float
    sys_path: list[str]
    working_directory: str
    arguments: list[str]
    num_cpus: float
    devices: list[dict[str, Any]]
    emulated_link: str  # the speed of emulated devices' links
    resources: dict[str, float]
    memory: int
    namespace: str
    node_id: str
    environment: str  # the job's, in hexadecimal
    driver: str
    lock_fd: int
    record_call_sites: bool

    def session_config(self) -> SessionConfig:
        """Return the part that every process needs."""
        token = bytes.fromhex(self.token)
        config = SessionConfig(self.session, token, self.slab_fd, self.capacity, self.pins_fd, self.store_wait_s)
        config.record_call_sites = self.record_call_sites
        return config
