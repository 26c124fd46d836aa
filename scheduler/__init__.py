"""Decides: resources, the inventory and topology of devices, leases, placement, placement groups.

Everything here is pure: no clock, threads, sockets, files, environment or randomness. What happened and what time it
is are handed in, decisions come out, and the shells in `afield.runtime` carry them out. It imports only afield's leaf
modules.
"""

# From the repository root the folder is also reachable under its bare name; a second copy of every class would follow.
if __name__ != "afield.scheduler":
    raise ImportError(f"this package is imported as afield.scheduler, not as {__name__}", name=__name__)
