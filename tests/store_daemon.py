"""A small node daemon for the tests of store processes: forks real ones, drives their loop, notes what it is told."""

from __future__ import annotations

import mmap
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from afield.gpu_store.backends.emulated import EmulatedBackend
from afield.runtime.node.stores import StoreProcesses
from afield.runtime.node.workers import describe_exit
from afield.runtime.process.configuration import SessionConfig
from afield.runtime.session.store_process import run_store
from afield.runtime.wire import messages
from afield.scheduler.devices import Device
from afield.transport.channel import Channel
from afield.transport.endpoint import Endpoint
from afield.transport.loop import Loop

MIB = 1 << 20
HOST_BYTES = 16 * MIB
PATIENCE_S = 20.0
NODE = bytes(8)


class FakeDaemon:
    """As much of a node daemon as stores need; forks them itself, and notes what it is told."""

    def __init__(self, directory: Path, devices: list[Device], link: str = "") -> None:
        self.directory = str(directory)
        slab = os.memfd_create("host-store-of-a-test")
        os.ftruncate(slab, HOST_BYTES)
        self.config = SessionConfig(secrets.token_hex(8), secrets.token_bytes(32), slab, HOST_BYTES, -1)
        self.host = mmap.mmap(slab, HOST_BYTES)
        self.loop = Loop()
        self.children: dict[int, int] = {}  # pidfd -> pid
        self.told: list[tuple[Any, ...]] = []
        self.lag_s = 0.0  # added to the clock
        self.serve(self.config)
        self.workers = self
        self.stores = StoreProcesses(
            self,
            devices,
            on_ready=lambda *facts: self.told.append(("ready", *facts)),
            on_done=lambda done: self.told.extend(("done", *facts) for facts in done),
            on_lost=self._on_lost,
            link=link,
            clock=self.now,
        )

    def serve(self, config: SessionConfig) -> None:
        """Listen for the stores of a session."""
        self.config = config
        self.endpoint = Endpoint(
            self.loop, config.token, NODE, messages.decode, self._on_messages, lambda channel: None
        )
        self.endpoint.listen(config.address(b""))

    def now(self) -> float:
        return time.monotonic() + self.lag_s

    def _on_lost(self, arena: int, uuid: str, epoch: int, cause: str) -> None:
        self.told.append(("lost", arena, uuid, epoch, cause))
        self.stores.restart(arena)

    # -- processes

    def fork_store(
        self,
        store_id: bytes,
        variables: dict[str, str],
        on_forked: Callable[[int], None],
        on_exit: Callable[[str], None],
    ) -> None:
        pid = os.fork()
        if not pid:
            self._become_store(store_id, variables)
        pidfd = os.pidfd_open(pid)
        self.children[pidfd] = pid

        def reap(events: int) -> None:
            self.loop.unregister(pidfd)
            os.close(pidfd)
            del self.children[pidfd]
            on_exit(describe_exit(pid, os.waitpid(pid, 0)[1]))

        self.loop.register(pidfd, reap)
        on_forked(pid)

    def _become_store(self, store_id: bytes, variables: dict[str, str]) -> None:
        status = 1
        try:
            for name in os.listdir("/proc/self/fd"):
                if int(name) > 2 and int(name) != self.config.slab_fd:
                    try:
                        os.close(int(name))
                    except OSError:
                        pass  # that of the listing
            run_store(self.config, self.directory, store_id, variables)
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)

    def _on_messages(self, channel: Channel, batch: list[Any]) -> None:
        for message in batch:
            if isinstance(message, messages.Register):
                assert message.kind == "store"
                self.stores.on_registered(channel, message)
            else:
                self.stores.handlers[type(message)](channel, message)

    # -- time

    def step(self, timeout_s: float = 0.1) -> None:
        self.loop.flush()
        due = self.stores.next_deadline()
        self.loop.step(timeout_s if due is None else min(timeout_s, max(0.0, due - self.now())))
        self.stores.expire(self.now())
        self.loop.flush()

    def until(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (found := condition()):
            assert time.monotonic() < deadline, (self.told, self.stores.describe())
            self.step()
        return found

    def pause(self, seconds: float) -> None:
        """Let things happen that should not."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.step(0.02)

    def close(self) -> None:
        for pid in self.children.values():
            os.kill(pid, signal.SIGKILL)
        for pidfd, pid in self.children.items():
            os.waitpid(pid, 0)
            os.close(pidfd)
        self.endpoint.close()
        self.loop.close()
        os.close(self.config.slab_fd)
        if self.stores._machine is not None:
            self.stores._machine.close()

    # -- what tests ask

    @property
    def machine(self) -> EmulatedBackend:
        assert self.stores.backend_spec
        assert isinstance(self.stores._machine, EmulatedBackend)
        return self.stores._machine

    def of(self, what: str) -> list[tuple[Any, ...]]:
        return [facts[1:] for facts in self.told if facts[0] == what]

    def start(self, *arenas: int) -> None:
        """Have these arenas served."""
        for arena in arenas:
            assert self.stores.ensure(arena) == ""
        self.until(lambda: all(map(self.stores.ready, arenas)))

    def life(self, arena: int) -> int:
        return self.stores._stores[arena].life

    def pid(self, arena: int) -> int:
        (pid,) = [x["pid"] for x in self.stores.describe() if x["arena"] == arena]
        assert isinstance(pid, int)
        return pid

    def run(self, *effects: Any) -> list[tuple[Any, ...]]:
        """Have jobs done; return what was told of them."""
        before = len(self.of("done"))
        for effect in effects:
            self.stores.execute(effect)
        self.until(lambda: len(self.of("done")) >= before + len(effects))
        return self.of("done")[before:]
