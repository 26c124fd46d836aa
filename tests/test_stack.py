"""`afield stack`: what processes say of themselves, how it is shown, and what is said of those that do not answer."""

from __future__ import annotations

import asyncio
import fcntl
import json
import linecache
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import afield
from afield.machines import FlightRecorder
from afield.runtime.calls import participation
from afield.runtime.process import stacks
from afield.runtime.process.stacks import Activity, CoreState, Frame, RunningCall, Stack, describe_activity, state_of
from afield.runtime.tools import cli
from afield.runtime.tools.stack import Display, ProcessStack, as_json, processes_of, rendered
from tests.helpers import poll

# -- what a process says ---------------------------------------------------------------------------------------------


def frames_of(stack: Stack) -> list[str]:
    return [frame.function.rpartition(".")[2] for frame in [*stack.outer, *stack.inner]]


@pytest.fixture
def parked() -> Iterator[Callable[[Callable[[threading.Event], None], str], None]]:
    """Run functions on threads of a name; each is given the event that it is to wait for."""
    go, threads = threading.Event(), []

    def park(function: Callable[[threading.Event], None], name: str) -> None:
        threads.append(threading.Thread(target=function, args=(go,), name=name))
        threads[-1].start()

    yield park
    go.set()
    for thread in threads:
        thread.join()


def named(activity: Activity, name: str) -> Stack:
    (stack,) = [stack for stack in activity.stacks if stack.name == name]
    return stack


def wait_in_a_named_function(go: threading.Event) -> None:
    go.wait()


def test_threads_are_shown_with_their_names_the_main_thread_first(parked: Any) -> None:
    parked(wait_in_a_named_function, "a-bench")
    poll(lambda: "wait_in_a_named_function" in frames_of(named(describe_activity(), "a-bench")))
    activity = describe_activity()
    assert activity.stacks[0].name == "MainThread" and activity.all_stacks == len(activity.stacks)
    frame = next(x for x in named(activity, "a-bench").outer if x.function == "wait_in_a_named_function")
    assert frame.file == __file__ and frame.text == "", "files are read by whoever shows it"
    assert linecache.getline(frame.file, frame.line).strip() == "go.wait()"
    ours = frames_of(activity.stacks[0])
    assert ours[-1] == "test_threads_are_shown_with_their_names_the_main_thread_first", "not the question's own frames"


def descend(depth: int, go: threading.Event) -> None:
    if depth:
        descend(depth - 1, go)
    else:
        go.wait()


def test_a_deep_stack_keeps_its_ends(parked: Any) -> None:
    parked(lambda go: descend(500, go), "deep")
    poll(lambda: frames_of(named(describe_activity(), "deep"))[-1] == "wait")
    stack = named(describe_activity(), "deep")
    assert (len(stack.outer), len(stack.inner)) == (stacks.MAX_OUTER, stacks.MAX_INNER)
    assert stack.left_out > 400 and frames_of(stack)[-3:] == ["descend", "wait", "wait"]
    text = "\n".join(
        line.text for line in rendered([ProcessStack(1, "driver", "driver", "", describe_activity())], Display())
    )
    assert f"... {stack.left_out} frames left out" in text


def test_names_that_are_no_text_can_be_sent(parked: Any) -> None:
    space: dict[str, Any] = {}
    exec(compile("def stay(go): go.wait()", "/tmp/caf\udce9.py", "exec"), space)
    parked(space["stay"], "thread \udcff")
    poll(lambda: "stay" in frames_of(named(describe_activity(), "thread \\udcff")))
    activity = msgspec.msgpack.decode(msgspec.msgpack.encode(describe_activity()), type=Activity)
    assert "/tmp/caf\\udce9.py" in [frame.file for frame in named(activity, "thread \\udcff").outer]


def test_the_source_of_a_notebooks_cell_goes_along(parked: Any) -> None:
    source = "def stay(go):\n    go.wait()\n"
    linecache.cache["<cell 7>"] = len(source), None, source.splitlines(keepends=True), "<cell 7>"
    space: dict[str, Any] = {}
    exec(compile(source, "<cell 7>", "exec"), space)
    try:
        parked(space["stay"], "cell")
        poll(lambda: "stay" in frames_of(named(describe_activity(), "cell")))
        (frame,) = [frame for frame in named(describe_activity(), "cell").outer if frame.file == "<cell 7>"]
        assert (frame.line, frame.text) == (2, "go.wait()")
    finally:
        del linecache.cache["<cell 7>"]


