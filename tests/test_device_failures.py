"""Bad luck and wrong use of device memory, in real processes on emulated devices: nothing hangs, and nothing stays."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import afield
from afield.errors import (
    AfieldError,
    DeviceLostError,
    GetTimeoutError,
    OutOfDeviceMemoryError,
    TaskCancelledError,
    TaskUnschedulableError,
    WorkerCrashedError,
)
from afield.gpu_store.backends import faults
from afield.gpu_store.backends.base import SlabImportError
from tests.device_helpers import (
    MIB,
    PATIENCE_S,
    assert_settled,
    held,
    machine,
    on_device,
    raised_by,
    runtime_with,
    sealed,
    store_pids,
    tiers,
    uuids,
    wait_for_devices,
)
from tests.helpers import HANG_S, assert_gone, poll, program, remote_with, without_waiting

#: Requests for room that cannot be had end after this.
WAIT_S = 0.5


@pytest.fixture(scope="module")
def _module() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AFIELD_STORE_WAIT_S", str(WAIT_S))
        with runtime_with("emulated:2:32MiB"):
            yield


@pytest.fixture
def devices(_module: None) -> Iterator[list[str]]:
    """Two devices, which are whole again afterwards."""
    yield uuids()
    with machine() as emulated:
        for uuid in uuids():
            emulated.board.disarm(emulated.board.index(uuid))
            if emulated.board.lost(emulated.board.index(uuid)):
                emulated.reset(uuid)
    wait_for_devices(2)
    assert_settled()


def get(refs: Any, **options: Any) -> Any:
    """`afield.get` that does not wait for ever."""
    return afield.get(refs, **{"timeout": PATIENCE_S} | options)


@on_device
def ones(count: int) -> Any:
    return afield.array_module().ones(count, "u1")


@on_device
def total(array: Any) -> int:
    return int(array.sum())


@on_device
def sum_of_ones(count: int) -> int:
    return int(afield.array_module().ones(count, "u1").sum(dtype="i8"))


both = remote_with(num_gpus=2, max_retries=0)


@both
def use_both() -> list[int]:
    cp = afield.array_module()
    sums = []
    for number in range(2):
        with cp.cuda.Device(number):
            sums.append(int(cp.ones(10).sum()))
    return sums


# -- no room ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_device_full_of_what_is_in_use(devices: list[str]) -> None:
    """Nothing may leave: whoever wants room is told why, by the deadline."""
    refs = [afield.put(afield.array_module().ones(4 * MIB, "u1")) for _ in range(7)]
    views = [get(ref, device=0) for ref in refs]
    with machine() as emulated:
        emulated.inject(faults.lost(devices[1]))  # the task has no choice
        wait_for_devices(1)
    begun = time.monotonic()
    text = raised_by(lambda: get(sum_of_ones.remote(8 * MIB)), OutOfDeviceMemoryError)
    assert WAIT_S <= time.monotonic() - begun < WAIT_S + HANG_S
    assert "8388608 bytes" in text and "Capacity 32 MiB" in text and "largest free piece" in text
    assert "Top holders: " in text and "7 parts" in text and devices[0] in text
    del views
    assert get(sum_of_ones.remote(8 * MIB)) == 8 * MIB


def test_an_array_that_is_larger_than_the_device(devices: list[str]) -> None:
    text = without_waiting(WAIT_S, lambda: raised_by(lambda: get(sum_of_ones.remote(33 * MIB)), OutOfDeviceMemoryError))
    assert "can never fit" in text and "Capacity 32 MiB" in text
    assert get(sum_of_ones.remote(31 * MIB)) == 31 * MIB


def test_a_task_that_uses_up_its_device_is_told_at_once_and_can_go_on(devices: list[str]) -> None:
    @on_device
    def greedy() -> tuple[int, str, int]:
        cp = afield.array_module()
        kept = []

        def one_more() -> str:
            """Nobody but the task itself can make room, so there is nothing to wait for."""
            return raised_by(lambda: kept.append(cp.ones(2 * MIB, "u1")), OutOfDeviceMemoryError)

        for _ in range(16):
            kept.append(cp.ones(2 * MIB, "u1"))
        text = without_waiting(WAIT_S, one_more)
        count = len(kept)
        kept.clear()
        return count, text, int(cp.ones(30 * MIB, "u1").sum())

    count, text, total_after = get(greedy.remote())
    assert count == 16 and total_after == 30 * MIB
    assert "Top holders: " in text and "32 MiB" in text


def test_arrays_in_reference_cycles_are_found_before_there_is_no_room(devices: list[str]) -> None:
    @on_device
    def cycles() -> int:
        import gc

        gc.disable()
        try:
            for _ in range(20):
                cycle: list[Any] = [afield.array_module().ones(8 * MIB, "u1")]
                cycle.append(cycle)
            return int(cycle[0].sum())
        finally:
            gc.enable()

    assert get(cycles.remote()) == 8 * MIB


def test_no_room_for_the_copy_of_a_result(devices: list[str]) -> None:
    class Holder:
        def __init__(self) -> None:
            self.state = afield.array_module().ones(20 * MIB, "u1")

        def all_of_it(self) -> Any:
            return self.state

        def some(self) -> Any:
            return self.state[: 4 * MIB] + 1

    holder = remote_with(num_gpus=1)(Holder).remote()
    assert "20 MiB" in raised_by(lambda: get(holder.all_of_it.remote()), OutOfDeviceMemoryError)
    assert int(get(holder.some.remote())[0]) == 2, "the actor lives, and what it has is whole"


def test_an_allocation_that_fails(devices: list[str]) -> None:
    get(use_both.remote())
    with machine() as emulated:
        for uuid in devices:
            emulated.inject(faults.out_of_memory(uuid))
    assert "asked for" in raised_by(lambda: get(use_both.remote()), OutOfDeviceMemoryError)
    raised_by(lambda: get(use_both.remote()), OutOfDeviceMemoryError)  # the second device's
    assert get(use_both.remote()) == [10, 10]


# -- processes that die -------------------------------------------------------------------------------------------


def test_a_worker_that_dies_with_views_pinned(devices: list[str]) -> None:
    refs = [ones.remote(4 * MIB) for _ in range(7)]

    @remote_with(num_gpus=1, max_retries=0)
    def die(refs: list[Any]) -> None:
        views = [afield.get(ref) for ref in refs]
        assert len(views) == 7
        os.kill(os.getpid(), signal.SIGKILL)

    assert "SIGKILL" in raised_by(lambda: get(die.remote(refs)), WorkerCrashedError)
    assert get([sum_of_ones.remote(30 * MIB) for _ in range(2)]) == [30 * MIB] * 2
    assert get([total.remote(ref) for ref in refs]) == [4 * MIB] * 7


def test_a_worker_that_dies_in_the_middle_of_an_allocation(devices: list[str]) -> None:
    @both
    def die(seconds: float) -> None:
        threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        cp = afield.array_module()
        kept: list[Any] = []
        for number in range(10**9):
            kept.append(cp.empty(1 + number % (4 * MIB), "u1"))
            if len(kept) > 8:
                del kept[::2]
            if number % 50 == 0:
                afield.put(kept[-1])

    for seconds in (0.02, 0.05, 0.08):
        raised_by(lambda seconds=seconds: get(die.remote(seconds)), WorkerCrashedError)  # type: ignore[misc]
    assert get([sum_of_ones.remote(30 * MIB) for _ in range(2)]) == [30 * MIB] * 2


def test_processes_that_free_at_once(devices: list[str]) -> None:
    """Owners in several processes drop what they own, share and have on the way, at the same moment."""

    class Owner:
        def make(self, count: int) -> list[Any]:
            cp = afield.array_module()
            self.refs = [afield.put(cp.ones(1000 + number, "u1")) for number in range(count)]
            return self.refs

        def take(self, refs: list[Any]) -> int:
            self.views = [afield.get(ref) for ref in refs]
            self.others = refs
            return len(self.views)

        def drop(self) -> None:
            self.refs = self.others = self.views = []

    owners = [remote_with(num_gpus=0.5, num_cpus=0)(Owner).remote() for _ in range(4)]
    for _ in range(5):
        made = get([owner.make.remote(40) for owner in owners])
        assert get([owners[number].take.remote(made[number - 1]) for number in range(4)]) == [40] * 4
        dropping = [owner.drop.remote() for owner in owners]
        del made
        get(dropping)
    assert poll(lambda: not any(sealed(uuid) for uuid in devices), PATIENCE_S), tiers()


# -- devices that are lost ----------------------------------------------------------------------------------------


def lose(uuid: str, fault: faults.Fault | None = None) -> None:
    """Lose a device; returns when the scheduler knows."""
    with machine() as emulated:
        emulated.inject(fault or faults.lost(uuid))
    wait_for_devices(1)


def device_of(ref: Any) -> str:
    """Return the UUID of the device that has an object."""
    (tier,) = [entry.tier for entry in afield.memory() if entry.object_id == ref.hex()]
    return uuids()[int(tier.removeprefix("device ").partition("+")[0])]


def test_values_on_a_lost_device_are_made_again_on_another(devices: list[str]) -> None:
    ref = ones.remote(MIB)
    afield.wait([ref], timeout=PATIENCE_S)
    before = afield.stats()["tasks_recomputed"]
    lose(device_of(ref))
    assert get(total.remote(ref)) == MIB and int(get(ref).sum()) == MIB
    assert afield.stats()["tasks_recomputed"] == before + 1


def test_a_put_value_on_a_lost_device_is_lost(devices: list[str]) -> None:
    put = afield.put(afield.array_module().ones(1000))
    lose(devices[0])
    assert "put()" in raised_by(lambda: get(put), DeviceLostError)


def test_a_copy_in_host_memory_outlives_the_device(devices: list[str]) -> None:
    put = afield.put(afield.array_module().arange(1000))
    view = get(put)
    lose(devices[0])
    before = afield.stats()["tasks_recomputed"]
    assert int(view[999]) == 999 and int(get(put)[998]) == 998
    assert get(total.remote(put)) == 499500
    assert afield.stats()["tasks_recomputed"] == before


def test_a_task_whose_device_is_lost_runs_again_elsewhere(devices: list[str], tmp_path: Any) -> None:
    path = str(tmp_path / "started")

    def spin(path: str) -> str:
        cp = afield.array_module()
        array = cp.ones(MIB, "u1")
        with open(path, "a") as file:
            file.write(os.environ["AFIELD_VISIBLE_DEVICES"] + "\n")
        if len(Path(path).read_text().split()) > 1:
            return os.environ["AFIELD_VISIBLE_DEVICES"]
        while True:
            array += 1

    for retries in (3, 0):
        ref = remote_with(num_gpus=1, max_retries=retries)(spin).remote(path)
        uuid = poll(lambda: Path(path).exists() and Path(path).read_text().strip(), PATIENCE_S)
        lose(uuid)
        if retries:
            assert get(ref) in set(devices) - {uuid}
        else:
            text = raised_by(lambda ref=ref: get(ref), WorkerCrashedError)  # type: ignore[misc]
            assert uuid in text and "device" in text
        os.unlink(path)
        with machine() as emulated:
            emulated.reset(uuid)
        wait_for_devices(2)


def test_an_actor_on_a_lost_device_starts_again_on_another(devices: list[str]) -> None:
    class Holder:
        def __init__(self) -> None:
            self.array = afield.array_module().ones(100)

        def where(self) -> tuple[float, str]:
            return float(self.array.sum()), os.environ["AFIELD_VISIBLE_DEVICES"]

    holder = remote_with(num_gpus=1, max_restarts=1, max_task_retries=1)(Holder).remote()
    amount, uuid = get(holder.where.remote())
    lose(uuid)
    assert get(holder.where.remote()) == (amount, next(iter(set(devices) - {uuid})))


def test_without_any_device_tasks_fail_at_once_and_say_why(devices: list[str]) -> None:
    ref = ones.remote(MIB)
    afield.wait([ref], timeout=PATIENCE_S)
    with machine() as emulated:
        for uuid in devices:
            emulated.inject(faults.lost(uuid))
        wait_for_devices(0)
        text = raised_by(lambda: get(sum_of_ones.remote(10), timeout=5), TaskUnschedulableError)
        assert devices[0] in text and "lost at" in text and "reset" in text
        raised_by(lambda: get(ref, timeout=5), AfieldError)
        for uuid in devices:
            emulated.reset(uuid)
    wait_for_devices(2)
    assert get(use_both.remote()) == [10, 10]
    assert get(total.remote(ones.remote(10))) == 10


def test_a_reset_is_survived(devices: list[str]) -> None:
    ref = ones.remote(MIB)
    afield.wait([ref], timeout=PATIENCE_S)
    with machine() as emulated:
        emulated.reset(device_of(ref))
    assert int(get(ref).sum()) == MIB and get(total.remote(ref)) == MIB


def test_xids_that_are_the_applications_own_and_others(devices: list[str]) -> None:
    ref = ones.remote(MIB)
    afield.wait([ref], timeout=PATIENCE_S)
    uuid = device_of(ref)
    before = afield.stats()["tasks_recomputed"]
    with machine() as emulated:
        emulated.inject(faults.xid(uuid, 13))
    assert get(total.remote(ref)) == MIB and afield.stats()["tasks_recomputed"] == before
    lose(uuid, faults.xid(uuid, 79))
    assert get(total.remote(ref)) == MIB and afield.stats()["tasks_recomputed"] == before + 1


def test_a_store_process_that_is_killed(devices: list[str]) -> None:
    refs = [ones.remote(MIB) for _ in range(4)]
    afield.wait(refs, num_returns=4, timeout=PATIENCE_S)
    cp = afield.array_module()
    put = afield.put(cp.ones(1000))
    olds = [cp.ones(1000)]
    for pid in store_pids():
        os.kill(pid, signal.SIGKILL)
    assert get([total.remote(ref) for ref in refs]) == [MIB] * 4
    text = raised_by(lambda: get(put), DeviceLostError)
    assert "put()" in text and "killed by signal 9" in text

    # What is left of the device's life before is refused; the next is there for whoever asks.
    raised_by(lambda: olds[0] + 1, DeviceLostError)
    raised_by(lambda: cp.ones(10), DeviceLostError)
    raised_by(lambda: afield.put(olds[0]), DeviceLostError)
    new = afield.array_module()
    assert new is not cp
    raised_by(lambda: afield.put(olds[0]), DeviceLostError)
    olds.clear()
    assert int(get(afield.put(new.arange(10)))[9]) == 9
    assert int(get(refs[0], device=0).sum()) == MIB


def test_descriptors_of_before_a_reset(devices: list[str]) -> None:
    cp = afield.array_module()
    ref = ones.remote(MIB)
    view = get(ref, device=0)
    own = cp.ones(MIB, "u1")
    with machine() as emulated:
        emulated.reset(devices[0])
    for use in (lambda: view.sum(), lambda: own.sum(), lambda: own.get(), lambda: cp.ones(1), lambda: afield.put(own)):
        raised_by(use, DeviceLostError)
    assert get(total.remote(ref)) == MIB
    assert int(get(ref, device=0).sum()) == MIB
    assert int(afield.array_module().ones(10).sum()) == 10


def test_a_broken_context_costs_the_process_and_not_the_device(devices: list[str]) -> None:
    @both
    def poison() -> int:
        from afield.gpu_store.backends.emulated import EmulatedBackend

        cp = afield.array_module()
        emulated = EmulatedBackend.attach(os.environ["AFIELD_DEVICE_BACKEND"].partition(":")[2])
        emulated.inject(faults.sticky_error(devices[0], pid=os.getpid()))
        return int(cp.ones(10).sum())

    ref = ones.remote(MIB)
    assert "illegal address (700)" in raised_by(lambda: get(poison.remote()), WorkerCrashedError)
    assert get(use_both.remote()) == [10, 10] and get(total.remote(ref)) == MIB


def test_a_slab_that_cannot_be_mapped(devices: list[str]) -> None:
    @both
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    raised_by(lambda: get(die.remote()), WorkerCrashedError)  # so that the next worker maps anew
    with machine() as emulated:
        emulated.inject(faults.failed_import(devices[0]))
    assert devices[0] in raised_by(lambda: get(use_both.remote()), SlabImportError)
    assert get(use_both.remote()) == [10, 10]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_chaos(devices: list[str], seed: int) -> None:
    """Random work under pressure, while devices are lost and workers die: what resolves is right, and all of it goes."""
    rng = random.Random(seed)
    quarter = remote_with(num_gpus=0.5, num_cpus=0.5, max_retries=-1)

    @quarter
    def make(number: int, size: int) -> Any:
        array = afield.array_module().empty(size, "u4")
        array[:] = number
        return {"array": array, "number": number}

    @quarter
    def add(one: Any, other: Any) -> Any:
        for value in (one, other):
            assert int(value["array"].min()) == value["number"] == int(value["array"].max())
        size = min(len(one["array"]), len(other["array"]))
        return {"array": one["array"][:size] + other["array"][:size], "number": one["number"] + other["number"]}

    @remote_with(num_gpus=0.5, num_cpus=0.5, max_retries=0)
    def die(value: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def check(ref: Any) -> None:
        value = get(ref)
        assert int(value["array"].min()) == value["number"] == int(value["array"].max())

    refs = [make.remote(number, 1 + rng.randrange(MIB // 2)) for number in range(12)]
    with machine() as emulated:
        for step in range(200):
            action = rng.random()
            if action < 0.3:
                refs.append(make.remote(step, 1 + rng.randrange(MIB // 2)))
            elif action < 0.85:
                refs.append(add.remote(rng.choice(refs), rng.choice(refs)))
            elif action < 0.94:
                check(rng.choice(refs))
            elif action < 0.97:
                die.remote(rng.choice(refs))
            elif action > 0.985:
                wait_for_devices(2)  # without any device tasks fail at once
                uuid = rng.choice(devices)
                emulated.inject(faults.lost(uuid))
                emulated.reset(uuid)
            while len(refs) > 50:
                refs.pop(rng.randrange(len(refs)))
    for ref in refs:
        check(ref)


# -- other ends ---------------------------------------------------------------------------------------------------


def test_a_cancelled_task_gives_its_memory_back(devices: list[str], tmp_path: Any) -> None:
    @both
    def hold(path: str) -> None:
        cp = afield.array_module()
        kept = [cp.ones(20 * MIB, "u1")]
        Path(path).touch()
        while kept:
            time.sleep(0.001)

    path = str(tmp_path / "started")
    ref = hold.remote(path)
    assert poll(lambda: os.path.exists(path), PATIENCE_S)
    afield.cancel(ref)
    raised_by(lambda: get(ref), TaskCancelledError)
    assert get([sum_of_ones.remote(30 * MIB) for _ in range(2)]) == [30 * MIB] * 2


def test_reservations_and_devices_that_there_are_not(devices: list[str]) -> None:
    @afield.remote
    def nothing() -> None:
        pass

    text = raised_by(lambda: get(nothing.options(num_gpus=1, gpu_memory="33MiB").remote()), TaskUnschedulableError)
    assert "33 MiB" in text and "32 MiB" in text
    text = raised_by(lambda: get(nothing.options(num_gpus=3).remote()), TaskUnschedulableError)
    assert 'devices="emulated:3"' in text
    assert get(nothing.options(num_gpus=1, gpu_memory="32MiB").remote()) is None


def test_helpers_see_what_is_held(devices: list[str]) -> None:
    """The tests above are worth nothing if what they check is always empty."""
    ref = ones.remote(MIB)
    value = get(ref)
    del ref
    assert any("zero-copy view" in line for line in held()) and np.all(value == 1)


# -- with a runtime of their own, which end that of the others ----------------------------------------------------


@pytest.fixture
def slow_link(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A runtime of its own with one device, whose link carries 10 MB/s when it is slow; yields the device."""
    monkeypatch.setenv("AFIELD_EMULATED_LINK", "1GB/s")
    with runtime_with("emulated:1:32MiB"):
        (uuid,) = uuids()
        yield uuid
        assert_settled()


