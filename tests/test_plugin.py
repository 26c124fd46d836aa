"""The pytest plugin, in runs of pytest of its own; the handles of devices also on a machine that the test makes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from afield.errors import DeviceLostError, NoDeviceError, OutOfDeviceMemoryError
from afield.gpu_store.backends.base import DeviceUsageError, PoisonedContextError, SlabImportError
from afield.gpu_store.backends.emulated import EmulatedBackend, LinkSpeed
from afield.runtime.node import daemon
from afield.testing.devices import DeviceHandle, DeviceMemory
from afield.testing.runtimes import report
from tests.device_helpers import emulated_devices
from tests.test_docs import program_of

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
#: The entry point is known only once afield was installed anew since it has one.
LOAD = [] if entry_points(group="pytest11", name="afield") else ["-p", "afield.testing.plugin"]
#: Plugins that have no part in it, and take longer to load than all else.
LOAD += ["-p", "no:hypothesispytest", "-p", "no:xdist", "-p", "no:cacheprovider"]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run pytest on a file; returns the result."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(source: str, *options: str, **files: str) -> pytest.RunResult:
        text = "import gc, os, sys, time\nimport numpy as np\nimport pytest\nimport afield\n\nKEPT = []\n"
        pytester.makepyfile(test_it=text + textwrap.dedent(source))
        for name, content in files.items():
            pytester.makefile(".ini", **{name: content})
        return pytester.runpytest_subprocess(*LOAD, "-W", "error", "--timeout=60", *options, timeout=100)

    return run


# ---- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.contract("pytest")
@pytest.mark.slow
def test_a_run_that_does_not_use_it_pays_nothing(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile(
        """
        import sys

        def test_nothing_was_imported():
            assert "afield.testing.plugin" in sys.modules
            assert not [name for name in sys.modules if name.startswith(("afield.runtime", "afield.gpu_store"))]
            assert "numpy" not in sys.modules
        """
    )
    pytester.runpytest_subprocess(*LOAD, "-W", "error").assert_outcomes(passed=1)


@pytest.mark.contract("pytest")
@pytest.mark.slow
def test_it_says_what_it_has(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.runpytest_subprocess(*LOAD, "--help").stdout.fnmatch_lines(["*--afield-devices=DEVICES*"])
    pytester.runpytest_subprocess(*LOAD, "--markers").stdout.fnmatch_lines(["@pytest.mark.afield_leaks_ok:*"])
    shown = pytester.runpytest_subprocess(*LOAD, "--fixtures").stdout
    for name in ("afield_runtime", "afield_session", "afield_devices"):
        shown.fnmatch_lines([f"{name}* -- *"])


# ---- a runtime for one test -----------------------------------------------------------------------------------------


LEAVING = """
@afield.remote
def zeros(n):
    return np.zeros(n)

@afield.remote
def sleep(seconds):
    time.sleep(seconds)

@afield.remote
class Counter:
    def count(self):
        return 1

SESSIONS = set()

@pytest.fixture
def weights(afield_runtime):
    return {"ref": afield.put(np.zeros(200_000))}

def test_clean(afield_runtime):
    SESSIONS.add(afield_runtime.session)
    assert len(afield_runtime.devices) == 2 and afield_runtime.num_cpus == 2
    assert afield.get(zeros.remote(100_000)).sum() == 0
    counter = Counter.remote()
    assert afield.get(counter.count.remote()) == 1
    assert "AFIELD_RECORD_CALL_SITES" not in os.environ

def test_value_of_a_fixture(afield_runtime, weights):
    SESSIONS.add(afield_runtime.session)
    assert len(SESSIONS) == 2
    assert afield.get(weights["ref"]).nbytes == 1_600_000

def test_keeps_a_ref(afield_runtime):
    KEPT.append(afield.put(np.zeros(200_000)))

def test_keeps_a_view(afield_runtime):
    KEPT.append(afield.get(zeros.remote(100_000)))

@pytest.mark.afield_leaks_ok
def test_may_keep(afield_runtime):
    KEPT.append(afield.put(1))

def test_leaves_a_task(afield_runtime):
    sleep.remote(60)

def test_leaves_an_actor(afield_runtime):
    afield.get(Counter.options(name="c", lifetime="detached").remote().count.remote())

