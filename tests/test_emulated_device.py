"""What is particular to emulated devices: capacity over processes, faults, time, and mistakes that show.

What they share with real ones is in test_device_backend.py.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest

from afield.errors import DeviceLostError, NoDeviceError, OutOfDeviceMemoryError
from afield.gpu_store.backends import faults
from afield.gpu_store.backends.base import (
    SLAB_GRANULE_BYTES,
    DeviceUsageError,
    PoisonedContextError,
    SlabImportError,
    StaleEpochError,
)
from afield.gpu_store.backends.board import MAX_EVENTS, MAX_FAULTS
from afield.gpu_store.backends.emulated import EmulatedBackend, EmulatedDevice, LinkSpeed
from afield.gpu_store.backends.streams import CHUNK_BYTES
from tests.device_helpers import emulated_devices
from tests.helpers import poll
from tests.test_device_backend import Peer, pack, peer_process, read, unpack, write

MIB = 2**20
SLAB = SLAB_GRANULE_BYTES
UUID = "EMU-0000-0000-0000-0000"
OTHER = "EMU-0001-0000-0000-0000"


class HandClock:
    """A clock that only sleeping moves; each thread's sleep is over at once."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self._lock = threading.Lock()

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        with self._lock:
            self.now_s += duration_s


@contextmanager
def machine(memory_bytes: int = 16 * MIB, **options: Any) -> Iterator[EmulatedBackend]:
    backend = EmulatedBackend.create(emulated_devices(2, memory_bytes), **options)
    yield backend
    backend.close()


@pytest.fixture
def backend() -> Iterator[EmulatedBackend]:
    with machine() as backend:
        yield backend


@pytest.fixture
def device(backend: EmulatedBackend) -> EmulatedDevice:
    return backend.open(UUID)


@pytest.fixture
def peer(backend: EmulatedBackend) -> Iterator[Peer]:
    with peer_process(backend.address) as peer:
        yield peer


# ---- capacity -------------------------------------------------------------------------------------------------------


def test_capacity_is_hard_over_all_processes(device: EmulatedDevice, peer: Peer) -> None:
    peer.do("allocate", device, size=6 * SLAB)
    ours = device.allocate_slab(2 * SLAB)
    assert device.memory_info() == (0, 16 * MIB)
    with pytest.raises(OutOfDeviceMemoryError) as caught:
        device.allocate_slab(SLAB)
    text = str(caught.value)
    assert "2 MiB asked for, 0 B free of 16 MiB" in text
    assert f"largest holders: process {peer.process.pid} 12 MiB, process {os.getpid()} 4 MiB" in text
    assert peer.ask("allocate", device, size=SLAB)["error"] == "OutOfDeviceMemoryError"
    device.free_slab(ours)
    peer.do("allocate", device, size=2 * SLAB)
    assert device.memory_info()[0] == 0


def test_a_killed_process_gives_its_memory_back(device: EmulatedDevice, peer: Peer) -> None:
    export = unpack(peer.do("allocate", device, size=8 * SLAB))
    peer.process.kill()
    peer.process.wait()
    assert device.memory_info()[0] == 16 * MIB
    with pytest.raises(SlabImportError):
        device.import_slab(export)
    device.allocate_slab(8 * SLAB)


def test_devices_have_memory_of_their_own(backend: EmulatedBackend, device: EmulatedDevice) -> None:
    device.allocate_slab(8 * SLAB)
    backend.open(OTHER).allocate_slab(8 * SLAB)


def test_memory_is_taken_from_the_host_as_it_is_touched() -> None:
    with machine(2**36) as backend:
        device = backend.open(UUID)
        slab = device.allocate_slab(2**35)
        write(device, slab, 2**34, b"far out")
        assert read(device, slab, 2**34, 7) == b"far out"


def test_a_freed_slab_reads_as_zeros_where_it_is_still_mapped(device: EmulatedDevice, peer: Peer) -> None:
    slab = device.allocate_slab(SLAB)
    write(device, slab, 0, b"secret")
    theirs = peer.do("import", device, export=pack(device.export_slab(slab)))
    device.free_slab(slab)
    assert peer.do("read", device, slab=theirs, offset=0, size=6) == "\0" * 6
    assert device.memory_info()[0] == 16 * MIB


