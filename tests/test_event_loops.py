"""Concurrency groups of async actors: each has an event loop of its own, and blocks nobody else's."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import afield
from tests.helpers import HANG_S, poll

GROUPS = {"io": 2, "compute": 4}


class Base:
    """Has methods in the default group and in two others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loop = asyncio.get_running_loop()
        self.event: asyncio.Event | None = None
        self.running = self.most = 0

    def where(self) -> tuple[int, bool]:
        return threading.get_ident(), asyncio.get_running_loop() is self.loop

    @afield.method(concurrency_group="io")
    async def where_io(self) -> tuple[int, bool]:
        return self.where()

    @afield.method(concurrency_group="io")
    def where_io_plain(self) -> tuple[int, bool]:
        return self.where()

    @afield.method(concurrency_group="compute")
    async def where_compute(self) -> tuple[int, bool]:
        return self.where()

    def block(self, path: Path) -> str:
        """Block the event loop until somebody writes to the pipe."""
        (self.folder / "blocked").touch()
        return path.read_text()

    @afield.method(concurrency_group="io")
    async def block_io(self, path: Path) -> str:
        return self.block(path)

    @afield.method(concurrency_group="io")
    async def meet(self) -> int:
        """Return how many of these have run at a time, at most, once all that may are here."""
        self.running += 1
        self.most = max(self.most, self.running)
        if self.running == 2:
            self.event = self.event or asyncio.Event()
            self.event.set()
        self.event = self.event or asyncio.Event()
        await self.event.wait()
        self.running -= 1
        return self.most

    @afield.method(concurrency_group="io")
    async def items(self, n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i

    @afield.method(concurrency_group="io")
    def plain_items(self, n: int) -> Any:
        yield from range(n)

    @afield.method(concurrency_group="io")
    async def forever(self, path: Path) -> None:
        path.touch()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            path.with_suffix(".cancelled").touch()
            raise

    @afield.method(concurrency_group="io")
    async def of_another_group(self) -> int:
        me = afield.get_runtime_context().current_actor
        return (await me.where_compute.remote())[0]  # type: ignore[no-any-return]

    @afield.method(concurrency_group="io")
    def of_another_group_blocking(self) -> int:
        me = afield.get_runtime_context().current_actor
        return afield.get(me.where_compute.remote())[0]  # type: ignore[no-any-return]

    @afield.method(concurrency_group="io")
    async def wait_for(self, path: Path) -> str:
        while not path.exists():
            await asyncio.sleep(0.01)
        return path.name

    @afield.method(concurrency_group="compute")
    async def leave(self) -> None:
        afield.exit_actor()

    @afield.method(concurrency_group="compute")
    async def leave_by_thread(self) -> None:
        await asyncio.to_thread(afield.exit_actor)

    @afield.method(concurrency_group="compute")
    async def exit_in_a_task(self) -> None:
        async def leave() -> None:
            raise SystemExit(3)

        self.task = asyncio.create_task(leave())
        await asyncio.Event().wait()

    async def exit_in_a_task_by_default(self) -> None:
        await Base.exit_in_a_task(self)

    async def __afield_shutdown__(self) -> None:
        (self.folder / "hook").touch()


@pytest.fixture
def actor(shared_runtime: None, tmp_path: Path) -> Any:
    os.mkfifo(tmp_path / "pipe")
    return afield.remote(concurrency_groups=GROUPS)(Base).remote(tmp_path)


def get(refs: Any) -> Any:
    return afield.get(refs, timeout=HANG_S)


def test_each_group_has_a_thread_and_a_loop_and_the_others_those_of_the_constructor(actor: Any) -> None:
    io, io_plain, compute, default = get(
        [actor.where_io.remote(), actor.where_io_plain.remote(), actor.where_compute.remote(), actor.where.remote()]
    )
    assert io == io_plain
    assert len({io, compute, default}) == 3
    assert [own for _, own in (io, compute, default)] == [False, False, True]
    assert get(actor.where_io.options(concurrency_group="compute").remote()) == compute


@pytest.mark.parametrize(("blocks", "others"), [("block", ["where_io"]), ("block_io", ["where", "where_compute"])])
def test_a_blocked_group_blocks_no_other(actor: Any, tmp_path: Path, blocks: str, others: list[str]) -> None:
    blocked = getattr(actor, blocks).remote(tmp_path / "pipe")
    assert poll((tmp_path / "blocked").exists)
    behind = actor.where_io.remote() if blocks == "block_io" else actor.where.remote()
    for other in others:
        get(getattr(actor, other).remote())
    assert afield.wait([blocked, behind], timeout=0)[0] == []
    (tmp_path / "pipe").write_text("go on")
    assert get(blocked) == "go on"
    get(behind)


def test_a_group_runs_as_many_calls_as_it_may(actor: Any) -> None:
    assert get([actor.meet.remote() for _ in range(6)]) == [2] * 6


def test_groups_can_wait_for_each_other(actor: Any) -> None:
    compute, _ = get(actor.where_compute.remote())
    assert get([actor.of_another_group.remote(), actor.of_another_group_blocking.remote()]) == [compute] * 2


@pytest.mark.parametrize("method", ["items", "plain_items"])
@pytest.mark.parametrize("backpressure", [1, 0])
def test_generators_of_a_group(actor: Any, method: str, backpressure: int) -> None:
    options: dict[str, Any] = {"_generator_backpressure_num_objects": backpressure} if backpressure else {}
    items = getattr(actor, method).options(num_returns="streaming", **options).remote(50)
    assert [get(ref) for ref in items] == list(range(50))


def test_calls_of_a_group_are_cancelled_where_they_run_and_where_they_wait(actor: Any, tmp_path: Path) -> None:
    running = [actor.forever.remote(tmp_path / name) for name in ("a", "b")]
    assert poll(lambda: (tmp_path / "a").exists() and (tmp_path / "b").exists())
    waiting = actor.forever.remote(tmp_path / "c")
    get(actor.where.remote())
    for ref in (waiting, *running):
        afield.cancel(ref)
        with pytest.raises(afield.TaskCancelledError):
            get(ref)
    assert poll(lambda: (tmp_path / "a.cancelled").exists() and (tmp_path / "b.cancelled").exists())
    assert not (tmp_path / "c").exists()
    get(actor.where_io.remote())


def test_context_variables_of_the_constructor_are_those_of_every_call(shared_runtime: None) -> None:
    class WithContext:
        def __init__(self) -> None:
            self.variable: contextvars.ContextVar[int] = contextvars.ContextVar("number", default=0)
            self.variable.set(1)

        async def add(self) -> int:
            self.variable.set(self.variable.get() + 1)
            return self.variable.get()

        @afield.method(concurrency_group="io")
        async def add_io(self) -> int:
            return await self.add()

    for groups in ({"io": 1}, {}):
        cls = WithContext if groups else type("Alone", (WithContext,), {"add_io": WithContext.add})
        one = afield.remote(concurrency_groups=groups)(cls).remote()
        assert get([one.add.remote(), one.add_io.remote(), one.add.remote(), one.add_io.remote()]) == [2] * 4


def test_without_handles_it_ends_after_the_calls_of_all_groups(shared_runtime: None, tmp_path: Path) -> None:
    actor = afield.remote(concurrency_groups=GROUPS)(Base).remote(tmp_path)
    refs = [actor.wait_for.remote(tmp_path / "finish"), actor.wait_for.remote(tmp_path / "finish")]
    get(actor.where.remote())
    del actor
    (tmp_path / "finish").touch()
    assert get(refs) == ["finish", "finish"]
    assert poll((tmp_path / "hook").exists)


@pytest.mark.parametrize("way", ["leave", "leave_by_thread"])
def test_a_call_of_a_group_ends_the_actor(shared_runtime: None, tmp_path: Path, way: str) -> None:
    actor = afield.remote(concurrency_groups=GROUPS)(Base).remote(tmp_path)
    forever = actor.forever.remote(tmp_path / "a")
    assert poll((tmp_path / "a").exists)
    getattr(actor, way).remote()
    with pytest.raises(afield.ActorDiedError, match="ended itself"):
        get(forever)
    assert poll((tmp_path / "hook").exists)


@pytest.mark.slow
def test_an_actor_that_leaves_ends_in_good_order_though_a_group_is_blocked(actor: Any, tmp_path: Path) -> None:
    blocked = actor.block_io.remote(tmp_path / "pipe")
    assert poll((tmp_path / "blocked").exists)
    actor.leave.remote()
    with pytest.raises(afield.ActorDiedError, match="ended itself"):
        get(blocked)
    assert poll((tmp_path / "hook").exists)


@pytest.mark.parametrize("group", ["compute", ""])
def test_what_ends_the_loop_of_a_group_ends_the_actor(actor: Any, group: str) -> None:
    method = actor.exit_in_a_task if group else actor.exit_in_a_task_by_default
    waits = method.remote()
    with pytest.raises(afield.ActorDiedError):
        get(waits)
