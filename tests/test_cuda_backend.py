"""What is particular to the CUDA backend: what it makes of the driver's and NVML's answers, without either of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from afield.errors import DeviceLostError, NoDeviceError, OutOfDeviceMemoryError
from afield.gpu_store.backends import health
from afield.gpu_store.backends.base import (
    HOST,
    SLAB_GRANULE_BYTES,
    DeviceCallError,
    DeviceUsageError,
    PoisonedContextError,
    StaleEpochError,
)
from afield.gpu_store.backends.cuda import CudaBackend, CudaDevice
from afield.gpu_store.backends.health import Verdict
from afield.gpu_store.backends.nvml import (
    DOUBLE_BIT_ECC,
    FATAL_POISON,
    MAX_EVENTS_PER_POLL,
    RECOVERY_ACTION,
    UNAVAILABLE,
    XID,
    classify,
    pci_address,
)
from tests.fake_cuda import GIB, FakeNvml, FakeRuntime, libraries
from tests.helpers import ROOT
from tests.test_device_backend import write

UUID = "GPU-0000"
SLAB = SLAB_GRANULE_BYTES


@pytest.fixture
def backend() -> Iterator[CudaBackend]:
    backend = CudaBackend(libraries())
    yield backend
    backend.close()


@pytest.fixture
def device(backend: CudaBackend) -> CudaDevice:
    return backend.open(UUID)


@pytest.fixture
def runtime(backend: CudaBackend) -> FakeRuntime:
    runtime: FakeRuntime = backend.libraries.runtime
    return runtime


@pytest.fixture
def nvml(backend: CudaBackend) -> FakeNvml:
    nvml: FakeNvml = backend.libraries.nvml
    return nvml


# ---- without CUDA ---------------------------------------------------------------------------------------------------

WITHOUT = """
import sys
from afield.errors import NoDeviceError
from afield.gpu_store.backends import cuda
assert not {"cupy", "pynvml"} & set(sys.modules), "importing the backend costs nothing"
sys.modules["pynvml"] = sys.modules["cupy"] = sys.modules["cupy.cuda"] = None
try:
    cuda.CudaBackend()
except NoDeviceError as error:
    assert 'devices="emulated:2"' in str(error) and "afield[cuda12]" in str(error), error
else:
    raise SystemExit("a fallback, and a silent one")