def test_an_export_of_a_freed_slab_is_refused(device: EmulatedDevice, peer: Peer) -> None:
    first = unpack(peer.do("allocate", device, size=SLAB))
    peer.do("free", device, slab=0)
    second = unpack(peer.do("allocate", device, size=SLAB))  # gets the same descriptor number
    with pytest.raises(SlabImportError):
        device.import_slab(first)
    with pytest.raises(SlabImportError, match="freed"):
        device.import_slab(msgspec.structs.replace(second, size_bytes=2 * SLAB))
    device.import_slab(second)


def test_closing_gives_all_back(backend: EmulatedBackend) -> None:
    device = backend.open(UUID)
    device.allocate_slab(SLAB)
    stream = device.new_stream()
    stream.launch(lambda: None)
    device.close()
    assert backend.open(UUID).memory_info()[0] == 16 * MIB
    with pytest.raises(DeviceUsageError):
        stream.synchronize()


def test_machines_that_are_not_there(backend: EmulatedBackend) -> None:
    pid, fd, inode = backend.address.split(".")
    for address in ("", "nonsense", f"{pid}.{fd}.{int(inode) + 1}", f"{2**22 + 1}.{fd}.{inode}"):
        with pytest.raises(NoDeviceError, match="there is no emulated machine"):
            EmulatedBackend.attach(address)
    with pytest.raises(DeviceUsageError, match="no room for a slab"):
        EmulatedBackend.create(emulated_devices(1, SLAB - 1))


def test_attached_in_one_process_it_is_the_same_machine(backend: EmulatedBackend, device: EmulatedDevice) -> None:
    other = EmulatedBackend.attach(backend.address)
    device.allocate_slab(SLAB)
    assert other.open(UUID).memory_info()[0] == 14 * MIB
    assert other.inventory() == backend.inventory() and other.links() == backend.links()
    other.close()


# ---- streams: a missing synchronisation shows -----------------------------------------------------------------------


def test_copies_are_asynchronous(device: EmulatedDevice) -> None:
    slab, stream, gate, target = device.allocate_slab(SLAB), device.new_stream(), threading.Event(), bytearray(3)
    write(device, slab, 0, b"new")
    stream.launch(lambda: gate.wait() and None)
    device.copy_to_host(slab, 0, memoryview(target), stream)
    event = stream.record()
    assert not event.query()
    assert target == b"\0\0\0"  # nobody waited: the data is wrong
    gate.set()
    event.synchronize()
    assert event.query()
    assert target == b"new"


def test_a_missing_wait_between_streams_shows(device: EmulatedDevice) -> None:
    slab, gate = device.allocate_slab(SLAB), threading.Event()
    writer, hasty, patient = device.new_stream(), device.new_stream(), device.new_stream()
    wrong, right = bytearray(3), bytearray(3)
    writer.launch(lambda: gate.wait() and None)
    device.copy_from_host(slab, 0, memoryview(b"new"), writer)
    patient.wait(writer.record())
    device.copy_to_host(slab, 0, memoryview(wrong), hasty)
    device.copy_to_host(slab, 0, memoryview(right), patient)
    hasty.synchronize()
    gate.set()
    patient.synchronize()
    assert (wrong, right) == (b"\0\0\0", b"new")


def test_lazy_streams_work_as_late_as_they_may() -> None:
    with machine(lazy_streams=True) as backend:
        device = backend.open(UUID)
        slab, first, second, order = device.allocate_slab(SLAB), device.new_stream(), device.new_stream(), []
        first.launch(lambda: order.append(1))
        event = first.record()
        first.launch(lambda: order.append(3))
        second.wait(event)
        second.launch(lambda: order.append(2))
        second.synchronize()
        assert order == [1, 2]  # what nobody waited for did not happen
        source = bytearray(b"one")
        device.copy_from_host(slab, 0, memoryview(source), first)
        source[:] = b"two"  # a mistake: the copy owns this memory until somebody waited for it
        first.synchronize()
        assert order == [1, 2, 3]
        assert read(device, slab, 0, 3) == b"two"
        first.launch(lambda: order.append(4))
        event = first.record()
        assert poll(event.query)  # asking is waiting, too
        first.launch(lambda: order.append(5))
        device.synchronize()
        first.launch(lambda: order.append(6))
        first.close()
        assert order == [1, 2, 3, 4, 5, 6]


