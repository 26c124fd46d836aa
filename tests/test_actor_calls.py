"""Calls of actors by behaviour: callers that have died, names of attributes, order, and where async actors run."""

from __future__ import annotations

import asyncio
import itertools
import traceback
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

import afield
from afield.libraries.queue import _QueueActor
from afield.util.queue import Queue
from tests.helpers import HANG_S, poll


@afield.remote(max_concurrency=4)
class Relay:
    """Calls another actor and waits there, until it is killed."""

    def __init__(self) -> None:
        self.consumed = False

    def wait_for(self, actor: Any, method: str) -> None:
        afield.get(getattr(actor, method).remote())

    def take(self, queue: Queue) -> Any:
        return queue.get()

    def consume(self, actor: Any, method: str) -> None:
        items = getattr(actor, method).options(num_returns="streaming").remote()
        afield.get(next(items))
        self.consumed = True
        afield.get(actor.first_was_taken.remote())

    def has_consumed(self) -> bool:
        return self.consumed


def make_watched_queue() -> Queue:
    """Make a queue that tells how many calls wait in it."""

    class Watched(_QueueActor):
        async def waiting(self) -> int:
            return len(self._queue._getters)  # type: ignore[attr-defined]

    queue = Queue()
    queue.actor = afield.remote(Watched).remote(0)
    return queue


def test_a_queue_keeps_the_item_of_a_consumer_that_died_waiting(shared_runtime: None) -> None:
    queue, consumer = make_watched_queue(), Relay.remote()
    taking = [consumer.take.remote(queue) for _ in range(3)]
    assert poll(lambda: afield.get(queue.actor.waiting.remote()) == 3)
    afield.kill(consumer)
    assert poll(lambda: afield.get(queue.actor.waiting.remote()) == 0)
    queue.put("item")
    assert queue.get(timeout=HANG_S) == "item"
    del taking


@pytest.mark.parametrize(("how", "method"), [("wait_for", "serve"), ("consume", "stream")])
def test_a_running_call_of_a_dead_caller_is_cancelled(shared_runtime: None, how: str, method: str) -> None:
    class Server:
        def __init__(self) -> None:
            self.seen: list[str] = []

        async def serve(self) -> None:
            self.seen.append("begun")
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.seen.append("cancelled")
                raise

        async def stream(self) -> AsyncIterator[int]:
            try:
                for item in itertools.count():
                    yield item
                    self.seen.append("begun")
                    await asyncio.Event().wait()
            finally:
                self.seen.append("cancelled")

        async def first_was_taken(self) -> None:
            await asyncio.Event().wait()

        async def read(self) -> list[str]:
            return self.seen

    server, relay = afield.remote(Server).remote(), Relay.remote()
    waiting = getattr(relay, how).remote(server, method)
    assert poll(lambda: afield.get(server.read.remote()) == ["begun"])
    afield.kill(relay)
    assert poll(lambda: afield.get(server.read.remote()) == ["begun", "cancelled"])
    del waiting


def test_calls_of_others_go_on_when_a_caller_dies(shared_runtime: None) -> None:
    queue, dead, alive = make_watched_queue(), Relay.remote(), Relay.remote()
    taking = [dead.take.remote(queue), alive.take.remote(queue)]
    assert poll(lambda: afield.get(queue.actor.waiting.remote()) == 2)
    afield.kill(dead)
    assert poll(lambda: afield.get(queue.actor.waiting.remote()) == 1)
    queue.put("item")
    assert afield.get(taking[1], timeout=HANG_S) == "item"


def test_a_generator_of_a_dead_caller_ends_and_the_actor_is_free(shared_runtime: None) -> None:
    class Source:
        @afield.method(_generator_backpressure_num_objects=2)
        def numbers(self) -> Iterator[int]:
            yield from itertools.count()

        def first_was_taken(self) -> None:
            """Waits behind the generator."""

    source, relay = afield.remote(Source).remote(), Relay.remote()
    consuming = relay.consume.remote(source, "numbers")
    assert poll(lambda: afield.get(relay.has_consumed.remote()))
    afield.kill(relay)
    afield.get(source.first_was_taken.remote(), timeout=HANG_S)
    del consuming


def test_a_method_is_called_that_an_attribute_of_the_instance_hides(shared_runtime: None) -> None:
    class Base:
        def inherited(self) -> str:
            return f"inherited {self.kept}"  # type: ignore[attr-defined]

    class Shadowed(Base):
        def __init__(self) -> None:
            self.kept = "kept"
            for name in ("plain", "static", "of_class", "inherited"):
                setattr(self, name, 5)

        def plain(self) -> str:
            return self.kept

        @staticmethod
        def static(x: int) -> int:
            return 2 * x

        @classmethod
        def of_class(cls) -> str:
            return cls.__name__

    actor = afield.remote(Shadowed).remote()
    calls = [actor.plain.remote(), actor.static.remote(4), actor.of_class.remote(), actor.inherited.remote()]
    assert afield.get(calls) == ["kept", 8, "Shadowed", "inherited kept"]


