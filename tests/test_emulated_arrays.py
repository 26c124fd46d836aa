"""The emulated device array: refuses what CuPy refuses, and knows its device and its memory.

What it computes is in the table of test_emulated_array_table.py; here are its borders: mixing, conversion, memory, devices,
exchange, pickling, and the module around it.
"""

from __future__ import annotations

import copy
import gc
import io
import operator
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from afield.errors import DeviceLostError, NoDeviceError, OutOfDeviceMemoryError
from afield.gpu_store.emulated_arrays import (
    EmulatedArray,
    allocation_of,
    array_over,
    inner_array,
    make_module,
    set_process_devices,
)
from afield.scheduler.devices import parse_devices
from tests.device_helpers import module_with

MIB = 1 << 20


@pytest.fixture
def cp() -> Any:
    return module_with()


@pytest.fixture
def cp2() -> Any:
    """A module with two devices."""
    return module_with(2)


# ---- in place, views, layout --------------------------------------------------------------------------------------------


def test_in_place_keeps_the_object_and_out_returns_it(cp: Any) -> None:
    x = before = cp.zeros(3)
    x += 1
    assert x is before
    assert cp.add(x, 1, out=x) is x
    assert cp.sum(cp.ones((3, 3)), axis=0, out=x) is x
    with pytest.raises(TypeError, match="same_kind"):
        cp.arange(3).__iadd__(1.5)


def test_views_share_memory_and_results_do_not(cp: Any) -> None:
    x = cp.arange(12).reshape(3, 4)
    x.T[0, 0] = 9
    assert int(x[0, 0]) == 9
    row = x[1]
    row[...] = 0
    assert int(x.sum()) == 9 + 1 + 2 + 3 + 8 + 9 + 10 + 11
    assert row.base is not None and cp.shares_memory(row, x) and row.data.ptr == x.data.ptr + x.strides[0]
    assert (x + 1).base is None
    assert cp.asarray(x) is x
    assert cp.array(x) is not x
    assert not cp.shares_memory(cp.array(x), x)
    assert x.astype(x.dtype, copy=False) is x


def test_layout_follows_the_operands(cp: Any) -> None:
    x = cp.zeros((2, 3, 4)).transpose(0, 2, 1)
    assert (x + 1).strides == (np.zeros((2, 3, 4)).transpose(0, 2, 1) + 1).strides
    assert x.copy().flags.c_contiguous
    assert x.copy("K").strides == x.strides
    assert cp.empty((2, 3), order="F").flags.f_contiguous
    assert cp.zeros_like(x).strides == x.strides
    assert EmulatedArray((2, 3), "f4", order="F").strides == (4, 8)
    assert copy.deepcopy(x).strides == x.strides
    with pytest.raises(AttributeError):
        x.flags.writeable = False


# ---- what is refused ----------------------------------------------------------------------------------------------------

HOST = np.ones(3)

MIXED = """
    x + HOST | HOST + x | x * [1, 2, 3] | [1, 2, 3] * x | np.add(x, HOST) | np.add(HOST, x)
    np.maximum(x, np.array(1.0)) | x == HOST | x < [1, 2, 3] | xp.add(x, HOST) | xp.exp(HOST) | xp.exp([1.0])
    xp.sum(HOST) | xp.sum([1, 2]) | xp.dot(x, HOST) | x.dot(HOST) | x.dot([1, 2, 3]) | np.dot(x, [1, 2, 3])
    xp.concatenate([x, HOST]) | np.concatenate([HOST, x]) | xp.concatenate([x, [1.0]]) | xp.concatenate([HOST, HOST])
    xp.stack([[1], [2]]) | x @ HOST | HOST @ x | xp.where(x > 0, x, HOST) | xp.where([True] * 3, x, x)
    x.__iadd__(HOST) | HOST.__iadd__(x) | x.__setitem__(0, HOST) | x.__setitem__(0, [1, 2, 3])
    HOST.__setitem__(slice(None), x) | np.add(HOST, 1, out=x) | np.add(x, 1, out=HOST) | xp.linalg.norm(HOST)
    xp.fft.fft([1.0]) | xp.copyto(x, HOST) | np.copyto(HOST, x) | xp.full_like(HOST, 1) | xp.zeros_like([1])
    xp.array([x, HOST]) | xp.random.permutation(HOST) | x + "1" | x + None | np.logical_and.reduce([x, HOST])
    np.sum(x, where=HOST > 0) | xp.einsum("i,i", x, HOST) | xp.add.reduce(HOST) | xp.isin(x, [1]) | x.put([0], HOST)
    xp.add.at(x, [0], HOST)
"""
IMPLICIT = """
    np.asarray(x) | np.array(x) | np.array([x, x]) | np.asarray(x, dtype=float) | x.__array__() | np.frombuffer(x)
    memoryview(x) | np.random.permutation(x) | HOST.dot(x) | np.ma.array(x) | float(x) | np.float64(x) | hash(x)
"""


