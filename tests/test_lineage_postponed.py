"""The lineage core: what cannot be made again for now."""

from __future__ import annotations

from afield.runtime.cores.lineage_records import USED_UP
from afield.runtime.cores.objects import FAILED, LOCATED, PENDING
from tests.lineage_helpers import PLACE, again, assert_empty, effects_of, end, lineage_of, lose, made


def test_what_cannot_be_made_again_now_is_tried_anew_when_somebody_asks() -> None:
    """It fails for who waits, uses up nothing, and two outputs of a task are made again together."""
    table, lineage = lineage_of()
    for output in (b"x", b"y"):
        table.own(output, b"task")
        table.fulfil(output, LOCATED, PLACE)
    lineage.keep(b"task", [b"x", b"y"], left=1)
    lose(table, b"x", b"y")
    for _ in range(3):
        [record] = again(table)
        lineage.postpone(record)
        lineage.postpone(record)  # told twice, by what it takes and by itself
        for output in (b"x", b"y"):
            table.fulfil(output, FAILED, b"no device")
        lineage.ended(record, [b"x", b"y"])
        assert record.left == 1 and lineage.validate() == []
        assert again(table) == [], "nobody asks"
        assert not table.when_done(b"x", lambda: None)
        assert table.entries[b"y"].state == PENDING
    [record] = again(table)
    for output in (b"x", b"y"):
        table.fulfil(output, LOCATED, PLACE)
    lineage.ended(record, [b"x", b"y"])
    assert record.left == 0 and not lineage.postponed
    lose(table, b"x", b"y")
    assert table.entries[b"x"].value == f"x {USED_UP}: gone".encode()
    assert table.when_done(b"x", lambda: None), "this is for ever"
    for output in (b"x", b"y"):
        table.drop(output)
    effects_of(table)
    assert_empty(table, lineage)


def test_a_postponed_value_that_is_dropped_or_whose_record_is_leaves_nothing() -> None:
    table, lineage = lineage_of()
    made(table, lineage, b"a")
    made(table, lineage, b"b", b"a")
    table.drop(b"a")
    lose(table, b"b")
    for record in again(table):
        lineage.postpone(record)
        end(table, record, b"b", FAILED, b"no device")
    lineage._empty([record])
    assert table.when_done(b"b", lambda: None) and table.entries[b"b"].value == b"no device"
    table.drop(b"b")
    effects_of(table)
    assert not lineage.postponed
    assert_empty(table, lineage)
