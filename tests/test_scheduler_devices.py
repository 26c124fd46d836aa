"""Devices in the scheduler: which CUDA devices a setting means, and what becomes of leases when a device goes and comes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from afield.errors import InvalidOptionError, NoDeviceError
from afield.gpu_store.backends import cuda
from afield.scheduler.devices import Device, parse_devices, visible_devices
from afield.scheduler.leases import HOLD_LIMIT_S, PATIENCE, LeaseManager
from afield.scheduler.resources import ResourceSet
from afield.scheduler.slots import AFTER_RESET, SOON
from tests.fake_cuda import libraries

ROOT = Path(__file__).resolve().parent.parent
A, B = b"owner-a", b"owner-b"
FIRST, SECOND = (device.uuid for device in parse_devices("emulated:2"))


@dataclass(frozen=True)
class Info:
    uuid: str
    index: int
    name: str = "H100"
    memory_bytes: int = 80 << 30


MACHINE = [Info("GPU-aa11", 0), Info("GPU-aa22", 1), Info("GPU-bb33", 2)]


def uuids(spec: str) -> list[str]:
    return [device.uuid for device in parse_devices(spec, lambda: MACHINE)]


# ---- which devices --------------------------------------------------------------------------------------------------


def test_cuda_devices_are_all_the_first_or_those_named() -> None:
    assert uuids("cuda") == ["GPU-aa11", "GPU-aa22", "GPU-bb33"]
    assert uuids(" cuda:2 ") == ["GPU-aa11", "GPU-aa22"]
    assert uuids("cuda:GPU-bb33, GPU-aa11") == ["GPU-bb33", "GPU-aa11"]
    assert uuids("cuda:GPU-b") == ["GPU-bb33"]
    # The index is the place among the chosen, as a node numbers its devices without gaps.
    assert parse_devices("cuda:GPU-bb33", lambda: MACHINE) == [Device("GPU-bb33", 0, "H100", 80 << 30, "cuda")]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cuda:4", r"there are 3 CUDA devices: GPU-aa11 \(H100\).*emulated:2"),
        ("cuda:GPU-cc", "no device has the UUID GPU-cc; there are: GPU-aa11"),
        ("cuda:GPU-aa", "2 devices have the UUID GPU-aa"),
        ("cuda:GPU-", "no device has the UUID GPU-;"),
    ],
)
def test_cuda_devices_that_are_not_there(spec: str, message: str) -> None:
    with pytest.raises(NoDeviceError, match=message):
        uuids(spec)


@pytest.mark.parametrize("spec", ["cuda:", "cuda:0", "cuda:-1", "cuda:first", "cuda:GPU-aa11,", "cuda:0,1", "cudas"])
def test_cuda_settings_that_are_not_understood(spec: str) -> None:
    with pytest.raises(InvalidOptionError, match=r'devices="cuda:2"'):
        uuids(spec)
    with pytest.raises(InvalidOptionError, match="twice"):
        uuids("cuda:GPU-aa11,GPU-aa1")


def test_no_cuda_device_at_all() -> None:
    with pytest.raises(NoDeviceError, match="emulated:2"):
        parse_devices("cuda", list)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("2,0", [2, 0]),
        ("GPU-b,GPU-aa1", [2, 0]),
        ("0,7,1", [0]),  # CUDA stops at the first that is wrong
        ("-1", []),
        ("GPU-aa,0", []),
        ("1,1", [1]),
        ("GPU-aa11, 2", [0, 2]),
    ],
)
def test_what_cuda_would_show(setting: str | None, expected: list[int]) -> None:
    assert [info.index for info in visible_devices(MACHINE, setting, bus_order=False)] == expected


def test_numbers_mean_nothing_where_the_order_is_not_known() -> None:
    mixed = [*MACHINE, Info("GPU-dd44", 3, "L4")]
    with pytest.raises(NoDeviceError, match="CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        visible_devices(mixed, "0", bus_order=False)
    assert visible_devices(mixed, "3", bus_order=True) == [mixed[3]]
    assert visible_devices(mixed, "GPU-dd", bus_order=False) == [mixed[3]]


ASK = """
import sys
{missing}
import afield
from afield.errors import NoDeviceError
try:
    afield.init(devices="cuda:1")
except NoDeviceError as error:
    print(error)
