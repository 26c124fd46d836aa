"""Copies of refs and handles inside one process: each is the same, holds what the original holds, and keeps nothing longer."""

from __future__ import annotations

import copy
import dataclasses
import gc
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import afield
from tests.helpers import HANG_S, poll
from tests.test_values import sealed


@dataclasses.dataclass
class Job:
    """What users put refs and handles into."""

    source: Any


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "asdict": lambda held: dataclasses.asdict(Job(held))["source"],
    "astuple": lambda held: dataclasses.astuple(Job(held))[0],
    "nested": lambda held: copy.deepcopy({"jobs": [Job((held,))]})["jobs"][0].source[0],
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copied_ref_holds_its_value_no_longer_than_it_lives(runtime: afield.ClusterInfo, how: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ref = afield.put(np.arange(100_000))
        copied = COPIES[how](ref)
        assert copied == ref
        # The copy counts for itself: neither the first to go nor the next value takes anything from it.
        del ref
        gc.collect()
        afield.get(afield.put(np.zeros(100_000)))
        assert afield.get(copied)[-1] == 99_999
        del copied
    assert poll(lambda: not sealed(), HANG_S)


@pytest.mark.parametrize("how", COPIES)
def test_an_actor_ends_with_the_last_copy_of_its_handle(runtime: afield.ClusterInfo, how: str) -> None:
    @afield.remote
    class Counter:
        def add(self, n: int) -> int:
            return n + 1

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actor = Counter.remote()
        copied = COPIES[how](actor)
        method = COPIES[how](actor.add)
        assert copied == actor
        del actor
        gc.collect()
        assert afield.get([copied.add.remote(1), method.remote(2)], timeout=HANG_S) == [2, 3]
        life = copied._life.id
        del copied, method
    assert poll(lambda: not any(entry.object_id == life.hex() for entry in afield.memory()), HANG_S)
