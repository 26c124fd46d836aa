"""What we rely on others for: behaviour of third parties that no type and no version number promises.

Theory of operation. `make test-latest` runs the tests marked `contract` with the newest versions that pyproject.toml allows.
The mark names the packages that a test is about. Most of them stand beside what they test, and see the package through the
runtime. Here is the rest: what is looked at best without a runtime, and what would show elsewhere only as a slow program,
a leak, or an error without a cause. `tests/test_environment.py` sees to it that each package has some.
"""

from __future__ import annotations

import gc
import io
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import msgspec
import numpy as np
import numpy.typing as npt
import pandas as pd
import psutil
import pyarrow as pa
import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

import afield
from afield.gpu_store.client import View
from afield.runtime.process.environment import Environment
from afield.runtime.wire import messages
from tests.helpers import HANG_S

PATIENCE_S = 30.0


def packed(value: Any) -> tuple[bytes, list[bytes]]:
    """Return a pickle and its out-of-band buffers, copied as a store would have them."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(value, 5, buffer_callback=buffers.append)
    return pickled, [bytes(buffer.raw()) for buffer in buffers]


# -- cloudpickle: functions and classes by value -----------------------------------------------------------------------


def make_function() -> Callable[[int], int]:
    """Return a function that has a cell, a default, a global module and an attribute."""
    factor = 3

    def times(x: int, *, plus: int = 1) -> int:
        return factor * x + plus + len(os.sep)

    vars(times)["note"] = "kept"
    return times


@pytest.mark.contract("cloudpickle")
def test_functions_travel_by_value_to_where_their_module_is_not() -> None:
    """Plain pickle reads them in a process that has neither this file nor afield; cloudpickle alone has to be there."""
    pickled = cloudpickle.dumps(make_function(), 5)
    script = "import pickle, sys; f = pickle.load(sys.stdin.buffer); print(f(2), f.note, 'tests' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], input=pickled, cwd=os.sep, capture_output=True, timeout=HANG_S
    )
    assert done.stdout.decode().split() == ["8", "kept", "False"], done.stderr.decode()


@pytest.mark.contract("cloudpickle")
def test_what_can_be_imported_travels_by_name() -> None:
    assert pickle.loads(cloudpickle.dumps(make_function, 5)) is make_function
    assert len(cloudpickle.dumps(make_function, 5)) < 100
    assert cloudpickle.loads(cloudpickle.dumps(os.path.join)) is os.path.join


@pytest.mark.contract("cloudpickle")
def test_a_class_that_travels_by_value_comes_home_as_itself(shared_runtime: None) -> None:
    """Otherwise `except RefusedError` would not catch what a task raised."""

    class RefusedError(Exception):
        pass

    @afield.remote
    def refuse() -> None:
        raise RefusedError("no")

    @afield.remote
    def same(kind: Any, error: Any) -> bool:
        return type(error) is kind

    with pytest.raises(RefusedError):
        afield.get(refuse.remote(), timeout=PATIENCE_S)
    kind, error = pickle.loads(cloudpickle.dumps((RefusedError, RefusedError("no")), 5))
    assert kind is RefusedError and type(error) is RefusedError
    assert afield.get(same.remote(RefusedError, RefusedError("no")), timeout=PATIENCE_S)
    first, second = (afield.put(x) for x in (RefusedError, RefusedError("no")))
    assert afield.get(same.remote(first, second), timeout=PATIENCE_S), "also when they came in two pickles"


@pytest.mark.contract("cloudpickle")
def test_a_traceback_has_the_line_and_the_file(shared_runtime: None) -> None:
    """Whatever cloudpickle does to code objects: 3.1.3 takes the file's name out of them."""

    def fail() -> None:
        raise ValueError("a line of its own")

    with pytest.raises(ValueError) as caught:
        afield.get(afield.remote(fail).remote(), timeout=PATIENCE_S)
    error: Any = caught.value
    line = fail.__code__.co_firstlineno + 1
    assert f'File "{__file__}", line {line}, in fail' in error.remote_traceback
    assert 'raise ValueError("a line of its own")' in error.remote_traceback