@pytest.mark.slow
def test_a_slow_link_and_those_who_lose_patience(slow_link: str) -> None:
    ref = ones.remote(8 * MIB)
    afield.wait([ref], timeout=PATIENCE_S)
    with machine() as emulated:
        emulated.inject(faults.slow_link(slow_link, 100))
        assert "could not be brought" in raised_by(lambda: get(ref, timeout=0.05), GetTimeoutError)
        timer = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            get(ref)
        timer.join()
        emulated.inject(faults.slow_link(slow_link, 1.0))
    assert int(get(ref).sum()) == 8 * MIB and get(total.remote(ref)) == 8 * MIB


def test_devices_are_asked_for_where_there_are_none() -> None:
    afield.shutdown()
    afield.init(num_cpus=1)
    try:
        text = raised_by(lambda: get(sum_of_ones.remote(1), timeout=5), TaskUnschedulableError)
        assert 'devices="emulated:' in text and "AFIELD_DEVICES" in text
        assert 'devices="emulated:2"' in raised_by(afield.array_module, AfieldError)
    finally:
        afield.shutdown()


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_nothing() -> None:
    afield.shutdown()
    source = """
        afield.init(num_cpus=2, devices="emulated:2:32MiB", host_memory="32MiB")
        cp = afield.array_module()

        @afield.remote(num_gpus=1)
        def make(number):
            return afield.array_module().full(2 << 20, number, "u1")

        refs = [make.remote(number) for number in range(60)]
        views = [afield.get(ref) for ref in refs[:3]] + [afield.get(refs[0], device=1)]
        kept = afield.put(cp.ones(1000))
        afield.wait(refs, num_returns=60)
        report_traces()
        report(spilled=len(os.listdir(os.path.join(describe_traces()["directory"], "spill"))))
        time.sleep(60)
    """
    with program(source) as driver:
        session = driver.read_traces()
        assert driver.read()["spilled"] > 0
        os.kill(driver.pid, signal.SIGKILL)
        driver.process.wait()
        assert_gone(session)
    assert not [path for path in os.listdir("/dev/shm") if "afield" in path]
