"""`afield.memory()` says what is in memory and why; `stats()` counts for the whole cluster."""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import afield
from afield import MemoryEntry
from afield.runtime.cores.ownership import OwnershipTable
from afield.runtime.face import api, lifecycle
from afield.runtime.node.census import LONG_PATIENCE_S, Census
from afield.runtime.tools import memory as memory_tool
from afield.runtime.tools.memory import assemble
from afield.runtime.wire import messages
from tests.helpers import poll

PATIENCE_S = 30.0
MIB = 1 << 20


def entry_of(ref: afield.ObjectRef) -> MemoryEntry:
    (entry,) = [entry for entry in afield.memory() if entry.object_id == ref.hex()]
    return entry


def reasons(ref: afield.ObjectRef) -> str:
    return "; ".join(entry_of(ref).why)


@pytest.fixture(scope="module", autouse=True)
def _recorded() -> Any:
    """The runtime that this module's tests share records call sites."""
    os.environ["AFIELD_RECORD_CALL_SITES"] = "1"
    yield
    del os.environ["AFIELD_RECORD_CALL_SITES"]


def test_values_of_the_driver(shared_runtime: None) -> None:
    small, large = afield.put("small"), afield.put(b"x" * MIB)
    entry = entry_of(small)
    assert (entry.tier, entry.owner, entry.why) == ("inline", f"driver pid {os.getpid()}", ("local handle x1",))
    assert 0 < entry.size < 100
    assert entry.call_site is not None
    assert "test_memory.py" in entry.call_site and entry.call_site.endswith("in test_values_of_the_driver()")
    again = afield.get(afield.put([large]))[0]
    entry = entry_of(large)
    assert entry.tier == "host" and MIB <= entry.size < MIB + 4096
    assert "local handle x2" in entry.why
    del again
    assert [e.size for e in afield.memory()] == sorted((e.size for e in afield.memory()), reverse=True)
    gone = large.hex()
    del large
    assert poll(lambda: gone not in {e.object_id for e in afield.memory()}, PATIENCE_S)


