"""docs/state-machines.md: written from the tables, so that it says what the code does.

`python -m tests.diagrams` shows how the document differs from the tables, `--write` writes it anew. A table joins by a line in
`TABLES`; what it is about is said there in one sentence, its states and transitions come from the code.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

from afield.gpu_store.books import lives
from afield.machines import Table
from afield.runtime.cores import actor, caller, dispatch, objects, work
from afield.scheduler import demands, slots
from afield.transport import link

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "state-machines.md"

#: (table, the file that it stands in, what it is about)
TABLES: tuple[tuple[Table, str, str], ...] = (
    (
        link.LINK,
        "transport/link.py",
        "One conversation of two processes, which outlives the sockets that carry it.",
    ),
    (
        objects.LIFE,
        "runtime/cores/objects.py",
        "An object, in a process that owns or borrows it.",
    ),
    (
        caller.CALLER,
        "runtime/cores/caller.py",
        "An actor, in a process that calls it, as the node daemon tells of it: decides when calls may leave.",
    ),
    (
        caller.CALL,
        "runtime/cores/caller.py",
        "One call of an actor's method, in the process that made it.",
    ),
    (
        actor.ACTOR,
        "runtime/cores/actor.py",
        "An actor, in the node daemon's directory: when it is constructed, starts again, and is over.",
    ),
    (
        work.TABLE,
        "runtime/cores/work.py",
        "One push at the worker that runs it: a task, or a call of an actor's method.",
    ),
    (
        dispatch.LEASE,
        "runtime/cores/dispatch.py",
        "The right of one process to push tasks to one worker, in the process that has it.",
    ),
    (
        demands.LEASE,
        "scheduler/demands.py",
        "The same lease in the node daemon, which accounts for what it holds.",
    ),
    (
        slots.DEVICE,
        "scheduler/slots.py",
        "A device of a node: whether leases are placed on it.",
    ),
    (
        lives.COPY,
        "gpu_store/books/lives.py",
        "A copy of one part of a stored object in one arena: the host's store, or a device's.",
    ),
    (
        lives.MAKING,
        "gpu_store/books/lives.py",
        "A copy that is to come to an arena: from another one, or from disk.",
    ),
    (
        lives.NEED,
        "gpu_store/books/lives.py",
        "A process that waits for parts of an object to be where it can read them.",
    ),
)

HEAD = """\
# State machines

What afield decides about one thing is a small machine: a table from (state, event) to the next state. An event that a table
does not name is a bug of afield's: it raises `InternalError`, with what happened before. Events in parentheses may come late,
when what they are about is over, and change nothing. The diagrams are Mermaid's.

This page is written by `python -m tests.diagrams --write`, from the tables in the code.
"""


def section(table: Table, path: str, about: str) -> str:
    """Return what the document says of one table."""
    title = table.name[0].upper() + table.name[1:]
    rows = [f"| `{state}` | {meaning} |" for state, meaning in table.states.items()]
    return "\n".join(
        [
            f"## {title}",
            "",
            f"{about} Table: `{path}`.",
            "",
            "```mermaid",
            table.diagram(),
            "```",
            "",
            "| state | meaning |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def document() -> str:
    """Return the whole document."""
    return "\n".join([HEAD, *(section(*entry) for entry in TABLES)])


def main() -> int:
    """Show how the document differs from the tables, or write it."""
    parser = argparse.ArgumentParser(description="Write docs/state-machines.md from the tables in the code.")
    parser.add_argument("--write", action="store_true", help="write the document instead of showing what differs")
    if parser.parse_args().write:
        DOCUMENT.write_text(document(), encoding="utf-8")
        return 0
    there = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""
    lines = difflib.unified_diff(there.splitlines(), document().splitlines(), "the document", "the tables", lineterm="")
    different = list(lines)
    print("\n".join(different) if different else "the document says what the tables say")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
