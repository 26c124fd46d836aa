"""The micro benchmark: every case of the runtime beside the machine's limit and, where asked for, beside its peers.

Theory of operation. `python -m benchmarks.micro` takes this runtime through the table of cases, in this process,
rounds of each case alternating with rounds of its limit. Each `--peer` is then measured with the same cases in a
process and an interpreter of its own, after ours has stopped and never at the same time. What comes out is a table
and, with `--json`, every figure. A peer that is missing or fails costs its column and nothing else. The exit status
is 1 when one of our own cases raised an error; a case that is merely too slow is marked SHORT, because a busy machine
must not break a build.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

import afield
from benchmarks.cases import FULL, QUICK, Case, select
from benchmarks.peers import RayLike, install_hint, measure_peer, peer_python
from benchmarks.report import Row, as_document, as_table, number
from benchmarks.runner import Outcome, run_cases, summary

PEERS = ("ray", "dask")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line; a wrong option ends the program with a message, as argparse does."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.micro", description="Measure afield beside the machine's limits."
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: it shows that everything runs, not how fast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to this file")
    parser.add_argument("--peer", action="append", default=[], choices=PEERS, help="measure this peer too (repeatable)")
    parser.add_argument(
        "--peer-python", action="append", default=[], metavar="PEER=PYTHON", help="interpreter that has the peer"
    )
    parser.add_argument("--only", action="append", default=[], metavar="CASE", help="run this case only (repeatable)")
    options = parser.parse_args(arguments)
    options.pythons = dict(item.partition("=")[::2] for item in options.peer_python)
    if unknown := set(options.pythons) - set(PEERS):
        parser.error(f"--peer-python takes PEER=PYTHON with PEER one of {', '.join(PEERS)}, not {', '.join(unknown)}")
    try:
        options.cases = select(options.only)
    except ValueError as error:
        parser.error(str(error))
    return options


def measure_ours(cases: list[Case], *, quick: bool, console: Console) -> dict[str, Row]:
    """Run the cases on this runtime and return them by name."""
    rows = {}
    outcomes = run_cases(RayLike("afield", afield), cases, QUICK if quick else FULL, limits=True)
    for case, outcome in zip(cases, outcomes, strict=True):
        rows[case.name] = Row(case, outcome)
        _say(console, "afield", outcome, case.unit)
    return rows


def measure_theirs(peer: str, rows: dict[str, Row], options: argparse.Namespace, versions: dict[str, str]) -> str:
    """Add a peer's outcomes to the rows; return what went wrong, or nothing."""
    console: Console = options.console
    names = [row.case.name for row in rows.values() if row.case.peers]
    python = peer_python(peer, options.pythons.get(peer))
    if python is None:
        return install_hint(peer)
    try:
        for version, outcome in measure_peer(peer, python, names, quick=options.quick):
            versions[peer] = version
            rows[outcome.case].peers[peer] = outcome
            _say(console, peer, outcome, rows[outcome.case].case.unit)
    except (RuntimeError, OSError, ValueError) as error:
        return f"{peer}: {error}"
    return ""


def _say(console: Console, system: str, outcome: Outcome, unit: str) -> None:
    measured = summary(outcome.rounds)
    said = f"{number(measured['median'])} {unit}" if measured else outcome.error
    console.print(f"{system:6} {outcome.case:28} {said}", style="dim", markup=False, highlight=False, soft_wrap=True)


def repeat_with(options: argparse.Namespace) -> str:
    """Return the command that repeats this run, without what belongs to this machine alone (paths)."""
    words = ["python -m benchmarks.micro", *(["--quick"] if options.quick else [])]
    words += [f"--peer {peer}" for peer in options.peer] + [f"--only {name}" for name in options.only]
    return " ".join(words)


def main(arguments: list[str]) -> int:
    """Run the benchmark; returns the exit status."""
    options = parse(arguments)
    # Progress goes to standard error, so that the table alone can be piped or kept.
    options.console = Console(stderr=True)
    versions = {"afield": str(getattr(afield, "__version__", "unknown"))}
    rows = measure_ours(options.cases, quick=options.quick, console=options.console)
    problems = [problem for peer in options.peer if (problem := measure_theirs(peer, rows, options, versions))]
    out = Console()
    if not out.is_terminal:
        out = Console(width=180)
    out.print(as_table(rows, options.peer))
    for row in rows.values():
        if row.ours.error and not row.ours.unsupported:
            problems.append(f"{row.case.name}: {row.ours.error}")
    for problem in problems:
        options.console.print(problem, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if options.json:
        document = as_document(rows, command=repeat_with(options), quick=options.quick, versions=versions)
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return int(any(row.ours.error and not row.ours.unsupported for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
