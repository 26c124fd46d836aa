"""The node daemon's shell around the books of the tiers: what is deferred until a device is ready, and reservations."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

import afield
from afield.gpu_store.backends.base import SlabImportError
from afield.runtime.face.api import query
from afield.runtime.process import current
from afield.runtime.values import devices
from afield.runtime.values.devices import Devices
from afield.runtime.wire import messages
from tests.device_helpers import MIB, on_device, runtime_with, tiers, uuids
from tests.helpers import poll


@pytest.fixture
def device() -> Iterator[str]:
    """A runtime of its own with one device that nobody has used yet; yields its UUID."""
    with runtime_with("emulated:1:32MiB"):
        (uuid,) = uuids()
        yield uuid


def store_of_the_device() -> dict[str, Any]:
    (found,) = [store for store in query("stores") if store["arena"] == 1]
    return dict(found)


def reserved(device: str) -> int:
    return int(tiers().get(device, {}).get("reserved", -1))


def test_a_deferred_message_that_makes_no_sense_costs_its_sender_alone(device: str) -> None:
    """It is handled when the device's store is ready, which is not the one to blame."""

    @afield.remote(max_retries=0)
    def ask_for_nonsense() -> None:
        process = current.process
        assert process is not None
        process.locked(process.daemon.send, messages.StoreLease(1 << 40, -1, 1.0, 1))
        signal.pause()

    with pytest.raises(afield.WorkerCrashedError):
        afield.get(ask_for_nonsense.remote(), timeout=30)
    assert store_of_the_device() == {**store_of_the_device(), "state": "ready", "life": 1}
    assert afield.get(on_device(lambda: int(afield.array_module().ones(10).sum())).remote(), timeout=30) == 10


def test_a_reservation_holds_in_the_next_life_of_the_device_too(device: str) -> None:
    class _Holder:
        def pid(self) -> int:
            return os.getpid()

    holder = afield.remote(num_gpus=0.5, gpu_memory="16MiB", max_restarts=1, max_task_retries=-1)(_Holder).remote()
    first = afield.get(holder.pid.remote(), timeout=30)
    poll(lambda: reserved(device) == 16 * MIB)
    os.kill(store_of_the_device()["pid"], signal.SIGKILL)
    poll(lambda: store_of_the_device()["life"] == 2 and device in tiers())
    assert afield.get(holder.pid.remote(), timeout=30) != first
    poll(lambda: reserved(device) == 16 * MIB)
    del holder
    poll(lambda: reserved(device) == 0)


def test_a_slab_that_went_with_its_store_is_mapped_anew(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon has not heard yet of the death of a store process whose slab the driver is about to map."""
    export = Devices._export
    stale: list[int] = []

    def late_news(self: Devices, number: int) -> tuple[int, bytes]:
        life, raw = export(self, number)
        if not stale:
            return life, raw
        stale.pop()
        gone = msgspec.msgpack.encode({**msgspec.msgpack.decode(raw), "handle": b"of a process that is gone"})
        return life - 1, gone

    ref = on_device(lambda: afield.array_module().arange(3)).remote()
    monkeypatch.setattr(Devices, "_export", late_news)
    monkeypatch.setattr(devices, "NEWS_S", 0.2)
    stale[:] = [1] * 1000
    with pytest.raises(SlabImportError, match=device):
        afield.get(ref, device=0)
    stale[:] = [1] * 3
    assert afield.get(ref, device=0).get().tolist() == [0, 1, 2]
