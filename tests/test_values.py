"""Values: what goes in comes out, large ones without copies, and none lives longer than its last reference."""

from __future__ import annotations

import gc
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pytest

import afield
from afield.runtime.cores.objects import LOCATED
from afield.runtime.face import api
from afield.runtime.process import current
from afield.runtime.process.process import INLINE_BYTES
from tests.helpers import HANG_S, mappings, poll, traces

MIB = 2**20
PATIENCE_S = 30.0


def store() -> dict[str, int]:
    """Return the daemon's books."""
    books: dict[str, int] = api.query("store")
    return books


def sealed() -> int:
    """Return the bytes of all objects in the store."""
    return store()["sealed"]


def assert_sealed(expected: int) -> None:
    """Fail unless the store comes to hold exactly this many bytes of objects."""
    gc.collect()
    assert poll(lambda: sealed() == expected, PATIENCE_S), f"{sealed()} bytes are sealed, not {expected}: {store()}"


def address(array: npt.NDArray[Any]) -> int:
    """Return where an array's memory begins."""
    place: int = array.__array_interface__["data"][0]
    return place


def is_shared(array: npt.NDArray[Any]) -> bool:
    """Tell whether an array lies in this session's shared memory."""
    import os

    ranges = [line.split()[0].split("-") for line in mappings(traces(), os.getpid())]
    return any(int(start, 16) <= address(array) < int(end, 16) for start, end in ranges)


# -- round trips --------------------------------------------------------------------------------------------------


@dataclass
class Point:
    """A value of our own making."""

    x: float
    y: Any


PLAIN: list[Any] = [
    None,
    0,
    -(2**100),
    1.5,
    float("inf"),
    True,
    "",
    "text ∂",
    b"",
    b"\x00\x01\x80",
    bytearray(b"ab"),
    1j,
    (),
    [],
    {},
    (1, [2, {"three": (4,)}]),
    {1, 2},
    frozenset([1]),
    OrderedDict(a=1),
    datetime(2026, 1, 2, 3, 4, 5),
    Point(1.0, [None]),
    [list(range(200))],
    {i: str(i) for i in range(200)},
    "x" * (INLINE_BYTES - 50),
    "x" * (INLINE_BYTES + 50),
    b"\x01" * MIB,
    [b"a" * MIB, b"b" * MIB],
]


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: f"{type(value).__name__}-{repr(value)[:12]}")
def test_objects_make_the_round_trip(shared_runtime: None, value: Any) -> None:
    for again in (afield.get(afield.put(value)), afield.get(afield.remote(lambda x: x).remote(value))):
        assert again == value
        assert type(again) is type(value)


ARRAYS = [
    np.arange(10),
    np.zeros((0, 3)),
    np.array(3.5),
    np.arange(24.0).reshape(2, 3, 4)[:, ::-1, ::2],
    np.asfortranarray(np.arange(12).reshape(3, 4)),
    np.array(["a", "bcd"]),
    np.array([1, "two", None], dtype=object),
    np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
    np.array(["2026-01-01"], dtype="datetime64[D]"),
    np.arange(500_000, dtype=np.int16).reshape(1000, 500),
    np.asfortranarray(np.arange(200_000.0).reshape(400, 500)),
    np.ma.masked_array(np.arange(5), mask=[False, True, False, False, True]),
]


@pytest.mark.contract("numpy")
@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}-{array.shape}")
def test_arrays_make_the_round_trip(shared_runtime: None, array: npt.NDArray[Any]) -> None:
    for again in (afield.get(afield.put(array)), afield.get(afield.remote(lambda x: x).remote(array))):
        np.testing.assert_array_equal(again, array)
        assert again.dtype == array.dtype and again.shape == array.shape and type(again) is type(array)


def frame(rows: int) -> pd.DataFrame:
    """Return a table of several kinds of columns."""
    return pd.DataFrame({"i": np.arange(rows), "f": np.linspace(0, 1, rows), "s": [f"row {i}" for i in range(rows)]})


