"""Locks of memory and the process's lock: whoever has the latter never waits for one of the former.

A thread that has the lock of an arena, or of the pins, may wait for the process's: the collector can run finalisers anywhere,
and they may use afield.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import afield
from afield.gpu_store.tiers import FIRST_LIFE
from afield.runtime.calls import participation
from afield.runtime.calls.participant import Participant
from afield.runtime.wire import messages
from tests.helpers import poll

PATIENCE_S = 20.0
MIB = 1 << 20
NUMBER = 1  # the arena of the only device


@pytest.fixture
def driver(no_runtime: None) -> Iterator[Participant]:
    """A driver that has used a device."""
    afield.init(num_cpus=1, devices="emulated:1:64MiB")
    afield.array_module().ones(10)
    assert participation.participant is not None
    yield participation.participant
    afield.shutdown()


def while_held(lock: Any, transition: Callable[[], object], driver: Participant) -> bool:
    """Tell whether a transition ends while another thread has a lock."""
    ended = threading.Event()

    def run() -> None:
        driver.process.locked(transition)
        ended.set()

    thread = threading.Thread(target=run)
    with lock:
        thread.start()
        done = ended.wait(5)
    thread.join(PATIENCE_S)
    driver.process.pump.wake_standby()  # as when the loop handles it
    return done


def test_memory_that_is_to_be_given_back(driver: Participant) -> None:
    arena = driver.values.parts.devices.arena(NUMBER)
    handle = driver.process.handlers[messages.Trim]
    assert arena.stats().leased_bytes > 0
    assert while_held(arena._lock, lambda: handle(driver.process.daemon, messages.Trim(NUMBER)), driver)
    assert poll(lambda: arena.stats().leased_bytes == arena.stats().used_bytes)


def test_memory_that_was_asked_for_ahead(driver: Participant) -> None:
    parts = driver.values.parts
    arena = parts.devices.arena(NUMBER)
    offset, size = parts.lease(NUMBER, FIRST_LIFE, MIB)
    leased = arena.stats().leased_bytes
    grant = messages.StoreGrant(messages.AHEAD, offset, size, "", NUMBER, FIRST_LIFE)
    handle = driver.process.handlers[messages.StoreGrant]
    assert while_held(arena._lock, lambda: handle(driver.process.daemon, grant), driver)
    assert poll(lambda: arena.stats().leased_bytes == leased + size)


def test_pins_that_are_over(driver: Participant) -> None:
    pinner = driver.values.parts.pinner
    pinner.unpin(0)
    assert while_held(pinner._lock, driver.process.after_events, driver)
    assert poll(lambda: not pinner._dropped), "they are let go of, though nothing else happens"
