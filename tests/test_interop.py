"""Device arrays inside values: what becomes of their memory, and what comes back.

On emulated devices; the arrays of CUDA's libraries are in test_interop_cuda.py.
"""

from __future__ import annotations

import gc
import io
import pickle
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import cloudpickle
import numpy as np
import pytest

from afield.errors import DeserializationError, DeviceLostError, OutOfDeviceMemoryError, SerializationError
from afield.gpu_store.arena import DeviceArena
from afield.gpu_store.backends.base import DeviceUsageError, StaleEpochError
from afield.gpu_store.backends.cuda import CudaBackend
from afield.gpu_store.backends.emulated import EmulatedBackend
from afield.gpu_store.blocks import ALIGNMENT
from afield.gpu_store.client import View
from afield.gpu_store.emulated_arrays import EmulatedArray, inner_array, make_module, set_process_devices
from afield.gpu_store.interop import DevicePacker, DevicePlace, HostPlace, adapter_of, packing, resolving
from afield.gpu_store.interop.emulated import emulated_module
from afield.gpu_store.interop.interop_cupy import (
    CupyAdapter,
    DlpackAdapter,
    InterfaceAdapter,
)
from afield.gpu_store.interop.interop_numba import NumbaAdapter
from afield.gpu_store.interop.interop_torch import TorchAdapter
from afield.gpu_store.interop.places import Layout, host_array, host_dtype
from tests.device_helpers import emulated_devices
from tests.fake_cuda import libraries
from tests.test_arena import Books

MIB = 2**20
MEMORY = 64 * MIB


class Pickler(cloudpickle.CloudPickler):
    """What the runtime does: the packer is asked first."""

    def __init__(self, file: Any, packer: DevicePacker, buffers: list[Any]) -> None:
        super().__init__(file, 5, buffers.append)
        self.packer = packer

    def reducer_override(self, obj: Any) -> Any:
        reduced = self.packer.reduce(obj)
        return super().reducer_override(obj) if reduced is None else reduced


class World:
    """One process with arenas on the devices of a machine, and the objects that were stored."""

    def __init__(self, backend: EmulatedBackend | CudaBackend, memory_bytes: int = MEMORY, **options: Any) -> None:
        self.arenas: dict[str, DeviceArena] = {}
        self.books: list[Books] = []
        for number, info in enumerate(backend.inventory(), 1):
            device = backend.open(info.uuid)
            books = Books(memory_bytes)
            slab = device.allocate_slab(memory_bytes)
            self.arenas[info.uuid] = DeviceArena(device, slab, number, books.lease, books.give_back, **options)
            self.books.append(books)
        self.first = next(iter(self.arenas.values()))

    def store(self, holder: list[Any]) -> Stored:
        """Store the value in `holder`, its only reference, as the runtime does."""
        with DevicePacker() as packer:
            out, buffers = io.BytesIO(), list[Any]()
            Pickler(out, packer, buffers).dump(holder[0])
            holder.clear()
            parts = [(arena, offset, size) for arena, _, offset, size in packer.commit(self.arenas)]
            return Stored(self, out.getvalue(), [bytes(buffer.raw()) for buffer in buffers], parts)

    def used(self) -> int:
        return sum(arena.stats().used_bytes for arena in self.arenas.values())


@dataclass
class Stored:
    """A stored object."""

    world: World
    pickled: bytes
    buffers: list[bytes]
    parts: list[tuple[int, int, int]]

    def load(self, *, host: bool = False, dead: list[int] | None = None) -> Any:
        arenas = {arena.arena: arena for arena in self.world.arenas.values()}
        places: dict[int, Any] = {}

        def resolve(part: int) -> Any:
            if part not in places:
                number, offset, size = self.parts[part]
                arena = arenas[number]
                if host:
                    places[part] = HostPlace(memoryview(read_bytes(arena, offset, size)))
                else:
                    places[part] = DevicePlace(arena, offset, size, None if dead is None else dead.append, part)
            return places[part]

        with resolving(resolve, lambda: None if host else self.world.first):
            return pickle.loads(self.pickled, buffers=self.buffers)

    @property
    def born(self) -> int:
        return sum(arena.bytes_born for arena in self.world.arenas.values())

    @property
    def copied(self) -> int:
        return sum(arena.bytes_copied for arena in self.world.arenas.values())


