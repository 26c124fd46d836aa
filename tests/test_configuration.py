"""What processes are told at their start: round trips, strictness, and two versions of afield that meet."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from afield.errors import RuntimeDiedError, VersionMismatchError
from afield.runtime.process.configuration import (
    CUDA_VISIBLE_DEVICES,
    FORM,
    STAMP,
    VISIBLE_DEVICES,
    ForkServerConfig,
    ProcessConfig,
    SessionConfig,
    StoreConfig,
)
from afield.scheduler.devices import Device, emulated_device
from afield.version import PACKAGE
from tests.helpers import ROOT

#: Of each form so far. Whoever changes the fields raises `FORM` and adds a line; what a form was stays as it is.
FORMS = {1: "31ad43585f68", 2: "39112ad14302"}


def config(**changed: Any) -> ForkServerConfig:
    facts: dict[str, Any] = {
        "session": SessionConfig("5e55", b"\x00\xff" * 16, 3, 1 << 20, 4),
        "directory": b"/tmp/caf\xe9",
        "lifeline_fd": 5,
        "lock_fd": 6,
        "working_directory": b"/home/\xff",
        "arguments": [b"program.py", b"\xfe"],
        "node_id": b"12345678",
        "num_cpus": 2.0,
        "memory": 1 << 34,
        "resources": {"left_hand": 0.5},
        "devices": [emulated_device(0), emulated_device(1, 2 << 20)],
        "emulated_link": "5GB/s",
        "driver": b"87654321",
        "namespace": "räume",
        "environment": b"\x80",
    }
    return ForkServerConfig(**(facts | changed))


# -- the fork server's -----------------------------------------------------------------------------------------------


def test_the_fork_server_reads_what_the_driver_writes() -> None:
    written = config()
    read = ForkServerConfig.decode(written.encode())
    assert read == written and read.version == STAMP and read.package == PACKAGE
    assert type(read.devices[1]) is Device and type(read.session) is SessionConfig
    assert PACKAGE == str(ROOT / "afield")


def change(raw: bytes, path: tuple[str, ...], value: Any) -> bytes:
    """Set one field of an encoded message, as a program with another idea of it would."""
    message = inner = msgspec.msgpack.decode(raw)
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return msgspec.msgpack.encode(message)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("num_cpus",), "2"),
        (("devices",), [{"uuid": "U"}]),
        (("devices",), ["EMU-0000"]),
        (("session", "token"), "00ff"),
        (("session", "capacity"), 1.5),
        (("session", "colour"), "red"),
        (("colour",), "red"),
        (("directory",), "/tmp"),
    ],
)
def test_the_fork_server_takes_nothing_else(path: tuple[str, ...], value: Any) -> None:
    with pytest.raises(msgspec.ValidationError):
        ForkServerConfig.decode(change(config().encode(), path, value))


def test_a_field_that_is_missing_is_an_error() -> None:
    message = msgspec.msgpack.decode(config().encode())
    del message["driver"]
    with pytest.raises(msgspec.ValidationError, match="driver"):
        ForkServerConfig.decode(msgspec.msgpack.encode(message))


def fields(kind: Any, known: dict[str, Any]) -> None:
    """Note the fields of a type that crosses, and of those that it is made of."""
    if typing.get_origin(kind) is not None:
        for part in typing.get_args(kind):
            fields(part, known)
    elif isinstance(kind, type) and getattr(kind, "__annotations__", None) and kind.__name__ not in known:
        hints = typing.get_type_hints(kind)
        known[kind.__name__] = {name: str(hint) for name, hint in hints.items() if not name.startswith("__")}
        for hint in hints.values():
            fields(hint, known)


def test_other_fields_are_another_form() -> None:
    known: dict[str, Any] = {}
    fields(ForkServerConfig, known)
    assert {"ForkServerConfig", "SessionConfig", "Device"} <= set(known)
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]
    assert max(FORMS) == FORM and FORMS[FORM] == digest, "raise FORM, and add its line to FORMS"


# -- two versions ----------------------------------------------------------------------------------------------------


def test_another_version_is_told_before_anything_else_is_read() -> None:
    raw = change(config(version="9.9/7", package="/opt/new/afield").encode(), ("devices",), "what is to come")
    with pytest.raises(VersionMismatchError) as caught:
        ForkServerConfig.decode(raw)
    text = str(caught.value)
    assert f"9.9/7 from /opt/new/afield, and its session's processes found {STAMP} in {PACKAGE}" in text
    assert "start the program again" in text and "sys.path" in text
    assert isinstance(caught.value, RuntimeDiedError)


@pytest.mark.parametrize("raw", [b'{"session": "5e55", "token": "00"}', b"", b"\x80", b"\x93\x01\x02\x03"])
def test_what_has_no_header_is_another_version(raw: bytes) -> None:
    with pytest.raises(VersionMismatchError, match="two versions of afield are mixed"):
        ForkServerConfig.decode(raw)


UPGRADED = """
import os, sys
import afield
from afield import errors
place = os.path.dirname(afield.__file__)
assert place == os.path.dirname(os.getcwd()) + "/afield"
with open(place + "/version.py", "a") as file:
    file.write('VERSION = "99.0.0"\\n')
