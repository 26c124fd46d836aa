"""Rounds of a random test, one after another, each with the next seed, until the time is over."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol


class Outcome(Protocol):
    """What a round did; its text tells."""

    problems: list[str]


def run_rounds(what: str, seed: int, minutes: float, one: Callable[[int], Outcome]) -> int:
    """Run and print rounds, called `what`, for so long; return 1 if anything was wrong."""
    end, first, bad = time.monotonic() + minutes * 60, seed, 0
    while time.monotonic() < end:
        outcome = one(seed)
        print(outcome, flush=True)
        bad += bool(outcome.problems)
        seed += 1
    print(f"{seed - first} {what}, {bad} with problems")
    return 1 if bad else 0
