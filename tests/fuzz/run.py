"""One round of the fuzzer: a session at work is attacked on all its listeners, and afterwards it must be as before."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import afield
from afield.errors import LossError, RuntimeDiedError
from afield.runtime.face import lifecycle
from afield.runtime.session import sessions
from afield.runtime.session.bootstrap import Session
from afield.runtime.tools.security import listeners
from tests.fuzz.attacker import Attacker
from tests.helpers import poll, processes, traces

HANG_S = 60.0
#: What a process may have more after a round, in MiB: caches that fill, and memory that the allocator keeps.
MOST_GROWTH_MIB = 64


@dataclass
class Round:
    """What a round did and met; `problems` is empty if all is well."""

    seed: int
    attacks: Counter[str] = field(default_factory=Counter)
    worked: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        told = ", ".join(f"{name} {count}" for name, count in sorted(self.attacks.items()))
        return "\n".join(
            [f"seed {self.seed}: {self.worked} tasks beside {told}", *[f"PROBLEM {one}" for one in self.problems]]
        )


@afield.remote(num_cpus=0.5)
def _add(left: int, right: int) -> int:
    return left + right


@afield.remote(num_cpus=0.5)
class _Counter:
    def __init__(self) -> None:
        self.count = 0

    def add(self) -> int:
        self.count += 1
        return self.count


def attack(seed: int, seconds: float) -> Round:
    """Attack a new session for so long, while it works."""
    outcome = Round(seed)
    with afield.init(num_cpus=2, devices="emulated:1:64MiB", host_memory="128MiB", log_to_driver=False):
        counter = _Counter.remote()
        afield.get([counter.add.remote(), _add.remote(1, 2)])
        kept = afield.put(bytes(1 << 20))
        session = lifecycle._session
        assert session is not None
        (info,) = [one for one in sessions.find_sessions() if one.driver_pid == os.getpid()]
        token, before = info.token(), _facts()
        stop = threading.Event()
        worker = threading.Thread(target=_work, args=(outcome, stop))
        worker.start()
        end, number = time.monotonic() + seconds, 0
        while time.monotonic() < end and not outcome.problems:
            addresses = listeners(info.name)
            for address in addresses:
                attacker = Attacker(f"{seed}/{number}", address, token)
                number += 1
                for _ in range(20):
                    outcome.attacks[attacker.attack()] += 1
                attacker.close()
        stop.set()
        worker.join(HANG_S)
        if worker.is_alive():
            outcome.problems.append("a task hangs")
        outcome.problems += _judge(before, counter, kept, session)
    return outcome


def _work(outcome: Round, stop: threading.Event) -> None:
    """Use the session; a task whose worker is attacked may be lost with it, and no more than that."""
    try:
        while not stop.is_set():
            number = outcome.worked
            try:
                value: Any = afield.get(_add.remote(number, 1), timeout=HANG_S)
                assert value == number + 1, f"{value} instead of {number + 1}"
            except RuntimeDiedError:
                raise
            except LossError:
                outcome.attacks["! a task was lost"] += 1
            outcome.worked += 1
    except BaseException as error:
        outcome.problems.append(f"a task: {type(error).__name__}: {error}")


def _facts() -> dict[int, tuple[str, int]]:
    """Return what kind each process of the session is, and its memory in MiB."""
    found = {os.getpid(): "driver", **processes(traces())}
    return {pid: (kind, _memory_mib(pid)) for pid, kind in found.items()}


def _memory_mib(pid: int) -> int:
    try:
        match = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(match[1]) >> 10 if match else 0


def _judge(before: dict[int, tuple[str, int]], counter: Any, kept: Any, session: Session) -> list[str]:
    """Return what is wrong after the attacks. Workers may have been ended for what they were said to have done."""
    problems = []
    now = _facts()
    for pid, (kind, _) in before.items():
        if kind != "afield-worker" and pid not in now:
            problems.append(f"the process {kind} has ended")
    if problems:
        return [*problems, session._log()]
    try:
        assert afield.get([_add.remote(n, n) for n in range(50)], timeout=HANG_S) == [2 * n for n in range(50)]
        assert afield.get(kept, timeout=HANG_S) == bytes(1 << 20)
        try:
            assert afield.get(counter.add.remote(), timeout=HANG_S) == 2
        except LossError:
            pass
        afield.get(_Counter.remote().add.remote(), timeout=HANG_S)
    except BaseException as error:
        return [f"afterwards: {type(error).__name__}: {error}", session._log()]
    if not poll(lambda: afield.available_resources().get("CPU", 0) >= 1.5, HANG_S):
        problems.append(f"a lease was not returned: {afield.available_resources()}")
    for pid, (kind, size_mib) in _facts().items():
        if pid in before and size_mib - before[pid][1] > MOST_GROWTH_MIB:
            problems.append(f"the process {kind} has {size_mib - before[pid][1]} MiB more than before")
    return problems
