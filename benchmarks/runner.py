"""The runner: it takes a system through the cases and alternates their rounds with rounds of the machine's limits.

Theory of operation. The system is started once and stays up for all cases in a row that need it; a case that starts
and stops it itself (`fresh`) finds it stopped. Each case is warmed up by one round that is thrown away. Then a round
of the limit and a round of the case take turns, so that both meet the same states of the machine. A case that fails
is recorded with its error, the system is started anew for the next, and the run goes on.
"""

from __future__ import annotations

import contextlib
import statistics
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks import procs
from benchmarks.cases import Case, Scale, System
from benchmarks.limits import LIMITS

Limit = Callable[[Any], list[float]]
"""Given a scale's `effort`, the samples of one round."""


@dataclass(slots=True)
class Outcome:
    """What one case gave on one system: samples by round, the limit's samples by round, or why there are none."""

    case: str
    rounds: list[list[float]] = field(default_factory=list)
    limit_rounds: list[list[float]] = field(default_factory=list)
    error: str = ""
    unsupported: bool = False


def summary(rounds: list[list[float]]) -> dict[str, float]:
    """Return median, 10th and 90th percentile, least, greatest and number of all samples; empty when there are none."""
    samples = sorted(sample for one in rounds for sample in one)
    if not samples:
        return {}
    last = len(samples) - 1
    return {
        "median": statistics.median(samples),
        "p10": samples[round(0.1 * last)],
        "p90": samples[round(0.9 * last)],
        "min": samples[0],
        "max": samples[last],
        "samples": len(samples),
    }


def ratio(top: Mapping[str, float], bottom: Mapping[str, float]) -> float | None:
    """Return the quotient of two summaries' medians, or None where one is missing or zero."""
    if not top or not bottom or not bottom["median"]:
        return None
    return top["median"] / bottom["median"]


def run_cases(
    system: System, cases: Iterable[Case], scale: Scale, *, limits: bool, table: Mapping[str, Limit] = LIMITS
) -> Iterator[Outcome]:
    """Run the cases on a system, which is stopped before and after, and yield each outcome as it is known.

    `table` has the limits by name.
    """
    procs.mark_descendants()
    up = False
    try:
        for case in cases:
            outcome = Outcome(case.name)
            try:
                if up == case.fresh:
                    up = not up
                    (system.start if up else system.stop)()
                _run_case(system, case, scale, outcome, table if limits else {})
            except NotImplementedError as error:
                outcome.error, outcome.unsupported = str(error) or "not supported", True
            except Exception as error:
                outcome.error = "".join(traceback.format_exception_only(error)).strip()
                _stop_quietly(system)
                up = False
            yield outcome
    finally:
        if up:
            _stop_quietly(system)


def _run_case(system: System, case: Case, scale: Scale, outcome: Outcome, table: Mapping[str, Limit]) -> None:
    limit = table[case.limit] if table and case.limit else None
    if case.warm_up:
        case.measure(system, scale)
    for _ in range(min(scale.rounds, case.max_rounds)):
        if limit:
            outcome.limit_rounds.append(limit(scale.effort))
        outcome.rounds.append(case.measure(system, scale))


def _stop_quietly(system: System) -> None:
    # The case's own error is what the reader needs; a second one from cleaning up would hide it.
    with contextlib.suppress(Exception):
        system.stop()


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as plain data."""
    return {
        "case": outcome.case,
        "rounds": outcome.rounds,
        "limit_rounds": outcome.limit_rounds,
        "error": outcome.error,
        "unsupported": outcome.unsupported,
    }
