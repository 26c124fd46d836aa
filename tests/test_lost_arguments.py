"""Arguments of an actor's constructor that were lost with a device: made again for the restart, or a typed error in time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

import afield
from afield.errors import ActorConstructionError, AfieldError, DeviceLostError
from afield.testing.devices import handles
from tests.device_helpers import PATIENCE_S, raised_by, runtime_with, wait_for_devices
from tests.helpers import remote_with

ELEMENTS = 1000

pytestmark = pytest.mark.slow  # each loses and resets two devices


@pytest.fixture(scope="module")
def _module() -> Iterator[None]:
    with runtime_with("emulated:2:64MiB"):
        yield


@pytest.fixture
def _device(_module: None) -> Iterator[None]:
    wait_for_devices(2)
    yield
    wait_for_devices(2)


def get(ref: Any) -> Any:
    """`afield.get` that does not wait for ever."""
    return afield.get(ref, timeout=PATIENCE_S)


def lose_all() -> None:
    """One device after the other is lost, with one left for whoever starts again, and has a new life."""
    with handles() as devices:
        for device in devices:
            device.lose()
            wait_for_devices(1)
            device.reset()
            wait_for_devices(2)


def weights(count: int) -> Any:
    return afield.array_module().ones(count, dtype="f4")


class Replica:
    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def total(self) -> float:
        return float(sum(part.sum() for part in self.parts))


def replica(*arguments: Any) -> Any:
    return remote_with(num_gpus=1, max_restarts=-1, max_task_retries=-1)(Replica).remote(*arguments)


@pytest.mark.usefixtures("_device")
@pytest.mark.parametrize("held", [True, False])
def test_a_constructor_argument_is_made_again_for_a_restart(held: bool) -> None:
    """The task that makes it needs the only device that is left, which the actor would have."""
    w = remote_with(num_gpus=1, max_retries=-1)(weights).remote(ELEMENTS)
    actor = replica(w)
    if not held:
        del w
    assert get(actor.total.remote()) == ELEMENTS
    lose_all()
    assert get(actor.total.remote()) == ELEMENTS


@pytest.mark.usefixtures("_device")
def test_it_is_made_again_for_each_restart() -> None:
    w = remote_with(num_gpus=1, max_retries=-1)(weights).remote(ELEMENTS)
    actor = replica(w, w)
    for _ in range(2):
        assert get(actor.total.remote()) == 2 * ELEMENTS
        lose_all()
    assert get(actor.total.remote()) == 2 * ELEMENTS


@pytest.mark.usefixtures("_device")
def test_an_argument_of_another_owner_is_made_again_by_it() -> None:
    class Trainer:
        def start(self) -> list[Any]:
            return [remote_with(num_gpus=1, max_retries=-1)(weights).remote(ELEMENTS)]

    trainer = afield.remote(Trainer).remote()
    (w,) = get(trainer.start.remote())
    actor = replica(w)
    assert get(actor.total.remote()) == ELEMENTS
    lose_all()
    assert get(actor.total.remote()) == ELEMENTS


@pytest.mark.usefixtures("_device")
def test_what_cannot_be_made_again_ends_the_actor_and_get_and_await_say_so() -> None:
    actor = replica(afield.put(afield.array_module().ones(ELEMENTS, dtype="f4")))
    assert get(actor.total.remote()) == ELEMENTS
    lose_all()
    ref = actor.total.remote()

    async def result() -> Any:
        return await asyncio.wait_for(ref, PATIENCE_S)

    for attempt in (lambda: get(ref), lambda: asyncio.run(result()), lambda: ref.future().result(PATIENCE_S)):
        text = raised_by(attempt, ActorConstructionError)
        assert "put()" in text and "__init__" in text
    assert isinstance(caught(ref), DeviceLostError), "it matches the class of its cause as well"


def caught(ref: Any) -> BaseException | None:
    try:
        get(ref)
    except AfieldError as error:
        return error
    return None


@pytest.mark.usefixtures("_device")
def test_await_has_a_lost_value_made_again_as_get_does() -> None:
    ref = remote_with(num_gpus=1, max_retries=-1)(weights).remote(ELEMENTS)
    afield.wait([ref], timeout=PATIENCE_S)
    lose_all()

    async def result() -> Any:
        return await asyncio.wait_for(ref, PATIENCE_S)

    assert float(asyncio.run(result()).sum()) == ELEMENTS
