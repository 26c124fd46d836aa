"""What is in memory and why: each process describes its table, and the pieces are put together.

Theory of operation. An owner knows what holds its objects: handles and zero-copy views in its process, pins, borrowers. Pins
are plain counts, so that they cost nothing; what they are for is found out only when somebody asks, by walking the pending
tasks, the values that contain refs, and the refs that were pinned for ever. What is left over is a hold of the moment (a
ref on its way). A borrower's table tells why it borrows. The daemon adds what lies in the store: an object there that no table
explains is an orphan.

A process describes at most `MAX_ROWS` objects, the largest, and counts all: a question must not stop it for long, and its
answer has to fit into a message. What is put together says how many objects there are, listed or not (`MemoryListing.total`).
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from afield.gpu_store.tiers import DISK, HOST
from afield.runtime.cores.objects import FREED, LOCATED, PENDING, Entry
from afield.runtime.wire.messages import Location

if TYPE_CHECKING:
    from afield.runtime.calls.participant import Participant

_T = TypeVar("_T")

MAX_ROWS = 100_000
#: To describe so many objects takes about a second.
MANY = 50_000
#: Names that one row lists of its containers or tasks.
MAX_NAMES = 3
_LINEAGE = "held by lineage of"
_LONG_TABLE = "its owner has more objects than it lists"


@dataclass(frozen=True, slots=True)
class MemoryEntry:
    """One live object: `size` in bytes, `tier`, and why it is alive.

    The size is that of all copies. The tier is "inline", "host", "disk", "device 0", several of these joined by "+", "pending"
    (no value yet) or "freed" (made again if what was made from it is lost).
    """

    object_id: str
    size: int
    tier: str
    owner: str
    why: tuple[str, ...]
    call_site: str | None


class MemoryListing(list[MemoryEntry]):
    """The largest objects, and what is to be known of the others.

    Attributes:
        total: how many objects there are, listed or not.
        silent: processes that did not answer in time; what they hold is missing.
    """

    total: int = 0
    silent: tuple[str, ...] = ()

    @property
    def left_out(self) -> int:
        """How many objects are not listed."""
        return self.total - len(self)


class Row(msgspec.Struct, array_like=True):
    """One object as one process sees it. `owner` is empty if that is the process itself; `size` is 0 if not known."""

    object_id: bytes
    owner: bytes
    state: int
    size: int
    life: bool
    why: list[str]
    borrowers: list[bytes]
    call_site: str


class Described(msgspec.Struct, array_like=True):
    """A process's answer: how many objects it owns, and its largest rows, which are all unless it is `cut`."""

    owned: int
    cut: bool
    rows: list[Row]


# -- one process --------------------------------------------------------------------------------------------------


def answer_questions(participant: Participant) -> None:
    """Have this process describe its objects whenever the daemon asks."""
    entries = participant.process.table.entries
    participant.process.requests.answer(
        "memory", lambda _: describe(participant), takes_long=lambda: len(entries) > MANY
    )


def describe(participant: Participant) -> Described:
    """Describe the objects in this process's table; the caller holds the lock."""
    process = participant.process
    entries = process.table.entries
    pins = _reasons_for_pins(entries, process.kept_for_ever)
    views = Counter(participant.values.parts.viewed())
    for object_id, reasons in _lineage(participant).items():
        pins[object_id].update(reasons)
    shown = largest(entries.items(), MAX_ROWS, lambda item: _size_of(item[1]))
    rows = [_row(object_id, entry, pins.get(object_id), views) for object_id, entry in shown]
    owned = sum(1 for entry in entries.values() if not entry.owner)
    return Described(owned, len(rows) < len(entries), rows)


def largest(items: Iterable[_T], most: int, size_of: Callable[[_T], int]) -> list[_T]:
    """Return all items if there are at most so many, else the largest; among equals the first."""
    items = list(items)
    return items if len(items) <= most else heapq.nlargest(most, items, key=size_of)


def _size_of(entry: Entry) -> int:
    return entry.value.size if isinstance(entry.value, Location) else len(entry.value or b"")


def _reasons_for_pins(
    entries: Mapping[bytes, Entry], kept: Mapping[tuple[bytes, str], int]
) -> dict[bytes, Counter[str]]:
    reasons: dict[bytes, Counter[str]] = defaultdict(Counter)
    tasks = {}
    for object_id, entry in entries.items():
        for inner in entry.contained or ():
            reasons[inner][f"contained in {object_id.hex()}"] += 1
        if entry.task is not None:
            tasks[id(entry.task)] = entry.task
    for task in tasks.values():
        for pinned in getattr(task, "pinned", None) or ():
            reasons[pinned][f"argument of the pending task {task.function.name}()"] += 1
    for (object_id, why), count in kept.items():
        reasons[object_id][why] += count
    return reasons


def _lineage(participant: Participant) -> dict[bytes, Counter[str]]:
    """Return what lineage holds, and for the sake of which results."""
    reasons: dict[bytes, Counter[str]] = defaultdict(Counter)
    for record in participant.submitter.recovery.lineage.records():
        for each in record.inputs:
            reasons[each][f"{_LINEAGE} {record.task.function.name}()"] += 1
    return reasons


