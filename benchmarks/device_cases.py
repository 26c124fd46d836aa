"""The device cases: hand-off, copies, spilling, allocation, a working set, start-up; each beside its limit.

Theory of operation. A `Group` is a session with the devices that some cases need: large ones for handing over large arrays,
small ones for spilling. `DeviceSystem` starts and stops that session for the same runner that the micro benchmark has; the
limits of a group, by name, are the no-op tasks of the same session, or raw copies by the same backend in this process.
What a case says about bytes (none copied, so many moved) is asserted with `afield.stats()`, so a fast wrong answer is an
error and not a result.

A device's memory is given up when nothing refers to an array any more, so every sample drops what it made. Memory that is
used for the first time costs far more than a copy; one round of each case is thrown away for that.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import afield
from benchmarks.cases import Case, Must
from benchmarks.device_limits import RawCopies
from benchmarks.device_tasks import actor_body, pair_us, size_name, task_bodies

MIB = 1 << 20
LINK = "AFIELD_EMULATED_LINK"
SHARE = "AFIELD_DEVICE_STORE_SHARE"

ONE = {"num_gpus": 1}
#: Two shapes of one device: they never share a worker, so the second task is in another process.
FIRST, SECOND = {"num_gpus": 0.5}, {"num_gpus": 0.25}

#: Sizes of the allocations that are timed one by one, in bytes.
ALLOCATED = (1 << 10, 64 << 10, 1 << 20)
#: Pieces that a spilling device and a working set are cut into.
PIECES = 16
#: Passes over a working set of so many times the device.
PASSES, TIMES = 3, 4


@dataclass(frozen=True, slots=True)
class DeviceScale:
    """How much one round of each case does; sizes in bytes."""

    rounds: int = 7
    pairs: int = 100
    sizes: tuple[int, ...] = (1 << 10, 32 << 10, 1 << 20, 32 << 20, 1 << 30)
    copies: tuple[int, ...] = (1 << 20, 16 << 20, 128 << 20)
    small_device: int = 512 << 20
    allocations: int = 3_000
    churn: int = 1_000_000
    live: int = 1_000

    @property
    def effort(self) -> DeviceScale:
        """The same amount for the limits."""
        return self


FULL = DeviceScale()
QUICK = DeviceScale(1, 10, (1 << 10, 1 << 20), (1 << 20, 4 << 20), 32 << 20, 100, 10_000, 200)

Limit = Callable[[DeviceScale], list[float]]


@dataclass(frozen=True, slots=True)
class Backend:
    """Which devices the benchmark runs on; `memory_bytes` of the smallest, which only CUDA has."""

    kind: str
    link: str = ""
    name: str = ""
    memory_bytes: int = 0


class DeviceSystem:
    """The runtime, started with devices of a size; see `cases.System`."""

    name = "afield"

    def __init__(self, backend: Backend, *, devices: int, device_bytes: int, host_bytes: int, copies: int = 0) -> None:
        """`copies`: the bytes among which its limits make their raw copies."""
        self.backend = backend
        self._devices = devices
        self._device_bytes = device_bytes
        self._host_bytes = host_bytes
        self._copies = copies
        self._raw: RawCopies | None = None
        self._remote: dict[tuple[str, float], Any] = {}
        self._before: dict[str, str | None] = {}
        #: What a case leaves for its next round, or for its limit; empty again with every start.
        self.notes: dict[str, Any] = {}

    def start(self) -> None:
        backend = self.backend
        spec = f"emulated:{self._devices}:{self._device_bytes}"
        settings = {LINK: backend.link}
        if backend.kind == "cuda":
            # All devices there are: a case that needs more of them than that says so when it looks for them.
            spec = "cuda"
            share = min(0.8, self._device_bytes / backend.memory_bytes)
            settings = {SHARE: f"{share:.4f}"}
        self._before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        afield.init(num_cpus=2, devices=spec, host_memory=self._host_bytes, log_to_driver=False)
        self._remote = {}

    def stop(self) -> None:
        self._remote = {}
        self.notes = {}
        if self._raw is not None:
            self._raw.close()
            self._raw = None
        afield.shutdown()
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    @property
    def raw(self) -> RawCopies:
        """The copies that the backend makes by itself."""
        if self._raw is None:
            self._raw = RawCopies(self.backend.kind, self._copies, self.backend.link)
        return self._raw

    @property
    def device_bytes(self) -> int:
        """The capacity of one device's store."""
        return self._device_bytes

    def task(self, name: str, shape: Mapping[str, float] = ONE) -> Callable[..., Any]:
        """Return what submits the task of this name in this shape; each is made once, as in a program."""
        key = name, shape["num_gpus"]
        if key not in self._remote:
            self._remote[key] = afield.remote(**shape)(task_bodies()[name])
        submit: Callable[..., Any] = self._remote[key].remote
        return submit

    def actors(self, *shapes: Mapping[str, float]) -> list[Any]:
        """Start actors, one for each shape."""
        actors = [afield.remote(**shape)(actor_body()).remote() for shape in shapes]
        afield.get([actor.device.remote() for actor in actors])
        return actors

    @contextmanager
    def counting(self) -> Iterator[dict[str, float]]:
        """Fill a dictionary with what every counter of the session grew by in the block."""
        grown: dict[str, float] = {}
        before = afield.stats()
        yield grown
        grown.update({name: count - before.get(name, 0) for name, count in afield.stats().items()})


