"""What is large goes to the store, or in portions, and never makes a message that a peer refuses."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

import afield
from afield.runtime.calls.pushes import FEW_DEPENDENCIES, PORTION_BYTES
from afield.runtime.values.definitions import MAX_DEFINITION_BYTES
from afield.runtime.worker.outcomes import MAX_REPLY_BYTES
from afield.transport.channel import MAX_FRAME_BYTES

LARGE_BYTES = 3 * MAX_REPLY_BYTES
NEARLY_INLINE_BYTES = 90_000


class LargeError(Exception):
    """Carries `data`."""

    def __init__(self, data: Any) -> None:
        super().__init__("too much")
        self.data = data

    def __reduce__(self) -> tuple[Any, ...]:
        return LargeError, (self.data,)


@afield.remote
def fail(size: int) -> None:
    raise LargeError(os.urandom(size))


def test_a_function_that_has_captured_much(runtime: afield.ClusterInfo) -> None:
    table = np.arange(MAX_DEFINITION_BYTES)

    @afield.remote
    def look(index: int) -> int:
        return int(table[index])

    assert afield.get([look.remote(i) for i in range(20)], timeout=60) == list(range(20))
    assert afield.get(look.options(num_cpus=2).remote(7), timeout=60) == 7


def test_a_function_that_has_captured_a_ref_and_much(runtime: afield.ClusterInfo) -> None:
    table, ref = np.ones(MAX_DEFINITION_BYTES), afield.put(np.ones(MAX_DEFINITION_BYTES))

    @afield.remote
    def both() -> float:
        return float(table.sum() + afield.get(ref).sum())

    assert afield.get([both.remote(), both.remote()], timeout=60) == [2.0 * MAX_DEFINITION_BYTES] * 2


def test_an_actor_class_that_has_captured_much_also_starts_again(runtime: afield.ClusterInfo) -> None:
    table = np.ones(MAX_DEFINITION_BYTES)

    @afield.remote(max_restarts=1, max_task_retries=1)
    class Holder:
        def total(self) -> float:
            return float(table.sum())

        def pid(self) -> int:
            return os.getpid()

    holder = Holder.remote()
    del Holder
    assert afield.get(holder.total.remote(), timeout=60) == MAX_DEFINITION_BYTES
    first = afield.get(holder.pid.remote(), timeout=60)
    afield.kill(holder, no_restart=False)
    assert afield.get(holder.total.remote(), timeout=60) == MAX_DEFINITION_BYTES
    assert afield.get(holder.pid.remote(), timeout=60) != first


def test_a_large_error_is_raised_whole(runtime: afield.ClusterInfo) -> None:
    with pytest.raises(LargeError) as raised:
        afield.get(fail.remote(LARGE_BYTES), timeout=60)
    assert len(raised.value.cause.data) == LARGE_BYTES  # type: ignore[attr-defined]

    @afield.remote
    def after(value: Any) -> None:
        raise AssertionError("it must not run")

    with pytest.raises(LargeError):
        afield.get(after.remote(fail.remote(LARGE_BYTES)), timeout=60)
    with pytest.raises(LargeError):
        fail.remote(LARGE_BYTES).future().result(60)


def test_a_large_error_of_an_actor_and_of_several_results(runtime: afield.ClusterInfo) -> None:
    @afield.remote
    class Failing:
        def fail(self) -> None:
            raise LargeError(os.urandom(LARGE_BYTES))

    with pytest.raises(LargeError):
        afield.get(Failing.remote().fail.remote(), timeout=60)
    first, second = fail.options(num_returns=2).remote(LARGE_BYTES)
    for ref in (first, second):
        with pytest.raises(LargeError) as raised:
            afield.get(ref, timeout=60)
        assert len(raised.value.cause.data) == LARGE_BYTES  # type: ignore[attr-defined]


def test_a_large_error_that_is_to_be_retried_is(runtime: afield.ClusterInfo, tmp_path: Any) -> None:
    @afield.remote(max_retries=2, retry_exceptions=[LargeError])
    def third_time() -> str:
        path = tmp_path / "tries"
        path.write_bytes((path.read_bytes() if path.exists() else b"") + b"x")
        if path.stat().st_size < 3:
            raise LargeError(os.urandom(LARGE_BYTES))
        return "well"

    assert afield.get(third_time.remote(), timeout=60) == "well"
    with pytest.raises(LargeError):
        afield.get(fail.options(max_retries=2, retry_exceptions=[KeyError]).remote(LARGE_BYTES), timeout=60)


def test_large_errors_where_they_cannot_be_stored_are_described(runtime: afield.ClusterInfo) -> None:
    @afield.remote
    class Stillborn:
        def __init__(self) -> None:
            raise LargeError(os.urandom(LARGE_BYTES))

        def call(self) -> None: ...

    with pytest.raises(
        afield.ActorConstructionError, match=r"LargeError .the exception itself could not be sent: MessageToo"
    ):
        afield.get(Stillborn.remote().call.remote(), timeout=60)

    @afield.remote
    def items() -> Any:
        yield 1
        raise LargeError(os.urandom(LARGE_BYTES))

    stream = items.remote()
    assert afield.get(next(stream), timeout=60) == 1
    with pytest.raises(afield.TaskError, match="LargeError"):
        afield.get(next(stream), timeout=60)


def test_many_arguments_arrive_in_order(runtime: afield.ClusterInfo) -> None:
    count = 2 * FEW_DEPENDENCIES + 2 * PORTION_BYTES // NEARLY_INLINE_BYTES

    @afield.remote
    def first_bytes(*parts: bytes) -> list[int]:
        return [part[0] for part in parts]

    refs = [afield.put(bytes([i]) * NEARLY_INLINE_BYTES) for i in range(count)]
    assert afield.get([first_bytes.remote(*refs) for _ in range(3)], timeout=60) == [list(range(count))] * 3


def test_of_many_results_those_beyond_a_bound_are_stored(runtime: afield.ClusterInfo) -> None:
    count = 3 * MAX_REPLY_BYTES // NEARLY_INLINE_BYTES

    @afield.remote(num_returns=count)
    def many() -> list[bytes]:
        return [bytes([i]) * NEARLY_INLINE_BYTES for i in range(count)]

    values = afield.get(many.remote(), timeout=60)
    assert [value[0] for value in values] == list(range(count))
    assert {len(value) for value in values} == {NEARLY_INLINE_BYTES}


@pytest.fixture
def small_frames(runtime: afield.ClusterInfo, monkeypatch: pytest.MonkeyPatch) -> int:
    """A driver whose channels send no frame over 200,000 bytes; the other processes are as always."""
    limit = 200_000
    monkeypatch.setattr("afield.transport.channel.MAX_FRAME_BYTES", limit)
    return limit


def test_what_the_driver_cannot_send_is_an_error_there(small_frames: int) -> None:
    table = bytes(MAX_DEFINITION_BYTES - 10_000)  # just not stored

    @afield.remote
    def length(*parts: bytes) -> int:
        return sum(map(len, parts)) + len(table)

    @afield.remote
    def plain(*parts: bytes) -> int:
        return sum(map(len, parts))

    refs = [afield.put(bytes(NEARLY_INLINE_BYTES)) for _ in range(5)]
    bad, good = [plain.remote(*refs), length.remote()], [plain.remote(refs[0]) for _ in range(50)]
    for ref in [*bad, length.remote()]:
        with pytest.raises(afield.errors.MessageTooLargeError, match="a message may have 200000"):
            afield.get(ref, timeout=60)
    assert afield.get(good, timeout=60) == [NEARLY_INLINE_BYTES] * 50


def test_what_the_driver_cannot_tell_of_an_actor_is_an_error_there(small_frames: int) -> None:
    table = bytes(MAX_DEFINITION_BYTES - 10_000)

    @afield.remote
    class Holder:
        def length(self, *parts: bytes) -> int:
            return sum(map(len, parts)) + len(table)

    with pytest.raises(afield.ActorDiedError, match="a message may have 200000"):
        afield.get(Holder.remote().length.remote(), timeout=60)

    @afield.remote
    class Light:
        def length(self, *parts: bytes) -> int:
            return sum(map(len, parts))

    light = Light.remote()
    refs = [afield.put(bytes(NEARLY_INLINE_BYTES)) for _ in range(5)]
    first, large, last = light.length.remote(), light.length.remote(*refs), light.length.remote(refs[0])
    assert afield.get([first, last], timeout=60) == [0, NEARLY_INLINE_BYTES]
    with pytest.raises(afield.errors.MessageTooLargeError):
        afield.get(large, timeout=60)
    with pytest.raises(afield.AfieldError, match="a message may have 200000"):
        afield.get_actor("x" * small_frames)


def test_what_a_worker_cannot_answer_is_an_error_at_its_caller(runtime: afield.ClusterInfo) -> None:
    class Answers:
        def limit(self) -> None:
            from afield.transport import channel

            channel.MAX_FRAME_BYTES = 50_000

        def answer(self, size: int) -> bytes:
            return bytes(size)

        @afield.method(num_returns=2)
        def two(self) -> tuple[bytes, bytes]:
            return bytes(40_000), bytes(40_000)

        def items(self) -> Any:
            yield from (bytes(10), bytes(60_000), bytes(11))

    actor = afield.remote(Answers).remote()
    afield.get(actor.limit.remote(), timeout=60)
    refs = [actor.answer.remote(60_000), *actor.two.remote()]
    for ref in refs:
        with pytest.raises(afield.errors.MessageTooLargeError, match="a message may have 50000"):
            afield.get(ref, timeout=60)
    stream = actor.items.remote()
    assert afield.get(next(stream), timeout=60) == bytes(10)
    with pytest.raises(afield.errors.MessageTooLargeError):
        afield.get(next(stream), timeout=60)
    assert afield.get(next(stream), timeout=60) == bytes(11)
    assert afield.get(actor.answer.remote(100), timeout=60) == bytes(100)


@pytest.mark.slow
def test_beyond_the_size_of_a_frame(no_runtime: None) -> None:
    afield.init(num_cpus=2, host_memory=4 << 30)
    table = np.ones(MAX_FRAME_BYTES // 8 + 1000)

    @afield.remote
    def total() -> float:
        return float(table.sum())

    assert afield.get(total.remote(), timeout=120) == len(table)
    with pytest.raises(LargeError):
        afield.get(fail.remote(MAX_FRAME_BYTES + 1000), timeout=120)

    @afield.remote
    def length(*parts: bytes) -> int:
        return sum(map(len, parts))

    count = MAX_FRAME_BYTES // NEARLY_INLINE_BYTES + 10
    refs = [afield.put(bytes(NEARLY_INLINE_BYTES)) for _ in range(count)]
    assert afield.get(length.remote(*refs), timeout=120) == count * NEARLY_INLINE_BYTES
