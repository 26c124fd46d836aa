"""A short soak: random programs beside a NumPy model, without and with faults; `python -m tests.soak` runs long ones."""

from __future__ import annotations

import pytest

from tests.soak.run import soak


@pytest.mark.slow
@pytest.mark.parametrize("faults", [False, True], ids=["quiet", "faults"])
def test_every_value_is_the_one_that_was_stored(no_runtime: None, faults: bool) -> None:
    outcome = soak(20261129, steps=60 if faults else 200, threads=3, faults=faults)
    assert not outcome.problems, str(outcome)
    assert outcome.counts["compared"] > 30, str(outcome)