def test_a_coroutine_is_shown_with_what_it_awaits() -> None:
    async def innermost() -> None:
        await asyncio.sleep(60)

    async def outermost() -> None:
        await innermost()

    async def look() -> Activity:
        task = asyncio.create_task(outermost(), name="theirs")
        await asyncio.sleep(0)
        activity = describe_activity(coroutines=[(task.get_name(), task.get_coro())])
        task.cancel()
        return activity

    stack = named(asyncio.run(look()), "theirs")
    assert frames_of(stack) == ["outermost", "innermost", "sleep"]


class BrokenCore:
    """A core that something is wrong with."""

    def __init__(self) -> None:
        self.recorder = FlightRecorder()
        self.recorder.note((b"\x0a\xff", "left", "the table"))

    def validate(self) -> list[str]:
        return ["a plate is missing", *(f"fork {number}" for number in range(1000))]


class UnreadableCore(BrokenCore):
    """One whose state cannot even be looked at."""

    def validate(self) -> list[str]:
        raise KeyError("where")


def test_cores_are_bounded_and_faults_of_theirs_stay_inside() -> None:
    broken, unreadable = describe_activity({"table": BrokenCore(), "shelf": UnreadableCore()}).cores
    assert broken.story == unreadable.story == ["0aff left the table"]
    assert broken.complaints[0] == "a plate is missing" and len(broken.complaints) == stacks.MAX_COMPLAINTS + 1
    assert broken.complaints[-1] == "901 more complaints"
    assert unreadable.complaints == ["its state cannot be looked through: KeyError('where')"]


def test_a_question_that_fails_is_answered() -> None:
    def calls() -> Any:
        raise RuntimeError("set changed size")

    activity = stacks.answer_activity({}, calls)(False)
    assert "could not describe itself: RuntimeError('set changed size')" in activity.stacks[0].name


def test_states_of_processes() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert poll(lambda: state_of(child.pid) == "it is sleeping")
        child.send_signal(signal.SIGSTOP)
        assert poll(lambda: state_of(child.pid) == f"it is stopped (kill -CONT {child.pid} lets it go on)")
        child.kill()
        assert poll(lambda: state_of(child.pid) == "it has ended")
    finally:
        child.kill()
        child.communicate()
    assert state_of(child.pid) == "it is gone"
    assert state_of(os.getpid()) == "it is running"


# -- how it is shown -------------------------------------------------------------------------------------------------

HOME = "/usr/lib/python3/site-packages/afield/"
WAITING = Stack(
    "MainThread",
    [
        Frame("<string>", 6, "<module>"),
        Frame(HOME + "runtime/main.py", 20, "main"),
        Frame(HOME + "runtime/worker/executor.py", 40, "Executor.run"),
        Frame("/home/me/afield/program.py", 3, "nap", "time.sleep(100)"),
        Frame(HOME + "runtime/face/api.py", 7, "get"),
    ],
)


def shown(*processes: ProcessStack, display: Display | None = None) -> list[str]:
    return [line.text for line in rendered(processes, display or Display())]


def worker(pid: int, *calls: RunningCall, stack: Stack = WAITING) -> ProcessStack:
    return ProcessStack(pid, "worker", "worker", "", Activity([stack], 1, list(calls), len(calls)))


def test_frames_of_ours_are_drawn_together() -> None:
    text = [
        "worker, pid 7: idle",
        "  MainThread",
        f"    2 frames of afield, the last: Executor.run ({HOME}runtime/worker/executor.py:40)",
        "    nap (/home/me/afield/program.py:3)",
        "      time.sleep(100)",
        f"    get ({HOME}runtime/face/api.py:7)",
    ]
    assert shown(worker(7)) == text
    full = shown(worker(7), display=Display(full=True))
    assert [line for line in full if line.startswith("    ") and "(" in line and "sleep" not in line] == [
        f"    {frame.function} ({frame.file}:{frame.line})" for frame in WAITING.outer
    ]


def test_processes_that_do_the_same_are_shown_once() -> None:
    first, second = RunningCall("nap", b"\x01\x02"), RunningCall("nap", b"\x03\x04")
    lines = shown(worker(7, first), worker(8), worker(9, second), *(worker(pid) for pid in range(100, 130)))
    heads = [line for line in lines if line and not line.startswith(" ")]
    first_pids = ", ".join(map(str, [8, *range(100, 111)]))
    assert heads == ["worker, pids 7, 9", f"worker, pids {first_pids} and 19 more: idle"]
    assert "  runs nap()" in lines
    assert "  runs nap(), task 0102" in shown(worker(7, first))


