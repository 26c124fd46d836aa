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

#: Loaded where devices are emulated only, with the arrays that it serves.
_SIMULATOR = "afield.gpu_store.emulated_arrays.numba_simulator"


@dataclass(slots=True)
class Prepared:
    """The devices of this process, in its own order, and the kind of the session's backend ("" where it has no devices)."""

    uuids: tuple[str, ...] = ()
    kind: str = ""


prepared = Prepared()


def prepare(uuids: Sequence[str], backend: str) -> None:
    """Get this process ready for its devices, before user code runs; a driver that leaves its session says `prepare((), "")`.

    Args:
        uuids: the devices that this process may use; none in a worker without a lease of devices.
        backend: what the session hands to its processes ("emulated:<address>", "cuda:..."), or the kind alone; "" without
            devices.
    """
    global prepared
    prepared = Prepared(tuple(uuids), backend.partition(":")[0])
    if prepared.kind == "emulated":
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
