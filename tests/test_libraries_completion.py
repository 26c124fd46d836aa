"""`as_completed` and `map_unordered` of `afield.util`."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import pytest

import afield
from afield.libraries import completion
from afield.util import as_completed, map_unordered


@afield.remote
def after(path: Path | None, value: int) -> int:
    """Return a value once a file is there."""
    while path is not None and not path.exists():
        time.sleep(0.002)
    return value


@afield.remote
def fail(value: int) -> int:
    raise ValueError(value)


@afield.remote(num_cpus=0)
class Doubles:
    def double(self, value: int) -> int:
        return 2 * value


def test_what_is_ready_comes_first(shared_runtime: None, tmp_path: Path) -> None:
    gate = tmp_path / "open"
    refs = [after.remote(gate, 0), after.remote(None, 1), afield.put(2)]
    values = as_completed(refs)
    assert sorted([next(values), next(values)]) == [1, 2]
    gate.touch()
    assert list(values) == [0]
    assert list(as_completed([])) == []
    assert set(as_completed(refs, yield_obj_refs=True)) == set(refs)


def test_chunks_come_in_the_order_of_the_refs(shared_runtime: None) -> None:
    refs = [after.remote(None, i) for i in range(7)]
    afield.wait(refs, num_returns=7)
    assert list(as_completed(refs, chunk_size=3)) == list(range(7))


def test_more_refs_than_are_looked_at_together(shared_runtime: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "WINDOW", 4)
    assert sorted(as_completed([after.remote(None, i) for i in range(30)], chunk_size=7)) == list(range(30))


def test_a_timeout_ends_one_wait_and_not_the_iteration(shared_runtime: None, tmp_path: Path) -> None:
    gate = tmp_path / "open"
    values = as_completed([after.remote(None, 1), after.remote(gate, 2)], chunk_size=2, timeout=0.2)
    assert next(values) == 1
    gate.touch()
    assert list(values) == [2]


def test_an_error_is_raised_where_its_value_would_come(shared_runtime: None) -> None:
    refs = [after.remote(None, 1), fail.remote(3)]
    afield.wait(refs, num_returns=2)
    values = as_completed(refs, chunk_size=2)
    assert next(values) == 1
    with pytest.raises(ValueError, match="raised ValueError: 3"):
        next(values)


def test_mapping_reads_no_further_than_there_is_room(shared_runtime: None) -> None:
    read: list[int] = []

    def endless() -> Any:
        for number in itertools.count():
            read.append(number)
            yield number

    results = map_unordered(fail.options(max_retries=0), endless(), backpressure_size=5, yield_obj_refs=True)
    assert read == []
    next(results)
    assert read == [0, 1, 2, 3, 4]
    for _ in range(10):
        next(results)
    assert len(read) <= 15


def test_mapping(shared_runtime: None) -> None:
    double, doubled = Doubles.remote().double, list(range(0, 40, 2))
    assert sorted(map_unordered(double, range(20), backpressure_size=3)) == doubled
    assert sorted(map_unordered(double, range(20), backpressure_size=None, chunk_size=4)) == doubled
    assert list(map_unordered(double, [])) == []


@pytest.mark.parametrize("wrong", [{"chunk_size": 0}, {"num_returns": 2}])
def test_wrong_arguments(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="chunk_size"):
        as_completed([], **wrong)
    with pytest.raises(ValueError, match="chunk_size"):
        map_unordered(fail, [], **wrong)
    with pytest.raises(ValueError, match="backpressure_size=0"):
        map_unordered(fail, [], backpressure_size=0)
