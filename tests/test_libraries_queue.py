"""`Queue` by behaviour: order, waiting without polling, batches, coroutines, sharing, shutdown."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Callable

import numpy as np
import pytest

import afield
from afield.util.queue import Empty, Full, Queue

pytestmark = pytest.mark.usefixtures("shared_runtime")

PATIENCE_S = 30.0


def test_first_in_first_out() -> None:
    shared = Queue()
    for item in range(100):
        shared.put(item)
    assert shared.qsize() == shared.size() == len(shared) == 100
    assert [shared.get() for _ in range(100)] == list(range(100))
    assert shared.empty()
    assert not shared.full()


def test_values_of_any_kind() -> None:
    shared = Queue()
    array = np.arange(200_000)
    for item in (None, array, afield.put("resolved")):
        shared.put(item)
    assert shared.get() is None
    assert np.array_equal(shared.get(), array)
    assert shared.get() == "resolved"
    shared.put([afield.put("inside")])
    assert afield.get(shared.get()[0]) == "inside"


def test_bounds() -> None:
    shared = Queue(maxsize=2)
    shared.put_nowait(1)
    assert not shared.full()
    shared.put_nowait(2)
    assert shared.full()
    with pytest.raises(Full):
        shared.put_nowait(3)
    with pytest.raises(queue.Full):
        shared.put(3, timeout=0.01)
    with pytest.raises(Full):
        shared.put(3, block=False)
    assert [shared.get_nowait(), shared.get_nowait()] == [1, 2]
    with pytest.raises(Empty):
        shared.get_nowait()
    with pytest.raises(queue.Empty):
        shared.get(timeout=0.01)
    assert shared.qsize() == 0


def test_batches_are_all_or_nothing() -> None:
    shared = Queue(maxsize=4)
    shared.put_nowait_batch(range(3))
    with pytest.raises(Full):
        shared.put_nowait_batch([3, 4])
    with pytest.raises(Empty):
        shared.get_nowait_batch(4)
    assert shared.get_nowait_batch(0) == []
    assert shared.get_nowait_batch(3) == [0, 1, 2]


def test_a_waiting_get_is_woken_by_a_put() -> None:
    shared = Queue()

    @afield.remote
    def consume(source: Queue) -> int:
        value: int = source.get()
        return value

    waiting = consume.remote(shared)
    assert afield.wait([waiting], timeout=0.05) == ([], [waiting])
    shared.put(7)
    assert afield.get(waiting, timeout=PATIENCE_S) == 7


def test_a_waiting_put_is_woken_by_a_get() -> None:
    shared = Queue(maxsize=1)
    shared.put("first")

    @afield.remote
    def produce(target: Queue) -> None:
        target.put("second")

    waiting = produce.remote(shared)
    assert afield.wait([waiting], timeout=0.05) == ([], [waiting])
    assert shared.get() == "first"
    assert shared.get(timeout=PATIENCE_S) == "second"
    afield.get(waiting, timeout=PATIENCE_S)


def test_producers_and_consumers_lose_nothing() -> None:
    shared = Queue(maxsize=3)

    @afield.remote(num_cpus=0)
    def produce(target: Queue, start: int) -> None:
        for item in range(start, start + 20):
            target.put(item)

    @afield.remote(num_cpus=0)
    def consume(source: Queue) -> list[int]:
        return [source.get() for _ in range(20)]

    consumers = [consume.remote(shared) for _ in range(2)]
    producers = [produce.remote(shared, start) for start in (0, 20)]
    taken = afield.get(consumers, timeout=PATIENCE_S)
    afield.get(producers, timeout=PATIENCE_S)
    assert sorted(taken[0] + taken[1]) == list(range(40))
    for part in taken:
        for start in (0, 20):
            of_one = [item for item in part if start <= item < start + 20]
            assert of_one == sorted(of_one)


def test_coroutines() -> None:
    shared = Queue(maxsize=1)

    async def main() -> list[int]:
        async def put_all() -> None:
            for item in range(5):
                await shared.put_async(item)

        putting = asyncio.create_task(put_all())
        items = [await shared.get_async() for _ in range(5)]
        await putting
        with pytest.raises(Empty):
            await shared.get_async(block=False)
        with pytest.raises(Empty):
            await shared.get_async(timeout=0.01)
        return items

    assert asyncio.run(main()) == [0, 1, 2, 3, 4]


def test_a_cancelled_get_takes_nothing() -> None:
    shared = Queue()

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(shared.get_async(), 0.05)

    asyncio.run(main())
    deadline = time.monotonic() + PATIENCE_S
    shared.put("kept")
    while time.monotonic() < deadline and shared.empty():
        time.sleep(0.01)
    assert shared.get(timeout=1) == "kept"


def test_shutdown_ends_it_for_everybody() -> None:
    shared = Queue()

    @afield.remote
    def consume(source: Queue) -> None:
        source.get()

    waiting = consume.remote(shared)
    shared.put_nowait_batch([])
    shared.shutdown()
    with pytest.raises(afield.ActorDiedError):
        shared.put(1)
    with pytest.raises(afield.ActorDiedError):
        afield.get(waiting, timeout=PATIENCE_S)


def test_actor_options() -> None:
    assert Queue(actor_options={"num_cpus": 1}).empty()
    with pytest.raises(afield.InvalidOptionError):
        Queue(actor_options={"num_cpu": 1})


@pytest.mark.parametrize(
    ("use", "error"),
    [
        (lambda shared: shared.get(timeout=-1), ValueError),
        (lambda shared: shared.put(1, timeout=-1), ValueError),
        (lambda shared: shared.get_nowait_batch(-1), ValueError),
        (lambda shared: shared.get_nowait_batch("1"), TypeError),
        (lambda shared: shared.put_nowait_batch(1), TypeError),
    ],
)
def test_wrong_use(use: Callable[[Queue], object], error: type[Exception]) -> None:
    with pytest.raises(error):
        use(Queue())
