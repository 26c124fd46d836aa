"""`progress` by behaviour: what it yields, and what it shows where."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import afield
from afield.libraries import progress as module
from afield.libraries.progress import progress

pytestmark = pytest.mark.usefixtures("shared_runtime")

PATIENCE_S = 30.0


def refs(count: int) -> list[Any]:
    @afield.remote
    def same(x: int) -> int:
        return x

    return [same.remote(i) for i in range(count)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.contract("rich")
def test_yields_every_ref_once(capsys: pytest.CaptureFixture[str]) -> None:
    all_refs = refs(50)
    assert set(progress(all_refs)) == set(all_refs)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "tasks: 50 of 50 in 0 s\n"


def test_yields_in_the_order_of_completion(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    @afield.remote(num_cpus=0)
    def wait_for_gate() -> str:
        deadline = time.monotonic() + PATIENCE_S
        while not gate.exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        return "slow"

    slow, quick = wait_for_gate.remote(), refs(3)
    seen = progress([slow, *quick])
    assert {next(seen) for _ in range(3)} == set(quick)
    gate.touch()
    assert list(seen) == [slow]


def test_more_than_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW", 4)
    all_refs = refs(30)
    assert set(progress(all_refs)) == set(all_refs)


def test_failed_tasks_are_yielded_too() -> None:
    @afield.remote
    def fail() -> None:
        raise KeyError

    (ref,) = progress([fail.remote()])
    with pytest.raises(KeyError):
        afield.get(ref)


def test_takes_iterators_and_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(afield.get(list(progress((ref for ref in refs(4)), total=8, description="parts")))) == [0, 1, 2, 3]
    assert capsys.readouterr().err == "parts: 4 of 8 in 0 s\n"
    assert list(progress([])) == []


def test_a_stream_is_passed_on_as_it_comes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gate = tmp_path / "gate"

    @afield.remote(num_returns="streaming")
    def stream() -> Iterator[int]:
        yield 0
        deadline = time.monotonic() + PATIENCE_S
        while not gate.exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        yield 1

    seen = progress(stream.remote())
    assert afield.get(next(seen)) == 0
    gate.touch()
    assert [afield.get(ref) for ref in seen] == [1]
    assert capsys.readouterr().err == "tasks: 2 in 0 s\n"


@pytest.mark.contract("rich")
def test_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    assert len(list(progress(refs(3), description="[x] things"))) == 3
    shown = terminal.getvalue()
    assert "[x] things" in shown
    assert "3/3" in shown


def test_lines_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.0)
    assert len(list(progress(refs(3)))) == 3
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" in ")[0] for line in lines] == [f"tasks: {i} of 3" for i in (1, 2, 3)]


def test_nothing_where_stderr_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stderr in (None, closed):
        monkeypatch.setattr(sys, "stderr", stderr)
        assert len(list(progress(refs(3)))) == 3


def test_stderr_may_be_closed_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    seen = progress(refs(2))
    next(seen)
    stream.close()
    assert len(list(seen)) == 1


def test_leaving_early_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    seen = progress(refs(3))
    next(seen)
    seen.close()  # type: ignore[attr-defined]
    assert capsys.readouterr().err == "tasks: 1 of 3 in 0 s\n"


def test_wrong_use_is_told_at_once() -> None:
    (ref,) = refs(1)
    with pytest.raises(TypeError, match="single"):
        progress(ref)
    with pytest.raises(TypeError, match="not a int"):
        progress([ref, 3])
    with pytest.raises(ValueError, match="duplicates"):
        progress([ref, ref])
