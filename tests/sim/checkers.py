"""What must hold after every event, and what must be left when all is dropped and delivered: nothing.

*Safety.* An object that can be reached is not freed. Reachable is what a live process's program holds (variables, arrays in
stored values, running gets, arguments of running tasks, copies pickled out of band), what a submitter keeps for tasks without
a reply, what is inside a reply that is on its way, and what is inside a reachable object.

*What faults excuse.* An object is lost with its owner. Beyond that, when a process dies, only these objects may be lost, and
only while the ref was being carried by the dead process: refs in arguments of tasks that it had submitted and whose reply it
had not had; refs in results that it had sent and whose `Took` it had not had; refs in objects that it owned; refs that it
had pickled out of band; and what is inside all of these. They stay excused, which is more than the protocol needs; runs
without faults excuse nothing. An excused object is still in the books: a get of it ends, and nothing of it is left behind.
A value that the store loses is made again or becomes an error, as its owner's lineage decides.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from afield.runtime.wire import messages
from tests.sim.participant import Participant
from tests.sim.values import InvariantError, owner_of, show_id
from tests.sim.world import World

#: So many of each core's transitions are shown in a failure.
STORY = 8


def readable(text: str) -> str:
    """Name the objects and processes in what a core says, which shows ids in hexadecimal."""
    return re.sub(r"\b(?:[0-9a-f]{2}){2,}\b", lambda found: _name(bytes.fromhex(found[0])) or found[0], text)


def _name(name: bytes) -> str:
    return name.decode() if re.fullmatch(rb"p\d|\d\.\d+[a-z]", name) else ""


def stories(world: World) -> list[str]:
    """Return the last transitions of the cores of all processes, as lines."""
    lines = []
    for name, process in world.processes.items():
        for what, core in (("ownership", process.table), ("lineage", process.lineage)):
            lines += [f"{name.decode()} {what}: {readable(line)}" for line in core.recorder.story()[-STORY:]]
    return lines


def _inside(reply: messages.ReplyMany) -> list[bytes]:
    return [
        object_id for result in reply.results if result.contained is not None for object_id, _ in result.contained.refs
    ]


def reachable(world: World) -> set[bytes]:
    """Return every object that somebody can still get at."""
    stack: list[bytes] = [object_id for object_id, _ in world.pickles]
    for process in world.processes.values():
        stack += process.handles + process.views
        stack += [get.object_id for get in process.gets]
        for task in [*process.waiting, *process.inflight.values()]:
            stack += task.pinned
        for execution in process.executions:
            stack += execution.refs
        for execution in process.unsettled:
            if execution.reply is not None and execution.submitter in world.processes:
                stack += _inside(execution.reply)
    for (source, _), message in world.network.messages():
        if isinstance(message, messages.ReplyMany) and source in world.processes:
            stack += _inside(message)
    found: set[bytes] = set()
    while stack:
        object_id = stack.pop()
        if object_id not in found:
            found.add(object_id)
            if not world.unprotected(object_id):
                stack += world.contents.get(object_id, ())
    return found


def after_event(world: World, process: Participant) -> None:
    """Check what one event in one process may have broken.

    Raises:
        InvariantError: it did.
    """
    table = process.table
    entries = table.entries
    if table.effects:
        raise InvariantError(f"{process.name.decode()} has effects that nobody executes: {table.effects!r}")
    held = Counter(process.handles)
    held.update(process.views)
    held.update(process.dropped)
    held.update([get.object_id for get in process.gets])
    for execution in process.executions:
        held.update(execution.refs)
    for object_id, count in held.items():
        entry = entries.get(object_id)
        if entry is None or entry.handles != count:
            counted = "no entry" if entry is None else f"{entry.handles}"
            raise InvariantError(f"{process.name.decode()} has {count} handles of {show_id(object_id)}, not {counted}")
    freed = [object_id for object_id in process.owned if object_id not in entries]
    if freed:
        process.owned.difference_update(freed)
        reached = reachable(world)
        for object_id in sorted(freed):
            if object_id in reached and not world.unprotected(object_id):
                raise InvariantError(f"{show_id(object_id)} is freed while somebody can reach it")


def books(process: Participant) -> None:
    """Have the cores of a process check themselves, at a moment between transitions.

    Raises:
        InvariantError: one of them has complaints.
    """
    complaints = [*process.table.validate(), *process.lineage.validate()]
    if complaints:
        raise InvariantError(f"the books of {process.name.decode()} are wrong: {readable('; '.join(complaints))}")


def on_emptied(world: World, object_id: bytes) -> None:
    """Check that nobody can reach an object whose value was freed, though its entry stays for what was made from it.

    Raises:
        InvariantError: somebody can.
    """
    if object_id in reachable(world) and not world.unprotected(object_id):
        raise InvariantError(f"the value of {show_id(object_id)} is freed while somebody can reach it")


def at_rest(world: World) -> None:
    """Check that gets and tasks came to an end when nothing moves any more.

    Raises:
        InvariantError: one waits for ever.
    """
    for process in world.processes.values():
        for get in process.gets:
            if not get.ready:
                raise InvariantError(f"the get of {show_id(get.object_id)} in {process.name.decode()} never ends")
        unfinished: list[Any] = [*process.waiting, *process.inflight.values(), *process.unsettled]
        if unfinished:
            raise InvariantError(f"in {process.name.decode()} these never end: {unfinished!r}")


def after_all(world: World) -> None:
    """Check that nothing is left when everything is dropped and delivered.

    Raises:
        InvariantError: a record or a value without a holder is left.
    """
    for name, process in world.processes.items():
        table = process.table
        left = {
            "entries": table.entries,
            "effects": table.effects,
            "awaiting": table._awaiting,
            "lent_to": table._lent_to,
            "borrowed_from": table._borrowed_from,
            "transit": table._transit,
            "lineage_knows": table.lineage_knows,
            "records": process.lineage._records,
            "records by age": process.lineage._by_age,
            "lineage holds": process.lineage.inputs,
            "kept for lineage": process.lineage._kept,
            "remains": process.lineage._remains,
            "early losses": process.lineage._early,
            "bytes for lineage": process.lineage.bytes,
            "tasks that run again": process.again,
        }
        for what, records in left.items():
            if records:
                raise InvariantError(f"{name.decode()} is left with {what} {records!r}")
    for object_id, versions in world.store.items():
        left_there = any(stored.there and stored.claimed for stored in versions)
        if left_there and owner_of(object_id) in world.processes:
            raise InvariantError(f"the stored value of {show_id(object_id)} is left behind")
