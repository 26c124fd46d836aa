"""What a program can ask about itself: `get_runtime_context()` and `get_gpu_ids()`, in drivers, tasks and actors."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

import afield
from tests.helpers import poll

PATIENCE_S = 30.0


def get(refs: Any) -> Any:
    return afield.get(refs, timeout=PATIENCE_S)


def is_id(text: Any) -> bool:
    return isinstance(text, str) and len(text) >= 16 and set(text) <= set("0123456789abcdef")


def test_in_a_driver(no_runtime: None) -> None:
    afield.init(num_cpus=1, namespace="far")
    context = afield.get_runtime_context()
    assert is_id(context.get_job_id()) and is_id(context.get_node_id()) and is_id(context.get_worker_id())
    assert set(context.get_node_id()) != {"0"}
    assert context.namespace == "far"
    assert context.get_task_id() is context.get_task_name() is None
    assert context.get_actor_id() is context.get_actor_name() is None
    assert not context.was_current_actor_reconstructed
    assert context.get_assigned_resources() == {}
    assert context.get_accelerator_ids()["GPU"] == []
    assert afield.get_gpu_ids() == []


def test_asking_starts_the_runtime_and_a_context_outlives_none(no_runtime: None) -> None:
    afield.init(num_cpus=1)
    context = afield.get_runtime_context()
    first = context.get_job_id(), context.get_node_id()
    afield.shutdown()
    for ask in (context.get_job_id, context.get_worker_id, context.get_task_id, context.get_assigned_resources):
        with pytest.raises(afield.NotInitializedError, match=r"call afield.init\(\)"):
            ask()
    assert not afield.is_initialized()
    afield.get_runtime_context()  # starts one again
    assert context.get_job_id() != first[0] and context.get_node_id() != first[1]


def test_in_a_task(shared_runtime: None) -> None:
    @afield.remote
    def look() -> dict[str, Any]:
        context = afield.get_runtime_context()
        return {
            "job": context.get_job_id(),
            "node": context.get_node_id(),
            "worker": context.get_worker_id(),
            "task": context.get_task_id(),
            "name": context.get_task_name(),
            "actor": (context.get_actor_id(), context.get_actor_name(), context.was_current_actor_reconstructed),
            "namespace": context.namespace,
            "resources": context.get_assigned_resources(),
        }

    here = afield.get_runtime_context()
    ref = look.options(name="the name", num_cpus=0.25, memory="1MiB").remote()
    found = get(ref)
    assert (found["job"], found["node"], found["namespace"]) == (here.get_job_id(), here.get_node_id(), here.namespace)
    assert is_id(found["worker"]) and found["worker"] != here.get_worker_id()
    assert is_id(found["task"]) and ref.hex().startswith(found["task"])
    assert found["name"] == "the name"
    assert found["actor"] == (None, None, False)
    assert found["resources"] == {"CPU": 0.25, "memory": float(1 << 20)}
    assert get(look.remote())["name"] == "test_in_a_task.look"
    assert get(look.remote())["resources"] == {"CPU": 1.0}


def test_one_worker_s_leases_of_different_shapes(no_runtime: None) -> None:
    afield.init(num_cpus=1, resources={"x": 1})

    @afield.remote
    def look() -> tuple[int, dict[str, float]]:
        return os.getpid(), afield.get_runtime_context().get_assigned_resources()

    found = [get(look.options(resources={"x": amount}).remote()) for amount in (0.5, 0.25, 0.5)]
    assert [amounts["x"] for _, amounts in found] == [0.5, 0.25, 0.5]
    assert len({pid for pid, _ in found}) == 1


def make_actor_class() -> Any:
    """Return an actor class that says what it finds; made in each test, so that it ends with its session."""

    @afield.remote
    class Actor:
        """Says what it finds."""

        def __init__(self) -> None:
            context = afield.get_runtime_context()
            self.born = context.get_task_name(), context.get_actor_id(), context.get_assigned_resources()

        def look(self) -> tuple[Any, ...]:
            context = afield.get_runtime_context()
            return self.born, context.get_task_name(), context.get_actor_id(), context.get_actor_name()

        def was_reconstructed(self) -> bool:
            return afield.get_runtime_context().was_current_actor_reconstructed

        def pid(self) -> int:
            return os.getpid()

        def gpus(self) -> tuple[list[int], dict[str, list[str]], dict[str, float]]:
            context = afield.get_runtime_context()
            return afield.get_gpu_ids(), context.get_accelerator_ids(), context.get_assigned_resources()

        async def task_id(self) -> str | None:
            return afield.get_runtime_context().get_task_id()

    return Actor


def test_in_an_actor(shared_runtime: None) -> None:
    actor_class = make_actor_class()
    actor = actor_class.options(name="somebody", num_cpus=0.5).remote()
    born, task_name, actor_id, name = get(actor.look.remote())
    assert is_id(actor_id) and name == "somebody" and task_name == "Actor.look"
    assert born == ("Actor.__init__", actor_id, {"CPU": 0.5})
    assert get(actor_class.remote().look.remote())[3] == ""


def test_an_actor_knows_that_it_was_restarted(shared_runtime: None) -> None:
    actor_class = make_actor_class()
    actor = actor_class.options(max_restarts=1, max_task_retries=-1).remote()
    assert get(actor.was_reconstructed.remote()) is False
    os.kill(get(actor.pid.remote()), signal.SIGKILL)
    assert poll(lambda: get(actor.was_reconstructed.remote()))


def test_each_call_of_an_async_actor_has_its_own_task_id(shared_runtime: None) -> None:
    actor_class = make_actor_class()
    actor = actor_class.remote()
    refs = [actor.task_id.remote() for _ in range(8)]
    for ref, task_id in zip(refs, get(refs), strict=True):
        assert is_id(task_id) and ref.hex().startswith(task_id)


# -- devices ------------------------------------------------------------------------------------------------------


def test_devices_have_the_node_s_numbers(no_runtime: None) -> None:
    actor_class = make_actor_class()
    afield.init(num_cpus=4, devices="emulated:3")

    @afield.remote(num_gpus=2)
    def two() -> tuple[list[int], dict[str, list[str]]]:
        return afield.get_gpu_ids(), afield.get_runtime_context().get_accelerator_ids()

    first = actor_class.options(num_gpus=1).remote()
    ids, accelerators, resources = get(first.gpus.remote())
    assert len(ids) == 1 and len(accelerators["GPU"]) == 1 and resources == {"GPU": 1.0}
    others, uuids = get(two.remote())
    assert sorted(ids + others) == [0, 1, 2]
    assert len({*accelerators["GPU"], *uuids["GPU"]}) == 3
    for number, uuid in zip(ids + others, accelerators["GPU"] + uuids["GPU"], strict=True):
        assert uuid.startswith(f"EMU-{number:04d}")


def test_a_fraction_names_the_device_that_it_shares(shared_runtime: None) -> None:
    actor_class = make_actor_class()
    actors = [actor_class.options(num_gpus=0.5).remote() for _ in range(2)]
    found = get([actor.gpus.remote() for actor in actors])
    assert found[0][0] == found[1][0] and len(found[0][0]) == 1
    assert found[0][2] == {"GPU": 0.5}
    numbers, accelerators, resources = get(actor_class.remote().gpus.remote())
    assert numbers == [] and resources == {} and set(map(len, accelerators.values())) == {0}
