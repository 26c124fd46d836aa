"""The joblib backend and the Dask scheduler by behaviour, and without their partners."""

from __future__ import annotations

import multiprocessing
import operator
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import dask
import dask.array as da
import dask.callbacks
import dask.diagnostics
import joblib
import numpy as np
import pytest

import afield
from afield.libraries.joblib_backend import SHARED_BYTES
from afield.util.dask import (
    ProgressBarCallback,
    RayDaskCallback,
    dask_get,
    disable_dask_on_ray,
    enable_dask_on_ray,
    ray_dask_get,
)
from afield.util.joblib import register_joblib, register_ray

pytestmark = pytest.mark.usefixtures("shared_runtime")


# -- joblib -------------------------------------------------------------------------------------------------------


@pytest.fixture
def backend() -> Iterator[None]:
    register_joblib()
    with joblib.parallel_config("afield", n_jobs=2):
        yield


@pytest.mark.contract("joblib")
@pytest.mark.usefixtures("backend")
def test_parallel_runs_elsewhere_and_keeps_the_order() -> None:
    results = joblib.Parallel()(joblib.delayed(lambda x: (x, os.getpid()))(x) for x in range(20))
    assert [x for x, _ in results] == list(range(20))
    assert os.getpid() not in {pid for _, pid in results}


