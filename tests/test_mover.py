"""Movers over emulated devices and real files: bytes arrive, directions overlap, failures are told with whose fault it was."""

from __future__ import annotations

import base64
import mmap
import os
import random
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from afield.errors import AfieldError, NoDeviceError, OutOfDeviceMemoryError
from afield.gpu_store import mover as movers
from afield.gpu_store.backends import faults
from afield.gpu_store.backends.base import SLAB_GRANULE_BYTES, DeviceUsageError, SlabExport
from afield.gpu_store.backends.cuda import CudaBackend
from afield.gpu_store.backends.emulated import EmulatedBackend, LinkSpeed
from afield.gpu_store.backends.select import create_emulated, cuda_spec, open_backend
from afield.gpu_store.mover import Completion, Completions, DeviceMover, DiskMover
from afield.gpu_store.spill_files import SpillFiles
from tests.device_helpers import emulated_devices
from tests.fake_cuda import libraries
from tests.helpers import ROOT

MIB = 1 << 20
HOST_BYTES = 8 * MIB
PATIENCE_S = 20.0
A, B = (info.uuid for info in emulated_devices(2, MIB))


@pytest.fixture
def host() -> memoryview:
    return memoryview(bytearray(random.Random(3).randbytes(HOST_BYTES)))


@pytest.fixture
def done() -> Iterator[Completions]:
    completions = Completions()
    yield completions
    completions.close()


@contextmanager
def machine(**options: object) -> Iterator[EmulatedBackend]:
    made = EmulatedBackend.create(emulated_devices(2, 8 * MIB), **options)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.close()


def wait(done: Completions, count: int = 1) -> list[Completion]:
    """Return the next `count` completions; the descriptor tells when to look."""
    found: list[Completion] = []
    deadline = time.monotonic() + PATIENCE_S
    while len(found) < count:
        assert select.select([done], [], [], deadline - time.monotonic())[0], f"only {found} came"
        found += done.take()
    return found


# -- a device -----------------------------------------------------------------------------------------------------


def test_bytes_go_in_and_out(host: memoryview, done: Completions) -> None:
    before = bytes(host)
    with machine() as backend:
        mover = DeviceMover(backend, A, host, done, chunk_bytes=MIB)
        assert mover.capacity == mover.export.size_bytes == 8 * MIB and mover.export.device_uuid == A
        assert done.take() == []
        size = 3 * MIB + 5
        mover.from_host(1, 1000, 512, size)
        assert wait(done) == [(1, "", "")]
        host[1000 : 1000 + size] = bytes(size)
        mover.to_host(2, 512, 4 * MIB + 7, size)
        mover.to_host(3, 0, 0, 0)
        assert wait(done, 2) == [(2, "", ""), (3, "", "")]
        assert host[4 * MIB + 7 : 4 * MIB + 7 + size] == before[1000 : 1000 + size]
        assert host[:1000] == before[:1000] and host[4 * MIB : 4 * MIB + 7] == before[4 * MIB : 4 * MIB + 7]
        mover.close()


def test_a_slab_takes_what_is_free(host: memoryview, done: Completions) -> None:
    with machine() as backend:
        other = backend.open(A).allocate_slab(SLAB_GRANULE_BYTES)
        mover = DeviceMover(backend, A, host, done)
        assert mover.capacity == 6 * MIB
        with pytest.raises(OutOfDeviceMemoryError, match="2 MiB asked for, 0 B free of 8 MiB"):
            DeviceMover(backend, A, host, done)
        backend.open(A).free_slab(other)
        mover.close()
        shared = DeviceMover(backend, A, host, done, share=0.8)
        assert shared.capacity == 6 * MIB
        shared.close()


