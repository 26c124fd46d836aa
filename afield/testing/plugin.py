"""The pytest plugin: an option, a marker, and the fixtures `afield_runtime`, `afield_session` and `afield_devices`.

Theory of operation. This file is loaded by every run of pytest, also where no test uses afield, so it imports nothing of
afield before a fixture is used. Whether a test passed is noted where pytest reports it: a test that failed holds what it
had in its traceback, so only tests that passed are asked what they left behind.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from afield.runtime.face.lifecycle import ClusterInfo
    from afield.testing.devices import DeviceHandle
    from afield.testing.runtimes import Runtimes

DEFAULT_DEVICES = "emulated:2"

_RUNTIMES: pytest.StashKey[Runtimes] = pytest.StashKey()
_FAILED: pytest.StashKey[bool] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option and its setting in the configuration file."""
    group = parser.getgroup("afield", "afield: futures in device memory")
    text = f'devices of the runtimes that afield\'s fixtures start: "emulated:4", "cuda", "none" (default: {DEFAULT_DEVICES})'
    group.addoption("--afield-devices", metavar="DEVICES", default=None, help=text)
    parser.addini("afield_devices", text, default=DEFAULT_DEVICES)


def pytest_configure(config: pytest.Config) -> None:
    """The marker."""
    config.addinivalue_line(
        "markers", "afield_leaks_ok: do not fail the test for objects, tasks or actors that it leaves behind"
    )


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    """Note what did not pass."""
    outcome = yield
    if not outcome.get_result().passed:
        item.stash[_FAILED] = True


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, None]:
    """Note what was ended by Ctrl-C, of which there is no report."""
    outcome = yield
    if outcome.excinfo is not None:
        item.stash[_FAILED] = True


def _runtimes(config: pytest.Config) -> Runtimes:
    from afield.testing.runtimes import Runtimes

    devices = config.getoption("--afield-devices") or config.getini("afield_devices")
    return config.stash.setdefault(_RUNTIMES, Runtimes(str(devices)))


def devices_of(request: pytest.FixtureRequest) -> str | None:
    """Return the devices that `parametrize("afield_runtime", [...], indirect=True)` asks for; None for those of the option."""
    devices = getattr(request, "param", None)
    if devices is not None and not isinstance(devices, str):
        pytest.fail(
            f"the parameter {devices!r} of {request.fixturename} is not valid; expected its devices as text, such as "
            '"emulated:3" or "none"',
            pytrace=False,
        )
    return devices


def _is_checked(request: pytest.FixtureRequest) -> bool:
    return not request.node.stash.get(_FAILED, False) and request.node.get_closest_marker("afield_leaks_ok") is None


@pytest.fixture
def afield_runtime(request: pytest.FixtureRequest) -> Iterator[ClusterInfo]:
    """A runtime of the test's own: two CPUs, the devices of --afield-devices; the test fails if it leaves something behind.

    Yields what `afield.init` returned. Other devices are a parameter: ``parametrize("afield_runtime", ["emulated:3"],
    indirect=True)``.
    """
    runtimes = _runtimes(request.config)
    if "afield_session" in request.fixturenames:
        pytest.fail(
            "afield_runtime and afield_session cannot both be used by one test: a process has one runtime at a time. "
            "Use afield_session for the runtime that all tests share, or afield_runtime for one of the test's own.",
            pytrace=False,
        )
    with runtimes.own(devices_of(request)) as info:
        yield info
        left = runtimes.left_behind(request.node) if _is_checked(request) else ""
    if left:
        pytest.fail(left, pytrace=False)


@pytest.fixture(scope="session")
def afield_session(request: pytest.FixtureRequest) -> Iterator[ClusterInfo]:
    """A runtime that all tests share which ask for it; a test fails if more is held after it than before.

    Yields what `afield.init` returned. A test with `afield_runtime` in between ends this runtime, and the next test that
    shares it gets a new one.
    """
    with _runtimes(request.config).shared(devices_of(request)) as info:
        yield info


@pytest.fixture(autouse=True)
def _afield_shared(request: pytest.FixtureRequest) -> Iterator[None]:
    """Around all fixtures of a test that shares the runtime; nothing for the others."""
    if "afield_session" not in request.fixturenames or "afield_runtime" in request.fixturenames:
        yield
        return
    runtimes = _runtimes(request.config)
    runtimes.resume()
    before = runtimes.held()
    yield
    left = runtimes.left_behind(request.node, before) if _is_checked(request) else ""
    if left:
        pytest.fail(left, pytrace=False)


@pytest.fixture
def afield_devices(request: pytest.FixtureRequest) -> Iterator[list[DeviceHandle]]:
    """Handles of the devices of the test's runtime (`afield_session`'s if the test uses that), which make faults happen."""
    from afield.testing.devices import handles

    request.getfixturevalue("afield_session" if "afield_session" in request.fixturenames else "afield_runtime")
    with handles() as found:
        yield found