for _ in range(2):  # what was begun is gone, so that it can be tried again
    try:
        afield.init(num_cpus=1)
    except errors.VersionMismatchError as error:
        print(error)
os.execv(sys.executable, [sys.executable, "-c", "import afield; afield.init(num_cpus=1); print('started')"])
"""


def test_an_upgrade_under_a_running_program(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "afield", tmp_path / "afield", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "files").mkdir()
    places = {"PYTHONPATH": str(tmp_path), "TMPDIR": str(tmp_path / "files")}
    command = [sys.executable, "-c", UPGRADED]
    done = subprocess.run(
        command, env=os.environ | places, cwd=tmp_path / "files", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first == second and third == "started"
    assert first.startswith(f"two versions of afield are mixed: the program runs {STAMP} from {tmp_path}/afield")
    assert f"found 99.0.0/{FORM} in {tmp_path}/afield" in first
    assert not list((tmp_path / "files").iterdir())


# -- names that are no text ------------------------------------------------------------------------------------------

ELSEWHERE = """
import os, sys
import afield
import beside
where = afield.remote(lambda: (os.getcwdb(), os.fsencode(sys.argv[1]), beside.NAME))
afield.init(num_cpus=1)
print(afield.get(where.remote(), timeout=30))
"""


def test_a_program_in_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    for name, text in ((b"/program.py", ELSEWHERE), (b"/beside.py", "NAME = 'beside'")):
        with open(folder + name, "w") as file:
            file.write(text)
    command: list[str | bytes] = [sys.executable, folder + b"/program.py", b"\xfe"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == str((folder, b"\xfe", "beside")), done.stderr


# -- one process's ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "own",
    [
        ProcessConfig("worker", 7),
        ProcessConfig("worker", 2, {1: "EMU-0000"}, "emulated:/x"),
        ProcessConfig("worker", 3, {5: "GPU-b", 2: "GPU-a"}, "cuda:"),
    ],
)
def test_a_workers_variables(own: ProcessConfig) -> None:
    variables = own.variables()
    read = ProcessConfig.of_worker(variables)
    assert read == own and list(read.bound) == list(own.bound), "the order of devices is the lease's"
    assert variables[VISIBLE_DEVICES] == variables[CUDA_VISIBLE_DEVICES] == ",".join(own.bound.values())


@pytest.mark.parametrize("own", [StoreConfig(-1, 1), StoreConfig(2, 3, "GPU-a", "cuda:", ("GPU-b", "GPU-a"))])
def test_a_stores_variables(own: StoreConfig) -> None:
    assert StoreConfig.of_store(own.variables()) == own
    assert own.variables()[CUDA_VISIBLE_DEVICES] == ",".join(own.visible)


def test_a_number_that_is_missing_is_not_overlooked() -> None:
    variables = ProcessConfig("worker", 3, {1: "GPU-a", 2: "GPU-b"}).variables()
    with pytest.raises(ValueError, match="zip"):
        ProcessConfig.of_worker(variables | {VISIBLE_DEVICES: "GPU-a"})


def test_what_all_know_does_not_change() -> None:
    with pytest.raises(AttributeError):
        config().session.capacity = 5  # type: ignore[misc]
    with pytest.raises(AttributeError):
        ProcessConfig().index = 5  # type: ignore[misc]
