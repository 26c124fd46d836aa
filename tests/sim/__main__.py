"""`python -m tests.sim`: run one seed, or explore every interleaving of the scenarios.

Exit code 1 means that an invariant was violated; then the transcript is printed, numbered, and after it what was violated.
"""

from __future__ import annotations

import argparse
import sys
import time

from afield.runtime.cores.ownership import OwnershipTable
from tests.sim.explore import CounterexampleError, explore
from tests.sim.scenarios import SCENARIOS
from tests.sim.simulate import Simulation
from tests.sim.values import InvariantError


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of every choice in the run")
    parser.add_argument("--steps", type=int, default=600, help="events before the programs stop")
    parser.add_argument("--processes", type=int, default=3, help="processes at first")
    parser.add_argument("--faults", action="store_true", help="let processes die")
    parser.add_argument("--losses", action="store_true", help="let the store lose values")
    parser.add_argument("--transcript", action="store_true", help="print the transcript of a good run too")
    parser.add_argument("--explore", action="store_true", help="visit every state of every scenario instead")
    options = parser.parse_args(arguments)
    if options.explore:
        return explore_all()
    return run(
        options.seed,
        options.steps,
        options.processes,
        faults=options.faults,
        losses=options.losses,
        always=options.transcript,
    )


def run(
    seed: int,
    steps: int,
    processes: int,
    *,
    faults: bool,
    losses: bool = False,
    always: bool = False,
    table: type[OwnershipTable] = OwnershipTable,
) -> int:
    """Run one seed and print what came of it."""
    simulation = Simulation(seed, processes=processes, faults=faults, losses=losses, table=table, recording=True)
    try:
        summary = simulation.run(steps)
    except InvariantError as violation:
        _print_transcript([*(simulation.world.log or ()), *violation.__notes__])
        print(f"seed {seed}: VIOLATED: {violation}")
        return 1
    if always:
        _print_transcript(simulation.world.log)
    print(f"seed {seed}: {summary}")
    return 0


def explore_all() -> int:
    """Explore each scenario and print how many states it has."""
    states = 0
    for scenario in SCENARIOS:
        start = time.monotonic()
        try:
            explored = explore(scenario)
        except CounterexampleError as found:
            _print_transcript(found.transcript)
            print(f"{scenario.name}: VIOLATED: {found}")
            return 1
        states += explored.states
        print(f"{scenario.name}: {explored} in {time.monotonic() - start:.1f} s", flush=True)
    print(f"{states} states in all, every invariant holds in each of them")
    return 0


def _print_transcript(log: list[str] | None) -> None:
    for number, line in enumerate(log or (), 1):
        print(f"{number:5} {line}")


if __name__ == "__main__":
    sys.exit(main())
