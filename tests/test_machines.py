"""Tables of transitions, and the flight recorder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from afield.errors import InternalError
from afield.machines import FlightRecorder, Table
from tests import diagrams

DOOR = Table(
    "door",
    "closed",
    {("closed", "open"): "open", ("open", "close"): "closed", ("closed", "lock"): "locked", ("open", "lock"): "locked"},
    {"closed": "can be opened", "open": "can be gone through", "locked": "stays so"},
)


def test_a_table_leads_from_state_to_state() -> None:
    recorder = FlightRecorder()
    state = DOOR.initial
    for event in ("open", "close", "lock"):
        state = DOOR.after(state, event, b"\x01\xff", recorder)
    assert state == "locked"
    assert DOOR.final() == ["locked"]
    assert recorder.story() == ["01ff open closed -> open", "01ff close open -> closed", "01ff lock closed -> locked"]


def test_what_the_table_does_not_name_raises_with_the_story() -> None:
    recorder = FlightRecorder()
    DOOR.after("open", "close", "front", recorder)
    with pytest.raises(InternalError) as caught:
        DOOR.after("closed", "close", "front", recorder)
    text = str(caught.value)
    assert "door front: close in state closed" in text
    assert "only open, lock may happen" in text
    assert "front close open -> closed" in text


def test_the_recorder_is_bounded() -> None:
    recorder = FlightRecorder(3)
    for number in range(10):
        recorder.note((number,))
    assert recorder.story() == ["7", "8", "9"]


def test_a_state_without_a_meaning_is_refused() -> None:
    with pytest.raises(AssertionError, match="ajar"):
        Table("door", "closed", {("closed", "push"): "ajar"}, {"closed": "x"})


def test_the_diagram_shows_every_transition() -> None:
    assert DOOR.diagram().splitlines() == [
        "stateDiagram-v2",
        "    [*] --> closed",
        "    closed --> open: open",
        "    open --> closed: close",
        "    closed --> locked: lock",
        "    open --> locked: lock",
        "    locked --> [*]",
    ]


def test_what_may_come_late_changes_nothing() -> None:
    door = Table(
        "door",
        "open",
        {("open", "lock"): "locked"},
        {"open": "can be gone through", "locked": "stays so"},
        late=iter([("locked", "lock")]),
    )
    assert door.after("locked", "lock") == "locked"
    assert door.final() == ["locked"]
    assert door.diagram().splitlines()[2:] == [
        "    open --> locked: lock",
        "    locked --> locked: (lock)",
        "    locked --> [*]",
    ]
    with pytest.raises(AssertionError, match="both late and not"):
        Table("door", "open", {("open", "lock"): "open"}, {"open": ""}, late=[("open", "lock")])


def test_the_document_says_what_the_tables_say() -> None:
    assert diagrams.DOCUMENT.read_text(encoding="utf-8") == diagrams.document(), "python -m tests.diagrams --write"


def test_every_table_of_the_code_is_in_the_document() -> None:
    root = Path(diagrams.__file__).resolve().parent.parent
    named = [path for _, path, _ in diagrams.TABLES]
    found = []
    for folder in ("runtime", "scheduler", "gpu_store", "transport"):
        for path in (root / folder).glob("**/*.py"):
            tables = len(re.findall(r"^[A-Z_]+ = Table\(", path.read_text(encoding="utf-8"), re.MULTILINE))
            found += [path.relative_to(root).as_posix()] * tables
    assert sorted(named) == sorted(found)


#: What ends in more than one way, and how.
ENDS = {"call at a worker": {"answered", "cancelled", "handed_back", "dropped"}}


@pytest.mark.parametrize("table", [table for table, _, _ in diagrams.TABLES], ids=lambda table: table.name)
def test_every_state_can_be_reached_and_left_unless_it_is_the_end(table: Table) -> None:
    reached, waiting = {table.initial}, [table.initial]
    while waiting:
        state = waiting.pop()
        for event in table.events(state):
            after = table.after(state, event)
            if after not in reached:
                reached.add(after)
                waiting.append(after)
    assert reached == set(table.states)
    assert set(table.final()) == ENDS[table.name] if table.name in ENDS else len(table.final()) <= 1