class Asynchronous:
    """Can wait for its argument, and take it."""

    async def take(self, value: int) -> int:
        return value

    @afield.method(concurrency_group="one")
    async def take_in_group(self, value: int) -> int:
        return value


class Threaded:
    """The same."""

    def take(self, value: int) -> int:
        return value

    @afield.method(concurrency_group="one")
    def take_in_group(self, value: int) -> int:
        return value


@afield.remote
class Gate:
    """Gives its value as soon as it is open."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def give(self, value: int) -> int:
        await self.open.wait()
        return value

    async def let_pass(self) -> None:
        self.open.set()


@pytest.mark.parametrize(
    ("cls", "max_concurrency", "first", "second"),
    [
        (Asynchronous, None, "take", "take"),
        (Asynchronous, 1, "take", "take"),
        (Asynchronous, None, "take_in_group", "take_in_group"),
        (Threaded, 2, "take", "take"),
        (Threaded, None, "take", "take_in_group"),
        (Threaded, None, "take_in_group", "take"),
    ],
)
def test_a_call_whose_argument_is_late_holds_back_nobody(
    shared_runtime: None, cls: Any, max_concurrency: int | None, first: str, second: str
) -> None:
    gate = Gate.remote()
    options = {} if max_concurrency is None else {"max_concurrency": max_concurrency}
    actor = afield.remote(cls).options(concurrency_groups={"one": 1}, **options).remote()
    late = getattr(actor, first).remote(gate.give.remote(1))
    assert afield.get(getattr(actor, second).remote(2), timeout=HANG_S) == 2
    afield.get(gate.let_pass.remote())
    assert afield.get(late, timeout=HANG_S) == 1


@pytest.mark.parametrize("method", ["take", "take_in_group"])
def test_calls_that_run_one_at_a_time_keep_their_order(shared_runtime: None, method: str) -> None:
    class Plain:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def take(self, value: int) -> None:
            self.seen.append(value)

        @afield.method(concurrency_group="one")
        def take_in_group(self, value: int) -> None:
            self.seen.append(value)

        def read(self) -> list[int]:
            return self.seen

    gate, actor = Gate.remote(), afield.remote(Plain).options(concurrency_groups={"one": 1}).remote()
    calls = [getattr(actor, method).remote(value) for value in (gate.give.remote(0), 1, gate.give.remote(2), 3)]
    afield.get(gate.let_pass.remote())
    afield.get(calls, timeout=HANG_S)
    assert afield.get(actor.read.remote()) == [0, 1, 2, 3]


def test_the_constructor_of_an_async_actor_runs_in_its_event_loop(shared_runtime: None) -> None:
    class Beating:
        def __init__(self, gate: Any) -> None:
            self.loop = asyncio.get_running_loop()
            self.gate = gate
            self.task = asyncio.create_task(self.beat())
            assert afield.get(afield.put(1)) == 1

        async def beat(self) -> int:
            return await self.gate[0].give.remote(7)  # type: ignore[no-any-return]

        async def wait(self) -> tuple[bool, int]:
            return self.loop is asyncio.get_running_loop(), await self.task

    gate = Gate.remote()
    actor = afield.remote(Beating).remote([gate])
    waiting = actor.wait.remote()
    afield.get(gate.let_pass.remote())
    assert afield.get(waiting, timeout=HANG_S) == (True, 7)


def test_an_async_actor_whose_constructor_raises_says_so(shared_runtime: None) -> None:
    class Broken:
        def __init__(self) -> None:
            raise ValueError("broken")

        async def ask(self) -> None:
            """Never runs."""

    with pytest.raises(ValueError, match="broken") as caught:
        afield.get(afield.remote(Broken).remote().ask.remote())
    assert "asyncio" not in "".join(traceback.format_exception(caught.value))


def test_handles_from_get_actor_and_current_actor_do_not_keep_an_actor_alive(shared_runtime: None) -> None:
    class Own:
        def me(self) -> Any:
            return afield.get_runtime_context().current_actor

        def answer(self) -> int:
            return 1

    actor = afield.remote(Own).options(name="held by its creator").remote()
    handles = [afield.get_actor("held by its creator"), afield.get(actor.me.remote())]
    assert afield.get([each.answer.remote() for each in handles]) == [1, 1]
    del actor
    for each in handles:
        with pytest.raises(afield.ActorDiedError):
            while True:
                afield.get(each.answer.remote(), timeout=HANG_S)