def expressions(text: str) -> list[str]:
    return [expression.strip() for line in text.strip().splitlines() for expression in line.split(" | ")]


@pytest.mark.contract("numpy")
@pytest.mark.parametrize("expression", expressions(MIXED))
def test_host_and_device_do_not_mix(expression: str, cp: Any) -> None:
    with pytest.raises(TypeError) as caught:
        eval(expression, {"xp": cp, "np": np, "x": cp.ones(3), "HOST": np.ones(3)})
    if "HOST" in expression and "HOST." not in expression:
        assert "asarray" in str(caught.value) or "asnumpy" in str(caught.value)


@pytest.mark.contract("numpy")
@pytest.mark.parametrize("expression", expressions(IMPLICIT))
def test_nothing_becomes_a_host_array_unasked(expression: str, cp: Any) -> None:
    with pytest.raises(TypeError) as caught:
        eval(expression, {"np": np, "x": cp.ones(3), "HOST": HOST})
    if expression.startswith("np.a"):
        assert ".get()" in str(caught.value) and "asnumpy" in str(caught.value)


def test_scalars_are_fine(cp: Any) -> None:
    x = cp.ones(3, "f4")
    for scalar in (2, 2.0, True, np.float32(2), np.int8(2)):
        assert (x * scalar).dtype == (np.ones(3, "f4") * scalar).dtype
    assert (x == None) is False  # noqa: E711 - the operator is what is tested
    assert (x != "a") is True
    with pytest.raises(ValueError, match="ambiguous"):
        bool(x)
    assert bool(cp.ones(1))


def test_a_device_raises_no_floating_point_warnings(cp: Any) -> None:
    x = cp.zeros(2)
    assert cp.isnan(x / x).all()
    assert cp.isinf(cp.log(x)).all()
    x /= 0


@pytest.mark.parametrize("dtype", [object, str, "M8[s]", np.longdouble, np.clongdouble, [("a", "i4")]])
def test_dtypes_that_no_device_array_has(dtype: Any, cp: Any) -> None:
    with pytest.raises(ValueError, match="Unsupported dtype"):
        cp.zeros(2, dtype)
    with pytest.raises(ValueError, match="Unsupported dtype"):
        cp.asarray(np.zeros(2, dtype))
    with pytest.raises(ValueError, match="Unsupported dtype"):
        cp.zeros(2).astype(dtype)


def test_big_endian_host_arrays_arrive_in_native_order(cp: Any) -> None:
    x = cp.asarray(np.arange(3, dtype=">i4"))
    assert x.dtype == np.dtype("i4") and x.dtype.isnative and x.tolist() == [0, 1, 2]


# ---- to the host and back -----------------------------------------------------------------------------------------------


def test_get_and_set(cp: Any) -> None:
    x = cp.arange(6.0).reshape(2, 3)
    host = x.get()
    host[...] = 0
    assert float(x.sum()) == 15
    assert type(cp.asnumpy(x)) is np.ndarray and cp.asnumpy([1, 2]).tolist() == [1, 2]
    out = np.empty((2, 3))
    assert x.get(out=out) is out and out[1, 2] == 5
    x.set(np.ones((2, 3)))
    assert float(x.sum()) == 6
    for wrong in (np.ones((3, 2)), np.ones((2, 3), "f4"), [[1.0]], x):
        with pytest.raises((TypeError, ValueError)):
            x.set(wrong)
    with pytest.raises(TypeError):
        x.get(out=np.empty((2, 3), "f4"))


def test_files(cp: Any) -> None:
    one, many = io.BytesIO(), io.BytesIO()
    cp.save(one, cp.arange(3))
    cp.savez(many, a=cp.arange(3), b=cp.ones(2))
    one.seek(0)
    many.seek(0)
    assert isinstance(cp.load(one), EmulatedArray)
    assert cp.load(many)["b"].tolist() == [1.0, 1.0]


