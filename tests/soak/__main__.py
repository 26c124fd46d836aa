"""The command line of the soak: sessions one after another, each with the next seed, until the time is over."""

from __future__ import annotations

import argparse
import signal
import sys
import time

from tests.rounds import run_rounds
from tests.soak.run import Outcome, soak


def main() -> int:
    """Run, and return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first session")
    parser.add_argument("--minutes", type=float, default=1.0, help="for all sessions together")
    parser.add_argument("--session", type=float, default=20.0, help="seconds of one session")
    parser.add_argument("--faults", action="store_true", help="kill, stop and lose things meanwhile")
    parser.add_argument("--interrupts", action="store_true", help="another process interrupts the main thread")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--device-memory", default="64MiB", help="of each device: little lets values spill")
    parser.add_argument("--host-memory", default="192MiB")
    parser.add_argument("--threads", type=int, default=3)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in what it starts in the background

    def session(seed: int) -> Outcome:
        return soak(
            seed,
            seconds=options.session,
            threads=options.threads,
            devices=options.devices,
            device_memory=options.device_memory,
            host_memory=options.host_memory,
            faults=options.faults,
            interrupts=options.interrupts,
        )

    return run_rounds("sessions", options.seed, options.minutes, session)


if __name__ == "__main__":
    sys.exit(main())