def read_bytes(arena: DeviceArena, offset: int, size: int) -> bytes:
    target, stream = bytearray(size), arena.device.new_stream()
    arena.device.copy_to_host(arena.slab, offset, memoryview(target), stream)
    stream.synchronize()
    return bytes(target)


@pytest.fixture
def world() -> Iterator[World]:
    backend = EmulatedBackend.create(emulated_devices(2, MEMORY), lazy_streams=True)
    yield World(backend)
    backend.close()


@pytest.fixture
def xp(world: World) -> Iterator[Any]:
    module = emulated_module(list(world.arenas.values()))
    before = set_process_devices(module._devices)
    yield module
    set_process_devices(before)
    gc.collect()
    assert world.used() == 0, "every block was given up"


# ---- what becomes of memory -----------------------------------------------------------------------------------------


def test_a_returned_array_is_kept_as_it_is(world: World, xp: Any) -> None:
    array = xp.arange(1000, dtype="f4")
    where = array.data.ptr - world.first.slab.address
    holder = [{"a": (array, 1)}]
    del array
    stored = world.store(holder)
    assert stored.parts == [(1, where, 4000)]
    assert (stored.born, stored.copied) == (4000, 0)
    loaded = stored.load()["a"][0]
    assert type(loaded) is EmulatedArray
    assert loaded.data.ptr - world.first.slab.address == where
    assert (loaded.get() == np.arange(1000)).all()


def test_an_array_that_somebody_keeps_is_copied(world: World, xp: Any) -> None:
    array = xp.arange(1000, dtype="f4")
    stored = world.store([array])
    assert (stored.born, stored.copied) == (0, 4000)
    array[0] = 7
    assert stored.load().get()[0] == 0


def test_loaded_arrays_are_read_only_and_hold_their_place(world: World, xp: Any) -> None:
    stored = world.store([xp.ones(100)])
    dead: list[int] = []
    loaded = stored.load(dead=dead)
    view = loaded[3:5]
    del loaded
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    assert not dead
    del view
    assert dead == [0]


def test_returning_an_argument_copies_it(world: World, xp: Any) -> None:
    first = world.store([xp.arange(10)])
    second = world.store([first.load()])
    assert second.parts != first.parts
    assert (second.load().get() == np.arange(10)).all()


def test_views_of_one_block_share_a_part(world: World, xp: Any) -> None:
    array = xp.arange(1000, dtype="i4")
    holder: list[Any] = [[array, array[10:20], array.reshape(10, 100).T, array]]
    del array
    stored = world.store(holder)
    assert len(stored.parts) == 1
    assert stored.copied == 0
    whole, some, turned, same = stored.load()
    assert same is whole
    assert some.data.ptr == whole.data.ptr + 40
    assert turned.strides == (4, 400)
    assert (turned.get() == np.arange(1000).reshape(10, 100).T).all()


def test_a_small_view_does_not_hold_a_large_block(world: World, xp: Any) -> None:
    stored = world.store([xp.arange(100_000, dtype="u1")[50_000:50_100]])
    assert stored.parts[0][2] < 100 + ALIGNMENT
    assert (stored.born, stored.copied) == (0, 100)
    assert (stored.load().get() == np.arange(100_000, dtype="u1")[50_000:50_100]).all()
    assert world.used() == 0


def test_a_large_view_gives_back_what_it_does_not_touch(world: World, xp: Any) -> None:
    stored = world.store([xp.arange(100_000, dtype="u1")[2000:-2000]])
    (_, _, size) = stored.parts[0]
    assert stored.copied == 0
    assert 96_000 <= size < 96_000 + ALIGNMENT
    world.first.trim()
    assert world.books[0].extents.used == world.books[0].extents.rounded(size)
    assert (stored.load().get() == np.arange(100_000, dtype="u1")[2000:-2000]).all()