@pytest.mark.contract("numpy")
def test_pickle_is_by_value_and_finds_its_device(cp2: Any) -> None:
    before = set_process_devices(cp2._devices)
    try:
        with cp2.cuda.Device(1):
            x = cp2.arange(12.0).reshape(3, 4).T
        for protocol in (2, 5):
            y = pickle.loads(pickle.dumps(x, protocol))
            assert (
                y.device == x.device
                and y.strides == x.strides
                and (y.get() == x.get()).all()
                and not cp2.shares_memory(x, y)
            )
        buffers: list[pickle.PickleBuffer] = []
        data = pickle.dumps(x, 5, buffer_callback=buffers.append)
        assert len(buffers) == 1 and len(data) < 500
        # In a process that does not see the device, the current one has to do.
        elsewhere = module_with()
        set_process_devices(elsewhere._devices)
        assert pickle.loads(pickle.dumps(x)).device.id == 0
        assert pickle.loads(pickle.dumps(x.device)).id == 0
    finally:
        set_process_devices(before)


class Consumer:
    """How torch takes a tensor: it asks for the device, then for a capsule, and passes only what it means."""

    def __init__(self, producer: Any, **asked: Any) -> None:
        self.device = producer.__dlpack_device__()
        self.capsule = producer.__dlpack__(max_version=(1, 0), **asked)

    def __dlpack_device__(self) -> Any:
        return self.device

    def __dlpack__(self, **_: Any) -> Any:
        return self.capsule


@pytest.mark.contract("numpy")
def test_dlpack(cp: Any) -> None:
    x = cp.arange(6.0).reshape(2, 3)
    same = cp.from_dlpack(x)
    assert same is not x and cp.shares_memory(same, x)
    tensor = Consumer(x.T)
    assert tensor.device == (1, 0)
    back = cp.from_dlpack(tensor)
    back[0, 0] = 7
    assert float(x[0, 0]) == 7 and back.shape == (3, 2)
    with pytest.raises(TypeError, match="asarray"):
        cp.from_dlpack(np.ones(3))
    with pytest.raises(BufferError, match=r"\.get\(\)"):
        np.from_dlpack(x)
    host = np.from_dlpack(x, device="cpu")
    assert type(host) is np.ndarray and not np.shares_memory(host, inner_array(back))
    with pytest.raises(BufferError):
        x.__dlpack__(dl_device=(2, 0))
    with pytest.raises(BufferError):
        x.__dlpack__(dl_device=(1, 0), copy=False)
    with pytest.raises(TypeError):
        cp.from_dlpack([1])
    del x, same, tensor
    assert back.sum() == 7 + 1 + 2 + 3 + 4 + 5


def test_dlpack_with_torch(cp: Any) -> None:
    torch = pytest.importorskip("torch")
    x = cp.arange(6, dtype="f4").reshape(2, 3)
    tensor = torch.from_dlpack(x)
    tensor[0, 0] = 9
    assert float(x[0, 0]) == 9 and tensor.device.type == "cpu"
    source = torch.ones(3)
    y = cp.from_dlpack(source)
    y += 1
    assert source.tolist() == [2, 2, 2]
    assert torch.from_dlpack(x, device="cpu", copy=True).data_ptr() != x.data.ptr
    with pytest.raises(TypeError):
        torch.as_tensor(x.__array__())


def test_no_cuda_array_interface(cp: Any) -> None:
    x = cp.ones(3)
    for name in ("__cuda_array_interface__", "__array_interface__", "__array_struct__"):
        assert not hasattr(x, name)
    with pytest.raises(AttributeError, match="DLPack"):
        x.__cuda_array_interface__  # noqa: B018


# ---- memory, devices ----------------------------------------------------------------------------------------------------