assert not afield.is_initialized()
assert "cupy" not in sys.modules or sys.modules["cupy"] is None
"""


def test_init_without_cuda_says_what_is_missing() -> None:
    script = ASK.format(missing='sys.modules["pynvml"] = None')
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "nvidia-ml-py" in done.stdout
    assert "afield[cuda12]" in done.stdout
    assert "AFIELD_DEVICES=emulated:2" in done.stdout


def test_the_inventory_is_asked_of_nvml_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = libraries(count=2).nvml
    ended: list[bool] = []
    library = SimpleNamespace(**{name: getattr(nvml, name) for name in dir(nvml) if not name.startswith("__")})
    library.nvmlInit, library.nvmlShutdown = lambda: None, lambda: ended.append(True)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(cuda, "find_spec", lambda name: object())
    devices = parse_devices("cuda:GPU-0001", cuda.find_devices)
    assert [(device.uuid, device.kind) for device in devices] == [("GPU-0001", "cuda")]
    assert ended == [True]
    assert "cupy" not in sys.modules
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    with pytest.raises(NoDeviceError, match="CuPy is not installed"):
        cuda.find_devices()


# ---- leases of devices that go and come -----------------------------------------------------------------------------


def shape(cpu: float = 0, gpu: float = 0, gpu_memory: str | None = None) -> ResourceSet:
    return ResourceSet.from_options(cpu, gpu, None, None, gpu_memory)


def node(spec: str = "emulated:2:16GiB", cpu: float = 8) -> LeaseManager:
    return LeaseManager(shape(cpu), parse_devices(spec))


def test_nothing_new_is_placed_on_a_withdrawn_device() -> None:
    leases = node()
    leases.demand(A, shape(1, gpu=0.5), 2, key=1)
    ours = [grant.lease_id for grant in leases.schedule()]
    leases.demand(B, shape(1, gpu=1), 1, key=1)
    (theirs,) = leases.schedule()
    assert theirs.device_uuids == (SECOND,)
    assert leases.withdraw(FIRST, "lost at 12:03:11, Xid 79") == ours
    assert leases.total() == {"CPU": 8.0, "GPU": 1.0, "gpu_memory": 16.0 * 2**30}
    assert leases.available()["GPU"] == 0.0
    leases.demand(A, shape(1, gpu=1), 1, key=2)
    for lease_id in ours:
        leases.release(lease_id)
    assert leases.schedule() == [], "what was on the lost device is not free for anybody"
    assert leases.refusals() == [], "it fits the other device"
    leases.release(theirs.lease_id)
    (grant,) = leases.schedule()
    assert grant.device_uuids == (SECOND,)
    leases.restore(FIRST)
    assert leases.total()["GPU"] == 2.0
    assert leases.available()["GPU"] == 1.0


def test_what_can_never_fit_any_more_is_refused_once_with_the_cause() -> None:
    leases = node()
    leases.demand(A, shape(1, gpu=2), 1, key=1)
    (pair,) = leases.schedule()
    leases.demand(B, shape(1, gpu=2), 3, key=7)
    leases.demand(B, shape(1, gpu=1), 1, key=8)
    assert leases.withdraw(FIRST, "lost at 12:03:11, Xid 79") == [pair.lease_id]
    (refusal,) = leases.refusals()
    assert (refusal.owner, refusal.key) == (B, 7)
    assert "GPU (asked 2, total 1)" in refusal.reason
    assert f"{FIRST} (lost at 12:03:11, Xid 79)" in refusal.reason
    assert "afield.init" not in refusal.reason
    assert leases.refusals() == []
    leases.release(pair.lease_id)
    assert [grant.key for grant in leases.schedule()] == [8]
    (again,) = leases.demand(B, shape(1, gpu=2), 1, key=7)
    assert "Xid 79" in again.reason
    leases.restore(FIRST)
    assert leases.demand(B, shape(1, gpu=2), 1, key=7) == []


def test_a_device_that_is_coming_back_is_waited_for() -> None:
    leases = node("emulated:1:16GiB")
    leases.demand(A, shape(1, gpu=1), 1, key=1)
    assert leases.withdraw(FIRST, "its store process died", SOON) == []
    assert leases.schedule() == []
    assert leases.refusals() == []
    assert leases.demand(B, shape(gpu=1, gpu_memory="1GiB"), 1, key=1) == []
    assert leases.total() == {"CPU": 8.0}
    leases.restore(FIRST)
    assert [grant.owner for grant in leases.schedule()] == [A]
    # It was to come back, and does not.
    leases.withdraw(FIRST, "", SOON)
    leases.withdraw(FIRST, "it did not come back")
    assert [(one.owner, one.key) for one in leases.refusals()] == [(B, 1)]


def test_what_lasts_waits_for_a_device_that_is_lost_until_it_is_given_up() -> None:
    leases = node("emulated:1:16GiB")
    leases.demand(A, shape(1, gpu=1), 1, key=1)
    leases.demand(B, shape(gpu=1), 1, key=1, lasting=True)
    leases.withdraw(FIRST, "lost at 12:03:11", AFTER_RESET)
    assert [one.owner for one in leases.refusals()] == [A], "a task can be submitted again"
    (refused,) = leases.demand(A, shape(gpu=1), 1, key=2, lasting=True)
    assert FIRST in refused.reason and "comes back when it was reset" in refused.reason
    assert leases.demand(A, shape(gpu=1), 1, key=2, lasting=True, patient=True) == []
    assert len(leases.demand(A, shape(gpu=2), 1, key=3, lasting=True, patient=True)) == 1, "there never were so many"
    leases.withdraw(FIRST, "lost at 12:03:12", AFTER_RESET)
    assert leases.refusals() == leases.schedule() == []
    leases.restore(FIRST)
    (grant,) = leases.schedule()
    assert grant.owner == B
    leases.withdraw(FIRST, "its store process ended", AFTER_RESET)
    leases.withdraw(FIRST, "its store process ended")
    (refusal,) = leases.refusals()
    assert (refusal.owner, refusal.key) == (A, 2)
    assert "its store process ended" in refusal.reason and "given up" in refusal.reason


def test_leases_of_the_life_before_stay_accounted() -> None:
    leases = node("emulated:1:16GiB")
    leases.demand(A, shape(1, gpu=1), 1, key=1)
    (grant,) = leases.schedule()
    leases.withdraw(FIRST)
    leases.restore(FIRST)
    leases.demand(B, shape(1, gpu=1), 1, key=1)
    assert leases.schedule() == [], "its worker still runs"
    leases.release(grant.lease_id)
    assert len(leases.schedule()) == 1


def test_memory_that_only_the_lost_device_had() -> None:
    small, large = Device("D-small", 0, "d", 4 << 30, "emulated"), Device("D-large", 1, "d", 16 << 30, "emulated")
    leases = LeaseManager(shape(4), [small, large])
    leases.demand(A, shape(gpu=1, gpu_memory="8GiB"), 2, key=1)
    (grant,) = leases.schedule()
    assert leases.withdraw("D-large", "lost") == [grant.lease_id]
    (refusal,) = leases.refusals()
    assert "gpu_memory (asked 8 GiB on 1 devices, they have 4 GiB)" in refusal.reason
    assert "D-large (lost)" in refusal.reason


def test_a_hold_moves_on_when_its_device_goes() -> None:
    leases = node("emulated:3:16GiB", cpu=100)
    leases.demand(A, shape(gpu=1), 1000, key=1)
    running = [grant.lease_id for grant in leases.schedule()]
    leases.demand(B, shape(gpu=2), 1, key=1)
    for _ in range(PATIENCE + 1):
        leases.release(running.pop(0))
        running += [grant.lease_id for grant in leases.schedule(0.0) if grant.owner == A]
    assert leases.next_deadline() == HOLD_LIMIT_S, "the pair is starving and has the hold"
    for lease_id in leases.withdraw(FIRST):
        leases.release(lease_id)
        running.remove(lease_id)
    for lease_id in running:
        leases.release(lease_id)
    grants = leases.schedule(1.0)
    assert [(grant.owner, len(grant.device_uuids)) for grant in grants] == [(B, 2)]
    assert FIRST not in grants[0].device_uuids


def test_an_unknown_device() -> None:
    leases = node()
    for call in (leases.withdraw, leases.restore, leases.reserved_bytes):
        with pytest.raises(KeyError):
            call("GPU-unknown")


# ---- device memory --------------------------------------------------------------------------------------------------


def test_memory_larger_than_any_device_is_refused_at_once() -> None:
    (refusal,) = node().demand(A, shape(1, gpu_memory="17GiB"), 1, key=1)
    assert "gpu_memory (asked 17 GiB on 1 devices, they have 16 GiB, 16 GiB)" in refusal.reason


def test_reserved_memory_is_told_for_each_device_and_ends_with_its_lease() -> None:
    leases = node()
    leases.demand(A, shape(gpu_memory="6GiB"), 1, key=1)
    leases.demand(A, shape(gpu=2, gpu_memory="1000"), 1, key=2)
    one, pair = leases.schedule()
    (uuid,) = one.device_uuids
    other = SECOND if uuid == FIRST else FIRST
    assert leases.reserved_bytes(uuid) == (6 << 30) + 1000
    assert leases.reserved_bytes(other) == 1000
    leases.block(pair.lease_id)
    assert leases.reserved_bytes(other) == 1000, "only CPUs are given back"
    leases.release(one.lease_id)
    assert leases.reserved_bytes(uuid) == 1000
    leases.release(pair.lease_id)
    assert leases.reserved_bytes(uuid) == leases.reserved_bytes(other) == 0