def test_far_apart_views_become_parts_of_their_own(world: World, xp: Any) -> None:
    array = xp.arange(100_000, dtype="u1")
    holder = [(array[:100], array[99_900:], array[50:150])]
    del array
    stored = world.store(holder)
    assert len(stored.parts) == 2
    assert stored.copied == 250
    low, high, middle = stored.load()
    assert middle.data.ptr == low.data.ptr + 50
    assert (high.get() == np.arange(100_000, dtype="u1")[99_900:]).all()


def test_many_small_views_are_copied_side_by_side(world: World, xp: Any) -> None:
    array = xp.arange(400_000, dtype="u4").reshape(4000, 100)
    rows = [array[at] for at in range(0, 4000, 4)]
    strided = [array[at, ::3] for at in range(1, 4000, 4)]
    alone = [xp.full(5, at, "u1") for at in range(100)]
    stored = world.store([(rows, strided, alone)])
    assert len(stored.parts) == 2 and stored.copied == 1000 * 400 + 1000 * 136 + 500
    got = stored.load()
    assert all((row.get() == np.arange(100) + 400 * at).all() for at, row in enumerate(got[0]))
    assert all((row.get() == np.arange(100, 200, 3) + 400 * at).all() for at, row in enumerate(got[1]))
    assert [int(each[4]) for each in got[2]] == list(range(100))
    assert array[0, 0] == 0 and len(alone) == 100


def test_many_large_copies_are_parts_of_their_own(world: World, xp: Any) -> None:
    arrays = [xp.full(700_000, at, "u1") for at in range(20)]
    stored = world.store([list(arrays)])
    assert len(stored.parts) == 20
    assert [int(each[-1]) for each in stored.load()] == list(range(20)) and len(arrays) == 20


def test_an_island_is_found_without_looking_at_all() -> None:
    class Counted(list[tuple[int, int]]):
        looks = 0

        def __getitem__(self, at: Any) -> Any:
            Counted.looks += 1
            return super().__getitem__(at)

    islands = Counted([(at * 10, at * 10 + 5) for at in range(4096)])
    assert packing._island_of(islands, (40_001, 40_005)) == 4000
    assert packing._island_of(islands, (40_001, 40_006)) == packing._island_of(islands, (-1, 3)) == -1
    assert Counted.looks < 64


def test_a_scattered_view_is_gathered(world: World, xp: Any) -> None:
    matrix = xp.arange(10_000, dtype="f4").reshape(100, 100)
    holder = [matrix[:, 3]]
    del matrix
    stored = world.store(holder)
    assert stored.parts[0][2] == 400
    loaded = stored.load()
    assert loaded.flags.c_contiguous
    assert (loaded.get() == np.arange(3, 10_000, 100)).all()


def test_a_scattered_view_of_what_is_stored_anyway_is_not(world: World, xp: Any) -> None:
    matrix = xp.arange(10_000, dtype="f4").reshape(100, 100)
    holder = [(matrix[:, 3], matrix)]
    del matrix
    stored = world.store(holder)
    assert (len(stored.parts), stored.copied) == (1, 0)
    assert stored.load()[0].strides == (400,)


def test_arrays_on_several_devices(world: World, xp: Any) -> None:
    with xp.cuda.Device(1):
        second = xp.ones(10)
    stored = world.store([[xp.zeros(10), second]])
    assert sorted(part[0] for part in stored.parts) == [1, 2]
    assert [array.device.id for array in stored.load()] == [0, 1]


def test_memory_that_is_not_the_arenas_is_copied(world: World, xp: Any) -> None:
    """An array of another allocator on the same device."""
    info = world.first.device.info
    other = make_module([info])
    array = other.arange(1000, dtype="i8")
    stored = world.store([[array[500:], array[600:700], other.arange(3)]])
    assert len(stored.parts) == 2
    assert stored.copied == 4024
    tail, middle, three = stored.load()
    assert middle.data.ptr == tail.data.ptr + 800
    assert (tail.get() == np.arange(500, 1000)).all()
    assert three.get().tolist() == [0, 1, 2]


