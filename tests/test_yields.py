"""Generators with a fixed number of results: what was yielded stays, whatever comes after it."""

from __future__ import annotations

import asyncio
import functools
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import afield
from tests.helpers import poll, remote_with
from tests.test_recovery import stored_objects

LARGE = 200_000
SMALL = 10


def nothing_stored() -> bool:
    """Tell whether the store is empty; errors that were read keep what their frames had."""
    gc.collect()
    return stored_objects() == 0


class Plain:
    """Its methods run one at a time."""

    @afield.method(num_returns=3)
    def items(self, count: int, size: int, fail: bool) -> Iterator[Any]:
        """Yield so many arrays of so many bytes, then raise or not."""
        for index in range(count):
            yield np.full(size, index, np.uint8)
        if fail:
            raise KeyError("after the items")


class Asynchronous:
    """Its methods run on an event loop."""

    @afield.method(num_returns=3)
    async def items(self, count: int, size: int, fail: bool) -> AsyncIterator[Any]:
        """Do the same."""
        for index in range(count):
            yield np.full(size, index, np.uint8)
        if fail:
            raise KeyError("after the items")


class Mixed(Plain):
    """Its generator is a plain one, and runs on an event loop."""

    async def other(self) -> None:
        """Make the actor an asynchronous one."""


def of_task() -> Any:
    """Return what has a task do it."""
    return functools.partial(remote_with(num_returns=3)(Plain.items).remote, None)


def of_actor(cls: type, **options: Any) -> Any:
    """Return what has an actor do it."""
    actor = afield.remote(cls).options(num_cpus=0, **options).remote()
    return actor.items.remote


MAKERS: dict[str, Callable[[], Any]] = {
    "task": of_task,
    "actor": lambda: of_actor(Plain),
    "threads": lambda: of_actor(Plain, max_concurrency=2),
    "asynchronous": lambda: of_actor(Asynchronous),
    "mixed": lambda: of_actor(Mixed),
}


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("kind", MAKERS)
def test_what_was_yielded_stays(shared_runtime: None, kind: str, size: int) -> None:
    call = MAKERS[kind]()
    refs = call(2, size, True)
    for index, ref in enumerate(refs[:2]):
        assert np.array_equal(afield.get(ref), np.full(size, index, np.uint8))
    with pytest.raises(KeyError, match="after the items"):
        afield.get(refs[2])

    refs = call(1, size, False)
    assert afield.get(refs[0])[0] == 0
    for ref in refs[1:]:
        with pytest.raises(ValueError, match=r"items\(\) has num_returns=3 and yielded only 1 values"):
            afield.get(ref)

    for count in (3, 5):
        assert [int(value[-1]) for value in afield.get(call(count, size, False))] == [0, 1, 2]


def test_it_is_closed_after_the_last(shared_runtime: None, tmp_path: Path) -> None:
    @remote_with(num_returns=2)
    def endless() -> Iterator[int]:
        index = 0
        try:
            while True:
                yield index
                index += 1
        finally:
            (tmp_path / "closed").write_text(str(index))

    assert afield.get(endless.remote()) == [0, 1]
    assert (tmp_path / "closed").read_text() == "2"