@dataclass(frozen=True, slots=True)
class Group:
    """Cases that share a session, and their limits."""

    system: DeviceSystem
    cases: list[Case]
    limits: dict[str, Limit] = field(default_factory=dict)


def _expect(grown: Mapping[str, float], **expected: float) -> None:
    """Raise AssertionError unless the counters grew by so much."""
    found = {name: grown.get(name, 0) for name in expected}
    if found != expected:
        raise AssertionError(f"expected the counters {expected}, found {found}")


# ---- handing over on one device -------------------------------------------------------------------------------------


def _noop_pairs(produce: Mapping[str, float], consume: Mapping[str, float], system: DeviceSystem) -> Limit:
    def measure(scale: DeviceScale) -> list[float]:
        noop, after = system.task("noop", produce), system.task("after", consume)
        return pair_us(afield.get, lambda: noop(1), after, scale.pairs)

    return measure


def _hand_off(
    size: int, produce: Mapping[str, float], consume: Mapping[str, float], system: Any, scale: Any
) -> list[float]:
    make, take = system.task("make", produce), system.task("take", consume)
    with system.counting() as grown:
        samples = pair_us(afield.get, lambda: make(size), take, scale.pairs)
    total = size * scale.pairs
    _expect(
        grown,
        device_bytes_born=total,
        device_bytes_shared=total,
        device_bytes_copied=0,
        device_to_host=0,
        host_to_device=0,
        peer=0,
        bytes_copied_in=0,
    )
    return samples


def hand_off(backend: Backend, scale: DeviceScale) -> Group:
    """A device array from one task to another on the same device, in the same worker and in two."""
    largest = max(scale.sizes)
    system = DeviceSystem(backend, devices=1, device_bytes=3 * largest + 64 * MIB, host_bytes=64 * MIB)
    limits = {"two no-ops": _noop_pairs(ONE, ONE, system), "two no-ops apart": _noop_pairs(FIRST, SECOND, system)}
    must = Must("most", 2, "limit")
    cases = [
        Case(f"handoff_{size_name(size)}", "µs", partial(_hand_off, size, ONE, ONE), must, "two no-ops")
        for size in scale.sizes
    ]
    cases += [
        Case(
            f"handoff_apart_{size_name(size)}", "µs", partial(_hand_off, size, FIRST, SECOND), must, "two no-ops apart"
        )
        for size in (scale.sizes[0], largest)
    ]
    if "H100" in backend.name and largest == 1 << 30:
        absolute = partial(_hand_off, largest, ONE, ONE)
        cases.append(Case("handoff_1gib_on_h100", "µs", absolute, Must("most", 300), peers=False))
    return Group(system, cases, limits)


# ---- allocating -----------------------------------------------------------------------------------------------------


def _allocated(what: str, system: Any, scale: Any) -> list[float]:
    measured = afield.get(system.task("allocations")(scale.allocations, ALLOCATED))
    samples: list[float] = measured[what] if what in ("arena", "array") else [float(measured[what])]
    return samples


def _churned(even: bool, what: str, system: Any, scale: Any) -> list[float]:
    key = "even" if even else "uneven"
    if key not in system.notes:
        # One loop answers all questions.
        system.notes[key] = afield.get(system.task("churn")(scale.churn, scale.live, even))
    samples: list[float] = system.notes[key][what]
    return samples


def allocation(backend: Backend, scale: DeviceScale) -> Group:
    """Allocation inside a task."""
    # None of it is touched: an emulated device takes memory only as far as it is.
    system = DeviceSystem(backend, devices=1, device_bytes=4 << 30, host_bytes=64 * MIB)
    once: dict[str, Any] = {"max_rounds": 1, "warm_up": False}
    return Group(
        system,
        [
            Case("allocate", "µs", partial(_allocated, "arena"), Must("most", 5)),
            Case("allocate_array", "µs", partial(_allocated, "array")),
            Case("allocate_round_trips", "", partial(_allocated, "round_trips"), Must("most", 0)),
            Case("churn_unused", "%", partial(_churned, True, "unused"), Must("most", 15), **once),
            Case("churn_unused_when_short", "%", partial(_churned, False, "kept"), Must("most", 15), **once),
            Case("churn_allocate_and_free", "µs", partial(_churned, True, "each_us"), **once),
            Case("churn_round_trips", "", partial(_churned, True, "round_trips"), **once),
        ],
    )


