"""Store processes, real ones, under a small daemon: they serve, die, are lost, come again, and each end is told once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from afield.gpu_store.backends import faults
from afield.gpu_store.tiers import DISK, DeleteFile, Move, ReadFile, WriteFile
from afield.runtime.node import stores as module
from afield.runtime.node.store_lives import State
from afield.runtime.wire import messages
from afield.scheduler.devices import emulated_device
from afield.transport.channel import Channel
from afield.transport.endpoint import Endpoint
from tests.helpers import HANG_S, ROOT
from tests.store_daemon import MIB, FakeDaemon

UUID = emulated_device(0).uuid


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    made = FakeDaemon(tmp_path, [emulated_device(number, 9 * MIB) for number in range(2)])
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def noise(daemon: FakeDaemon) -> bytes:
    """What is in the first 4 MiB of the host store."""
    made = random.Random(1).randbytes(4 * MIB)
    daemon.host[: len(made)] = made
    return made


# -- serving ------------------------------------------------------------------------------------------------------


def test_a_store_takes_its_device_and_exports_it(daemon: FakeDaemon) -> None:
    assert not daemon.stores.ready(1)
    with pytest.raises(LookupError):
        daemon.stores.export(1)
    daemon.start(1)
    assert daemon.stores.ensure(1) == "" and daemon.of("ready") == [(1, 8 * MIB)]
    export = daemon.stores.export(1)
    assert (export.device_uuid, export.size_bytes, daemon.life(1)) == (UUID, 8 * MIB, 1)
    slab = daemon.machine.open(UUID).import_slab(export)
    assert slab.size_bytes == 8 * MIB
    assert daemon.machine.open(UUID).memory_info()[0] == MIB
    assert [x["state"] for x in daemon.stores.describe()] == ["ready"]


def test_jobs_wait_for_the_store_that_they_start(daemon: FakeDaemon, noise: bytes) -> None:
    for effect in (Move(1, (0, 0), (1, 512), 3 * MIB + 5), Move(2, (0, 0), (2, 0), 100)):
        daemon.stores.execute(effect)
    daemon.until(lambda: len(daemon.of("done")) == 2)
    assert sorted(daemon.of("done")) == [(1, "", ""), (2, "", "")]
    assert daemon.run(Move(3, (1, 512), (0, 8 * MIB), 3 * MIB + 5)) == [(3, "", "")]
    assert daemon.host[8 * MIB : 11 * MIB + 5] == noise[: 3 * MIB + 5]
    assert sorted(daemon.of("ready")) == [(1, 8 * MIB), (2, 8 * MIB)]


def test_from_device_to_device(daemon: FakeDaemon, noise: bytes) -> None:
    daemon.start(1)
    assert daemon.run(Move(1, (0, 0), (1, 0), MIB)) == [(1, "", "")]
    assert daemon.run(Move(2, (1, 10), (2, 2 * MIB), MIB - 10)) == [(2, "", "")]
    assert daemon.run(Move(3, (2, 2 * MIB), (0, 5 * MIB), MIB - 10)) == [(3, "", "")]
    assert daemon.host[5 * MIB : 6 * MIB - 10] == noise[10:MIB]


def test_the_disk(daemon: FakeDaemon, noise: bytes) -> None:
    spill = Path(daemon.directory, "spill")
    assert daemon.run(WriteFile(1, 7, [(100, MIB, 0), (2 * MIB, 10, MIB)])) == [(1, "", "")]
    assert os.listdir(spill) == ["7"]
    assert daemon.run(ReadFile(2, 7, 0, MIB, 8 * MIB)) == [(2, "", "")]
    assert daemon.host[8 * MIB : 9 * MIB] == noise[100 : 100 + MIB]
    content = bytearray((spill / "7").read_bytes())
    content[5] ^= 1
    (spill / "7").write_bytes(content)
    ((_, kind, text),) = daemon.run(ReadFile(3, 7, 0, MIB, 8 * MIB))
    assert kind == "corrupt" and str(spill / "7") in text
    daemon.stores.execute(DeleteFile(7))
    daemon.until(lambda: not os.listdir(spill))
    ((_, kind, _),) = daemon.run(ReadFile(4, 7, 0, MIB, 8 * MIB))
    assert kind == "unreadable"
    assert not daemon.of("ready") and not daemon.of("lost")


def test_a_failed_job_costs_nothing_else(daemon: FakeDaemon) -> None:
    daemon.start(1)
    ((_, kind, text),) = daemon.run(Move(1, (0, 0), (1, 8 * MIB), 10))
    assert kind == "failed" and "do not lie in a slab" in text
    assert daemon.run(Move(2, (0, 0), (1, 0), 10)) == [(2, "", "")]
    assert not daemon.of("lost")


def test_stores_end_with_the_daemon(daemon: FakeDaemon) -> None:
    daemon.start(1, DISK)
    ended: list[str] = []

    def note(store: Any, life: int, words: str) -> None:
        ended.append(words)

    daemon.stores._on_exit = note  # type: ignore[method-assign]
    for arena in (1, DISK):
        store = daemon.stores._stores[arena]
        assert store.channel is not None
        store.channel.close()
    daemon.until(lambda: len(ended) == 2)
    assert all("exited with status 0" in words for words in ended)


def test_a_stranger_is_shown_out(daemon: FakeDaemon) -> None:
    closed: list[Channel] = []
    endpoint = Endpoint(
        daemon.loop,
        daemon.config.token,
        b"stranger",
        messages.decode,
        lambda channel, batch: None,
        closed.append,
    )
    channel = endpoint.open(daemon.config.address(b""))
    channel.send(messages.Register("store", os.getpid()))
    daemon.until(lambda: closed)


# -- a store's end ------------------------------------------------------------------------------------------------


def test_a_killed_store_is_told_once_and_comes_again(daemon: FakeDaemon, noise: bytes) -> None:
    daemon.start(1, 2)
    first = daemon.stores.export(1)
    os.kill(daemon.pid(1), signal.SIGKILL)
    daemon.until(lambda: len(daemon.of("ready")) == 3)
    ((arena, uuid, epoch, cause),) = daemon.of("lost")
    assert (arena, uuid, epoch) == (1, UUID, 1) and "killed by signal 9" in cause
    assert daemon.told.index(("lost", arena, uuid, epoch, cause)) < len(daemon.told) - 1
    assert daemon.life(1) == 2 and daemon.stores.export(1) != first and daemon.life(2) == 1
    assert daemon.run(Move(1, (0, 0), (1, 0), MIB)) == [(1, "", "")]
    # Who has the old slab cached is not confused: the peer's store imports the new one.
    assert daemon.run(Move(2, (1, 0), (2, 0), MIB)) == [(2, "", "")]
    assert daemon.run(Move(3, (2, 0), (0, 8 * MIB), MIB)) == [(3, "", "")]
    assert daemon.host[8 * MIB : 9 * MIB] == noise[:MIB]


def test_jobs_of_a_killed_store_are_forgotten(daemon: FakeDaemon) -> None:
    daemon.start(1)
    os.kill(daemon.pid(1), signal.SIGSTOP)
    for job in range(3):
        daemon.stores.execute(Move(job, (0, 0), (1, 0), MIB))
    daemon.step(0.01)
    os.kill(daemon.pid(1), signal.SIGKILL)
    daemon.until(lambda: daemon.of("lost"))
    daemon.start(1)
    assert not daemon.of("done") and not daemon.stores._jobs
    assert daemon.run(Move(9, (0, 0), (1, 0), MIB)) == [(9, "", "")]


def test_lives_that_end_young_come_slower(daemon: FakeDaemon) -> None:
    daemon.start(1)
    for life in range(1, 5):
        os.kill(daemon.pid(1), signal.SIGKILL)
        while daemon.life(1) == life or not daemon.stores.ready(1):
            daemon.step()
    store = daemon.stores._stores[1]
    assert len(daemon.of("lost")) == 4 and store.short_lives == 4
    daemon.lag_s += module.STABLE_S
    os.kill(daemon.pid(1), signal.SIGKILL)
    daemon.until(lambda: len(daemon.of("lost")) == 5)
    assert store.short_lives == 0


def test_the_disks_store_is_replaced_and_its_files_stay(daemon: FakeDaemon, noise: bytes) -> None:
    daemon.run(WriteFile(1, 7, [(0, MIB, 0)]))
    os.kill(daemon.pid(DISK), signal.SIGSTOP)
    daemon.stores.execute(ReadFile(2, 7, 0, MIB, 8 * MIB))
    daemon.step(0.01)
    os.kill(daemon.pid(DISK), signal.SIGKILL)
    daemon.until(lambda: len(daemon.of("done")) == 2)
    assert daemon.of("done")[1][:2] == (2, "failed") and "killed by signal 9" in daemon.of("done")[1][2]
    assert daemon.run(ReadFile(3, 7, 0, MIB, 8 * MIB)) == [(3, "", "")]
    assert daemon.host[8 * MIB : 9 * MIB] == noise[:MIB]
    assert not daemon.of("lost") and not daemon.of("ready")


# -- a device's end -----------------------------------------------------------------------------------------------


def test_a_lost_device_is_told_once_and_waits_for_its_reset(daemon: FakeDaemon) -> None:
    daemon.start(1, 2)
    daemon.machine.inject(faults.xid(UUID, 79))
    daemon.until(lambda: daemon.of("lost"))
    ((arena, uuid, epoch, cause),) = daemon.of("lost")
    assert (arena, uuid, epoch) == (1, UUID, 1) and "fallen off the bus" in cause
    assert daemon.stores.ensure(1).startswith(f"device {UUID} cannot be used: ")
    assert not daemon.stores.restart(1)
    assert daemon.run(Move(1, (0, 0), (1, 0), 10))[0][:2] == (1, "device_lost")
    assert daemon.run(Move(2, (1, 0), (2, 0), 10))[0][:2] == (2, "import")
    daemon.pause(0.3)
    assert daemon.life(1) == 1
    daemon.machine.reset(UUID)
    daemon.until(lambda: daemon.stores.ready(1))
    assert daemon.stores.export(1).epoch == 3 and daemon.stores.ensure(1) == ""
    assert len(daemon.of("lost")) == 1 and daemon.life(1) == 2
    assert daemon.run(Move(3, (0, 0), (1, 0), 10)) == [(3, "", "")]


def test_many_signals_are_one_loss(daemon: FakeDaemon) -> None:
    daemon.start(1)
    for job in range(10):
        daemon.stores.execute(Move(job, (0, 0), (1, 0), MIB))
    daemon.machine.inject(faults.lost(UUID))
    daemon.machine.inject(faults.xid(UUID, 79))
    os.kill(daemon.pid(1), signal.SIGKILL)
    daemon.until(lambda: daemon.of("lost"))
    daemon.pause(0.3)
    assert len(daemon.of("lost")) == 1
    assert daemon.stores._stores[1].state is State.LOST


def test_a_reset_begins_a_new_life(daemon: FakeDaemon) -> None:
    daemon.start(1)
    for epoch in (1, 2, 3):
        daemon.machine.reset(UUID)
        while not daemon.stores.ready(1) or daemon.stores.export(1).epoch == epoch:
            daemon.step()
    assert [lost[2] for lost in daemon.of("lost")] == [1, 2, 3]
    assert len(daemon.of("ready")) == 4


def test_a_reset_that_a_job_finds_first(daemon: FakeDaemon) -> None:
    """The job fails because of the device; that it was only a reset is known all the same."""
    daemon.start(1)
    os.kill(daemon.pid(1), signal.SIGSTOP)
    daemon.stores.execute(Move(1, (0, 0), (1, 0), 10))
    daemon.step(0.01)
    daemon.machine.reset(UUID)
    os.kill(daemon.pid(1), signal.SIGCONT)
    daemon.until(lambda: len(daemon.of("ready")) == 2)
    assert len(daemon.of("lost")) == 1 and not daemon.of("done")


def test_a_broken_context_costs_the_store_and_not_the_device(daemon: FakeDaemon) -> None:
    daemon.start(1)
    daemon.machine.inject(faults.sticky_error(UUID))
    daemon.stores.execute(Move(1, (0, 0), (1, 0), 10))
    daemon.until(lambda: len(daemon.of("ready")) == 2)
    ((_, _, epoch, cause),) = daemon.of("lost")
    assert epoch == 1 and "illegal address" in cause
    assert daemon.run(Move(2, (0, 0), (1, 0), 10)) == [(2, "", "")]
    assert daemon.stores.export(1).epoch == 2  # who has the memory of the broken store mapped is refused


def test_a_device_that_is_lost_before_it_was_used(daemon: FakeDaemon) -> None:
    daemon.machine.inject(faults.lost(UUID))
    assert daemon.stores.ensure(1) == ""
    daemon.stores.execute(Move(1, (0, 0), (1, 0), 10))
    daemon.until(lambda: daemon.of("lost"))
    assert "is gone" in daemon.of("lost")[0][3] and not daemon.of("done")
    daemon.pause(0.2)
    daemon.machine.reset(UUID)
    daemon.until(lambda: daemon.stores.ready(1))
    assert len(daemon.of("lost")) == 1


def test_a_lost_device_is_tried_now_and_then(daemon: FakeDaemon) -> None:
    """Nobody tells of the reset of some devices."""
    daemon.start(1)
    daemon.machine.inject(faults.lost(UUID))
    daemon.until(lambda: daemon.of("lost"))
    daemon.lag_s += module.RETRY_S
    daemon.until(lambda: daemon.life(1) == 2 and daemon.stores._stores[1].state is State.LOST)
    assert len(daemon.of("lost")) == 1
    assert daemon.stores._stores[1].due - daemon.now() > module.RETRY_S


def test_a_source_is_not_given_up_while_a_peer_reads_it(tmp_path: Path) -> None:
    """The books may give the target's memory to others when a loss is told: nobody may write there any more."""
    daemon = FakeDaemon(tmp_path, [emulated_device(number, 9 * MIB) for number in range(2)], "20MB/s")
    try:
        daemon.start(1, 2)
        daemon.stores.execute(Move(1, (1, 0), (2, 0), 8 * MIB))
        daemon.step(0.01)
        os.kill(daemon.pid(1), signal.SIGKILL)
        daemon.until(lambda: daemon.of("lost"))
        assert [facts[0] for facts in daemon.told if facts[0] != "ready"] == ["done", "lost"]
    finally:
        daemon.close()