def test_freeing_waits_for_the_device(device: EmulatedDevice) -> None:
    slab, stream, done = device.allocate_slab(SLAB), device.new_stream(), []
    stream.launch(lambda: done.append(True))
    device.free_slab(slab)
    assert done == [True]


def test_a_kernel_that_raises_breaks_the_context(backend: EmulatedBackend, device: EmulatedDevice) -> None:
    stream, other, after = device.new_stream(), device.new_stream(), []
    before, gate = stream.record(), threading.Event()
    stream.launch(lambda: gate.wait() and None)
    stream.launch(lambda: [][0])
    stream.launch(lambda: after.append(True))
    gate.set()
    with pytest.raises(PoisonedContextError, match=r"719.*IndexError"):
        stream.synchronize()
    before.synchronize()
    assert after == []
    for call in (other.synchronize, device.memory_info, lambda: backend.open(UUID).allocate_slab(SLAB)):
        with pytest.raises(PoisonedContextError):
            call()
    device.close()
    with pytest.raises(PoisonedContextError):
        backend.open(UUID).memory_info()
    backend.open(OTHER).memory_info()  # another device's context is another


def test_streams_that_nobody_holds_end(device: EmulatedDevice) -> None:
    done = threading.Event()
    device.new_stream().launch(done.set)
    gc.collect()
    assert done.wait(10)
    name = f"stream of {UUID}"
    assert poll(lambda: not [thread for thread in threading.enumerate() if thread.name == name])


def test_a_stream_may_not_wait_for_itself(device: EmulatedDevice) -> None:
    stream = device.new_stream()
    stream.launch(stream.synchronize)
    with pytest.raises(DeviceUsageError, match="its own stream"):
        stream.synchronize()


# ---- links ----------------------------------------------------------------------------------------------------------


def timed(memory_bytes: int = 64 * MIB) -> tuple[HandClock, Any]:
    clock = HandClock()
    host, peer = LinkSpeed(2.0 * MIB, 0.5), LinkSpeed(8.0 * MIB)
    return clock, machine(memory_bytes, host_link=host, peer_link=peer, clock=clock, sleep=clock.sleep)


def duration_s(clock: HandClock, work: Callable[[], Any]) -> float:
    before = clock()
    work()
    return clock() - before


def test_links_take_their_time() -> None:
    clock, made = timed()
    with made as backend:
        device, other, data = backend.open(UUID), backend.open(OTHER), bytes(4 * MIB)
        slab, theirs, stream = device.allocate_slab(4 * SLAB), other.allocate_slab(4 * SLAB), device.new_stream()
        assert duration_s(clock, lambda: write(device, slab, 0, data)) == pytest.approx(2.5)
        assert duration_s(clock, lambda: read(device, slab, 0, MIB)) == pytest.approx(1.0)
        device.copy_from_peer(slab, 0, theirs, 0, 8 * MIB, stream)
        assert duration_s(clock, stream.synchronize) <= 1.0
        assert duration_s(clock, lambda: (write(device, slab, 0, data), device.synchronize())) == pytest.approx(2.5)
        device.copy_within(slab, 0, slab, 4 * MIB, 4 * MIB, stream)
        assert duration_s(clock, stream.synchronize) == 0


def test_streams_share_a_link() -> None:
    clock, made = timed()
    with made as backend:
        device = backend.open(UUID)
        slab, streams = device.allocate_slab(4 * SLAB), [device.new_stream() for _ in range(2)]
        began = clock()
        data = memoryview(bytes(CHUNK_BYTES))
        for stream in streams:
            device.copy_from_host(slab, 0, data, stream)
        device.synchronize()
        assert clock() - began >= 2 * CHUNK_BYTES / (2.0 * MIB)


