"""The ownership core in the simulator and in the explorer, and proof that both can fail.

`python -m tests.sim` runs one seed, or explores everything; see `tests/sim`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from afield.runtime.cores.objects import FAILED, INLINE, LOCATED, PENDING, Entry, FreeStored, Obligation, Send
from afield.runtime.cores.ownership import OwnershipTable
from afield.runtime.wire.messages import Add, Added, Location, Part, Release, Subscribe, Took, Value
from tests.sim.__main__ import run
from tests.sim.explore import CounterexampleError, explore
from tests.sim.scenarios import SCENARIOS, Scenario
from tests.sim.simulate import Simulation, Summary
from tests.sim.values import InvariantError, lost

SEEDS = 150
STEPS = 600


def simulate(seed: int, *, faults: bool, table: type[OwnershipTable] = OwnershipTable) -> Summary:
    """Run one seed with three or four processes."""
    return Simulation(seed, processes=3 + seed % 2, faults=faults, table=table).run(STEPS)


# -- the core holds --------------------------------------------------------------------------------------------------


@pytest.mark.slow(8)
@pytest.mark.parametrize("faults", [False, True])
def test_seeds(faults: bool) -> None:
    events = deaths = excused = objects = freed = 0
    for seed in range(SEEDS):
        try:
            summary = simulate(seed, faults=faults)
        except InvariantError as error:
            option = " --faults" if faults else ""
            command = f"python -m tests.sim --seed {seed} --steps {STEPS} --processes {3 + seed % 2}{option}"
            pytest.fail("\n".join([*error.__notes__, f"{error}", f"for the transcript: {command}"]))
        events += summary.events
        deaths += summary.deaths
        excused += summary.excused
        objects += summary.objects
        freed += summary.freed
    assert freed == objects > SEEDS * 40
    assert events > SEEDS * STEPS
    assert (deaths > SEEDS) == (excused > SEEDS) == faults


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if not s.large], ids=lambda scenario: scenario.name)
def test_every_interleaving(scenario: Scenario) -> None:
    explored = explore(scenario)
    assert explored.states > scenario.floor
    assert explored.ends >= 1


def test_a_seed_replays_whatever_the_order_of_hashes() -> None:
    command = [sys.executable, "-m", "tests.sim", "--seed", "11", "--steps", "200", "--faults", "--transcript"]
    outputs = set()
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        outputs.add(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    assert len(outputs) == 1
    assert b"seed 11: Summary(events=" in outputs.pop()


# -- broken cores are caught -----------------------------------------------------------------------------------------


class ReleasesBeforeAdded(OwnershipTable):
    """Carriers do not wait for the registration."""

    def receive(self, object_id: bytes, owner: bytes, obligation: Obligation | None = None) -> None:
        super().receive(object_id, owner)


class ContainersDoNotWait(OwnershipTable):
    """What a value contained outlives it before it is registered."""

    def receive(self, object_id: bytes, owner: bytes, obligation: Obligation | None = None) -> None:
        carrier = obligation is not None and not obligation.container
        super().receive(object_id, owner, obligation if carrier else None)


class IgnoresAttempts(OwnershipTable):
    """An acknowledgement of an earlier registration counts for the present one."""

    def on_added(self, message: Added) -> None:
        entry = self.entries.get(message.object_id)
        attempt = 0 if entry is None else entry.attempt
        super().on_added(Added(message.object_id, attempt, message.gone))


class ForgetsTook(OwnershipTable):
    """What was handed on stays pinned."""

    def on_took(self, peer: bytes, sequence: int) -> None:
        pass


class DoesNotWaitForTook(OwnershipTable):
    """What is handed on is not pinned."""

    def hand_on(self, receiver: bytes, sequence: int, object_ids: list[bytes]) -> list[tuple[bytes, bytes]]:
        refs = super().hand_on(receiver, sequence, object_ids)
        self.on_took(receiver, sequence)
        return refs


class HandsOnToTheDead(OwnershipTable):
    """Waits for the `Took` of a dead receiver."""

    def hand_on(self, receiver: bytes, sequence: int, object_ids: list[bytes]) -> list[tuple[bytes, bytes]]:
        dead = receiver in self._dead
        self._dead.discard(receiver)
        refs = super().hand_on(receiver, sequence, object_ids)
        if dead:
            self._dead.add(receiver)
        return refs


class ForgetsContents(OwnershipTable):
    """A value does not hold the refs inside it."""

    def put(self, object_id: bytes, kind: int, value: bytes | Location, contained: Iterable[bytes] = ()) -> None:
        super().put(object_id, kind, value)


class ForgetsRelease(OwnershipTable):
    """Borrowers stay for ever."""

    def on_release(self, peer: bytes, object_id: bytes) -> None:
        pass


class ReleasesAllBorrowers(OwnershipTable):
    """One release counts for all borrowers."""

    def on_release(self, peer: bytes, object_id: bytes) -> None:
        entry = self.entries.get(object_id)
        for borrower in sorted(entry.borrowers or ()) if entry is not None else ():
            super().on_release(borrower, object_id)


class CountsAdds(OwnershipTable):
    """Counts registrations instead of keeping a set, so that a duplicate is one too many."""

    def on_add(self, peer: bytes, message: Add) -> None:
        entry = self.entries.get(message.object_id)
        if entry is not None and peer in (entry.borrowers or ()):
            entry.pins += 1
        super().on_add(peer, message)


class KeepsDeadBorrowers(OwnershipTable):
    """A dead process still holds what it borrowed."""

    def on_peer_died(self, peer: bytes) -> None:
        self._lent_to.pop(peer, None)
        super().on_peer_died(peer)


class WaitsForDeadOwners(OwnershipTable):
    """Objects of a dead owner stay pending."""

    def on_peer_died(self, peer: bytes) -> None:
        self._borrowed_from.pop(peer, None)
        super().on_peer_died(peer)


class SilentWhenDropped(OwnershipTable):
    """Whoever waits for a registration is not told that it is not needed any more."""

    def _forget_borrowed(self, object_id: bytes, entry: Entry) -> None:
        waiting = self._awaiting.pop(object_id, None)
        super()._forget_borrowed(object_id, entry)
        if waiting is not None:
            self._awaiting[object_id] = waiting


class TrustsOldValues(OwnershipTable):
    """Takes the answer to a subscription of an earlier life of the entry."""

    def on_value(self, message: Value) -> None:
        entry = self.entries.get(message.object_id)
        if entry is not None and entry.owner and entry.state == PENDING:
            registration, entry.registration = entry.registration, 2
            super().on_value(message)
            entry.registration = registration


@pytest.mark.parametrize(
    ("table", "faults"),
    [
        (ReleasesBeforeAdded, False),
        (ContainersDoNotWait, False),
        (IgnoresAttempts, True),
        (ForgetsTook, False),
        (DoesNotWaitForTook, False),
        (HandsOnToTheDead, True),
        (ForgetsContents, False),
        (ForgetsRelease, False),
        (ReleasesAllBorrowers, False),
        (CountsAdds, False),
        (KeepsDeadBorrowers, True),
        (WaitsForDeadOwners, True),
        (SilentWhenDropped, False),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_simulator_catches(table: type[OwnershipTable], faults: bool) -> None:
    for seed in range(SEEDS):
        try:
            simulate(seed, faults=faults, table=table)
        except InvariantError:
            return
    pytest.fail(f"{SEEDS} seeds did not notice: {table.__doc__}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "name"),
    [
        (ReleasesBeforeAdded, "lend on"),
        (ContainersDoNotWait, "get of a container"),
        (IgnoresAttempts, "borrow again after release"),
        (DoesNotWaitForTook, "a result inside a result, anyone dies"),
        (CountsAdds, "borrow, two control messages arrive twice"),
        (KeepsDeadBorrowers, "borrow, the borrower dies"),
        (WaitsForDeadOwners, "lend on, anyone dies"),
        (TrustsOldValues, "a value for a ref that was given up"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_explorer_catches(table: type[OwnershipTable], name: str) -> None:
    [scenario] = [scenario for scenario in SCENARIOS if scenario.name == name]
    with pytest.raises(CounterexampleError) as found:
        explore(scenario, table)
    assert len(found.value.transcript) > 5


def test_failure_is_shown_with_its_transcript(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(0, STEPS, 3, faults=False, table=ForgetsRelease) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "1"
    assert any("-> p0: Release(" in line for line in lines)
    assert lines[-1].startswith("seed 0: VIOLATED: p")


# -- what they have found --------------------------------------------------------------------------------------------


def table_of() -> OwnershipTable:
    """Return the table of process b"me"."""
    return OwnershipTable(b"me", lost)


def effects_of(table: OwnershipTable) -> Sequence[Any]:
    """Return what the table wants done, and forget it."""
    effects, table.effects = table.effects, []
    return effects


def test_whoever_waited_for_a_value_may_let_go_of_it_at_once() -> None:
    """The argument of a waiting task fails; the failing task's pin was its last hold."""
    table = table_of()
    table.own(b"x", None)
    table.pin(b"x")
    table.drop(b"x")
    table.when_done(b"x", lambda: table.unpin(b"x"))
    table.fulfil(b"x", LOCATED, Location([Part(0, 0, 1)]))
    assert table.entries == {}
    assert effects_of(table) == [FreeStored(b"x")]


