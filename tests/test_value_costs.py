"""What storing a value costs: each byte is pickled once, and what is looked up is looked up once for each buffer."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

import afield
from afield.gpu_store.client import HostStoreClient
from afield.runtime.process import serialization
from afield.runtime.values import arguments
from afield.runtime.worker import outcomes
from tests.helpers import HANG_S

MIB = 1 << 20


def test_large_plain_values_are_pickled_once(shared_runtime: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def again(*_: Any, **__: Any) -> Any:
        raise AssertionError("what was pickled is pickled again")

    class Echo:
        def __init__(self) -> None:
            outcomes.serialize = again  # type: ignore[attr-defined]
            outcomes.Outcomes.pickled = staticmethod(again)  # type: ignore[method-assign, assignment]

        def echo(self, data: bytes, more: dict[str, bytes]) -> dict[str, bytes]:
            return more

    actor = afield.remote(Echo).remote()  # a process of its own, which is ended
    data, more = os.urandom(MIB), {"a": os.urandom(MIB)}
    monkeypatch.setattr(arguments, "serialize", again)
    assert afield.get(actor.echo.remote(data, more), timeout=HANG_S) == more
    afield.kill(actor)


class Counted(dict[int, Any]):
    """Counts how often all of it is walked through."""

    walks = 0

    def values(self) -> Any:
        self.walks += 1
        return super().values()

    def copy(self) -> Any:
        self.walks += 1
        return super().copy()


@pytest.mark.parametrize("inside", [False, True])
def test_arrays_born_in_the_store_are_found_without_a_search(inside: bool) -> None:
    fd = os.memfd_create("store")
    os.truncate(fd, 16 * MIB)
    client = HostStoreClient(fd, 16 * MIB, lambda size: (0, max(size, MIB)), lambda offset, size: None)
    born = client._born = Counted()
    arrays = [client.empty(256, np.uint8) for _ in range(200)]
    for number, array in enumerate(arrays):
        array[:] = number
    value = [array[64:] if inside else array for array in arrays]
    del array, arrays
    holder = [value]
    serialized = serialization.serialize(value, "the value")
    del value
    frame, pieces = client.store(serialized, holder, 1 << 16)
    assert len(pieces) == 200 and not born and client.bytes_born == 200 * (192 if inside else 256)
    assert born.walks <= 1
    parts = [client._writable[offset : offset + size] for offset, size in pieces]
    assert [array[0] for array in serialization.deserialize(frame, "the value", None, parts)] == list(range(200))
    os.close(fd)
