"""Names that programs written for Ray use: of refs, contexts, actor classes and methods."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import afield as ray

PATIENCE_S = 30.0


def get(refs: Any) -> Any:
    return ray.get(refs, timeout=PATIENCE_S)


@ray.remote
def add(a: int, b: int = 1) -> int:
    return a + b


class Plain:
    """What the actor class below is made of."""

    LIMIT = 3

    def __init__(self, start: int = 0) -> None:
        self.value = start

    def context(self) -> tuple[Any, ...]:
        context = ray.get_runtime_context()
        return context.get_task_name(), context.get_task_function_name(), context.get()

    def several(self) -> Any:
        yield from range(3)

    @classmethod
    def limit(cls) -> int:
        return cls.LIMIT

    @staticmethod
    def twice(value: int) -> int:
        return 2 * value


Counter = ray.remote(Plain)


# ---- refs and generators ---------------------------------------------------------------------------------------------


def test_as_future_is_one_of_asyncios(shared_runtime: None) -> None:
    async def main() -> None:
        assert await add.remote(1).as_future() == 2
        done, pending = await asyncio.wait([add.remote(i).as_future() for i in range(3)], timeout=PATIENCE_S)
        assert sorted(each.result() for each in done) == [1, 2, 3] and not pending

    asyncio.run(main())


def test_cancelling_the_future_leaves_the_task_alone(shared_runtime: None, tmp_path: Any) -> None:
    gate = tmp_path / "open"

    @ray.remote
    def wait() -> str:
        while not gate.exists():
            time.sleep(0.005)
        return "done"

    async def main() -> None:
        ref = wait.remote()
        future = ref.as_future()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(future, 0.01)
        assert future.cancelled()
        gate.touch()
        assert await ref == "done"

    asyncio.run(main())


def test_a_generator_is_finished_when_nothing_is_left_to_take(shared_runtime: None) -> None:
    @ray.remote
    def items(count: int) -> Iterator[int]:
        yield from range(count)

    one = items.remote(1)
    get(one.completed())
    assert not one.is_finished()
    assert get(next(one)) == 0 and one.is_finished()
    with pytest.raises(StopIteration):
        next(one)
    assert one.is_finished()
    assert list(items.remote(0)) == []


# ---- the context -----------------------------------------------------------------------------------------------------


def test_ids_as_objects(shared_runtime: None) -> None:
    context = ray.get_runtime_context()
    assert context.node_id.hex() == context.get_node_id() and context.node_id == context.get_node_id()
    assert context.job_id.hex() == context.get_job_id() and context.worker_id.hex() == context.get_worker_id()
    assert context.node_id.binary().hex() == context.get_node_id() and not context.node_id.is_nil()
    assert context.task_id is None and context.actor_id is None


def test_the_context_as_a_dict(shared_runtime: None) -> None:
    whole = ray.get_runtime_context().get()
    assert set(whole) == {"node_id", "job_id", "namespace"}

    @ray.remote
    def of_task() -> Any:
        return ray.get_runtime_context().get()

    assert set(get(of_task.remote())) == {*whole, "task_id"}
    actor = Counter.remote()
    inside = get(actor.context.remote())[2]
    assert set(inside) == {*whole, "task_id", "actor_id"} and inside["actor_id"] == actor._actor_id.hex()
    assert {name: inside[name] for name in whole} == whole


def test_what_runs_has_two_names(shared_runtime: None) -> None:
    @ray.remote
    def of_task() -> Any:
        context = ray.get_runtime_context()
        return context.get_task_name(), context.get_task_function_name()

    where = "test_what_runs_has_two_names.of_task"
    assert get(of_task.remote()) == (where, f"{__name__}.{where}")
    assert get(of_task.options(name="called").remote()) == ("called", f"{__name__}.{where}")
    assert ray.get_runtime_context().get_task_function_name() is None
    actor = Counter.remote()
    function = f"{__name__}.Plain.context"
    assert get(actor.context.remote())[:2] == ("Plain.context", function)
    assert get(actor.context.options(name="called").remote())[:2] == ("called", function)
    assert get(actor.context.remote())[:2] == ("Plain.context", function)


def test_a_method_with_a_name_is_called_that_in_errors(shared_runtime: None) -> None:
    @ray.remote
    class Named:
        @ray.method(name="the task")
        def fail(self) -> None:
            raise ValueError("no")

    actor = Named.remote()
    with pytest.raises(ValueError, match=r"^the task\(\) raised ValueError: no"):
        get(actor.fail.remote())
    with pytest.raises(ValueError, match=r"^other\(\) raised ValueError: no"):
        get(actor.fail.options(name="other").remote())


def test_the_constructor_has_names_too(shared_runtime: None) -> None:
    @ray.remote
    class Asks:
        def __init__(self) -> None:
            context = ray.get_runtime_context()
            self.names = context.get_task_name(), context.get_task_function_name()

        def get(self) -> Any:
            return self.names

    task, function = get(Asks.remote().get.remote())
    assert task == "Asks.__init__" and function.endswith("Asks.__init__")


def test_the_environment_is_that_of_the_task(shared_runtime: None, tmp_path: Any) -> None:
    @ray.remote
    def of_task() -> Any:
        context = ray.get_runtime_context()
        return context.runtime_env, json.loads(context.get_runtime_env_string())

    environment = {"env_vars": {"COLOUR": "red"}, "working_dir": str(tmp_path)}
    found, text = get(of_task.options(runtime_env=environment).remote())
    assert found == text == environment
    assert ray.get_runtime_context().runtime_env == {}


def test_other_accelerators_than_gpus_are_none(shared_runtime: None) -> None:
    ids = ray.get_runtime_context().get_accelerator_ids()
    assert ids["GPU"] == ids["TPU"] == ids["neuron_cores"] == []


def test_a_threaded_call_can_ask_whether_it_was_cancelled(shared_runtime: None) -> None:
    @ray.remote(max_concurrency=2)
    class Threaded:
        def __init__(self) -> None:
            self.started = threading.Event()
            self.seen = threading.Event()

        def work(self) -> None:
            assert not ray.get_runtime_context().is_canceled()
            self.started.set()
            while not ray.get_runtime_context().is_canceled():
                time.sleep(0.005)
            self.seen.set()

        def wait_started(self) -> bool:
            return self.started.wait(PATIENCE_S)

        def wait_seen(self) -> bool:
            return self.seen.wait(PATIENCE_S)

    actor = Threaded.remote()
    ref = actor.work.remote()
    assert get(actor.wait_started.remote())
    ray.cancel(ref)
    assert get(actor.wait_seen.remote())
    with pytest.raises(ray.TaskCancelledError):
        get(ref)
    assert not ray.get_runtime_context().is_canceled()


# ---- classes and calls -----------------------------------------------------------------------------------------------


def test_what_a_class_has_is_found_through_its_actor_class(shared_runtime: None) -> None:
    assert Counter.LIMIT == 3 and Counter.limit() == 3 and Counter.twice(4) == 8
    assert Counter.__doc__ == Plain.__doc__ and Counter.__qualname__ == "Plain" and Counter.__module__ == __name__
    with pytest.raises(AttributeError, match="the actor class Plain has no attribute 'missing'"):
        Counter.missing  # noqa: B018
    assert not hasattr(Counter, "__len__")

    @ray.remote
    class Sees(Plain):
        def sees(self) -> tuple[int, ...]:
            return Sees.LIMIT, Sees.limit(), Sees.twice(5)

    assert get(Sees.remote().sees.remote()) == (3, 3, 10)


def test_an_attribute_that_is_set_on_an_actor_class_reaches_its_actors(shared_runtime: None) -> None:
    @ray.remote
    class Has:
        SIZE = 1

        def size(self) -> int:
            return self.SIZE

    before = Has.remote()
    assert get(before.size.remote()) == 1
    Has.SIZE = 2
    assert Has.SIZE == 2 and get(Has.remote().size.remote()) == 2
    with pytest.raises(AttributeError, match="'remote' of the actor class Has is afield's own"):
        Has.remote = None  # type: ignore[assignment,method-assign]


def test_a_function_runs_on_an_actor(shared_runtime: None) -> None:
    actor = Counter.remote(3)
    for call in (actor.__ray_call__, actor.__afield_call__):
        assert get(call.remote(lambda self, y, z=0: self.value + y + z, 4, z=1)) == 8

    def change(self: Any) -> None:
        self.value = 10

    get(actor.__ray_call__.remote(change))
    assert get(actor.__ray_call__.remote(lambda self: (type(self).__name__, self.value))) == ("Plain", 10)
    assert get(actor.__ray_call__.options(num_returns=2).remote(lambda self: (1, 2))) == [1, 2]


def test_a_coroutine_function_runs_on_an_async_actor(shared_runtime: None) -> None:
    @ray.remote
    class Async:
        async def ping(self) -> int:
            return 1

    async def twice(self: Any) -> int:
        return int(await self.ping()) + int(await self.ping())

    assert get(Async.remote().__ray_call__.remote(twice)) == 2


def test_the_decorator_with_empty_parentheses(shared_runtime: None) -> None:
    @ray.remote()
    def one() -> int:
        return 1

    @ray.remote()
    class Has:
        def one(self) -> int:
            return 1

    assert get([one.remote(), Has.remote().one.remote()]) == [1, 1]


def test_options_beside_the_arguments(shared_runtime: None) -> None:
    assert get(add._remote([1])) == 2 and get(add._remote(args=[1], kwargs={"b": 5}, num_cpus=0.5)) == 6
    assert add._remote([1], num_returns=0) is None
    actor = Counter._remote(args=[5], kwargs={}, num_cpus=0)
    name, *_ = get(actor.context._remote(name="called"))
    assert name == "called"
    assert get(actor.several._remote(num_returns=3)) == [0, 1, 2]


def test_wrong_arguments_are_of_either_kind(shared_runtime: None) -> None:
    for kind in (ValueError, TypeError):
        for wrong in (
            lambda: ray.kill("x"),
            lambda: ray.get(3),
            lambda: ray.cancel(1),
            lambda: ray.wait(1),
            lambda: ray.get([1]),
        ):
            with pytest.raises(kind):
                wrong()
        with pytest.raises(kind):
            ray.put(ray.put(1))


def test_what_init_tells(no_runtime: None) -> None:
    with ray.init(num_cpus=1) as info:
        assert info["node_id"] == info.address_info["node_id"] == ray.get_runtime_context().get_node_id()
        assert info.address_info["node_ip_address"] == ray.util.get_node_ip_address()
    info = ray.init(num_cpus=1)
    info.disconnect()
    assert not ray.is_initialized()
