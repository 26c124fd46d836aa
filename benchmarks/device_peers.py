"""Ray beside the hand-off cases: what the same two tasks cost where futures are in host memory.

Theory of operation. Ray's objects are in shared host memory, so an array of one task's device reaches the next task's device by
device -> host -> shared memory -> device. Without a GPU the two copies over the link are NumPy copies: the producer copies its
"device" array before it returns it, the consumer copies what it gets. The producer keeps one array for each size, so that
filling it, or touching new memory, is not counted. `python -m benchmarks.device_peers ray --cases handoff_1kib,...` runs in an
interpreter that has Ray and NumPy, and writes one JSON line per case, as `benchmarks.peers` does.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.cases import PEER, PEER_QUICK, SLOTS, Case
from benchmarks.device_tasks import pair_us, parse_size
from benchmarks.peers import make_system
from benchmarks.runner import as_json, run_cases

#: A pair of an array of this size may take a second.
_BIG_BYTES = 256 << 20


def _bodies() -> tuple[Callable[..., Any], Callable[..., Any]]:
    on_device: dict[int, Any] = {}

    def make(size_bytes: int) -> Any:
        import numpy

        if size_bytes not in on_device:
            on_device.clear()
            on_device[size_bytes] = numpy.ones(size_bytes, dtype=numpy.uint8)
        return on_device[size_bytes].copy()

    def take(array: Any) -> int:
        return int(array.copy().nbytes)

    return make, take


class RayPairs:
    """Ray with the two tasks of a hand-off."""

    name = "ray"

    def __init__(self) -> None:
        self._ray = make_system("ray")

    def start(self) -> None:
        module = self._ray._module  # type: ignore[attr-defined]
        largest = 3 << 30
        module.init(num_cpus=SLOTS, object_store_memory=largest, **self._ray._options)  # type: ignore[attr-defined]
        self.get = module.get
        self.make, self.take = (module.remote(body).remote for body in _bodies())

    def stop(self) -> None:
        self._ray.stop()


def _hand_off(size: int, system: Any, scale: Any) -> list[float]:
    count = 3 if size >= _BIG_BYTES else min(scale.calls, 20)
    return pair_us(system.get, lambda: system.make(size), system.take, count)


def main() -> None:
    """Measure the cases in this interpreter and write one JSON line for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device_peers", description=main.__doc__)
    parser.add_argument("peer", choices=["ray"])
    parser.add_argument("--cases", required=True, help="names, separated by commas: handoff_1kib and the like")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # What the peer prints must not mix with the lines.
    cases = []
    for name in options.cases.split(","):
        size = parse_size(name.removeprefix("handoff_").removeprefix("apart_"))
        cases.append(Case(name, "µs", partial(_hand_off, size), max_rounds=3))
    import ray

    system: Any = RayPairs()
    for outcome in run_cases(system, cases, PEER_QUICK if options.quick else PEER, limits=False):
        lines.write(json.dumps({"version": ray.__version__, **as_json(outcome)}) + "\n")


if __name__ == "__main__":
    main()