EVERY_SHAPE: list[Any] = [
    lambda xp: xp.zeros((0, 3), "f2"),
    lambda xp: xp.array(5 + 2j),
    lambda xp: xp.arange(24).reshape(2, 3, 4)[::-1, :, ::-1],
    lambda xp: xp.asfortranarray(xp.arange(12).reshape(3, 4)),
    lambda xp: xp.arange(20, dtype="f2")[::2],
    lambda xp: xp.arange(20, dtype="f8")[::-7],
    lambda xp: xp.arange(10) % 2 == 0,
    lambda xp: xp.broadcast_to(xp.arange(4), (1000, 4)),
    lambda xp: xp.arange(6, dtype="c8").real,
    lambda xp: xp.arange(200_000, dtype="u1")[3:],
    lambda xp: xp.zeros(()).reshape(1, 1)[:, :0],
]


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("index", range(len(EVERY_SHAPE)))
def test_every_shape_comes_back(world: World, xp: Any, index: int, kept: bool, host: bool) -> None:
    array = EVERY_SHAPE[index](xp)
    wanted, flags = array.get(order="K"), (array.flags.c_contiguous, array.flags.f_contiguous)
    holder = [array]
    alias = array if kept else None
    del array
    loaded = world.store(holder).load(host=host)
    assert type(loaded) is (np.ndarray if host else EmulatedArray)
    got = loaded if host else loaded.get()
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    assert (got == wanted).all()
    if any(flags):
        assert (loaded.flags.c_contiguous, loaded.flags.f_contiguous) == flags
    if host:
        assert not loaded.flags.writeable
    del alias


def test_nothing_to_pack(world: World) -> None:
    stored = world.store([{"host": np.arange(3), "type": EmulatedArray, "text": "x"}])
    assert stored.parts == []
    assert stored.load()["type"] is EmulatedArray


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_device_without_a_lease_is_refused(world: World, xp: Any) -> None:
    with xp.cuda.Device(1):
        array = xp.ones(10)
    uuid = array.device.uuid
    del world.arenas[uuid]
    with pytest.raises(SerializationError) as caught:
        world.store([[xp.zeros(3), array]])
    text = str(caught.value)
    assert uuid in text
    assert "EmulatedArray" in text
    assert "array.get()" in text
    assert world.first.stats().used_bytes == 0


def test_out_of_memory_while_copying_leaves_nothing(world: World, xp: Any) -> None:
    kept = xp.zeros(40 * MIB, "u1")
    holder = [[xp.zeros(MIB, "u1"), kept]]
    with pytest.raises(OutOfDeviceMemoryError):
        world.store(holder)
    assert world.first.stats().used_bytes == 40 * MIB
    del kept
    world.first.trim()
    assert world.books[0].extents.used == 0


def test_a_value_that_is_pickled_and_not_committed_is_let_go(world: World, xp: Any) -> None:
    holder: list[Any] = [[xp.zeros(MIB), lambda: sys.stdout, object()]]
    holder[0].append(holder[0][0])
    with DevicePacker() as packer:
        assert packer.reduce(holder[0][0]) is not None
        assert len(packer) == 1
        holder.clear()
        assert world.first.stats().used_bytes == 8 * MIB
    assert world.first.stats().used_bytes == 0


def test_what_cannot_be_stored_is_reverted(world: World, xp: Any) -> None:
    packer = DevicePacker()
    holder = [xp.zeros(1000)]
    packer.reduce(holder[0])
    holder.clear()
    assert packer.commit(world.arenas)
    packer.revert()
    packer.revert()
    world.first.trim()
    assert world.books[0].extents.used == 0


def test_a_value_from_an_earlier_life_of_the_device(world: World, xp: Any) -> None:
    uuid = world.first.device.info.uuid
    old = world.arenas[uuid]
    array = xp.zeros(10)
    world.arenas[uuid] = DeviceArena(old.device, old.slab, 1, world.books[0].lease, world.books[0].give_back)
    with pytest.raises(StaleEpochError):
        world.store([array])


