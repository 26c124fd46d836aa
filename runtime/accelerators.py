"""What a process does about its devices for libraries that are not ours: torch, and numba's kernels.

Theory of operation. `prepare` is told once, when a process joins a session, which devices are its own and which backend they
have. On emulated devices it makes `numba.cuda` the simulator, adapted to emulated arrays; that costs nothing until numba is
imported. torch cannot be told of emulated devices: there `torch_device()` is torch's CPU, with which emulated arrays share
their memory by DLPack, so that a program written for one device runs on both.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from afield.errors import AfieldError, NoDeviceError
from afield.runtime import current

#: Loaded where devices are emulated only, with the arrays that it serves.
_SIMULATOR = "afield.gpu_store.emulated_arrays.numba_simulator"
_REMEDY = "ask for one with @afield.remote(num_gpus=1), or a part of one with num_gpus=0.25"


@dataclass(slots=True)
class _Prepared:
    """The devices of this process, in its own order, and the kind of the session's backend ("" where it has no devices)."""

    uuids: tuple[str, ...] = ()
    kind: str = ""


_prepared = _Prepared()


def prepare(uuids: Sequence[str], backend: str) -> None:
    """Get this process ready for its devices, before user code runs; a driver that leaves its session says `prepare((), "")`.

    Args:
        uuids: the devices that this process may use; none in a worker without a lease of devices.
        backend: what the session hands to its processes ("emulated:<address>", "cuda:..."), or the kind alone; "" without
            devices.
    """
    global _prepared
    _prepared = _Prepared(tuple(uuids), backend.partition(":")[0])
    if _prepared.kind == "emulated":
        # In every process of the session: kernels are pickled in one without devices and run in one that has some.
        prepare_numba()
    elif _SIMULATOR in sys.modules:
        sys.modules[_SIMULATOR].uninstall()


def prepare_numba() -> bool:
    """Let `from numba import cuda` give numba's simulator, with kernels that take emulated arrays; numba need not be there.

    Returns False where numba's real `numba.cuda` was imported before, or the user has set NUMBA_ENABLE_CUDASIM=0: kernels
    cannot run here then, but those that are sent to workers run there.
    """
    installed: bool = importlib.import_module(_SIMULATOR).install()
    return installed


def torch_device(index: int = 0) -> Any:
    """Return the `torch.device` of this process's lease, or of another of its devices (`index`, from 0).

    Starts the runtime on first use.

    On CUDA devices "cuda:<index>", which is among those of the lease, as torch sees no others. On emulated devices "cpu":
    an array of `afield.array_module()` and a tensor made of it by `torch.from_dlpack` share their memory. Where the cluster
    has no devices at all it is "cpu" as well, so that code without any runs; a task that needs a device says `num_gpus=1`
    and is refused there.

    Raises:
        NoDeviceError: the cluster has devices and this task asked for none, or for fewer.
        ImportError: torch is not installed.
        AfieldError: the devices are CUDA devices and this torch was built without CUDA.
    """
    if index < 0:
        raise ValueError(f"index={index}: devices are counted from 0")
    current.ensure()
    kind, uuids = _prepared.kind, _prepared.uuids
    if kind and index >= len(uuids):
        has = f"has {len(uuids)} devices" if uuids else "has no device"
        raise NoDeviceError(f"torch_device({index or ''}): this process {has}; {_REMEDY}")
    torch = _torch()
    if kind != "cuda":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise AfieldError(
            f"this process has the CUDA device {uuids[index]}, but torch {torch.__version__} finds no CUDA: install a "
            "torch that was built for CUDA (https://pytorch.org/get-started/locally)"
        )
    return torch.device("cuda", index)


def _torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise ImportError(
            f"torch_device() needs torch ({error}): pip install 'afield[torch]'", name=error.name
        ) from error