def test_what_was_cut_is_said() -> None:
    activity = Activity([WAITING], 4, [RunningCall("nap", b"")], 12, 1)
    lines = shown(ProcessStack(5, "worker", "Counter", "", activity))
    assert lines[:4] == ["worker Counter, pid 5", "  runs nap()", "  and 11 more", "  1 more waits behind"]
    assert lines[-1] == "  and 3 more threads or coroutines"


def test_a_process_that_says_nothing_is_named() -> None:
    silent = [ProcessStack(pid, "worker", "worker", "does not answer; it is running") for pid in (3, 4)]
    assert shown(*silent) == [
        "worker, pid 3: does not answer; it is running",
        "",
        "worker, pid 4: does not answer; it is running",
    ]


def test_cores_say_what_is_wrong_and_what_they_did() -> None:
    cores = [CoreState("ownership", [], ["0aff left"]), CoreState("dispatch", ["a lease is lost"], [])]
    lines = list(rendered([ProcessStack(5, "daemon", "", "", Activity([], 0, [], 0, 0, cores))], Display()))
    assert [line.text for line in lines] == [
        "daemon, pid 5",
        "  core ownership: all is well",
        "    0aff left",
        "  core dispatch: something is wrong",
        "    wrong: a lease is lost",
    ]
    assert lines[-1].role == "wrong"


@pytest.mark.parametrize("width", [30, 50, 80])
def test_lines_fit_and_paths_keep_their_ends(width: int) -> None:
    lines = shown(worker(7), display=Display(width))
    assert all(len(line) <= width for line in lines)
    if width >= 50:
        (place,) = [line for line in lines if line.startswith("    get")]
        assert place.endswith("api.py:7)") and (width < 80) == ("…" in place)


def test_nothing_is_done_to_the_terminal() -> None:
    stack = Stack("evil\x1b[2J", [Frame("/x/\x07.py", 1, "f\x1b]0;x", "print('\x1b[31m')")])
    text = "".join(shown(worker(7, RunningCall("nap\r", b""), stack=stack)))
    assert text.isprintable() and "evil?[2J" in text


def test_programs_get_all_of_it() -> None:
    said = [ProcessStack(1, "daemon", ""), worker(7, RunningCall("nap", b"\x01"))]
    answer = msgspec.msgpack.decode(msgspec.msgpack.encode(said))
    first, second = as_json(processes_of(answer))
    assert (first["pid"], first["kind"], second["pid"]) == (7, "worker", 1)
    assert first["calls"] == [{"name": "nap", "task_id": "01", "state": ""}]
    assert [frame["function"] for frame in first["stacks"][0]["frames"]][-2:] == ["nap", "get"]


# -- a session -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A session with one worker that sleeps, one that computes, an async actor that waits, and one that is idle."""
    afield.shutdown()
    folder = tmp_path_factory.mktemp("sessions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        patch.setenv("TMPDIR", str(folder))
        afield.init(num_cpus=3, devices="emulated:1:64MiB", host_memory="64MiB")
        yield folder
        afield.shutdown()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["stack", *arguments])
    out, error = capsys.readouterr()
    return status, out, error


def sleep_in_a_named_function() -> None:
    time.sleep(600)


def compute_in_a_named_function(blocker: str) -> str:
    while os.path.exists(blocker):
        for number in range(10_000):
            number * number
    return "computed"


def block_of(out: str, word: str) -> str:
    """Return the part of the output that is about the process of which `word` is said."""
    return next((part for part in out.split("\n\n") if word in part), "")


class Waiter:
    """An actor whose call waits."""

    async def wait_for_it(self) -> None:
        await asyncio.sleep(600)


@pytest.fixture
def busy(place: Path, tmp_path: Path) -> Iterator[None]:
    """A worker that sleeps, one that computes, an async actor whose call waits, and a device in use."""
    blocker = tmp_path / "blocker"
    blocker.touch()
    sleeping = afield.remote(sleep_in_a_named_function).remote()
    computing = afield.remote(compute_in_a_named_function).remote(str(blocker))
    actor = afield.remote(num_cpus=0)(Waiter).remote()
    call = actor.wait_for_it.remote()
    on_device = afield.remote(num_gpus=1)(lambda: float(afield.array_module().ones(3).sum())).remote()
    assert afield.get(on_device, timeout=30) == 3.0
    yield
    blocker.unlink()
    afield.cancel(sleeping)
    afield.kill(actor)
    assert afield.get(computing, timeout=30) == "computed"
    for ref, kind in ((sleeping, afield.TaskCancelledError), (call, afield.ActorDiedError)):
        with pytest.raises(kind):
            afield.get(ref, timeout=30)


