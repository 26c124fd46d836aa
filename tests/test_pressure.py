"""Under pressure: a store that is too small for all producers at once, and more workers than there is work for."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import numpy as np
import psutil
import pytest

import afield
from afield.runtime.face.api import query
from tests.helpers import remote_with

MIB = 1 << 20
PATIENCE_S = 30.0


@pytest.mark.slow
def test_consumers_make_room_for_waiting_producers(no_runtime: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty results of 4 MB pass through a store of 64 MiB: what takes results runs before what makes more of them."""
    monkeypatch.setenv("AFIELD_STORE_WAIT_S", "20")
    afield.init(num_cpus=2, host_memory="64MiB")

    @afield.remote
    def make(index: int) -> Any:
        return np.full(4 * MIB, index, np.uint8)

    @afield.remote
    def use(array: Any) -> int:
        return int(array[-1])

    refs = [use.remote(make.remote(index)) for index in range(60)]
    assert afield.get(refs, timeout=PATIENCE_S) == list(range(60))
    afield.shutdown()


def test_who_has_device_memory_can_finish_while_others_wait_for_it(
    no_runtime: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More tasks than fit at a time; each needs a few bytes more, when the others wait for what it has."""
    monkeypatch.setenv("AFIELD_STORE_WAIT_S", "20")
    afield.init(num_cpus=2, devices="emulated:1:64MiB", host_memory="64MiB")

    @remote_with(num_gpus=0.2, num_cpus=0.1)
    def largest(number: int) -> int:
        array = afield.array_module().full(20 << 20, number, "u1")
        time.sleep(0.1)  # the others ask for theirs meanwhile
        return int(array.max())

    refs = [largest.remote(number) for number in range(10)]
    assert afield.get(refs, timeout=15) == list(range(10))


def test_workers_beyond_the_need_end(no_runtime: None) -> None:
    """Tasks that wait inside for others need a worker each; afterwards only a few of these stay."""
    afield.init(num_cpus=1)

    @afield.remote
    def nest(depth: int) -> int:
        return 0 if not depth else 1 + afield.get(nest.remote(depth - 1))

    assert afield.get(nest.remote(15), timeout=PATIENCE_S) == 15
    deadline = time.monotonic() + PATIENCE_S
    while len(query("workers")) > 6:
        assert time.monotonic() < deadline, query("workers")
        time.sleep(0.02)
    assert afield.get(nest.remote(1), timeout=PATIENCE_S) == 1
    afield.shutdown()


def test_a_stream_ends_when_the_node_dies(no_runtime: None) -> None:
    """Whoever waits for the next item is told, as everybody else is."""
    afield.init(num_cpus=1)

    @afield.remote
    def slow() -> Any:
        yield 1
        time.sleep(PATIENCE_S)
        yield 2

    items = slow.remote()
    assert afield.get(next(items), timeout=PATIENCE_S) == 1
    daemon = next(child for child in psutil.Process().children(recursive=True) if child.name() == "afield-node")
    killer = threading.Timer(0.2, daemon.kill)
    killer.start()
    with pytest.raises(afield.RuntimeDiedError):
        afield.get(next(items), timeout=PATIENCE_S)
    killer.join()
    with pytest.raises(afield.RuntimeDiedError):
        slow.remote()
    afield.shutdown()


def test_what_only_lineage_needs_goes_before_live_values_move(
    no_runtime: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFIELD_LINEAGE_MEMORY", "64MiB")
    monkeypatch.setenv("AFIELD_STORE_WAIT_S", "0.3")
    afield.init(num_cpus=1, host_memory="64MiB")

    @afield.remote
    def double(x: Any) -> Any:
        return x * 2

    doubled = []
    for number in range(3):
        ref = afield.put(np.full(5 << 17, number, dtype="float64"))  # 5 MiB that cannot be made again
        doubled.append(double.remote(ref))
        del ref
    afield.wait(doubled, num_returns=3)
    kept = [entry for entry in afield.memory() if entry.why and entry.why[0].startswith("held by lineage")]
    assert [entry.tier for entry in kept] == ["host", "host", "host"]
    more = [afield.put(np.full(5 << 17, number, dtype="float64")) for number in range(5)]
    assert afield.get(doubled[1])[0] == 2 and afield.get(more[3])[0] == 3
    assert afield.stats()["disk_write"] == 0
    assert not [entry for entry in afield.memory() if entry.why and entry.why[0].startswith("held by lineage")]

    held = afield.get(more)
    with pytest.raises(afield.ObjectStoreFullError, match=rf"in use.*driver pid {os.getpid()}: 25.0 MiB in 5 parts"):
        afield.put(np.zeros(6 << 20))
    assert len(held) == 5