def test_views_and_containers(shared_runtime: None) -> None:
    ref = afield.put(np.ones(MIB // 8))
    array = afield.get(ref)
    assert "zero-copy view x1" in reasons(ref)
    outer = afield.put({"inside": [ref]})
    assert f"contained in {outer.hex()}" in reasons(ref)
    del array
    assert "zero-copy" not in reasons(ref)
    del outer
    assert poll(lambda: reasons(ref) == "local handle x1", PATIENCE_S), reasons(ref)


def test_an_error_does_not_keep_what_its_caller_had(shared_runtime: None) -> None:
    @afield.remote
    def fail(value: Any) -> None:
        raise ValueError("again")

    def call() -> str:
        ref = afield.put(1)
        with pytest.raises(ValueError, match="again"):
            afield.get(fail.remote(ref), timeout=PATIENCE_S)
        with pytest.raises(ValueError, match="again"):
            fail.remote(ref).future().result(PATIENCE_S)
        return ref.hex()

    gc.collect()
    gc.disable()
    try:
        mine = call()
        assert poll(lambda: mine not in {entry.object_id for entry in afield.memory()}, PATIENCE_S)
    finally:
        gc.enable()


def test_tasks_pin_their_arguments_and_their_results_are_pending(shared_runtime: None, tmp_path: Any) -> None:
    def wait_for(value: object, path: Any) -> None:
        while not path.exists():
            time.sleep(0.005)

    go = tmp_path / "go"
    ref = afield.put(b"x" * MIB)
    result = afield.remote(name="waiter")(wait_for).remote(ref, go)
    assert "argument of the pending task waiter()" in reasons(ref)
    entry = entry_of(result)
    assert entry.tier == "pending" and "result of the pending task waiter()" in entry.why
    go.touch()
    afield.get(result, timeout=PATIENCE_S)
    assert reasons(ref) == "local handle x1"
    assert entry_of(result).tier == "inline"


def test_borrowers_and_captures_are_named(shared_runtime: None) -> None:
    class Keeper:
        def __init__(self, refs: list[afield.ObjectRef]) -> None:
            self.refs = refs

        def own(self) -> tuple[int, afield.ObjectRef]:
            self.mine = afield.put(b"y" * MIB)
            return os.getpid(), self.mine

    ref, captured = afield.put(b"x" * MIB), afield.put("captured")
    keeper = afield.remote(Keeper).remote([ref])
    pid, theirs = afield.get(keeper.own.remote(), timeout=PATIENCE_S)
    assert f"borrowed by worker pid {pid} (local handle x1)" in reasons(ref)
    assert entry_of(theirs).owner == f"worker pid {pid}"
    assert f"borrowed by driver pid {os.getpid()} (local handle x1)" in reasons(theirs)
    look = afield.remote(name="look")(lambda: afield.get(captured))
    assert afield.get(look.remote(), timeout=PATIENCE_S) == "captured"
    assert "captured by the function look()" in reasons(captured)
    with pytest.warns(UserWarning, match="pickled outside"):
        pickle.dumps(ref)
    assert "pickled outside of afield" in reasons(ref)
    afield.kill(keeper)
    assert poll(lambda: "borrowed" not in reasons(ref), PATIENCE_S)


def test_what_nobody_knows_is_an_orphan_and_the_silent_are_named() -> None:
    owner, reader, lost, unknown = b"o" * 8, b"r" * 8, b"l" * 20, b"u" * 20
    answer = {
        "processes": [(owner, 1, "driver", "driver"), (reader, 2, "worker", "worker")],
        "tables": [(reader, (0, False, [(lost, owner, 1, 10, False, ["local handle x1"], [], "")]))],
        "silent": [owner],
        "store": [(lost, owner, {0: 64}), (unknown, b"gone" * 2, {0: 128})],
        "stored": [(owner, 1), (b"gone" * 2, 1)],
    }
    listing = assemble(answer)
    first, second = listing
    assert (listing.total, listing.left_out, listing.silent) == (2, 0, ("driver pid 1",))
    assert (first.size, first.tier, first.owner) == (128, "host", f"process {(b'gone' * 2).hex()} (gone)")
    assert first.why == ("orphan: in the store, but no process knows it",)
    assert (second.size, second.owner) == (64, "driver pid 1")
    assert second.why == ("borrowed by worker pid 2 (local handle x1)", "its owner did not answer in time")


def test_a_cut_listing_says_how_many_there_are(no_runtime: None, monkeypatch: pytest.MonkeyPatch) -> None:
    afield.init(num_cpus=1)
    monkeypatch.setattr(memory_tool, "MAX_ROWS", 7)
    monkeypatch.setattr(memory_tool, "MANY", 0)  # so that the daemon is told that it takes long
    refs = [afield.put(b"x" * (100 + number)) for number in range(20)]
    large = afield.put(b"x" * MIB)
    listing = afield.memory()
    assert len(listing) == 7 and listing[0].object_id == large.hex() and listing.silent == ()
    assert [entry.object_id for entry in listing[1:]] == [ref.hex() for ref in refs[:-7:-1]]
    assert listing.total >= 21 and listing.left_out == listing.total - 7
    del refs
    assert poll(lambda: afield.memory().left_out == 0, PATIENCE_S)


def test_who_works_on_a_long_answer_is_waited_for() -> None:
    told: list[Any] = []

    def channel(name: bytes) -> Any:
        return SimpleNamespace(peer_id=name, closed=False, send=told.append)

    channels = {name: channel(name) for name in (b"works", b"silent")}
    books = SimpleNamespace(moved_bytes={})
    daemon = SimpleNamespace(channels=channels, tiers=SimpleNamespace(books=books))
    census = Census(daemon)  # type: ignore[arg-type]
    census.ask(channel(b"asker"), messages.Query(9, "stats"))
    began = census.next_deadline()
    assert began is not None
    census.on_answer(channels[b"works"], messages.Answer(1, None, messages.WORKING))
    told.clear()
    census.expire(began)
    assert not told and census.next_deadline() == began + LONG_PATIENCE_S
    census.on_answer(channels[b"works"], messages.Answer(1, {"tasks_submitted": 3}))
    census.expire(began + LONG_PATIENCE_S)
    assert told == [messages.Answer(9, {"tasks_submitted": 3})]
    census.ask(channel(b"asker"), messages.Query(10, "stats"))
    told.clear()
    due = census.next_deadline()
    assert due is not None
    census.expire(due)
    assert len(told) == 1 and census.next_deadline() is None


def test_nothing_is_recorded_unless_asked_for(monkeypatch: pytest.MonkeyPatch, no_runtime: None) -> None:
    monkeypatch.delenv("AFIELD_RECORD_CALL_SITES")
    afield.init(num_cpus=1)
    ref = afield.put(1)
    assert entry_of(ref).call_site is None
    session = lifecycle._session
    assert session is not None
    assert type(session.participant.process.table) is OwnershipTable


# -- counters -----------------------------------------------------------------------------------------------------


def test_counters_are_sums_over_processes_also_over_dead_ones(runtime: afield.ClusterInfo) -> None:
    class Submitter:
        def submit(self, n: int) -> list[Any]:
            return afield.get([afield.remote(lambda: 1).remote() for _ in range(n)])

    submitter = afield.remote(Submitter).remote()
    afield.get(submitter.submit.remote(5), timeout=PATIENCE_S)
    assert afield.stats(local=True)["tasks_submitted"] == 1
    assert afield.stats()["tasks_submitted"] == 6
    afield.kill(submitter)
    assert poll(lambda: len([e for e in api.query("workers") if e["actor"]]) == 0, PATIENCE_S)
    assert afield.stats()["tasks_submitted"] == 6


def test_many_threads_ask_at_once(shared_runtime: None) -> None:
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.append(afield.stats())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8


def test_a_process_that_does_not_answer_is_left_out(runtime: afield.ClusterInfo) -> None:
    def hold_the_interpreter(seconds: float) -> int:
        afield.put(1)
        return int(ctypes.PyDLL(None).usleep(int(seconds * 1e6)))  # PyDLL keeps the interpreter's lock

    ref = afield.remote(hold_the_interpreter).remote(60.0)
    time.sleep(0.3)  # until it holds the lock; if it does not yet, it answers, which is fine as well
    began = time.monotonic()
    entries = afield.memory()
    assert time.monotonic() - began < 20.0
    assert ref.hex() in {entry.object_id for entry in entries}