def test_a_lost_device_is_noticed(world: World) -> None:
    def lost() -> None:
        raise DeviceLostError("gone")

    module = emulated_module([world.first])
    array = module.zeros(10)
    world.first.check = lost
    with pytest.raises(DeviceLostError):
        world.store([array])
    module._devices[0].on_use = lost
    with pytest.raises(DeviceLostError):
        _ = array + 1


def test_records_outside_of_the_runtime(world: World, xp: Any) -> None:
    stored = world.store([xp.zeros(10)])
    with pytest.raises(DeserializationError, match="by get"):
        pickle.loads(stored.pickled, buffers=stored.buffers)
    packer, out, buffers = DevicePacker(), io.BytesIO(), list[Any]()
    with packer:
        Pickler(out, packer, buffers).dump(xp.zeros(3))
    with pytest.raises(DeserializationError, match="never stored"), resolving(lambda part: HostPlace(memoryview(b""))):
        pickle.loads(out.getvalue(), buffers=[buffer.raw() for buffer in buffers])


def test_an_emulated_module_needs_an_emulated_device() -> None:
    backend = CudaBackend(libraries(1, MEMORY))
    with pytest.raises(DeviceUsageError, match="not emulated"):
        emulated_module([World(backend).first])
    backend.close()


# ---- which types ----------------------------------------------------------------------------------------------------


def made(name: str, module: str, members: dict[str, Any], bases: tuple[type, ...] = ()) -> type:
    return type(name, bases, {"__module__": module, **members})


def test_adapters_are_found_by_type_alone() -> None:
    before = set(sys.modules)
    interface: dict[str, Any] = {"__cuda_array_interface__": property(lambda self: {})}
    dlpack: dict[str, Any] = {"__dlpack__": None, "__dlpack_device__": lambda self: (2, 0)}
    cases: list[tuple[type, type | None]] = [
        (made("ndarray", "cupy", interface | dlpack), CupyAdapter),
        (made("Tensor", "torch", interface | dlpack), TorchAdapter),
        (made("DeviceNDArray", "numba.cuda.cudadrv.devicearray", interface), NumbaAdapter),
        (made("Other", "somewhere", interface), InterfaceAdapter),
        (made("Other", "somewhere", dlpack), DlpackAdapter),
        (made("Series", "cudf.core.series", interface), None),
        (made("Parameter", "torch.nn", {}, (made("Tensor", "torch", interface),)), None),
        (made("Mine", "me", {}, (np.ndarray,)), None),
        (np.ndarray, None),
        (np.float32, None),
        (int, None),
        (type, None),
    ]
    for kind, adapter in cases:
        found = adapter_of(kind)
        assert (None if found is None else type(found)) is adapter, kind
        assert adapter_of(kind) is found
    assert not {"cupy", "torch", "numba"} & (set(sys.modules) - before)


def test_types_that_numpy_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host_dtype("<f2") == np.float16
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert host_dtype("torch.bfloat16/2") == np.uint16
    monkeypatch.setitem(sys.modules, "ml_dtypes", SimpleNamespace(bfloat16=np.float16))
    assert host_dtype("torch.bfloat16/2") == np.float16
    assert host_dtype("torch.float8_e4m3fn/1") == np.uint8


def test_inner_arrays_stay_inside(xp: Any, world: World) -> None:
    """What comes back is device memory: the host may not mix with it."""
    loaded = world.store([xp.arange(3)]).load()
    with pytest.raises(TypeError):
        loaded + np.arange(3)
    assert not inner_array(loaded).flags.writeable


@pytest.mark.contract("numpy")
def test_host_array_keeps_what_holds_its_memory_in_place() -> None:
    class Held(SimpleNamespace):
        def __del__(self) -> None:
            died.append(True)

    died: list[bool] = []
    view = np.frombuffer(memoryview(bytearray(64)).toreadonly(), np.uint8, 32, 16).view(View)
    view.view_pin = Held()
    array = host_array(HostPlace(view.data), Layout((2, 3), (12, 4), "<f4"))
    del view
    part = array[1:, ::2]
    del array
    gc.collect()
    assert not died
    del part
    gc.collect()
    assert died
