"""`torch_device()`: where torch computes in this process; `values.accelerators` says how that goes together."""

from __future__ import annotations

import importlib
from typing import Any

from afield.errors import AfieldError, NoDeviceError
from afield.runtime.calls import participation
from afield.runtime.values import accelerators

_REMEDY = "ask for one with @afield.remote(num_gpus=1), or a part of one with num_gpus=0.25"


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
    participation.ensure()
    kind, uuids = accelerators.prepared.kind, accelerators.prepared.uuids
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
