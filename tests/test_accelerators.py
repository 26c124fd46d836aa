"""torch and numba on this process's devices. numba's own state is a process's, so each of its tests is a program."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import afield
from afield.errors import AfieldError, NoDeviceError
from afield.gpu_store.emulated_arrays import numba_simulator
from afield.runtime.calls import participation
from afield.runtime.face.torch_device import torch_device
from afield.runtime.values import accelerators

ROOT = Path(__file__).resolve().parent.parent
needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")

# ---- torch ----------------------------------------------------------------------------------------------------------


class FakeTorch:
    """As much of torch as `torch_device` looks at."""

    __version__ = "2.9.0"

    def __init__(self, has_cuda: bool) -> None:
        self.cuda = SimpleNamespace(is_available=lambda: has_cuda)

    @staticmethod
    def device(kind: str, index: int | None = None) -> str:
        return kind if index is None else f"{kind}:{index}"


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTorch]:
    fake = FakeTorch(has_cuda=True)
    monkeypatch.setitem(sys.modules, "torch", fake)
    monkeypatch.setattr(participation, "ensure", lambda: None)
    yield fake
    accelerators.prepare((), "")


def test_the_torch_device_is_that_of_the_lease(torch: FakeTorch) -> None:
    accelerators.prepare(["GPU-1", "GPU-2"], "cuda:GPU-1=2")
    assert torch_device() == "cuda:0"
    assert torch_device(1) == "cuda:1"
    accelerators.prepare(["EMU-1"], "emulated:/proc/1/fd/3")
    assert torch_device() == "cpu"
    accelerators.prepare([], "")
    assert torch_device() == "cpu", "code without any device runs where there are none"


@pytest.mark.parametrize(("uuids", "index", "message"), [([], 0, "has no device.*num_gpus=1"), (["A"], 1, "1 devices")])
@pytest.mark.parametrize("backend", ["cuda:", "emulated:somewhere"])
def test_a_process_without_the_device(
    torch: FakeTorch, uuids: list[str], index: int, message: str, backend: str
) -> None:
    accelerators.prepare(uuids, backend)
    with pytest.raises(NoDeviceError, match=message):
        torch_device(index)
    with pytest.raises(ValueError):
        torch_device(-1)


def test_a_torch_that_cannot_serve(monkeypatch: pytest.MonkeyPatch, torch: FakeTorch) -> None:
    accelerators.prepare(["GPU-1"], "cuda:")
    torch.cuda.is_available = lambda: False
    with pytest.raises(AfieldError, match=r"GPU-1.*built for CUDA"):
        torch_device()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"afield\[torch\]"):
        torch_device()


# ---- numba: without it ----------------------------------------------------------------------------------------------


def finders() -> list[object]:
    return [finder for finder in sys.meta_path if isinstance(finder, numba_simulator._Finder)]


def test_preparing_imports_nothing_and_is_undone() -> None:
    loaded = "numba" in sys.modules
    accelerators.prepare(["EMU-1"], "emulated:somewhere")
    accelerators.prepare(["EMU-1"], "emulated:somewhere")
    try:
        if "numba.cuda" not in sys.modules:
            assert len(finders()) == 1
        assert ("numba" in sys.modules) is loaded
    finally:
        accelerators.prepare((), "")
    assert finders() == []
    accelerators.prepare(["GPU-1"], "cuda:")
    assert finders() == []


# ---- numba: with it -------------------------------------------------------------------------------------------------

PREAMBLE = """
import os, pickle, sys, threading
import cloudpickle, numpy as np
from afield.gpu_store.emulated_arrays import inner_array, installed_as_import, make_module, numba_simulator
from afield.runtime.values import accelerators
from afield.scheduler.devices import parse_devices

module = make_module(parse_devices("emulated:2:64MiB"))
used = lambda: module._devices.devices[0].account.used_bytes

