"""A short soak: random programs beside a NumPy model. `python -m tests.soak` runs long ones, with faults too."""

from __future__ import annotations

import pytest

from tests.soak.run import soak


@pytest.mark.slow
def test_every_value_is_the_one_that_was_stored(no_runtime: None) -> None:
    outcome = soak(20261129, steps=200, threads=3)
    assert not outcome.problems, str(outcome)
    assert outcome.counts["compared"] > 100, str(outcome)
