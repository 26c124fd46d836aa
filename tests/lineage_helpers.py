"""What the tests of lineage share: a table with its lineage, and what happens to both in a few words."""

from __future__ import annotations

from typing import Any

from afield.runtime.cores.lineage import Lineage
from afield.runtime.cores.lineage_records import Loss, Record
from afield.runtime.cores.objects import (
    LOCATED,
    Recompute,
)
from afield.runtime.cores.ownership import OwnershipTable
from afield.runtime.wire import messages
from afield.runtime.wire.messages import Lost
from tests.sim.values import place_of

PLACE = place_of(b"somewhere", 1)
ON_DEVICE = messages.Location([messages.Part(1, 0, 64, home=1)], b"frame")


def explain(object_id: bytes, record: Record | None, why: str, loss: Loss) -> bytes:
    """Return what would be said."""
    return f"{object_id.decode()} {why}: {loss.cause}".encode()


def lineage_of(limit_bytes: int = 1 << 30, value_bytes: int | None = None) -> tuple[OwnershipTable, Lineage]:
    """Return an empty table and its lineage."""
    table = OwnershipTable(b"me", lambda owner: b"owner died: " + owner)
    return table, Lineage(table, limit_bytes, explain, value_bytes)


def effects_of(table: OwnershipTable) -> list[Any]:
    """Take the effects."""
    effects, table.effects = table.effects, []
    return effects


def made(table: OwnershipTable, lineage: Lineage, output: bytes, *holds: bytes, left: int = 3, **options: Any) -> None:
    """A task that takes `holds` makes a stored output, which has one handle."""
    table.own(output, output + b"'s task")
    for held in holds:
        table.pin(held)
    table.fulfil(output, LOCATED, PLACE)
    lineage.keep(output + b"'s task", [output], holds, left=left, **options)
    for held in holds:
        table.unpin(held)


def lose(table: OwnershipTable, *object_ids: bytes) -> None:
    """The daemon says that they are lost."""
    table.on_lost(Lost(list(object_ids), "gone"))


def again(table: OwnershipTable) -> list[Record]:
    """Take the effects; return the records of the tasks that are to run again, which begin."""
    records = [effect.record for effect in effects_of(table) if isinstance(effect, Recompute)]
    for record in records:
        assert table.lineage is not None
        table.lineage.started(record)
    return records


def end(table: OwnershipTable, record: Record, output: bytes, kind: int = LOCATED, value: Any = PLACE) -> None:
    """A task that ran again ends."""
    holds = list(record.inputs)
    table.fulfil(output, kind, value)
    assert table.lineage is not None
    table.lineage.ended(record, [output])
    for held in holds:
        table.unpin(held)


def assert_empty(table: OwnershipTable, lineage: Lineage) -> None:
    """Nothing is left."""
    assert not table.entries and not table.lineage_knows
    assert not lineage._records and not lineage._by_age and not lineage.inputs
    assert not lineage._kept and not lineage._remains and not lineage._early
    assert lineage.bytes == 0