# ---- copies ---------------------------------------------------------------------------------------------------------


def _raw(way: str, size: int, system: DeviceSystem) -> Limit:
    return lambda scale: system.raw.gb_s(way, size)


def _peer_copy(size: int, system: Any, scale: Any) -> list[float]:
    if "actors" not in system.notes:
        actors = system.actors(ONE, ONE)
        if len(set(afield.get([actor.device.remote() for actor in actors]))) < 2:
            raise NotImplementedError("a second device is needed to copy from")
        system.notes["actors"] = actors
    source, target = system.notes["actors"]
    samples = []
    with system.counting() as grown:
        for number in range(3):
            ref = source.make.remote(number, size)
            afield.wait([ref])
            started = time.perf_counter()
            afield.get(target.take.remote(ref))
            samples.append(size / 1e9 / (time.perf_counter() - started))
            del ref
    _expect(grown, peer=3 * size, device_to_host=0, host_to_device=0)
    return samples


def _host_copy(size: int, system: Any, scale: Any) -> list[float]:
    samples = []
    with system.counting() as grown:
        for number in range(3):
            ref = system.task("fill")(number, size)
            afield.wait([ref])
            started = time.perf_counter()
            value = afield.get(ref)
            samples.append(size / 1e9 / (time.perf_counter() - started))
            assert value[0] == value[-1] == number % 251
            del ref, value
    _expect(grown, device_to_host=3 * size, host_to_device=0, peer=0)
    return samples


def copies(backend: Backend, scale: DeviceScale) -> Group:
    """Reading on a peer device, and where there is no device."""
    largest = max(scale.copies)
    room = 4 * largest + 64 * MIB
    system = DeviceSystem(backend, devices=2, device_bytes=room, host_bytes=room, copies=largest)
    limits, cases = {}, []
    for name, way, measure in (("host_read", "to host", _host_copy), ("peer_read", "peer", _peer_copy)):
        for size in scale.copies:
            limit = f"raw {way} {size_name(size)}"
            limits[limit] = _raw(way, size, system)
            # The least sizes are there to show what a copy costs beside the bytes; the issue speaks of bandwidth.
            must = Must("least", 0.8, "limit") if size == largest else None
            cases.append(Case(f"{name}_{size_name(size)}", "GB/s", partial(measure, size), must, limit))
    return Group(system, cases, limits)


# ---- spilling -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Spilling:
    """What one round of filling, spilling and restoring gave."""

    out_gb_s: float
    in_gb_s: float
    slowdown: float


def _rate(clock: list[float], start: float, end: float) -> float:
    """Return steps per second of a task between two moments."""
    return sum(start < tick <= end for tick in clock) / (end - start)


