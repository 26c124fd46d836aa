"""Values whose only device is lost: an error for who asks while there is none, made again for who asks after the reset."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import afield
from afield.errors import TaskUnschedulableError
from afield.testing.devices import handles
from tests.device_helpers import PATIENCE_S, raised_by, runtime_with, wait_for_devices
from tests.helpers import remote_with

pytestmark = pytest.mark.slow  # each loses and resets a device


@pytest.fixture(autouse=True, scope="module")
def _module() -> Iterator[None]:
    with runtime_with("emulated:1:64MiB"):
        yield


@contextmanager
def lost() -> Iterator[None]:
    """The only device is lost, and reset in the end."""
    with handles() as (device,):
        device.lose()
        wait_for_devices(0)
        yield
        device.reset()


def get(ref: Any) -> Any:
    return afield.get(ref, timeout=PATIENCE_S)


@remote_with(num_gpus=1, max_retries=1)
def ones(count: int) -> Any:
    return afield.array_module().ones(count, dtype="f4")


@remote_with(num_gpus=1, max_retries=1)
def doubled(array: Any) -> Any:
    return 2 * array


@remote_with(num_gpus=1, max_retries=1, num_returns=2)
def pair() -> Any:
    return afield.array_module().ones(3, dtype="f4"), afield.array_module().ones(4, dtype="f4")


@remote_with(num_gpus=1)
def total(array: Any) -> float:
    return float(array.sum())


async def awaited(ref: Any) -> Any:
    return await asyncio.wait_for(ref, PATIENCE_S)


WAYS = {
    "get": get,
    "get of several": lambda ref: get([ref, ref])[0],
    "await": lambda ref: asyncio.run(awaited(ref)),
    "future": lambda ref: ref.future().result(PATIENCE_S),
    "argument": lambda ref: get(afield.remote(num_cpus=0)(lambda x: x).remote(ref)),
    "wait": lambda ref: (afield.wait([ref], timeout=PATIENCE_S), get(ref))[1],
}


@pytest.mark.parametrize("way", WAYS)
def test_it_is_made_again_after_the_reset(way: str) -> None:
    """Asking in vain uses up none of the times that it may be made again."""
    ref = ones.remote(10)
    get(total.remote(ref))
    with lost():
        for _ in range(3):
            assert "comes back when it was reset" in raised_by(lambda: WAYS[way](ref), TaskUnschedulableError)
    assert WAYS[way](ref).sum() == 10


def test_nobody_has_to_ask_in_between() -> None:
    ref = ones.remote(10)
    get(total.remote(ref))
    with lost():
        pass
    assert get(ref).sum() == 10


def test_what_was_made_of_it_is_made_again_too() -> None:
    first = ones.remote(10)
    second = doubled.remote(first)
    third = doubled.remote(second)
    left, right = pair.remote()
    del second
    get([total.remote(third), total.remote(right), total.remote(left)])
    with lost():
        raised_by(lambda: get(third), TaskUnschedulableError)
        raised_by(lambda: get(right), TaskUnschedulableError)
    assert get(third).sum() == 40
    assert [get(each).sum() for each in (first, left, right)] == [10, 3, 4]


def test_it_may_be_dropped_meanwhile() -> None:
    refs = [ones.remote(10), doubled.remote(ones.remote(10))]
    get([total.remote(each) for each in refs])
    with lost():
        raised_by(lambda: get(refs), TaskUnschedulableError)
        refs.clear()
    assert get(total.remote(ones.remote(3))) == 3


def test_an_actor_whose_constructor_takes_it_starts_again() -> None:
    class Holder:
        def __init__(self, array: Any) -> None:
            self.array = array

        def total(self) -> float:
            return float(self.array.sum())

    array = ones.remote(10)
    actor = remote_with(num_gpus=1, max_restarts=1, max_task_retries=-1)(Holder).remote(array)
    assert get(actor.total.remote()) == 10
    with lost():
        raised_by(lambda: get(array), TaskUnschedulableError)
        waits = actor.total.remote()
    assert get(waits) == 10
