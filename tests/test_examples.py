"""The examples run as a newcomer runs them: as programs, from another folder, with their output read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STEPS = 12  # Updates per epoch in the example.
BATCHES = 12


def run_digits(folder: Path, *arguments: str, devices: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "AFIELD_DEVICES"}
    if devices is not None:
        environment["AFIELD_DEVICES"] = devices
    command = [sys.executable, str(ROOT / "examples/digits_pipeline.py"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)


def table_of(output: str) -> dict[str, float]:
    """Read the plain table: a name, at least two spaces, a figure."""
    rows = (line.rsplit(maxsplit=1) for line in output.splitlines() if "  " in line)
    return {name.strip(): float(figure.replace(",", "")) for name, figure in rows}


@pytest.mark.slow
@pytest.mark.parametrize(("shards", "devices", "count"), [(2, None, 2), (3, "emulated:1", 1)])
def test_digits(tmp_path: Path, shards: int, devices: str | None, count: int) -> None:
    done = run_digits(tmp_path, "--epochs", "6", "--shards", str(shards), devices=devices)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert ("emulated" in done.stdout) == (devices is None)
    table = table_of(done.stdout)
    assert 0.95 <= table["accuracy"] <= 1.0
    assert table["tasks run"] == 6 * STEPS * (shards + 1) + BATCHES
    # Every update reads all shards where they lie: 12,933 images of 100 pixels of 4 bytes.
    assert table["bytes shared without a copy"] >= 6 * STEPS * 12_933 * 100 * 4
    assert table["devices"] == count
    assert table["seconds"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_digits_says_when_it_missed_the_target(tmp_path: Path) -> None:
    done = run_digits(tmp_path, "--epochs", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert table_of(done.stdout)["accuracy"] < 0.95
    assert "Traceback" not in done.stderr


def test_digits_refuses_no_epochs(tmp_path: Path) -> None:
    done = run_digits(tmp_path, "--epochs", "0")
    assert done.returncode == 2
    assert "--epochs" in done.stderr
