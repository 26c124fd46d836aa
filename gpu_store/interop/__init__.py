"""Device arrays inside values: what a library's array says about its memory, and arrays over stored memory.

Theory of operation. A value is pickled with a `DevicePacker` beside the pickler. Each device array in it becomes a small
record in the pickle, and its memory a *part* of the object: kept where it was born if nothing else refers to it, else
copied once on the device. When the value is rebuilt, `rebuild` asks the runtime where a part is (`resolving`) and lays an
array over it: of the type that went in, or NumPy's where the part is in host memory.

- `places`: where a part is when it is read; what an adapter tells and does.
- `registry`: which adapter a type has, decided without importing any library.
- `emulated`, `interop_cupy`, `interop_torch`, `interop_numba`: the adapters, and the hooks that make a library allocate from
  a `DeviceArena`. CUDA's libraries are imported inside their functions only.
- `packing`, `unpacking`: the two directions.
- `host_tensors`: torch tensors in host memory, whose bytes go beside the pickle as NumPy's do.
"""

from afield.gpu_store.interop.host_tensors import HostTensors
from afield.gpu_store.interop.packing import DevicePacker
from afield.gpu_store.interop.places import DevicePlace, HostPlace, Place
from afield.gpu_store.interop.registry import adapter_of
from afield.gpu_store.interop.unpacking import resolving

__all__ = ["DevicePacker", "DevicePlace", "HostPlace", "HostTensors", "Place", "adapter_of", "resolving"]