def test_memory_is_the_allocators_and_goes_back(cp: Any) -> None:
    pool = cp.get_default_memory_pool()
    x = cp.zeros((1024, 128))
    assert pool.used_bytes() == MIB == cp._devices[0].allocator.used_bytes
    part = x[3:, 1]
    del x
    assert pool.used_bytes() == MIB
    inner = inner_array(part)
    del part
    assert pool.used_bytes() == MIB
    del inner
    assert pool.used_bytes() == 0 == cp._devices[0].allocator.used_bytes
    assert cp.zeros((0, 5)).sum(axis=0).shape == (5,)
    small = [cp.ones(1) for _ in range(3)]
    assert pool.used_bytes() == 3 * 512
    assert all(x.data.ptr % 512 == 0 for x in small)
    assert cp.cuda.Device(0).mem_info == cp.cuda.runtime.memGetInfo() == (64 * MIB - 3 * 512, 64 * MIB)


def test_capacity_is_hard(cp: Any) -> None:
    x = cp.zeros(5 * MIB)
    with pytest.raises(OutOfDeviceMemoryError, match=r"32 MiB: 40 MiB of 64 MiB"):
        cp.ones(4 * MIB)
    with pytest.raises(cp.cuda.memory.OutOfMemoryError):
        x + 1
    with pytest.raises(MemoryError):
        cp.asarray(np.ones(4 * MIB))
    del x
    assert (cp.zeros(4 * MIB) + 1).nbytes == 32 * MIB
    cp.get_default_memory_pool().set_limit(size=MIB)
    assert cp.get_default_memory_pool().get_limit() == MIB
    with pytest.raises(OutOfDeviceMemoryError):
        cp.zeros(MIB)
    cp.get_default_memory_pool().set_limit(fraction=0.5)
    assert cp.zeros(MIB).nbytes == 8 * MIB


def test_memory_freed_by_another_thread_is_counted(cp: Any) -> None:
    box = [cp.zeros(MIB)]
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join()
    assert cp.get_default_memory_pool().used_bytes() == 0


