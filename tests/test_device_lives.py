"""Devices that are lost or reset while a value is stored, threads that store at once: the right value, or a typed error."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import afield
from afield.errors import DeviceLostError
from afield.gpu_store.arena import DeviceArena
from afield.gpu_store.backends import faults
from afield.gpu_store.interop import DevicePacker
from afield.gpu_store.tiers import Lost, PartCopy, Refused, StoreUsageError
from tests.device_helpers import MIB, PATIENCE_S, machine, runtime_with, tiers, uuids, wait_for_devices
from tests.store_books import GPU, KIB, OWNER, B, Books, granted, only, refused


@pytest.fixture(scope="module")
def _module() -> Iterator[None]:
    with runtime_with("emulated:1:64MiB"):
        yield


def reset_device() -> None:
    """Lose the device, and give it a new life."""
    (uuid,) = uuids()
    with machine() as emulated:
        emulated.inject(faults.lost(uuid))
        wait_for_devices(0)
        emulated.reset(uuid)
        wait_for_devices(1)


@pytest.fixture
def _device(_module: None) -> Iterator[None]:
    wait_for_devices(1)
    yield
    wait_for_devices(1)


@pytest.mark.usefixtures("_device")
def test_threads_that_store_arrays_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread waits for its own copies: none of two lazily made streams may be overwritten by the other."""
    entered = threading.Barrier(4)
    copy = DeviceArena.copy

    def copy_at_once(self: DeviceArena, *args: Any) -> None:
        entered.wait(PATIENCE_S)
        copy(self, *args)

    monkeypatch.setattr(DeviceArena, "copy", copy_at_once)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    wrong: list[Any] = []
    xp = afield.array_module()
    kept = [xp.full(3 * MIB, number, "u1") for number in range(4)]  # kept: stored as a copy

    def store(number: int) -> None:
        for _ in range(5):
            got = afield.get(afield.put(kept[number]), device="host")
            if not (got == number).all():
                wrong.append((number, np.unique(got)))

    try:
        threads = [threading.Thread(target=store, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


@pytest.mark.usefixtures("_device")
def test_each_thread_has_copies_of_its_own() -> None:
    """Whoever waits for his copies neither hears of another thread's failure nor hides it from that thread."""
    xp = afield.array_module()
    mine, other = xp.full(MIB, 1, "u1"), xp.full(MIB, 2, "u1")
    arena = next(iter(afield.runtime.calls.participation.participant.values.parts.devices.arenas().values()))
    block = arena.allocate(MIB)
    arena.copy(arena.slab, 0, block.offset, MIB)
    streams = [arena._copies.stream]

    def store() -> None:
        assert (afield.get(afield.put(other), device="host") == 2).all()
        streams.append(arena._copies.stream)

    thread = threading.Thread(target=store)
    thread.start()
    thread.join(PATIENCE_S)
    arena.finish()
    assert len({id(stream) for stream in streams}) == 2
    assert (mine.get() == 1).all()


@pytest.mark.usefixtures("_device")
@pytest.mark.parametrize("leases_again", [True, False], ids=["the place is leased again", "the place is free"])
def test_a_device_that_is_reset_between_commit_and_note(monkeypatch: pytest.MonkeyPatch, leases_again: bool) -> None:
    """What was committed in the old life is no part of the new one, though the same bytes may be leased by the same process."""
    xp = afield.array_module()
    mine = xp.full(20 * MIB, 7, "u1")
    later: list[Any] = []
    commit = DevicePacker.commit

    def commit_then_reset(self: DevicePacker, arenas: Any) -> Any:
        places = commit(self, arenas)
        if self and not later:
            later.append(None)
            reset_device()
            if leases_again:
                later[0] = afield.array_module().full(40 * MIB, 99, "u1")
        return places

    with monkeypatch.context() as patched:
        patched.setattr(DevicePacker, "commit", commit_then_reset)
        ref = afield.put(mine)
    assert later
    with pytest.raises(DeviceLostError):
        afield.get(ref, timeout=PATIENCE_S)
    again = afield.array_module().full(MIB, 5, "u1")
    if leases_again:
        assert (later[0].get() == 99).all()
    assert (again.get() == 5).all()


@pytest.mark.usefixtures("_device")
def test_room_of_an_earlier_life_is_refused_as_lost() -> None:
    """An array library that still allocates in the old life is told that the device was lost, not that it is full."""
    old = afield.array_module()
    keep = old.full(MIB, 1, "u1")
    reset_device()
    with pytest.raises(DeviceLostError):
        old.full(30 * MIB, 2, "u1")
    with pytest.raises(DeviceLostError):
        keep.get()
    assert (afield.array_module().full(30 * MIB, 3, "u1").get() == 3).all()
    assert tiers()  # the daemon is there


def test_what_is_said_of_an_earlier_life_says_nothing_of_the_same_place_now() -> None:
    """A client has leased the very bytes again that it had in the life before, when its old seal arrives."""
    store = Books(64 * KIB, gpu=8 * KIB)
    old = granted(store.lease(B, 1, GPU, 2 * KIB))
    store.remove_arena(GPU, "reset")
    store.add_arena(GPU, 8 * KIB, "device GPU-1", 2)
    new = granted(store.lease(B, 2, GPU, 2 * KIB))
    assert (old.arena, old.offset, old.life, new.life) == (new.arena, new.offset, 1, 2)
    assert only(Lost, store.seal(B, b"old", OWNER, [PartCopy(GPU, old.offset, KIB, life=1)])).object_ids == [b"old"]
    assert store.give_back(B, GPU, old.offset, KIB, 1) == []
    assert store.usage(GPU).leased == 2 * KIB
    assert refused(store.lease(B, 3, GPU, KIB, life=1)) == Refused(B, 3, GPU, "reset", True, True)
    assert store.seal(B, b"new", OWNER, [PartCopy(GPU, new.offset, 2 * KIB, life=2)]) == []
    assert store.where(b"new") == [GPU]
    with pytest.raises(StoreUsageError, match="no life 3"):
        store.give_back(B, GPU, 0, KIB, 3)
