"""`get` of several refs raises as soon as one has failed, though others are not done."""

from __future__ import annotations

from pathlib import Path

import pytest

import afield
from tests.helpers import HANG_S, poll


@pytest.mark.parametrize("before", [True, False], ids=["failed before", "fails meanwhile"])
def test_get_raises_with_the_first_failure(shared_runtime: None, tmp_path: Path, before: bool) -> None:
    go = tmp_path / "go"

    @afield.remote(num_cpus=0)
    def slow() -> int:
        poll(go.exists, HANG_S)
        return 1

    @afield.remote(num_cpus=0)
    def fails() -> None:
        raise ValueError("soon")

    first, second = slow.remote(), fails.remote()
    if before:
        afield.wait([second])
    with pytest.raises(ValueError, match="soon"):
        afield.get([first, second], timeout=HANG_S / 2)
    assert afield.wait([first], timeout=0)[0] == []
    go.touch()
    assert afield.get([first, first], timeout=HANG_S) == [1, 1]
