"""Runs: owners and borrowers, lineage, workers, actors, the node daemon, the head, the command line.

This is where the parts meet: it takes decisions from `afield.scheduler`, memory from `afield.gpu_store` and channels
from `afield.transport`, which do not know one another. Users see it through `afield` alone.
"""

# From the repository root the folder is also reachable under its bare name; a second copy of every class would follow.
if __name__ != "afield.runtime":
    raise ImportError(f"this package is imported as afield.runtime, not as {__name__}", name=__name__)
