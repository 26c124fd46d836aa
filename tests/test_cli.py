"""The command `afield`: finds the sessions of this machine, shows them, and sweeps what dead ones left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import afield
from afield.errors import AfieldError, RuntimeDiedError
from afield.runtime.face import api
from afield.runtime.session import sessions
from afield.runtime.session.sessions import SessionInfo
from afield.runtime.tools import cli
from afield.runtime.tools.client import Client
from tests.helpers import poll, processes, program, traces


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A temporary directory of our own, so that sessions beside this test are none of its business."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    yield str(tmp_path)
    afield.shutdown()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(arguments)
    out, error = capsys.readouterr()
    return status, out, error


def test_no_session(place: str, capsys: Any) -> None:
    for command in ("status", "memory"):
        status, out, error = run(capsys, command)
        assert (status, out) == (1, "")
        assert error.startswith("afield: no session of yours runs on this machine")


def test_help_and_version(capsys: Any) -> None:
    assert run(capsys, "version") == (0, f"afield {afield.__version__}\n", "")
    assert run(capsys)[0] == 2
    for arguments in (["--help"], ["memory", "--help"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 0
        assert "--session" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main(["memory", "--sort", "colour"])
    assert ended.value.code == 2


def test_status(place: str, capsys: Any, no_runtime: None) -> None:
    afield.init(num_cpus=2, resources={"licence": 3}, host_memory="64MiB")
    ref = afield.put(b"x" * (1 << 20))
    afield.available_resources()  # a put is announced with whatever is sent next
    assert poll(lambda: len(api.query("processes")) == 3)  # the workers come one by one
    status, out, error = run(capsys, "status", "--json")
    assert status == 0, error
    (facts,) = json.loads(out)
    assert facts["driver_pid"] == os.getpid()
    assert facts["resources"]["licence"] == {"total": 3, "available": 3}
    assert facts["store"]["capacity"] == 64 << 20 and facts["store"]["objects"] == 1
    assert {"pid": os.getpid(), "kind": "driver", "name": "driver", "busy": False} in facts["processes"]
    status, out, error = run(capsys, "status")
    assert status == 0, error
    lines = [line.split() for line in out.splitlines()]
    assert ["licence", "3", "3"] in lines and ["CPU", "2", "2"] in lines
    assert [str(os.getpid()), "driver", "driver"] in lines
    assert len(api.query("processes")) == len(facts["processes"])  # the tool itself is none
    del ref


def test_memory(place: str, capsys: Any, no_runtime: None) -> None:
    afield.init(num_cpus=1)
    large, small = afield.put(b"x" * (1 << 20)), afield.put(1)
    status, out, error = run(capsys, "memory")
    assert status == 0, error
    head, first, second, total = out.splitlines()
    assert head.split()[:3] == ["object", "size", "tier"]
    assert first.split()[0] == large.hex() and second.split()[0] == small.hex()
    assert f"driver pid {os.getpid()}  local handle x1" in first and "host" in first.split()
    assert total.startswith("2 objects, ")
    status, out, _ = run(capsys, "memory", "--json", "--sort", "tier", "--limit", "1")
    (entry,) = json.loads(out)
    assert entry["object_id"] == large.hex() and entry["why"] == ["local handle x1"]
    name = traces().name
    assert run(capsys, "memory", "--session", name[:4])[0] == 0
    status, _, error = run(capsys, "memory", "--session", "zzz")
    assert status == 1 and "begins with zzz" in error


@pytest.mark.contract("rich")
def test_a_terminal_gets_a_drawn_table(place: str, capsys: Any, no_runtime: None, monkeypatch: Any) -> None:
    afield.init(num_cpus=1)
    ref = afield.put({"a": 1})
    afield.available_resources()  # the daemon knows us from here on
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = run(capsys, "memory")
    assert status == 0 and ref.hex() in out and "│" in out


@pytest.mark.slow
def test_several_sessions_must_be_told_apart(place: str, capsys: Any, no_runtime: None) -> None:
    afield.init(num_cpus=1)
    with program("afield.init(num_cpus=1); report_traces(); input()") as other:
        name = other.read_traces().name
        status, out, error = run(capsys, "memory")
        assert status == 1 and out == ""
        assert name in error and traces().name in error and "--session" in error
        assert run(capsys, "memory", "--session", name)[0] == 0
        assert {facts["session"] for facts in json.loads(run(capsys, "status", "--json")[1])} == {name, traces().name}
        other.tell()
        assert other.end()[0] == 0
    assert run(capsys, "memory")[0] == 0


def test_a_client_is_refused_what_it_may_not_know(place: str, no_runtime: None) -> None:
    afield.init(num_cpus=1)
    (info,) = sessions.find_sessions()
    with Client(info) as client:
        assert client.ask("total")["CPU"] == 1
        with pytest.raises(AfieldError, match="does not know 'nonsense'"):
            client.ask("nonsense")
    Path(info.directory, "token").write_text("00" * 32)
    with pytest.raises(RuntimeDiedError), Client(info) as client:
        client.ask("total")


def test_a_dead_session_is_no_session(place: str) -> None:
    with pytest.raises(RuntimeDiedError, match="does not answer"):
        Client(SessionInfo("0" * 16, place, 1, 0.0))


# -- what is left behind ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_session_that_was_killed_whole_is_swept_by_the_next(place: str, capsys: Any, no_runtime: None) -> None:
    with program("afield.init(num_cpus=1); report_traces(); input()") as driver:
        found = driver.read_traces()
        # All at once: the fork server must not live to tidy up.
        for pid in [*processes(found), driver.pid]:
            os.kill(pid, signal.SIGSTOP)
        for pid in [*processes(found), driver.pid]:
            os.kill(pid, signal.SIGKILL)
    assert poll(lambda: not processes(found))
    assert os.path.exists(found.directory)
    assert poll(lambda: not sessions.find_sessions())
    afield.init(num_cpus=1)
    assert not os.path.exists(found.directory)
    assert os.path.exists(traces().directory)
    assert sessions.sweep() == []
    assert stat.S_IMODE(os.stat(os.path.join(traces().directory, "token")).st_mode) == 0o600


def make(place: str, name: str, *, lock: bool = True, mode: int = 0o700) -> str:
    directory = sessions.SessionDirectory(name, place)
    if lock:
        os.close(directory.lock())
    os.chmod(directory.path, mode)
    directory.close()
    return directory.path


def test_only_dead_sessions_of_ours_are_swept(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = make(place, "0" * 16)
    starting = make(place, "1" * 16, lock=False)
    abandoned = make(place, "2" * 16, lock=False)
    long_ago = time.time() - 2 * sessions.UNLOCKED_AGE_S
    os.utime(abandoned, (long_ago, long_ago))
    open_to_others = make(place, "3" * 16, mode=0o755)
    strange = make(place, "not-a-session")
    being_held = sessions.SessionDirectory("4" * 16, place)
    held, lock = being_held.path, being_held.lock()
    moved = make(place, "5" * 16)
    elsewhere = os.path.join(place, "elsewhere")
    os.rename(moved, elsewhere)
    os.symlink(elsewhere, moved)
    private = os.path.join(place, f"afield-{'6' * 16}-x")  # of ours, but no session's: somebody gave it this name
    os.mkdir(private, 0o700)
    os.utime(private, (long_ago, long_ago))
    copied = shutil.copytree(elsewhere, os.path.join(place, f"afield-{'5' * 16}-y"))
    with monkeypatch.context() as patch:
        patch.setattr(sessions, "host", lambda: "another host")
        patch.setattr(sessions, "boot", lambda: "another boot")
        foreign = make(place, "7" * 16)
    try:
        assert sorted(sessions.sweep(place)) == [dead, abandoned]
        for kept in (starting, open_to_others, strange, held, elsewhere, private, copied, foreign):
            assert os.path.isdir(kept)
    finally:
        os.close(lock)
    mine = os.geteuid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: mine + 1)
        assert sessions.sweep(place) == []
    assert sessions.sweep(place) == [held]
