"""What every device backend does: one suite on emulated devices, on CUDA, and on CUDA's code over a driver that is not there.

The suite runs on the real thing under the marker `gpu`. What is particular to one backend is tested in
test_emulated_device.py and test_cuda_backend.py.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest

from afield.errors import AfieldError, NoDeviceError, OutOfDeviceMemoryError
from afield.gpu_store.backends import base
from afield.gpu_store.backends.base import (
    HOST,
    SLAB_GRANULE_BYTES,
    Device,
    DeviceBackend,
    DeviceUsageError,
    Slab,
    SlabImportError,
    StaleEpochError,
    Stream,
)
from afield.gpu_store.backends.cuda import CudaBackend
from afield.gpu_store.backends.emulated import EmulatedBackend
from tests.device_helpers import emulated_devices
from tests.fake_cuda import libraries
from tests.helpers import ROOT

MIB = 2**20


@dataclass
class Peer:
    """A process beside this one; see tests/device_peer.py."""

    process: subprocess.Popen[str]

    def ask(self, do: str, device: Device, **order: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps({"do": do, "uuid": device.info.uuid, **order}), file=self.process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def do(self, do: str, device: Device, **order: Any) -> Any:
        answer = self.ask(do, device, **order)
        assert "error" not in answer, answer
        return answer["answer"]


def pack(export: base.SlabExport) -> str:
    return base64.b64encode(msgspec.msgpack.encode(export)).decode()


def unpack(text: str) -> base.SlabExport:
    return msgspec.msgpack.decode(base64.b64decode(text), type=base.SlabExport)


@pytest.fixture(scope="module", params=["emulated", "fake", pytest.param("cuda", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> Iterator[tuple[str, DeviceBackend]]:
    backend: DeviceBackend
    if request.param == "emulated":
        backend = EmulatedBackend.create(emulated_devices(2, 64 * MIB))
        yield backend.address, backend
    else:
        try:
            backend = CudaBackend(libraries() if request.param == "fake" else None)
        except NoDeviceError as error:
            pytest.skip(str(error))
        yield request.param, backend
    backend.close()


@pytest.fixture
def backend(machine: tuple[str, DeviceBackend]) -> DeviceBackend:
    return machine[1]


@pytest.fixture
def device(backend: DeviceBackend) -> Iterator[Device]:
    device = backend.open(backend.inventory()[0].uuid)
    yield device
    device.close()


@pytest.fixture
def stream(device: Device) -> Stream:
    return device.new_stream()


@contextmanager
def peer_process(where: str) -> Iterator[Peer]:
    command = [sys.executable, "-m", "tests.device_peer", where]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        yield Peer(process)
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30)


@pytest.fixture(scope="module")
def peer(machine: tuple[str, DeviceBackend]) -> Iterator[Peer]:
    with peer_process(machine[0]) as peer:
        yield peer
    assert peer.process.returncode == 0


def write(device: Device, slab: Slab, offset: int, data: bytes) -> None:
    stream = device.new_stream()
    device.copy_from_host(slab, offset, memoryview(data), stream)
    stream.synchronize()
    stream.close()


def read(device: Device, slab: Slab, offset: int, size: int) -> bytes:
    target, stream = bytearray(size), device.new_stream()
    device.copy_to_host(slab, offset, memoryview(target), stream)
    stream.synchronize()
    stream.close()
    return bytes(target)


# ---- what there is --------------------------------------------------------------------------------------------------


def test_inventory(backend: DeviceBackend) -> None:
    infos = backend.inventory()
    assert infos
    assert len({info.uuid for info in infos}) == len(infos)
    for index, info in enumerate(infos):
        assert info.index == index
        assert info.memory_bytes >= SLAB_GRANULE_BYTES
        assert info.name and info.kind
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(info), type=base.DeviceInfo) == info


def test_links_reach_everything(backend: DeviceBackend) -> None:
    ends = {HOST, *(info.uuid for info in backend.inventory())}
    links = {(link.source, link.target): link for link in backend.links()}
    assert set(links) == {(a, b) for a in ends for b in ends if a != b}
    assert all(link.bandwidth_bytes_per_s > 0 and link.latency_s >= 0 for link in links.values())


def test_unknown_device(backend: DeviceBackend) -> None:
    for call in (backend.open, backend.epoch, backend.reset):
        with pytest.raises(NoDeviceError, match="GPU-unknown"):
            call("GPU-unknown")


def test_open_twice_is_one_device(backend: DeviceBackend, device: Device) -> None:
    assert backend.open(device.info.uuid) is device
    assert device.epoch == backend.epoch(device.info.uuid) >= 1
    device.close()
    device.close()
    with pytest.raises(DeviceUsageError, match="closed"):
        device.memory_info()
    assert backend.open(device.info.uuid) is not device


def test_nothing_happened(backend: DeviceBackend) -> None:
    assert not [event for event in backend.poll_health() if event.fatal]


# ---- slabs ----------------------------------------------------------------------------------------------------------


def test_slabs_are_counted(device: Device) -> None:
    free, total = device.memory_info()
    assert 0 < free <= total
    slab = device.allocate_slab(2 * SLAB_GRANULE_BYTES)
    assert (slab.device_uuid, slab.epoch) == (device.info.uuid, device.epoch)
    assert slab.size_bytes == 2 * SLAB_GRANULE_BYTES
    assert slab.address and not slab.imported and slab.mapped
    assert device.memory_info()[0] <= free - slab.size_bytes
    device.free_slab(slab)
    assert not slab.mapped
    # A real device is not ours alone.
    assert device.memory_info()[0] == pytest.approx(free, abs=0 if device.info.kind == "emulated" else 64 * MIB)


@pytest.mark.parametrize("size", [0, -SLAB_GRANULE_BYTES, 1, SLAB_GRANULE_BYTES + 512])
def test_slab_sizes(device: Device, size: int) -> None:
    with pytest.raises(DeviceUsageError, match="2 MiB"):
        device.allocate_slab(size)


def test_no_room_is_told_with_the_arithmetic(device: Device) -> None:
    too_large = (device.info.memory_bytes // SLAB_GRANULE_BYTES + 1) * SLAB_GRANULE_BYTES
    with pytest.raises(OutOfDeviceMemoryError, match=r"asked for, .* free of .*can never fit"):
        device.allocate_slab(too_large)
    device.free_slab(device.allocate_slab(SLAB_GRANULE_BYTES))  # the device goes on


def test_freed_slabs_are_refused(device: Device, stream: Stream) -> None:
    slab = device.allocate_slab(SLAB_GRANULE_BYTES)
    device.free_slab(slab)
    for call in (
        lambda: device.free_slab(slab),
        lambda: device.export_slab(slab),
        lambda: device.copy_to_host(slab, 0, memoryview(bytearray(1)), stream),
    ):
        with pytest.raises(DeviceUsageError, match="freed"):
            call()


# ---- copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 511, SLAB_GRANULE_BYTES])
def test_round_trip(device: Device, size: int) -> None:
    slab = device.allocate_slab(SLAB_GRANULE_BYTES)
    data = np.random.default_rng(size).bytes(size)
    offset = SLAB_GRANULE_BYTES - size
    write(device, slab, offset, data)
    assert read(device, slab, offset, size) == data


def test_typed_host_memory(device: Device, stream: Stream) -> None:
    slab = device.allocate_slab(SLAB_GRANULE_BYTES)
    source, target = np.arange(12.0).reshape(3, 4), np.zeros((3, 4))
    source.flags.writeable = False
    device.copy_from_host(slab, 512, memoryview(source), stream)
    device.copy_to_host(slab, 512, memoryview(target), stream)
    stream.synchronize()
    np.testing.assert_array_equal(target, source)


def test_copy_within(device: Device, stream: Stream) -> None:
    first, second = (device.allocate_slab(SLAB_GRANULE_BYTES) for _ in range(2))
    write(device, first, 0, b"abcdef")
    device.copy_within(first, 2, second, 100, 3, stream)
    device.copy_within(first, 0, first, 6, 6, stream)
    stream.synchronize()
    assert read(device, second, 100, 3) == b"cde"
    assert read(device, first, 0, 12) == b"abcdefabcdef"
    with pytest.raises(DeviceUsageError, match="overlap"):
        device.copy_within(first, 0, first, 5, 6, stream)


def test_copy_from_peer(backend: DeviceBackend, device: Device, stream: Stream) -> None:
    if len(backend.inventory()) < 2:
        pytest.skip("a peer copy needs two devices, and this machine has one")
    other = backend.open(backend.inventory()[1].uuid)
    theirs, ours = other.allocate_slab(SLAB_GRANULE_BYTES), device.allocate_slab(SLAB_GRANULE_BYTES)
    write(other, theirs, 10, b"over there")
    for _ in range(2):
        device.copy_from_peer(ours, 20, theirs, 10, 10, stream)
    stream.synchronize()
    assert read(device, ours, 20, 10) == b"over there"
    with pytest.raises(DeviceUsageError, match="another device"):
        device.copy_from_peer(ours, 0, ours, 10, 1, stream)
    with pytest.raises(DeviceUsageError):
        device.copy_to_host(theirs, 0, memoryview(bytearray(1)), stream)
    with pytest.raises(DeviceUsageError, match="stream"):
        other.copy_to_host(theirs, 0, memoryview(bytearray(1)), stream)
    other.close()


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (SLAB_GRANULE_BYTES, 1), (SLAB_GRANULE_BYTES - 1, 2)])
def test_ranges(device: Device, stream: Stream, offset: int, size: int) -> None:
    slab = device.allocate_slab(SLAB_GRANULE_BYTES)
    memory = memoryview(bytearray(size))
    for call in (
        lambda: device.copy_to_host(slab, offset, memory, stream),
        lambda: device.copy_from_host(slab, offset, memory, stream),
        lambda: device.copy_within(slab, offset, slab, 0, size, stream),
        lambda: device.copy_within(slab, 0, slab, offset, size, stream),
    ):
        with pytest.raises(DeviceUsageError, match="do not lie in"):
            call()


def test_host_memory_has_to_be_usable(device: Device, stream: Stream) -> None:
    slab = device.allocate_slab(SLAB_GRANULE_BYTES)
    with pytest.raises(DeviceUsageError, match="read-only"):
        device.copy_to_host(slab, 0, memoryview(b"abc"), stream)
    for strided in (memoryview(bytearray(8))[::2], memoryview(np.zeros((2, 3), order="F"))):
        with pytest.raises(DeviceUsageError, match="contiguous"):
            device.copy_from_host(slab, 0, strided, stream)


def test_pinned_host_memory(device: Device) -> None:
    memory = memoryview(bytearray(4096))
    device.pin_host(memory)
    with pytest.raises(DeviceUsageError, match="already"):
        device.pin_host(memory)
    device.unpin_host(memory)
    with pytest.raises(DeviceUsageError, match="not page-locked"):
        device.unpin_host(memory)


# ---- streams and events ---------------------------------------------------------------------------------------------


def test_a_stream_is_first_in_first_out(device: Device, stream: Stream) -> None:
    slab = device.allocate_slab(2 * SLAB_GRANULE_BYTES)
    pages = [bytes([value]) * SLAB_GRANULE_BYTES for value in range(8)]
    read_back = [bytearray(SLAB_GRANULE_BYTES) for _ in pages]
    for page, target in zip(pages, read_back, strict=True):
        device.copy_from_host(slab, 0, memoryview(page), stream)
        device.copy_within(slab, 0, slab, SLAB_GRANULE_BYTES, SLAB_GRANULE_BYTES, stream)
        device.copy_to_host(slab, SLAB_GRANULE_BYTES, memoryview(target), stream)
    stream.synchronize()
    assert [bytes(target) for target in read_back] == pages


def test_events_order_streams(device: Device) -> None:
    first, second = device.new_stream(), device.new_stream()
    slab, target = device.allocate_slab(16 * MIB), bytearray(16 * MIB)
    data = b"\x07" * len(target)
    device.copy_from_host(slab, 0, memoryview(data), first)
    event = first.record()
    second.wait(event)
    device.copy_to_host(slab, 0, memoryview(target), second)
    second.synchronize()
    assert target == data
    assert event.query()
    event.synchronize()


def test_an_event_of_an_empty_stream_has_happened(stream: Stream) -> None:
    event = stream.record()
    event.synchronize()
    assert event.query()
    stream.wait(event)
    stream.synchronize()


def test_synchronising_the_device_covers_all_streams(device: Device) -> None:
    streams = [device.new_stream() for _ in range(3)]
    slab = device.allocate_slab(SLAB_GRANULE_BYTES)
    write(device, slab, 0, b"xyz")
    targets = [bytearray(1) for _ in streams]
    for number, (stream, target) in enumerate(zip(streams, targets, strict=True)):
        device.copy_to_host(slab, number, memoryview(target), stream)
    device.synchronize()
    assert b"".join(targets) == b"xyz"


def test_closed_streams_are_refused(device: Device, stream: Stream) -> None:
    slab = device.allocate_slab(SLAB_GRANULE_BYTES)
    stream.close()
    stream.close()
    with pytest.raises(DeviceUsageError, match="closed"):
        device.copy_to_host(slab, 0, memoryview(bytearray(1)), stream)
    with pytest.raises(DeviceUsageError, match="closed"):
        stream.record()


def test_any_thread_may_use_a_device(device: Device) -> None:
    slab = device.allocate_slab(SLAB_GRANULE_BYTES)
    threads = [threading.Thread(target=write, args=(device, slab, 4 * n, b"%04d" % n)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read(device, slab, 0, 32) == b"".join(b"%04d" % n for n in range(8))


# ---- other processes ------------------------------------------------------------------------------------------------


def test_a_slab_is_shared(device: Device, peer: Peer) -> None:
    slab = device.allocate_slab(SLAB_GRANULE_BYTES)
    theirs = peer.do("import", device, export=pack(device.export_slab(slab)))
    write(device, slab, 100, b"from here")
    assert peer.do("read", device, slab=theirs, offset=100, size=9) == "from here"
    peer.do("write", device, slab=theirs, offset=200, text="from there")
    assert read(device, slab, 200, 10) == b"from there"
    peer.do("free", device, slab=theirs)
    assert read(device, slab, 100, 9) == b"from here"
    device.free_slab(slab)


def test_a_slab_of_another_process(device: Device, peer: Peer) -> None:
    export = unpack(peer.do("allocate", device, size=SLAB_GRANULE_BYTES))
    assert (export.device_uuid, export.epoch, export.size_bytes) == (device.info.uuid, device.epoch, SLAB_GRANULE_BYTES)
    free = device.memory_info()[0]
    slab, again = device.import_slab(export), device.import_slab(export)
    assert slab.imported and slab.size_bytes == SLAB_GRANULE_BYTES
    write(device, slab, 0, b"mapped")
    assert read(device, again, 0, 6) == b"mapped"
    assert device.memory_info()[0] == pytest.approx(free, abs=SLAB_GRANULE_BYTES)  # mapping takes no memory
    with pytest.raises(DeviceUsageError, match="exported by the process"):
        device.export_slab(slab)
    device.free_slab(slab)
    device.free_slab(again)
    with pytest.raises(DeviceUsageError, match="freed"):
        device.free_slab(slab)


def test_imports_that_are_refused(device: Device) -> None:
    slab = device.allocate_slab(SLAB_GRANULE_BYTES)
    export = device.export_slab(slab)
    with pytest.raises(SlabImportError, match="process that allocated it"):
        device.import_slab(export)
    for epoch in (device.epoch - 1, device.epoch + 1):
        with pytest.raises(StaleEpochError, match=f"epoch {epoch}"):
            device.import_slab(msgspec.structs.replace(export, epoch=epoch))
    with pytest.raises(DeviceUsageError, match="GPU-other"):
        device.import_slab(msgspec.structs.replace(export, device_uuid="GPU-other"))
    with pytest.raises(SlabImportError):
        device.import_slab(msgspec.structs.replace(export, handle=bytes(64)))


def test_devices_do_not_survive_a_fork(device: Device, stream: Stream) -> None:
    slab = device.allocate_slab(SLAB_GRANULE_BYTES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads, which is the point
        child = os.fork()
    if child == 0:
        status = 1
        try:
            device.copy_to_host(slab, 0, memoryview(bytearray(1)), stream)
        except DeviceUsageError:
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert read(device, slab, 0, 1) is not None


# ---- lives ----------------------------------------------------------------------------------------------------------


def test_a_reset_begins_a_new_life(backend: DeviceBackend, device: Device, stream: Stream) -> None:
    slab = device.allocate_slab(SLAB_GRANULE_BYTES)
    export = device.export_slab(slab)
    uuid, epoch = device.info.uuid, device.epoch
    backend.reset(uuid)
    assert backend.epoch(uuid) == epoch + 1
    with pytest.raises(AfieldError):
        device.memory_info()
    device.free_slab(slab)  # what is left of the old life can be let go
    anew = backend.open(uuid)
    assert anew is not device and anew.epoch == epoch + 1
    with pytest.raises(StaleEpochError):
        anew.import_slab(export)
    with pytest.raises(AfieldError):
        anew.copy_to_host(slab, 0, memoryview(bytearray(1)), anew.new_stream())
    free, total = anew.memory_info()
    assert free == total or anew.info.kind == "cuda"
    write(anew, anew.allocate_slab(SLAB_GRANULE_BYTES), 0, b"works")
    anew.close()
