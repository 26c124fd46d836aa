"""The main function of a store process: owns one device's slab, or the disk, and does what the node daemon says.

Theory of operation. A store decides nothing and runs no code of users. It connects to the daemon as a worker does, takes its
device's memory as one slab (or opens the directory of spill files) and says `StoreReady`, or `StoreFailed` and ends. Then it
hands each job to its mover, whose threads do the work, answers with `MoveDone` when the mover's event descriptor tells, and
looks now and then for news of its device. The main thread only waits. When the daemon closes the channel, or its name is
gone, it ends; the memory is the kernel's or the driver's to take back then. An exception ends it too, with its words in the
node's log.
"""

from __future__ import annotations

import faulthandler
import os
import time
from collections.abc import Callable
from typing import Any

from afield.errors import AfieldError, OutOfDeviceMemoryError
from afield.gpu_store.backends.base import DeviceBackend
from afield.gpu_store.backends.select import open_backend
from afield.gpu_store.mover import Completions, DeviceMover, DiskMover, describe
from afield.gpu_store.shared_memory import mapped
from afield.gpu_store.spill_files import SpillFiles
from afield.gpu_store.tiers import DISK, HOST
from afield.runtime.process.configuration import SessionConfig, StoreConfig
from afield.runtime.process.stacks import answer_activity
from afield.runtime.wire import messages, store_messages
from afield.transport.channel import Channel
from afield.transport.endpoint import Endpoint
from afield.transport.loop import Loop

#: The user's: which share of a CUDA device's free memory the store takes.
SHARE = "AFIELD_DEVICE_STORE_SHARE"
#: The rest is for contexts, and for libraries that do not allocate through afield.
DEFAULT_SHARE = 0.8
#: News of an emulated device are a word in shared memory away; those of a real one a call of the driver.
HEALTH_POLL_S = {"emulated": 0.05, "cuda": 0.25}


class StoreProcess:
    """One store in its process."""

    def __init__(self, config: SessionConfig, directory: str, store_id: bytes, own: StoreConfig) -> None:
        """Connect to the daemon; `directory` is the session's, `own` says which arena this is."""
        self._own = own
        self._directory = os.path.join(directory, "spill")
        self._host = memoryview(mapped(config.slab_fd, config.capacity))
        self._loop = Loop()
        self._done = Completions()
        self._loop.register(self._done.fileno(), self._on_done)
        self._ended = False
        self._backend: DeviceBackend | None = None
        endpoint = Endpoint(
            self._loop,
            config.token,
            store_id,
            messages.decode,
            self._on_messages,
            self._on_closed,
            on_absent=_end_if_gone,
        )
        self._daemon = endpoint.open(config.address(b""))
        self._daemon.send(messages.Register("store", os.getpid()))
        self._handlers: dict[type, Callable[[Any], None]] = {}
        self._stack = answer_activity({"links": endpoint.links})

    def run(self) -> None:
        """Serve until the daemon is gone."""
        try:
            ready = self._open_disk() if self._own.arena == DISK else self._open_device()
        except AfieldError as error:
            kind, text = describe(error)
            kind = "full" if isinstance(error, OutOfDeviceMemoryError) else kind
            self._daemon.send(store_messages.StoreFailed(self._own.arena, self._own.life, kind, text))
            while not (self._ended or self._daemon.drained):
                self._loop.step(None)
            return
        self._daemon.send(ready)
        poll_s = HEALTH_POLL_S[self._own.device_backend.partition(":")[0]] if self._backend is not None else None
        due = 0.0
        while not self._ended:
            now = time.monotonic()
            if poll_s is not None and now >= due:
                due = now + poll_s
                self._poll_health()
            self._loop.flush()
            self._loop.step(None if poll_s is None else due - now)

    def _open_disk(self) -> store_messages.StoreReady:
        files = SpillFiles(self._directory)
        mover = DiskMover(files, self._host, self._done)
        self._handlers = {
            messages.Query: self._on_query,
            store_messages.WriteFile: lambda x: mover.write(x.job, x.file, x.pieces),
            store_messages.ReadFile: lambda x: mover.read(x.job, x.file, x.file_offset, x.size, x.host_offset),
            store_messages.DeleteFile: lambda x: mover.delete(x.file),
        }
        return store_messages.StoreReady(DISK, self._own.life, files.free_bytes(), None)

    def _open_device(self) -> store_messages.StoreReady:
        spec = self._own.device_backend
        self._backend = open_backend(spec)
        share = _share() if spec.startswith("cuda:") else 1.0
        self._mover = DeviceMover(self._backend, self._own.device, self._host, self._done, share=share)
        self._handlers = {messages.Query: self._on_query, store_messages.Move: self._on_move}
        return store_messages.StoreReady(self._own.arena, self._own.life, self._mover.capacity, self._mover.export)

    def _on_move(self, x: store_messages.Move) -> None:
        if x.target_arena == HOST:
            self._mover.to_host(x.job, x.source_offset, x.target_offset, x.size)
        elif x.source_arena == HOST:
            self._mover.from_host(x.job, x.source_offset, x.target_offset, x.size)
        else:
            assert x.peer is not None
            self._mover.from_peer(x.job, x.peer, x.source_offset, x.target_offset, x.size)

    def _on_query(self, x: messages.Query) -> None:
        self._daemon.send(messages.Answer(x.request, self._stack(x.argument)))

    def _on_messages(self, channel: Channel, batch: list[Any]) -> None:
        for message in batch:
            self._handlers[type(message)](message)

    def _on_done(self, events: int) -> None:
        completions = self._done.take()
        if any(kind == "device_lost" for _, kind, _ in completions):
            self._poll_health()  # whether it was a reset is told first
        well = [job for job, kind, _ in completions if not kind]
        if well:
            self._daemon.send(store_messages.MovesDone(well))
        for completion in completions:
            if completion[1]:
                self._daemon.send(store_messages.MoveDone(*completion))

    def _on_closed(self, channel: Channel) -> None:
        self._ended = True

    def _poll_health(self) -> None:
        """Tell what happened to our device; those of the others are for their stores to tell."""
        assert self._backend is not None
        uuid = self._own.device
        for event in self._backend.poll_health():
            if event.device_uuid == uuid:
                self._daemon.send(
                    store_messages.DeviceNews(uuid, event.epoch, event.kind, event.code, event.fatal, event.text)
                )


def _end_if_gone(channel: Channel, name_is_gone: bool) -> None:
    """The daemon's name lives as long as the daemon."""
    if name_is_gone:
        channel.refused()


def run_store(config: SessionConfig, directory: str, store_id: bytes, variables: dict[str, str]) -> None:
    """Serve one arena until the daemon goes away, with these variables in the environment."""
    os.environ.update(variables)
    faulthandler.enable(2)
    StoreProcess(config, directory, store_id, StoreConfig.of_store(variables)).run()


def _share() -> float:
    """Return which share of its device's free memory a store takes; raises AfieldError for nonsense."""
    text = os.environ.get(SHARE, "")
    try:
        share = float(text) if text else DEFAULT_SHARE
    except ValueError:
        share = 0.0
    if not 0.0 < share <= 1.0:
        raise AfieldError(f"{SHARE}={text[:40]!r} is no share: write a number above 0 and up to 1, such as 0.8")
    return share
