"""The lives of copies, makings and needs as the books tell them: the rare ways, the story, and what `validate` sees."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from afield.errors import InternalError
from afield.gpu_store.tiers import HOST, Found, Move, WriteFile
from tests.store_books import GPU, KIB, B, Books, only


def events(store: Books) -> list[str]:
    """Return what was noted, without what it happened to."""
    return [line.partition(" ")[2] for line in store.recorder.story()]


def test_a_copy_that_is_freed_while_it_is_written_dies_with_the_job() -> None:
    store = Books(4 * KIB)
    for i in range(4):
        store.store(b"%d" % i, (HOST, KIB))
    write = only(WriteFile, store.lease(B, 1, HOST, KIB))
    store.free(b"0")
    assert store.validate() == []
    assert store.usage(HOST).leaving == KIB, "its bytes are free as soon as the job ends"
    store.finished(write.job)
    assert events(store)[-4:] == [
        "leave kept -> leaving",
        "free_in_use leaving -> dying_leaving",
        "stay dying_leaving -> dying",
        "bury dying -> over",
    ]
    assert store.validate() == []


def test_a_copy_that_was_promised_and_freed_goes_with_its_device() -> None:
    store = Books(4 * KIB, gpu=4 * KIB)
    store.store(b"0", (GPU, KIB))
    only(Found, store.need(B, 1, b"0", [(0, GPU)]))
    store.free(b"0")
    assert store.validate() == []
    store.remove_arena(GPU, "it fell off the bus")
    store.mapped(B, 1)
    assert events(store)[-3:] == ["free_in_use kept -> dying", "lose dying -> over", "mapped promised -> over"]
    assert store.validate() == []


def test_a_need_beyond_its_deadline_ends_with_its_process() -> None:
    store = Books(4 * KIB, gpu=4 * KIB)
    store.store(b"0", (GPU, KIB))
    move = only(Move, store.need(B, 1, b"0", [(0, HOST)], deadline=1.0))
    store.expire(1.0)
    store.client_died(B)
    store.finished(move.job)
    assert [event for event in events(store) if "extend" in event] == [
        "extend waiting -> extended",
        "forget extended -> over",
    ]
    assert store.validate() == []


def test_the_story_names_object_part_and_arena() -> None:
    store = Books(4 * KIB, gpu=4 * KIB)
    store.store(b"\xab", (GPU, KIB))
    move = only(Move, store.need(B, 1, b"\xab", [(0, HOST)]))
    store.finished(move.job)
    assert store.recorder.story()[1:4] == [
        "ab/0/0 place queued -> placed",
        "ab/0/0 run placed -> running",
        "ab/0/0 complete running -> over",
    ]


def test_what_must_not_happen_to_a_copy_raises_with_the_story() -> None:
    store = Books(4 * KIB)
    store.store(b"0", (HOST, KIB))
    copy = store._catalogue.objects[b"0"].parts[0].copies[HOST]
    store._arenas[HOST].start_leaving(copy)
    with pytest.raises(InternalError, match=r"(?s)leave in state leaving.*leave kept -> leaving"):
        store._arenas[HOST].start_leaving(copy)


def spoilt_sum(store: Books) -> None:
    store._arenas[HOST].sealed_bytes += 1


def spoilt_state(store: Books) -> None:
    store._catalogue.objects[b"0"].parts[0].copies[HOST].state = "leaving"


def spoilt_part(store: Books) -> None:
    store._catalogue.objects[b"0"].parts[0].lost = "so it says"


def spoilt_job(store: Books) -> None:
    (job,) = store._copying.jobs.values()
    job.sources[0].busy = 0


def spoilt_making(store: Books) -> None:
    (making,) = store._arenas[HOST].makings
    making.state = "queued"


def spoilt_disk(store: Books) -> None:
    store._disk.used += 1


def spoilt_need(store: Books) -> None:
    (need,) = store._catalogue.objects[b"1"].needs or ()
    need.state = "asked"


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (spoilt_sum, "bytes are used"),
        (spoilt_state, "is leaving, and on another shelf"),
        (spoilt_part, "has 1 copies of part 0, which is lost"),
        (spoilt_job, "reads a copy that is not busy"),
        (spoilt_making, "in the making is queued, at"),
        (spoilt_disk, "the spill files do not add up"),
        (spoilt_need, "which is asked and misses 1"),
    ],
)
def test_validate_sees_what_is_wrong(spoil: Callable[[Books], None], complaint: str) -> None:
    store = Books(4 * KIB, gpu=4 * KIB)
    store.store(b"0", (HOST, KIB))
    store.store(b"1", (GPU, KIB))
    store.need(B, 1, b"1", [(0, HOST)])
    assert store.validate() == []
    spoil(store)
    assert complaint in "\n".join(store.validate())


def test_a_prefetch_that_a_need_has_hurried_goes_with_its_object() -> None:
    """It has its place on the device, and waits for a copy in the host store, which itself waits for room."""
    store = Books(4 * KIB, gpu=4 * KIB)
    store.store(b"0", (HOST, 2 * KIB))
    store.store(b"1", (HOST, 2 * KIB))
    store.finish(store.lease(B, 1, HOST, 4 * KIB))
    store.need(B, 2, b"0", [(0, GPU)])
    store.prefetch(b"0", [(0, GPU)])
    store._needs.client_died(B)  # and not of the room that it has leased
    assert store.usage(HOST).waiting == 1, "the prefetch wants it still"
    store.free(b"0")
    assert store.validate() == []
    assert store.usage(HOST).waiting == store.usage(GPU).used == 0