def _row(object_id: bytes, entry: Entry, pins: Counter[str] | None, views: Counter[bytes]) -> Row:
    why = []
    seen = min(views.get(object_id, 0), entry.handles)
    if entry.handles > seen:
        why.append(f"{'actor handle' if entry.life else 'local handle'} x{entry.handles - seen}")
    if seen:
        why.append(f"zero-copy view x{seen}")
    if entry.state == PENDING and not entry.owner:
        why.append(f"result of the pending task {entry.task.function.name}()" if _named(entry.task) else "pending")
    explained = 0
    if pins:
        names = [name if count == 1 else f"{name} x{count}" for name, count in pins.most_common(MAX_NAMES)]
        why += names if len(pins) <= MAX_NAMES else [*names, f"{len(pins) - MAX_NAMES} more of these"]
        explained = sum(count for reason, count in pins.items() if not reason.startswith(_LINEAGE))
    if entry.pins > explained:
        why.append(f"pinned x{entry.pins - explained}")
    borrowers = list(entry.borrowers or ())
    return Row(object_id, entry.owner, entry.state, _size_of(entry), entry.life, why, borrowers, entry.created_at)


def _named(task: Any) -> bool:
    return getattr(getattr(task, "function", None), "name", None) is not None


# -- all together -------------------------------------------------------------------------------------------------


def assemble(answer: dict[str, Any]) -> MemoryListing:
    """Make one list, the largest first, of what the daemon collected (`node.census`)."""
    names = {process_id: f"{kind} pid {pid}" for process_id, pid, kind, _ in answer["processes"]}
    tables = {process_id: msgspec.convert(table, Described) for process_id, table in answer["tables"]}
    cut = {process_id for process_id, table in tables.items() if table.cut}
    stored = {object_id: (owner, sizes) for object_id, owner, sizes in answer["store"]}
    silent = set(answer["silent"])
    owned: dict[bytes, tuple[bytes, Row]] = {}
    borrowed: dict[bytes, list[tuple[bytes, Row]]] = defaultdict(list)
    for process_id, table in tables.items():
        for seen in table.rows:
            if seen.owner:
                borrowed[seen.object_id].append((process_id, seen))
            else:
                owned[seen.object_id] = process_id, seen
    entries = MemoryListing()
    for object_id in {**owned, **borrowed, **stored}:
        owner_id = b""
        row: Row | None = None
        if object_id in owned:
            owner_id, row = owned[object_id]
        why = list(row.why) if row is not None else []
        why += _borrowers(row, borrowed.get(object_id, ()), names)
        if row is None:
            owner_id = stored[object_id][0] if object_id in stored else borrowed[object_id][0][1].owner
            orphan = object_id in stored and object_id not in borrowed
            why.append(_LONG_TABLE if owner_id in cut else _without_owner(owner_id, silent, orphan))
        tier, size = _place(object_id, row, borrowed.get(object_id, ()), stored)
        site = row.call_site if row is not None else ""
        owner = names.get(owner_id, f"process {owner_id.hex()} (gone)")
        entries.append(MemoryEntry(object_id.hex(), size, tier, owner, tuple(why), site or None))
    entries.sort(key=lambda entry: (-entry.size, entry.object_id))
    unowned = sum(count for owner_id, count in answer["stored"] if owner_id not in tables)
    entries.total = max(len(entries), sum(table.owned for table in tables.values()) + unowned)
    del entries[MAX_ROWS:]
    entries.silent = tuple(names.get(process_id, f"process {process_id.hex()}") for process_id in sorted(silent))
    return entries


def _borrowers(row: Row | None, borrowed: Iterable[tuple[bytes, Row]], names: dict[bytes, str]) -> Iterator[str]:
    described = dict(borrowed)
    for process_id in {**dict.fromkeys(row.borrowers if row is not None else ()), **described}:
        held = described.get(process_id)
        detail = f" ({', '.join(held.why)})" if held is not None and held.why else ""
        yield f"borrowed by {names.get(process_id, 'a process that is gone')}{detail}"


def _without_owner(owner_id: bytes, silent: set[bytes], orphan: bool) -> str:
    if owner_id in silent:
        return "its owner did not answer in time"
    return "orphan: in the store, but no process knows it" if orphan else "its owner does not know it any more"


def _place(
    object_id: bytes,
    row: Row | None,
    borrowed: Iterable[tuple[bytes, Row]],
    stored: dict[bytes, tuple[bytes, dict[int, int]]],
) -> tuple[str, int]:
    if object_id in stored and stored[object_id][1]:
        sizes = stored[object_id][1]
        return "+".join(_tier(arena) for arena in sorted(sizes, reverse=True)), sum(sizes.values())
    rows = ([row] if row is not None else []) + [other for _, other in borrowed]
    found = next((other for other in rows if other.state != PENDING), None)
    if found is None:
        return "pending", 0
    if found.state == FREED:
        return "freed", 0
    return ("host" if found.state == LOCATED else "inline"), found.size


def _tier(arena: int) -> str:
    return "disk" if arena == DISK else "host" if arena == HOST else f"device {arena - 1}"
