"""Lost values in real processes: what is computed again, and what the errors of the others say."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import afield
from afield.errors import AfieldError, DeviceLostError, ObjectLostError
from afield.ids import ARGUMENTS_INDEX, TASK_ID_BYTES
from afield.runtime.calls import participation
from afield.runtime.calls.participant import Participant
from afield.runtime.calls.recovery import MAX_ROUNDS
from afield.runtime.cores.objects import FREED, LOCATED, PENDING
from afield.runtime.wire import messages
from afield.runtime.worker.invocation import Invocation
from tests.helpers import poll, remote_with

LARGE = 1 << 17


def participant() -> Participant:
    """Return this process's part in the runtime."""
    found = participation.participant
    assert isinstance(found, Participant)
    return found


def lose_for_real(*refs: afield.ObjectRef, cause: str = "the device fell off the bus", kind: str = "") -> None:
    """Free stored values at the daemon and tell this process, their owner, that they are lost."""
    process = participant().process
    object_ids = [ref.id for ref in refs]
    process.locked(process.daemon.send, messages.Free(object_ids))
    stored_objects()  # a question, which is answered after that: what is made again must not be there before
    process.locked(process.handlers[messages.Lost], process.daemon, messages.Lost(object_ids, cause, kind))


def state_of(ref: afield.ObjectRef) -> int:
    """Return the state of an object of ours."""
    return participant().process.table.entries[ref.id].state


def stored_objects() -> int:
    """Return how many objects are in the store."""
    process = participant().process
    answer: dict[str, int] = process.requests.ask(lambda request: messages.Query(request, "store"))
    return answer["objects"]


@pytest.fixture
def log(tmp_path: Path) -> Callable[[], list[str]]:
    """Count executions: tasks append a line to the file named by the attribute `path`."""

    def lines() -> list[str]:
        return path.read_text().split()

    path = tmp_path / "log"
    path.touch()
    lines.path = str(path)  # type: ignore[attr-defined]
    return lines


