"""A driver that another process interrupts again and again while it uses afield: nothing hangs, nothing is lost or kept.

`python -m tests.interrupt_storm --interrupts 20000` by hand; the suite has a short one. A process of its own sends SIGINT at
random moments; the driver does small things in a loop and goes on after each KeyboardInterrupt. In the end the session must
answer as before, hold no values but those that the driver holds, and have given back what tasks had leased.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import signal
from collections import Counter
from collections.abc import Callable
from typing import Any

import afield
from tests.helpers import poll
from tests.interrupts import interrupted, persist

#: So long nothing may take, on a machine that others use as well.
HANG_S = 120.0


@afield.remote(num_cpus=0.5)
def _same(value: Any) -> Any:
    return value


@afield.remote(num_cpus=0.5)
def _count(number: int) -> Any:
    yield from range(number)


@afield.remote
class _Counter:
    def __init__(self) -> None:
        self.number = 0

    def add(self) -> int:
        self.number += 1
        return self.number


def _step(rng: random.Random, counter: Any) -> None:
    """Do one small thing, and check it."""
    kind = rng.randrange(7)
    if kind == 0:
        assert afield.get(_same.remote(5)) == 5
    elif kind == 1:
        assert afield.get(afield.put("x")) == "x"
    elif kind == 2:
        assert afield.get([_same.remote(number) for number in range(5)]) == list(range(5))
    elif kind == 3:
        assert afield.get(counter.add.remote()) >= 1
    elif kind == 4:
        data = bytes(200_000)
        assert afield.get(_same.remote(afield.put(data))) == data
    elif kind == 5:
        assert [afield.get(ref) for ref in _count.remote(3)] == [0, 1, 2]
    else:
        ready, _ = afield.wait([_same.remote(1), _same.remote(2)], num_returns=1, timeout=HANG_S)
        assert ready


def storm(interrupts: int, seed: int, longest_s: float = 0.004) -> Counter[str]:
    """Go on until so many KeyboardInterrupts have come; return what was done."""
    rng, counts = random.Random(seed), Counter[str]()
    with afield.init(num_cpus=2, host_memory="256MiB", log_to_driver=False):
        counter = _Counter.remote()
        afield.get(counter.add.remote())
        with interrupted(str(seed), longest_s):
            persist(lambda: _be_interrupted(interrupts, counts, lambda: _step(rng, counter)))
        _check(counter, counts)
    faulthandler.cancel_dump_traceback_later()
    return counts


def _be_interrupted(interrupts: int, counts: Counter[str], step: Callable[[], None]) -> None:
    while counts["interrupts"] < interrupts:
        try:
            faulthandler.dump_traceback_later(HANG_S, exit=True)
            step()
            counts["steps"] += 1
        except KeyboardInterrupt:
            counts["interrupts"] += 1


def _check(counter: Any, counts: Counter[str]) -> None:
    assert afield.get(counter.add.remote(), timeout=HANG_S) >= 1
    assert afield.get([_same.remote(number) for number in range(50)], timeout=HANG_S) == list(range(50))
    cpus = afield.cluster_resources()["CPU"]
    assert poll(lambda: afield.available_resources().get("CPU") == cpus, HANG_S), "a lease was not returned"
    kept = poll(lambda: len(afield.memory()) <= 1, HANG_S)
    assert kept, f"values are kept: {afield.memory()[:5]}"
    counts["objects left"] = len(afield.memory())


def main() -> None:
    """Be the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--interrupts", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--longest", type=float, default=0.004, help="seconds between two interrupts at most")
    given = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in what it starts in the background
    print(dict(storm(given.interrupts, given.seed, given.longest)))


if __name__ == "__main__":
    main()
