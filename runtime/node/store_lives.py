"""What the daemon keeps of each store process, and the states of its lives: `stores` says how these follow one another."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, Protocol

from afield.gpu_store.backends.base import SlabExport
from afield.transport.channel import Channel


class State(Enum):
    """Where a store is in its life; see `stores`."""

    IDLE = "idle"
    STARTING = "starting"
    READY = "ready"
    ENDING = "ending"
    PAUSED = "paused"
    LOST = "lost"
    FAILED = "failed"


class Forks(Protocol):
    """What is needed of the worker pool, which talks to the fork server."""

    def fork_store(
        self,
        store_id: bytes,
        variables: dict[str, str],
        on_forked: Callable[[int], None],
        on_exit: Callable[[str], None],
    ) -> None: ...


class Daemon(Protocol):
    """What is needed of the node daemon."""

    @property
    def workers(self) -> Forks: ...


class Store:
    """One arena's store over all its lives."""

    def __init__(self, arena: int, uuid: str) -> None:
        self.arena = arena
        self.uuid = uuid  # empty for the disk
        self.state = State.IDLE
        self.life = 0
        self.process_id = b""
        self.pid = 0
        self.reaped = True
        self.channel: Channel | None = None
        self.export: SlabExport | None = None
        self.epoch = 0  # of the device, in the life that was ready last
        self.served = False  # this life was ready
        self.device_lost = False
        self.down = False  # LOST or FAILED, and not ready again since
        self.given_up = False  # FAILED, and not ready again since
        self.cause = ""
        self.ready_at = 0.0
        self.due = 0.0
        self.short_lives = 0
        self.failed_starts = 0
        self.retries = 0
        self.waiting: list[tuple[int, Any]] = []  # (job, message) until it is ready

    @property
    def name(self) -> str:
        return f"device {self.uuid}" if self.uuid else "the disk"