@pytest.mark.contract("cloudpickle")
def test_a_pickler_can_be_derived_from() -> None:
    """`_Pickler` of `runtime/process/serialization.py`, and joblib's: an override comes first, and may pass on."""

    class Special:
        pass

    class Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
        def reducer_override(self, obj: Any) -> Any:
            if type(obj) is Special:
                return str, ("special",)
            return super().reducer_override(obj)

        def persistent_id(self, obj: Any) -> Any:
            return "large" if type(obj) is bytes and len(obj) > 100 else None

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            return pid

    out, buffers = io.BytesIO(), []
    Pickler(out, 5, buffers.append).dump((Special(), make_function(), np.arange(10), b"x" * 101))
    out.seek(0)
    special, times, array, large = Unpickler(out, buffers=buffers).load()
    assert (special, times(2), large) == ("special", 8, "large")
    assert len(buffers) == 1 and array.sum() == 45
    assert cloudpickle.Pickler is cloudpickle.CloudPickler


@pytest.mark.contract("cloudpickle")
def test_what_cannot_be_pickled_raises_at_once() -> None:
    lock = threading.Lock()
    for value in (lock, lambda: lock, {"a": [lock]}, (x for x in ())):
        with pytest.raises((TypeError, pickle.PicklingError)):
            cloudpickle.dumps(value, 5)


# -- msgspec: what processes say to one another ------------------------------------------------------------------------

encode = msgspec.msgpack.encode


@pytest.mark.contract("msgspec")
def test_messages_are_arrays_with_their_tag_first() -> None:
    sent = [messages.Took(7), messages.Define(0, "f", b"blob", 1, 0, "", False), messages.Trim(3)]
    tag, index, name, *_ = msgspec.msgpack.decode(encode(sent))[1]
    assert (tag, index, name) == (1, 0, "f")
    assert messages.decode(encode(sent)) == sent
    assert messages.decode(encode([[13, 7]])) == [messages.Took(7)]
    short = encode([[*msgspec.msgpack.decode(encode(messages.Result(0, b"x")))[:2]]])
    assert msgspec.msgpack.decode(short, type=list[messages.Result]) == [messages.Result(0, b"x")], (
        "defaults may be left out"
    )


@pytest.mark.contract("msgspec")
def test_what_was_decoded_does_not_change_with_the_buffer() -> None:
    """The loop reads the next frame into the same buffer."""
    buffer = bytearray(encode([messages.Define(0, "name", b"blob" * 100, 1, 0, "", False)]))
    (message,) = messages.decode(memoryview(buffer))
    buffer[:] = bytes(len(buffer))
    assert isinstance(message, messages.Define)
    assert type(message.blob) is bytes and message.blob == b"blob" * 100 and message.name == "name"


@pytest.mark.contract("msgspec")
@pytest.mark.parametrize(
    "frame",
    [
        b"",
        encode([messages.Took(7)])[:-1],
        encode([messages.Took(7)]) + b"\0",
        b"\xc1",
        encode(7),
        encode([[13, "seven"]]),
        encode([[13]]),
        encode([[9999, 7]]),
        encode([["13", 7]]),
        encode([{"type": 13, "sequence": 7}]),
        b"\x91\x92\x0d\xa1\xff",
    ],
    ids=["nothing", "cut", "longer", "opcode", "number", "type", "field", "tag", "text tag", "map", "text"],
)
def test_whatever_is_no_message_raises_one_kind_of_error(frame: bytes) -> None:
    """`transport/channel.py` ends the connection for it; anything else would end the process."""
    with pytest.raises(msgspec.MsgspecError):
        messages.decode(frame)


