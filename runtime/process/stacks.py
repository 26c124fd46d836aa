"""What a process does at this moment: the Python stacks of its threads, the calls that it runs, and the state of its cores.

Theory of operation. The node daemon asks (`node.census`) and the thread that drives the loop answers, under the process's lock;
while the process's own code computes that is the standby thread. Frames are looked at and let go at once: no variable of
theirs is touched, so nothing is kept alive by it, and no code of the user's runs. The thread that answers is shown as it was
before the question came. A source line goes along only if `linecache` has it already, as of a notebook's cell: whoever shows
the stack reads files. Everything is bounded.

An event loop's thread says little of what its coroutines wait for, so each of them is shown as a stack of its own.
"""

from __future__ import annotations

import linecache
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType, FrameType
from typing import Any

import msgspec

from afield.machines import Core, complaints_of
from afield.transport.loop import Loop
from afield.transport.pump import Pump

#: Of one process: stacks (threads first), and calls that run or wait.
MAX_STACKS = 100
MAX_CALLS = 100
#: Of one stack: the outermost and the innermost frames.
MAX_OUTER, MAX_INNER = 30, 70
#: Of one core.
MAX_COMPLAINTS = 100
MAX_STORY = 100
#: A line of anything has no more characters.
MAX_CHARACTERS = 300

#: Frames of these and what they have called belong to the answer and not to what the thread was doing.
_ANSWERING = frozenset([Pump._handle.__code__, Loop.step.__code__])


class Frame(msgspec.Struct, array_like=True, frozen=True):
    """One frame; `text` is its line of source if that is in no file."""

    file: str
    line: int
    function: str
    text: str = ""


class Stack(msgspec.Struct, array_like=True, frozen=True):
    """A thread or a coroutine, its outermost frame first; so many frames are left out between the two lists."""

    name: str
    outer: list[Frame]
    inner: list[Frame] = []
    left_out: int = 0


class RunningCall(msgspec.Struct, array_like=True, frozen=True):
    """A task, or a call of an actor, at a worker."""

    name: str
    task_id: bytes
    state: str = ""


class CoreState(msgspec.Struct, array_like=True, frozen=True):
    """A core: what it complains of, and its last transitions, the oldest first."""

    name: str
    complaints: list[str]
    story: list[str]


class Activity(msgspec.Struct, array_like=True, frozen=True):
    """What one process does; lists are cut, and the numbers say how many there are in all."""

    stacks: list[Stack]
    all_stacks: int
    calls: list[RunningCall] = []
    all_calls: int = 0
    #: Calls that wait here for their turn.
    waiting: int = 0
    cores: list[CoreState] = []


def describe_activity(
    cores: Mapping[str, Core] | None = None,
    calls: Iterable[RunningCall] = (),
    waiting: int = 0,
    coroutines: Iterable[tuple[str, Any]] = (),
) -> Activity:
    """Describe this process.

    Args:
        cores: name -> core of those that are to be described.
        calls: what it runs.
        waiting: how many calls wait for their turn.
        coroutines: name and object of those that its event loop runs.
    """
    stacks = [*_threads(), *(_stack(name, _coroutine_frames(coroutine)) for name, coroutine in coroutines)]
    listed = list(calls)
    states = [_core_state(name, core) for name, core in (cores or {}).items()]
    return Activity(stacks[:MAX_STACKS], len(stacks), listed[:MAX_CALLS], len(listed), waiting, states)


def answer_activity(
    cores: Mapping[str, Core],
    calls: Callable[[], tuple[Iterable[RunningCall], int]] = lambda: ((), 0),
    coroutines: Callable[[], Iterable[tuple[str, Any]]] = tuple,
) -> Callable[[Any], Activity]:
    """Return what answers the question "stack" in a process; its argument says whether to describe the cores as well.

    Args:
        cores: name -> core of those that the process has.
        calls: returns the calls that run, and how many wait.
        coroutines: returns name and object of those that an event loop runs.
    """

    def answer(with_cores: Any) -> Activity:
        try:
            return describe_activity(cores if with_cores else None, *calls(), coroutines())
        except Exception as error:  # whoever looks for a fault must not make another: this would end the process
            return Activity([Stack(_clean(f"(this process could not describe itself: {error!r})"), [])], 1)

    return answer


