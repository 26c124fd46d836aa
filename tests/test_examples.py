"""The examples run as a newcomer runs them: as programs, from another folder, with their output read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STEPS = 12  # Updates per epoch in the example.
BATCHES = 12
HELD_OUT = 360
MIB = 2**20
#: 12,933 images of 100 pixels, with 10 numbers that say which digit is meant, all of 4 bytes.
TRAINING_BYTES = 12_933 * (100 + 10) * 4


def run_example(
    name: str, folder: Path, *arguments: str, devices: str | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "AFIELD_DEVICES"}
    if devices is not None:
        environment["AFIELD_DEVICES"] = devices
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)


def table_of(output: str) -> dict[str, float]:
    """Read the plain tables: a name, at least two spaces, a figure."""
    rows = (line.rsplit(maxsplit=1) for line in output.splitlines() if re.search(r"  [\d.,]+$", line))
    return {name.strip(): float(figure.replace(",", "")) for name, figure in rows}


# ---- data-parallel training -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("shards", "devices", "count"), [(2, None, 2), (3, "emulated:1", 1)])
def test_digits(tmp_path: Path, shards: int, devices: str | None, count: int) -> None:
    done = run_example("digits_pipeline", tmp_path, "--epochs", "6", "--shards", str(shards), devices=devices)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert ("emulated" in done.stdout) == (devices is None)
    table = table_of(done.stdout)
    assert 0.95 <= table["accuracy"] <= 1.0
    assert table["tasks"] == shards + 1 + 6 * STEPS * (shards + 1) + BATCHES
    assert table["devices"] == count
    assert table["steps per second"] > 0
    assert list(tmp_path.iterdir()) == []

    # Every update reads all shards where they lie, and the weights too.
    assert table["read in place, on devices"] > 6 * STEPS * TRAINING_BYTES
    assert table["made in place, on devices"] > TRAINING_BYTES
    assert table["copied within a device"] < table["made in place, on devices"] / 1000
    # A shard is copied to the other device once at most, weights and gradients once for each update.
    between = table["copied device to device"]
    assert 0 < between < TRAINING_BYTES + 6 * STEPS * MIB if count == 2 else between == 0
    # Nothing but the answers leaves the devices.
    assert table["copied device to host"] == HELD_OUT * 8
    assert table["copied host to device"] == table["written to disk"] == table["read from disk"] == 0


@pytest.mark.slow
def test_digits_says_when_it_missed_the_target(tmp_path: Path) -> None:
    done = run_example("digits_pipeline", tmp_path, "--epochs", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert table_of(done.stdout)["accuracy"] < 0.95
    assert "Traceback" not in done.stderr


# ---- batched inference ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "replicas", "share"), [(None, 2, 1.0), ("emulated:1", 2, 0.5)])
def test_batched_inference(tmp_path: Path, devices: str | None, replicas: int, share: float) -> None:
    arguments = ("--batches", "40", "--batch-size", "500", "--replicas", str(replicas), "--in-flight", "5")
    done = run_example("batched_inference", tmp_path, *arguments, devices=devices)
    assert done.returncode == 0, done.stdout + done.stderr
    table = table_of(done.stdout)
    assert table["accuracy"] >= 0.95
    assert table["images"] == 40 * 500
    assert table["images per second"] > 0
    assert table["most batches in flight"] == 5
    assert table["devices of each replica"] == share
    batches = re.search(r"batches of each replica +(\d+)\+(\d+)\n", done.stdout)
    assert batches is not None and int(batches[1]) + int(batches[2]) == 40

    # The scores are made on the devices and copied to the host once; prepared batches are made in the host store.
    assert table["made in place, on devices"] == table["copied device to host"] == 40 * 500 * 10 * 4
    assert table["made in place, on the host"] == 40 * 500 * 100 * 4
    assert table["copied device to device"] == table["copied host to device"] == 0
    assert list(tmp_path.iterdir()) == []


# ---- a working set of four times the device -------------------------------------------------------------------------


@pytest.mark.slow
def test_working_set(tmp_path: Path) -> None:
    arguments = ("--devices", "emulated:1:16MiB", "--host-memory", "24MiB", "--passes", "2")
    done = run_example("working_set", tmp_path, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "64 blocks of 1 MiB: 4 times a device of 16 MiB"
    assert lines[-1] == "All blocks are right."
    heads = re.split(r"  +", lines[1].strip())
    passes = [dict(zip(heads, map(float, line.split()[-len(heads) :]), strict=True)) for line in lines[2:5]]
    made, *read = passes
    assert made["to host"] >= 64 - 16 and made["to device"] == 0
    for one in read:
        assert one["to device"] > 32
        assert one["from disk"] > 0
        assert one["device"] <= 16 and one["host"] <= 24
        assert one["device"] + one["host"] + one["disk"] >= 64
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_working_set_needs_no_disk_where_the_host_has_room(tmp_path: Path) -> None:
    arguments = ("--devices", "emulated:1:16MiB", "--host-memory", "128MiB", "--passes", "1")
    done = run_example("working_set", tmp_path, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    heads, made, read = (line.split("  ") for line in done.stdout.splitlines()[1:4])
    assert heads[-1].strip() == "disk" and made[-1].strip() == read[-1].strip() == "0"


# ---- wrong use ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "complaint"),
    [
        ("digits_pipeline", ("--epochs", "0"), "--epochs: must be a whole number from 1 on"),
        ("digits_pipeline", ("--devices", "two"), "'two' is not understood"),
        ("digits_pipeline", ("--devices", "none"), "this example needs a device"),
        ("batched_inference", ("--in-flight", "many"), "--in-flight: must be a whole number"),
        ("working_set", ("--host-memory", "lots"), "'lots' is not a number of bytes"),
        ("working_set", ("--devices", "emulated:1:1KiB"), "at least 2 MiB"),
    ],
)
def test_wrong_options_are_refused_with_the_reason(
    tmp_path: Path, name: str, arguments: tuple[str, ...], complaint: str
) -> None:
    done = run_example(name, tmp_path, *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