"""


def test_without_its_libraries_there_is_an_error_with_the_remedy() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_without_a_device() -> None:
    with pytest.raises(NoDeviceError, match="no device"):
        CudaBackend(libraries(count=0))


def test_a_device_that_cuda_does_not_show(backend: CudaBackend, runtime: FakeRuntime) -> None:
    runtime.count = 1  # CUDA_VISIBLE_DEVICES hides the second; NVML does not care
    with pytest.raises(NoDeviceError, match="CUDA_VISIBLE_DEVICES"):
        backend.open("GPU-0001")


# ---- tables ---------------------------------------------------------------------------------------------------------

XIDS = [
    *((xid, Verdict.PROCESS) for xid in (13, 31, 43, 45, 68, 109)),
    *((xid, Verdict.DEVICE) for xid in (48, 63, 64, 74, 79, 94, 95)),
    *((xid, Verdict.FINE) for xid in (0, 14, 92, 1000)),
]
CODES = [
    *((code, Verdict.PROCESS) for code in (700, 710, 714, 715, 716, 717, 718, 719)),
    *((code, Verdict.DEVICE) for code in (214, 220)),
    *((code, Verdict.FINE) for code in (1, 2, 400, 600, 701, 704, 711, 712)),
]


@pytest.mark.parametrize(("xid", "verdict"), XIDS)
def test_xids(xid: int, verdict: Verdict) -> None:
    assert health.judge_xid(xid)[0] is verdict
    event = classify(XID, xid, UUID, 3)
    assert (event.kind, event.code, event.device_uuid, event.epoch) == ("xid", xid, UUID, 3)
    assert event.fatal is (verdict is Verdict.DEVICE)
    assert str(xid) in event.text


@pytest.mark.parametrize(("code", "verdict"), CODES)
def test_codes(code: int, verdict: Verdict) -> None:
    assert health.judge_code(code)[0] is verdict


@pytest.mark.parametrize(
    ("kind", "data", "name", "fatal"),
    [
        (DOUBLE_BIT_ECC, 0, "ecc", True),
        (FATAL_POISON, 0, "ecc", True),
        (UNAVAILABLE, 0, "lost", True),
        (RECOVERY_ACTION, 0, "recovery", False),
        *((RECOVERY_ACTION, action, "recovery", True) for action in range(1, 9)),
        (0x10, 0, "suspect", False),
    ],
)
def test_other_events(kind: int, data: int, name: str, fatal: bool) -> None:
    event = classify(kind, data, UUID, 1)
    assert (event.kind, event.fatal) == (name, fatal)
    assert event.text


@pytest.mark.parametrize("code", [15, 16])
def test_nvml_says_that_a_device_is_lost(code: int) -> None:
    assert health.judge_nvml(code)[0] is Verdict.DEVICE
    assert health.judge_nvml(3)[0] is Verdict.FINE


def test_pci_addresses() -> None:
    assert pci_address("00000000:3B:00.0") == "0000:3b:00.0"
    assert pci_address("00010001:AF:00.0") == "10001:af:00.0"


# ---- calls ----------------------------------------------------------------------------------------------------------


def test_a_sticky_error_is_remembered(backend: CudaBackend, device: CudaDevice, runtime: FakeRuntime) -> None:
    slab = device.allocate_slab(SLAB)
    runtime.fail_next = 700
    with pytest.raises(PoisonedContextError, match="illegal address"):
        write(device, slab, 0, b"x")
    calls = len(runtime.calls)
    with pytest.raises(PoisonedContextError):
        device.memory_info()
    assert len(runtime.calls) == calls  # the driver is not asked again
    device.close()
    with pytest.raises(PoisonedContextError):
        backend.open(UUID).memory_info()
    with pytest.raises(PoisonedContextError, match="end of its process"):
        backend.reset(UUID)
    backend.open("GPU-0001").memory_info()


def test_an_uncorrectable_error_loses_the_device(
    backend: CudaBackend, device: CudaDevice, runtime: FakeRuntime
) -> None:
    slab = device.allocate_slab(SLAB)
    runtime.fail_next = 214
    with pytest.raises(DeviceLostError, match="ECC"):
        device.memory_info()
    assert backend.epoch(UUID) == 2
    with pytest.raises(DeviceLostError):
        backend.open(UUID)
    device.free_slab(slab)
    backend.reset(UUID)
    assert backend.open(UUID).epoch == 3
    with pytest.raises(StaleEpochError):
        device.memory_info()


@pytest.mark.parametrize(
    ("status", "expected"),
    [(1, DeviceCallError), (2, OutOfDeviceMemoryError), (35, NoDeviceError), (712, DeviceUsageError)],
)
def test_other_errors_are_translated(
    device: CudaDevice, runtime: FakeRuntime, status: int, expected: type[Exception]
) -> None:
    runtime.fail_next = status
    with pytest.raises(expected) as caught:
        device.allocate_slab(SLAB)
    if isinstance(caught.value, DeviceCallError):
        assert caught.value.code == status
    device.memory_info()


def test_no_room_names_the_holders_that_the_driver_knows(device: CudaDevice) -> None:
    device.allocate_slab(GIB)
    with pytest.raises(
        OutOfDeviceMemoryError, match="2 MiB asked for, 0 B free of 1 GiB; largest holders: process 12 1 MiB"
    ):
        device.allocate_slab(SLAB)


def test_the_thread_gets_its_device_back(backend: CudaBackend, device: CudaDevice, runtime: FakeRuntime) -> None:
    runtime.current = 0  # CUDA's numbers run the other way: this is GPU-0001
    device.allocate_slab(SLAB)
    assert runtime.current == 0
    assert device.memory_info()[0] == GIB - SLAB
    assert backend.open("GPU-0001").memory_info()[0] == GIB


def test_the_epoch_is_what_the_runtime_says() -> None:
    backend = CudaBackend(libraries(), epochs={"GPU-0001": 7})
    assert [backend.epoch(info.uuid) for info in backend.inventory()] == [1, 7]
    assert backend.open("GPU-0001").epoch == 7
    backend.close()


def test_host_memory_is_held_until_it_was_read(device: CudaDevice, runtime: FakeRuntime) -> None:
    slab, stream, busy = device.allocate_slab(SLAB), device.new_stream(), [True]
    runtime.eventQuery = lambda event: 600 if busy else 0  # type: ignore[method-assign]
    memory = bytearray(b"abc")
    device.copy_from_host(slab, 0, memoryview(memory), stream)
    with pytest.raises(BufferError):
        memory.append(0)  # exported, and so alive
    assert not stream.record().query()
    busy.clear()
    stream.synchronize()
    memory.append(0)


# ---- NVML -----------------------------------------------------------------------------------------------------------


def test_links_come_from_the_topology(backend: CudaBackend) -> None:
    links = {(link.source, link.target): link for link in backend.links()}
    nvlink = links[UUID, "GPU-0001"]
    assert (nvlink.kind, nvlink.bandwidth_bytes_per_s) == ("nvlink", 4 * 25e9)
    assert links[HOST, UUID].kind == "host"
    assert links[HOST, UUID].bandwidth_bytes_per_s == pytest.approx(63e9, rel=0.01)  # PCIe 5, and 16 lanes unless told


def test_health(backend: CudaBackend, device: CudaDevice, nvml: FakeNvml) -> None:
    assert backend.poll_health() == []
    nvml.events = [(0, XID, 13), (1, XID, 31)]
    assert [(event.device_uuid, event.fatal) for event in backend.poll_health()] == [(UUID, False), ("GPU-0001", False)]
    device.memory_info()
    nvml.recovery_action = 1
    nvml.events = [(0, XID, 79), (0, RECOVERY_ACTION, 0)]
    assert [event.text for event in backend.poll_health()] == [
        "Xid 79: the device has fallen off the bus",
        "the driver wants: reset the device",
    ]
    assert backend.epoch(UUID) == 2  # one loss, however many signals
    with pytest.raises(DeviceLostError, match="fallen off the bus"):
        device.memory_info()
    nvml.lost = {0}
    with pytest.raises(DeviceLostError, match="does not answer"):
        backend.reset(UUID)
    backend.close()
    assert nvml.listening == 0


def test_a_failing_wait_makes_every_device_suspect(backend: CudaBackend, nvml: FakeNvml) -> None:
    nvml.events = [999]
    nvml.lost = {1}
    assert [(event.device_uuid, event.kind, event.fatal) for event in backend.poll_health()] == [
        (UUID, "suspect", False),
        ("GPU-0001", "lost", True),
    ]
    assert backend.poll_health() == []  # and it listens again
    assert nvml.listening == 1


def test_a_storm_does_not_hold_the_poller(backend: CudaBackend, nvml: FakeNvml) -> None:
    nvml.events = [(0, XID, 13)] * (MAX_EVENTS_PER_POLL + 1)
    assert [len(backend.poll_health()) for _ in range(3)] == [MAX_EVENTS_PER_POLL, 1, 0]


def test_a_lost_device_is_left_out_of_the_inventory() -> None:
    modules = libraries()
    modules.nvml.lost = {0}
    assert [info.uuid for info in CudaBackend(modules).inventory()] == ["GPU-0001"]
