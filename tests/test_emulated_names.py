"""The emulated module has no name that CuPy lacks, and lets NumPy do nothing that CuPy would refuse for its name.

What CuPy has is recorded in `cupy_names.json`; see `tests/cupy_names.py`. A program that passes on emulated devices must not
fail on a GPU for a name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from afield.gpu_store.emulated_arrays import make_module
from afield.scheduler.devices import parse_devices
from tests.cupy_names import MODULES, from_cupy, recorded

RECORDED = recorded()
cp: Any = make_module(parse_devices("emulated:1:64MiB"))

#: Everything that has names: by its name in the record, ours.
OURS = {
    **{name: module for name, module in cp._modules.items() if name in MODULES},
    "ndarray": cp.ones((2, 2)),
    "ufunc": cp.add,
    "Generator": cp.random.default_rng(),
    "RandomState": cp.random.RandomState(),
    "Device": cp.cuda.Device(0),
    "Event": cp.cuda.Event(),
    "MemoryPointer": cp.ones(2).data,
    "MemoryPool": cp.get_default_memory_pool(),
    "PinnedMemoryPool": cp.get_default_pinned_memory_pool(),
    "Stream": cp.cuda.Stream(),
}

#: What only ours has: a GPU's UUID is how afield names it, and CuPy has no name for it.
OWN = {"Device": {"uuid"}}


def offered(thing: Any) -> set[str]:
    """The names that a thing says it has, and those that are looked up when they are asked for."""
    asked = {*dir(thing), *dir(np), *dir(np.linalg), *dir(np.fft), *dir(np.ndarray), *dir(np.random)}
    asked |= {*dir(np.random.Generator), *dir(np.random.RandomState), *dir(np.add)}.union(*RECORDED.values())
    return {name for name in asked if not name.startswith("_") and has(thing, name)}


def has(thing: Any, name: str) -> bool:
    try:
        getattr(thing, name)
    except (AttributeError, NotImplementedError):
        return False
    return True


@pytest.mark.parametrize("where", OURS)
def test_no_name_is_offered_that_cupy_lacks(where: str) -> None:
    assert offered(OURS[where]) - OWN.get(where, set()) <= RECORDED[where]


def test_every_module_is_held_to_the_record() -> None:
    assert set(cp._modules) - set(MODULES) == {"cupy._util"}  # which programs name for its warning
    assert issubclass(cp._util.PerformanceWarning, RuntimeWarning)


#: Functions of NumPy that CuPy does not have.
ABSENT = """
    np.block([[x], [x]]) | np.insert(x, 0, 1) | np.unstack(x) | np.vecdot(x, x) | np.linalg.outer(x, x) | np.linalg.trace(m)
    np.linalg.vector_norm(x) | np.linalg.svdvals(m) | np.linalg.diagonal(m) | np.matvec(m, x) | np.vecmat(x, m) | np.spacing(x)
    np.nanpercentile(x, 5) | np.linalg.multi_dot([m, m]) | np.linalg.vecdot(x, x)

"""


@pytest.mark.contract("numpy")
@pytest.mark.parametrize(
    "expression", [part.strip() for line in ABSENT.strip().splitlines() for part in line.split(" | ")]
)
def test_what_cupy_lacks_is_not_computed_through_numpy(expression: str) -> None:
    with pytest.raises((TypeError, AttributeError)):
        eval(expression, {"np": np, "x": cp.arange(3.0), "m": cp.eye(3)})


@pytest.mark.contract("cupy")
@pytest.mark.filterwarnings("ignore")
def test_the_record_is_what_cupy_has() -> None:
    real_cupy = pytest.importorskip("cupy")
    assert issubclass(real_cupy._util.PerformanceWarning, RuntimeWarning)
    real = from_cupy()
    for where, names in RECORDED.items():
        # A later CuPy may have more; what the record says must be there.
        assert names <= set(real[where]), where
