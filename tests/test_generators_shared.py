"""Generators of refs that several threads share, consumers that go away in the midst, and producers that begin again."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import afield
from tests.helpers import remote_with


@afield.remote
def slowly(count: int) -> Iterator[int]:
    """Yield numbers with pauses."""
    for number in range(count):
        time.sleep(0.005)
        yield number


def test_threads_that_share_a_generator_take_each_item_once_and_end_together(runtime: Any) -> None:
    items = slowly.remote(60)
    ready = threading.Barrier(4)
    taken: list[list[int]] = [[] for _ in range(4)]

    def consume(mine: list[int]) -> None:
        ready.wait()
        for ref in items:
            mine.append(afield.get(ref))
            time.sleep(0.02)  # meanwhile the others must still be there

    threads = [threading.Thread(target=consume, args=(mine,)) for mine in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(number for mine in taken for number in mine) == list(range(60))
    assert sum(1 for mine in taken if len(mine) > 1) > 1


def test_coroutines_that_share_a_generator_take_each_item_once(runtime: Any) -> None:
    async def consume(items: Any) -> list[int]:
        return [await ref async for ref in items]

    async def main() -> list[list[int]]:
        items = slowly.remote(30)
        return await asyncio.gather(*[consume(items) for _ in range(3)])

    assert sorted(number for mine in asyncio.run(main()) for number in mine) == list(range(30))


def test_an_async_for_that_is_abandoned_harms_nobody(runtime: Any) -> None:
    @afield.remote
    def never() -> Iterator[int]:
        yield 1
        time.sleep(0.5)
        yield 2

    items = never.remote()
    abandoned: list[Any] = []

    async def first() -> Any:
        async for ref in items:
            task = asyncio.ensure_future(anext(items))
            await asyncio.sleep(0)
            task.cancel()
            return await ref

    async def left() -> None:
        abandoned.append(asyncio.ensure_future(anext(items)))  # the loop is closed before the item comes
        await asyncio.sleep(0)

    assert asyncio.run(first()) == 1
    asyncio.run(left())
    assert [afield.get(ref) for ref in items] == [2]


@pytest.mark.parametrize("how", ["it raised", "its worker died"])
def test_a_producer_that_begins_again_does_not_wait_for_what_was_taken_before(
    runtime: Any, tmp_path: Path, how: str
) -> None:
    before = tmp_path / "before"

    @remote_with(
        num_returns="streaming", _generator_backpressure_num_objects=2, max_retries=1, retry_exceptions=[ValueError]
    )
    def items() -> Iterator[int]:
        for number in range(8):
            if number == 6 and not before.exists():
                before.touch()
                if how == "it raised":
                    raise ValueError
                os._exit(1)
            yield number

    def consume() -> None:
        taken.extend(afield.get(ref) for ref in items.remote())

    taken: list[int] = []
    consumer = threading.Thread(target=consume, daemon=True)
    consumer.start()
    consumer.join(30)
    assert taken == list(range(8))


def test_waits_that_end_early_leave_nothing_with_a_generator(runtime: Any) -> None:
    @afield.remote
    def never() -> Iterator[int]:
        yield 1
        threading.Event().wait()

    items = never.remote()
    afield.get(next(items))
    for _ in range(20):
        assert afield.wait([items], timeout=0.001) == ([], [items])
    (stream,) = items._of._streams.values()
    assert stream.waiters == []