def test_slow_links() -> None:
    clock, made = timed()
    with made as backend:
        device = backend.open(UUID)
        slab = device.allocate_slab(SLAB)
        backend.inject(faults.slow_link(UUID, 10.0))
        assert duration_s(clock, lambda: read(device, slab, 0, MIB)) == pytest.approx(10.0)
        backend.inject(faults.slow_link(UUID, 1.0))
        assert duration_s(clock, lambda: read(device, slab, 0, MIB)) == pytest.approx(1.0)


def test_a_slow_link_has_to_have_a_speed(backend: EmulatedBackend) -> None:
    with pytest.raises(DeviceUsageError, match="unlimited"):
        backend.inject(faults.slow_link(UUID, 2.0))


# ---- faults ---------------------------------------------------------------------------------------------------------


def test_out_of_memory_at_the_third_allocation() -> None:
    with machine(faults=[faults.out_of_memory(UUID, at=3)]) as backend:
        device = backend.open(UUID)
        slabs = [device.allocate_slab(SLAB) for _ in range(2)]
        backend.open(OTHER).allocate_slab(SLAB)
        with pytest.raises(OutOfDeviceMemoryError, match=r"2 MiB asked for, 12 MiB free of 16 MiB"):
            device.allocate_slab(SLAB)
        slabs.append(device.allocate_slab(SLAB))
        assert device.memory_info()[0] == 10 * MIB


def test_faults_count_the_calls_of_all_processes(backend: EmulatedBackend, device: EmulatedDevice, peer: Peer) -> None:
    backend.inject(faults.out_of_memory(UUID, at=2))
    device.allocate_slab(SLAB)
    assert peer.ask("allocate", device, size=SLAB)["error"] == "OutOfDeviceMemoryError"


def test_a_failed_import(backend: EmulatedBackend, device: EmulatedDevice, peer: Peer) -> None:
    export = unpack(peer.do("allocate", device, size=SLAB))
    backend.inject(faults.failed_import(UUID))
    with pytest.raises(SlabImportError, match="the driver refused"):
        device.import_slab(export)
    device.import_slab(export)


def test_a_sticky_error_ends_one_process_only(backend: EmulatedBackend, device: EmulatedDevice, peer: Peer) -> None:
    slab = device.allocate_slab(SLAB)
    theirs = peer.do("import", device, export=pack(device.export_slab(slab)))
    backend.inject(faults.sticky_error(UUID, 716, at=3, pid=peer.process.pid))
    device.memory_info()  # calls of other processes do not count
    peer.do("write", device, slab=theirs, offset=0, text="good")  # two calls: the stream and the copy
    for _ in range(3):
        answer = peer.ask("read", device, slab=theirs, offset=0, size=4)
        assert answer["error"] == "PoisonedContextError"
        assert "misaligned address (716)" in answer["text"]
    assert read(device, slab, 0, 4) == b"good"
    backend.reset(UUID)
    peer.do("allocate", device, size=SLAB)  # a new life


def test_a_lost_device_is_lost_for_everybody(backend: EmulatedBackend, device: EmulatedDevice, peer: Peer) -> None:
    slab, stream, epoch = device.allocate_slab(SLAB), device.new_stream(), device.epoch
    write(device, slab, 0, b"data")
    theirs = peer.do("import", device, export=pack(device.export_slab(slab)))
    export = device.export_slab(slab)
    backend.inject(faults.lost(UUID))
    for call in (
        lambda: backend.open(UUID),
        lambda: device.allocate_slab(SLAB),
        lambda: device.copy_to_host(slab, 0, memoryview(bytearray(1)), stream),
        stream.synchronize,
        device.memory_info,
    ):
        with pytest.raises(DeviceLostError, match="gone"):
            call()
    assert peer.ask("read", device, slab=theirs, offset=0, size=1)["error"] == "DeviceLostError"
    assert backend.epoch(UUID) == epoch + 1
    backend.open(OTHER).memory_info()
    backend.reset(UUID)
    assert backend.epoch(UUID) == epoch + 2
    with pytest.raises(StaleEpochError):
        device.memory_info()
    assert peer.ask("import", device, export=pack(export))["error"] == "StaleEpochError"
    assert backend.open(UUID).memory_info() == (16 * MIB, 16 * MIB)
    assert bytes(slab.memory[:4]) == bytes(4)  # its memory is gone, not just forbidden


