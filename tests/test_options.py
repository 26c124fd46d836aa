"""Options of tasks and actors by behaviour: amounts are counted exactly, strategies are checked, names are used."""

from __future__ import annotations

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
    return afield.available_resources()[name]


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