def test_spill_and_restore_run_beside_each_other(host: memoryview, done: Completions) -> None:
    """A long copy in one direction does not hold up a short one in the other."""
    # A link whose time passes in small steps of real time, whatever it says.
    slow = LinkSpeed(1e6)
    with machine(host_link=slow, clock=lambda: 0.0, sleep=lambda seconds: time.sleep(0.002)) as backend:
        mover = DeviceMover(backend, A, host, done, chunk_bytes=64 << 10)
        mover.to_host(1, 0, 0, 6 * MIB)
        mover.from_host(2, 7 * MIB, 7 * MIB, 64 << 10)
        assert [job for job, kind, _ in wait(done, 2) if not kind] == [2, 1]
        mover.close()


def test_jobs_of_one_direction_keep_their_order(host: memoryview, done: Completions) -> None:
    with machine() as backend:
        mover = DeviceMover(backend, A, host, done)
        for job in range(50):
            mover.from_host(job, job * 1000, 0, 1000)
        assert [job for job, _, _ in wait(done, 50)] == list(range(50))
        mover.to_host(50, 0, 0, 1000)
        wait(done)
        assert host[:1000] == host[49000:50000]
        mover.close()


def test_jobs_that_wait_are_waited_for_together_and_fail_alone(host: memoryview, done: Completions) -> None:
    with machine() as backend:
        mover = DeviceMover(backend, A, host, done)
        begun, gate = threading.Event(), threading.Event()
        waits: list[str] = []
        finish = mover._finish

        def first(stream: Any) -> None:
            begun.set()
            assert gate.wait(PATIENCE_S)

        def counted(way: str) -> None:
            waits.append(way)
            finish(way)

        mover._queues["in"]._finish = lambda: counted("in")
        mover._put("in", 0, first)
        assert begun.wait(PATIENCE_S)
        for job in range(1, 40):
            mover.from_host(job, job * 1000, job * 1000, 1000)
        gate.set()
        assert [job for job, _, _ in wait(done, 40)] == list(range(40)) and len(waits) == 2
        begun.clear()
        gate.clear()
        mover._put("in", 40, first)
        assert begun.wait(PATIENCE_S)
        for job in range(41, 44):
            mover.from_host(job, job * 1000, job * 1000 if job != 42 else 1 << 40, 1000)
        gate.set()
        assert [(job, bool(kind)) for job, kind, _ in wait(done, 4)] == [
            (40, False),
            (41, False),
            (42, True),
            (43, False),
        ]
        mover.to_host(50, 43_000, 0, 1000)
        wait(done)
        assert host[:1000] == host[43_000:44_000]
        mover.close()


def test_host_memory_is_page_locked_once_and_where_it_is_used(host: memoryview, done: Completions) -> None:
    with machine() as backend:
        mover = DeviceMover(backend, A, host, done, chunk_bytes=MIB)
        for job in range(3):
            mover.to_host(job, 0, 2 * MIB - 10, 20)
        wait(done, 3)
        assert mover._page_locked == {1, 2}
        assert len(mover.device._pinned) == 2  # type: ignore[attr-defined]
        mover.close()


