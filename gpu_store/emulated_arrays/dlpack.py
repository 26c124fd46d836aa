"""Exchange with other libraries by DLPack, and what a consumer of emulated device memory sees.

Theory of operation. Emulated device memory is host memory, and the capsule says so: its device is kDLCPU. A torch that
imports it makes a CPU tensor that shares the memory, which is what `afield.torch_device()` stands for on an emulated
device. That is the honest part; the emulation is in who may take part:

- NumPy may not take device memory unless it asks for a copy on the host (`np.from_dlpack(x, device="cpu")`), since with
  CuPy `np.from_dlpack(x)` fails. NumPy is told apart by what it passes: always a `dl_device`, None if none was asked
  for; torch leaves it out then. A consumer that also passes an explicit None is refused like NumPy. A NumPy older than
  2.1 passes nothing and gets an alias.
- `from_dlpack` of the array module refuses NumPy's arrays, as CuPy does, and takes other host-memory tensors (torch's)
  as memory of the current device, without a copy and outside of its account.

`stream` is accepted and means nothing: every call on emulated arrays is complete when it returns. `__cuda_array_interface__`
does not exist here, because whoever reads it would hand a host address to a CUDA driver.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from afield.gpu_store.emulated_arrays.delegation import Held
from afield.gpu_store.emulated_arrays.devices import DeviceMemory

#: DLPack's number for host memory.
CPU_DEVICE = (1, 0)

#: Stands for "not passed".
LEFT_OUT: Any = object()


def export(held: Held, max_version: tuple[int, int] | None, dl_device: Any, copy: Any) -> Any:
    """Return a DLPack capsule; raises BufferError for a consumer that may not have the memory as it is."""
    if dl_device is None:
        raise BufferError(
            "Unsupported device: NumPy cannot take a device array without a copy; use x.get() or asnumpy(x) "
            "(or np.from_dlpack(x, device='cpu'))"
        )
    wanted = None if copy is LEFT_OUT else copy
    if dl_device is not LEFT_OUT:
        if tuple(dl_device) != CPU_DEVICE:
            raise BufferError(
                f"an emulated device array can be exported to host memory {CPU_DEVICE}, not to {dl_device}"
            )
        if wanted is False:
            raise BufferError("device memory reaches the host by a copy only")
        wanted = True
    return held._array.__dlpack__(max_version=max_version, copy=wanted)


def take(kind: type[Held], value: Any, home: DeviceMemory) -> Held:
    """Return `value`, a device array or another library's tensor, as a device array that shares its memory."""
    if isinstance(value, Held):
        return kind._hold(value._array.view(), value._home)
    if isinstance(value, np.ndarray):
        raise TypeError("CPU arrays cannot be directly imported: NumPy arrays are copied to the device with asarray(x)")
    if not hasattr(value, "__dlpack_device__"):
        raise TypeError(f"from_dlpack takes objects with __dlpack__ and __dlpack_device__, not {type(value)}")
    place = tuple(int(number) for number in value.__dlpack_device__())
    if place != CPU_DEVICE:
        raise BufferError(f"memory of DLPack device {place} cannot be used by an emulated device")
    return kind._hold(home.adopt_array(np.from_dlpack(value)), home)
