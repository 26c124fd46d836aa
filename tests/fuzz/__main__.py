"""The command line of the fuzzer: rounds one after another, each with the next seed, until the time is over."""

from __future__ import annotations

import argparse
import sys
import time

from tests.fuzz.run import attack


def main() -> int:
    """Run, and return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first round")
    parser.add_argument("--minutes", type=float, default=1.0, help="for all rounds together")
    parser.add_argument("--round", type=float, default=20.0, help="seconds of one round")
    options = parser.parse_args()
    end, seed, bad = time.monotonic() + options.minutes * 60, options.seed, 0
    while time.monotonic() < end:
        outcome = attack(seed, options.round)
        print(outcome, flush=True)
        bad += bool(outcome.problems)
        seed += 1
    print(f"{seed - options.seed} rounds, {bad} with problems")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
