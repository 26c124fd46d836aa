"""Resource amounts are exact, and the device inventory is read without guessing."""

from __future__ import annotations

import copy
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afield.errors import InvalidOptionError, NoDeviceError
from afield.scheduler.devices import DEFAULT_EMULATED_BYTES, MAX_EMULATED_DEVICES, Device, parse_devices
from afield.scheduler.resources import UNIT, ResourceSet

AMOUNTS = st.integers(0, 10**9)
SETS = st.dictionaries(st.sampled_from(["CPU", "GPU", "memory", "disk", "label"]), AMOUNTS).map(ResourceSet)


def test_options_become_amounts() -> None:
    shape = ResourceSet.from_options(num_cpus=2, num_gpus=0.5, memory="1GiB", resources={"disk": 3}, gpu_memory=2**20)
    assert shape.as_floats() == {"CPU": 2.0, "GPU": 0.5, "memory": 2.0**30, "disk": 3.0, "gpu_memory": 2.0**20}
    assert str(shape) == "CPU 2, GPU 0.5, memory 1 GiB, gpu_memory 1 MiB, disk 3"
    assert len(shape) == 5
    assert set(shape) == {"CPU", "GPU", "memory", "gpu_memory", "disk"}
    assert shape["nothing"] == 0


def test_zero_and_none_are_the_same_as_nothing() -> None:
    empty = ResourceSet.from_options()
    assert empty == ResourceSet.from_options(num_cpus=0, num_gpus=0.0, memory=0, resources={"x": 0})
    assert (len(empty), str(empty), empty.as_floats()) == (0, "nothing", {})
    assert hash(empty) == hash(ResourceSet({}))
    assert empty != 0


def test_ten_tenths_are_one() -> None:
    tenth = ResourceSet.from_options(num_cpus=0.1)
    one, some = ResourceSet.from_options(num_cpus=1), ResourceSet({})
    for _ in range(10):
        assert some.fits(one) and some != one
        some = some.add(tenth)
    assert some == one
    assert not some.add(tenth).fits(one)


@pytest.mark.parametrize(
    "value", [0.1 + 0.2, 3 * 0.1, np.float64(0.25), np.int64(3), Fraction(1, 4), 1e6 + 0.1, 12345.6789]
)
def test_numbers_of_all_kinds(value: float) -> None:
    assert ResourceSet.from_options(num_cpus=value)["CPU"] == round(float(value) * UNIT)


@pytest.mark.parametrize("value", [0.00001, 0.12345, 1 / 3, 1.000001, 5e-324])
def test_more_than_four_decimals_are_refused_by_name(value: float) -> None:
    with pytest.raises(ValueError, match=r"num_cpus=.*4 decimals"):
        ResourceSet.from_options(num_cpus=value)
    with pytest.raises(ValueError, match=r"resources\['disk'\]=.*4 decimals"):
        ResourceSet.from_options(resources={"disk": value})


@pytest.mark.parametrize("value", ["1", True, None, float("nan"), float("inf"), -1, -0.5, 1j, [1]])
def test_what_is_no_amount_is_refused_by_name(value: object) -> None:
    with pytest.raises(InvalidOptionError, match=r"resources\['disk'\]="):
        ResourceSet.from_options(resources={"disk": value})  # type: ignore[dict-item]


def test_whole_devices_above_one() -> None:
    assert ResourceSet.from_options(num_gpus=3.0)["GPU"] == 3 * UNIT
    with pytest.raises(ValueError, match=r"num_gpus=1.5.*whole"):
        ResourceSet.from_options(num_gpus=1.5)


@pytest.mark.parametrize("memory", ["6G", -1, 1.5, True])
def test_bad_memory_names_the_option(memory: object) -> None:
    with pytest.raises(InvalidOptionError, match=r"^memory=.*6GiB"):
        ResourceSet.from_options(memory=memory)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("CPU", "num_cpus="), ("GPU", "num_gpus="), ("memory", "memory="), ("gpu_memory", "gpu_memory=")],
)
def test_built_in_names_have_their_own_option(name: str, remedy: str) -> None:
    with pytest.raises(InvalidOptionError, match=remedy):
        ResourceSet.from_options(resources={name: 1})


@pytest.mark.parametrize("resources", [{"": 1}, {1: 1}, [("disk", 1)], "disk"])
def test_malformed_custom_resources(resources: object) -> None:
    with pytest.raises(InvalidOptionError, match="resources="):
        ResourceSet.from_options(resources=resources)  # type: ignore[arg-type]


def test_a_negative_amount_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the amount of CPU is negative: -0\.5"):
        ResourceSet({"CPU": -5000})


@given(SETS, SETS)
def test_arithmetic(one: ResourceSet, other: ResourceSet) -> None:
    both = one.add(other)
    assert both == other.add(one)
    assert one.fits(both)
    assert one.fits(other) == all(one[name] <= other[name] for name in one)


@given(SETS, SETS)
def test_equal_sets_are_one_key(one: ResourceSet, other: ResourceSet) -> None:
    backwards = ResourceSet(dict(reversed(list(one.items()))))
    assert backwards == one
    assert hash(backwards) == hash(one)
    assert backwards.key() == one.key()
    assert (one == other) == (one.key() == other.key())
    for twin in (pickle.loads(pickle.dumps(one)), copy.copy(one), ResourceSet(one.units())):
        assert twin == one


@given(st.integers(0, 10**8))
def test_every_step_of_a_ten_thousandth_is_exact(units: int) -> None:
    assert ResourceSet.from_options(num_cpus=units / UNIT)["CPU"] == units


@pytest.mark.parametrize("spec", [None, "", "none", " none ", 0])
def test_no_devices(spec: str | int | None) -> None:
    assert parse_devices(spec) == []


def test_emulated_devices_are_named_alike_every_time() -> None:
    devices = parse_devices("emulated:3:16GiB")
    assert devices == parse_devices(" emulated:3:16GiB ")
    assert [device.index for device in devices] == [0, 1, 2]
    assert len({device.uuid for device in devices}) == 3
    assert devices[1] == Device("EMU-0001-0000-0000-0000", 1, "emulated device 1", 16 * 2**30, "emulated")
    assert parse_devices("emulated:1")[0].memory_bytes == DEFAULT_EMULATED_BYTES


def test_cuda_where_nothing_can_look_for_it_is_an_error_that_names_the_remedy() -> None:
    for spec in ("cuda", "cuda:2"):
        with pytest.raises(NoDeviceError, match=r'devices="emulated:2" or AFIELD_DEVICES=emulated:2'):
            parse_devices(spec)


@pytest.mark.parametrize(
    "spec",
    [
        *("emulated", "emulated:", "emulated:0", "emulated:-1", "emulated:x", "emulated:2:", "emulated:2:1GiB:3"),
        *("emulated:2:0", "emulated:2:huge", f"emulated:{MAX_EMULATED_DEVICES + 1}", "2", "gpu", "EMULATED:2"),
        *(2, True, 1.5, []),
    ],
)
def test_bad_specs_come_with_examples(spec: object) -> None:
    with pytest.raises(InvalidOptionError, match=r'"emulated:2:16GiB"'):
        parse_devices(spec)  # type: ignore[arg-type]
