"""The report: it turns outcomes into rows, decides each verdict, and writes them as a table and as JSON.

Theory of operation. A row holds everything that is known of one case: our samples, the limit's, each peer's. A
verdict compares medians of this run only. It is `ok` or `SHORT` where the row says what it must reach, `-` where it
does not, and names what is missing (`no ray`) where the comparison had no other side.
"""

from __future__ import annotations

import datetime
import os
import platform
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.cases import Case
from benchmarks.runner import Outcome, ratio, summary

JSON_SCHEMA = 1
"""Grows when a field of the JSON changes its meaning."""

_STYLES = {"ok": "green", "SHORT": "bold red", "error": "bold red"}


@dataclass(slots=True)
class Row:
    """One case with our outcome and those of the peers."""

    case: Case
    ours: Outcome
    peers: dict[str, Outcome] = field(default_factory=dict)


def speedup(row: Row, peer: str) -> float | None:
    """Return how many times better we are than a peer, whichever direction is better."""
    if peer not in row.peers:
        return None
    ours, theirs = summary(row.ours.rounds), summary(row.peers[peer].rounds)
    return ratio(ours, theirs) if row.case.more_is_better else ratio(theirs, ours)


def to_limit(row: Row) -> float | None:
    """Return our median as a multiple of the limit's."""
    return ratio(summary(row.ours.rounds), summary(row.ours.limit_rounds))


def verdict(row: Row, rows: dict[str, Row]) -> str:
    """Return `ok`, `SHORT`, `-` (nothing demanded or not run), `error`, or `no X` when the other side X is missing."""
    must, measured = row.case.must, summary(row.ours.rounds)
    if row.ours.error and not row.ours.unsupported:
        return "error"
    if must is None or not measured:
        return "-"
    if must.of == "":
        figure: float | None = measured["median"]
    elif must.of == "limit":
        figure = to_limit(row)
    elif must.of in rows:
        figure = ratio(measured, summary(rows[must.of].ours.rounds))
    else:
        figure = speedup(row, must.of)
    if figure is None:
        return f"no {must.of}"
    reached = figure <= must.factor if must.bound == "most" else figure >= must.factor
    return "ok" if reached else "SHORT"


def machine() -> dict[str, Any]:
    """Describe the machine by what matters for the figures; its name is not among them."""
    model = ""
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "cpus": os.cpu_count(),
        "cpu_model": model,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def as_document(rows: dict[str, Row], *, command: str, quick: bool, versions: dict[str, str]) -> dict[str, Any]:
    """Return the whole run as plain data for JSON."""
    return {
        "schema": JSON_SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "quick": quick,
        "machine": machine(),
        "versions": versions,
        "cases": [_case_document(row, rows) for row in rows.values()],
    }


def _case_document(row: Row, rows: dict[str, Row]) -> dict[str, Any]:
    return {
        "case": row.case.name,
        "unit": row.case.unit,
        "must": str(row.case.must or ""),
        "verdict": verdict(row, rows),
        "error": row.ours.error,
        **_measured(row.ours.rounds),
        "limit": {"name": row.case.limit, "ratio": to_limit(row), **_measured(row.ours.limit_rounds)},
        "peers": {
            name: {"times_better": speedup(row, name), "error": peer.error, **_measured(peer.rounds)}
            for name, peer in row.peers.items()
        },
    }


def _measured(rounds: list[list[float]]) -> dict[str, Any]:
    return {**summary(rounds), "round_medians": [summary([one])["median"] for one in rounds if one]}


def number(value: float) -> str:
    """Return three significant digits without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def as_table(rows: dict[str, Row], peers: list[str]) -> Table:
    """Return the run as a table; the cells hold medians, the spread is from the 10th to the 90th percentile."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("case", no_wrap=True)
    for title in ("median", "p10 - p90", "limit", "p10 - p90", "ratio", "must"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for peer in peers:
        table.add_column(peer, justify="right", no_wrap=True)
        table.add_column("better by", justify="right", no_wrap=True)
    for row in rows.values():
        table.add_row(*_cells(row, rows, peers))
    return table


def _cells(row: Row, rows: dict[str, Row], peers: list[str]) -> list[str]:
    ours, limit, times = summary(row.ours.rounds), summary(row.ours.limit_rounds), to_limit(row)
    word = verdict(row, rows)
    style = _STYLES.get(word)
    must = row.case.must
    cells = [
        row.case.name,
        f"{number(ours['median'])} {row.case.unit}".rstrip() if ours else "-",
        f"{number(ours['p10'])} - {number(ours['p90'])}" if ours else "",
        f"{number(limit['median'])} {row.case.unit}" if limit else "",
        f"{number(limit['p10'])} - {number(limit['p90'])}" if limit else "",
        f"{times:.2f}" if times is not None else "",
        (str(must) if must.of else f"{must} {row.case.unit}") if must else "",
        f"[{style}]{word}[/]" if style else word,
    ]
    for peer in peers:
        theirs, gain = summary(row.peers[peer].rounds) if peer in row.peers else {}, speedup(row, peer)
        cells += [number(theirs["median"]) if theirs else "-", f"{number(gain)} x" if gain is not None else ""]
    return cells
