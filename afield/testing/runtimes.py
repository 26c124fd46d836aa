"""The runtimes of tests, and what a test left behind in one.

Theory of operation. One process has one runtime at a time. A test has its own, or shares one with others; if a test wants
its own while the shared one runs, the shared one is ended and started anew for the next test that shares it.

What is left behind is what `afield.memory()` shows after the test, of which each entry tells why it is alive: refs and
views that somebody still has, objects in the store, tasks that run, actors. References go when the garbage collector
finds them, and messages about that take a moment, so there is a grace period. Runtimes are started with call sites
recorded, so that the list also tells where each object was made.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from afield.runtime.face import api, lifecycle
from afield.runtime.tools.memory import MemoryEntry
from afield.units import format_bytes

CPUS = 2
#: Capacity of the host store; pages exist only once they are touched.
HOST_MEMORY = "256MiB"
#: What a test has let go of is gone within this time on a loaded machine.
GRACE_S = 3.0
#: A first look, and the longest pause between later ones: each costs a full collection of garbage, so they get rare.
_POLL_S = 0.02
_MAX_POLL_S = 0.25
#: Objects that one report lists, the largest first.
MAX_LISTED = 20
#: What was just let go of may still be listed once.
MIN_POLLS = 3
_HELD_HERE = ("local handle", "zero-copy view", "actor handle")
_CALL_SITES = "AFIELD_RECORD_CALL_SITES"


class Runtimes:
    """The runtimes that the fixtures of one pytest session start."""

    def __init__(self, devices: str) -> None:
        self.devices = devices
        self._is_shared = False
        self._shared_devices: str | None = None

    @contextmanager
    def own(self, devices: str | None = None) -> Iterator[lifecycle.ClusterInfo]:
        """A runtime for one test, with the usual devices or others."""
        if self._is_shared:
            lifecycle.shutdown()
        with self._running(devices) as info:
            yield info

    @contextmanager
    def shared(self, devices: str | None = None) -> Iterator[lifecycle.ClusterInfo]:
        """A runtime for all tests that share it, with the usual devices or others."""
        with self._running(devices) as info:
            self._is_shared, self._shared_devices = True, devices
            try:
                yield info
            finally:
                self._is_shared = False

    def resume(self) -> None:
        """Start the shared runtime anew if something has ended it."""
        if self._is_shared and not lifecycle.is_initialized():
            self._start(self._shared_devices)

    @contextmanager
    def _running(self, devices: str | None) -> Iterator[lifecycle.ClusterInfo]:
        try:
            yield self._start(devices)
        finally:
            lifecycle.shutdown()

    def _start(self, devices: str | None) -> lifecycle.ClusterInfo:
        if lifecycle.is_initialized():
            pytest.fail(
                "a runtime is running already that none of afield's fixtures started: a test that calls afield.init() "
                "itself has to call afield.shutdown() as well",
                pytrace=False,
            )
        before = os.environ.get(_CALL_SITES)
        os.environ[_CALL_SITES] = "1"
        try:
            return lifecycle.init(
                num_cpus=CPUS, devices=self.devices if devices is None else devices, host_memory=HOST_MEMORY
            )
        finally:
            if before is None:
                del os.environ[_CALL_SITES]
            else:
                os.environ[_CALL_SITES] = before

    # -- what is left behind --------------------------------------------------------------------------------------

    def held(self) -> frozenset[str]:
        """Return the ids of all objects and actors that there are."""
        return frozenset(entry.object_id for entry in api.memory()) | _actors()

    def left_behind(self, item: pytest.Item, before: frozenset[str] = frozenset()) -> str:
        """Say what there is that was not there `before`, once it has had time to go; "" if there is nothing."""
        if not lifecycle.is_initialized():
            return ""  # the test ended it, and everything with it
        _forget_values(item)
        deadline = time.monotonic() + GRACE_S
        polls, pause_s = 0, _POLL_S
        while True:
            polls += 1
            gc.collect()
            left = [entry for entry in api.memory() if entry.object_id not in before]
            # An actor with handles has an entry, whose id begins with the actor's.
            actors = {a for a in _actors() - before if not any(one.object_id.startswith(a) for one in left)}
            bytes_left = 0 if before or left else _stored_bytes()
            if not (left or actors or bytes_left):
                return ""
            if time.monotonic() > deadline or (polls > MIN_POLLS and left and all(map(_is_held_here, left))):
                return report(left, len(actors), bytes_left)
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, _MAX_POLL_S)


def _is_held_here(entry: MemoryEntry) -> bool:
    """Tell whether the test's own process refers to an object: waiting does not change that."""
    return entry.owner.startswith("driver ") and any(why.startswith(_HELD_HERE) for why in entry.why)


def _forget_values(item: pytest.Item) -> None:
    """Let go of the values of fixtures that have ended: pytest keeps them with the test until all of them have."""
    values: dict[str, Any] = getattr(item, "funcargs", None) or {}
    definitions = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
    for name in list(values):
        defined = definitions.get(name)
        if defined and getattr(defined[-1], "cached_result", None) is None:
            del values[name]


def _actors() -> frozenset[str]:
    """Return the ids of the actors that have a worker."""
    return frozenset(worker["actor"] for worker in api.query("workers") if worker["actor"])


def _stored_bytes() -> int:
    """Return the bytes of objects in all tiers."""
    return sum(int(figures["sealed"]) for figures in api.query("store")["tiers"].values())


def report(entries: list[MemoryEntry], actors: int, stored_bytes: int) -> str:
    """Say what was left behind, and what to do about it."""
    lines = []
    if entries:
        size = format_bytes(sum(entry.size for entry in entries))
        lines.append(f"afield: this test left {_counted(len(entries), 'object')} behind ({size}):")
        lines += [_line(entry) for entry in entries[:MAX_LISTED]]
        if len(entries) > MAX_LISTED:
            lines.append(f"  and {len(entries) - MAX_LISTED} more")
    if actors:
        lines.append(f"afield: this test left {_counted(actors, 'actor')} running; end it with afield.kill(actor)")
    if stored_bytes:
        lines.append(f"afield: this test left {format_bytes(stored_bytes)} in the store that belong to no object")
    lines.append(
        "Let go of refs and of the arrays that were read from them, wait for the tasks, or mark the test with "
        "@pytest.mark.afield_leaks_ok."
    )
    return "\n".join(lines)


def _line(entry: MemoryEntry) -> str:
    made = f", made at {entry.call_site}" if entry.call_site else ""
    why = "; ".join(entry.why) or "no reason known"
    return (
        f"  {entry.object_id}  {format_bytes(entry.size)}, {entry.tier}, of {entry.owner}{made}\n    alive for: {why}"
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
