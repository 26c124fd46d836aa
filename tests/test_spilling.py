"""Tiers under pressure, in real processes on emulated devices: device to host to disk and back, and what stands in the way."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import afield
from afield.errors import ObjectLostError, ObjectStoreFullError, OutOfDeviceMemoryError
from afield.runtime.face import api
from tests.device_helpers import (
    MIB,
    PATIENCE_S,
    assert_settled,
    movement,
    on_device,
    raised_by,
    runtime_with,
    sealed,
    spill_files,
    store_pids,
    tiers,
    uuids,
)
from tests.helpers import HANG_S, poll, remote_with, without_waiting

#: Requests for room that cannot be had end after this.
WAIT_S = 0.5
DEVICE = HOST = 32 * MIB


@pytest.fixture(scope="module")
def _devices() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AFIELD_STORE_WAIT_S", str(WAIT_S))
        with runtime_with("emulated:1:32MiB", host_memory="32MiB"):
            yield


@pytest.fixture(autouse=True)
def _settled(_devices: None) -> Iterator[None]:
    yield
    assert_settled()
    assert poll(lambda: not spill_files("*"), PATIENCE_S), spill_files("*")


def get(refs: Any, **options: Any) -> Any:
    """`afield.get` that does not wait for ever."""
    return afield.get(refs, timeout=PATIENCE_S, **options)


@on_device
def make(index: int, size: int = 2 * MIB) -> Any:
    array = afield.array_module().empty(size, "u1")
    array[:] = index
    return array


@on_device
def is_full_of(index: int, array: Any) -> bool:
    return int(array.min()) == index == int(array.max())


def tier_of(ref: afield.ObjectRef) -> str:
    """Return where an object lies."""
    (tier,) = [entry.tier for entry in afield.memory() if entry.object_id == ref.hex()]
    return tier


def host_values(count: int, size: int = 4 * MIB) -> list[Any]:
    """Put arrays of which number i is full of i."""
    return [afield.put(np.full(size, index, np.uint8)) for index in range(count)]


# -- down and up again --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_working_set_of_four_devices_and_a_half() -> None:
    count = 72
    with movement() as moved:
        refs = [make.remote(index) for index in range(count)]
        for _ in range(2):
            assert all(get([is_full_of.remote(index, ref) for index, ref in enumerate(refs)]))
    assert min(moved[way] for way in ("device_to_host", "disk_write", "disk_read", "host_to_device")) >= count * MIB
    assert sealed(uuids()[0]) <= DEVICE and sealed("host") <= HOST
    assert any("disk" in entry.tier for entry in afield.memory())
    value = get(refs[0])
    assert int(value.min()) == int(value.max()) == 0


def test_host_values_spill_and_come_back() -> None:
    with movement() as moved:
        refs = host_values(20)
        for index, ref in enumerate(refs):
            value = get(ref)
            assert value[0] == index == value[-1] and not value.flags.writeable
            del value
    assert moved["disk_write"] >= 12 * 4 * MIB and moved["disk_read"] >= 12 * 4 * MIB
    assert "disk" in tier_of(refs[0])


def test_what_is_on_disk_leaves_again_without_being_written() -> None:
    refs = host_values(10)
    for ref in refs:
        get(ref)
    with movement() as moved:
        for _ in range(2):
            for index, ref in enumerate(refs):
                assert get(ref)[7] == index
    assert moved["disk_read"] > 0
    assert moved["disk_write"] <= 2 * 4 * MIB  # what had never left


def test_memory_of_empty_spills_too() -> None:
    @afield.remote
    def born(index: int) -> Any:
        array = afield.empty(4 * MIB, "u1")
        array[:] = index
        return array

    with movement() as moved:
        refs = [born.remote(index) for index in range(12)]
        assert [int(get(ref)[-1]) for ref in refs] == list(range(12))
    assert moved["bytes_born"] == 12 * 4 * MIB and moved["disk_write"] >= 4 * 4 * MIB


def test_large_arguments_and_frames_spill() -> None:
    @afield.remote
    def total(arrays: list[Any]) -> int:
        return sum(int(array[0]) for array in arrays)

    refs = [total.remote([np.full(2 * MIB, index, np.uint8) for index in range(4)]) for _ in range(10)]
    assert get(refs) == [6] * 10


def test_what_is_read_does_not_move() -> None:
    refs = [make.remote(index) for index in range(3)]
    views = [get(ref, device=0) for ref in refs]
    host = afield.put(np.full(2 * MIB, 9, np.uint8))
    host_view = get(host)
    others = [make.remote(index) for index in range(40)]
    assert all(get([is_full_of.remote(index, ref) for index, ref in enumerate(others)]))
    for index, (ref, view) in enumerate(zip(refs, views, strict=True)):
        assert "device 0" in tier_of(ref)
        assert int(view.min()) == index == int(view.max())
    assert "host" in tier_of(host) and host_view.min() == 9 == host_view.max()


def test_copies_that_can_be_had_elsewhere_go_first() -> None:
    refs = [make.remote(index) for index in range(8)]
    assert [int(get(ref)[0]) for ref in refs] == list(range(8))
    assert sealed("host") == 16 * MIB
    with movement() as moved:
        kept = host_values(5)
    assert moved["disk_write"] == moved["host_to_device"] == 0
    assert all("device 0" in tier_of(ref) for ref in refs)
    assert [int(get(ref)[0]) for ref in kept] == list(range(5))


def test_room_for_a_large_allocation_is_made_at_once() -> None:
    @on_device
    def large() -> int:
        return int(afield.array_module().ones(28 * MIB, "u1").sum())

    refs = [make.remote(index) for index in range(15)]
    afield.wait(refs, num_returns=15, timeout=PATIENCE_S)
    assert get(large.remote()) == 28 * MIB
    assert all(get([is_full_of.remote(index, ref) for index, ref in enumerate(refs)]))


def test_what_a_task_reserves_is_kept_free() -> None:
    @remote_with(num_gpus=1, gpu_memory="24MiB")
    def reserve() -> tuple[int, int]:
        poll(lambda: sealed(uuids()[0]) <= 8 * MIB, PATIENCE_S)
        return sealed(uuids()[0]), int(afield.array_module().ones(20 * MIB, "u1").sum())

    refs = [make.remote(index) for index in range(12)]
    afield.wait(refs, num_returns=12, timeout=PATIENCE_S)
    stored, total = get(reserve.remote())
    assert stored <= 8 * MIB and total == 20 * MIB


def test_producers_wait_for_consumers() -> None:
    """Eight producers fill the device with what only consumers let go of: results that are pinned by nobody may leave."""

    @remote_with(num_gpus=0.25, num_cpus=0.25)
    def produce(index: int) -> Any:
        array = afield.array_module().empty(3 * MIB, "u1")
        array[:] = index
        return array

    @remote_with(num_gpus=0.25, num_cpus=0.25)
    def consume(index: int, array: Any) -> bool:
        return int(array[0]) == index == int(array[-1])

    refs = [consume.remote(index, produce.remote(index)) for index in range(60)]
    assert all(get(refs))


# -- no room ------------------------------------------------------------------------------------------------------


def test_a_host_store_full_of_what_is_in_use() -> None:
    refs = host_values(7)
    views = [get(ref) for ref in refs]
    begun = time.monotonic()
    text = raised_by(lambda: afield.put(np.zeros(8 * MIB, np.uint8)), ObjectStoreFullError)
    assert WAIT_S <= time.monotonic() - begun < WAIT_S + HANG_S
    assert "8388800 bytes" in text and "Capacity 32 MiB" in text and "largest free piece" in text
    assert "Top holders: " in text and "in 7 parts" in text
    del views
    assert get(afield.put(np.ones(8 * MIB, np.uint8)))[0] == 1


def test_what_never_fits_is_refused_at_once() -> None:
    @on_device
    def both() -> Any:
        cp = afield.array_module()
        return [cp.ones(10 * MIB, "u1"), np.ones(9 * MIB, np.uint8)]

    text = without_waiting(
        WAIT_S, lambda: raised_by(lambda: afield.put(np.zeros(33 * MIB, np.uint8)), ObjectStoreFullError)
    )
    assert "can never fit" in text and "host_memory=" in text
    ref = both.remote()
    assert sum(int(array.sum()) for array in get(ref)) == 19 * MIB


def test_more_arguments_than_the_device_holds() -> None:
    @on_device
    def count(*arrays: Any) -> int:
        return len(arrays)

    refs = [make.remote(index) for index in range(20)]
    text = raised_by(lambda: get(count.remote(*refs)), OutOfDeviceMemoryError)
    assert "Capacity 32 MiB" in text and "the disk holds" in text
    assert get(count.remote(*refs[:10])) == 10


def test_a_task_that_reads_more_than_there_is_lets_go_of_it_when_it_fails() -> None:
    @on_device
    def read(refs: list[Any]) -> int:
        arrays = []
        for ref in refs:
            arrays.append(afield.get(ref))
        return len(arrays)

    refs = [make.remote(index) for index in range(20)]
    raised_by(lambda: get(read.remote(refs)), OutOfDeviceMemoryError)
    assert get(read.remote(refs[:10])) == 10
    assert all(get([is_full_of.remote(index, ref) for index, ref in enumerate(refs)]))


# -- the disk -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk_stops_producers_and_loses_nothing() -> None:
    refs = host_values(14)
    assert poll(spill_files, PATIENCE_S)
    (store,) = [row["pid"] for row in api.query("stores") if not row["device"]]
    limits = resource.prlimit(store, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))  # as a quota does
    try:
        text = raised_by(lambda: host_values(14), ObjectStoreFullError)
    finally:
        resource.prlimit(store, resource.RLIMIT_FSIZE, limits)
    assert "disk_full" in text and "File too large" in text and "spill_dir" in text

    def room_again() -> bool:
        try:
            return bool(host_values(4))
        except ObjectStoreFullError:
            return False

    assert poll(room_again, PATIENCE_S), "the disk is tried again when there is room"
    assert [int(get(ref)[0]) for ref in refs] == list(range(14))


def damage_spill_files() -> int:
    """Write into every spill file; return how many there are."""
    for path in spill_files():
        with path.open("r+b") as file:
            file.seek(1000)
            file.write(b"garbage!")
    return len(spill_files())


def test_damaged_spill_files_are_found_and_results_made_again() -> None:
    refs = [make.remote(index) for index in range(40)]
    afield.wait(refs, num_returns=40, timeout=PATIENCE_S)
    assert poll(damage_spill_files, PATIENCE_S)
    before = afield.stats()["tasks_recomputed"]
    for index, ref in enumerate(refs):
        value = get(ref)
        assert value.min() == index == value.max()
        del value
    assert afield.stats()["tasks_recomputed"] > before


@pytest.mark.parametrize("damage", ["corrupt", "unreadable"])
def test_put_values_whose_spill_file_is_of_no_use(damage: str) -> None:
    refs = host_values(14)

    def spilled() -> int:
        return int(tiers()["disk"]["sealed"])

    assert poll(spilled, PATIENCE_S)
    written = poll(spill_files, PATIENCE_S)
    if damage == "corrupt":
        damage_spill_files()
    else:
        for path in written:
            path.unlink()
    whole = 0
    texts = []
    for index, ref in enumerate(refs):
        try:
            value = get(ref)
        except ObjectLostError as error:
            texts.append(str(error))
        else:
            assert value.min() == index == value.max()
            whole += 1
            del value
    assert texts and whole
    assert all(damage in text and "put()" in text and "spill" in text for text in texts)


def test_another_copy_is_used_where_there_is_one() -> None:
    refs = host_values(14)
    read = [get(ref) for ref in refs[:3]]  # in memory and perhaps on disk
    damage_spill_files()
    assert [int(get(ref)[0]) for ref in refs[:3]] == [0, 1, 2]
    del read


def test_the_disk_outlives_its_store_process() -> None:
    refs = host_values(14)
    assert poll(spill_files, PATIENCE_S)
    for pid in store_pids():
        os.kill(pid, 9)

    def first_of(ref: afield.ObjectRef) -> int | None:
        try:
            return int(get(ref)[0])
        except ObjectStoreFullError:  # a write was cut off: for a second nothing is written
            return None

    assert [poll(lambda ref=ref: first_of(ref), PATIENCE_S) for ref in refs[1:]] == list(range(1, 14))  # type: ignore[misc]
