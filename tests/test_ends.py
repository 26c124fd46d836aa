"""Workers and actors that end in good order, and what they have started, which ends with them in whatever way they end."""

from __future__ import annotations

import asyncio
import atexit
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import afield
from tests.helpers import poll


class Log:
    """Writes to files without flushing them."""

    def __init__(self, folder: Path, name: str) -> None:
        self.file = (folder / f"{name}.log").open("w")
        atexit.register((folder / f"{name}.atexit").touch)

    def write(self) -> int:
        self.file.write("line ")
        return os.getpid()

    def leave(self) -> None:
        self.file.write("left ")
        afield.exit_actor()

    def leave_by_thread(self) -> None:
        threading.Thread(target=afield.exit_actor).start()

    def start(self, new_session: bool = False) -> list[int]:
        """Start a program that starts another; return their pids."""
        program = "sleep 300 & echo $$ $!; wait"
        child = subprocess.Popen(["sh", "-c", program], stdout=subprocess.PIPE, start_new_session=new_session)
        assert child.stdout is not None
        return [int(pid) for pid in child.stdout.readline().split()]

    def __afield_shutdown__(self) -> None:
        self.file.write("hook ")


class AsyncLog(Log):
    """The same with an event loop."""

    async def forever(self) -> None:
        await asyncio.sleep(1000)

    async def leave_by_task(self) -> None:
        async def leave() -> None:
            afield.exit_actor()

        self.task = asyncio.create_task(leave())
        await asyncio.sleep(1000)

    async def __afield_shutdown__(self) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        self.file.write("async hook ")


class Bad:
    """Nothing that it does at its end goes well."""

    def __init__(self, folder: Path) -> None:
        self.file = (folder / "bad.log").open("w")
        atexit.register(sys.exit, 1)

    def write(self) -> None:
        self.file.write("line ")

    def __ray_shutdown__(self) -> None:
        raise KeyboardInterrupt


class Stubborn:
    """Never ends."""

    def pid(self) -> int:
        return os.getpid()

    def __afield_shutdown__(self) -> None:
        while True:
            try:
                time.sleep(1000)
            except BaseException:
                pass


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _text(folder: Path, name: str) -> str:
    """Wait for the end of an actor and return what its file has."""
    assert poll((folder / f"{name}.atexit").exists)
    return poll(lambda: (folder / f"{name}.log").read_text()) or ""


def test_an_actor_without_handles_ends_in_good_order(runtime: Any, tmp_path: Path) -> None:
    actor = afield.remote(Log).remote(tmp_path, "dropped")
    afield.get(actor.write.remote())
    del actor
    assert _text(tmp_path, "dropped") == "line hook "


@pytest.mark.parametrize("way", ["leave", "leave_by_thread"])
def test_an_actor_that_leaves_ends_in_good_order(runtime: Any, tmp_path: Path, way: str) -> None:
    actor = afield.remote(Log).remote(tmp_path, "left")
    afield.get(actor.write.remote())
    getattr(actor, way).remote()
    assert _text(tmp_path, "left") == ("line left hook " if way == "leave" else "line hook ")
    with pytest.raises(afield.ActorDiedError, match="ended itself"):
        afield.get(actor.write.remote())


def test_an_asyncio_task_of_an_actor_can_end_it(runtime: Any, tmp_path: Path) -> None:
    actor = afield.remote(AsyncLog).remote(tmp_path, "async")
    others = actor.forever.remote()
    afield.get(actor.write.remote())
    leaving = actor.leave_by_task.remote()
    for ref in (leaving, others):
        with pytest.raises(afield.ActorDiedError, match="ended itself"):
            afield.get(ref, timeout=30)
    assert _text(tmp_path, "async") == "line async hook "


def test_what_fails_at_the_end_does_not_keep_the_rest_from_being_done(runtime: Any, tmp_path: Path) -> None:
    actor = afield.remote(Bad).remote(tmp_path)
    afield.get(actor.write.remote())
    del actor
    assert poll(lambda: (tmp_path / "bad.log").read_text()) == "line "


def test_a_killed_actor_does_nothing_more(runtime: Any, tmp_path: Path) -> None:
    actor = afield.remote(Log).remote(tmp_path, "killed")
    pid = afield.get(actor.write.remote())
    afield.kill(actor)
    assert poll(lambda: not _runs(pid))
    assert (tmp_path / "killed.log").read_text() == ""
    assert not (tmp_path / "killed.atexit").exists()


@pytest.mark.slow
def test_an_end_is_bounded_in_time(runtime: Any) -> None:
    actor = afield.remote(Stubborn).remote()
    pid = afield.get(actor.pid.remote())
    del actor
    assert poll(lambda: not _runs(pid))


def test_shutdown_lets_workers_end_in_good_order(tmp_path: Path) -> None:
    @afield.remote
    def register() -> None:
        atexit.register((tmp_path / "task.atexit").touch)

    @afield.remote
    def interrupted() -> None:
        (tmp_path / "started").touch()
        try:
            time.sleep(1000)
        finally:
            (tmp_path / "finally").touch()

    with afield.init(num_cpus=2):
        plain = afield.remote(Log).remote(tmp_path, "plain")
        busy = afield.remote(AsyncLog).remote(tmp_path, "busy")
        ref = busy.forever.remote()
        afield.get([register.remote(), plain.write.remote(), busy.write.remote()])
        running = interrupted.remote()
        assert poll((tmp_path / "started").exists)
    assert (tmp_path / "task.atexit").exists()
    assert (tmp_path / "finally").exists()
    assert (tmp_path / "plain.log").read_text() == "line hook "
    assert (tmp_path / "busy.log").read_text() == "line async hook "
    del ref, running


@pytest.mark.parametrize("way", ["drop", "kill", "leave", "crash"])
def test_what_an_actor_has_started_ends_with_it(runtime: Any, tmp_path: Path, way: str) -> None:
    actor = afield.remote(Log).remote(tmp_path, "parent")
    pids = afield.get(actor.start.remote())
    assert all(map(_runs, pids))
    if way == "kill":
        afield.kill(actor)
    elif way == "leave":
        afield.get(actor.leave.remote())
    elif way == "crash":
        os.kill(afield.get(actor.write.remote()), 11)
    del actor
    assert poll(lambda: not any(map(_runs, pids)))


def test_a_program_with_a_session_of_its_own_outlives_its_actor(runtime: Any, tmp_path: Path) -> None:
    actor = afield.remote(Log).remote(tmp_path, "parent")
    other = afield.remote(Log).remote(tmp_path, "other")
    pids = afield.get(actor.start.remote(True))
    others = afield.get(other.start.remote())
    pid = afield.get(actor.write.remote())
    afield.kill(actor)
    assert poll(lambda: not _runs(pid))
    try:
        afield.get(other.write.remote())
        assert all(map(_runs, pids + others))
    finally:
        for each in pids:
            os.kill(each, 9)