@pytest.mark.contract("msgspec")
def test_structs_cost_the_collector_nothing_and_behave_as_values() -> None:
    """The table of a million objects is not gone through; lanes and environments are keys."""
    assert not gc.is_tracked(messages.Took(7)) and not gc.is_tracked(messages.Result(0, b"x"))
    one, same, other = Environment((("A", "1"),)), Environment((("A", "1"),)), Environment((("A", "2"),))
    assert one == same and hash(one) == hash(same) and one != other
    assert one.encode() == same.encode() != other.encode() and Environment.decode(one.encode()) == one
    with pytest.raises(AttributeError):
        one.working_dir = "/"  # type: ignore[misc]
    took = messages.Took(7)
    assert msgspec.structs.replace(took, sequence=8) == messages.Took(8) and took == messages.Took(7)


@pytest.mark.contract("msgspec")
def test_nothing_is_converted_silently() -> None:
    """A field that another version sends with another type is an error, not a value."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(["1"], list[int])
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'["1"]', type=list[int])
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(encode([1, "x"]), type=tuple[bytes, str])
    assert msgspec.convert([[13, 7]], list[messages.Took]) == [messages.Took(7)]


# -- numpy: views of shared memory -------------------------------------------------------------------------------------


@pytest.mark.contract("numpy")
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_is_pickled_without_its_data(order: Any) -> None:
    array = np.asarray(np.arange(1 << 16, dtype=np.int16).reshape(256, 256), order=order)
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(array, 5, buffer_callback=buffers.append)
    (raw,) = (buffer.raw() for buffer in buffers)
    assert len(pickled) < 500 and raw.nbytes == array.nbytes
    assert np.frombuffer(raw, np.uint8).__array_interface__["data"][0] == array.__array_interface__["data"][0]
    again = pickle.loads(pickled, buffers=[bytes(raw)])
    assert (again == array).all() and again.strides == array.strides


@pytest.mark.contract("numpy")
def test_an_array_over_read_only_memory_stays_read_only() -> None:
    """A reader must not be able to change what others read."""
    pickled, buffers = packed(np.arange(1000))
    array = pickle.loads(pickled, buffers=[memoryview(buffers[0])])
    for one in (array, array[10:], array.view(np.uint8), np.asarray(array), array.reshape(10, 100).T):
        assert not one.flags.writeable
        with pytest.raises(ValueError):
            one[0] = 1
        with pytest.raises(ValueError):
            one.flags.writeable = True
    assert array.copy().flags.writeable


@pytest.mark.contract("numpy")
@pytest.mark.parametrize("derive", [lambda a: a, lambda a: a[5:], lambda a: a.reshape(2, -1).T, lambda a: a.view("u1")])
def test_a_view_keeps_the_owner_of_its_memory(derive: Callable[[Any], Any]) -> None:
    """Pins and leased memory live as long as the last array over them, and no longer: `gpu_store/client.py`."""
    gone: list[bool] = []
    memory = memoryview(bytearray(8000)).toreadonly()
    owner = np.frombuffer(memory, np.uint8).view(View)
    weakref.finalize(owner, gone.append, True)
    array: npt.NDArray[Any] = derive(np.frombuffer(owner.data, np.float64, 1000))
    del owner
    assert not gone
    last = array[:1]
    del array
    assert not gone
    del last
    assert gone == [True], "without the collector's help"


@pytest.mark.contract("numpy")
def test_a_subclass_is_told_of_every_view() -> None:
    """`__array_finalize__` and attributes of subclasses."""
    view = np.frombuffer(bytearray(64), np.uint8).view(View)
    view.view_pin = "held"
    assert view.view_pin == "held" and isinstance(view[3:], View) and type(np.asarray(view)) is np.ndarray
    assert view.data.obj is view, "a memoryview keeps the array that it came from"


# -- pandas and pyarrow: columns out of band ---------------------------------------------------------------------------


def frame(rows: int) -> pd.DataFrame:
    """Return a table with columns of numbers and of text."""
    return pd.DataFrame({"i": np.arange(rows), "f": np.linspace(0, 1, rows), "s": [f"row {i}" for i in range(rows)]})


@pytest.mark.contract("pandas")
def test_the_columns_of_a_frame_are_pickled_without_their_data() -> None:
    numbers = frame(50_000)[["i", "f"]]
    pickled, buffers = packed(numbers)
    assert len(pickled) < 2000 and sum(map(len, buffers)) >= 800_000
    again = pickle.loads(pickled, buffers=buffers)
    pd.testing.assert_frame_equal(again, numbers)
    mine = {np.frombuffer(buffer, np.uint8).__array_interface__["data"][0] for buffer in buffers}
    assert {again[name].to_numpy().__array_interface__["data"][0] for name in ("i", "f")} <= mine, "no copy"
    assert again["i"].sum() == numbers["i"].sum() and len(again[again["f"] > 0.5]) == 25_000
    with pytest.raises(ValueError, match="read-only"):
        again.loc[0, "i"] = 1
    changed = again.copy()
    changed.loc[0, "i"] = 7
    assert changed["i"].iloc[0] == 7


@pytest.mark.contract("pandas", "pyarrow")
def test_text_columns_are_pickled_without_their_data() -> None:
    table = frame(50_000).astype({"s": pd.ArrowDtype(pa.string())})
    pickled, buffers = packed(table)
    assert len(pickled) < 5000
    pd.testing.assert_frame_equal(pickle.loads(pickled, buffers=buffers), table)


@pytest.mark.contract("pyarrow")
def test_a_table_is_pickled_without_its_data() -> None:
    table = pa.table({"i": np.arange(50_000), "s": [str(i) for i in range(50_000)]})
    pickled, buffers = packed(table)
    assert len(pickled) < 2000 and sum(map(len, buffers)) >= 600_000
    again = pickle.loads(pickled, buffers=buffers)
    assert again.equals(table)
    mine = {np.frombuffer(buffer, np.uint8).__array_interface__["data"][0] for buffer in buffers}
    assert again.column("i").chunk(0).buffers()[1].address in mine, "no copy"


# -- psutil: how much memory the machine has ---------------------------------------------------------------------------


@pytest.mark.contract("psutil")
def test_the_memory_of_the_machine() -> None:
    """The store's default capacity and the resource `memory` come from it."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    memory = psutil.virtual_memory()
    assert memory.total == int(lines["MemTotal"].split()[0]) * 1024
    assert type(memory.total) is int and 0 < memory.available <= memory.total