def note(path: str, word: str) -> None:
    """Append a line."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.write(descriptor, word.encode() + b"\n")
    os.close(descriptor)


@afield.remote
def ones(path: str, name: str) -> np.ndarray[Any, Any]:
    note(path, name)
    return np.ones(LARGE)


@afield.remote
def plus(path: str, name: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    note(path, name)
    return array + 1


@pytest.mark.usefixtures("shared_runtime")
def test_a_lost_result_is_computed_again(log: Any) -> None:
    ref = ones.remote(log.path, "a")
    assert afield.get(ref)[0] == 1
    lose_for_real(ref)
    assert afield.get(ref, timeout=30).sum() == LARGE
    assert log() == ["a", "a"]
    assert afield.stats()["tasks_recomputed"] >= 1


@pytest.mark.usefixtures("shared_runtime")
def test_a_chain_is_computed_again_from_where_it_must(log: Any) -> None:
    ref = ones.remote(log.path, "a")
    for name in "bcd":
        ref = plus.remote(log.path, name, ref)
    assert afield.get(ref)[-1] == 4
    assert poll(lambda: stored_objects() == 1), "what only lineage holds is freed"
    lose_for_real(ref)
    assert afield.get(ref, timeout=30)[-1] == 4
    assert log() == list("abcd") * 2
    before = stored_objects()
    del ref
    assert poll(lambda: stored_objects() == before - 1)
    assert not participant().submitter.recovery.lineage.records()
    assert not participant().process.table.lineage_knows


@pytest.mark.usefixtures("shared_runtime")
def test_whoever_waits_waits_on(log: Any) -> None:
    first = ones.remote(log.path, "a")
    afield.wait([first])
    lose_for_real(first)
    assert state_of(first) == PENDING
    second = plus.remote(log.path, "b", first)
    assert afield.get([second, first], timeout=30)[0][0] == 2
    assert log() == ["a", "a", "b"]


@pytest.mark.usefixtures("shared_runtime")
def test_one_of_several_outputs(log: Any) -> None:
    @remote_with(num_returns=3)
    def three(path: str) -> Any:
        note(path, "x")
        return np.zeros(LARGE), np.ones(LARGE), "small"

    zeros, one, small = three.remote(log.path)
    whole = afield.get(zeros)
    lose_for_real(one)
    assert afield.get(one, timeout=30)[0] == 1
    assert afield.get(zeros)[0] == whole[0] == 0 and afield.get(small) == "small"
    assert log() == ["x", "x"]


@pytest.mark.usefixtures("shared_runtime")
def test_a_put_argument_is_kept_and_explained(log: Any) -> None:
    argument = afield.put(np.ones(LARGE))
    name = argument.hex()
    ref = plus.remote(log.path, "a", argument)
    afield.wait([ref])
    del argument
    poll(lambda: not participant().process.dropped)
    [row] = [row for row in afield.memory() if row.object_id == name]
    assert any("held by lineage of plus()" in why for why in row.why)
    lose_for_real(ref)
    assert afield.get(ref, timeout=30)[0] == 2
    del ref
    assert poll(lambda: name not in {row.object_id for row in afield.memory()})


@pytest.mark.usefixtures("shared_runtime")
def test_a_nested_argument_is_freed_and_made_again(log: Any) -> None:
    @afield.remote
    def inner(path: str, refs: list[Any]) -> Any:
        note(path, "inner")
        return afield.get(refs[0]) + 1

    argument = ones.remote(log.path, "a")
    ref = inner.remote(log.path, [argument])
    afield.wait([ref])
    name = argument.id
    del argument
    assert poll(lambda: participant().process.table.entries[name].state == FREED)
    [row] = [row for row in afield.memory() if row.object_id == name.hex()]
    assert (row.tier, row.size) == ("freed", 0)
    lose_for_real(ref)
    assert afield.get(ref, timeout=30)[0] == 2
    assert log() == ["a", "inner", "inner", "a"]


@pytest.mark.usefixtures("shared_runtime")
@pytest.mark.parametrize("kind", ["", "device"])
def test_a_put_value_fails(kind: str) -> None:
    ref = afield.put(np.ones(LARGE))
    lose_for_real(ref, kind=kind)
    expected: type[AfieldError] = DeviceLostError if kind else ObjectLostError
    with pytest.raises(expected, match=r"given to put\(\).*fell off the bus.*in a task"):
        afield.get(ref)


@pytest.mark.usefixtures("shared_runtime")
def test_a_task_that_must_not_run_twice(log: Any) -> None:
    ref = ones.options(max_retries=0).remote(log.path, "a")
    afield.wait([ref])
    lose_for_real(ref)
    with pytest.raises(ObjectLostError, match=r"the result of ones\(\).*max_retries=0"):
        afield.get(ref)
    assert log() == ["a"]


@pytest.mark.usefixtures("shared_runtime")
def test_recoveries_end(log: Any) -> None:
    ref = ones.options(max_retries=2).remote(log.path, "a")
    for _ in range(3):
        afield.wait([ref])
        lose_for_real(ref)
    with pytest.raises(ObjectLostError, match="made again 2 times already"):
        afield.get(ref)
    assert log() == ["a"] * 3


@pytest.mark.usefixtures("shared_runtime")
def test_a_recomputation_can_fail(log: Any) -> None:
    @afield.remote
    def once(path: str) -> Any:
        note(path, "x")
        if len(Path(path).read_text().split()) > 1:
            raise ValueError("not again")
        return np.ones(LARGE)

    ref = once.remote(log.path)
    afield.wait([ref])
    lose_for_real(ref)
    with pytest.raises(ValueError, match="not again"):
        afield.get(ref, timeout=30)


@pytest.mark.usefixtures("shared_runtime")
def test_a_recomputation_can_be_cancelled(log: Any) -> None:
    @afield.remote
    def slow(path: str) -> Any:
        note(path, "x")
        if len(Path(path).read_text().split()) > 1:
            time.sleep(60)
        return np.ones(LARGE)

    ref = slow.remote(log.path)
    afield.wait([ref])
    lose_for_real(ref)
    poll(lambda: len(log()) == 2)
    afield.cancel(ref)
    with pytest.raises(afield.TaskCancelledError):
        afield.get(ref, timeout=30)


@pytest.mark.usefixtures("shared_runtime")
def test_items_of_a_generator_fail() -> None:
    @afield.remote
    def items() -> Any:
        yield np.ones(LARGE)
        yield np.ones(LARGE)

    refs = list(items.remote())
    lose_for_real(refs[0])
    with pytest.raises(ObjectLostError, match="an item of a generator"):
        afield.get(refs[0])
    assert afield.get(refs[1])[0] == 1


class _Counter:
    def __init__(self) -> None:
        self.calls = 0

    def array(self) -> Any:
        self.calls += 1
        return np.full(LARGE, self.calls)

    @afield.method(max_task_retries=2)
    def again(self) -> Any:
        return self.array()


Counter: Any = afield.remote(_Counter)


def _is_dead(counter: Any) -> bool:
    try:
        afield.get(counter.array.remote(), timeout=30)
    except afield.ActorDiedError:
        return True
    return False


@pytest.mark.usefixtures("shared_runtime")
def test_calls_of_actors_are_repeated_only_where_they_may() -> None:
    counter = Counter.remote()
    once, twice = counter.array.remote(), counter.again.remote()
    afield.wait([once, twice], num_returns=2)
    lose_for_real(once, twice)
    assert afield.get(twice, timeout=30)[0] == 3
    with pytest.raises(ObjectLostError, match="max_task_retries"):
        afield.get(once)
    afield.kill(counter)
    poll(lambda: _is_dead(counter))
    lose_for_real(twice)
    with pytest.raises(afield.ActorDiedError):
        afield.get(twice, timeout=30)


@pytest.mark.usefixtures("shared_runtime")
def test_an_actor_is_not_kept_alive_for_what_was_made_with_it(log: Any) -> None:
    @afield.remote
    def ask(path: str, counter: Any) -> Any:
        note(path, "x")
        return afield.get(counter.array.remote())

    counter = Counter.remote()
    ref = ask.remote(log.path, counter)
    afield.wait([ref])
    life = counter._life.id
    del counter
    assert poll(lambda: life not in participant().process.table.entries)
    lose_for_real(ref)
    with pytest.raises(afield.ActorDiedError):
        afield.get(ref, timeout=30)
    assert log() == ["x", "x"]


@pytest.mark.usefixtures("shared_runtime")
def test_large_arguments_are_kept(log: Any) -> None:
    ref = plus.remote(log.path, "a", np.ones(LARGE))
    afield.wait([ref])
    arguments = ref.id[:TASK_ID_BYTES] + ARGUMENTS_INDEX
    assert participant().process.table.entries[arguments].state == LOCATED
    lose_for_real(ref)
    assert afield.get(ref, timeout=30)[0] == 2
    del ref
    assert poll(lambda: arguments not in participant().process.table.entries)


@pytest.mark.usefixtures("shared_runtime")
def test_a_borrower_waits_for_what_is_made_again(log: Any) -> None:
    class _Holder:
        def keep(self, refs: list[Any]) -> float:
            self.ref = refs[0]
            return float(afield.get(self.ref)[0])

        def read(self) -> float:
            found = participation.participant
            assert isinstance(found, Participant)
            found.process.locked(found.process.table.lost, self.ref.id)  # as a reader does that is told so
            return float(afield.get(self.ref, timeout=30)[0])

    ref = ones.remote(log.path, "a")
    holder = remote_with()(_Holder).remote()
    assert afield.get(holder.keep.remote([ref])) == 1
    lose_for_real(ref)
    assert afield.get(holder.read.remote(), timeout=60) == 1
    assert log() == ["a", "a"]


@pytest.mark.usefixtures("shared_runtime")
def test_the_worker_that_runs_it_again_may_die(log: Any) -> None:
    @afield.remote
    def die_once(path: str) -> Any:
        note(path, "x")
        if len(Path(path).read_text().split()) == 2:
            os._exit(1)
        return np.ones(LARGE)

    ref = die_once.remote(log.path)
    afield.wait([ref])
    lose_for_real(ref)
    assert afield.get(ref, timeout=30)[0] == 1
    assert log() == ["x"] * 3


@pytest.mark.usefixtures("shared_runtime")
def test_what_a_crashed_task_may_have_stored_is_not_freed_of_its_next_execution(log: Any) -> None:
    """A task that runs again makes its children again, under the same ids: one of them had crashed the first time."""

    @afield.remote(max_retries=0)
    def crash_once(path: str) -> Any:
        note(path, "child")
        if Path(path).read_text().split() == ["child"]:
            os._exit(1)
        return np.ones(LARGE)

    @afield.remote
    def parent(path: str) -> float:
        try:
            return float(afield.get(crash_once.remote(path))[0])
        except afield.WorkerCrashedError:
            afield.get(afield.remote(time.sleep).remote(0.1))  # by then the daemon knows what was given up
            os._exit(1)

    assert afield.get(parent.remote(log.path), timeout=60) == 1
    assert log() == ["child", "child"]


class _Crashing:
    """What ends its process after a result was stored, and before anybody heard of it; then does something else."""

    def run(self, path: str, then: str) -> Any:
        note(path, "run")
        if Path(path).read_text().split() == ["run"]:
            assert callable(Invocation.answer)
            Invocation.answer = lambda *_: os._exit(1)  # type: ignore[method-assign]
        elif then == "raise":
            raise ValueError("this time it fails")
        return np.ones(LARGE) if then != "inline" else 1

    def items(self, path: str) -> Any:
        for number in range(4):
            if number == 2 and Path(path).read_text().split() == ["run"]:
                os._exit(1)
            yield np.ones(LARGE)


@pytest.mark.slow
@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("actor", [False, True])
@pytest.mark.parametrize("retries", [0, 1])
@pytest.mark.parametrize("then", ["the same", "raise", "inline"])
def test_what_a_crashed_execution_has_stored_is_freed(log: Any, actor: bool, retries: int, then: str) -> None:
    if actor:
        handle = afield.remote(_Crashing).options(max_restarts=retries, max_task_retries=retries).remote()
        ref = handle.run.remote(log.path, then)
    else:
        ref = afield.remote(lambda *a: _Crashing().run(*a)).options(max_retries=retries).remote(log.path, then)
    if retries and then != "raise":
        afield.get(ref, timeout=30)
    else:
        with pytest.raises(AfieldError):
            afield.get(ref, timeout=30)
    assert len(log()) == 1 + retries
    del ref
    assert poll(lambda: stored_objects() == 0)


@pytest.mark.usefixtures("runtime")
def test_items_that_a_generator_yields_again_are_freed(log: Any) -> None:
    @remote_with(num_returns="streaming", max_retries=1)
    def items(path: str) -> Any:
        note(path, "run")
        yield from _Crashing().items(path)

    stream = iter(items.remote(log.path))
    for _ in range(4):
        assert afield.get(next(stream), timeout=30)[0] == 1  # and is let go of
    assert len(log()) == 2
    assert poll(lambda: stored_objects() == 0)


# -- arguments that are lost on their way ----------------------------------------------------------------------------


def test_a_task_whose_argument_is_lost_is_pushed_again_and_again_but_not_for_ever(runtime: Any, log: Any) -> None:
    """Workers that say `ARGUMENT_LOST` although the owner has not heard of a loss."""
    process, submitter = participant().process, participant().submitter
    argument = ones.remote(log.path, "a")
    afield.wait([argument])
    pushes: list[int] = []
    refused: set[int] = set()
    send_push, on_batch = submitter.pushes.send, submitter._on_batch
    limit = 3

    def push(channel: Any, state: Any, task: Any) -> int:
        sequence = send_push(channel, state, task)
        pushes.append(task.rounds)
        if task.rounds < limit:
            refused.add(sequence)
        return sequence

    def receive(channel: Any, batch: list[Any]) -> None:
        """The worker's own reply is exchanged: a second one beside it could come too late."""
        on_batch(
            channel,
            [
                messages.Reply(message.sequence, messages.ARGUMENT_LOST, b"")
                if type(message) is messages.Reply and message.sequence in refused
                else message
                for message in batch
            ],
        )

    submitter.pushes.send = push  # type: ignore[method-assign]
    process.handle_batches_by(receive)
    assert afield.get(plus.remote(log.path, "b", argument), timeout=30)[0] == 2
    assert pushes == [0, 1, 2, 3]
    limit = 1000
    pushes.clear()
    with pytest.raises(ObjectLostError, match=r"plus\(\) has not run"):
        afield.get(plus.remote(log.path, "c", argument), timeout=30)
    assert len(pushes) == MAX_ROUNDS + 1


@afield.remote
class Maker:
    """Its results cannot be made again."""

    def large(self) -> Any:
        return np.ones(4 * LARGE)

    def small(self) -> Any:
        return np.ones(LARGE)


def test_results_of_actors_are_kept_for_lineage_only_as_far_as_the_setting_allows(
    no_runtime: Any, log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFIELD_LINEAGE_MEMORY", "3MiB")
    afield.init(num_cpus=2)
    maker = Maker.remote()
    from_large = plus.remote(log.path, "large", maker.large.remote())
    from_small = plus.remote(log.path, "small", maker.small.remote())
    afield.wait([from_large, from_small], num_returns=2)
    assert poll(lambda: stored_objects() == 3), "the two results, and the small argument"
    lose_for_real(from_small, from_large)
    assert afield.get(from_small, timeout=30)[0] == 2
    with pytest.raises(ObjectLostError, match="AFIELD_LINEAGE_MEMORY"):
        afield.get(from_large, timeout=30)


def test_the_setting_of_lineage_must_be_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFIELD_LINEAGE_MEMORY", "much")
    with pytest.raises(afield.InvalidOptionError, match="AFIELD_LINEAGE_MEMORY: "):
        afield.init(num_cpus=1)
