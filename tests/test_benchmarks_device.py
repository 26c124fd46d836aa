"""The device benchmark measures what it says: its parts alone, and the whole program once with small sizes.

No assertion looks at how fast anything was: a busy machine must not fail a build.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import afield
from benchmarks import device, device_cases, device_peers
from benchmarks.device_cases import GROUPS, QUICK, Backend, DeviceScale, Group
from benchmarks.device_limits import RawCopies
from benchmarks.device_tasks import pair_us, parse_size, size_name
from benchmarks.runner import Outcome, run_cases

ROOT = Path(__file__).resolve().parent.parent
EMULATED = Backend("emulated")
SMALL = DeviceScale(1, 2, (1 << 10,), (1 << 20,), 32 << 20, 10, 500, 50)


def groups(scale: DeviceScale = QUICK, backend: Backend = EMULATED) -> dict[str, Group]:
    return {name: make(backend, scale) for name, make in GROUPS.items()}


def run(group: Group, scale: DeviceScale = SMALL) -> dict[str, Outcome]:
    system: Any = group.system
    return {one.case: one for one in run_cases(system, group.cases, scale, limits=True, table=group.limits)}


@pytest.mark.parametrize(
    ("text", "size_bytes", "name"),
    [
        ("1KiB", 1024, "1kib"),
        ("64kib", 65536, "64kib"),
        ("1536", 1536, "1536b"),
        ("1024 MiB".replace(" ", ""), 1 << 30, "1gib"),
    ],
)
def test_sizes(text: str, size_bytes: int, name: str) -> None:
    assert parse_size(text) == size_bytes
    assert size_name(size_bytes) == name
    assert parse_size(name) == size_bytes


@pytest.mark.parametrize("text", ["", "0KiB", "1KB", "-1MiB", "1.5GiB", "much"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    options = device.parse(["--sizes", "1MiB,1KiB,1MiB", "--quick", "--link", "5GB/s", "--only", "copy"])
    assert options.scale.sizes == (1 << 10, 1 << 20)
    assert device.repeat_with(options) == (
        "python -m benchmarks.device --sizes 1MiB,1KiB,1MiB --link 5GB/s --quick --only copy"
    )
    assert device.parse([]).scale.sizes[0] == 1 << 10
    for wrong in (["--sizes", "1KB"], ["--backend", "cuda", "--link", "5GB/s"], ["--peer-python", "dask=x"]):
        with pytest.raises(SystemExit):
            device.parse(wrong)
    assert "is no size" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("pynvml") is not None, reason="CUDA may be there")
def test_cuda_is_refused_with_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert device.main(["--backend", "cuda"]) == 2
    assert "afield[cuda12]" in capsys.readouterr().err


def test_every_case_has_its_limit() -> None:
    names = [case.name for group in groups().values() for case in group.cases]
    assert len(set(names)) == len(names)
    for group in groups().values():
        for case in group.cases:
            assert case.limit in {"", *group.limits}, case.name
            if case.must:
                assert case.must.of in {"", "limit", *names}, case.name
                assert case.must.of != "limit" or case.limit, case.name


def test_a_fast_gpu_has_a_figure_of_its_own_to_reach() -> None:
    gpu = Backend("cuda", name="NVIDIA H100", memory_bytes=80 << 30)
    large = DeviceScale(sizes=(1 << 30,))
    (absolute,) = [case for case in GROUPS["handoff"](gpu, large).cases if case.name.endswith("on_h100")]
    assert str(absolute.must) == "≤ 300"
    assert not any("h100" in case.name for case in GROUPS["handoff"](EMULATED, large).cases)


def test_a_pair_is_timed_until_its_end_and_dropped() -> None:
    order: list[Any] = []

    def consume(ref: str) -> str:
        order.append(ref)
        return "done"

    samples = pair_us(order.append, lambda: "ref", consume, 3)
    assert len(samples) == 3 and min(samples) > 0
    assert order == ["ref", "done"] * 3


@pytest.mark.parametrize("link", ["", "100MB/s"])
def test_raw_copies(link: str) -> None:
    raw = RawCopies("emulated", 1 << 20, link)
    try:
        for way in ("to host", "from host", "peer"):
            took_s = raw.seconds(way, 1 << 20)
            assert took_s >= ((1 << 20) / 100e6 if link else 0)
        assert len(raw.gb_s("peer", 4096)) == 3
        with pytest.raises(NotImplementedError, match="second device"):
            raw.seconds("elsewhere", 1)
    finally:
        raw.close()


def test_a_copy_where_there_should_be_none_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The producer keeps what it returns, so it has to be copied; the case must not report how fast that was."""
    bodies = device_cases.task_bodies

    def with_an_alias() -> dict[str, Any]:
        def make(size_bytes: int) -> Any:
            array = afield.array_module().zeros(size_bytes, "uint8")
            make.kept = array  # type: ignore[attr-defined]
            return array

        return {**bodies(), "make": make}

    monkeypatch.setattr(device_cases, "task_bodies", with_an_alias)
    group = GROUPS["handoff"](EMULATED, SMALL)
    found = run(Group(group.system, group.cases[:1], group.limits))
    assert "AssertionError" in found["handoff_1kib"].error
    assert "device_bytes_copied" in found["handoff_1kib"].error
    assert not found["handoff_1kib"].rounds


def test_settings_for_the_session_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device_cases.LINK, "7GB/s")
    monkeypatch.setattr(device_cases.afield, "init", lambda **options: None)
    monkeypatch.setattr(device_cases.afield, "shutdown", lambda: None)
    system = device_cases.DeviceSystem(Backend("emulated", "5GB/s"), devices=1, device_bytes=1, host_bytes=1)
    system.start()
    assert os.environ[device_cases.LINK] == "5GB/s"
    system.stop()
    assert os.environ[device_cases.LINK] == "7GB/s"


def test_the_peers_pair_copies_on_both_sides() -> None:
    make, take = device_peers._bodies()
    one, two = make(4096), make(4096)
    assert one.nbytes == take(one) == 4096
    assert not any(a is b or a.base is b for a, b in ((one, two), (two, one)))
    cases = partial(device_peers._hand_off, 4096)
    assert callable(cases)


@pytest.mark.slow(10)
def test_device_quick(tmp_path: Path) -> None:
    """Every case, in small; the asked-for peer does not exist, which costs its column only."""
    path = tmp_path / "device.json"
    command = [sys.executable, "-m", "benchmarks.device", "--quick", "--json", str(path), "--peer", "ray"]
    command += ["--peer-python", f"ray={tmp_path / 'no-such-python'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "python -m venv .peer-ray" in done.stderr
    assert "Devices are emulated" in done.stdout
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["command"] == "python -m benchmarks.device --quick --peer ray"
    assert document["device"] == {"backend": "emulated", "name": "emulated device", "link": ""}
    found = {one["case"]: one for one in document["cases"]}
    assert list(found) == [case.name for group in groups().values() for case in group.cases]
    for one in found.values():
        assert one["error"] == "", one
        assert one["samples"] >= 1
        if one["limit"]["name"]:
            assert one["limit"]["median"] > 0
