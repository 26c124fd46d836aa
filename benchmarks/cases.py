"""The cases: one table of workloads, written once and run on every system.

Theory of operation. A `System` is a thin face over a runtime: submit a no-op, get a list, call an actor. A `Case`
names one workload over that face, the unit of its samples, the limit of the machine it is held against and what it
must reach. A workload is one short *round*: it returns samples in the case's unit, and is called again for every
further round, so that the runner can alternate rounds with rounds of the limit. Nothing here imports a runtime. What
a system cannot do raises `NotImplementedError`, which the report shows as a dash.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy

from benchmarks import procs
from benchmarks.limits import ASLEEP_S, Effort

SLOTS = 2
"""CPUs that every system is started with."""


class System(Protocol):
    """A runtime under test. References and actors are its own objects and opaque to the cases."""

    name: str

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def get(self, refs: Any) -> Any: ...
    def put(self, value: Any) -> Any: ...
    def wait_all(self, refs: list[Any]) -> None: ...
    def wait_each(self, refs: list[Any]) -> None: ...
    def noop(self) -> Any: ...
    def after(self, ref: Any) -> Any: ...
    def array(self, size_bytes: int) -> Any: ...
    def nap(self, seconds: float) -> Any: ...
    def gate(self, path: str) -> Any: ...
    def actor(self) -> Any: ...
    def call(self, actor: Any) -> Any: ...
    def end_actor(self, actor: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class Scale:
    """How much one round of each workload does. Peers get less of what takes them long."""

    rounds: int
    calls: int
    asleep_calls: int
    tasks: int
    puts: int
    big_bytes: int
    arrays: int
    waits: int
    actors: int
    pending: int
    idle_s: float
    flat_max: int

    @property
    def effort(self) -> Effort:
        """The same amount for the limits."""
        return Effort(self.calls, self.asleep_calls, self.big_bytes)


FULL = Scale(7, 300, 60, 10_000, 2_000, 128 << 20, 200, 1_000, 8, 100_000, 2.0, 1_000_000)
QUICK = Scale(1, 40, 10, 1_000, 200, 16 << 20, 20, 100, 2, 2_000, 0.5, 100_000)
PEER = Scale(3, 200, 40, 10_000, 500, 128 << 20, 100, 1_000, 8, 10_000, 2.0, 0)
PEER_QUICK = Scale(2, 20, 5, 200, 50, 16 << 20, 20, 100, 2, 500, 0.5, 0)


@dataclass(frozen=True, slots=True)
class Must:
    """What a case has to reach: at most or at least `factor` times its limit, a peer's speed or another case."""

    bound: str
    factor: float
    of: str = ""

    def __str__(self) -> str:
        sign = "≤" if self.bound == "most" else "≥"
        return f"{sign} {self.factor:g}" + (f" × {self.of}" if self.of else "")


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the report.

    `fresh`: the workload starts and stops the system itself. `warm_up`: one round is thrown away first.
    """

    name: str
    unit: str
    measure: Callable[[System, Scale], list[float]]
    must: Must | None = None
    limit: str = ""
    max_rounds: int = 100
    fresh: bool = False
    warm_up: bool = True
    peers: bool = True

    @property
    def more_is_better(self) -> bool:
        """Whether a greater figure is the better one."""
        return self.unit == "GB/s"


def _each_us(call: Callable[[], object], count: int, pause_s: float = 0.0) -> list[float]:
    samples = []
    for _ in range(count):
        if pause_s:
            time.sleep(pause_s)
        started = time.perf_counter()
        call()
        samples.append((time.perf_counter() - started) * 1e6)
    return samples


def _init(system: System, _scale: Scale) -> list[float]:
    started = time.perf_counter()
    system.start()
    try:
        system.get(system.noop())
        return [time.perf_counter() - started]
    finally:
        system.stop()


def _shutdown(system: System, _scale: Scale) -> list[float]:
    system.start()
    try:
        system.get(system.noop())
    finally:
        started = time.perf_counter()
        system.stop()
        took_s = time.perf_counter() - started
    return [took_s]


def _task(system: System, scale: Scale) -> list[float]:
    return _each_us(lambda: system.get(system.noop()), scale.calls)


def _task_asleep(system: System, scale: Scale) -> list[float]:
    return _each_us(lambda: system.get(system.noop()), scale.asleep_calls, ASLEEP_S)


def _apart(measure: Callable[[System, Scale], list[float]], system: System, scale: Scale) -> list[float]:
    # Left alone, the kernel often puts caller and callee on one core, where waking the other is ten times cheaper. It
    # does so for the ping-pong more than for a runtime, so this comparison takes the choice away from it on both sides.
    with procs.apart(os.environ[procs.MARK]):
        return measure(system, scale)


def _many_us(system: System, submit: Callable[[], Any], count: int) -> list[float]:
    # The garbage of earlier cases is collected before, not during; collections that this case causes are its own.
    gc.collect()
    started = time.perf_counter()
    refs = [submit() for _ in range(count)]
    system.get(refs)
    return [(time.perf_counter() - started) * 1e6 / count]


def _tasks(system: System, scale: Scale) -> list[float]:
    return _many_us(system, system.noop, scale.tasks)


def _flat(count: int, system: System, scale: Scale) -> list[float]:
    if count > scale.flat_max:
        raise NotImplementedError(f"{count} tasks only without --quick")
    return [cost_us for _ in range(10 if count < 10_000 else 1) for cost_us in _many_us(system, system.noop, count)]


def _with_actor(calls: Callable[[System, Any, Scale], list[float]], system: System, scale: Scale) -> list[float]:
    actor = system.actor()
    try:
        system.get(system.call(actor))
        return calls(system, actor, scale)
    finally:
        system.end_actor(actor)


def _actor(system: System, actor: Any, scale: Scale) -> list[float]:
    return _each_us(lambda: system.get(system.call(actor)), scale.calls)


def _actor_asleep(system: System, actor: Any, scale: Scale) -> list[float]:
    return _each_us(lambda: system.get(system.call(actor)), scale.asleep_calls, ASLEEP_S)


def _actor_apart(system: System, actor: Any, scale: Scale) -> list[float]:
    return _apart(lambda system, scale: _actor_asleep(system, actor, scale), system, scale)


def _actor_many(system: System, actor: Any, scale: Scale) -> list[float]:
    return _many_us(system, lambda: system.call(actor), scale.tasks)


def _actors_first_call(system: System, scale: Scale) -> list[float]:
    started = time.perf_counter()
    actors = [system.actor() for _ in range(scale.actors)]
    system.get([system.call(actor) for actor in actors])
    took_s = time.perf_counter() - started
    for actor in actors:
        system.end_actor(actor)
    time.sleep(0.2)  # Processes that are ending would take CPU time from the next round.
    return [took_s]


def _put_get_small(system: System, scale: Scale) -> list[float]:
    started = time.perf_counter()
    for number in range(scale.puts):
        system.get(system.put(number))
    return [(time.perf_counter() - started) * 1e6 / scale.puts]


def _put_big(system: System, scale: Scale) -> list[float]:
    value = numpy.ones(scale.big_bytes, dtype=numpy.uint8)
    samples = []
    for _ in range(5):
        started = time.perf_counter()
        ref = system.put(value)
        samples.append(scale.big_bytes / 1e9 / (time.perf_counter() - started))
        del ref
    return samples


def _get_big(system: System, scale: Scale) -> list[float]:
    ref = system.put(numpy.ones(scale.big_bytes, dtype=numpy.uint8))
    return _each_us(lambda: system.get(ref), 20)


def _get_big_first(system: System, scale: Scale) -> list[float]:
    samples = []
    for _ in range(3):
        ref = system.array(scale.big_bytes)
        system.wait_all([ref])
        samples += _each_us(partial(system.get, ref), 1)
        del ref
    return samples


def _arrays(system: System, scale: Scale) -> list[float]:
    return _many_us(system, lambda: system.array(1 << 20), scale.arrays)


def _wait(one_by_one: bool, system: System, scale: Scale) -> list[float]:
    started = time.perf_counter()
    refs = [system.noop() for _ in range(scale.waits)]
    if one_by_one:
        system.wait_each(refs)
    else:
        system.wait_all(refs)
    return [(time.perf_counter() - started) * 1e3]


def _worker_memory(system: System, _scale: Scale) -> list[float]:
    pids = set(system.get([system.nap(0.05) for _ in range(4 * SLOTS)]))
    return [procs.private_bytes(pid) / 1e6 for pid in pids]


def _process_count(system: System, _scale: Scale) -> list[float]:
    return [float(len(procs.members(os.environ[procs.MARK])))]


def _all_memory(system: System, _scale: Scale) -> list[float]:
    return [procs.proportional_bytes(procs.members(os.environ[procs.MARK])) / 1e6]


def _idle_cpu(system: System, scale: Scale) -> list[float]:
    system.get([system.noop() for _ in range(10)])
    time.sleep(1.0)  # Leases and warm workers are given back in this time.
    pids = procs.members(os.environ[procs.MARK])
    before_s = sum(map(procs.cpu_seconds, pids))
    time.sleep(scale.idle_s)
    used_s = sum(map(procs.cpu_seconds, pids)) - before_s
    return [100.0 * used_s / scale.idle_s]


def _pending_memory(system: System, scale: Scale) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "open"
        gate = system.gate(str(path))
        system.get([system.noop() for _ in range(100)])  # What the first tasks load once is not a cost of each.
        gc.collect()
        before_bytes = procs.resident_bytes()
        refs = [system.after(gate) for _ in range(scale.pending)]
        time.sleep(0.2)  # What the submission left in queues of other threads belongs to it.
        used_bytes = procs.resident_bytes() - before_bytes
        path.touch()
        system.get(refs)
    return [used_bytes / scale.pending]


CASES: tuple[Case, ...] = (
    # The driver's memory is measured first, in a process whose allocator has nothing freed to hand out again.
    Case("memory_per_pending_task", "B", _pending_memory, max_rounds=1, warm_up=False),
    Case("init_to_first_result", "s", _init, Must("most", 0.8), "import numpy", max_rounds=5, fresh=True),
    Case("shutdown", "s", _shutdown, Must("most", 0.5), max_rounds=5, fresh=True, warm_up=False),
    Case("task_one_at_a_time", "µs", _task, Must("most", 2.5, "limit"), "ping-pong"),
    Case("task_one_at_a_time_asleep", "µs", _task_asleep, Must("most", 2.5, "limit"), "ping-pong asleep"),
    Case("task_asleep_apart", "µs", partial(_apart, _task_asleep), limit="ping-pong apart"),
    Case("tasks_pipelined_10k", "µs", _tasks, Must("least", 25, "ray")),
    Case("actor_one_at_a_time", "µs", partial(_with_actor, _actor), Must("most", 2.5, "limit"), "ping-pong"),
    Case(
        "actor_one_at_a_time_asleep",
        "µs",
        partial(_with_actor, _actor_asleep),
        Must("most", 2.5, "limit"),
        "ping-pong asleep",
    ),
    Case("actor_asleep_apart", "µs", partial(_with_actor, _actor_apart), limit="ping-pong apart"),
    Case("actor_pipelined", "µs", partial(_with_actor, _actor_many), Must("least", 12, "ray")),
    Case("put_get_small", "µs", _put_get_small, Must("most", 15)),
    Case("put_128mb", "GB/s", _put_big, Must("least", 0.7, "limit"), "copy to warm shm"),
    Case("get_128mb", "µs", _get_big, Must("most", 30)),
    Case("get_128mb_first", "µs", _get_big_first, max_rounds=3),
    Case("task_1mib_pipelined", "µs", _arrays, Must("least", 10, "ray")),
    Case("wait_1000", "ms", partial(_wait, True), Must("least", 20, "ray")),
    Case("wait_1000_at_once", "ms", partial(_wait, False), Must("least", 20, "ray")),
    Case("actors_8_first_call", "s", _actors_first_call, Must("most", 0.3), "8 forks", max_rounds=5),
    Case("worker_private_memory", "MB", _worker_memory, Must("most", 15), max_rounds=1),
    Case("process_count", "", _process_count, max_rounds=1, warm_up=False),
    Case("memory_of_all_processes", "MB", _all_memory, max_rounds=1, warm_up=False),
    Case("idle_cpu", "%", _idle_cpu, Must("most", 1), max_rounds=2, warm_up=False),
    Case("flat_cost_1k", "µs", partial(_flat, 1_000), max_rounds=5, peers=False),
    Case("flat_cost_10k", "µs", partial(_flat, 10_000), Must("most", 1.5, "flat_cost_1k"), max_rounds=5, peers=False),
    Case("flat_cost_100k", "µs", partial(_flat, 100_000), Must("most", 1.5, "flat_cost_1k"), max_rounds=3, peers=False),
    Case(
        "flat_cost_1m",
        "µs",
        partial(_flat, 1_000_000),
        Must("most", 1.5, "flat_cost_1k"),
        max_rounds=1,
        warm_up=False,
        peers=False,
    ),
)


def select(names: list[str], *, peers: bool = False) -> list[Case]:
    """Return the cases of these names (all when empty), in the table's order; with `peers` only those peers run.

    Raises `ValueError` that lists the known names when one is unknown.
    """
    known = {case.name for case in CASES}
    if unknown := sorted(set(names) - known):
        raise ValueError(f"no case named {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return [case for case in CASES if (not names or case.name in names) and (case.peers or not peers)]
