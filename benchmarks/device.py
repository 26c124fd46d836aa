"""The device benchmark: values in device memory, beside what the devices' links, and this machine, allow.

Theory of operation. `python -m benchmarks.device` runs on emulated devices, `--backend cuda` on the GPUs of the machine; the
cases are the same (`device_cases`). Each group of them is a session of its own, with devices of a size that suits it, and is
run by the runner of the micro benchmark: rounds of a case and of its limit take turns. `--peer ray` measures the hand-off
there as well, where an array has to pass through host memory (`device_peers`). What comes out is a table and, with `--json`,
every figure. The exit status is 1 when a case raised an error (a copy where there should be none is one), 2 when there are no
such devices; a case that is merely too slow is marked SHORT, because a busy machine must not break a build.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

import afield
from afield.errors import AfieldError, NoDeviceError
from benchmarks.device_cases import FULL, GROUPS, QUICK, Backend, DeviceScale
from benchmarks.device_limits import first_cuda_device
from benchmarks.device_tasks import parse_size, size_name
from benchmarks.peers import install_hint, measure_peer, peer_python
from benchmarks.report import Row, as_document, as_table, number
from benchmarks.runner import run_cases, summary

#: Of this machine's free memory, emulated devices and the copies of arrays take no more than this part.
MEMORY_SHARE = 0.5


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line; a wrong option ends the program with a message, as argparse does."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device", description="Measure values in device memory beside the devices' limits."
    )
    parser.add_argument("--backend", choices=("emulated", "cuda"), default="emulated")
    parser.add_argument("--sizes", metavar="SIZE,...", help="of the arrays handed over, such as 1KiB,1MiB,1GiB")
    parser.add_argument(
        "--link", default="", metavar="SPEED", help="of emulated links, such as 5GB/s; as fast as memory without it"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: it shows that everything runs, not how fast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to this file")
    parser.add_argument("--peer", action="append", default=[], choices=("ray",), help="measure the hand-off there too")
    parser.add_argument(
        "--peer-python", action="append", default=[], metavar="ray=PYTHON", help="interpreter that has the peer"
    )
    parser.add_argument(
        "--only", action="append", default=[], choices=tuple(GROUPS), help="run this group of cases only (repeatable)"
    )
    options = parser.parse_args(arguments)
    if options.link and options.backend == "cuda":
        parser.error("--link is the speed of emulated links; those of real devices are what they are")
    try:
        sizes = tuple(sorted(set(map(parse_size, options.sizes.split(","))))) if options.sizes else ()
    except ValueError as error:
        parser.error(str(error))
    scale = QUICK if options.quick else FULL
    options.scale = replace(scale, sizes=sizes) if sizes else _fitting(scale)
    options.pythons = dict(item.partition("=")[::2] for item in options.peer_python)
    if set(options.pythons) - {"ray"}:
        parser.error("--peer-python takes ray=PYTHON")
    return options


def _fitting(scale: DeviceScale) -> DeviceScale:
    """Leave out arrays for which this machine has no room (a peer copies them); sizes that were asked for stay."""
    room = int(psutil.virtual_memory().available * MEMORY_SHARE) // 4
    return replace(scale, sizes=tuple(size for size in scale.sizes if size <= room) or scale.sizes[:1])


def find_backend(options: argparse.Namespace) -> Backend:
    """Return what to run on; raises NoDeviceError with the remedy where there are no CUDA devices."""
    if options.backend == "cuda":
        info = first_cuda_device()
        return Backend("cuda", name=info.name, memory_bytes=info.memory_bytes)
    return Backend("emulated", options.link, name="emulated device")


def measure_ours(backend: Backend, options: argparse.Namespace, rows: dict[str, Row]) -> None:
    """Run the cases and put them into the rows by name."""
    for name, make in GROUPS.items():
        if options.only and name not in options.only:
            continue
        group = make(backend, options.scale)
        system: Any = group.system
        outcomes = run_cases(system, group.cases, options.scale, limits=True, table=group.limits)
        for case, outcome in zip(group.cases, outcomes, strict=True):
            rows[case.name] = Row(case, outcome)
            _say(options.console, "afield", rows[case.name], "")


def measure_ray(rows: dict[str, Row], options: argparse.Namespace, versions: dict[str, str]) -> str:
    """Add Ray's outcomes to the rows; return what went wrong, or nothing."""
    names = [name for name, row in rows.items() if name.startswith("handoff_") and row.case.peers]
    if not names:
        return ""
    python = peer_python("ray", options.pythons.get("ray"))
    if python is None:
        return install_hint("ray")
    try:
        found = measure_peer("ray", python, names, quick=options.quick, module="benchmarks.device_peers")
        for version, outcome in found:
            versions["ray"] = version
            rows[outcome.case].peers["ray"] = outcome
            _say(options.console, "ray", rows[outcome.case], "ray")
    except (RuntimeError, OSError, ValueError) as error:
        return f"ray: {error}"
    return ""


