"""What lineage keeps of values that nothing else needs: by cost, and only while memory is not short."""

from __future__ import annotations

from afield.gpu_store.tiers import SPARE
from afield.runtime.cores.lineage_records import DROPPED, NO_TASK, RECORD_BYTES
from afield.runtime.cores.objects import (
    FAILED,
    FREED,
    LOCATED,
    FreeStored,
    Spare,
)
from afield.runtime.wire import messages
from afield.runtime.wire.messages import Lost
from tests.lineage_helpers import (
    ON_DEVICE,
    PLACE,
    again,
    assert_empty,
    effects_of,
    end,
    lineage_of,
    lose,
    made,
)


def test_the_store_lets_go_of_what_only_lineage_needs() -> None:
    table, lineage = lineage_of()
    table.put(b"a", LOCATED, PLACE)
    made(table, lineage, b"x", b"a")
    made(table, lineage, b"y", b"x", b"a")
    table.drop(b"x")
    table.drop(b"a")
    assert effects_of(table) == [FreeStored(b"x"), Spare(b"a", True)]
    table.on_lost(Lost([b"a"], "memory was short", SPARE))
    assert effects_of(table) == [FreeStored(b"a")] and not lineage.validate()
    assert lineage.bytes == 0 and table.entries[b"y"].state == LOCATED
    lose(table, b"y")
    assert table.entries[b"y"].value == f"y {DROPPED}: gone".encode()


def test_the_store_hears_when_lineage_is_no_longer_alone() -> None:
    table, lineage = lineage_of()
    table.put(b"a", LOCATED, PLACE)
    made(table, lineage, b"x", b"a")
    table.drop(b"a")
    assert effects_of(table) == [Spare(b"a", True)]
    lose(table, b"x")
    spare, recompute = effects_of(table)
    assert spare == Spare(b"a", False) and lineage.kept_bytes == 0 and not lineage.validate()
    lineage.started(recompute.record)
    end(table, recompute.record, b"x")
    assert effects_of(table) == [Spare(b"a", True)] and lineage.kept_bytes == PLACE.size
    lose(table, b"x")
    [record] = again(table)
    table.on_lost(Lost([b"a"], "memory was short", SPARE))  # it had let go before it heard
    assert table.entries[b"a"].value == f"a {NO_TASK}: memory was short".encode()
    end(table, record, b"x", FAILED, b"no argument")
    table.drop(b"x")
    assert_empty(table, lineage)


def test_memory_of_a_device_is_not_kept_for_lineage() -> None:
    table, lineage = lineage_of()
    table.put(b"gradient", LOCATED, ON_DEVICE)
    made(table, lineage, b"x", b"gradient")
    table.drop(b"gradient")
    assert effects_of(table) == [FreeStored(b"gradient")] and lineage.bytes == 0
    lose(table, b"x")
    assert table.entries[b"x"].value == f"x {DROPPED}: gone".encode()
    table.drop(b"x")
    assert_empty(table, lineage)


def test_results_of_actors_that_pass_through_a_device_do_not_pile_up() -> None:
    table, lineage = lineage_of()
    made(table, lineage, b"0")
    for index in range(1, 100):
        table.put(b"gradient", LOCATED, ON_DEVICE)
        made(table, lineage, b"%d" % index, b"%d" % (index - 1), b"gradient")
        table.drop(b"gradient")
        table.drop(b"%d" % (index - 1))
        assert len(table.entries) == 1 and lineage.bytes == 0 and not lineage.validate()
    table.drop(b"99")
    assert_empty(table, lineage)


def test_a_value_on_a_device_that_can_be_made_again_is_freed_though_its_actor_may_be_gone() -> None:
    table, lineage = lineage_of()
    table.own(b"a", b"a's task")
    table.fulfil(b"a", LOCATED, ON_DEVICE)
    lineage.keep(b"a's task", [b"a"], left=3, freeable=False)
    made(table, lineage, b"x", b"a")
    table.drop(b"a")
    assert table.entries[b"a"].state == FREED and lineage.kept_bytes == 0
    lose(table, b"x")
    assert [record.task for record in again(table)] == [b"x's task"]


def test_of_the_values_kept_the_largest_go_first_and_then_the_oldest() -> None:
    table, lineage = lineage_of(value_bytes=250)
    for name, size in ((b"a", 100), (b"b", 101), (b"c", 100), (b"d", 20), (b"e", 100)):
        table.put(name, LOCATED, messages.Location([messages.Part(0, 0, size)]))
        made(table, lineage, b"of " + name, name)
        table.drop(name)
    assert sorted(lineage._kept) == [b"c", b"d", b"e"] and lineage.kept_bytes == 220
    assert lineage.bytes == 3 * RECORD_BYTES + 220 and not lineage.validate()


def test_what_needs_what_was_freed_goes_with_it_and_keeps_nothing() -> None:
    table, lineage = lineage_of(value_bytes=64)
    table.put(b"root", LOCATED, PLACE)
    made(table, lineage, b"0", b"root")
    table.drop(b"root")
    for index in range(1, 3000):
        made(table, lineage, b"%d" % index, b"%d" % (index - 1))
        table.drop(b"%d" % (index - 1))
    assert b"root" in lineage._kept
    table.put(b"large", LOCATED, messages.Location([messages.Part(0, 0, 60)]))
    made(table, lineage, b"other", b"large")
    made(table, lineage, b"from root", b"0", b"large")
    table.drop(b"large")
    assert sorted(lineage._kept) == [b"root"], "the dearest"
    table.drop(b"other")
    lineage.value_bytes = 0
    table.put(b"more", LOCATED, messages.Location([messages.Part(0, 0, 60)]))
    made(table, lineage, b"last", b"more")
    lineage._keep_to_limit()
    assert lineage.bytes == RECORD_BYTES and not lineage._kept and len(table.entries) == 4
    lose(table, b"2999")
    assert table.entries[b"2999"].value == f"2999 {DROPPED}: gone".encode()