class Slab:
    """An allocator of someone else's, as the store's will be."""

    def __init__(self, size_bytes: int) -> None:
        self.memory = memoryview(bytearray(size_bytes))
        self.used = 0

    def allocate(self, nbytes: int) -> tuple[memoryview, object]:
        start, self.used = self.used, self.used + -(-nbytes // 64) * 64
        return self.memory[start : start + nbytes], ("piece", start)


def test_memory_handed_in_by_the_store() -> None:
    slab = Slab(MIB)
    cp = make_module(parse_devices("emulated:1:2MiB"), lambda device: slab)
    first, second = cp.zeros(4), cp.full(2, 7, "i4")
    assert slab.memory[64:72].cast("i").tolist() == [7, 7]
    home, owner, offset = allocation_of(second[1:])
    assert (owner, offset) == (("piece", 64), 4) and home.uuid == first.device.uuid
    shared = array_over(home, slab.memory[64:128], owner, (2,), "i4")
    second += 1
    assert shared.tolist() == [8, 8] and allocation_of(shared)[1] == owner
    for shape, strides, offset in (((17,), None, 0), ((2,), (-4,), 0), ((2,), None, 60), ((2,), None, -4)):
        with pytest.raises(ValueError, match="do not lie"):
            array_over(home, slab.memory[64:128], owner, shape, "i4", strides, offset)
    assert array_over(home, slab.memory[64:128], owner, (2,), "i4", (-4,), 4).tolist() == [8, 8]
    assert np.shares_memory(inner_array(shared), np.frombuffer(slab.memory, np.uint8))


WRITES = """
    x += 1 | x[0] = 1 | x.fill(1) | x.sort() | x.set(np.ones(3)) | x[1:][0] = 2 | x.T[0] = 2 | xp.add(x, 1, out=x)
    xp.copyto(x, x + 1) | x.reshape(3, 1)[0] = 1 | xp.add.at(x, [0], 1.0) | xp.sum(xp.ones((2, 3)), axis=0, out=x)
    x.put([0], 1.0) | xp.random.shuffle(x) | xp.from_dlpack(x)[0] = 1 | x.real = 1 | xp.fill_diagonal(x[None], 1)
    x.ravel()[0] = 3 | x.partition(1)
"""


@pytest.mark.parametrize("statement", expressions(WRITES))
def test_read_only_arrays_cannot_be_written(statement: str, cp: Any) -> None:
    memory = memoryview(np.array([3.0, 1.0, 2.0]).tobytes())
    home = cp._devices[0]
    x = array_over(home, memory, memory, (3,), "f8")
    assert not x.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        exec(statement, {"x": x, "xp": cp, "np": np})
    assert x.tolist() == [3.0, 1.0, 2.0]
    assert (x + 1).flags.writeable and x.copy().flags.writeable
    assert float(cp.from_dlpack(Consumer(x)).sum()) == 6


def test_devices(cp2: Any) -> None:
    cuda = cp2.cuda
    assert cuda.runtime.getDeviceCount() == 2 and cuda.is_available()
    x = cp2.ones(3)
    with cuda.Device(1) as device:
        y, chosen = cp2.ones(3), cp2.ones(3, bool)
        assert device == y.device and cuda.Device().id == 1 and y.device.uuid == "EMU-0001-0000-0000-0000"
        with cuda.Device(0):
            assert cuda.runtime.getDevice() == 0
        assert cp2.random.rand(2).device.id == 1
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(cuda.Device().id))
        thread.start()
        thread.join()
        assert seen == [0]
    assert x.device.id == 0 and cuda.Device().id == 0
    # Results lie on the current device, wherever the operands do; views stay where they are.
    slow = cp2._util.PerformanceWarning
    calls: list[Callable[[], Any]] = [
        lambda: y + 1,
        lambda: y.sum(),
        lambda: y[[0, 1]],
        lambda: y.astype(int),
        lambda: cp2.concatenate([y, y]),
        lambda: np.sqrt(y),
    ]
    for call in calls:
        with pytest.warns(slow, match="operand resides on device 1, and the current device is 0") as caught:
            assert call().device.id == 0
        assert len(caught) == 1 and caught[0].filename == __file__
    assert y[1:].device == y.device == y.T.device
    mixes: list[tuple[Callable[[], Any], list[int]]] = [
        (lambda: x + y, [2, 2, 2]),
        (lambda: y + x, [2, 2, 2]),
        (lambda: cp2.concatenate([x, y]), [1] * 6),
        (lambda: x.__iadd__(y), [2, 2, 2]),
        (lambda: x.__setitem__(0, y[0]) or x, [1, 2, 2]),
        (lambda: x[chosen], [1, 2, 2]),
        (lambda: cp2.maximum(x, y, out=x), [1, 2, 2]),
        (lambda: x.scatter_add(0, y[0]) or x, [2, 2, 2]),
    ]
    for mix, result in mixes:
        with pytest.warns(slow, match="peer access"):
            made = mix()
        assert made.device.id == 0 and made.tolist() == result
    x[:] = 1
    with cuda.Device(1):
        assert (y + 1).device.id == 1
        with pytest.warns(slow, match="resides on device 0"):
            assert (y + x).device.id == 1
    assert (x + cp2.asarray(y)).tolist() == [2, 2, 2]
    assert y.copy().device.id == 0
    cuda.runtime.setDevice(1)
    assert cp2.zeros(1).device.id == 1 and cp2.get_default_memory_pool().used_bytes() >= 512
    with pytest.raises(NoDeviceError, match="sees 2"):
        cuda.Device(2)
    with pytest.raises(NoDeviceError):
        make_module([])


def test_a_lost_device_shows_at_the_next_operation(cp: Any) -> None:
    def lost() -> None:
        raise DeviceLostError("device 0 was lost")

    x, scalar = cp.ones(3), cp.array(2)
    cp._devices[0].on_use = lost
    uses: list[Callable[[], Any]] = [lambda: x + 1, lambda: x.fill(0), x.get, lambda: cp.zeros(2), lambda: x[0], x.sum]
    uses += [x.tolist, x.tobytes, scalar.item, x.copy, lambda: np.from_dlpack(x, device="cpu"), lambda: f"{scalar:d}"]
    for kind in (bool, int, float, complex, operator.index, str, repr):
        uses.append(lambda kind=kind: kind(scalar))  # type: ignore[misc]
    for use in uses:
        with pytest.raises(DeviceLostError):
            use()


def test_the_current_device_can_be_the_runtimes_choice() -> None:
    lease = [1]
    cp = make_module(parse_devices("emulated:2:2MiB"), current_device=lambda: lease[0])
    assert cp.zeros(1).device.id == 1
    lease[0] = 0
    assert cp.zeros(1).device.id == 0


# ---- the module ---------------------------------------------------------------------------------------------------------