@pytest.mark.contract("psutil")
def test_what_the_tests_and_benchmarks_ask_of_processes() -> None:
    me = psutil.Process()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert child.pid in {process.pid for process in me.children(recursive=True)}
        assert psutil.pid_exists(child.pid)
    finally:
        child.communicate(b"\n", timeout=HANG_S)
    before = me.num_fds()
    with open(os.devnull):
        assert me.num_fds() == before + 1
    assert me.memory_info().rss > 1 << 20
    assert sum(me.cpu_times()[:2]) == me.cpu_times().user + me.cpu_times().system


# -- rich: tables and bars ---------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.contract("rich")
def test_only_a_terminal_is_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """`progress` shows a bar on one and lines elsewhere."""
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for stderr, expected in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr(sys, "stderr", stderr)
        console = Console(stderr=True)
        assert (console.is_terminal, console.is_jupyter) == (expected, False)


@pytest.mark.contract("rich")
def test_cells_are_shown_as_they_are() -> None:
    """Names of tasks are the user's: [brackets] are no markup, and outside of a terminal there are no codes."""
    out = io.StringIO()
    table = Table(header_style="bold")
    table.add_column("name", justify="right", overflow="fold")
    table.add_row(Text("[red]list[int][/red]"))
    Console(file=out, width=60).print(table)
    assert "[red]list[int][/red]" in out.getvalue()
    assert "\x1b" not in out.getvalue()
