"""What the device benchmark runs in workers, and how its cases are called.

Theory of operation. The bodies are functions inside a function, so that they are shipped by value and no worker has to import
this module. They take the array module of their lease (`afield.array_module()`), so that the same bodies run on emulated
devices and on CUDA. `pair_us` is the workload that is held against a peer: it knows no runtime, and is imported by the peer's
interpreter, where afield is not installed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def parse_size(text: str) -> int:
    """Return the bytes that "64KiB" stands for; raises ValueError that says what is accepted."""
    match = re.fullmatch(r"([1-9][0-9]*)(B|KiB|MiB|GiB)?", text.strip(), re.IGNORECASE)
    unit = next((size for name, size in _UNITS.items() if match and name.lower() == (match[2] or "").lower()), 0)
    if match is None or not unit:
        raise ValueError(f"{text!r} is no size: write a whole number with KiB, MiB or GiB, such as 64KiB")
    return int(match[1]) * unit


def size_name(size_bytes: int) -> str:
    """Return the size as the names of cases have it: "64kib"."""
    unit, factor = max(
        ((unit, size) for unit, size in _UNITS.items() if size_bytes % size == 0), key=lambda one: one[1]
    )
    return f"{size_bytes // factor}{(unit or 'B').lower()}"


def pair_us(
    get: Callable[[Any], Any], produce: Callable[[], Any], consume: Callable[[Any], Any], count: int
) -> list[float]:
    """Time, in µs, a task whose result a second task takes, until the driver knows that the second is done."""
    samples = []
    for _ in range(count):
        started = time.perf_counter()
        ref = produce()
        get(consume(ref))
        samples.append((time.perf_counter() - started) * 1e6)
        del ref
    return samples


def task_bodies() -> dict[str, Callable[..., Any]]:
    """Return the bodies of tasks by name."""

    def noop(_size_bytes: int) -> None:
        return None

    def after(_value: object) -> None:
        return None

    def make(size_bytes: int) -> Any:
        # Nothing is written: filling an array is the work of a task, and not part of handing it over.
        import afield

        return afield.array_module().empty(size_bytes, "uint8")

    def take(array: Any) -> int:
        return int(array.nbytes)

    def fill(number: int, size_bytes: int) -> Any:
        import afield

        array = afield.array_module().empty(size_bytes, "uint8")
        array.fill(number % 251)
        return array

    def sample(number: int, array: Any) -> bool:
        """Look at one byte in each of a few places: the time of a pass is to be that of moving bytes."""
        step = max(1, array.size // 16)
        picked = array[::step]
        return bool((picked == number % 251).all())

    def check(number: int, array: Any) -> bool:
        return bool((array == number % 251).all())

    return {f.__name__: f for f in (noop, after, make, take, fill, sample, check, _allocations(), _churn())}


def _allocations() -> Callable[..., Any]:
    def allocations(count: int, sizes: tuple[int, ...]) -> dict[str, Any]:
        """Time allocations in a task that has allocated before, each alone: {"arena", "array"} in µs, {"round_trips"}."""
        import time

        import afield
        from afield.runtime.calls import participation

        arena = participation.participant.values.parts.devices.home()  # type: ignore[union-attr]
        module = afield.array_module()
        clock = time.perf_counter

        def each_us(allocate: Callable[[int], object]) -> list[float]:
            samples = []
            for index in range(count):
                size = sizes[index % len(sizes)]
                started = clock()
                block = allocate(size)
                samples.append((clock() - started) * 1e6)
                del block
            return samples

        def array_and_gone(size: int) -> None:
            array = module.empty(size, "uint8")
            del array

        for allocate in (arena.allocate, array_and_gone):
            for size in sizes:
                allocate(size)
        before = arena.stats().round_trips
        samples = {"arena": each_us(arena.allocate), "array": each_us(array_and_gone)}
        return {**samples, "round_trips": arena.stats().round_trips - before}

    return allocations


def _churn() -> Callable[..., Any]:
    def churn(count: int, live: int, even: bool) -> dict[str, Any]:
        """Replace blocks of mixed sizes in random order, and look a hundred times at what is leased and not used, in %.

        Sizes are spread from 1 byte to 4 MiB, `even`ly or, over the powers of two, from 512 bytes; `live` blocks are alive.
        Returns {"unused": [...], "kept": [what stays leased and unused when memory is short], "each_us", "round_trips"}.
        """
        import random
        import time

        from afield.runtime.calls import participation

        arena = participation.participant.values.parts.devices.home()  # type: ignore[union-attr]
        arena.trim()
        chance = random.Random(1)
        sizes = [chance.randrange(1, 4 << 20) if even else int(512 * 8192 ** chance.random()) for _ in range(4096)]
        order = [(chance.randrange(live), chance.choice(sizes)) for _ in range(50_021)]
        blocks: list[Any] = [arena.allocate(size) for size in sizes[:live]]
        blocks += [arena.allocate(chance.choice(sizes)) for _ in range(live - len(blocks))]
        allocate, step = arena.allocate, max(1, count // 100)
        unused, spent_s, trips = [], 0.0, arena.stats().round_trips
        for start in range(0, count, step):
            began = time.perf_counter()
            for number in range(start, min(start + step, count)):
                place, size = order[number % 50_021]
                blocks[place] = None  # freed before the new one is asked for, as a variable that is assigned is not
                blocks[place] = allocate(size)
            spent_s += time.perf_counter() - began
            unused.append(100 * arena.stats().fragmentation)
        trips = arena.stats().round_trips - trips
        arena.trim(2 << 20)
        kept = [100 * arena.stats().fragmentation]
        return {"unused": unused, "kept": kept, "each_us": [spent_s * 1e6 / count], "round_trips": [float(trips)]}

    return churn


def actor_body() -> type:
    """Return the actor that holds a device and does what the copying cases ask of it."""

    class OnDevice:
        def make(self, number: int, size_bytes: int) -> Any:
            import afield

            array = afield.array_module().empty(size_bytes, "uint8")
            array.fill(number % 251)
            return array

        def take(self, *arrays: Any) -> int:
            return sum(int(array.nbytes) for array in arrays)

        def grab(self, size_bytes: int) -> float:
            """Allocate and give up; return how long the allocation took, in s."""
            import time

            import afield

            module = afield.array_module()
            started = time.perf_counter()
            array = module.empty(size_bytes, "uint8")
            took_s = time.perf_counter() - started
            del array
            return took_s

        def spin(self, seconds: float) -> list[float]:
            """Compute on the device; return the clock (system-wide, s) after each step."""
            import time

            import afield

            module = afield.array_module()
            array = module.ones(1 << 16, "float32")
            end = time.perf_counter() + seconds
            clock = []
            while not clock or clock[-1] < end:
                for _ in range(10):
                    array *= 1.0000001
                module.cuda.Device().synchronize()
                clock.append(time.perf_counter())
            return clock

        def device(self) -> str:
            import os

            return os.environ.get("AFIELD_VISIBLE_DEVICES", "")

    return OnDevice