@pytest.mark.contract("joblib")
@pytest.mark.usefixtures("backend")
def test_parallel_shares_large_arrays() -> None:
    large = np.arange(SHARED_BYTES // 8, dtype=np.int64)
    small = np.arange(10)

    def look(pair: dict[str, Any]) -> tuple[int, bool, int]:
        return int(pair["large"].sum()), pair["large"].flags.writeable, int(pair["small"].sum())

    before = afield.stats(local=True)["bytes_copied_in"]
    results = joblib.Parallel(batch_size=1)(joblib.delayed(look)({"large": large, "small": small}) for _ in range(8))
    assert results == [(int(large.sum()), False, 45)] * 8
    copied = afield.stats(local=True)["bytes_copied_in"] - before
    assert copied < 2 * large.nbytes


@pytest.mark.contract("joblib")
@pytest.mark.usefixtures("backend")
def test_parallel_passes_errors_on_and_can_be_used_again() -> None:
    with joblib.Parallel() as parallel:
        with pytest.raises(ZeroDivisionError):
            parallel(joblib.delayed(divmod)(1, x) for x in (1, 0, 1))
        assert parallel(joblib.delayed(abs)(-x) for x in range(3)) == [0, 1, 2]


@pytest.mark.contract("joblib")
@pytest.mark.usefixtures("backend")
def test_parallel_yields_as_they_come() -> None:
    results = joblib.Parallel(return_as="generator", batch_size=1)(joblib.delayed(abs)(-x) for x in range(6))
    assert list(results) == list(range(6))


@pytest.mark.contract("joblib")
@pytest.mark.usefixtures("backend")
def test_parallel_times_out() -> None:
    with pytest.raises(multiprocessing.TimeoutError):
        joblib.Parallel(timeout=0.1)(joblib.delayed(time.sleep)(20) for _ in range(2))


@pytest.mark.contract("joblib")
def test_number_of_jobs() -> None:
    register_joblib()
    for n_jobs, expected in [(1, 1), (3, 3), (-1, 2), (-2, 1), (-9, 1)]:
        with joblib.parallel_config("afield"):
            assert joblib.effective_n_jobs(n_jobs) == expected
    with joblib.parallel_config("afield", n_jobs=0):
        with pytest.raises(ValueError):
            joblib.Parallel()(joblib.delayed(abs)(1) for _ in range(2))


@pytest.mark.contract("joblib")
def test_task_options_of_the_backend() -> None:
    register_joblib()
    with joblib.parallel_config("afield", n_jobs=2, num_gpus=1, num_cpus=0):
        assert joblib.Parallel()(joblib.delayed(lambda: len(afield.get_gpu_ids()))() for _ in range(3)) == [1, 1, 1]
    with joblib.parallel_config("afield", n_jobs=2, num_gpu=1):
        with pytest.raises(afield.InvalidOptionError):
            joblib.Parallel()(joblib.delayed(abs)(1) for _ in range(2))


@pytest.mark.slow
@pytest.mark.usefixtures("backend")
def test_scikit_learn() -> None:
    from sklearn.datasets import load_iris
    from sklearn.model_selection import cross_val_score
    from sklearn.tree import DecisionTreeClassifier

    features, labels = load_iris(return_X_y=True)
    tree = DecisionTreeClassifier(random_state=0)
    with joblib.parallel_config("sequential"):
        expected = cross_val_score(tree, features, labels)
    assert np.array_equal(cross_val_score(tree, features, labels, n_jobs=2), expected)


# -- Dask ---------------------------------------------------------------------------------------------------------


@pytest.mark.contract("dask")
def test_dask_graphs_old_and_new() -> None:
    graph = {
        "one": 1,
        "two": (operator.add, "one", "one"),
        "alias": "two",
        ("tuple", 0): (sum, ["one", "two", (operator.neg, "alias")]),
        "unused": (operator.truediv, 1, 0),
    }
    assert dask_get(graph, "two") == 2
    assert dask_get(graph, ["alias", ["one", [("tuple", 0)]]]) == (2, (1, (1,)))
    assert dask_get(graph, []) == ()
    assert dask_get(graph, "two", num_workers=4, unknown="ignored") == 2


@pytest.mark.contract("dask")
def test_dask_delayed_and_arrays() -> None:
    @dask.delayed
    def pid_and(x: Any) -> tuple[int, Any]:
        return os.getpid(), x

    (pid, (other, value)) = pid_and(pid_and("value")).compute(scheduler=dask_get)
    assert value == "value"
    assert os.getpid() not in {pid, other}
    array = da.arange(10_000, chunks=2500).reshape(100, 100)
    whole = np.arange(10_000).reshape(100, 100)
    total, product = dask.compute(array.sum(), array @ array.T, scheduler=dask_get)
    assert total == whole.sum()
    assert np.array_equal(product, whole @ whole.T)


@pytest.mark.contract("dask", "pandas")
@pytest.mark.slow
def test_dask_dataframes() -> None:
    import dask.dataframe as dd
    import pandas as pd

    frame = pd.DataFrame({"key": [i % 3 for i in range(90)], "value": range(90)})
    with dask.config.set(scheduler=dask_get):
        sums = dd.from_pandas(frame, npartitions=4).groupby("key").value.sum().compute()
    assert sums.to_dict() == frame.groupby("key").value.sum().to_dict()


@pytest.mark.contract("dask")
def test_dask_values_in_between_stay_with_the_runtime() -> None:
    """A chain of megabytes of which the driver sees only the last number."""
    graph: dict[Any, Any] = {"0": (np.ones, 1 << 18)}
    for i in range(1, 6):
        graph[str(i)] = (np.add, str(i - 1), 1)
    graph["sum"] = (np.sum, "5")
    before = afield.stats(local=True)
    assert dask_get(graph, "sum") == 6 * (1 << 18)
    after = afield.stats(local=True)
    for counter in "bytes_copied_in", "bytes_shared":
        assert after[counter] - before[counter] < 1 << 20


@pytest.mark.contract("dask")
def test_dask_s_own_callbacks(capsys: pytest.CaptureFixture[str]) -> None:
    events: list[Any] = []
    callback = dask.callbacks.Callback(
        start=lambda dsk: events.append("start"),
        start_state=lambda dsk, state: events.append(len(state["waiting"])),
        pretask=lambda key, dsk, state: events.append(("pre", key)),
        posttask=lambda key, value, dsk, state, worker: events.append(("post", key, value, len(state["finished"]))),
        finish=lambda dsk, state, failed: events.append(("finish", failed)),
    )
    graph = {"one": 1, "two": (lambda x: x + 1, "one"), "three": (lambda x: x + 1, "two")}
    with callback:
        assert dask_get(graph, "three") == 3
        with pytest.raises(ZeroDivisionError):
            dask_get({"bad": (lambda: 1 // 0,)}, "bad")
    assert events[:4] == ["start", 2, ("pre", "two"), ("pre", "three")]
    assert sorted(events[4:6]) in (
        [("post", "three", 3, 1), ("post", "two", None, 2)],
        [("post", "three", 3, 2), ("post", "two", None, 1)],
    )
    assert events[6] == ("finish", False)
    assert events[-1] == ("finish", True)
    with dask.diagnostics.ProgressBar():
        assert dask_get(graph, "three") == 3
    assert "100%" in capsys.readouterr().out
    assert dask_get(graph, "three") == 3  # nobody listens any more
    assert len([each for each in events if each == "start"]) == 2


@pytest.mark.contract("dask")
def test_dask_callbacks_of_programs_for_ray(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []

    class Driver(RayDaskCallback):
        def _ray_postsubmit(self, task: Any, key: Any, deps: Any, ref: Any) -> None:
            seen.append((key, sorted(deps), type(ref)))

        def _ray_postsubmit_all(self, refs: Any, dsk: Any) -> None:
            seen.append(len(refs))

        def _ray_finish(self, result: Any) -> None:
            seen.append(result)

    class Worker(RayDaskCallback):
        def _ray_pretask(self, key: Any, refs: list[Any]) -> Any:
            return [key, *afield.get(refs)]

        def _ray_posttask(self, key: Any, result: Any, state: Any) -> None:
            if state != [key, *([] if key == "one" else [1])] or result != (1 if key == "one" else 2):
                raise AssertionError(state)

    graph = {"one": (abs, -1), "two": (lambda x: x + 1, "one")}
    with Driver(), Worker(), RayDaskCallback(ray_posttask=lambda key, result, state: [][state is not None :]):
        assert RayDaskCallback.ray_active
        assert ray_dask_get(graph, "two") == 2
    assert not RayDaskCallback.ray_active
    assert seen == [("one", [], afield.ObjectRef), ("two", ["one"], afield.ObjectRef), 1, 2]
    with RayDaskCallback(ray_presubmit=lambda task, key, deps: 40 if key == "one" else None):
        assert ray_dask_get(graph, "two") == 41
    with RayDaskCallback(ray_posttask=lambda key, result, state: 1 // 0), pytest.raises(ZeroDivisionError):
        ray_dask_get(graph, "two")
    with pytest.raises(TypeError, match="there is no callback 'ray_end'"):
        RayDaskCallback(ray_end=print)
    with ProgressBarCallback():
        assert ray_dask_get(graph, "two") == 2
    assert "100%" in capsys.readouterr().out


@pytest.mark.contract("dask")
def test_dask_scheduler_is_enabled_and_disabled() -> None:
    value = dask.delayed(lambda: afield.get_runtime_context().get_task_id())()
    enable_dask_on_ray()
    assert value.compute() is not None
    disable_dask_on_ray()
    with enable_dask_on_ray():
        assert value.compute() is not None
    assert dask.config.get("scheduler", None) is None


@pytest.mark.contract("joblib", "dask")
def test_partners_inside_a_task() -> None:
    @afield.remote
    def inside() -> Any:
        register_ray()
        with joblib.parallel_backend("ray", n_jobs=2):
            numbers = joblib.Parallel()(joblib.delayed(abs)(-i) for i in range(5))
        return numbers, dask_get({"one": (abs, -1)}, "one")

    assert afield.get(inside.remote(), timeout=60) == ([0, 1, 2, 3, 4], 1)


@pytest.mark.contract("joblib")
def test_joblib_takes_ray_s_name_and_arguments() -> None:
    register_ray()
    with joblib.parallel_config("ray", n_jobs=2, ray_remote_args={"num_cpus": 0.5}):
        resources = joblib.Parallel()(
            joblib.delayed(lambda: afield.get_runtime_context().get_assigned_resources())() for _ in range(2)
        )
    assert resources == [{"CPU": 0.5}] * 2


@pytest.mark.contract("dask")
def test_dask_errors() -> None:
    graph = {"bad": (operator.truediv, 1, 0), "next": (operator.neg, "bad"), "orphan": (abs, "one"), "one": 1}
    with pytest.raises(ZeroDivisionError) as caught:
        dask_get(graph, ["next", "one"])
    assert isinstance(caught.value, afield.TaskError)
    with pytest.raises(ValueError, match="no key 'nowhere'"):
        dask_get(graph, ["one", "nowhere"])


# -- without them -------------------------------------------------------------------------------------------------


def test_a_missing_partner_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(joblib.parallel.ParallelBackendBase, "submit")
    with pytest.raises(ImportError, match=rf"1\.5 or newer.*this is joblib {joblib.__version__}"):
        register_joblib()
    monkeypatch.setitem(sys.modules, "joblib", None)
    with pytest.raises(ImportError, match=r"pip install 'joblib>=1\.5'"):
        register_joblib()
    monkeypatch.setitem(sys.modules, "dask._task_spec", None)
    with pytest.raises(ImportError, match="pip install 'dask"):
        dask_get({"x": 1}, "x")