def test_what_stands_behind_the_last_yield_runs(
    shared_runtime: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    @remote_with(num_returns=2)
    def items() -> Iterator[int]:
        yield 1
        yield 2
        (tmp_path / "behind").touch()
        raise KeyError("nobody gets this")

    assert afield.get(items.remote()) == [1, 2]
    assert (tmp_path / "behind").exists()
    said = ""

    def printed() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return "items() raised after all of its results were there" in said and "KeyError: 'nobody gets this'" in said

    assert poll(printed)


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_items_are_not_in_memory_together(shared_runtime: None, size: int) -> None:
    class Counted:
        """An item that is counted while it lives."""

        alive = most = 0

        def __init__(self) -> None:
            cls = type(self)
            cls.alive += 1
            cls.most = max(cls.most, cls.alive)

        def __del__(self) -> None:
            type(self).alive -= 1

        def __reduce__(self) -> tuple[Any, ...]:
            return bytes, (size,)

    @remote_with(num_returns=51)
    def items() -> Iterator[Any]:
        for _ in range(50):
            yield Counted()
        yield Counted.most

    *values, most = afield.get(items.remote())
    assert most <= 2
    assert [len(each) for each in values] == [size] * 50


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("kind", ["task", "actor"])
def test_a_retry_begins_afresh(shared_runtime: None, tmp_path: Path, kind: str, size: int) -> None:
    """The second execution yields others, of other sizes: nothing of the first may be read, or is left."""
    assert poll(nothing_stored)

    def items(path: str) -> Iterator[Any]:
        again = Path(path).exists()
        Path(path).touch()
        for index in range(2):
            yield np.full(2 * size if again else size, index + 10 * again, np.uint8)
        if not again:
            raise OSError("the first time")
        yield np.full(size, 12, np.uint8)

    def make(number: int) -> Any:
        path = str(tmp_path / str(number))
        if kind == "task":
            return remote_with(num_returns=3, retry_exceptions=[OSError])(items).remote(path)

        class Actor:
            @afield.method(num_returns=3, max_task_retries=1, retry_exceptions=[OSError])
            def items(self, path: str) -> Any:
                return items(path)

        return afield.remote(Actor).remote().items.remote(path)

    for number in range(10):
        refs = make(number)
        values = afield.get(refs)
        assert [len(value) for value in values] == [2 * size, 2 * size, size]
        assert [int(value[-1]) for value in values] == [10, 11, 12]
        del refs, values
    assert poll(nothing_stored)


def test_without_retries_left_the_items_stay(shared_runtime: None) -> None:
    @remote_with(num_returns=2, max_retries=1, retry_exceptions=True)
    def items() -> Iterator[Any]:
        yield np.zeros(LARGE, np.uint8)
        raise OSError("always")

    first, second = items.remote()
    assert afield.get(first).sum() == 0
    with pytest.raises(OSError, match="always"):
        afield.get(second)


def test_a_large_error_takes_the_places_that_are_left(shared_runtime: None) -> None:
    @remote_with(num_returns=3)
    def items() -> Iterator[Any]:
        yield np.zeros(LARGE, np.uint8)
        raise KeyError("x" * (3 << 20))

    refs = items.remote()
    assert afield.get(refs[0]).sum() == 0
    for ref in refs[1:]:
        with pytest.raises(KeyError) as raised:
            afield.get(ref)
        assert len(raised.value.cause.args[0]) == 3 << 20  # type: ignore[attr-defined]


def test_an_item_that_cannot_be_pickled(shared_runtime: None) -> None:
    @remote_with(num_returns=3)
    def items() -> Iterator[Any]:
        yield np.zeros(LARGE, np.uint8)
        yield threading.Lock()
        yield 3

    refs = items.remote()
    assert afield.get(refs[0]).sum() == 0
    for ref in refs[1:]:
        with pytest.raises(afield.SerializationError, match="items"):
            afield.get(ref)


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_refs_inside_items(shared_runtime: None, size: int) -> None:
    assert poll(nothing_stored)

    @remote_with(num_returns=2)
    def items() -> Iterator[Any]:
        yield [afield.put(np.ones(LARGE, np.uint8)), bytes(size)]
        raise KeyError("after it")

    first, second = items.remote()
    [inner, _] = afield.get(first)
    assert afield.get(inner).sum() == LARGE
    with pytest.raises(KeyError):
        afield.get(second)
    del first, second, inner, _
    assert poll(nothing_stored)


@pytest.mark.parametrize("call", ["task", "asynchronous"])
def test_a_cancelled_one_leaves_nothing(shared_runtime: None, tmp_path: Path, call: str) -> None:
    assert poll(nothing_stored)

    class Actor:
        @afield.method(num_returns=3)
        async def items(self, path: str) -> AsyncIterator[Any]:
            yield [np.zeros(LARGE, np.uint8), afield.put(1)]
            Path(path).touch()
            await asyncio.sleep(60)

    def items(path: str) -> Iterator[Any]:
        yield [np.zeros(LARGE, np.uint8), afield.put(1)]
        Path(path).touch()
        time.sleep(60)

    path = tmp_path / "yielded"
    if call == "task":
        refs = remote_with(num_returns=3)(items).remote(str(path))
    else:
        actor = afield.remote(Actor).remote()
        refs = actor.items.remote(str(path))
    assert poll(path.exists)
    afield.cancel(refs[0])
    for ref in refs:
        with pytest.raises(afield.TaskCancelledError):
            afield.get(ref)
    del ref, refs
    assert poll(nothing_stored)


def test_an_actor_that_leaves_in_the_midst(shared_runtime: None) -> None:
    class Actor:
        @afield.method(num_returns=3)
        def items(self) -> Iterator[Any]:
            yield np.ones(LARGE, np.uint8)
            afield.exit_actor()

    values = afield.get(afield.remote(Actor).remote().items.remote())
    assert values[0].sum() == LARGE and values[1:] == [None, None]