def test_without_page_locking_it_goes_on(
    host: memoryview, done: Completions, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(memory: memoryview) -> None:
        raise AfieldError("too much")

    with machine() as backend:
        mover = DeviceMover(backend, A, host, done, chunk_bytes=MIB)
        monkeypatch.setattr(mover.device, "pin_host", refuse)
        mover.to_host(1, 0, 0, 3 * MIB)
        assert wait(done) == [(1, "", "")]
        assert capfd.readouterr().err.count("too much") == 1
        mover.close()


@pytest.mark.parametrize("kind", ["fake", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_same_on_cuda(kind: str, done: Completions) -> None:
    """The code for real devices, over a driver that is none, and over a real one."""
    host = memoryview(mmap.mmap(-1, HOST_BYTES))
    before = random.Random(5).randbytes(3 * MIB)
    host[10 : 10 + len(before)] = before
    backend = CudaBackend(libraries() if kind == "fake" else None)
    mover = DeviceMover(backend, backend.inventory()[0].uuid, host, done, share=0.1, chunk_bytes=MIB)
    assert mover.capacity and mover.capacity % SLAB_GRANULE_BYTES == 0
    mover.from_host(1, 10, 77, min(len(before), mover.capacity - 77))
    assert wait(done) == [(1, "", "")]
    mover.to_host(2, 77, 4 * MIB, MIB)
    assert wait(done) == [(2, "", "")]
    assert host[4 * MIB : 5 * MIB] == before[:MIB] and 0 in mover._page_locked and mover._can_page_lock
    mover.close()
    backend.close()


# -- failures -----------------------------------------------------------------------------------------------------


def test_a_failed_job_leaves_the_mover_usable(host: memoryview, done: Completions) -> None:
    with machine() as backend:
        mover = DeviceMover(backend, A, host, done)
        mover.to_host(1, 8 * MIB, 0, 100)  # outside of the slab
        ((job, kind, text),) = wait(done)
        assert (job, kind) == (1, "failed") and "do not lie in a slab" in text
        mover.to_host(2, 0, 0, 100)
        assert wait(done) == [(2, "", "")]
        mover.close()


@pytest.mark.parametrize(
    ("fault", "kind"), [(faults.lost(A, at=3), "device_lost"), (faults.sticky_error(A, at=3), "poisoned")]
)
def test_faults_of_the_device(host: memoryview, done: Completions, fault: faults.Fault, kind: str) -> None:
    with machine() as backend:
        mover = DeviceMover(backend, A, host, done, chunk_bytes=64 << 10)
        backend.inject(fault)
        mover.from_host(1, 0, 0, MIB)
        mover.to_host(2, 0, 0, MIB)
        found = wait(done, 2)
        assert {told for _, told, _ in found} == {kind} and all(A in text for _, _, text in found)
        mover.close()


def test_a_reset_ends_a_life(host: memoryview, done: Completions) -> None:
    with machine() as backend:
        mover = DeviceMover(backend, A, host, done)
        backend.reset(A)
        mover.to_host(1, 0, 0, 10)
        assert wait(done)[0][:2] == (1, "device_lost")
        mover.close()
        again = DeviceMover(backend, A, host, done)
        assert again.export.epoch == mover.export.epoch + 1
        again.close()


def test_an_exception_that_nobody_expects(
    host: memoryview, done: Completions, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError("a bug")

    with machine() as backend:
        mover = DeviceMover(backend, A, host, done)
        monkeypatch.setattr(mover.device, "copy_to_host", broken)
        mover.to_host(1, 0, 0, 10)
        assert wait(done) == [(1, "failed", "ZeroDivisionError: a bug")]
        assert "Traceback" in capfd.readouterr().err
        mover.close()


# -- peers --------------------------------------------------------------------------------------------------------

PEER_STORE = """
import base64, os, sys
import msgspec
from afield.gpu_store.backends.select import open_backend
from afield.gpu_store.mover import Completions, DeviceMover

done = Completions()
host = memoryview(bytearray(b"peer" * (1 << 18)))
mover = DeviceMover(open_backend(sys.argv[1]), sys.argv[2], host, done)
mover.from_host(1, 0, 0, len(host))
while not done.take():
    pass
print(base64.b64encode(msgspec.msgpack.encode(mover.export)).decode(), flush=True)
sys.stdin.read()
"""


@contextmanager
def peer_store(backend: EmulatedBackend, uuid: str) -> Iterator[tuple[subprocess.Popen[str], bytes]]:
    """The mover of another device, in a process of its own, with a slab full of "peer"."""
    spec = f"emulated:{backend.address}"
    process = subprocess.Popen(
        [sys.executable, "-c", PEER_STORE, spec, uuid],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None and process.stdin is not None
    try:
        yield process, base64.b64decode(process.stdout.readline())
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(PATIENCE_S)


def test_copies_from_a_peer(host: memoryview, done: Completions) -> None:
    def export_of(raw: bytes) -> SlabExport:
        return msgspec.msgpack.decode(raw, type=SlabExport)

    with machine() as backend:
        mover = DeviceMover(backend, A, host, done)
        with peer_store(backend, B) as (_, raw):
            export = export_of(raw)
            mover.from_peer(1, export, 0, 4096, MIB)
            mover.from_peer(2, export, 4, 0, 4)
            assert wait(done, 2) == [(1, "", ""), (2, "", "")]
            assert len(mover._peers) == 1
            mover.to_host(3, 4096, 0, MIB)
            wait(done)
            assert host[:MIB] == b"peer" * (MIB // 4)
        # The next life of the peer's store: another slab.
        with peer_store(backend, B) as (_, raw):
            mover.from_peer(4, export_of(raw), 0, 0, 4096)
            assert wait(done) == [(4, "", "")]
            gone = export_of(raw)
            backend.inject(faults.lost(B))
            mover.from_peer(5, gone, 0, 0, 4096)
            ((_, kind, text),) = wait(done)
            assert kind == "import" and B in text, "it is not this device that is lost"
        backend.inject(faults.lost(A))
        mover.from_peer(6, gone, 0, 0, 4096)
        assert wait(done)[0][1] == "device_lost"
        mover.close()


# -- the disk -----------------------------------------------------------------------------------------------------


def test_files_are_written_and_read(host: memoryview, done: Completions, tmp_path: Path) -> None:
    before = bytes(host)
    mover = DiskMover(SpillFiles(str(tmp_path)), host, done)
    for file in range(4):
        mover.write(file, file, [(file * MIB, MIB, 0), (4 * MIB, 10, MIB)])
    assert sorted(wait(done, 4)) == [(file, "", "") for file in range(4)]
    host[: 4 * MIB] = bytes(4 * MIB)
    for file in range(4):
        mover.read(file, file, 0, MIB, file * MIB)
    assert sorted(wait(done, 4)) == [(file, "", "") for file in range(4)]
    assert host == before
    mover.read(9, 2, 77, MIB, 0)
    ((_, kind, text),) = wait(done)
    assert kind == "corrupt" and str(tmp_path) in text
    for file in range(4):
        mover.delete(file)
    mover.delete(17)
    mover.close()
    assert os.listdir(tmp_path) == []


def test_a_missing_file_is_unreadable(host: memoryview, done: Completions, tmp_path: Path) -> None:
    mover = DiskMover(SpillFiles(str(tmp_path)), host, done)
    mover.read(1, 5, 0, 10, 0)
    assert wait(done)[0][:2] == (1, "unreadable")
    os.mkdir(tmp_path / "6")
    mover.write(2, 6, [(0, 10, 0)])
    assert wait(done)[0][:2] == (2, "failed")
    mover.close()


# -- which backend ------------------------------------------------------------------------------------------------


def test_a_string_names_the_backend() -> None:
    with machine() as backend:
        attached = open_backend(f"emulated:{backend.address}")
        assert [info.uuid for info in attached.inventory()] == [A, B]
        attached.close()
    assert cuda_spec({"GPU-1": 1, "GPU-2": 3}) == "cuda:GPU-2=3" and cuda_spec({}) == "cuda:"


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: open_backend("nothing"), DeviceUsageError),
        (lambda: open_backend("cuda:GPU-1"), DeviceUsageError),
        (lambda: open_backend("emulated:1.2.3"), NoDeviceError),
        (lambda: create_emulated(emulated_devices(1, MIB)), DeviceUsageError),
        (lambda: create_emulated(emulated_devices(1, 2 * MIB), "fast"), DeviceUsageError),
        (lambda: create_emulated(emulated_devices(1, 2 * MIB), "0GB/s"), DeviceUsageError),
    ],
)
def test_strings_that_name_none(make: Callable[[], object], error: type[AfieldError]) -> None:
    with pytest.raises(error):
        make()


def test_links_of_an_emulated_machine() -> None:
    made = create_emulated(emulated_devices(2, 2 * MIB), "25GB/s")
    assert {link.bandwidth_bytes_per_s for link in made.links()} == {25e9}
    made.close()


def test_describe() -> None:
    assert movers.describe(NoDeviceError("none")) == ("failed", "none")
    assert movers.describe(KeyError("x")) == ("failed", "KeyError: 'x'")
