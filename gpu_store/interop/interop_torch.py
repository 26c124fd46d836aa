"""torch's CUDA tensors.

Theory of operation. A tensor is described by what it says of itself and built through CUDA's array interface, both without
a copy. Types that NumPy lacks (bfloat16, float8) travel under torch's name and are laid over integers of their size. A
tensor that is more than dense memory (sparse, quantised, a conjugate view, the result of a recorded computation) is left
to torch's own pickling, as is one in host memory. torch has no read-only tensors.

torch's memory does not come from the arena, so its tensors are copied once, on the device, when they are stored. A
pluggable allocator is C code that torch calls with its own lock held; written as a Python callback it would wait there for
the interpreter lock, whose holder may wait for torch's lock in turn. Until afield ships a compiled allocator, leave it out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from afield.gpu_store.interop.interop_cupy import CudaAdapter, interface_at, ordinal_of
from afield.gpu_store.interop.places import Description, DevicePlace, Layout


class _Exporter:
    """Shows device memory to torch, and is kept by every tensor over it."""

    def __init__(self, interface: dict[str, Any], place: DevicePlace) -> None:
        self.__cuda_array_interface__ = interface
        self.place = place


class TorchAdapter(CudaAdapter):
    """`torch.Tensor` in device memory."""

    kind = "torch"

    def describe(self, array: Any) -> Description | None:
        if not array.is_cuda or str(array.layout) != "torch.strided" or array.is_quantized:
            return None
        if array.is_conj() or array.is_neg() or (array.requires_grad and not array.is_leaf):
            return None
        itemsize = int(array.element_size())
        strides = tuple(int(step) * itemsize for step in array.stride())
        shape = tuple(int(extent) for extent in array.shape)
        dtype = _dtype_name(str(array.dtype), itemsize)
        # The device of a tensor has CUDA's number.
        return Description(int(array.get_device()), int(array.data_ptr()), shape, strides, dtype, itemsize)

    def kind_of(self, array: Any) -> str:
        return "torch:grad" if array.requires_grad else self.kind

    def build(self, place: DevicePlace, layout: Layout) -> Any:
        import torch

        device = f"cuda:{ordinal_of(place.arena)}"
        name, _, size = layout.dtype.removeprefix("torch.").partition("/")
        own = getattr(torch, name) if size else None
        if layout.is_empty:
            kind_of_element = own if own is not None else getattr(torch, np.dtype(layout.dtype).name)
            tensor = torch.empty(layout.shape, dtype=kind_of_element, device=device)
        else:
            typestr = f"|i{size}" if size == "1" else f"<i{size}" if size else layout.dtype
            tensor = torch.as_tensor(_Exporter(interface_at(place, layout, typestr), place), device=device)
            tensor = tensor if own is None else tensor.view(own)
        return tensor.requires_grad_() if layout.kind.endswith(":grad") else tensor


def _dtype_name(name: str, itemsize: int) -> str:
    """Return "<f4" for "torch.float32", and "torch.bfloat16/2" where NumPy has no such type."""
    try:
        return np.dtype(name.removeprefix("torch.")).str
    except TypeError:
        return f"{name}/{itemsize}"