@pytest.mark.contract("pandas")
@pytest.mark.parametrize("rows", [3, 40_000])
def test_pandas_makes_the_round_trip(shared_runtime: None, rows: int) -> None:
    table = frame(rows)
    pd.testing.assert_frame_equal(afield.get(afield.put(table)), table)
    pd.testing.assert_frame_equal(afield.get(afield.remote(lambda x: x).remote(table)), table)
    counted = afield.remote(lambda x: (len(x), int(x["i"].sum()))).remote(afield.put(table))
    assert afield.get(counted) == (rows, rows * (rows - 1) // 2)


@pytest.mark.contract("pyarrow")
@pytest.mark.parametrize("rows", [3, 40_000])
def test_pyarrow_makes_the_round_trip_without_a_copy(shared_runtime: None, rows: int) -> None:
    table = pa.table({"i": np.arange(rows), "s": [str(i) for i in range(rows)]})
    again = afield.get(afield.put(table))
    assert again.equals(table)
    if rows > 1000:
        place = again.column("i").chunk(0).buffers()[1].address
        assert is_shared(np.frombuffer(again.column("i").chunk(0).buffers()[1], np.uint8))
        assert place % 64 == 0


# -- zero copies --------------------------------------------------------------------------------------------------


@pytest.mark.contract("numpy")
def test_large_arrays_are_read_only_aligned_views_of_shared_memory(shared_runtime: None) -> None:
    ref = afield.put([np.arange(MIB), np.ones(MIB // 2, np.float32)])
    before = afield.stats(local=True)
    for array in afield.get(ref):
        assert is_shared(array)
        assert address(array) % 64 == 0
        assert not array.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
    after = afield.stats(local=True)
    assert after["bytes_copied_in"] == before["bytes_copied_in"]
    assert after["bytes_shared"] - before["bytes_shared"] >= 8 * MIB


def test_readers_share_one_copy(shared_runtime: None) -> None:
    ref = afield.put(np.arange(MIB))
    a, b = afield.get([ref, ref])
    assert address(a) == address(b)


def test_a_task_reads_its_argument_in_place(runtime: afield.ClusterInfo) -> None:
    @afield.remote
    def look(array: npt.NDArray[Any]) -> tuple[int, bool, float, float]:
        copied = afield.stats(local=True)["bytes_copied_in"]
        aligned = array.__array_interface__["data"][0] % 64 == 0
        return int(array.sum()), aligned and not array.flags.writeable, copied, afield.stats(local=True)["bytes_shared"]

    ref = afield.put(np.ones(MIB, np.int64))
    total, fine, copied, shared = afield.get(look.remote(ref))
    assert (total, fine, copied) == (MIB, True, 0) and shared >= 8 * MIB
    total, fine, copied, _ = afield.get(look.remote(np.ones(MIB, np.int64)))  # by value: written once, by us
    assert (total, fine, copied) == (MIB, True, 0)


def test_a_changed_original_does_not_change_the_object(shared_runtime: None) -> None:
    original = np.zeros(MIB)
    ref = afield.put(original)
    original[:] = 1
    assert not afield.get(ref).any()


# -- born in the store --------------------------------------------------------------------------------------------


@pytest.mark.contract("numpy")
def test_what_is_born_in_the_store_is_not_copied(shared_runtime: None) -> None:
    @afield.remote
    def produce(n: int) -> tuple[npt.NDArray[Any], float]:
        array = afield.empty((4, n // 4), np.float64)
        array[:] = 7
        return array.reshape(n), afield.stats(local=True)["bytes_copied_in"]

    class Producer:
        def make(self, n: int) -> npt.NDArray[Any]:
            array = afield.empty(n, "float64")
            array[:] = 7
            return array

        def counters(self) -> tuple[float, float]:
            return afield.stats(local=True)["bytes_copied_in"], afield.stats(local=True)["bytes_born"]

    array, _ = afield.get(produce.remote(MIB))
    assert array.shape == (MIB,) and (array == 7).all()
    assert is_shared(array) and not array.flags.writeable and address(array) % 64 == 0
    producer = afield.remote(Producer).remote()
    copied_before, born_before = afield.get(producer.counters.remote())
    array = afield.get(producer.make.remote(MIB))
    assert (array == 7).all() and is_shared(array)
    copied, born = afield.get(producer.counters.remote())
    assert born - born_before == 8 * MIB and copied - copied_before < 4096
    afield.kill(producer)


def test_what_the_producer_still_holds_is_copied(shared_runtime: None) -> None:
    class Producer:
        def make(self) -> npt.NDArray[Any]:
            self.before = afield.stats(local=True)
            self.array = afield.empty(MIB, np.uint8)
            self.array[:] = 1
            return self.array

        def scribble(self) -> tuple[float, float]:
            self.array[:] = 2
            now = afield.stats(local=True)
            return tuple(now[name] - self.before[name] for name in ("bytes_copied_in", "bytes_born"))  # type: ignore[return-value]

    producer = afield.remote(Producer).remote()
    ref = producer.make.remote()
    array = afield.get(ref)
    copied, born = afield.get(producer.scribble.remote())
    assert (array == 1).all() and (afield.get(ref) == 1).all()
    assert copied >= MIB and born == 0
    afield.kill(producer)


@pytest.mark.parametrize("shape", [0, 1, (0, 5), (3, 4), (), 1000])
def test_empty_makes_ordinary_arrays(shared_runtime: None, shape: Any) -> None:
    array = afield.empty(shape, "int32")
    assert array.shape == np.empty(shape).shape and array.dtype == np.int32 and array.flags.writeable
    array[...] = 5
    assert (afield.get(afield.put(array)) == 5).all()


def test_empty_refuses_objects(shared_runtime: None) -> None:
    with pytest.raises(TypeError, match="numeric dtype"):
        afield.empty(3, object)


def test_what_was_born_and_dropped_gives_its_room_back(runtime: afield.ClusterInfo) -> None:
    before = store()["leased"]
    arrays = [afield.empty(8 * MIB, np.uint8) for _ in range(3)]
    assert store()["leased"] >= before + 24 * MIB
    del arrays
    assert poll(lambda: store()["leased"] == before, PATIENCE_S), store()


# -- the life of values -------------------------------------------------------------------------------------------


def test_a_put_value_is_freed_with_its_last_ref(runtime: afield.ClusterInfo) -> None:
    base = sealed()
    ref = afield.put(np.ones(MIB))
    same = ref
    assert sealed() >= base + 8 * MIB
    del ref
    assert sealed() >= base + 8 * MIB
    del same
    assert_sealed(base)


def test_a_value_is_freed_while_another_thread_waits(runtime: afield.ClusterInfo, tmp_path: Path) -> None:
    """The waiting thread sleeps in the loop, and only the dropping one knows that there is something to do."""

    def stored_here() -> int:
        """Count what this process has in the store, without asking anybody: a question would wake the loop."""
        process = current.process
        assert process is not None
        return sum(entry.state == LOCATED for entry in list(process.table.entries.values()))

    path = tmp_path / "gate"
    pending = afield.remote(lambda: poll(path.exists)).remote()
    ref = afield.put(np.ones(MIB))
    thread = threading.Thread(target=lambda: afield.wait([pending], timeout=HANG_S))
    thread.start()
    time.sleep(0.1)  # until it sleeps in the loop; were it not there yet, the test would pass anyway
    assert stored_here() == 1
    del ref
    assert poll(lambda: stored_here() == 0, 3)
    path.touch()
    thread.join(HANG_S)


def test_a_task_s_arguments_and_results_are_freed(runtime: afield.ClusterInfo) -> None:
    base = sealed()
    twice = afield.remote(lambda x: x + x)
    ref = twice.remote(np.ones(MIB))
    for _ in range(3):
        ref = twice.remote(ref)
    assert afield.get(ref)[0] == 16
    # The intermediate ones are gone already. The argument stays, as the last one is made from it should it be lost.
    assert poll(lambda: sealed() - base < 17 * MIB, PATIENCE_S)
    del ref
    assert_sealed(base)


def test_a_result_that_nobody_waits_for_is_freed(runtime: afield.ClusterInfo) -> None:
    base = sealed()
    make = afield.remote(lambda: np.ones(MIB))
    for _ in range(5):
        make.remote()
    assert afield.get(afield.remote(num_cpus=2)(lambda: 1).remote()) == 1
    assert_sealed(base)


def test_several_returns_are_freed_one_by_one(runtime: afield.ClusterInfo) -> None:
    base = sealed()
    a, b = afield.remote(num_returns=2)(lambda: (np.ones(MIB), np.ones(2 * MIB))).remote()
    afield.get([a, b])
    assert poll(lambda: 24 * MIB <= sealed() - base < 25 * MIB, PATIENCE_S)
    del b
    assert poll(lambda: 8 * MIB <= sealed() - base < 9 * MIB, PATIENCE_S)
    del a
    assert_sealed(base)


def test_the_inner_lives_while_the_outer_lives(runtime: afield.ClusterInfo) -> None:
    base = sealed()
    inner = afield.put(np.ones(MIB))
    outer = afield.put([inner])
    del inner
    again = afield.get(outer)[0]
    assert afield.get(again)[0] == 1
    del again
    gc.collect()
    assert afield.get(afield.get(outer)[0])[0] == 1
    del outer
    assert_sealed(base)


def test_refs_that_a_task_made_and_returned_are_freed(runtime: afield.ClusterInfo) -> None:
    base = sealed()
    make = afield.remote(lambda: [afield.put(np.ones(MIB)) for _ in range(3)])
    refs = afield.get(make.remote())
    assert sum(afield.get(ref)[0] for ref in refs) == 3
    del refs
    assert_sealed(base)


def test_an_actor_that_keeps_a_ref_keeps_its_value(runtime: afield.ClusterInfo) -> None:
    base = sealed()

    class Keeper:
        def keep(self, boxed: list[Any]) -> None:
            self.ref = boxed[0]

        def read(self) -> float:
            return float(afield.get(self.ref).sum())

        def drop(self) -> None:
            del self.ref

    keeper = afield.remote(Keeper).remote()
    ref = afield.put(np.ones(MIB))
    afield.get(keeper.keep.remote([ref]))
    del ref
    assert afield.get(keeper.read.remote()) == MIB
    afield.get(keeper.drop.remote())
    assert_sealed(base)


@pytest.mark.parametrize("by_ref", [True, False])
def test_an_actor_that_keeps_an_argument_s_memory_keeps_it_alive(runtime: afield.ClusterInfo, by_ref: bool) -> None:
    base = sealed()

    class Keeper:
        array: Any = None

        def keep(self, array: npt.NDArray[Any]) -> None:
            self.array = array[10:]

        def total(self) -> float:
            return float(self.array.sum())

        def drop(self) -> None:
            self.array = None

    keeper = afield.remote(Keeper).remote()
    array = np.ones(MIB)
    afield.get(keeper.keep.remote(afield.put(array) if by_ref else array))
    for _ in range(4):  # what would be written over it, were it free
        afield.get(afield.put(np.zeros(MIB)))
    assert afield.get(keeper.total.remote()) == MIB - 10
    assert sealed() >= base + 8 * MIB
    afield.get(keeper.drop.remote())
    assert_sealed(base)


def test_memory_that_an_actor_keeps_from_a_failed_call_stays_as_it_is(runtime: afield.ClusterInfo) -> None:
    base = sealed()

    class Keeper:
        array: Any = None

        def keep(self, array: npt.NDArray[Any]) -> None:
            self.array = array
            raise RuntimeError("after keeping it")

        def total(self) -> float:
            return float(self.array.sum())

        def drop(self) -> None:
            self.array = None

    keeper = afield.remote(Keeper).remote()
    with pytest.raises(RuntimeError, match="after keeping it"):
        afield.get(keeper.keep.remote(afield.put(np.ones(MIB))))
    for _ in range(4):
        afield.get(afield.put(np.zeros(MIB)))
    assert afield.get(keeper.total.remote()) == MIB
    afield.get(keeper.drop.remote())
    assert_sealed(base)


def test_what_a_dead_actor_held_and_owned_is_freed(runtime: afield.ClusterInfo) -> None:
    base = sealed()

    class Keeper:
        def keep(self, boxed: list[Any]) -> None:
            self.kept = [boxed[0], afield.put(np.ones(MIB)), afield.get(boxed[0])]

    keeper = afield.remote(Keeper).remote()
    ref = afield.put(np.ones(MIB))
    afield.get(keeper.keep.remote([ref]))
    del ref
    assert sealed() >= base + 16 * MIB
    afield.kill(keeper)
    assert_sealed(base)


def test_views_outlive_their_ref(runtime: afield.ClusterInfo) -> None:
    base = sealed()
    ref = afield.put(np.arange(MIB))
    part = afield.get(ref)[5:10]
    del ref
    for _ in range(4):
        afield.get(afield.put(np.zeros(MIB)))
    assert part.tolist() == [5, 6, 7, 8, 9]
    assert sealed() >= base + 8 * MIB
    del part
    assert_sealed(base)


def test_views_outlive_shutdown(no_runtime: None) -> None:
    afield.init(num_cpus=1)
    array = afield.get(afield.put(np.arange(MIB)))
    born = afield.empty(1000, np.int64)
    afield.shutdown()
    born[:] = 3
    assert array.sum() == MIB * (MIB - 1) // 2 and born.sum() == 3000
    afield.init(num_cpus=1)
    del array, born
    assert afield.get(afield.put(np.arange(MIB)))[-1] == MIB - 1


def test_shutdown_gives_the_shared_memory_back(no_runtime: None) -> None:
    import os

    afield.init(num_cpus=1)
    session = traces()
    function = afield.remote(lambda x: x)  # outlives the runtime, as functions of modules do
    ref = afield.put(np.ones(MIB))
    assert afield.get(function.remote(ref)).sum() == MIB
    assert mappings(session, os.getpid())
    afield.shutdown()
    gc.collect()
    assert not mappings(session, os.getpid())
    assert function is not None and ref is not None


def test_put_in_a_loop_uses_the_same_room_again(no_runtime: None) -> None:
    afield.init(num_cpus=1, host_memory="64MiB")
    for i in range(30):
        assert afield.get(afield.put(np.full(MIB, i)))[-1] == i
    double = afield.remote(lambda x: 2 * x)
    for i in range(15):
        assert afield.get(double.remote(np.full(MIB, i)))[-1] == 2 * i


# -- a full store -------------------------------------------------------------------------------------------------


def test_a_full_store_refuses_with_the_arithmetic(no_runtime: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFIELD_STORE_WAIT_S", "0.5")
    afield.init(num_cpus=1, host_memory="64MiB")
    held = [afield.get(afield.put(np.ones(2 * MIB))) for _ in range(3)]  # what somebody reads cannot be spilled
    started = time.monotonic()
    with pytest.raises(afield.ObjectStoreFullError) as caught:
        afield.put(np.ones(3 * MIB))
    assert 0.4 < time.monotonic() - started < 10
    for part in ("24", "64 MiB", "48"):  # asked for, there, and taken
        assert part in str(caught.value), str(caught.value)
    assert isinstance(caught.value, MemoryError)
    held.clear()
    assert afield.get(afield.put(np.ones(3 * MIB))).sum() == 3 * MIB


def test_what_never_fits_is_refused_at_once(no_runtime: None) -> None:
    afield.init(num_cpus=1, host_memory="64MiB")
    started = time.monotonic()
    with pytest.raises(afield.ObjectStoreFullError, match="64 MiB"):
        afield.put(np.ones(9 * MIB))
    assert time.monotonic() - started < 5
    with pytest.raises(afield.ObjectStoreFullError):
        afield.empty(65 * MIB, np.uint8)


def test_a_task_whose_result_does_not_fit_says_so(no_runtime: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFIELD_STORE_WAIT_S", "0.2")
    afield.init(num_cpus=1, host_memory="64MiB")
    held = afield.get(afield.put(np.ones(5 * MIB)))
    ref = afield.remote(lambda: np.ones(4 * MIB)).remote()
    with pytest.raises(afield.ObjectStoreFullError, match="64 MiB"):
        afield.get(ref, timeout=PATIENCE_S)
    assert held is not None


def test_a_producer_waits_until_there_is_room(no_runtime: None) -> None:
    afield.init(num_cpus=1, host_memory="64MiB")
    held = [afield.get(afield.put(np.ones(7 * MIB)))]
    started, done = threading.Event(), threading.Event()

    def produce() -> None:
        started.set()
        assert afield.get(afield.put(np.ones(4 * MIB)))[0] == 1
        done.set()

    thread = threading.Thread(target=produce)
    thread.start()
    assert started.wait(HANG_S)
    assert not done.wait(0.1)
    held.clear()
    assert done.wait(5)  # well before the time after which it would be refused
    thread.join(HANG_S)


def test_a_waiting_task_gets_the_room_of_another(no_runtime: None) -> None:
    afield.init(num_cpus=2, host_memory="64MiB")
    make = afield.remote(lambda i: np.full(4 * MIB, i, np.float64))
    refs = [make.remote(i) for i in range(5)]  # 160 MiB in all
    seen = []
    while refs:
        (ready,), refs = afield.wait(refs, timeout=HANG_S)
        seen.append(int(afield.get(ready)[0]))
        del ready
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_arrays_of_small_values_are_aligned(shared_runtime: None) -> None:
    def where(value: Any) -> list[int]:
        return [array.__array_interface__["data"][0] % 64 for array in value.values()]

    remote_where = afield.remote(where)
    for size in (1, 5, 100, 1000, 9000):
        value = {"a": np.arange(size), "b": np.ones((3, 5)), "c": np.arange(7, dtype="i2")}
        ref = afield.put(value)
        back = afield.get(ref)
        assert where(back) == [0, 0, 0] and not back["a"].flags.writeable and (back["a"] == value["a"]).all()
        assert afield.get([remote_where.remote(ref), remote_where.remote(value)]) == [[0, 0, 0]] * 2
