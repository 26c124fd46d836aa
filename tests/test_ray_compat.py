"""Programs written for Ray's core API mean the same after `import afield as ray`: corners that such programs lean on."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import afield as ray
import afield.util
from afield import actor as ray_actor
from afield import exceptions
from tests.helpers import poll

PATIENCE_S = 30.0


def get(refs: Any) -> Any:
    return ray.get(refs, timeout=PATIENCE_S)


# ---- what `import afield as ray` has ---------------------------------------------------------------------------------


def test_the_names_that_except_clauses_use() -> None:
    assert exceptions.RayError is ray.AfieldError and exceptions.RayTaskError is ray.TaskError
    assert exceptions.RaySystemError is ray.InternalError
    assert exceptions.NodeDiedError is exceptions.LocalRayletDiedError is ray.RuntimeDiedError
    assert exceptions.ObjectReconstructionFailedError is ray.ObjectLostError
    assert exceptions.PendingCallsLimitExceeded is ray.PendingCallsLimitExceededError
    for kind in (ray.ActorDiedError, ray.ActorUnavailableError, exceptions.ActorConstructionError):
        assert issubclass(kind, exceptions.RayActorError)
    assert not issubclass(ray.WorkerCrashedError, exceptions.RayActorError)
    assert issubclass(ray.AlreadyInitializedError, RuntimeError)


def test_the_module_of_actors() -> None:
    assert ray.actor is ray_actor and ray.actor.ActorHandle is ray.ActorHandle
    assert ray.actor.exit_actor is ray.exit_actor


def test_a_ref_can_be_subscripted_in_annotations() -> None:
    def f(ref: ray.ObjectRef[int]) -> None: ...  # type: ignore[type-arg]

    assert str(ray.ObjectRef[int]).endswith("ObjectRef[int]")  # type: ignore[misc]


def test_what_init_takes_from_ray(no_runtime: None, tmp_path: Path) -> None:
    with ray.init(
        num_cpus=1,
        object_store_memory=64 << 20,
        _temp_dir=str(tmp_path),
        include_dashboard=False,
        dashboard_host="127.0.0.1",
        logging_level="ERROR",
        configure_logging=True,
        local_mode=False,
        _system_config=None,
    ) as info:
        assert info.host_memory == 64 << 20 and any(tmp_path.iterdir())
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ({"include_dashboard": True}, "no dashboard"),
        ({"local_mode": True}, "__wrapped__"),
        ({"num_cpu": 1}, "did you mean 'num_cpus'"),
        ({"bogus": 1}, "leave it out"),
        ({"object_store_memory": "much"}, "host_memory='much'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_init_refuses(no_runtime: None, argument: dict[str, Any], hint: str) -> None:
    with pytest.raises(ray.InvalidOptionError, match=hint):
        ray.init(**argument)
    assert not ray.is_initialized()


# ---- tasks and values ------------------------------------------------------------------------------------------------


def test_a_wrong_call_fails_where_it_is_made(shared_runtime: None) -> None:
    @ray.remote
    def f(a: int, b: int = 2, *, c: int) -> int:
        return a + b + c

    class A:
        def f(self, a: int, /, b: int = 2) -> int:
            return a + b

        @staticmethod
        def g(a: int) -> int:
            return a

        @classmethod
        def h(cls, a: int) -> int:
            return a

    a = ray.remote(A).remote()
    remotes: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = [
        (f.remote, (1,), {}),
        (f.remote, (1, 2, 3), {}),
        (f.remote, (1,), {"c": 3, "d": 4}),
        (a.f.remote, (), {}),
        (a.f.remote, (), {"a": 1}),
        (a.g.remote, (1, 2), {}),
        (a.h.remote, (), {}),
        (get(ray.put([a]))[0].f.remote, (1, 2, 3), {}),
    ]
    for remote, args, kwargs in remotes:
        with pytest.raises(TypeError, match=r"\(\): "):
            remote(*args, **kwargs)
    right = [f.remote(1, c=3), f.remote(b=1, a=ray.put(1), c=3), a.f.remote(1), a.f.remote(1, b=5), a.g.remote(a=1)]
    assert get([*right, a.h.remote(7)]) == [6, 5, 3, 6, 1, 7]


def test_a_coroutine_function_is_no_task() -> None:
    async def f() -> None: ...

    with pytest.raises(ValueError, match="async def"):
        ray.remote(f)


def test_what_is_remote_already_is_refused() -> None:
    with pytest.raises(TypeError, match="remote already"):
        ray.remote(ray.remote(lambda: 1))


def test_a_generator_with_several_returns(shared_runtime: None) -> None:
    @ray.remote(num_returns=2)
    def pair(count: int) -> Iterator[Any]:
        for i in range(count):
            yield np.full(3, i)

    first, second = pair.remote(2)
    assert get(first).tolist() == [0, 0, 0] and get(second).tolist() == [1, 1, 1]
    first, second = pair.remote(9)  # it ends after the second
    assert get(first).tolist() == [0, 0, 0] and get(second).tolist() == [1, 1, 1]
    first, second = pair.remote(1)
    assert get(first).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="1"):
        get(second)


def test_a_dynamic_generator_is_got_and_iterated(shared_runtime: None) -> None:
    @ray.remote(num_returns="dynamic")
    def count(n: int) -> Iterator[int]:
        yield from range(n)

    assert [get(ref) for ref in ray.get(count.remote(3))] == [0, 1, 2]


def test_a_value_that_contains_itself(shared_runtime: None) -> None:
    own: list[Any] = []
    own.append(own)
    again = get(ray.put(own))
    assert again[0] is again
    wide: Any = 1
    for _ in range(12):
        wide = [wide] * 64  # few objects, but 64**12 paths to them
    assert len(get(ray.put(wide))) == 64


def test_wait_with_nothing_to_wait_for(shared_runtime: None) -> None:
    assert ray.wait([]) == ([], [])
    with pytest.raises(ValueError, match="less than 0"):
        ray.wait([ray.put(1)], timeout=-1)


# ---- actors ----------------------------------------------------------------------------------------------------------


def test_special_methods_of_a_class_are_methods_of_its_actor(shared_runtime: None) -> None:
    class Box:
        def __len__(self) -> int:
            return 3

        def __call__(self, x: int) -> int:
            return x

        def __enter__(self) -> str:
            return "in"

    box = ray.remote(Box).remote()
    assert get([box.__len__.remote(), box.__call__.remote(4), box.__enter__.remote()]) == [3, 4, "in"]


def test_an_actor_knows_itself(shared_runtime: None) -> None:
    class A:
        def __init__(self) -> None:
            self.n = 0

        def inc(self) -> int:
            self.n += 1
            return self.n

        def me(self) -> Any:
            return ray.get_runtime_context().current_actor

        def again(self) -> Any:
            return ray.get_runtime_context().current_actor.inc.remote()

    a = ray.remote(A).remote()
    assert get(get(a.me.remote()).inc.remote()) == 1
    assert get(get(a.again.remote())) == 2
    assert get(a.me.remote()) == a
    with pytest.raises(RuntimeError):
        _ = ray.get_runtime_context().current_actor


def test_exceptions_that_a_method_wants_retried(shared_runtime: None) -> None:
    class Flaky:
        def __init__(self) -> None:
            self.calls = 0

        @ray.method(max_task_retries=3, retry_exceptions=[KeyError])
        def listed(self) -> int:
            self.calls += 1
            if self.calls < 3:
                raise KeyError(self.calls)
            return self.calls

        @ray.method(max_task_retries=3, retry_exceptions=[ValueError])
        def other(self) -> None:
            raise KeyError

    a = ray.remote(Flaky).options(name="flaky").remote()
    assert get(a.listed.remote()) == 3
    with pytest.raises(KeyError):
        get(ray.get_actor("flaky").other.remote())


def test_a_concurrency_group_must_be_declared(shared_runtime: None) -> None:
    class A:
        @ray.method(concurrency_group="io")
        def f(self) -> int:
            return 1

    with pytest.raises(ray.InvalidOptionError, match="'io'"):
        ray.remote(A).remote()
    a = ray.remote(concurrency_groups={"io": 1})(A).remote()
    assert get(a.f.remote()) == 1
    with pytest.raises(ray.InvalidOptionError, match="'oi'"):
        a.f.options(concurrency_group="oi")


def test_names_of_actors(shared_runtime: None) -> None:
    class A:
        def f(self) -> int:
            return 1

    with pytest.raises(ValueError, match="name"):
        ray.remote(A).options(get_if_exists=True).remote()
    with pytest.raises(ValueError, match="name"):
        ray.remote(A).options(name="")
    a = ray.remote(A).options(name="listed", namespace="elsewhere").remote()
    assert get(a.f.remote()) == 1
    assert "listed" not in afield.util.list_named_actors()
    assert {"namespace": "elsewhere", "name": "listed"} in afield.util.list_named_actors(all_namespaces=True)


def test_calls_after_an_actor_has_left_fail(shared_runtime: None) -> None:
    class A:
        def nap(self) -> None:
            time.sleep(0.1)

        def leave(self) -> None:
            ray.actor.exit_actor()

        def f(self) -> int:
            return 1

    a = ray.remote(A).remote()
    before, _, after = a.f.remote(), a.leave.remote(), [a.f.remote() for _ in range(3)]
    assert get(before) == 1
    for ref in after:
        with pytest.raises(exceptions.RayActorError):
            get(ref)


# ---- actors whose constructor's arguments are not there yet ----------------------------------------------------------


@ray.remote
def after(wait_s: float, value: Any) -> Any:
    time.sleep(wait_s)
    if isinstance(value, Exception):
        raise value
    return value


class Holder:
    """Keeps what it is constructed with, and leaves a mark."""

    def __init__(self, value: Any, mark: Path | None = None) -> None:
        self.value = value
        if mark is not None:
            mark.touch()

    def read(self) -> Any:
        return self.value


@ray.remote
def read(holder: Any) -> Any:
    return get(holder.read.remote())


def test_others_call_an_actor_before_it_is_created(runtime: ray.ClusterInfo) -> None:
    holder = ray.remote(Holder).options(name="soon").remote(after.remote(0.3, 5))

    @ray.remote
    def read_named() -> Any:
        return get(ray.get_actor("soon").read.remote())

    assert get([read.remote(holder), read_named.remote()]) == [5, 5]


def test_a_failed_argument_of_a_constructor_is_told_to_every_caller(runtime: ray.ClusterInfo) -> None:
    holder = ray.remote(Holder).options(name="never").remote(after.remote(0.3, KeyError("k")))
    for ref in (read.remote(holder), holder.read.remote()):
        with pytest.raises(KeyError) as caught:
            get(ref)
        assert isinstance(caught.value, exceptions.RayActorError)
    with pytest.raises(ValueError, match="no living actor"):
        ray.get_actor("never")
    assert get(ray.remote(Holder).options(name="never").remote(1).read.remote()) == 1


def test_an_actor_that_is_ended_before_it_is_created_never_is(runtime: ray.ClusterInfo, tmp_path: Path) -> None:
    value = after.remote(0.3, 1)
    killed = ray.remote(Holder).remote(value, tmp_path / "killed")
    ray.kill(killed)
    dropped = ray.remote(Holder).remote(value, tmp_path / "dropped")
    del dropped
    for ref in (read.remote(killed), killed.read.remote()):
        with pytest.raises(exceptions.RayActorError, match="ended by kill"):
            get(ref)
    assert get(ray.remote(Holder).remote(value).read.remote()) == 1
    assert not poll(lambda: list(tmp_path.iterdir()), timeout_s=0.2)


@pytest.mark.usefixtures("shared_runtime")
def test_the_one_node() -> None:
    (node,) = ray.nodes()
    assert node["Alive"]
    assert node["NodeID"] == ray.get_runtime_context().get_node_id()
    assert node["Resources"] == ray.cluster_resources()
    assert get(ray.remote(ray.nodes).remote()) == [node]


@pytest.mark.usefixtures("shared_runtime")
def test_a_generator_without_a_bound() -> None:
    """-1 takes the bound of a method away, too."""

    @ray.remote(_generator_backpressure_num_objects=-1)
    def plain() -> Iterator[int]:
        yield from range(5)

    @ray.remote
    class Actor:
        @ray.method(_generator_backpressure_num_objects=1)
        def items(self, path: str) -> Iterator[int]:
            yield from range(5)
            Path(path).touch()

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "ended")
        items = Actor.remote().items.options(_generator_backpressure_num_objects=-1).remote(str(path))
        get(items.completed())  # though nobody took an item
        assert path.exists()
        assert get(list(items)) == list(range(5))
    assert get(list(plain.remote())) == list(range(5))
    for wrong in (0, -2, 1.5):
        with pytest.raises(ray.exceptions.InvalidOptionError, match="or -1 for no bound"):
            plain.options(_generator_backpressure_num_objects=wrong)


THREADS = """
import os, subprocess, sys
import afield as ray

ray.init(num_cpus=4, object_store_memory=64e6)

@ray.remote
def seen():
    program = "import os; print(os.environ['OMP_NUM_THREADS'])"
    return os.environ["OMP_NUM_THREADS"] + subprocess.check_output([sys.executable, "-c", program], text=True).strip()

@ray.remote
class Actor:
    def seen(self):
        return os.environ["OMP_NUM_THREADS"]

own = {"env_vars": {"OMP_NUM_THREADS": "7"}}
calls = [seen.remote(), seen.options(num_cpus=3).remote(), seen.options(num_cpus=0.5).remote(), seen.remote()]
calls += [Actor.remote().seen.remote(), Actor.options(num_cpus=2).remote().seen.remote()]
calls += [seen.options(num_cpus=3, runtime_env=own).remote()]
print(*ray.get(calls))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("own", "expected"), [(None, "11 33 11 11 1 2 77"), ("5", "55 55 55 55 5 5 77")])
def test_threads_follow_the_cpus_unless_the_user_says(own: str | None, expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if own is not None:
        environment["OMP_NUM_THREADS"] = own
    command = [sys.executable, "-c", THREADS]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert output.stdout.split() == expected.split()
