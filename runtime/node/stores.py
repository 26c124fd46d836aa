"""The store processes of a node, as its daemon sees them: started when needed, given their work, restarted when they end.

Theory of operation. There is one store for each device and one for the disk. A store has *lives*: each is one process, and
of a device's store one slab. What a life served is gone with it, whatever ended it, and `on_lost` tells so exactly once,
however many signals came: the process's end, fatal news of the device, a job that failed because of the device.

    IDLE      nobody has asked for it
    STARTING  the process is there, or about to be; work waits
    READY     it serves
    ENDING    its life is over, and its process killed; something may still write to memory on its behalf
    PAUSED    the next life begins when `due`: at once, or later if lives keep ending young
    LOST      its device is lost; the next life begins after a reset
    FAILED    too many lives ended before they were ready; tried again when somebody asks, later

From STARTING and READY every bad signal leads to ENDING. That is left once nothing of this life can touch memory any more:
its process was reaped, and no other store still copies out of its slab (or after `SETTLE_S`, should that hang). Only then is
`on_lost` called, so that the books may give the memory of its jobs to others. Then follows PAUSED; LOST, if the device itself
is gone; or FAILED. A device that is LOST is looked at: the board of emulated ones is in this process; of others nobody
tells, so a new life is tried now and then.

The jobs of a life that ended are forgotten: what involved a lost arena is ended by `on_lost`. The disk is different, since
its files outlive the process: its jobs fail one by one, and `on_lost` is never called for it, nor `on_ready`. Completions
that come from here and not from a store are handed out by `expire`, never inside of `execute`.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from afield.clock import Clock, monotonic
from afield.errors import DeviceLostError
from afield.gpu_store.backends.base import DeviceBackend, DeviceInfo, SlabExport
from afield.gpu_store.backends.select import create_emulated, cuda_spec
from afield.gpu_store.mover import Completion
from afield.gpu_store.tiers import DISK, HOST, DeleteFile, Move, ReadFile, WriteFile
from afield.ids import new_process_id
from afield.runtime.node.store_lives import Daemon, State, Store
from afield.runtime.process.configuration import StoreConfig
from afield.runtime.wire import messages, store_messages
from afield.scheduler.devices import Device
from afield.transport.channel import Channel

#: A process that was killed is gone within this time, or something is wrong with the machine.
SETTLE_S = 5.0
#: A life that was shorter counts towards a pause before the next, which doubles up to `MAX_PAUSE_S`.
STABLE_S = 5.0
FIRST_PAUSE_S, MAX_PAUSE_S = 0.05, 2.0
#: So many starts in succession may fail.
MAX_FAILED_STARTS = 4
#: What was given up is tried again not before this; a lost device, while it stays lost, at doubling intervals.
RETRY_S, MAX_RETRY_S = 10.0, 320.0
#: How soon the reset of an emulated device is seen.
LOOK_S = 0.1


class StoreProcesses:
    """All stores of a node.

    Args:
        daemon: forks processes (`daemon.workers`).
        devices: the node's; arena 1 + i is the device with index i.
        on_ready: called with (arena, capacity in bytes) when a device's slab is there.
        on_done: called with a list of (job, kind, text) when jobs of `execute` are done; kind is empty, or as in
            `gpu_store.mover`.
        on_lost: called with (arena, UUID, epoch, cause) when a device's life is over, or does not begin; and when a lost
            device, for which a reset was awaited, is given up.
        link: the speed of emulated devices' links, as for `create_emulated`.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        daemon: Daemon,
        devices: Sequence[Device],
        *,
        on_ready: Callable[[int, int], None],
        on_done: Callable[[Sequence[Completion]], None],
        on_lost: Callable[[int, str, int, str], None],
        link: str = "",
        clock: Clock = monotonic,
    ) -> None:
        self._daemon = daemon
        self._devices = devices
        self._on_ready_callback, self._on_done_callback, self._on_lost_callback = on_ready, on_done, on_lost
        self._link = link
        self._clock = clock
        self._stores = {1 + device.index: Store(1 + device.index, device.uuid) for device in devices}
        self._stores[DISK] = Store(DISK, "")
        self._by_process: dict[bytes, Store] = {}
        self._jobs: dict[int, tuple[Store, Store | None]] = {}  # job -> who does it, whose slab it reads
        self._later: deque[tuple[int, str, str]] = deque()
        self._epochs = {device.uuid: 1 for device in devices}  # of CUDA devices: their driver counts no lives
        self._machine: DeviceBackend | None = None  # the emulated devices, which live in this process
        self._spec = ""
        #: To be merged into the daemon's handlers; `on_registered` is for a `Register` of kind "store".
        self.handlers: dict[type, Callable[[Channel, Any], None]] = {
            store_messages.StoreReady: self._on_ready,
            store_messages.StoreFailed: self._on_failed,
            store_messages.MoveDone: self._on_done,
            store_messages.MovesDone: self._on_all_done,
            store_messages.DeviceNews: self._on_news,
        }

    # -- what the daemon asks --------------------------------------------------------------------------------------

    @property
    def backend_spec(self) -> str:
        """What `open_backend` needs in every process that uses devices; empty without devices."""
        if not self._devices:
            return ""
        if self._devices[0].kind != "emulated":
            return cuda_spec(self._epochs)
        if not self._spec:
            infos = [DeviceInfo(d.uuid, d.index, d.name, d.memory_bytes, d.kind) for d in self._devices]
            self._machine = machine = create_emulated(infos, self._link)
            self._spec = f"emulated:{machine.address}"
        return self._spec

    def ready(self, arena: int) -> bool:
        """Tell whether an arena is served."""
        return self._stores[arena].state is State.READY

    def ensure(self, arena: int) -> str:
        """Start an arena's store unless there is one; return why there will be none for now, or ""."""
        store = self._stores[arena]
        if store.state is State.IDLE or (store.state is State.FAILED and self._clock() >= store.due):
            self._start(store)
        if not store.down:
            return ""
        return f"{store.name} cannot be used: {store.cause}"

    def restart(self, arena: int) -> bool:
        """Begin a new life as soon as that makes sense, which happens by itself; return whether one is on its way."""
        store = self._stores[arena]
        if store.state is State.IDLE:
            self._start(store)
        return store.state in (State.STARTING, State.READY, State.ENDING, State.PAUSED)

    def awaits_reset(self, arena: int) -> bool:
        """Tell whether a device is lost, and used again as soon as it was reset."""
        return self._stores[arena].state is State.LOST

    def look(self, arena: int) -> None:
        """Somebody had trouble with a device: see now whether it is lost, instead of with the next news."""
        store = self._stores[arena]
        gone = self._gone(store)
        if gone or (store.state is State.READY and self._is_over(store)):
            self._end(store, gone or "it was reset", device_lost=bool(gone))

    def export(self, arena: int) -> SlabExport:
        """Return what other processes map the slab of a ready arena with."""
        export = self._stores[arena].export
        if export is None:
            raise LookupError(f"arena {arena} has no slab now: ask `ready` first")
        return export

    def life(self, arena: int) -> int:
        """Return the number of an arena's present life; what is said of an earlier one is of no use."""
        return self._stores[arena].life

    def execute(self, effect: Move | WriteFile | ReadFile | DeleteFile) -> None:
        """Have a job done by the store that it is for; it waits for one that is starting."""
        disk = self._stores[DISK]
        if isinstance(effect, Move):
            self._move(effect)
        elif isinstance(effect, WriteFile):
            self._give(disk, effect.job, store_messages.WriteFile(effect.job, effect.file, effect.pieces))
        elif isinstance(effect, ReadFile):
            message = store_messages.ReadFile(
                effect.job, effect.file, effect.file_offset, effect.size, effect.host_offset
            )
            self._give(disk, effect.job, message)
        elif disk.state is State.READY and disk.channel is not None:
            disk.channel.send(store_messages.DeleteFile(effect.file))
        else:
            disk.waiting.append((-1, store_messages.DeleteFile(effect.file)))

    def _move(self, effect: Move) -> None:
        (source, source_offset), (target, target_offset) = effect.source, effect.target
        store = self._stores[source if target == HOST else target]
        peer = self._stores[source] if HOST not in (source, target) else None
        if peer is not None and peer.state is not State.READY:
            if peer.state is not State.ENDING:  # then `on_lost` ends it
                self._later.append((effect.job, "import", f"{peer.name} is not served"))
            return
        export = peer.export if peer is not None else None
        message = store_messages.Move(effect.job, source, source_offset, target, target_offset, effect.size, export)
        self._give(store, effect.job, message, peer)

    def _give(self, store: Store, job: int, message: Any, peer: Store | None = None) -> None:
        problem = self.ensure(store.arena)
        if problem:
            self._later.append((job, "device_lost" if store.uuid else "failed", problem))
            return
        if store.state is State.ENDING and store.uuid:
            return
        self._jobs[job] = store, peer
        if store.state is State.READY and store.channel is not None:
            store.channel.send(message)
        else:
            store.waiting.append((job, message))

    # -- a life begins ---------------------------------------------------------------------------------------------

    def _start(self, store: Store) -> None:
        store.life += 1
        life = store.life
        store.state = State.STARTING
        store.process_id = new_process_id()
        store.pid, store.reaped, store.channel = 0, False, None
        store.served = store.device_lost = False
        self._by_process[store.process_id] = store
        own = StoreConfig(store.arena, life)
        if store.uuid:
            visible = tuple(device.uuid for device in self._devices)
            own = StoreConfig(store.arena, life, store.uuid, self.backend_spec, visible)
        self._daemon.workers.fork_store(
            store.process_id,
            own.variables(),
            lambda pid: self._on_forked(store, life, pid),
            lambda words: self._on_exit(store, life, words),
        )

    def _on_forked(self, store: Store, life: int, pid: int) -> None:
        if store.life == life:
            store.pid = pid
            if store.state is State.ENDING:
                self._kill(store)

    def on_registered(self, channel: Channel, message: messages.Register) -> None:
        """A store process has connected."""
        store = self._by_process.get(channel.peer_id)
        if store is None or store.state is not State.STARTING:
            channel.close()
        else:
            store.channel = channel

    def knows(self, process_id: bytes) -> bool:
        """Tell whether this is the process of a life that is not over."""
        return process_id in self._by_process

    def _on_ready(self, channel: Channel, message: store_messages.StoreReady) -> None:
        store = self._by_process.get(channel.peer_id)
        if store is None or store.state is not State.STARTING:
            return
        store.state = State.READY
        store.served, store.down, store.given_up = True, False, False
        store.export, store.ready_at = message.export, self._clock()
        store.failed_starts = store.retries = 0
        waiting, store.waiting = store.waiting, []
        for _, waited in waiting:
            channel.send(waited)
        if message.export is not None:
            store.epoch = self._epochs[store.uuid] = message.export.epoch
            self._on_ready_callback(store.arena, message.capacity)

    # -- what a store tells ----------------------------------------------------------------------------------------

    def _on_failed(self, channel: Channel, message: store_messages.StoreFailed) -> None:
        store = self._by_process.get(channel.peer_id)
        if store is not None and store.state is State.STARTING:
            self._end(store, message.text, device_lost=message.kind == "device_lost")

    def _on_done(self, channel: Channel, message: store_messages.MoveDone) -> None:
        store, peer = self._jobs.pop(message.job, (None, None))
        if store is None:
            return
        if message.kind in ("device_lost", "poisoned"):
            self._end(store, message.text, device_lost=message.kind == "device_lost")
        elif message.kind == "import" and peer is not None and self._is_over(peer):
            # `on_lost` ends the job, and has what was to be copied made elsewhere.
            self._end(peer, message.text, device_lost=bool(self._gone(peer)))
        else:
            self._on_done_callback([(message.job, message.kind, message.text)])
        if peer is not None:
            self._end_if_unused(peer)

    def _on_all_done(self, channel: Channel, message: store_messages.MovesDone) -> None:
        known = [job for job in message.jobs if job in self._jobs]
        peers = {peer for _, peer in [self._jobs.pop(job) for job in known] if peer is not None}
        self._on_done_callback([(job, "", "") for job in known])
        for peer in peers:
            self._end_if_unused(peer)

    def _on_news(self, channel: Channel, news: store_messages.DeviceNews) -> None:
        store = self._by_process.get(channel.peer_id)
        if store is None:
            return
        if news.fatal and news.epoch >= store.epoch:
            if store.state is State.ENDING:
                store.device_lost = news.kind != "reset"
            self._end(store, news.text, device_lost=news.kind != "reset")

    # -- a life ends -----------------------------------------------------------------------------------------------

    def _on_exit(self, store: Store, life: int, words: str) -> None:
        """The fork server has reaped a store's process."""
        if store.life != life:
            return
        if store.channel is not None:
            store.channel.drain()  # its last words tell more
        store.reaped = True
        gone = self._gone(store)
        self._end(store, gone or f"its store process ended: {words}", device_lost=bool(gone))
        self._end_if_unused(store)

    def _end(self, store: Store, cause: str, *, device_lost: bool = False) -> None:
        """A life is over, if it was not before."""
        if store.state not in (State.STARTING, State.READY):
            return
        store.state = State.ENDING
        store.cause, store.device_lost = cause, device_lost
        store.due = self._clock() + SETTLE_S
        self._kill(store)
        self._end_if_unused(store)

    def _kill(self, store: Store) -> None:
        if store.pid and not store.reaped:
            with suppress(ProcessLookupError):
                os.kill(store.pid, signal.SIGKILL)

    def _end_if_unused(self, store: Store, *, patient: bool = True) -> None:
        """Tell the end of a life and prepare the next, once nothing of it touches memory any more."""
        if store.state is not State.ENDING:
            return
        if patient and not (store.reaped and all(peer is not store for _, peer in self._jobs.values())):
            return
        self._by_process.pop(store.process_id, None)
        if store.channel is not None:
            store.channel.close()
        store.export = store.channel = None
        peers = self._forget_jobs(store)
        if store.served and self._machine is not None and store.uuid and not self._is_over(store):
            self._machine.reset(store.uuid)  # whoever has the slab of this life mapped is refused from here on
        told, served, given_up = store.down, store.served, store.given_up
        store.state = self._plan(store)
        store.given_up = given_up or store.state is State.FAILED
        if store.state is State.FAILED and not store.uuid:
            self._later.extend((job, "failed", store.cause) for job, _ in store.waiting if job >= 0)
            store.waiting.clear()
        if store.uuid and (served or (store.down and not told) or store.given_up > given_up):
            self._on_lost_callback(store.arena, store.uuid, store.epoch, store.cause)
        if store.state is State.PAUSED and store.due <= self._clock():
            self._start(store)
        for peer in peers:
            self._end_if_unused(peer)

    def _forget_jobs(self, store: Store) -> list[Store]:
        """Drop the jobs of a life that is over; those of the disk fail, but for what it was never given.

        Returns the stores whose slabs are read no longer.
        """
        kept = set() if store.uuid else {job for job, _ in store.waiting}
        peers = []
        for job in [job for job, stores in self._jobs.items() if store in stores and job not in kept]:
            _, peer = self._jobs.pop(job)
            if peer is not None and peer is not store:
                peers.append(peer)
            if not store.uuid:
                self._later.append((job, "failed", store.cause))
        if store.uuid:
            store.waiting.clear()
        return peers

    def _plan(self, store: Store) -> State:
        """Decide what follows a life that is over, and when."""
        now = self._clock()
        if store.device_lost:
            store.down = True
            store.due = now + min(MAX_RETRY_S, RETRY_S * 2**store.retries)
            store.retries += 1
            if store.served:
                self._epochs[store.uuid] = store.epoch + 1
            return State.LOST
        stable = store.served and now - store.ready_at >= STABLE_S
        store.short_lives = 0 if stable else store.short_lives + 1
        store.failed_starts = 0 if store.served else store.failed_starts + 1
        if store.failed_starts >= MAX_FAILED_STARTS:
            store.down = True
            store.due = now + RETRY_S
            return State.FAILED
        pause_s = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2 ** (store.short_lives - 2)) if store.short_lives > 1 else 0.0
        store.due = now + pause_s
        return State.PAUSED

    # -- time ------------------------------------------------------------------------------------------------------

    def expire(self, now: float) -> None:
        """Do what is due."""
        for _ in range(len(self._later)):
            self._on_done_callback([self._later.popleft()])
        for store in self._stores.values():
            if store.state is State.ENDING and now >= store.due:
                self._end_if_unused(store, patient=False)
            elif (store.state is State.PAUSED and now >= store.due) or (
                store.state is State.LOST
                and (now >= store.due or (self._machine is not None and not self._gone(store)))
            ):
                self._start(store)

    def next_deadline(self) -> float | None:
        """Return when `expire` has something to do."""
        if self._later:
            return self._clock()
        dues = []
        for store in self._stores.values():
            if store.state in (State.ENDING, State.PAUSED):
                dues.append(store.due)
            elif store.state is State.LOST:
                dues.append(store.due if self._machine is None else min(store.due, self._clock() + LOOK_S))
        return min(dues, default=None)

    def _gone(self, store: Store) -> str:
        """Return why an emulated device is lost, or "": of other devices nothing is known without starting them."""
        if self._machine is not None and store.uuid:
            try:
                self._machine.open(store.uuid)  # starts nothing, where devices are emulated
            except DeviceLostError as error:
                return str(error)
        return ""

    def _is_over(self, store: Store) -> bool:
        """Tell whether a store's slab is of a life that its emulated device has behind it."""
        return self._machine is not None and bool(store.uuid) and self._machine.epoch(store.uuid) != store.epoch

    def processes(self) -> list[tuple[Channel, int, str]]:
        """Return channel, pid and name (the device's UUID, or "disk") of the stores that can be asked."""
        ready = [store for store in self._stores.values() if store.state is State.READY]
        return [(store.channel, store.pid, store.uuid or "disk") for store in ready if store.channel is not None]

    def describe(self) -> list[dict[str, object]]:
        """List the stores that were ever needed, for tools."""
        return [
            {
                "arena": store.arena,
                "device": store.uuid,
                "state": store.state.value,
                "life": store.life,
                "pid": 0 if store.reaped else store.pid,
                "cause": store.cause,
            }
            for store in self._stores.values()
            if store.life
        ]