def _say(console: Console, system: str, row: Row, peer: str) -> None:
    outcome = row.peers[peer] if peer else row.ours
    measured = summary(outcome.rounds)
    said = f"{number(measured['median'])} {row.case.unit}" if measured else outcome.error.partition("\n")[0]
    console.print(f"{system:6} {outcome.case:28} {said}", style="dim", markup=False, highlight=False, soft_wrap=True)


def repeat_with(options: argparse.Namespace) -> str:
    """Return the command that repeats this run, without what belongs to this machine alone (paths)."""
    words = ["python -m benchmarks.device"]
    if options.backend != "emulated":
        words.append(f"--backend {options.backend}")
    if options.sizes:
        words.append(f"--sizes {options.sizes}")
    if options.link:
        words.append(f"--link {options.link}")
    words += ["--quick"] if options.quick else []
    words += [f"--peer {peer}" for peer in options.peer] + [f"--only {name}" for name in options.only]
    return " ".join(words)


def notes(backend: Backend, scale: DeviceScale) -> Iterator[str]:
    """Yield what has to be known to read the table."""
    if backend.kind == "emulated":
        speed = f"links of {backend.link}" if backend.link else "links as fast as this machine copies memory"
        yield f"Devices are emulated, with {speed}: ratios mean something, absolute speeds say nothing about a GPU."
    else:
        yield f"Device: {backend.name}."
    yield f"Arrays handed over: {', '.join(map(size_name, scale.sizes))}; what is handed over is allocated, not filled."


def main(arguments: list[str]) -> int:
    """Run the benchmark; returns the exit status."""
    options = parse(arguments)
    # Progress goes to standard error, so that the table alone can be piped or kept.
    options.console = Console(stderr=True)
    try:
        backend = find_backend(options)
    except NoDeviceError as error:
        print(f"python -m benchmarks.device: {error}; or leave out --backend cuda", file=sys.stderr)
        return 2
    versions = {"afield": str(getattr(afield, "__version__", "unknown"))}
    rows: dict[str, Row] = {}
    measure_ours(backend, options, rows)
    problems = [problem for _ in options.peer[:1] if (problem := measure_ray(rows, options, versions))]
    out = Console()
    if not out.is_terminal:
        out = Console(width=180)
    out.print(as_table(rows, options.peer[:1]))
    for note in notes(backend, options.scale):
        out.print(note, markup=False, highlight=False, soft_wrap=True)
    failed = [row for row in rows.values() if row.ours.error and not row.ours.unsupported]
    for problem in [*(f"{row.case.name}: {row.ours.error.partition(chr(10))[0]}" for row in failed), *problems]:
        options.console.print(problem, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if options.json:
        document = as_document(rows, command=repeat_with(options), quick=options.quick, versions=versions)
        document["device"] = {"backend": backend.kind, "name": backend.name, "link": backend.link}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return int(bool(failed))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except AfieldError as error:
        sys.exit(f"python -m benchmarks.device: {error}")
