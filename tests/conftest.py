"""Fixtures: a runtime for one test, a runtime shared by the cheap tests of a module, and what a real GPU needs."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import afield
from tests.helpers import no_leaks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a real GPU skip, and say so, where there is none."""
    if os.path.exists("/dev/nvidiactl"):
        return
    skip = pytest.mark.skip(reason="needs a real CUDA device, and this machine has none")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


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