def _threads() -> list[Stack]:
    known = {thread.ident: thread.name for thread in threading.enumerate()}
    main, me = threading.main_thread().ident, threading.get_ident()
    frames = sys._current_frames()
    order = sorted(frames, key=lambda ident: (ident != main, known.get(ident, "~")))
    try:
        return [
            _stack(known.get(ident, f"thread {ident}"), _frames(_before_the_question(frames[ident], ident == me)))
            for ident in order
        ]
    finally:
        frames.clear()  # one of them is our own


def _before_the_question(frame: FrameType, is_ours: bool) -> FrameType | None:
    """Return the frame of a thread that did what it does when the question came."""
    innermost: FrameType | None = frame
    outer = innermost
    while is_ours and outer is not None:
        if outer.f_code in _ANSWERING:
            return outer.f_back
        if outer.f_code.co_filename == __file__:
            innermost = outer.f_back  # where nothing marks the answer's beginning, it begins here
        outer = outer.f_back
    return innermost


def _frames(frame: FrameType | None) -> Iterator[Frame]:
    """Yield frames, the innermost first."""
    while frame is not None:
        yield _frame(frame.f_code, frame.f_lineno)
        frame = frame.f_back


def _coroutine_frames(coroutine: Any) -> Iterator[Frame]:
    """Yield the frames of a coroutine and of what it awaits, the innermost first; the trail ends at what is written in C."""
    found: list[Frame] = []
    while len(found) < MAX_OUTER + MAX_INNER:
        kind, awaited = ("gi", "gi_yieldfrom") if hasattr(coroutine, "gi_frame") else ("cr", "cr_await")
        frame = getattr(coroutine, kind + "_frame", None)
        if frame is None:
            break
        found.append(_frame(frame.f_code, frame.f_lineno))
        coroutine = getattr(coroutine, awaited, None)
    return reversed(found)


def _frame(code: CodeType, line: int | None) -> Frame:
    """Describe a frame; `line` is None in the middle of a call that has no line."""
    number = line or code.co_firstlineno
    known = linecache.cache.get(code.co_filename)
    # Lazy entries have one element, and lines of files that can be read have a time in the second place.
    lines = known[2] if known is not None and len(known) > 2 and known[1] is None else []
    text = lines[number - 1].strip() if 0 < number <= len(lines) else ""
    return Frame(_clean(code.co_filename), number, _clean(code.co_qualname), _clean(text))


def _clean(text: str) -> str:
    """Return a text that is short and can be sent: names of files and threads need not be valid Unicode."""
    return text[:MAX_CHARACTERS].encode("utf-8", "backslashreplace").decode()


def _stack(name: str, innermost_first: Iterable[Frame]) -> Stack:
    frames = list(innermost_first)[::-1]
    if len(frames) <= MAX_OUTER + MAX_INNER:
        return Stack(_clean(name), frames)
    left_out = len(frames) - MAX_OUTER - MAX_INNER
    return Stack(_clean(name), frames[:MAX_OUTER], frames[-MAX_INNER:], left_out)


def _core_state(name: str, core: Core) -> CoreState:
    complaints, story = complaints_of(core, MAX_COMPLAINTS), core.recorder.story()[-MAX_STORY:]
    return CoreState(name, list(map(_clean, complaints)), list(map(_clean, story)))


#: As the kernel names the states of a process in /proc.
_STATES = {
    "R": "it is running",
    "S": "it is sleeping",
    "D": "it waits for the kernel, mostly for a disk",
    "T": "it is stopped (kill -CONT {pid} lets it go on)",
    "t": "it is stopped by a debugger",
    "Z": "it has ended",
    "X": "it has ended",
}


def state_of(pid: int) -> str:
    """Say in words what the kernel knows of a process of this machine."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            letter = file.read().rpartition(") ")[2][:1]
    except OSError:
        return "it is gone"
    return _STATES.get(letter, f"it is in state {letter}").format(pid=pid)