def test_fails_and_holds(afield_runtime):
    ref = afield.put(np.zeros(200_000))
    assert ref is None

def test_ends_it(afield_runtime):
    KEPT.append(afield.put(1))
    afield.shutdown()

def test_clean_again(afield_runtime):
    assert afield.get(afield.put(1)) == 1

def test_without():
    assert not afield.is_initialized()
"""


@pytest.mark.slow(12)
def test_a_runtime_for_each_test_and_what_tests_leave_behind(run: Any) -> None:
    result = run(LEAVING)
    result.assert_outcomes(passed=10, failed=1, errors=4)
    output = result.stdout.str()
    for name in ("keeps_a_ref", "keeps_a_view", "leaves_a_task", "leaves_an_actor"):
        assert f"ERROR at teardown of test_{name}" in output
    result.stdout.fnmatch_lines(
        [
            "afield: this test left 1 object behind (1.5* MiB):",
            "  ????????* 1.5* MiB, host, of driver pid *, made at *test_it.py:* in test_keeps_a_ref()",
            "    alive for: local handle x1",
            "*@pytest.mark.afield_leaks_ok.",
            "*zero-copy view*",
            "*result of the pending task sleep()*",
            "afield: this test left 1 actor running*",
        ]
    )


@pytest.mark.slow
def test_a_runtime_that_a_test_left_running(run: Any) -> None:
    result = run(
        """
        def test_starts_one():
            afield.init(num_cpus=1)

        def test_wants_one(afield_runtime):
            pass
        """
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*a runtime is running already that none of afield's fixtures started*"])


@pytest.mark.slow
def test_the_devices_are_those_of_the_option_or_the_file(run: Any) -> None:
    source = """
        def test_devices(afield_runtime):
            expected = os.environ["EXPECTED"]
            assert str(len(afield_runtime.devices)) == expected
        """

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPECTED", "3")
        patch.setenv("AFIELD_DEVICES", "emulated:7")
        run(source, pytest="[pytest]\nafield_devices = emulated:3:64MiB\n").assert_outcomes(passed=1)
        patch.setenv("EXPECTED", "1")
        run(source, "--afield-devices=emulated:1").assert_outcomes(passed=1)
    wrong = run(source, "--afield-devices=fast ones")
    wrong.assert_outcomes(errors=1)
    wrong.stdout.fnmatch_lines(["*InvalidOptionError*fast ones*emulated:2*"])


# ---- a runtime for all tests ----------------------------------------------------------------------------------------


@pytest.mark.contract("pytest")
@pytest.mark.slow(6)
def test_a_shared_runtime_is_checked_after_each_test(run: Any) -> None:
    result = run(
        """
        SESSIONS = []

        @pytest.fixture(scope="module")
        def model(afield_session):
            return afield.put(np.zeros(200_000))

        @pytest.fixture
        def batch(afield_session):
            return afield.put(np.ones(200_000))

        def test_clean(afield_session, model, batch):
            SESSIONS.append(afield.get_runtime_context().get_job_id())
            assert afield.get(model).sum() + afield.get(batch).sum() == 200_000

        def test_keeps_a_ref(afield_session):
            SESSIONS.append(afield.get_runtime_context().get_job_id())
            KEPT.append(afield.put(2))

        def test_is_not_blamed_for_it(afield_session, model):
            assert afield.get(KEPT) == [2]

        @pytest.mark.afield_leaks_ok
        def test_may_keep(afield_session):
            KEPT.append(afield.put(3))

        def test_uses_both(afield_session, afield_runtime):
            pass

        def test_of_its_own(afield_runtime):
            SESSIONS.append(afield.get_runtime_context().get_job_id())

        def test_shares_a_new_one(afield_session):
            SESSIONS.append(afield.get_runtime_context().get_job_id())
            assert afield.get(afield.put(1)) == 1

        def test_sessions():
            assert SESSIONS[0] == SESSIONS[1] and len(set(SESSIONS)) == 3
        """
    )
    result.assert_outcomes(passed=7, errors=2)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_keeps_a_ref*",
            "afield: this test left 1 object behind*",
            "*in test_keeps_a_ref()",
            "*ERROR at setup of test_uses_both*",
            "afield_runtime and afield_session cannot both be used by one test*",
        ]
    )


# ---- handles, on a machine of the test's own ------------------------------------------------------------------------


@pytest.fixture
def machine() -> Iterator[EmulatedBackend]:
    backend = EmulatedBackend.create(emulated_devices(2, 8 * MIB), host_link=LinkSpeed(1e9))
    yield backend
    backend.close()


def handle_of(machine: EmulatedBackend, figures: Any = None, asked: list[Any] | None = None) -> DeviceHandle:
    asked = [] if asked is None else asked
    info = machine.inventory()[0]

    def query(what: str, argument: Any = None) -> Any:
        if what == "slab":
            asked.append(argument)
            return None
        if what == "store":
            return {"tiers": {} if figures is None else {info.uuid: figures}}
        if what == "devices":
            return {"devices": machine.inventory()}
        return {"GPU": float(sum(not machine.board.lost(index) for index in range(2)))}

    return DeviceHandle(info.uuid, 0, info.memory_bytes, 1, machine, query)


def is_lost(handle: DeviceHandle) -> bool:
    return handle.is_lost


def test_a_lost_device_is_lost_until_it_is_reset(machine: EmulatedBackend) -> None:
    handle = handle_of(machine)
    device = machine.open(handle.uuid)
    slab = device.allocate_slab(2 * MIB)
    handle.lose()
    assert is_lost(handle)
    with pytest.raises(DeviceLostError):
        device.export_slab(slab)
    handle.reset()
    assert not is_lost(handle)
    machine.open(handle.uuid).allocate_slab(8 * MIB)
    handle.xid(13)
    assert not is_lost(handle), "the application's fault"
    handle.xid(79)
    assert is_lost(handle)
    handle.mend(2)
    assert not is_lost(handle)
    assert [(event.kind, event.code) for event in machine.poll_health()][-2:] == [("xid", 79), ("reset", 0)]


def test_calls_that_fail(machine: EmulatedBackend) -> None:
    asked: list[Any] = []
    handle = handle_of(machine, asked=asked)
    device = machine.open(handle.uuid)
    handle.fail_next_allocation(2)
    assert asked == [1], "first the store takes its slab, which is not meant"
    for _ in range(2):
        with pytest.raises(OutOfDeviceMemoryError):
            device.allocate_slab(2 * MIB)
    export = device.export_slab(device.allocate_slab(2 * MIB))
    handle.fail_next_import()
    with pytest.raises(SlabImportError, match="refused"):
        device.import_slab(export)
    handle.fail_next_allocation()
    handle.mend(2)
    device.allocate_slab(2 * MIB)
    handle.poison()
    with pytest.raises(PoisonedContextError, match="700"):
        device.memory_info()


def test_slow_links_and_their_end(machine: EmulatedBackend) -> None:
    handle = handle_of(machine)
    handle.slow_link(8.0)
    assert machine.board.slowness(0) == 8.0
    handle.mend(2)
    assert machine.board.slowness(0) == 1.0
    unlimited = EmulatedBackend.create(emulated_devices(2, 8 * MIB))
    with pytest.raises(DeviceUsageError, match="unlimited"):
        handle_of(unlimited).slow_link(8.0)
    unlimited.close()


def test_memory_of_a_handle(machine: EmulatedBackend) -> None:
    assert handle_of(machine).memory == DeviceMemory(8 * MIB, 0, 0)
    assert handle_of(machine, {"sealed": 5, "leased": 7}).memory == DeviceMemory(8 * MIB, 5, 7)


def test_faults_need_an_emulated_device() -> None:
    handle = DeviceHandle("GPU-1", 0, 80 << 30, 1, None, lambda what, argument=None: {"GPU": 1.0})
    for fault in (handle.lose, handle.reset, handle.fail_next_allocation, handle.poison):
        with pytest.raises(NoDeviceError, match="--afield-devices=emulated:2"):
            fault()
    handle.mend(1)


def test_a_report_is_bounded() -> None:
    from afield.runtime.tools.memory import MemoryEntry

    entries = [MemoryEntry(f"{number:032x}", 1 << 20, "host", "driver", (), None) for number in range(50)]
    text = report(entries, 2, 4096)
    assert "50 objects behind (50 MiB)" in text
    assert "and 30 more" in text
    assert "2 actors running" in text
    assert "4 KiB in the store" in text


# ---- handles, in a session ------------------------------------------------------------------------------------------

needs_device_memory = pytest.mark.skipif(
    not hasattr(daemon, "Tiers"), reason="the node daemon of this version has no device memory yet"
)

DEVICE_TASKS = """
    @afield.remote(num_gpus=1, max_retries=5)
    def ones(n):
        import cupy as cp
        return cp.ones(n, "f4")

    @afield.remote(num_gpus=1, max_retries=0)
    def once(n):
        import cupy as cp
        return cp.ones(n, "f4")
    """


@needs_device_memory
@pytest.mark.slow
def test_faults_in_a_session(run: Any) -> None:
    result = run(
        textwrap.dedent(DEVICE_TASKS)
        + textwrap.dedent(
            """
            def test_memory(afield_devices):
                first = afield_devices[0]
                ref = ones.remote(1 << 20)
                afield.wait([ref])
                assert sum(device.memory.sealed for device in afield_devices) >= 4 << 20
                assert first.memory.total == 4 << 30

            def test_a_lost_object_is_made_again(afield_devices):
                ref = ones.remote(1 << 20)
                afield.wait([ref])
                home = max(afield_devices, key=lambda device: device.memory.sealed)
                home.lose()
                assert afield.cluster_resources()["GPU"] == 1
                assert afield.get(ref, device="host").sum() == 1 << 20
                home.reset()

            def test_what_cannot_be_made_again(afield_devices):
                ref = once.remote(1 << 20)
                afield.wait([ref])
                max(afield_devices, key=lambda device: device.memory.sealed).xid(79)
                with pytest.raises((afield.ObjectLostError, afield.DeviceLostError)):
                    afield.get(ref, timeout=30)

            def test_no_room(afield_devices):
                for device in afield_devices:
                    device.fail_next_allocation()
                with pytest.raises(afield.OutOfDeviceMemoryError):
                    afield.get(once.remote(1 << 20), timeout=30)
            """
        )
    )
    result.assert_outcomes(passed=4)


@needs_device_memory
@pytest.mark.slow
def test_devices_of_a_shared_runtime_are_mended(run: Any) -> None:
    result = run(
        textwrap.dedent(DEVICE_TASKS)
        + textwrap.dedent(
            """
            def test_loses_all(afield_session, afield_devices):
                afield.get(ones.remote(16), device="host")
                for device in afield_devices:
                    device.lose()

            def test_has_them_again(afield_session, afield_devices):
                assert not any(device.is_lost for device in afield_devices)
                assert afield.get(ones.remote(16), device="host").sum() == 16

            def test_leaves_an_array(afield_session):
                KEPT.append(ones.remote(1 << 20))
                afield.wait(KEPT)
            """
        )
    )
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(["afield: this test left 1 object behind (4* MiB*"])


@needs_device_memory
@pytest.mark.slow
def test_the_guide_is_a_test_file_that_passes(run: Any) -> None:
    program = program_of((ROOT / "docs" / "testing.md").read_text(encoding="utf-8"))
    run(program).assert_outcomes(passed=4)


@pytest.mark.slow
def test_devices_as_a_parameter(run: Any) -> None:
    result = run(
        """
        @pytest.mark.parametrize("afield_runtime", ["emulated:3", "none"], indirect=True)
        def test_devices(afield_runtime):
            assert len(afield_runtime.devices) in (0, 3)
            assert afield.cluster_resources().get("GPU", 0) == len(afield_runtime.devices)

        @pytest.mark.parametrize("afield_runtime", [3], indirect=True)
        def test_no_text(afield_runtime):
            pass
        """
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*the parameter 3 of afield_runtime is not valid*"])


@pytest.mark.slow
def test_nothing_is_looked_for_after_ctrl_c(run: Any) -> None:
    result = run(
        """
        KEPT = []

        def test_is_interrupted(afield_runtime):
            KEPT.append(afield.put(1))
            raise KeyboardInterrupt
        """
    )
    output = result.stdout.str() + result.stderr.str()
    assert "KeyboardInterrupt" in output and "left 1 object behind" not in output
    assert "INTERNALERROR" not in output