def test_work_in_flight_fails_with_its_device(backend: EmulatedBackend, device: EmulatedDevice) -> None:
    slab, stream, gate, target = device.allocate_slab(SLAB), device.new_stream(), threading.Event(), bytearray(1)
    stream.launch(lambda: gate.wait() and None)
    device.copy_to_host(slab, 0, memoryview(target), stream)
    event = stream.record()
    backend.inject(faults.lost(UUID))
    gate.set()
    with pytest.raises(DeviceLostError):
        event.synchronize()


def test_a_device_lost_at_its_fifth_call() -> None:
    with machine(faults=[faults.lost(UUID, at=5)]) as backend:
        device = backend.open(UUID)
        for _ in range(4):
            device.memory_info()
        with pytest.raises(DeviceLostError):
            device.memory_info()


@pytest.mark.parametrize(("xid", "fatal"), [(13, False), (43, False), (999, False), (48, True), (79, True)])
def test_xids(backend: EmulatedBackend, device: EmulatedDevice, xid: int, fatal: bool) -> None:
    watcher = EmulatedBackend.attach(backend.address)
    assert watcher.poll_health() == []
    backend.inject(faults.xid(UUID, xid))
    (event,) = watcher.poll_health()
    assert (event.device_uuid, event.kind, event.code, event.fatal, event.epoch) == (UUID, "xid", xid, fatal, 1)
    assert watcher.poll_health() == []
    if fatal:
        backend.inject(faults.xid(UUID, xid))  # the same loss, told again
        assert backend.epoch(UUID) == 2
        with pytest.raises(DeviceLostError, match=f"Xid {xid}"):
            device.memory_info()
    else:
        device.memory_info()
    watcher.close()


def test_who_polls_too_late_is_told_so(backend: EmulatedBackend) -> None:
    for _ in range(MAX_EVENTS + 5):
        backend.inject(faults.xid(UUID, 13))
    news = backend.poll_health()
    assert len(news) == MAX_EVENTS + 1
    assert news[0].kind == "suspect" and "5 events were missed" in news[0].text


def test_plans_that_make_no_sense(backend: EmulatedBackend) -> None:
    with pytest.raises(NoDeviceError):
        backend.inject(faults.lost("EMU-none"))
    for wrong in (
        lambda: faults.out_of_memory(UUID, at=0),
        lambda: faults.sticky_error(UUID, 2),
        lambda: faults.slow_link(UUID, 0.0),
    ):
        with pytest.raises(DeviceUsageError):
            wrong()
    for _ in range(MAX_FAULTS):
        backend.inject(faults.out_of_memory(UUID, at=1000))
    with pytest.raises(DeviceUsageError, match="waiting"):
        backend.inject(faults.out_of_memory(UUID))


def test_capacity_holds_when_many_allocate_at_once(backend: EmulatedBackend) -> None:
    """Several threads on two attachments, which exclude each other as two processes do."""
    other = EmulatedBackend.attach(backend.address)
    most = []

    def churn(device: EmulatedDevice) -> None:
        for _ in range(20):
            try:
                slab = device.allocate_slab(3 * SLAB)
            except OutOfDeviceMemoryError:
                continue
            most.append(device.memory_info()[0])
            device.free_slab(slab)

    threads = [threading.Thread(target=churn, args=(one.open(UUID),)) for one in (backend, other) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most and min(most) >= 4 * MIB
    assert backend.open(UUID).memory_info()[0] == 16 * MIB
    other.close()