def test_a_ref_is_not_handed_on_to_a_dead_receiver() -> None:
    """It would never say `Took`."""
    table = table_of()
    table.put(b"x", INLINE, b"")
    table.on_peer_died(b"receiver")
    assert table.hand_on(b"receiver", 1, [b"x"]) == [(b"x", b"me")]
    table.drop(b"x")
    assert table.entries == {}
    assert table._transit == {}


def test_a_value_from_an_earlier_life_of_an_entry_is_not_taken() -> None:
    """The ref was dropped and came again, carried by a process that died: its object is gone, and its memory too."""
    table = table_of()
    table.receive(b"x", b"owner")
    table.on_added(Added(b"x", 1, False))
    table.when_done(b"x", id)  # type: ignore[arg-type]
    table.drop(b"x")
    table.receive(b"x", b"owner")
    assert effects_of(table) == [
        Send(b"owner", Add(b"x", 1)),
        Send(b"owner", Subscribe(b"x")),
        Send(b"owner", Release(b"x")),
        Send(b"owner", Add(b"x", 2)),
    ]
    table.on_value(Value(b"x", LOCATED, b"", Location([Part(0, 0, 1)])))
    assert table.entries[b"x"].state == PENDING
    table.on_added(Added(b"x", 2, True))
    assert table.entries[b"x"].state == FAILED


def test_nothing_is_remembered_of_a_borrower_without_objects() -> None:
    table = table_of()
    table.put(b"x", INLINE, b"")
    table.on_add(b"borrower", Add(b"x", 1))
    table.on_release(b"borrower", b"x")
    table.drop(b"x")
    assert (table.entries, table._lent_to) == ({}, {})


def test_two_results_of_one_reply_are_taken_one_by_one() -> None:
    """Each has its own token: the first `Took` must not let go of what is inside the second."""
    worker, owner = OwnershipTable(b"worker", lost), OwnershipTable(b"owner", lost)
    for token, object_id in enumerate((b"x", b"y"), 1):
        worker.put(object_id, INLINE, b"")
        refs = worker.hand_on(b"owner", token, [object_id])
        worker.drop(object_id)
        owner.receive_contained(refs, b"worker", token)
    assert effects_of(owner) == [Send(b"worker", Add(b"x", 1)), Send(b"worker", Add(b"y", 2))]
    owner.on_added(Added(b"x", 1, False))
    assert effects_of(owner) == [Send(b"worker", Took(1))]
    worker.on_took(b"owner", 1)
    assert list(worker.entries) == [b"y"]
