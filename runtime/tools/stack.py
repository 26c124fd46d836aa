"""What all processes of a session do at this moment, as text: the command `afield stack`.

Theory of operation. The node daemon collects what the processes say of themselves (`process.stacks`) as a list of
`ProcessStack`. Frames of afield's own are drawn together into one line, unless all are asked for: they say where a thread
waits, and the user's frames say for what. Source lines are read here, from the files. Processes of which the same is to be
said, such as idle workers, are shown once. On a terminal a line is cut to the width, a path at its beginning.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from afield.runtime.process.stacks import Activity, CoreState, Frame, Stack

#: A line that is not cut to a terminal's width has no more characters.
MAX_WIDTH = 400
#: Of processes that are shown once, so many are named.
MAX_PIDS = 12

_OURS = re.compile(r"/afield/(runtime|transport|gpu_store|scheduler|libraries)/[^:]*\.py\Z")
_THREADING = re.compile(r"/threading\.py\Z")


class ProcessStack(msgspec.Struct, array_like=True):
    """One process: what it says of itself, or why it says nothing."""

    pid: int
    kind: str
    name: str
    trouble: str = ""
    activity: Activity | None = None


class Line(NamedTuple):
    """A line of output, and what it is: "head", "plain", "source", "ours" or "wrong"."""

    text: str
    role: str = "plain"


@dataclass(frozen=True, slots=True)
class Display:
    """How it is shown: columns that there are, and whether frames of afield's own are."""

    width: int = MAX_WIDTH
    full: bool = False


def processes_of(answer: Any) -> list[ProcessStack]:
    """Return what the daemon's answer to "stack" says, in its order: drivers, workers, stores, the daemon."""
    found = msgspec.convert(answer, list[ProcessStack])
    order = {"driver": 0, "worker": 1, "store": 2}
    return sorted(found, key=lambda process: (order.get(process.kind, 3), process.trouble == "", process.pid))


def rendered(processes: Iterable[ProcessStack], display: Display) -> Iterator[Line]:
    """Yield the lines that show these processes."""
    groups: dict[tuple[Any, ...], list[ProcessStack]] = {}
    for process in processes:
        # Which task it is does not keep processes apart that do the same.
        key = process.kind, process.name, *_body(process, display, with_ids=False)
        groups.setdefault(key if process.trouble == "" else (process.pid,), []).append(process)
    for index, group in enumerate(groups.values()):
        if index:
            yield Line("")
        yield _head(group, display.width)
        yield from _body(group[0], display, with_ids=len(group) == 1)


def as_json(processes: Iterable[ProcessStack]) -> list[dict[str, Any]]:
    """Return the same for programs."""
    return [
        {
            "pid": process.pid,
            "kind": process.kind,
            "name": process.name,
            "trouble": process.trouble,
            "calls": [
                {"name": call.name, "task_id": call.task_id.hex(), "state": call.state}
                for call in (process.activity.calls if process.activity else ())
            ],
            "waiting": process.activity.waiting if process.activity else 0,
            "stacks": [
                {
                    "name": stack.name,
                    "frames": list(map(_json_frame, [*stack.outer, *stack.inner])),
                    "left_out": stack.left_out,
                }
                for stack in (process.activity.stacks if process.activity else ())
            ],
            "cores": [msgspec.structs.asdict(core) for core in (process.activity.cores if process.activity else ())],
        }
        for process in processes
    ]


def _json_frame(frame: Frame) -> dict[str, Any]:
    return {"file": frame.file, "line": frame.line, "function": frame.function, "text": _source(frame)}


def _head(group: list[ProcessStack], width: int) -> Line:
    first = group[0]
    pids = [str(process.pid) for process in group]
    more = f" and {len(pids) - MAX_PIDS} more" if len(pids) > MAX_PIDS else ""
    what = first.kind if first.name in ("", first.kind) else f"{first.kind} {first.name}"
    text = f"{what}, pid{'s' if len(pids) > 1 else ''} {', '.join(pids[:MAX_PIDS])}{more}"
    if first.trouble:
        return Line(_cut(f"{text}: {first.trouble}", width), "wrong")
    is_idle = what == "worker" and first.activity is not None and not first.activity.calls
    return Line(_cut(f"{text}: idle" if is_idle else text, width), "head")


def _body(process: ProcessStack, display: Display, *, with_ids: bool) -> Iterator[Line]:
    activity = process.activity
    if activity is None:
        return
    for call in activity.calls:
        task = f", task {call.task_id.hex()}" if with_ids and call.task_id else ""
        yield Line(_cut(f"  {call.state or 'runs'} {call.name}(){task}", display.width))
    if activity.all_calls > len(activity.calls):
        yield Line(f"  and {activity.all_calls - len(activity.calls)} more")
    if activity.waiting:
        yield Line(f"  {activity.waiting} more {'waits' if activity.waiting == 1 else 'wait'} behind")
    for stack in activity.stacks:
        yield Line(_cut(f"  {stack.name}", display.width))
        yield from _stack(stack, display, process.kind)
    if activity.all_stacks > len(activity.stacks):
        yield Line(f"  and {activity.all_stacks - len(activity.stacks)} more threads or coroutines")
    for core in activity.cores:
        yield from _core(core, display.width)


def _stack(stack: Stack, display: Display, kind: str) -> Iterator[Line]:
    outer = stack.outer
    if not display.full:
        start = 0
        while start < len(outer) and _THREADING.search(outer[start].file):
            start += 1
        # What the fork server's interpreter was started with, see `bootstrap`.
        if start < len(outer) and kind != "driver" and outer[start].file == "<string>":
            start += 1
        outer = outer[start:]
    yield from _frames(outer, display)
    if stack.left_out:
        yield Line(f"    ... {stack.left_out} frames left out")
        yield from _frames(stack.inner, display)


def _frames(frames: list[Frame], display: Display) -> Iterator[Line]:
    ours: list[Frame] = []
    for frame in frames:
        if not display.full and _OURS.search(frame.file):
            ours.append(frame)
            continue
        yield from _folded(ours, display.width)
        ours = []
        yield Line(_location("    ", frame, display.width))
        source = _source(frame)
        if source:
            yield Line(_cut(f"      {source}", display.width), "source")
    yield from _folded(ours, display.width)


def _folded(ours: list[Frame], width: int) -> Iterator[Line]:
    if len(ours) == 1:
        yield Line(_location("    ", ours[0], width), "ours")
    elif ours:
        yield Line(_location(f"    {len(ours)} frames of afield, the last: ", ours[-1], width), "ours")


def _core(core: CoreState, width: int) -> Iterator[Line]:
    yield Line(_cut(f"  core {core.name}: {'all is well' if not core.complaints else 'something is wrong'}", width))
    for complaint in core.complaints:
        yield Line(_cut(f"    wrong: {complaint}", width), "wrong")
    for told in core.story:
        yield Line(_cut(f"    {told}", width))


def _source(frame: Frame) -> str:
    """Return the line of source: the process's own words, or what the file says now."""
    return _printable(frame.text or linecache.getline(frame.file, frame.line).strip())


def _location(before: str, frame: Frame, width: int) -> str:
    """Return where a frame is; of a path that is too long the beginning goes."""
    after = f"{_printable(frame.function)} ("
    place = f"{_printable(frame.file)}:{frame.line})"
    room = max(20, width - len(before) - len(after))
    return _cut(before + after + (place if len(place) <= room else "…" + place[1 - room :]), width)


def _cut(text: str, width: int) -> str:
    text = _printable(text)
    return text if len(text) <= width else text[: width - 1] + "…"


def _printable(text: str) -> str:
    """Return a text that does nothing to a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