def in_their_functions(capsys: Any) -> str:
    """Return the command's output once everybody is where the tests want them."""
    places = ("sleep_in_a_named_function", "compute_in_a_named_function", "Waiter.wait_for_it")

    def look() -> str:
        status, out, error = run(capsys)
        assert status == 0, error
        return out if all(f"\n    {place} (" in out for place in places) and "\nstore EMU-" in out else ""

    out: str = poll(look)
    assert out
    return out


def test_what_everybody_does(busy: None, capsys: Any) -> None:
    out = in_their_functions(capsys)
    assert "\x1b" not in out
    part = block_of(out, "runs sleep_in_a_named_function()")
    assert re.search(r"^    sleep_in_a_named_function \(.*test_stack.py:\d+\)\n      time.sleep\(600\)$", part, re.M)
    assert "frames of afield, the last: " in part
    assert re.search(r"^    compute_in_a_named_function \(", block_of(out, "runs compute_in_a"), re.M)
    assert "\n      await asyncio.sleep(600)\n" in block_of(out, "Waiter, pid")
    assert "in_their_functions" in block_of(out, f"driver, pid {os.getpid()}\n")
    assert re.search(r"^daemon, pid \d+$", out, re.M)


def test_of_one_process_and_for_programs(busy: None, capsys: Any) -> None:
    in_their_functions(capsys)
    status, one, error = run(capsys, "--pid", str(os.getpid()), "--pid", "1", "--full")
    assert status == 0 and one.startswith("driver, pid") and "\n\n" not in one
    assert "1: no such process in session" in error and "Pump." in one
    assert run(capsys, "--pid", "1")[:2] == (1, "")

    status, text, error = run(capsys, "--json")
    described = {process["pid"]: process for process in json.loads(text)}
    assert described[os.getpid()]["kind"] == "driver" and len(described) >= 6
    calls = [call["name"] for process in described.values() for call in process["calls"]]
    assert {"sleep_in_a_named_function", "compute_in_a_named_function"} <= set(calls)


def test_a_worker_that_is_stopped_is_named(place: Path, capsys: Any) -> None:
    pid = afield.get(afield.remote(os.getpid).remote(), timeout=30)
    os.kill(pid, signal.SIGSTOP)
    try:
        status, out, error = run(capsys)
        assert status == 0, error
        assert f"worker, pid {pid}: does not answer; it is stopped (kill -CONT {pid} lets it go on)\n" in out
        assert f"driver, pid {os.getpid()}\n" in out, "the others answered"
    finally:
        os.kill(pid, signal.SIGCONT)
    assert poll(lambda: f"pid {pid}: does not" not in run(capsys)[1]), "it answers again"


def test_cores_are_shown_when_asked_for(place: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert participation.participant is not None
    monkeypatch.setitem(participation.participant.process.cores, "table", BrokenCore())
    assert "\n  core table" not in run(capsys)[1]
    for option in ("--cores", "--debug"):
        status, out, error = run(capsys, option)
        part = block_of(out, "driver, pid")
        assert "  core table: something is wrong\n    wrong: a plate is missing\n" in part and status == 0, error
        assert "\n    0aff left the table" in part


def on_a_terminal(columns: int, *arguments: str, **environment: str) -> str:
    """Return what the command writes to a terminal of so many columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    hidden = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
    variables = (
        {name: value for name, value in os.environ.items() if name not in hidden} | {"TERM": "xterm"} | environment
    )
    command = [sys.executable, "-m", "afield.runtime.tools.cli", "stack", *arguments]
    shown = bytearray()
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=variables) as process:
        os.close(slave)
        try:
            while chunk := os.read(master, 4096):
                shown += chunk
        except OSError:  # how a terminal ends
            pass
        os.close(master)
    assert process.returncode == 0, shown.decode()
    return shown.decode()


@pytest.mark.parametrize("columns", [60, 140])
def test_on_a_terminal(place: Path, columns: int) -> None:
    coloured = on_a_terminal(columns)
    assert f"\x1b[1mdriver, pid {os.getpid()}\x1b[0m" in coloured
    plain = on_a_terminal(columns, NO_COLOR="1", TERM="dumb")
    assert "\x1b" not in plain
    lines = plain.replace("\r", "").split("\n")
    assert max(map(len, lines)) <= columns
    if columns == 60:
        assert any("…" in line for line in lines)
