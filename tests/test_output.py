"""What workers print reaches the driver: whole lines, in full, with their names, within bounds, folded where it repeats."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import afield
from afield.runtime.face.printing import FOLD_WINDOW_S, MAX_REMEMBERED, Fold, Printer
from afield.runtime.wire.messages import Log
from afield.runtime.wire.records import MAX_LINE_BYTES, MAX_OPEN_LINES, LineParser
from afield.runtime.worker.output import WorkerStream
from tests.helpers import program, remote_with

PATIENCE_S = 30.0

# -- a worker's stream and the daemon's parser ---------------------------------------------------------------------


class Speaker:
    """Says which task prints."""

    name = "task"
    task_id = b"1"

    def __call__(self) -> tuple[str, bytes]:
        return self.name, self.task_id


@pytest.fixture
def pipe() -> Iterator[tuple[WorkerStream, Speaker, Callable[[], list[tuple[str, str]]]]]:
    """A stream, who speaks on it, and what a parser makes of what was written since the last call."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    speaker, parser = Speaker(), LineParser()
    stream = WorkerStream(write, speaker)

    def lines() -> list[tuple[str, str]]:
        try:
            return parser.feed(os.read(read, 1 << 20))
        except BlockingIOError:
            return []

    yield stream, speaker, lines
    os.close(read)
    os.close(write)


def test_lines_come_whole_and_at_once(pipe: Any) -> None:
    stream, _, lines = pipe
    print("one", 2, "three", file=stream)
    assert lines() == [("task", "one 2 three")]
    stream.write("begun")
    assert lines() == []
    stream.flush()
    assert lines() == []
    stream.write(" and ended\nnext\n\n")
    assert lines() == [("task", "begun and ended"), ("task", "next"), ("task", "")]


def test_what_a_task_left_open_ends_where_the_next_speaks(pipe: Any) -> None:
    stream, speaker, lines = pipe
    stream.write("no newline")
    speaker.name, speaker.task_id = "other", b"2"
    stream.write("begins\n")
    assert lines() == [("task", "no newline"), ("other", "begins")]


def test_threads_do_not_cut_each_other_s_lines(pipe: Any) -> None:
    stream, _, lines = pipe
    stream.write("main begins, ")
    stream.flush()
    thread = threading.Thread(target=lambda: print("a thread's line", file=stream))
    thread.start()
    thread.join()
    stream.write("main ends\n")
    assert lines() == [("task", "a thread's line"), ("task", "main begins, main ends")]


def test_raw_output_stands_between_records(pipe: Any) -> None:
    stream, _, lines = pipe
    print("by Python", file=stream)
    os.write(stream.fileno(), b"by C \xff\x1e\n")
    print("marks \x1d\x1e\x1f are taken out; \ud800 and é stay", file=stream)
    got = lines()
    assert got[0] == ("task", "by Python")
    assert got[1][0] == "" and got[1][1].startswith("by C \ufffd")
    assert got[-1] == ("task", "marks  are taken out; \\ud800 and é stay")


def test_carriage_returns_show_what_a_terminal_would(pipe: Any) -> None:
    stream, _, lines = pipe
    for percent in range(0, 101, 10):
        stream.write(f"\r{percent} %")
        stream.flush()
    stream.write("\ndos\r\n")
    assert lines() == [("task", "100 %"), ("task", "dos")]


@given(
    texts=st.lists(st.tuples(st.integers(1, 3), st.text(st.sampled_from("ab é\n"), max_size=20)), max_size=20),
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=30),
)
def test_however_reads_are_cut_the_lines_are_the_same(texts: list[tuple[int, str]], cuts: list[int]) -> None:
    data = b"".join(b"\x1ef%d\x1f%d\x1f\x1f%b\x1d" % (who, who, text.encode()) for who, text in texts)
    parser, position, got = LineParser(), 0, []
    for cut in cuts:
        got += parser.feed(data[position : position + cut])
        position += cut
    got += parser.feed(data[position:]) + parser.finish()
    for who in (1, 2, 3):
        said = "".join(text for speaker, text in texts if speaker == who).split("\n")
        assert [line for name, line in got if name == f"f{who}"] == said[:-1] + [text for text in said[-1:] if text]