def test_streams_events_and_pools(cp: Any) -> None:
    cuda = cp.cuda
    with cuda.Stream(non_blocking=True) as stream:
        start, end = cuda.Event(), cuda.Event()
        start.record(stream)
        cp.ones(3)
        end.record()
    end.synchronize()
    assert cuda.get_elapsed_time(start, end) >= 0
    cuda.Stream.null.synchronize()
    cuda.Device().synchronize()
    cp.get_default_pinned_memory_pool().free_all_blocks()
    cuda.set_allocator(cuda.MemoryPool().malloc)
    with pytest.raises(NotImplementedError):
        cuda.set_allocator(lambda size: None)
    assert cuda.runtime.getDeviceProperties(0)["totalGlobalMem"] == 64 * MIB


def test_random(cp: Any) -> None:
    cp.random.seed(3)
    first = cp.random.rand(4)
    cp.random.seed(3)
    assert (first == cp.random.rand(4)).all() and isinstance(first, EmulatedArray)
    assert cp.random.randn(2, 3, dtype="f4").dtype == np.float32
    assert (
        cp.random.normal(size=(2,)).shape == (2,) and cp.random.uniform(0, 1, 5, dtype=cp.float32).dtype == np.float32
    )
    assert cp.random.randint(0, 5, 3, dtype="i4").dtype == np.int32 and cp.random.randint(5).shape == ()
    assert sorted(cp.random.permutation(4).tolist()) == [0, 1, 2, 3]
    x = cp.arange(5)
    cp.random.shuffle(x)
    assert sorted(x.tolist()) == [0, 1, 2, 3, 4] and int(cp.random.choice(x)) in range(5)
    generator = cp.random.default_rng(1)
    assert isinstance(generator, cp.random.Generator) and generator.random(3, dtype="f4").dtype == np.float32
    assert generator.integers(0, 3, size=4).device.id == 0 and generator.standard_normal((2, 2)).shape == (2, 2)
    assert cp.random.random() < 1 and cp.random.sample(2).shape == (2,)
    with pytest.raises(AttributeError):
        generator.rand(3)


def test_what_it_lacks_says_so(cp: Any) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: cp.RawKernel("code", "name"),
        lambda: cp.ElementwiseKernel("T x", "T y", "y = x", "k"),
        lambda: cp.cuda.Graph(),
        lambda: cp.r_[1, 2],
        lambda: cp.cuda.nvtx.RangePush("x"),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match="not there on emulated devices"):
            call()
    for name in ("matrix", "busday_count", "no_such_thing", "loadtxtx", "memmap", "object_"):
        assert not hasattr(cp, name)
        with pytest.raises(AttributeError, match="emulated by afield"):
            getattr(cp, name)
    with pytest.raises(AttributeError, match="emulated"):
        cp.linalg.multi_dot  # noqa: B018
    with pytest.raises(AttributeError, match="not emulated"):
        cp.ones(3).toDlpack()


@pytest.mark.contract("numpy")
def test_every_listed_name_is_there(cp: Any) -> None:
    newer_than_some_numpy = {"bitwise_count", "isdtype", "cumulative_prod", "cumulative_sum", "long", "ulong"}
    for module in cp._modules.values():
        missing = {name for name in dir(module) if not hasattr(module, name)}
        assert missing <= newer_than_some_numpy
    assert {"exp", "concatenate", "asnumpy", "linalg", "float32"} <= set(dir(cp))
    assert cp.exp.nin == 1 and isinstance(cp.exp, cp.ufunc) and cp.sum.__name__ == "sum"
    assert cp.get_array_module(cp.ones(1), 2) is cp and cp.get_array_module(np.ones(1)) is np
    cp.testing.assert_allclose(cp.ones(3), np.ones(3))
    with pytest.raises(AssertionError):
        cp.testing.assert_array_equal(cp.ones(3), cp.zeros(3))
    double = cp.fuse()(lambda x: x * 2)
    assert double(cp.ones(2)).tolist() == [2, 2]


def test_nothing_is_left_in_cycles(cp: Any) -> None:
    """Memory goes back at once, not when the collector comes by."""
    gc.disable()
    try:
        x = cp.random.rand(64, 64)
        for _ in range(3):
            x = cp.linalg.inv(x @ x.T + cp.eye(64)) + cp.concatenate([x[:32], x[32:]])
            x = cp.apply_along_axis(lambda row: row / row.max(), 0, x)
        del x
        assert cp.get_default_memory_pool().used_bytes() == 0
    finally:
        gc.enable()