def test_both_ends_of_a_copy_are_killed(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLE_S", HANG_S)  # nobody waits for it
    daemon.start(1, 2)
    os.kill(daemon.pid(2), signal.SIGSTOP)
    daemon.stores.execute(Move(1, (1, 0), (2, 0), 8 * MIB))
    daemon.step(0.01)
    began = time.monotonic()
    for arena in (1, 2):
        os.kill(daemon.pid(arena), signal.SIGKILL)
    daemon.until(lambda: len(daemon.of("ready")) == 4)
    assert sorted(lost[0] for lost in daemon.of("lost")) == [1, 2] and not daemon.of("done")
    assert time.monotonic() - began < module.SETTLE_S


def test_a_process_that_cannot_be_killed(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end is told all the same, when it is late."""
    daemon.start(1)
    monkeypatch.setattr(os, "kill", lambda pid, number: None)
    daemon.machine.inject(faults.sticky_error(UUID))
    daemon.stores.execute(Move(1, (0, 0), (1, 0), 10))
    daemon.until(lambda: daemon.stores._stores[1].state is State.ENDING)
    daemon.pause(0.1)
    assert not daemon.of("lost")
    daemon.lag_s += module.SETTLE_S
    daemon.until(lambda: daemon.of("lost"))
    monkeypatch.undo()


# -- starts that fail ---------------------------------------------------------------------------------------------


def test_a_store_that_cannot_start_is_given_up(daemon: FakeDaemon) -> None:
    other = daemon.machine.open(UUID).allocate_slab(8 * MIB)
    assert daemon.stores.ensure(1) == ""
    daemon.stores.execute(Move(1, (0, 0), (1, 0), 10))
    daemon.until(lambda: daemon.of("lost"))
    ((_, _, _, cause),) = daemon.of("lost")
    assert "2 MiB asked for, 1 MiB free of 9 MiB" in cause and not daemon.of("done")
    assert daemon.life(1) == module.MAX_FAILED_STARTS
    assert cause in daemon.stores.ensure(1)
    daemon.pause(0.2)
    assert daemon.life(1) == module.MAX_FAILED_STARTS
    # Later somebody asks again, and by then there is room.
    daemon.machine.open(UUID).free_slab(other)
    daemon.lag_s += module.RETRY_S
    daemon.stores.ensure(1)
    daemon.until(lambda: daemon.stores.ready(1))
    assert len(daemon.of("lost")) == 1 and daemon.stores.ensure(1) == ""


def test_a_disk_that_cannot_be_used(daemon: FakeDaemon) -> None:
    Path(daemon.directory, "spill").touch()
    ((_, kind, text),) = daemon.run(WriteFile(1, 7, [(0, 10, 0)]))
    assert kind == "failed" and "no directory for spill files" in text
    assert daemon.run(WriteFile(2, 8, [(0, 10, 0)]))[0][1] == "failed"
    os.unlink(Path(daemon.directory, "spill"))
    daemon.lag_s += module.RETRY_S
    daemon.run(WriteFile(3, 9, [(0, 10, 0)]))
    daemon.until(lambda: daemon.stores.ready(DISK))
    assert daemon.run(WriteFile(4, 9, [(0, 10, 0)])) == [(4, "", "")]


def test_a_node_without_devices(tmp_path: Path) -> None:
    daemon = FakeDaemon(tmp_path, [])
    try:
        assert daemon.stores.backend_spec == "" and daemon.stores.next_deadline() is None
        assert daemon.stores.describe() == []
    finally:
        daemon.close()


# -- through the fork server --------------------------------------------------------------------------------------

SESSION = """
import json, os, secrets, sys, types
from afield.gpu_store.tiers import DISK, WriteFile
from afield.runtime.node.workers import WorkerPool
from afield.runtime.session.forkserver import ForkServer, Roles
from afield.runtime.session.store_process import run_store
from afield.runtime.process.configuration import ForkServerConfig, SessionConfig
from afield.scheduler.devices import emulated_device
from tests.store_daemon import *

def run_daemon(config, fork_sock):
    daemon = FakeDaemon(os.fsdecode(config.directory), config.devices)
    daemon.endpoint.close()
    daemon.serve(config.session)
    node = types.SimpleNamespace(config=config, loop=daemon.loop, stop=lambda: None, output=None)
    daemon.workers = WorkerPool(node, fork_sock)
    daemon.start(1, DISK)
    pids = [daemon.pid(arena) for arena in (1, DISK)]
    names = [open(f"/proc/{pid}/comm").read().strip() for pid in pids]
    daemon.stores.execute(WriteFile(1, 7, [(0, MIB, 0)]))
    os.kill(pids[0], 9)
    daemon.until(lambda: len(daemon.of("ready")) == 2 and daemon.of("done"))
    print(json.dumps({"names": names, "told": daemon.told, "pids": [*pids, daemon.pid(1)]}), flush=True)

slab = os.memfd_create("x"); os.ftruncate(slab, HOST_BYTES)
read, write = os.pipe()
config = ForkServerConfig(
    session=SessionConfig(secrets.token_hex(8), secrets.token_bytes(32), slab, HOST_BYTES, -1),
    directory=os.fsencode(sys.argv[1]), lifeline_fd=read, lock_fd=-1, working_directory=b"", arguments=[b""],
    node_id=bytes(8), num_cpus=1.0, memory=1, resources={}, devices=[emulated_device(0, 9 * MIB)], emulated_link="",
    driver=bytes(8), namespace="", environment=b"",
)
ForkServer(ForkServerConfig.decode(config.encode()), Roles(run_daemon, None, run_store)).run()
"""


def test_through_the_fork_server(tmp_path: Path) -> None:
    """The real fork server and the real worker pool: stores have their name, and their ends are told."""
    session = tmp_path / "session"
    session.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SESSION, str(session)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=60,
        start_new_session=True,
    )
    assert done.returncode == 0 and done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert found["names"] == ["afield-store", "afield-store"]
    assert [told[0] for told in found["told"] if told[0] != "done"] == ["ready", "lost", "ready"]
    assert ["done", 1, "", ""] in found["told"]
    assert not any(os.path.exists(f"/proc/{pid}") for pid in found["pids"])
    assert not session.exists(), "spill files go with the session"
