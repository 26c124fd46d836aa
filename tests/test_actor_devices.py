"""Actors whose only device is lost: they start again after its reset, or hear that it was given up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

import afield
from afield.gpu_store.backends import faults
from afield.runtime.node.stores import MAX_FAILED_STARTS
from afield.testing.devices import handles
from tests.device_helpers import PATIENCE_S, machine, raised_by, runtime_with, wait_for_devices
from tests.helpers import poll, remote_with

pytestmark = pytest.mark.slow  # each loses and resets a device


@pytest.fixture(autouse=True)
def _runtime() -> Iterator[None]:
    with runtime_with("emulated:1:64MiB"):
        yield


class Holder:
    """Has a value on its device."""

    def __init__(self) -> None:
        self.array = afield.array_module().ones(100, dtype="f4")

    def total(self) -> float:
        return float(self.array.sum())

    def again(self) -> bool:
        return bool(afield.get_runtime_context().was_current_actor_reconstructed)


class Sleeper(Holder):
    def sleep(self) -> None:
        time.sleep(PATIENCE_S)


def get(ref: Any) -> Any:
    return afield.get(ref, timeout=PATIENCE_S)


def holder(cls: type = Holder, **options: Any) -> Any:
    return remote_with(num_gpus=1, **options)(cls).remote()


def is_away(actor: Any) -> bool:
    try:
        get(actor.total.remote())
    except afield.ActorUnavailableError as error:
        return not error.may_have_run
    return False


@pytest.mark.parametrize("at_work", [False, True])
def test_it_starts_again_when_the_device_is_reset(at_work: bool) -> None:
    actor = holder(Sleeper, max_restarts=2)
    assert get(actor.total.remote()) == 100
    with handles() as (device,):
        for _ in range(2):
            busy = actor.sleep.remote() if at_work else None
            device.lose()
            wait_for_devices(0)
            if busy is not None:
                assert "may have run" in raised_by(lambda busy=busy: get(busy), afield.ActorUnavailableError)
            poll(lambda: is_away(actor))
            waits = actor.again.options(max_task_retries=1).remote()
            assert afield.wait([waits], timeout=0)[0] == []
            device.reset()
            assert get(waits) is True
            assert get(actor.total.remote()) == 100
        device.lose()
        raised_by(lambda: poll(lambda: is_away(actor)), afield.ActorDiedError)  # that were two
        device.reset()
        wait_for_devices(1)


def test_one_that_waits_for_its_first_device_waits_on_and_a_new_one_is_told_at_once() -> None:
    first = holder()
    assert get(first.total.remote()) == 100
    second = holder()
    result = second.total.remote()
    with handles() as (device,):
        device.lose()
        wait_for_devices(0)
        raised_by(lambda: get(first.total.remote()), afield.ActorDiedError)  # it had no restarts
        text = raised_by(lambda: get(holder().total.remote()), afield.ActorUnschedulableError)
        assert "lost at" in text and "comes back when it was reset" in text
        device.reset()
        assert get(result) == 100


def test_it_dies_when_the_device_is_given_up_and_says_so() -> None:
    actor = holder(max_restarts=-1, max_task_retries=-1)
    assert get(actor.total.remote()) == 100
    with handles() as (device,), machine() as emulated:
        device.lose()
        wait_for_devices(0)
        waits = actor.total.remote()
        for at in range(1, MAX_FAILED_STARTS + 1):  # so that no store can have its slab there
            emulated.inject(faults.out_of_memory(device.uuid, at))
        emulated.reset(device.uuid)
        text = raised_by(lambda: get(waits), afield.ActorDiedError)
        assert "Holder" in text and "cannot start again" in text and "given up" in text and device.uuid in text
        raised_by(lambda: get(actor.total.remote()), afield.ActorDiedError)


class Maker:
    def make(self) -> Any:
        return afield.array_module().arange(1000)

    def more(self, array: Any) -> Any:
        return array + 1

    def busy(self) -> None:
        time.sleep(0.5)


@pytest.mark.parametrize("when", ["freed", "between", "underway"])
def test_a_lost_result_of_an_actor_that_its_own_call_takes_is_made_again_first(when: str) -> None:
    maker = remote_with(num_gpus=0.5, max_restarts=-1, max_task_retries=-1)(Maker).remote()
    first = maker.make.remote()
    afield.wait([first])
    if when == "underway":
        maker.busy.remote()  # what follows waits, and is sent again first after the restart
        last = maker.more.remote(first)
    else:
        middle = remote_with(num_gpus=0.5)(lambda array: array + 0).remote(first) if when == "between" else first
        last = maker.more.remote(middle)
        afield.wait([last])
        del first, middle  # only lineage knows how to make them
    with handles() as (device,):
        device.lose()
        device.reset()
        assert get(last)[-1] == 1000