def fails(error, call, *words):
    try:
        call()
    except error as raised:
        assert all(word in str(raised) for word in words), raised
    else:
        raise AssertionError(f"no {error.__name__}")
"""

ADAPTED = """
accelerators.prepare(["EMU-0"], "emulated:somewhere")
installed = installed_as_import(module)
installed.__enter__()
import cupy as cp
from numba import cuda
assert "NUMBA_ENABLE_CUDASIM" not in os.environ

@cuda.jit
def double(x, y):
    i = cuda.grid(1)
    if i < x.size:
        y[i] = x[i] * 2
"""


def run(source: str, *, before: str = ADAPTED) -> str:
    text = PREAMBLE + before + textwrap.dedent(source)
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.contract("numba-cuda")
@needs_numba
@pytest.mark.slow
def test_kernels_work_on_emulated_arrays() -> None:
    run(
        """
        x, y = cp.arange(10, dtype="f4"), cp.zeros(10, "f4")
        double[3, 4](x, y)
        assert y.get().tolist() == [2.0 * i for i in range(10)]
        double[(1,), (10,)](x[::-1], y[:])
        assert y.get().tolist() == [18.0 - 2 * i for i in range(10)], "views are views"
        double.forall(10)(x, y)
        assert y[9].item() == 18

        @cuda.jit(device=True)
        def twice(value):
            return value * 2

        @cuda.jit
        def total(x, out):
            part = cuda.shared.array(4, "f4")
            thread = cuda.threadIdx.x
            part[thread] = twice(x[cuda.grid(1)])
            cuda.syncthreads()
            if thread == 0:
                for i in range(4):
                    cuda.atomic.add(out, 0, part[i])

        out = cp.zeros(1, "f4")
        total[2, 4](x, out)
        assert out.item() == 2 * sum(range(8))

        @cuda.jit
        def plus(grid, amount):
            i, j = cuda.grid(2)
            grid[i, j] += amount

        grid = cp.zeros((4, 6))
        plus[(2, 2), (2, 3)](grid, 1.5)
        assert (grid.get() == 1.5).all()

        stored = cp.arange(4)
        inner_array(stored).flags.writeable = False
        fails(ValueError, lambda: double[1, 4](x, stored), "read-only")
        host = np.zeros(4)
        double[1, 4](stored, host)
        assert host.tolist() == [0, 2, 4, 6], "host arrays are copied there and back, as numba does"

        class Lost(Exception): pass
        def lost(): raise Lost("the device was lost")
        module._devices.devices[0].on_use = lost
        fails(Lost, lambda: double[1, 4](x, y))
        """
    )


@pytest.mark.contract("numba-cuda")
@needs_numba
@pytest.mark.slow
def test_arrays_of_numba_lie_in_device_memory() -> None:
    run(
        """
        made = cuda.to_device(np.arange(1024.0))
        assert used() == 8192
        other = cuda.device_array_like(made)
        empty = cuda.device_array((2, 3), dtype=np.int32, order="F")
        assert used() == 16384 + 512 and empty.shape == (2, 3) and empty.strides == (4, 8)
        double[8, 128](made, other)
        assert (other.copy_to_host() == np.arange(1024.0) * 2).all()
        del made, empty
        assert used() == 8192

        shared = cp.asarray(other)
        shared[0] = 77
        assert other[0] == 77 and used() == 8192, "the same memory"
        again = cuda.as_cuda_array(shared)
        again[1] = 78
        assert shared[1].item() == 78
        assert cuda.is_cuda_array(shared) and not cuda.is_cuda_array(np.zeros(3))
        fails(TypeError, lambda: cuda.as_cuda_array(np.zeros(3)), "to_device")

        part = cp.asarray(other[2:4])
        part[:] = -1
        assert other[2] == other[3] == -1
        other.copy_to_device(shared * 0)
        assert shared.sum().item() == 0
        cuda.to_device(np.ones(1024), to=other)
        assert shared.sum().item() == 1024
        x, y = cp.ones(4), cp.zeros(4)
        double[1, 4](cuda.In(x), cuda.Out(y))
        assert y.sum().item() == 8

        back = pickle.loads(pickle.dumps(other))
        assert type(back) is type(other) and (back.copy_to_host() == 1).all() and used() > 16000
        restored = numba_simulator._array(np.ones(3))
        assert type(restored) is np.ndarray, "a process without devices was given host memory"
        """
    )


@needs_numba
@pytest.mark.slow
def test_threads_that_launch_at_the_same_time() -> None:
    run(
        """
        results = {}
        def work(number):
            x, y = cp.full(number, number), cp.zeros(number)
            for _ in range(20):
                double[1, number](x, y)
            results[number] = y.get().tolist()
        threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2, 3, 4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert results == {number: [2.0 * number] * number for number in (1, 2, 3, 4)}, results
        """
    )


@pytest.mark.contract("numba-cuda", "cloudpickle")
@needs_numba
@pytest.mark.slow
def test_a_kernel_travels_from_a_process_with_the_real_numba(tmp_path: Path) -> None:
    pickled = tmp_path / "task.pkl"
    run(
        f"""
        from numba import cuda

        @cuda.jit(device=True)
        def twice(value):
            return value * 2

        @cuda.jit
        def double(x, y):
            i = cuda.grid(1)
            y[i] = twice(x[i])

        accelerators.prepare((), "emulated:somewhere")
        assert not accelerators.prepare_numba(), "it was imported before"

        def task(n):
            import cupy as cp
            x, y = cp.arange(n), cp.zeros(n)
            double[1, n](x, y)
            return y.get().tolist()

        open({str(pickled)!r}, "wb").write(cloudpickle.dumps(task))
        """,
        before="",
    )
    run(
        f"""
        task = pickle.load(open({str(pickled)!r}, "rb"))
        assert task(4) == [0, 2, 4, 6]
        once = cloudpickle.loads(cloudpickle.dumps((double, double[1, 3])))
        x, y = cp.arange(3), cp.zeros(3)
        once[1](x, y)
        assert y.get().tolist() == [0, 2, 4]
        """
    )


@needs_numba
@pytest.mark.slow
def test_the_switch_of_the_user_stays() -> None:
    run(
        """
        os.environ["NUMBA_ENABLE_CUDASIM"] = "0"
        assert not accelerators.prepare_numba()
        from numba import cuda
        assert not numba_simulator.is_simulator(cuda)
        assert os.environ["NUMBA_ENABLE_CUDASIM"] == "0"
        """,
        before="",
    )


# ---- in a session ---------------------------------------------------------------------------------------------------

KERNEL_TASK: Any = """
import afield
import numpy as np
from numba import cuda

@cuda.jit
def double(x, y):
    i = cuda.grid(1)
    y[i] = x[i] * 2

@afield.remote(num_gpus=1)
def work(n):
    import cupy as cp
    x, y = cp.arange(n), cp.zeros(n)
    double[1, n](x, y)
    return y

@afield.remote(num_gpus=1)
def write(stored):
    double[1, 4](stored, stored)

if __name__ == "__main__":
    afield.init(num_cpus=2, devices="emulated:2")
    ref = work.remote(4)
    assert afield.get(ref, device="host").tolist() == [0, 2, 4, 6]
    try:
        afield.get(write.remote(ref))
    except ValueError as error:
        assert "read-only" in str(error)
    else:
        raise AssertionError("an object was written to")
    afield.shutdown()
"""


@needs_numba
@pytest.mark.slow
def test_kernels_in_tasks(tmp_path: Path) -> None:
    if not hasattr(afield, "array_module"):
        pytest.skip("tasks have no device memory yet")
    program = tmp_path / "kernels.py"
    program.write_text(KERNEL_TASK)
    done = subprocess.run([sys.executable, str(program)], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
