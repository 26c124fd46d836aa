"""Holds: objects in their tiers (device, host, disk), slabs and extents, pins, spilling, and the device backends.

A store owns large regions of memory, called slabs, and hands out pieces of them, called extents; a payload on this
machine never travels in any other way. It imports only afield's leaf modules; what CUDA there is stays in its
backend.
"""

# From the repository root the folder is also reachable under its bare name; a second copy of every class would follow.
if __name__ != "afield.gpu_store":
    raise ImportError(f"this package is imported as afield.gpu_store, not as {__name__}", name=__name__)
