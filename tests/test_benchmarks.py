"""The benchmarks measure what they say: the parts on made-up systems, the whole program once with small sizes.

No assertion looks at how fast anything was: a busy machine must not fail a build.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import procs, report
from benchmarks.cases import CASES, QUICK, Case, Must, Scale, select
from benchmarks.limits import LIMITS, Effort
from benchmarks.peers import install_hint, peer_python
from benchmarks.report import Row, as_document, verdict
from benchmarks.runner import Outcome, ratio, run_cases, summary

ROOT = Path(__file__).resolve().parent.parent
TWO_CORES = len(os.sched_getaffinity(0)) > 1


class Recorder:
    """A system that only knows whether it is up, and writes down what it was told."""

    name = "recorder"

    def __init__(self) -> None:
        self.log: list[str] = []

    def start(self) -> None:
        self.log.append("start")

    def stop(self) -> None:
        self.log.append("stop")


def case(name: str, measure: Any, **options: Any) -> Case:
    return Case(name, "µs", measure, warm_up=False, max_rounds=1, **options)


def outcome(name: str, median: float, limit: float | None = None) -> Outcome:
    return Outcome(name, [[median]], [] if limit is None else [[limit]])


def row(
    must: Must | None, median: float, limit: float | None = None, ray: float | None = None, unit: str = "µs"
) -> Row:
    peers = {} if ray is None else {"ray": outcome("it", ray)}
    return Row(Case("it", unit, lambda _system, _scale: [], must), outcome("it", median, limit), peers)


def test_summary_counts_every_round() -> None:
    assert summary([]) == {}
    assert summary([[]]) == {}
    found = summary([[3.0, 1.0], [2.0], [10.0, 4.0]])
    assert found == {"median": 3.0, "p10": 1.0, "p90": 10.0, "min": 1.0, "max": 10.0, "samples": 5}
    assert ratio(found, {"median": 1.5}) == 2.0
    assert ratio(found, {}) is None
    assert ratio(found, {"median": 0.0}) is None


def test_runner_keeps_the_system_up_and_outlives_a_failing_case() -> None:
    system = Recorder()

    def note(word: str) -> Any:
        def measure(system: Recorder, _scale: Scale) -> list[float]:
            system.log.append(word)
            return [1.0]

        return measure

    def fail(_system: Recorder, _scale: Scale) -> list[float]:
        raise ValueError("too bad")

    def refuse(_system: Recorder, _scale: Scale) -> list[float]:
        raise NotImplementedError("not here")

    cases = [
        case("a", note("a")),
        case("b", note("b")),
        case("fresh", note("fresh"), fresh=True),
        case("fails", fail),
        case("c", note("c")),
        case("refused", refuse),
        case("d", note("d")),
    ]
    found = {one.case: one for one in run_cases(system, cases, QUICK, limits=False)}  # type: ignore[arg-type]
    assert system.log == ["start", "a", "b", "stop", "fresh", "start", "stop", "start", "c", "d", "stop"]
    assert list(found) == [one.name for one in cases]
    assert found["fails"].error == "ValueError: too bad"
    assert not found["fails"].unsupported
    assert found["refused"].unsupported
    assert found["c"].rounds == [[1.0]]


def test_rounds_alternate_with_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def note(word: str, value: float) -> Any:
        def measure(*_arguments: object) -> list[float]:
            order.append(word)
            return [value]

        return measure

    monkeypatch.setitem(LIMITS, "ping-pong", note("limit", 2.0))
    measured = Case("it", "µs", note("case", 5.0), limit="ping-pong", max_rounds=2)
    (found,) = run_cases(Recorder(), [measured], replace(QUICK, rounds=2), limits=True)  # type: ignore[arg-type]
    assert order == ["case", "limit", "case", "limit", "case"]  # The first one warms up.
    assert report.to_limit(Row(measured, found)) == 2.5


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (row(None, 1.0), "-"),
        (row(Must("most", 15), 15.0), "ok"),
        (row(Must("most", 15), 15.1), "SHORT"),
        (row(Must("most", 2.5, "limit"), 25.0, limit=10.0), "ok"),
        (row(Must("most", 2.5, "limit"), 26.0, limit=10.0), "SHORT"),
        (row(Must("most", 2.5, "limit"), 26.0), "no limit"),
        (row(Must("least", 0.7, "limit"), 6.0, limit=10.0, unit="GB/s"), "SHORT"),
        (row(Must("least", 25, "ray"), 4.0, ray=100.0), "ok"),
        (row(Must("least", 25, "ray"), 5.0, ray=100.0), "SHORT"),
        (row(Must("least", 25, "ray"), 5.0), "no ray"),
        (row(Must("least", 2, "ray"), 10.0, ray=4.0, unit="GB/s"), "ok"),
    ],
)
def test_verdict(made: Row, expected: str) -> None:
    assert verdict(made, {"it": made}) == expected


def test_verdict_against_another_case_and_after_an_error() -> None:
    base = row(None, 2.0)
    flat = row(Must("most", 1.5, "base"), 4.0)
    assert verdict(flat, {"base": base, "it": flat}) == "SHORT"
    flat.ours.error = "ValueError: too bad"
    assert verdict(flat, {"base": base, "it": flat}) == "error"
    flat.ours = Outcome("it", error="only without --quick", unsupported=True)
    assert verdict(flat, {"base": base, "it": flat}) == "-"


def test_cases_refer_to_what_exists() -> None:
    names = [one.name for one in CASES]
    assert len(set(names)) == len(names)
    for one in CASES:
        assert one.limit in {"", *LIMITS}, one.name
        if one.must:
            assert one.must.of in {"", "limit", "ray", *names}, one.name
            assert one.must.of != "limit" or one.limit, one.name
    assert [one.name for one in select(["shutdown", "idle_cpu"])] == ["shutdown", "idle_cpu"]
    assert all(one.peers for one in select([], peers=True))
    with pytest.raises(ValueError, match="no case named nonsense"):
        select(["nonsense"])


@pytest.mark.parametrize("name", [*LIMITS])
def test_limit_gives_positive_samples(name: str) -> None:
    if name.endswith("apart") and not TWO_CORES:
        pytest.skip("two cores are needed to keep two processes apart")
    samples = LIMITS[name](Effort(calls=5, asleep_calls=2, copy_bytes=1 << 20))
    assert samples
    assert min(samples) > 0


def test_processes_are_found_by_their_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(procs.MARK, "set, so that it is restored")
    mark = procs.mark_descendants()
    # A session of its own and an early parent's end make it look like a daemon.
    waits = "import sys; sys.stdin.read()"
    script = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {waits!r}], stdout=-3).pid)"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        daemon = int(parent.stdout.readline())
        parent.wait()
        assert {daemon, os.getpid()} <= set(procs.members(mark))
        assert procs.private_bytes(daemon) > 0
        assert procs.proportional_bytes([daemon]) > 0
    deadline = time.monotonic() + 20
    while daemon in procs.members(mark) and time.monotonic() < deadline:
        time.sleep(0.01)  # Its input has been closed, so it ends by itself.
    assert daemon not in procs.members(mark)
    assert procs.cpu_seconds(os.getpid()) > 0
    assert procs.private_bytes(daemon) == 0
    assert procs.resident_bytes() > 1 << 20


@pytest.mark.skipif(not TWO_CORES, reason="two cores are needed to keep two processes apart")
def test_processes_are_held_apart_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(procs.MARK, "set, so that it is restored")
    mark = procs.mark_descendants()
    before = os.sched_getaffinity(0)
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as child:
        with procs.apart(mark):
            ours, theirs = os.sched_getaffinity(0), os.sched_getaffinity(child.pid)
            assert len(ours) == len(theirs) == 1
            assert ours != theirs
        assert os.sched_getaffinity(0) == os.sched_getaffinity(child.pid) == before


def test_missing_peer_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AFIELD_PEER_RAY", str(tmp_path / "python"))
    assert peer_python("ray", str(tmp_path / "no-such-python")) is None
    assert "python -m venv .peer-ray" in install_hint("ray")
    assert "AFIELD_PEER_DASK" in install_hint("dask")


def test_document_is_json() -> None:
    made = row(Must("least", 25, "ray"), 4.0, limit=2.0, ray=100.0)
    rows = {"it": made}
    document = json.loads(json.dumps(as_document(rows, command="c", quick=True, versions={"afield": "0"})))
    (one,) = document["cases"]
    assert one["median"] == 4.0
    assert one["limit"]["ratio"] == 2.0
    assert one["peers"]["ray"]["times_better"] == 25.0
    assert one["verdict"] == "ok"
    assert document["machine"]["cpus"] == os.cpu_count()


@pytest.mark.slow(6)
def test_micro_quick(tmp_path: Path) -> None:
    """Every case of the real runtime, in small; the asked-for peer does not exist, which costs its column only."""
    path = tmp_path / "micro.json"
    command = [sys.executable, "-m", "benchmarks.micro", "--quick", "--json", str(path), "--peer", "ray"]
    command += ["--peer-python", f"ray={tmp_path / 'no-such-python'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "python -m venv .peer-ray" in done.stderr
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["command"] == "python -m benchmarks.micro --quick --peer ray"
    assert set(document) == {"schema", "date", "command", "quick", "machine", "versions", "cases"}
    found = {one["case"]: one for one in document["cases"]}
    assert list(found) == [one.name for one in CASES]
    for one in CASES:
        data = found[one.name]
        assert one.name in done.stdout
        assert data["peers"] == {}
        if one.name == "flat_cost_1m" or (one.name.endswith("apart") and not TWO_CORES):
            assert data["error"]
            continue
        assert data["error"] == "", data
        assert data["samples"] >= 1
        assert data["min"] <= data["p10"] <= data["median"] <= data["p90"] <= data["max"]
        if one.limit:
            assert data["limit"]["median"] > 0
            assert data["limit"]["ratio"] > 0


@pytest.mark.slow
def test_references_in_small(tmp_path: Path) -> None:
    """What references cost is printed, and the table is empty afterwards (the benchmark asserts it)."""
    path = tmp_path / "references.json"
    command = [sys.executable, "-m", "benchmarks.references", "--objects", "2000", "--borrowers", "50"]
    command += ["--refs", "2000", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(path.read_text(encoding="utf-8"))
    assert results["objects"] == 2000 and results["refs"] == 2000
    assert "bytes_per_borrower" in done.stdout
