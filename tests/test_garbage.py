"""Values that only garbage refers to, while somebody waits for their memory: it is collected in every process first."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import afield
from afield.errors import ObjectStoreFullError
from afield.gpu_store.books.eviction import RETRY_S
from afield.gpu_store.tiers import HOST
from afield.runtime.values.garbage import Garbage
from tests.helpers import poll, remote_with
from tests.store_books import GPU, KIB, B, Books

MIB = 1 << 20
PATIENCE_S = 30.0
CAPACITY = 32 * MIB
LARGE = 20 * MIB  # of two, one must go


@pytest.fixture(scope="module")
def _module() -> Iterator[None]:
    afield.shutdown()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AFIELD_STORE_WAIT_S", "8")
        afield.init(num_cpus=1, devices="emulated:1:32MiB", host_memory=CAPACITY)
        yield
        afield.shutdown()


@pytest.fixture
def _no_collector(_module: None) -> Iterator[None]:
    """In the driver nothing is collected by chance."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    gc.collect()


def in_cycle(array: Any) -> dict[str, Any]:
    model: dict[str, Any] = {"data": array}
    model["self"] = model
    return model


def fit(array: Any) -> float:
    gc.disable()
    return float(in_cycle(array)["data"][0])


class Model:
    def __init__(self) -> None:
        gc.disable()

    def fit(self, array: Any) -> float:
        return float(in_cycle(array)["data"][0])


def values() -> Iterator[Any]:
    for number in range(3):
        yield afield.put(np.full(LARGE // 8, number, "f8"))


def get(ref: Any) -> Any:
    """`afield.get` that does not wait for ever."""
    return afield.get(ref, timeout=PATIENCE_S)


@pytest.mark.slow
@pytest.mark.usefixtures("_no_collector")
def test_cycles_in_tasks_actors_and_the_driver_give_host_memory_back() -> None:
    actor = afield.remote(num_cpus=0)(Model).remote()
    task = afield.remote(fit)
    for use in (task.remote, actor.fit.remote, lambda ref: afield.put(float(in_cycle(get(ref))["data"][0]))):
        assert [get(use(ref)) for ref in values()] == [0.0, 1.0, 2.0]


@pytest.mark.slow
@pytest.mark.usefixtures("_no_collector")
def test_cycles_give_device_memory_back() -> None:
    def on_device(number: int) -> float:
        gc.disable()
        return float(in_cycle(afield.array_module().full(LARGE // 4, number, "f4"))["data"][0])

    task = remote_with(num_gpus=0.5)(on_device)  # two workers, each with garbage of its own
    assert sorted(get([task.remote(number) for number in range(6)])) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.slow
@pytest.mark.usefixtures("_no_collector")
def test_a_finaliser_in_garbage_may_use_afield_and_block() -> None:
    """It runs on a thread of its own, and holds no lock: the process goes on to answer."""
    done = threading.Event()

    class Last:
        def __init__(self, array: Any) -> None:
            self.array, self.me = array, self

        def __del__(self) -> None:
            assert get(afield.remote(fit).remote([7.0])) == 7.0
            done.set()

    last = Last(get(next(values())))
    del last
    assert get(afield.put(np.ones(LARGE // 8)))[0] == 1.0
    assert done.wait(PATIENCE_S)


@pytest.mark.slow
@pytest.mark.usefixtures("_no_collector")
def test_what_is_in_use_is_refused_after_the_garbage_is_gone() -> None:
    kept = get(afield.put(np.ones(LARGE // 8)))
    with pytest.raises(ObjectStoreFullError, match="Top holders: values of driver"):
        afield.put(np.ones(LARGE // 8))
    assert kept[0] == 1.0


def test_it_is_asked_for_when_nothing_may_go_and_somebody_waits() -> None:
    store = Books(4 * KIB)
    store.store(b"x", (HOST, 3 * KIB))
    slot = store.pin(b"x")
    assert store.collects == []
    store.lease(B, 1, HOST, 2 * KIB)
    assert store.collects == [HOST]
    store.expire(0.0)
    store.expire(1.0)
    assert store.collects == [HOST, HOST], "what was collected too soon, is asked for again"
    assert store.next_deadline() == 1.0 + RETRY_S, "and again, though nothing else happens"
    store.pins.pinned[slot] = 0
    store.expire(2.0)
    assert store.collects == [HOST, HOST], "it may go now"


def test_one_collection_at_a_time_and_few_of_them() -> None:
    go, ended = threading.Event(), threading.Semaphore(0)
    arenas: list[int] = []

    def collected(arena: int) -> None:
        arenas.append(arena)
        ended.release()
        assert go.wait(PATIENCE_S)

    garbage = Garbage(collected)
    for _ in range(20):
        garbage.wanted(HOST)
    assert ended.acquire(timeout=PATIENCE_S)
    garbage.wanted(GPU)
    go.set()
    poll(lambda: not garbage.running)
    garbage.wanted(GPU)
    assert arenas == [HOST] and not garbage.running, "the next one comes later"


def test_a_collection_for_which_there_is_no_thread_comes_when_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    collected = threading.Event()
    garbage = Garbage(lambda arena: collected.set())
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        garbage.wanted(HOST)
    garbage.wanted(HOST)
    assert collected.wait(PATIENCE_S)
