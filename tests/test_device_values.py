"""Values with device arrays, in real processes on emulated devices: from everywhere, to everywhere, and what was copied."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import afield
from afield.errors import NoDeviceError, SerializationError, TaskError
from tests.device_helpers import (
    MIB,
    PATIENCE_S,
    assert_settled,
    movement,
    on_device,
    raised_by,
    runtime_with,
    sealed,
    tiers,
    uuids,
)
from tests.helpers import remote_with


@pytest.fixture(scope="module")
def _devices() -> Iterator[None]:
    with runtime_with("emulated:2:64MiB"):
        yield


@pytest.fixture(autouse=True)
def _settled(_devices: None) -> Iterator[None]:
    yield
    assert_settled()


def get(refs: Any, **options: Any) -> Any:
    """`afield.get` that does not wait for ever."""
    return afield.get(refs, timeout=PATIENCE_S, **options)


@dataclass
class Model:
    weights: Any
    rest: Any


@on_device
def ones(count: int) -> Any:
    return afield.array_module().ones(count, "u1")


@on_device
def total(array: Any) -> int:
    assert type(array).__name__ == "EmulatedArray"
    return int(array.sum())


@afield.remote
def total_on_host(array: Any) -> tuple[str, bool, int]:
    return type(array).__name__, array.flags.writeable, int(array.sum())


# -- what is in a value -------------------------------------------------------------------------------------------


def test_arrays_anywhere_in_a_value() -> None:
    @on_device
    def make() -> Any:
        cp = afield.array_module()
        x = cp.arange(1000, dtype="f4")
        views = (x, x[10:20], x[::2], x.reshape(10, 100).T, x[::-1])
        return Model(
            {"views": views}, [cp.zeros((0, 3)), cp.zeros(()), cp.asfortranarray(cp.ones((3, 4))), np.arange(5)]
        )

    @on_device
    def look(model: Model) -> Any:
        x, part, strided, transposed, back = model.weights["views"]
        none, scalar, fortran, host = model.rest
        assert [type(array).__name__ for array in (x, none, scalar, host)] == ["EmulatedArray"] * 3 + ["ndarray"]
        assert fortran.flags.f_contiguous and (none.shape, scalar.shape) == ((0, 3), ())
        return [float(array.sum()) for array in (x, part, strided, back)], float(transposed[5, 3]), transposed.strides

    ref = make.remote()
    sums, element, strides = get(look.remote(ref))
    assert sums == [499500.0, 145.0, 249500.0, 499500.0] and element == 305.0 and strides == (4, 400)
    value = get(ref)
    x, part, strided, transposed, back = value.weights["views"]
    assert all(type(array) is np.ndarray and not array.flags.writeable for array in (x, part, *value.rest[:3]))
    assert np.shares_memory(x, strided) and transposed.strides == (4, 400) and back[0] == 999
    assert value.rest[0].shape == (0, 3) and value.rest[3].sum() == 10


def test_every_dtype_keeps_its_bits() -> None:
    dtypes = ["?", "i1", "u2", "i4", "u8", "f2", "f4", "f8", "c8", "c16"]

    @on_device
    def make() -> Any:
        cp = afield.array_module()
        return {dtype: cp.arange(20).reshape(4, 5).astype(dtype) for dtype in dtypes}

    @on_device
    def back(arrays: Any) -> Any:
        return {dtype: array.get() for dtype, array in arrays.items()}

    ref = make.remote()
    for value in (get(ref), get(back.remote(ref))):
        for dtype in dtypes:
            expected = np.arange(20).reshape(4, 5).astype(dtype)
            assert value[dtype].dtype == expected.dtype
            np.testing.assert_array_equal(value[dtype], expected)


def test_one_array_many_times_is_stored_once() -> None:
    @on_device
    def make() -> Any:
        x = afield.array_module().ones(MIB, "u1")
        return x, x, [x, x[: MIB // 2]]

    ref = make.remote()
    afield.wait([ref])
    assert sum(sealed(uuid) for uuid in uuids()) == MIB
    first, second, (third, half) = get(ref)
    assert first is second is third and np.shares_memory(first, half)


def test_a_small_view_does_not_keep_the_large_array() -> None:
    @on_device
    def make() -> Any:
        return afield.array_module().arange(8 * MIB, dtype="u1")[100:200]

    ref = make.remote()
    assert get(ref)[0] == 100
    assert sum(sealed(uuid) for uuid in uuids()) < 4096


def test_a_frame_of_more_than_a_message_with_host_and_device_arrays() -> None:
    @on_device
    def make() -> Any:
        cp = afield.array_module()
        born = afield.empty(50_000, "f8")
        born[:] = 2
        return {"host": np.arange(100_000), "device": cp.arange(100_000), "born": born, "text": "x" * 200_000}

    @on_device
    def use(value: Any) -> Any:
        return [type(part).__name__ for part in value.values()], [
            int(value[k].sum()) for k in ("host", "device", "born")
        ]

    with movement() as moved:
        ref = make.remote()
        kinds, sums = get(use.remote(ref))
    assert kinds == ["ndarray", "EmulatedArray", "ndarray", "str"] and sums == [4999950000, 4999950000, 100_000]
    assert moved["bytes_born"] == 400_000 and moved["device_bytes_born"] == 800_000
    assert moved["device_bytes_copied"] == moved["device_to_host"] == 0
    value = get(ref)
    assert value["text"] == "x" * 200_000 and int(value["device"][-1]) == 99_999


@on_device
def nothing(frame_bytes: int) -> Any:
    return afield.array_module().zeros((0, 2), "f4"), b"x" * frame_bytes


@pytest.mark.parametrize("frame_bytes", [0, 300_000])
def test_an_array_of_size_0_is_where_it_is_wanted(frame_bytes: int) -> None:
    ref = nothing.remote(frame_bytes)
    kind, device = get(on_device(lambda value: (type(value[0]).__name__, str(value[0].device))).remote(ref))
    assert kind == "EmulatedArray" and device == "<CUDA Device 0>"
    assert type(get(ref)[0]) is np.ndarray
    array = get(ref, device=1)[0]
    assert type(array).__name__ == "EmulatedArray" and str(array.device) == "<CUDA Device 1>"
    assert array.shape == (0, 2) and array.dtype == "f4"
    assert type(get(ref, device="host")[0]) is np.ndarray


def test_thousands_of_small_arrays_in_one_value() -> None:
    @on_device
    def make(count: int) -> Any:
        cp = afield.array_module()
        return [cp.full(3, index) for index in range(count)]

    arrays = get(make.remote(1000))
    assert [int(array[0]) for array in arrays] == list(range(1000))


def test_many_small_objects() -> None:
    @on_device
    def make(index: int) -> Any:
        return afield.array_module().full(3, index)

    @on_device
    def add(*arrays: Any) -> int:
        return int(sum(arrays)[0])

    refs = [make.remote(index) for index in range(1000)]
    sums = [add.remote(*refs[start : start + 50]) for start in range(0, 1000, 50)]
    assert sum(get(sums)) == 499500
    assert int(get(refs[-1])[0]) == 999


# -- who reads, and what that copies ------------------------------------------------------------------------------


def test_a_result_is_handed_on_without_a_copy() -> None:
    @on_device
    def sum_of(array: Any) -> int:
        assert not array.flags.writeable
        return int(array[:10].sum())

    with movement() as moved:
        ref = ones.remote(16 * MIB)
        assert get([sum_of.remote(ref) for _ in range(3)]) == [10, 10, 10]
    assert moved["device_bytes_born"] == 16 * MIB and moved["device_bytes_copied"] == 0
    assert moved["device_bytes_shared"] >= 3 * 16 * MIB


def test_a_result_that_is_kept_is_copied_once_and_the_copy_does_not_change() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.weights = afield.array_module().zeros(MIB, "u1")

        def in_place(self) -> Any:
            self.weights += 1
            return self.weights

        def replace(self) -> Any:
            self.weights = self.weights + 1
            return self.weights

    trainer = remote_with(num_gpus=1)(Trainer).remote()
    with movement() as moved:
        values = get([trainer.in_place.remote() for _ in range(4)] + [trainer.replace.remote() for _ in range(3)])
        assert [int(value[0]) for value in values] == [1, 2, 3, 4, 5, 6, 7]
    assert moved["device_bytes_copied"] == 7 * MIB


def test_the_update_that_training_does_makes_a_new_array() -> None:
    @on_device
    def step(weights: Any, gradient: Any) -> Any:
        assert raised_by(lambda: weights.__isub__(gradient), ValueError)
        weights = weights - 0.5 * gradient  # `weights -= ...` would write to what is stored
        weights -= 1.0
        return weights

    cp = afield.array_module()
    first = afield.put(cp.full(1000, 10.0))
    gradient = afield.put(cp.full(1000, 2.0))
    weights = first
    for _ in range(3):
        weights = step.remote(weights, gradient)
    assert get(weights)[0] == 4.0 and get(first)[0] == 10.0


def test_arguments_cannot_be_written_to() -> None:
    @on_device
    def assign(array: Any) -> None:
        array[0] = 1

    @on_device
    def add(array: Any) -> None:
        array += 1

    @on_device
    def fill(array: Any) -> None:
        array.fill(3)

    @on_device
    def out(array: Any) -> None:
        import cupy as cp

        cp.add(array, 1, out=array)

    @on_device
    def set_(array: Any) -> None:
        array.set(np.ones(100))

    ref = afield.put(afield.array_module().zeros(100))
    for task in (assign, add, fill, out, set_):
        assert "read-only" in raised_by(lambda task=task: get(task.remote(ref)), ValueError)  # type: ignore[misc]
    assert float(get(ref).sum()) == 0


def test_an_argument_and_a_view_of_it_can_be_returned() -> None:
    @on_device
    def same(array: Any) -> Any:
        return array

    @on_device
    def part(array: Any) -> Any:
        return array[100:200]

    ref = ones.remote(MIB)
    refs = [same.remote(ref), part.remote(ref)]
    assert [int(array.sum()) for array in get(refs)] == [MIB, 100]
    del ref
    assert get(total.remote(refs[0])) == MIB


def test_a_reader_without_a_device_shares_one_host_copy() -> None:
    ref = ones.remote(4 * MIB)
    afield.wait([ref])
    with movement() as moved:
        assert get([total_on_host.remote(ref) for _ in range(3)]) == [("ndarray", False, 4 * MIB)] * 3
        assert int(get(ref).sum()) == 4 * MIB
    assert moved["device_to_host"] == 4 * MIB


def test_a_reader_on_another_device_gets_a_peer_copy() -> None:
    @remote_with(num_gpus=2)
    def make() -> Any:
        cp = afield.array_module()
        with cp.cuda.Device(1):
            there = cp.arange(MIB, dtype="u1")
        return {"here": cp.ones(MIB, "u1"), "there": there}

    @remote_with(num_gpus=2)
    def devices_of(value: Any) -> list[int]:
        return [array.device.id for array in value.values()]

    @on_device
    def gathered(value: Any) -> Any:
        # One device only: both arrays are on it.
        return (
            [array.device.id for array in value.values()],
            int(value["there"][255]),
            int((value["here"] + value["there"])[3]),
        )

    ref = make.remote()
    assert get(devices_of.remote(ref)) == [0, 1]
    with movement() as moved:
        assert get(gathered.remote(ref)) == ([0, 0], 255, 4)
    assert moved["peer"] == MIB and moved["device_to_host"] == moved["host_to_device"] == 0
    there = get(ref)["there"]
    assert type(there) is np.ndarray and there[7] == 7


def test_where_a_value_is_wanted() -> None:
    ref = ones.remote(1000)
    first, second = uuids()
    assert type(get(ref)) is np.ndarray is type(get(ref, device="host"))
    for device, number in ((0, 0), (1, 1), (first, 0), (second, 1)):
        array = get(ref, device=device)
        assert array.device.id == number and int(array.get().sum()) == 1000 and not array.flags.writeable
    for nonsense in (2, -1, "GPU-1", True, 1.5):
        assert "device=" in raised_by(lambda device=nonsense: get(ref, device=device), NoDeviceError)  # type: ignore[misc]

    @on_device
    def inside(refs: list[Any]) -> list[str]:
        here, forced = afield.get(refs[0]), afield.get(refs[0], device="host")
        assert int(here.sum()) == int(forced.sum())
        return [
            type(here).__name__,
            type(forced).__name__,
            raised_by(lambda: afield.get(refs[0], device=1), NoDeviceError),
        ]

    kinds = get(inside.remote([ref]))
    assert kinds[:2] == ["EmulatedArray", "ndarray"] and "num_gpus=" in kinds[2]


def test_the_driver_has_arrays_and_puts_them() -> None:
    cp = afield.array_module()
    kept = cp.arange(1000)
    ref = afield.put({"array": kept, "list": [cp.ones(3)]})
    kept += 1
    assert get(ref)["array"][10] == 10, "what the driver can still write to was copied"

    @on_device
    def take(array: Any, *, other: Any) -> Any:
        return type(array).__name__, array.flags.writeable, float(array.sum() + other.sum())

    assert get(take.remote(cp.arange(100), other=cp.ones(3))) == ("EmulatedArray", False, 4953.0)
    assert get(total_on_host.remote(cp.ones(10))) == ("ndarray", False, 10)


def test_without_a_device_there_is_no_array_module() -> None:
    @afield.remote
    def ask() -> Any:
        return afield.array_module()

    assert "num_gpus=1" in raised_by(lambda: get(ask.remote()), NoDeviceError)


# -- from where ---------------------------------------------------------------------------------------------------


def test_generators_of_device_arrays() -> None:
    @remote_with(num_gpus=1, num_returns="streaming")
    def count(to: int) -> Any:
        cp = afield.array_module()
        x = cp.zeros(1000)
        for _ in range(to):
            x += 1  # the same memory: what was yielded must not change
            yield x
            x = x + 0 if int(x[0]) % 2 else x

    assert [float(get(ref)[0]) for ref in count.remote(6)] == [1, 2, 3, 4, 5, 6]
    abandoned = count.remote(100)
    assert float(get(next(abandoned))[0]) == 1
    del abandoned


def test_several_results() -> None:
    @remote_with(num_gpus=1, num_returns=4)
    def make() -> Any:
        cp = afield.array_module()
        shared = cp.ones(1000)
        return shared, np.ones(100_000), shared, "text"

    first, host, second, text = get(list(make.remote()))
    assert first.sum() == second.sum() == 1000 and host.shape == (100_000,) and text == "text"


def test_several_results_of_which_one_cannot_be_stored() -> None:
    @remote_with(num_gpus=1, num_returns=2)
    def make() -> Any:
        import threading

        return afield.array_module().ones(MIB, "u1"), threading.Lock()

    for ref in make.remote():
        assert "lock" in raised_by(lambda ref=ref: get(ref), SerializationError)  # type: ignore[misc]
    del ref


def test_actors_take_and_give_device_arrays() -> None:
    class Holder:
        def __init__(self, array: Any) -> None:
            self.array = array

        def total(self) -> tuple[str, int]:
            return type(self.array).__name__, int(self.array.sum())

        async def later(self, refs: list[Any]) -> tuple[str, int]:
            array = await refs[0]
            return type(array).__name__, int(array.sum())

    holder = remote_with(num_gpus=1)(Holder).remote(ones.remote(1000))
    assert get(holder.total.remote()) == ("EmulatedArray", 1000)
    assert get(holder.later.remote([ones.remote(10)])) == ("EmulatedArray", 10)
    literal = remote_with(num_gpus=0)(Holder).remote(afield.array_module().ones(5, "u1"))
    assert get(literal.total.remote()) == ("ndarray", 5)


def test_awaiting_device_arrays() -> None:
    async def main() -> Any:
        return await ones.remote(10), await asyncio.wrap_future(ones.remote(20).future())

    assert [int(array.sum()) for array in asyncio.run(main())] == [10, 20]


def test_an_error_carries_its_arrays_to_the_host() -> None:
    @on_device
    def fail() -> None:
        cp = afield.array_module()
        error = ValueError("bad", cp.arange(5))
        error.more = {"array": cp.ones(3)}  # type: ignore[attr-defined]
        raise error

    ref = fail.remote()
    with pytest.raises(ValueError) as caught:
        get(ref)
    error = caught.value
    assert isinstance(error, TaskError) and error.cause is not None
    assert type(error.cause.args[1]) is np.ndarray and error.cause.args[1].sum() == 10
    assert type(error.more["array"]) is np.ndarray  # type: ignore[attr-defined]
    del error, caught


def test_functions_and_classes_carry_what_they_captured_to_their_device() -> None:
    captured = afield.array_module().arange(10)

    @on_device
    def use() -> tuple[str, int]:
        return type(captured).__name__, int((captured + afield.array_module().ones(10, "i8")).sum())

    @afield.remote
    def use_on_host() -> str:
        return type(captured).__name__

    assert get(use.remote()) == ("EmulatedArray", 55)
    assert get(use_on_host.remote()) == "ndarray"


# -- wrong use ----------------------------------------------------------------------------------------------------


def test_host_and_device_arrays_do_not_mix() -> None:
    @on_device
    def add(host: Any) -> Any:
        return afield.array_module().ones(3) + host

    @on_device
    def function(host: Any) -> Any:
        import cupy as cp

        return cp.sum(host)

    @on_device
    def implicit(host: Any) -> Any:
        return np.asarray(afield.array_module().ones(3))

    for task, words in ((add, "do not mix"), (function, "do not mix"), (implicit, ".get()")):
        assert words in raised_by(lambda task=task: get(task.remote(np.ones(3))), TypeError)  # type: ignore[misc]


def test_cupyx_and_arrays_of_two_devices_in_a_task() -> None:
    @remote_with(num_gpus=2)
    def compute() -> Any:
        import cupy as cp
        from cupyx import scatter_add  # before cupy

        x = cp.zeros(3)
        scatter_add(x, cp.array([1, 1]), 1)
        with cp.cuda.Device(1):
            y = cp.ones(3)
        with pytest.warns(cp._util.PerformanceWarning, match="device 1"):
            z = x + y
        return x.tolist(), z.tolist(), z.device.id

    assert get(compute.remote()) == ([0, 2, 0], [1, 3, 1], 0)


def test_an_array_of_a_device_that_is_not_the_tasks_own() -> None:
    @on_device
    def stray() -> Any:
        from afield.gpu_store.emulated_arrays import make_module
        from afield.scheduler.devices import emulated_device

        mine = afield.array_module().ones(MIB, "u1")
        return [mine, make_module([emulated_device(7, MIB)]).ones(10)]

    text = raised_by(lambda: get(stray.remote()), SerializationError)
    assert "EMU-0007" in text and "no lease" in text and ".get()" in text
    assert sum(sealed(uuid) for uuid in uuids()) == 0
    assert get(total.remote(ones.remote(10))) == 10


def test_the_figures_name_all_tiers() -> None:
    ref = ones.remote(MIB)
    assert int(get(ref)[0]) == 1
    figures = tiers()
    assert {"host", "disk"} < set(figures) and sealed("host") == MIB
    (entry,) = [entry for entry in afield.memory() if entry.object_id == ref.hex()]
    assert entry.tier in ("device 0+host", "device 1+host") and entry.size == 2 * MIB
