"""torch tensors in host memory: their bytes go beside the pickle, and come back without a copy.

Theory of operation. torch's own pickling writes a storage into the pickle, byte by byte, and reading copies it again. Here a
tensor becomes its storage, which is an out-of-band buffer as a NumPy array's is, and how the tensor lies in it. Tensors of
one value that share a storage share it again. A tensor that makes up less than half of its storage goes without the rest.

torch has no read-only tensors. What is read is a private view (`private_views`): it shares the memory of the store until
somebody writes to it, and nobody else sees what he writes.

A tensor that is more than dense memory, or that has hooks or attributes, is left to torch. Parameters and modules contain plain
tensors, and gain by this. torch is imported by who rebuilds a tensor, and nowhere else.
"""

from __future__ import annotations

import pickle
import sys
from typing import Any

from afield.gpu_store.private_views import private_view

#: Less than one byte in this many wanted: the tensor is copied out of its storage.
_DENSE = 2


class HostStorage:
    """A tensor's storage on its way into a pickle, once for all tensors of a value that share it."""

    __slots__ = ("storage",)

    def __init__(self, storage: Any) -> None:
        self.storage = storage

    def __reduce__(self) -> tuple[Any, ...]:
        torch = sys.modules["torch"]
        flat = torch.empty(0, dtype=torch.uint8).set_(self.storage)
        return rebuild_storage, (pickle.PickleBuffer(flat.numpy()),)


class HostTensors:
    """The tensors of one value that is being pickled."""

    def __init__(self) -> None:
        self._storages: dict[int, HostStorage] = {}  # address -> storage

    def reduce(self, tensor: Any) -> tuple[Any, ...] | None:
        """Return what `reducer_override` returns for a `torch.Tensor`; None for one that is left to torch."""
        if tensor.device.type != "cpu" or str(tensor.layout) != "torch.strided" or tensor.is_quantized:
            return None
        if tensor.is_conj() or tensor.is_neg() or tensor._backward_hooks or tensor.__dict__ or not tensor.numel():
            return None
        if any(name is not None for name in getattr(tensor, "names", ())):  # torch has done away with them
            return None
        plain = tensor.detach()
        storage = plain.untyped_storage()
        if _DENSE * plain.numel() * plain.element_size() < storage.nbytes():
            plain = plain.contiguous()
            plain = plain.clone() if plain.untyped_storage().data_ptr() == storage.data_ptr() else plain
            storage = plain.untyped_storage()
        known = self._storages.setdefault(storage.data_ptr(), HostStorage(storage))
        dtype = str(plain.dtype).removeprefix("torch.")
        layout = plain.storage_offset(), tuple(plain.shape), tuple(plain.stride())
        return rebuild_tensor, (known, dtype, *layout, bool(tensor.requires_grad))


def rebuild_storage(data: Any) -> Any:
    """Return a storage with these bytes; named in pickles, so it stays where it is."""
    import torch

    return torch.from_numpy(private_view(data)).untyped_storage()


def rebuild_tensor(
    storage: Any, dtype: str, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], requires_grad: bool
) -> Any:
    """Return a tensor that lies so in a storage; named in pickles, so it stays where it is."""
    import torch

    tensor = torch.empty(0, dtype=getattr(torch, dtype)).set_(storage, offset, shape, stride)
    return tensor.requires_grad_() if requires_grad else tensor
