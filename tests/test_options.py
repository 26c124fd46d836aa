"""Options of tasks and actors by behaviour: amounts are counted exactly, strategies are checked, names are used."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import afield
from afield.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tests.helpers import poll

PATIENCE_S = 30.0


def get(refs: Any) -> Any:
    return afield.get(refs, timeout=PATIENCE_S)


def holder() -> Any:
    """Return an actor class; made in each test, so that it ends with its session."""

    @afield.remote
    class Holder:
        """Holds what it was given."""

        def ready(self) -> bool:
            return True

    return Holder


def hold(**options: Any) -> Any:
    """Return an actor that holds these resources by now."""
    actor = holder().options(**options).remote()
    assert get(actor.ready.remote())
    return actor


def available(name: str) -> float:
    return afield.available_resources().get(name, 0.0)


# -- amounts ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fractions_are_counted_exactly(no_runtime: None) -> None:
    afield.init(num_cpus=1, devices="emulated:1", resources={"x": 0.3})
    held = [hold(num_cpus=0.1, num_gpus=0.1, resources={"x": 0.03}) for _ in range(10)]
    assert [available(name) for name in ("CPU", "GPU", "x")] == [0.0, 0.0, 0.0]
    one_more = holder().options(num_cpus=0.0001).remote()
    ready = one_more.ready.remote()
    assert afield.wait([ready], timeout=0.1)[0] == []
    afield.kill(held.pop())
    assert get(ready)
    assert available("CPU") == 0.0999 and available("GPU") == 0.1 and available("x") == 0.03
    for actor in [*held, one_more]:
        afield.kill(actor)
    assert poll(lambda: (available("CPU"), available("GPU"), available("x")) == (1.0, 1.0, 0.3))


def test_sums_and_numpy_numbers_are_amounts(no_runtime: None) -> None:
    afield.init(num_cpus=np.int64(1), resources={"x": np.float64(0.1) + 0.2})
    assert afield.cluster_resources()["x"] == 0.3
    actor = hold(num_cpus=np.float64(0.5), resources={"x": 0.1 + 0.2})
    assert (available("CPU"), available("x")) == (0.5, 0.0)
    afield.kill(actor)


def test_memory_is_accounted(shared_runtime: None) -> None:
    total = afield.cluster_resources()["memory"]
    before = available("memory")
    actor = hold(memory=3 << 20)
    assert available("memory") == before - (3 << 20)
    afield.kill(actor)
    assert poll(lambda: available("memory") == before)
    for far_too_much in (lambda: holder().options(memory=int(total) * 2).remote().ready.remote(),):
        with pytest.raises(afield.ActorUnschedulableError, match="not enough memory"):
            get(far_too_much())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_cpus": 0.00001}, "num_cpus=1e-05 has more than 4 decimals"),
        ({"num_cpus": -1}, "num_cpus=-1 is negative"),
        ({"num_cpus": True}, "num_cpus=True: expected a number"),
        ({"num_cpus": "1"}, "num_cpus='1': expected a number"),
        ({"num_cpus": float("nan")}, "expected a finite number"),
        ({"num_gpus": 1.5}, "above 1 only whole numbers"),
        ({"memory": "much"}, "memory='much'"),
        ({"memory": -1}, "memory=-1"),
        ({"resources": {"CPU": 1}}, "use num_cpus= for the built-in CPU"),
        ({"resources": {"x": 0.12345}}, "more than 4 decimals"),
        ({"resources": ["x"]}, "expected a dict of names and amounts"),
        ({"num_cpu": 1}, "no option 'num_cpu'; did you mean 'num_cpus'"),
        ({"name": 7}, "name=7 is not valid; expected a string"),
        ({"scheduling_strategy": "SPRAED"}, "expected 'DEFAULT', 'SPREAD' or a NodeAffinitySchedulingStrategy"),
        ({"scheduling_strategy": NodeAffinitySchedulingStrategy}, "expected 'DEFAULT', 'SPREAD' or"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    def plain() -> None:
        """A task."""

    for wrong in (
        lambda: afield.remote(**options)(plain),
        lambda: afield.remote(plain).options(**options),
        lambda: holder().options(**options),
    ):
        with pytest.raises(afield.InvalidOptionError, match=message):
            wrong()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_gpus": "1"}, "num_gpus='1': expected a number"),
        ({"num_gpus": -1}, "num_gpus=-1 is negative"),
        ({"num_cpus": 0.00001}, "more than 4 decimals"),
        ({"resources": {"x": -1}}, "is negative"),
    ],
)
def test_wrong_amounts_for_init(no_runtime: None, options: dict[str, Any], message: str) -> None:
    with pytest.raises(afield.InvalidOptionError, match=message):
        afield.init(**options)
    assert not afield.is_initialized()


# -- names --------------------------------------------------------------------------------------------------------


def test_a_task_s_name_is_in_its_errors(shared_runtime: None) -> None:
    @afield.remote(name="the divider")
    def divide() -> float:
        return 1 / 0

    with pytest.raises(ZeroDivisionError, match="the divider"):
        get(divide.remote())


# -- strategies ---------------------------------------------------------------------------------------------------


def strategies() -> list[Any]:
    """Return all that come to the same on one node."""
    here = afield.get_runtime_context().get_node_id()
    return [
        None,
        "DEFAULT",
        "SPREAD",
        NodeAffinitySchedulingStrategy(here, soft=False),
        NodeAffinitySchedulingStrategy(node_id=here, soft=True),
        NodeAffinitySchedulingStrategy("00ff", soft=True),
    ]


def test_on_one_node_all_strategies_are_the_same(shared_runtime: None) -> None:
    @afield.remote
    def where() -> str:
        return afield.get_runtime_context().get_node_id()

    here = afield.get_runtime_context().get_node_id()
    for strategy in strategies():
        assert get(where.options(scheduling_strategy=strategy).remote()) == here
        actor = holder().options(scheduling_strategy=strategy).remote()
        assert get(actor.ready.remote())


def test_a_hard_affinity_to_an_unknown_node(shared_runtime: None, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    elsewhere = NodeAffinitySchedulingStrategy("00ff", soft=False)
    task = afield.remote(scheduling_strategy=elsewhere)(ran.touch)
    here = afield.get_runtime_context().get_node_id()
    message = f"asked for the node 00ff, which is not part of this cluster .*{here}.*or pass soft=True"
    for ref in [task.remote(), task.remote()]:
        with pytest.raises(afield.TaskUnschedulableError, match=message):
            get(ref)
    actor = holder().options(scheduling_strategy=elsewhere).remote()
    with pytest.raises(afield.ActorUnschedulableError, match=f"Holder: {message}"):
        get(actor.ready.remote())
    assert not ran.exists()


@pytest.mark.parametrize("node_id", ["", "here", "00FF", None, b"00ff", 7])
def test_what_is_no_node_s_id(node_id: Any) -> None:
    with pytest.raises(afield.InvalidOptionError, match=r"take it from afield.get_runtime_context\(\).get_node_id\(\)"):
        NodeAffinitySchedulingStrategy(node_id)


def test_soft_is_true_or_false() -> None:
    with pytest.raises(afield.InvalidOptionError, match="soft='no': expected True or False"):
        NodeAffinitySchedulingStrategy("00ff", soft="no")  # type: ignore[arg-type]


def test_what_is_used_up_is_not_available(no_runtime: None) -> None:
    afield.init(num_cpus=1, resources={"x": 2})

    class Local:
        def here(self) -> dict[str, float]:
            return afield.available_resources()

    actor = afield.remote(Local).options(num_cpus=1, resources={"x": 1}).remote()
    available = afield.get(actor.here.remote(), timeout=30)
    assert "CPU" not in available and available["x"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"namespace": 123}, "namespace=123.*expected a string"),
        ({"address": 5}, "address=5.*expected a string"),
        ({"spill_dir": 3}, "spill_dir=3.*expected the path"),
        ({"log_to_driver": "no"}, "log_to_driver='no'.*expected True or False"),
        ({"resources": [("x", 1)]}, "resources=.*expected a dict"),
        ({"host_memory": 1 << 60}, "more than the .* of memory that may be used here"),
    ],
)
def test_wrong_kinds_for_init(no_runtime: None, options: dict[str, Any], message: str) -> None:
    with pytest.raises(afield.InvalidOptionError, match=message):
        afield.init(**options)
    assert not afield.is_initialized()


def test_the_port_of_a_dashboard_that_is_not_there_is_of_no_matter(no_runtime: None) -> None:
    with afield.init(num_cpus=1, dashboard_port=8266):
        assert afield.is_initialized()


def test_whole_numbers_of_numpy_s(shared_runtime: None) -> None:
    @afield.remote(max_retries=np.int64(2), num_returns=np.int32(2))
    def pair() -> tuple[int, int]:
        return 1, 2

    class Local:
        @afield.method(num_returns=np.int64(2))
        def pair(self) -> tuple[int, int]:
            return 3, 4

    actor = afield.remote(max_concurrency=np.int64(2), concurrency_groups={"g": np.int64(1)})(Local).remote()
    assert afield.get([*pair.remote(), *actor.pair.remote()], timeout=30) == [1, 2, 3, 4]
    refs = [afield.put(1), afield.put(2)]
    assert afield.wait(refs, num_returns=np.int64(2)) == (refs, [])  # type: ignore[call-overload]


@pytest.mark.parametrize("timeout", [float("nan"), np.float64("nan")])
def test_a_timeout_that_is_no_number(shared_runtime: None, timeout: float) -> None:
    ref = afield.put(1)
    for wait in (afield.get, lambda ref, timeout: afield.wait([ref], timeout=timeout)):
        with pytest.raises(ValueError, match=r"timeout=.*nan"):
            wait(ref, timeout=timeout)
        with pytest.raises(TypeError, match=r"timeout=.1.*expected seconds"):
            wait(ref, timeout="1")


@pytest.mark.parametrize("timeout", [timedelta(seconds=20), np.float32(20), np.int64(20), 20])
def test_timeouts(shared_runtime: None, timeout: Any) -> None:
    ref = afield.put(1)
    assert afield.get(ref, timeout=timeout) == 1 and afield.wait([ref], timeout=timeout) == ([ref], [])


def test_parameters_may_have_any_name(shared_runtime: None) -> None:
    @afield.remote
    def f(self: int) -> int:
        return self

    class Local:
        def __init__(this, self: int) -> None:  # noqa: N805
            this.x = self

        def get(this, self: int) -> int:  # noqa: N805
            return this.x + self

    actor = afield.remote(Local).remote(self=1)
    assert afield.get([f.remote(self=1), actor.get.remote(self=2)], timeout=30) == [1, 3]


def test_what_can_be_no_task_and_no_base() -> None:
    async def items() -> Any:
        yield 1

    with pytest.raises(afield.InvalidOptionError, match=r"items\(\) is `async def`"):
        afield.remote(items)

    @afield.remote
    class Base:
        pass

    with pytest.raises(TypeError, match="Base is an actor class, and cannot be derived from"):

        class Derived(Base):
            pass


@pytest.mark.parametrize("arguments", [(3,), ("x", 3)])
def test_names_of_actors_are_text(shared_runtime: None, arguments: Any) -> None:
    with pytest.raises(TypeError, match="=3 is a int; expected a string"):
        afield.get_actor(*arguments)


@pytest.mark.parametrize("option", ["name", "namespace"])
def test_an_actor_has_no_empty_name(option: str) -> None:
    with pytest.raises(
        afield.InvalidOptionError, match=f"{option}='' is not valid; expected a string that is not empty"
    ):
        holder().options(**{"name": "x", option: ""})


NOTHING_ASKED: list[tuple[str, Any]] = [
    ("accelerator_type", None),
    ("label_selector", {}),
    ("placement_group", "default"),
    ("placement_group", None),
    ("placement_group_bundle_index", -1),
    ("enable_task_events", True),
    ("allow_out_of_order_execution", True),
    ("_metadata", {}),
]


@pytest.mark.parametrize(("name", "value"), NOTHING_ASKED)
def test_options_of_ray_that_ask_for_nothing_missing(shared_runtime: None, name: str, value: Any) -> None:
    @afield.remote(**{name: value})
    def plain() -> int:
        return 1

    assert get([plain.remote(), plain.options(**{name: value}).remote()]) == [1, 1]
    assert get(holder().options(**{name: value}).remote().ready.options(**{name: value}).remote())


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("accelerator_type", "H100", "use num_gpus="),
        ("label_selector", {"zone": "a"}, "use resources="),
        ("placement_group", object(), "no placement groups"),
        ("placement_group_bundle_index", 0, "no placement groups"),
        ("placement_group_capture_child_tasks", 0, "no placement groups"),
        ("allow_out_of_order_execution", False, "calls keep their order where one runs at a time"),
        ("tensor_transport", "nccl", "stay on their device"),
    ],
)
def test_options_of_ray_that_ask_for_something_missing(name: str, value: Any, why: str) -> None:
    with pytest.raises(afield.InvalidOptionError, match=f"{name}=.* is not supported: .*{why}"):
        holder().options(**{name: value})