def test_unfinished_lines_are_bounded() -> None:
    parser = LineParser()
    pieces = [line for _ in range(100) for _, line in parser.feed(b"x" * 4000)]
    assert len(pieces) >= 400_000 // (MAX_LINE_BYTES + 4000) and len(parser.finish()) <= 1
    threads = 2 * MAX_OPEN_LINES
    ended = parser.feed(b"".join(b"\x1ef\x1f%d\x1f\x1ftext\x1d" % i for i in range(1, threads + 1)))
    assert len(ended) == threads - MAX_OPEN_LINES
    assert len(parser.finish()) == MAX_OPEN_LINES


# -- folding ------------------------------------------------------------------------------------------------------


def said(fold: Fold, pid: int, now: float, *lines: str, name: str = "f", stream: str = "out") -> list[str]:
    return [line.text for line in fold.feed(Log(name, pid, stream, list(lines)), now)]


def test_the_first_is_shown_at_once_and_the_others_counted() -> None:
    fold = Fold()
    assert said(fold, 1, 0.0, "loading") == ["loading"]
    for pid in (2, 3, 4, 4):
        assert said(fold, pid, 0.1, "loading") == []
    assert fold.next_deadline() == FOLD_WINDOW_S
    assert fold.expire(FOLD_WINDOW_S - 0.01) == []
    (line,) = fold.expire(FOLD_WINDOW_S)
    assert line == ("out", "f", 4, "loading [repeated 4x across 4 workers]")
    assert said(fold, 2, FOLD_WINDOW_S, "loading") == ["loading"]


def test_what_is_not_the_same_is_not_folded() -> None:
    fold = Fold()
    assert said(fold, 1, 0.0, "tick", "tick") == ["tick", "tick"]  # one worker that repeats itself means it
    assert said(fold, 2, 0.0, "step 1") == said(fold, 3, 0.0, "step 1", name="g") == ["step 1"]
    assert said(fold, 3, 0.0, "step 2") == ["step 2"]
    assert said(fold, 3, 0.0, "step 1", stream="err") == ["step 1"]
    assert said(fold, 1, 0.0, "----", "") == said(fold, 2, 0.0, "----", "") == ["----", ""]
    assert fold.flush() == []


def test_what_is_remembered_is_bounded_and_nothing_is_lost() -> None:
    fold = Fold()
    said(fold, 1, 0.0, "first")
    said(fold, 2, 0.0, "first")
    shown = said(fold, 1, 0.0, *(f"line {i}" for i in range(MAX_REMEMBERED)))
    assert len(shown) == MAX_REMEMBERED + 1 and "first [repeated 1x across 2 workers]" in shown


class Terminal:
    """A stream that says it is a terminal and can show ASCII only."""

    encoding = "ascii"

    def __init__(self, *, is_terminal: bool) -> None:
        self.is_terminal = is_terminal
        self.text = ""

    def isatty(self) -> bool:
        return self.is_terminal

    def write(self, text: str) -> int:
        text.encode("ascii")
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


