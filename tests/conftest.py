"""Fixtures: a runtime for one test, a runtime shared by the cheap tests of a module, and what a real GPU needs.

How the suite is spread over processes, and what it may cost, is in `tests/budget.py`.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

import afield
from tests.helpers import no_leaks

pytest_plugins = ["tests.budget"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a real GPU skip, and say so, where there is none."""
    if os.path.exists("/dev/nvidiactl"):
        return
    skip = pytest.mark.skip(reason="needs a real CUDA device, and this machine has none")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture(scope="module", autouse=True)
def _collections_look_at_this_module_alone() -> None:
    """What earlier modules left alive (imported libraries, most of all) is no business of this one's leak checks.

    Each of them is a full collection, which takes as long as there are objects to look at.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of whoever runs the tests must not choose their devices."""
    for name in ("AFIELD_DEVICES", "AFIELD_STORE_WAIT_S", "AFIELD_FULL_TRACEBACKS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_runtime() -> Iterator[None]:
    """No runtime at first; whatever session the test starts leaves nothing behind."""
    afield.shutdown()
    with no_leaks():
        yield


@pytest.fixture
def runtime(no_runtime: None) -> afield.ClusterInfo:
    """A runtime with two CPUs for one test, which leaves nothing behind."""
    return afield.init(num_cpus=2)


@pytest.fixture(scope="module")
def _runtime_of_module() -> Iterator[None]:
    afield.shutdown()
    with no_leaks():
        yield


@pytest.fixture
def shared_runtime(_runtime_of_module: None) -> None:
    """A runtime with two CPUs and two emulated devices that the cheap tests of a module share."""
    if not afield.is_initialized():
        afield.init(num_cpus=2, devices="emulated:2")
