"""One session of a soak: threads with programs, faults and interrupts beside them, and at the end nothing may be left."""

from __future__ import annotations

import gc
import threading
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import afield
from afield.runtime.face.api import query
from tests.helpers import poll
from tests.interrupts import interrupted, persist
from tests.soak.faults import Faults
from tests.soak.program import Program, Remotes

#: How long the last objects may take to go.
GRACE_S = 30.0
#: Between the tiers, as `afield.stats` counts them.
MOVES = ("device_to_host", "host_to_device", "peer", "disk_write", "disk_read")
#: The longest pause between two interrupts, and how long they come if the session counts its steps.
INTERRUPT_PAUSE_S, INTERRUPTED_S = 0.05, 2.0


@dataclass
class Outcome:
    """What a session did and met; `problems` is empty if all is well."""

    seed: int
    steps: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    moved: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        def shown(counts: Mapping[str, int]) -> str:
            return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"

        lines = [f"seed {self.seed}: {self.steps} steps ({shown(self.counts)}); faults: {shown(self.faults)}"]
        lines.append(f"  moved, in MiB: {shown(self.moved)}")
        return "\n".join(lines + [f"PROBLEM {problem}" for problem in self.problems])


def soak(
    seed: int,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    threads: int = 3,
    devices: int = 2,
    device_memory: str = "64MiB",
    host_memory: str = "192MiB",
    faults: bool = False,
    interrupts: bool = False,
) -> Outcome:
    """Run one session: each thread does `steps` steps, or as many as fit into `seconds`.

    With `interrupts` the main thread has a program too, and another process interrupts it.
    """
    outcome = Outcome(seed)
    deadline = None if seconds is None else time.monotonic() + seconds
    spec = f"emulated:{devices}:{device_memory}" if devices else "none"
    with afield.init(num_cpus=3, devices=spec, host_memory=host_memory, log_to_driver=False):
        remotes = Remotes(devices)
        programs = [Program(f"{seed}/{number}", remotes, faulty=faults) for number in range(threads)]
        bad_luck = Faults(f"{seed}/faults", devices) if faults else None
        stop = threading.Event()

        def run(program: Program) -> None:
            try:
                done = 0
                while not stop.is_set() and (steps is None or done < steps):
                    if deadline is not None and time.monotonic() > deadline:
                        break
                    program.step()
                    done += 1
                outcome.steps += done
            except BaseException as error:
                stop.set()
                frames = "".join(traceback.format_tb(error.__traceback__, -3))
                outcome.problems.append(f"{type(error).__name__}: {error}\n{frames}")
            finally:
                program.pool.clear()
                program.actor = None
                outcome.counts.update(program.counts)

        workers = [threading.Thread(target=run, args=(program,)) for program in programs]
        if bad_luck is not None:
            bad_luck.start()
        for worker in workers:
            worker.start()
        if interrupts:
            _interrupted(seed, remotes, outcome, stop, deadline or time.monotonic() + INTERRUPTED_S, faulty=faults)
        for worker in workers:
            worker.join()
        if bad_luck is not None:
            bad_luck.stop()
            outcome.faults.update(bad_luck.counts)
        outcome.moved = {name: int(afield.stats()[name]) >> 20 for name in MOVES}
        if not outcome.problems:
            del programs, workers
            outcome.problems += _left_behind()
    return outcome


def _interrupted(
    seed: int, remotes: Remotes, outcome: Outcome, stop: threading.Event, deadline: float, *, faulty: bool
) -> None:
    """Run a program in this thread, which goes on after each KeyboardInterrupt; what it then did not finish, it forgets."""
    program = Program(f"{seed}/main", remotes, faulty=faulty)

    def run() -> None:
        while not stop.is_set() and time.monotonic() < deadline:
            try:
                program.step()
                program.counts["steps of the main thread"] += 1
            except KeyboardInterrupt:
                program.counts["interrupts"] += 1
                program.actor = None

    try:
        with interrupted(f"{seed}/interrupts", INTERRUPT_PAUSE_S):
            persist(run)
    except BaseException as error:
        stop.set()
        frames = "".join(traceback.format_tb(error.__traceback__, -3))
        outcome.problems.append(f"main thread: {type(error).__name__}: {error}\n{frames}")
    outcome.counts.update(program.counts)


def _left_behind() -> list[str]:
    """Return what there is though nobody has a ref any more."""

    def empty() -> bool:
        gc.collect()
        return not afield.memory() and not query("store")["sealed"]

    if poll(empty, GRACE_S, 0.1):
        return []
    rows = [f"{row.object_id} {row.tier} {row.size}: {', '.join(row.why)}" for row in afield.memory()[:10]]
    return [f"left behind: {query('store')['sealed']} bytes sealed; {rows or 'no objects'}"]