def _spill_once(system: DeviceSystem, actors: list[Any]) -> _Spilling:
    """Fill half of a device, ask for all of it, and read back what had to go; beside a task that computes there."""
    holder, busy = actors
    piece = system.device_bytes // PIECES
    seconds = max(1.0, 8 * system.device_bytes / 4e9)
    # First, so that the memory which it computes in lies at the end of the device, where it divides no room.
    alone = afield.get(busy.spin.remote(0.3))
    refs = [holder.make.remote(number, piece) for number in range(PIECES // 2)]
    afield.wait(refs, num_returns=len(refs))
    spinning = busy.spin.remote(seconds)
    time.sleep(0.1)
    with system.counting() as spilled:
        began = time.perf_counter()
        out_s = afield.get(holder.grab.remote(int(0.95 * system.device_bytes)))
        between = time.perf_counter()
    with system.counting() as restored:
        started = time.perf_counter()
        afield.get(holder.take.remote(*refs))
        ended = time.perf_counter()
    clock = afield.get(spinning)
    total = piece * len(refs)
    _expect(spilled, device_to_host=total, disk_write=0)
    _expect(restored, host_to_device=total, disk_read=0)
    if clock[-1] < ended:
        raise AssertionError(f"the other task ended after {seconds:.1f} s, before all was moved")
    while_moving = (_rate(clock, began, between) + _rate(clock, started, ended)) / 2
    alone_rate = len(alone) / (alone[-1] - alone[0]) if len(alone) > 1 else 0.0
    return _Spilling(total / 1e9 / out_s, total / 1e9 / (ended - started), alone_rate / max(while_moving, 1e-9))


def _raw_beside_a_task(way: str, size: int, system: DeviceSystem) -> Limit:
    """The same task computes beside the raw copies too: an emulated device copies with a processor that the task wants."""

    def measure(scale: DeviceScale) -> list[float]:
        spinning = system.notes["actors"][1].spin.remote(0.3)
        time.sleep(0.1)
        samples = system.raw.gb_s(way, size)
        afield.get(spinning)
        return samples

    return measure


def _spilling(what: str, system: Any, scale: Any) -> list[float]:
    if "actors" not in system.notes:
        system.notes["actors"] = system.actors(FIRST, SECOND)
    rounds = [_spill_once(system, system.notes["actors"]) for _ in range(2)]
    return [getattr(one, what) for one in rounds]


def spilling(backend: Backend, scale: DeviceScale) -> Group:
    """Device to host and back because the device is full, while another task computes on it."""
    size = scale.small_device
    piece = size // PIECES
    system = DeviceSystem(backend, devices=1, device_bytes=size, host_bytes=2 * size, copies=size)
    limits = {
        name: _raw_beside_a_task(way, piece, system)
        for name, way in (("raw spill", "to host"), ("raw restore", "from host"))
    }
    must = Must("least", 0.7, "limit")
    return Group(
        system,
        [
            Case("spill_beside_a_task", "GB/s", partial(_spilling, "out_gb_s"), must, "raw spill", max_rounds=5),
            Case("restore_beside_a_task", "GB/s", partial(_spilling, "in_gb_s"), must, "raw restore", max_rounds=5),
            Case("task_beside_moves_slower_by", "x", partial(_spilling, "slowdown"), max_rounds=3, warm_up=False),
        ],
        limits,
    )


# ---- a working set larger than the device ---------------------------------------------------------------------------


def _passes(system: Any, scale: Any) -> list[float]:
    piece = system.device_bytes // PIECES
    fill, sample, check = system.task("fill"), system.task("sample"), system.task("check")
    refs = [fill(number, piece) for number in range(TIMES * PIECES)]
    afield.wait(refs, num_returns=len(refs))
    samples = []
    with system.counting() as grown:
        for _ in range(PASSES):
            started = time.perf_counter()
            right = afield.get([sample(number, ref) for number, ref in enumerate(refs)])
            samples.append(time.perf_counter() - started)
            assert all(right), "a pass read wrong data"
    _expect(grown, disk_write=0, disk_read=0)
    system.notes["moved"] = {way: grown.get(way, 0) / PASSES for way in ("device_to_host", "host_to_device")}
    assert all(afield.get([check(number, ref) for number, ref in enumerate(refs)])), "the data were wrong in the end"
    return samples


def _moved_at_link_speed(system: DeviceSystem) -> Limit:
    def measure(scale: DeviceScale) -> list[float]:
        piece = system.device_bytes // PIECES
        ways = {"device_to_host": "to host", "host_to_device": "from host"}
        least_s = 0.0
        for counter, way in ways.items():
            least_s += system.notes["moved"][counter] / 1e9 / statistics.median(system.raw.gb_s(way, piece))
        return [least_s]

    return measure


def working_set(backend: Backend, scale: DeviceScale) -> Group:
    """Passes over four times what the device can hold."""
    size = scale.small_device // 2
    system = DeviceSystem(backend, devices=1, device_bytes=size, host_bytes=6 * size, copies=size)
    must = Must("most", 2, "limit")
    cases = [Case("working_set_4x_pass", "s", _passes, must, "bytes at link speed", max_rounds=2)]
    return Group(system, cases, {"bytes at link speed": _moved_at_link_speed(system)})


# ---- starting -------------------------------------------------------------------------------------------------------


def _first_task(which: int, system: Any, scale: Any) -> list[float]:
    started = time.perf_counter()
    system.start()
    try:
        took_s = []
        for size in (4096, 4096):
            afield.get(system.task("take")(system.task("make")(size)))
            took_s.append(time.perf_counter() - started)
            started = time.perf_counter()
        return [took_s[which]]
    finally:
        with suppress(Exception):
            system.stop()


def starting(backend: Backend, scale: DeviceScale) -> Group:
    """From `init` to what the first and the second task on a device give."""
    system = DeviceSystem(backend, devices=1, device_bytes=256 * MIB, host_bytes=64 * MIB)
    second = Must("most", 0.1, "init_to_first_device_task")
    return Group(
        system,
        [
            Case("init_to_first_device_task", "s", partial(_first_task, 0), fresh=True, max_rounds=5),
            Case("second_device_task", "s", partial(_first_task, 1), second, fresh=True, max_rounds=5),
        ],
    )


GROUPS: dict[str, Callable[[Backend, DeviceScale], Group]] = {
    "start": starting,
    "handoff": hand_off,
    "allocate": allocation,
    "copy": copies,
    "spill": spilling,
    "working_set": working_set,
}
