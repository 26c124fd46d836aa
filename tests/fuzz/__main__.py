"""The command line of the fuzzer: rounds one after another, each with the next seed, until the time is over."""

from __future__ import annotations

import argparse
import sys
import time

from tests.fuzz.run import attack
from tests.rounds import run_rounds


def main() -> int:
    """Run, and return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first round")
    parser.add_argument("--minutes", type=float, default=1.0, help="for all rounds together")
    parser.add_argument("--round", type=float, default=20.0, help="seconds of one round")
    options = parser.parse_args()
    return run_rounds("rounds", options.seed, options.minutes, lambda seed: attack(seed, options.round))


if __name__ == "__main__":
    sys.exit(main())