@pytest.mark.parametrize(("is_terminal", "colour"), [(True, True), (True, False), (False, True)])
def test_colour_is_for_terminals(monkeypatch: pytest.MonkeyPatch, is_terminal: bool, colour: bool) -> None:
    terminal = Terminal(is_terminal=is_terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    printed: list[int] = []
    printer = Printer(printed.append, colour=colour)
    printer.post(Log("f", 7, "out", ["é"], 12))
    printer.close(PATIENCE_S)
    assert ("\x1b[" in terminal.text) == (is_terminal and colour)
    assert re.sub("\x1b[^m]*m", "", terminal.text) == "(f pid=7) \\xe9\n"
    assert printed == [12]


def test_a_closed_stream_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (None, open(os.devnull)):  # noqa: SIM115 closed below: it cannot be written to
        monkeypatch.setattr(sys, "stdout", stream)
        printer = Printer(lambda size: None)
        printer.post(Log("f", 7, "out", ["text"], 12))
        printer.close(PATIENCE_S)
        if stream is not None:
            stream.close()


# -- real processes -----------------------------------------------------------------------------------------------

SPEAK = """
def speak(i):
    import logging, subprocess
    print("to stdout", i)
    print("to stderr", i, file=sys.stderr)
    logging.getLogger("log").warning("logged %d", i)
    os.write(1, b"from C \\xff\\n")
    subprocess.run(["echo", "from a child"])
    thread = threading.Thread(target=lambda: print("from a thread", i))
    thread.start()
    thread.join()
    print("last words", i, end="")
"""


@pytest.mark.slow
def test_everything_arrives_on_its_stream_before_the_end() -> None:
    with program(
        SPEAK
        + """
afield.init(num_cpus=1)
afield.get(afield.remote(name="speaker")(speak).remote(5))
"""
    ) as driver:
        status, out, error = driver.end()
    assert status == 0, error
    pid = re.findall(r"\(speaker pid=(\d+)\)", out)[0]
    assert sorted(out.splitlines()) == sorted(
        [
            f"(speaker pid={pid}) to stdout 5",
            f"(speaker pid={pid}) from a thread 5",
            f"(speaker pid={pid}) last words 5",
            f"(worker pid={pid}) from C \ufffd",
            f"(worker pid={pid}) from a child",
        ]
    )
    assert error.splitlines() == [f"(speaker pid={pid}) to stderr 5", f"(speaker pid={pid}) logged 5"]


def test_a_thread_that_writes_does_not_hold_up_its_process(runtime: Any) -> None:
    """It may wait for the process's lock itself: in a finaliser that the collector runs while it writes."""

    @remote_with(num_cpus=0)
    def one() -> int:
        return 1

    @remote_with(num_cpus=0)
    def write_and_get() -> tuple[int, bool]:
        print("begun", end="")
        writes, go, early = threading.Event(), threading.Event(), list[bool]()

        def write() -> None:
            with sys.stdout._lock:  # type: ignore[attr-defined]
                writes.set()
                early.append(go.wait(5))

        thread = threading.Thread(target=write)
        thread.start()
        writes.wait()
        value = afield.get(one.remote())
        go.set()
        thread.join()
        return value, early[0]

    assert afield.get(write_and_get.remote(), timeout=60) == (1, True)


@pytest.mark.slow
def test_it_can_be_switched_off_and_an_actor_speaks_as_its_class() -> None:
    with program(
        """
class Talker:
    def talk(self):
        print("hello")

for wanted in (False, True):
    afield.init(num_cpus=1, log_to_driver=wanted)
    afield.get(afield.remote(Talker).remote().talk.remote())
    afield.shutdown()
"""
    ) as driver:
        status, out, error = driver.end()
    assert status == 0, error
    assert re.fullmatch(r"\(Talker pid=\d+\) hello\n", out)


@pytest.mark.slow
def test_the_same_line_of_many_workers_is_folded() -> None:
    with program(
        """
afield.init(num_cpus=3)

class Loader:
    def load(self):
        print("loading the model")

loaders = [afield.remote(Loader).remote() for _ in range(3)]
afield.get([loader.load.remote() for loader in loaders])
"""
    ) as driver:
        status, out, error = driver.end()
    assert status == 0, error
    first, second = out.splitlines()
    assert first.endswith(") loading the model")
    assert second.endswith(") loading the model [repeated 2x across 3 workers]")


@pytest.mark.slow
def test_a_crash_of_a_worker_says_where() -> None:
    with program(
        """
afield.init(num_cpus=1)

def crash():
    print("about to crash", end="", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)

try:
    afield.get(afield.remote(max_retries=0)(crash).remote())
except afield.WorkerCrashedError:
    pass
"""
    ) as driver:
        status, out, error = driver.end()
    assert status == 0, error
    assert out.endswith(") about to crash\n")
    assert "Fatal Python error: Segmentation fault" in error and "in crash" in error


@pytest.mark.slow
def test_a_driver_whose_output_is_stuck_holds_up_nobody() -> None:
    """Nobody reads the driver's stderr while a worker floods it: tasks go on, memory does not grow, the loss is visible."""
    lines = 150_000
    with program(
        f"""
import psutil
from tests.helpers import traces, process_named

def flood():
    text = "x" * 100
    for i in range({lines}):
        sys.stderr.write(f"{{i}} {{text}}\\n")

afield.init(num_cpus=2)
node = psutil.Process(process_named(traces(), "afield-node"))
before = node.memory_info().rss
afield.get(afield.remote(flood).remote())
report(grown=node.memory_info().rss - before, answer=afield.get(afield.remote(lambda: 42).remote()))
input()
"""
    ) as driver:
        facts = driver.read()
        assert facts["answer"] == 42
        assert facts["grown"] < 60 << 20
        driver.tell()
        status, _, error = driver.end()
    assert status == 0
    got = error.splitlines()
    dropped = [int(number) for line in got for number in re.findall(r"… (\d+) lines dropped", line)]
    assert dropped
    assert len(got) - len(dropped) + sum(dropped) == lines
