"""The emulated device array and the array module around it: what stands in for CuPy where there is no GPU.

Theory of operation. An `EmulatedArray` is a NumPy array that nobody outside may see, laid over memory that the device's
allocator handed out. Everything it can do is NumPy's doing on that inner array; what this package adds is the border:
operands are checked and unwrapped on the way in, results are put into device memory on the way out, and whatever would
cross between host and device without being asked to raises, as it does with CuPy. Views share memory; an allocation
goes back to its allocator when the last view of it is gone.

- `devices`: a device's memory, the current device of a thread, allocators.
- `account`: how much of it is in use.
- `delegation`: one NumPy call on device arrays: operands in, results out.
- `array`: the array type. `dlpack`: exchange with other libraries.
- `names`, `creation`, `random_numbers`, `cuda_namespace`, `module`: the module, `make_module` makes one.
- `imports`: the module under the name that programs import.

Nothing here imports CuPy, and nothing here guesses: what CuPy has and this does not raises an error that says so.
"""

from afield.gpu_store.emulated_arrays.array import EmulatedArray, allocation_of, array_over, inner_array
from afield.gpu_store.emulated_arrays.devices import (
    Allocator,
    CappedAllocator,
    DeviceMemory,
    DeviceSet,
    set_process_devices,
)
from afield.gpu_store.emulated_arrays.imports import installed_as_import
from afield.gpu_store.emulated_arrays.module import EmulatedModule, make_module

__all__ = [
    "EmulatedArray",
    "EmulatedModule",
    "make_module",
    "installed_as_import",
    "Allocator",
    "CappedAllocator",
    "DeviceMemory",
    "DeviceSet",
    "allocation_of",
    "array_over",
    "inner_array",
    "set_process_devices",
]
