"""What befalls the processes, sockets and devices of a soak: kills, stops, cuts, losses, collections; what may be killed."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable

from afield.gpu_store.backends import faults
from tests.cuts import can_cut, cut_one
from tests.device_helpers import machine, store_pids, uuids
from tests.helpers import processes, traces

#: Between two faults, in seconds.
PAUSE_S = (0.05, 0.8)
STOPPED_S = 0.1


class Faults:
    """A thread that lets things fail until it is told to stop; then everything is whole again."""

    def __init__(self, seed: str, devices: int) -> None:
        self._rng = random.Random(seed)
        self._devices = devices
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="faults", daemon=True)
        self.counts: Counter[str] = Counter()
        self.error: BaseException | None = None

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, and mend what is broken."""
        self._ending.set()
        self._thread.join()
        if self.error is not None:
            raise self.error
        if self._devices:
            self._mend()

    def _run(self) -> None:
        kinds: list[Callable[[], None]] = [self.kill_worker, self.stop_worker, self.collect]
        if can_cut():
            kinds += [self.cut_sockets, self.cut_sockets]
        if self._devices:
            kinds += [self.kill_store, self.lose_device, self.lose_device]
        try:
            while not self._ending.wait(self._rng.uniform(*PAUSE_S)):
                kind = self._rng.choice(kinds)
                kind()
                self.counts[kind.__name__] += 1
        except BaseException as error:
            self.error = error

    def _worker(self) -> int:
        workers = sorted(pid for pid, name in processes(traces()).items() if name == "afield-worker")
        return self._rng.choice(workers) if workers else 0

    def kill_worker(self) -> None:
        """As the kernel does when memory is short."""
        pid = self._worker()
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop_worker(self) -> None:
        """As a debugger does, or a machine that swaps."""
        pid = self._worker()
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(STOPPED_S)
                os.kill(pid, signal.SIGCONT)

    def cut_sockets(self) -> None:
        """Some channels break between living processes: of the driver, the daemon, workers and stores."""
        pids = [os.getpid(), *processes(traces())]
        for _ in range(self._rng.randrange(1, 10)):
            cut_one(self._rng.choice(pids), self._rng)

    def collect(self) -> None:
        """At any moment, in a thread of its own."""
        gc.collect()

    def kill_store(self) -> None:
        """A store process, of a device or of the disk."""
        pids = sorted(store_pids())
        if pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._rng.choice(pids), signal.SIGKILL)

    def lose_device(self) -> None:
        """A device falls off its bus, and is reset a little later."""
        uuid = self._rng.choice(uuids())
        with machine() as emulated:
            if not emulated.board.lost(emulated.board.index(uuid)):
                emulated.inject(faults.lost(uuid))
            time.sleep(self._rng.choice([0.0, 0.01, 0.2]))
            emulated.board.disarm(emulated.board.index(uuid))
            if emulated.board.lost(emulated.board.index(uuid)):
                emulated.reset(uuid)

    def _mend(self) -> None:
        with machine() as emulated:
            for uuid in uuids():
                emulated.board.disarm(emulated.board.index(uuid))
                if emulated.board.lost(emulated.board.index(uuid)):
                    emulated.reset(uuid)
