"""The books of all tiers, case by case: spills and restores, needs and promises, marks, failures, and lost devices."""

from __future__ import annotations

from afield.gpu_store.books import copying, eviction, needs
from afield.gpu_store.tiers import (
    DISK,
    GET,
    HOST,
    NOWHERE,
    DeleteFile,
    Found,
    Granted,
    Lost,
    Move,
    NotFound,
    PartCopy,
    ReadFile,
    Refused,
    WriteFile,
)
from tests.store_books import GPU, KIB, OTHER, OWNER, PEER, B, Books, C, granted, only, refused

# ---- spilling -------------------------------------------------------------------------------------------------------


def test_a_device_spills_to_the_host_for_who_waits() -> None:
    store = Books(64 * KIB, gpu=4 * KIB)
    store.store(b"0", (GPU, 2 * KIB))
    store.store(b"1", (GPU, 2 * KIB))
    move = only(Move, store.lease(B, 1, GPU, 2 * KIB))
    assert move == Move(move.job, (GPU, 0), (HOST, 0), 2 * KIB)
    assert store.where(b"0") == [GPU]
    assert store.usage(GPU).leaving == store.usage(HOST).moving == 2 * KIB
    assert granted(store.finished(move.job)).offset == 0
    assert store.where(b"0") == [HOST]
    assert store.moved_bytes["device_to_host"] == 2 * KIB
    store.free(b"0")
    assert store.usage(HOST).used == 0


def test_a_request_that_running_spills_will_satisfy_starts_no_more() -> None:
    store = Books(64 * KIB, gpu=4 * KIB)
    for i in range(4):
        store.store(b"%d" % i, (GPU, KIB))
    effects = store.lease(B, 1, GPU, 2 * KIB)
    moves = [effect for effect in effects if isinstance(effect, Move)]
    assert [move.source for move in moves] == [(GPU, 0), (GPU, KIB)]
    assert store.expire(0.0) == store.expire(1.0) == store.lease(B, 2, GPU, 64) == []
    assert store.finished(moves[1].job) == []
    effects = store.finished(moves[0].job)
    assert only(Granted, effects).size == 2 * KIB
    assert only(Move, effects).source == (GPU, 2 * KIB), "for the second request"


def test_what_is_pinned_stays_and_is_asked_for_again() -> None:
    store = Books(64 * KIB, gpu=4 * KIB)
    store.store(b"0", (GPU, 2 * KIB))
    store.store(b"1", (GPU, 2 * KIB))
    first, second = store.pin(b"0"), store.pin(b"1")
    assert store.lease(B, 1, GPU, KIB) == []
    assert store.expire(0.0) == []
    assert store.next_deadline() == eviction.RETRY_S
    assert store.expire(eviction.RETRY_S) == []
    del store.pins.pinned[second]
    assert store.next_deadline() == 2 * eviction.RETRY_S, "it is looked at again and again, though nothing else happens"
    assert only(Move, store.expire(1.0)).source == (GPU, 2 * KIB)
    del store.pins.pinned[first]


def test_what_is_pinned_while_it_is_copied_stays_and_goes_free_of_cost_later() -> None:
    store = Books(64 * KIB, gpu=2 * KIB)
    store.store(b"0", (GPU, 2 * KIB))
    move = only(Move, store.lease(B, 1, GPU, KIB))
    slot = store.pin(b"0")
    assert store.finished(move.job) == []
    assert store.where(b"0") == [GPU]
    assert store.usage(HOST).secondary == 2 * KIB
    del store.pins.pinned[slot]
    store.expire(0.0)
    assert granted(store.expire(1.0)).client == B
    assert store.where(b"0") == [HOST]


def test_the_host_spills_to_a_fused_file_and_reads_back() -> None:
    store = Books(4 * KIB)
    for i in range(4):
        store.store(b"%d" % i, (HOST, KIB))
    write = only(WriteFile, store.lease(B, 1, HOST, 2 * KIB))
    assert write.pieces == [(0, KIB, 0), (KIB, KIB, 4096)]
    assert granted(store.finished(write.job)).offset == 0
    assert store.where(b"0") == store.where(b"1") == [DISK]
    assert store.usage(DISK).used == 8192
    store.free(b"2")
    read = only(ReadFile, store.need(B, 2, b"0", [(0, HOST)]))
    assert (read.file, read.file_offset, read.size, read.host_offset) == (write.file, 0, KIB, 2 * KIB)
    found = only(Found, store.finished(read.job))
    ((index, part),) = found.parts
    assert (index, part.arena, part.offset, part.size) == (0, HOST, 2 * KIB, KIB)
    assert store.pins.open[part.slot] == part.serial
    assert store.moved_bytes == {
        "device_to_host": 0, "host_to_device": 0, "peer": 0, "disk_write": 2 * KIB, "disk_read": KIB
    }  # fmt: skip
    assert store.free(b"1") == []
    assert store.free(b"0") == [DeleteFile(write.file)]
    assert store.usage(HOST).moving == KIB, "it was promised"
    assert store.mapped(B, 2) == []
    assert store.usage(DISK).used == store.usage(HOST).moving == 0


def test_a_clean_part_leaves_again_without_being_written() -> None:
    store = Books(2 * KIB)
    store.store(b"0", (HOST, KIB))
    store.store(b"1", (HOST, KIB))
    store.finish(store.lease(B, 1, HOST, 2 * KIB))
    store.give_back(B, HOST, 0, 2 * KIB)
    store.finish(store.need(B, 2, b"0", [(0, HOST)]))
    store.mapped(B, 2)
    assert granted(store.lease(C, 1, HOST, 2 * KIB)).size == 2 * KIB
    assert store.where(b"0") == [DISK]


def test_a_spill_from_a_device_goes_through_a_full_host() -> None:
    store = Books(2 * KIB, gpu=2 * KIB)
    store.store(b"h", (HOST, 2 * KIB))
    store.store(b"d", (GPU, 2 * KIB))
    write = only(WriteFile, store.lease(B, 1, GPU, KIB))
    move = only(Move, store.finished(write.job))
    assert only(Granted, store.finished(move.job)).arena == GPU
    assert (store.where(b"h"), store.where(b"d")) == ([DISK], [HOST])


def test_a_spill_that_waits_for_the_host_is_given_up_with_its_cause() -> None:
    store = Books(2 * KIB, gpu=2 * KIB)
    store.store(b"h", (HOST, 2 * KIB), slots=False)
    store.store(b"d", (GPU, 2 * KIB))
    assert store.lease(B, 1, GPU, KIB, deadline=1.0) == []
    assert store.usage(HOST).waiting == 1
    reason = refused(store.expire(1.0)).reason
    assert "2 KiB of the 2 KiB of the host store" in reason
    assert store.usage(HOST).waiting == store.usage(GPU).leaving == 0
    assert store.where(b"d") == [GPU]


def test_what_does_not_fit_in_the_host_is_not_chosen() -> None:
    store = Books(KIB, gpu=4 * KIB)
    store.store(b"big", (GPU, 2 * KIB))
    store.store(b"small", (GPU, KIB))
    effects = store.finish(store.lease(B, 1, GPU, 2 * KIB))
    assert effects == [Granted(B, 1, GPU, 2 * KIB, 2 * KIB)]
    assert (store.where(b"big"), store.where(b"small")) == ([GPU], [HOST])


def test_failed_writes_leave_the_victims_and_pause_the_disk() -> None:
    store = Books(2 * KIB)
    store.store(b"0", (HOST, 2 * KIB))
    write = only(WriteFile, store.lease(B, 1, HOST, KIB, deadline=99.0))
    assert store.finished(write.job, "disk_full: no space") == [DeleteFile(write.file)]
    assert store.where(b"0") == [HOST]
    assert "it cannot be written to now: disk_full: no space" in store.describe_full(HOST, KIB)
    assert store.expire(0.0) == store.expire(0.9) == []
    due = store.next_deadline()
    assert due is not None
    assert due <= 1.0
    write = only(WriteFile, store.expire(1.0))
    store.finished(write.job, "disk_full: still")
    store.expire(1.0)
    assert store.expire(2.5) == [], "the pauses grow"
    assert only(Granted, store.finish(store.expire(3.1))).client == B


def test_the_limit_of_the_disk_gives_up_what_is_in_memory_too() -> None:
    store = Books(2 * KIB, disk_limit_bytes=8192)
    store.store(b"0", (HOST, KIB))
    store.store(b"1", (HOST, KIB))
    store.finish(store.lease(B, 1, HOST, 2 * KIB))
    store.give_back(B, HOST, 0, 2 * KIB)
    for request, object_id in ((2, b"0"), (3, b"1")):
        store.finish(store.need(B, request, object_id, [(0, HOST)]))
        store.pin(object_id)
        store.mapped(B, request)
    store.pins.pinned.clear()
    store.free(b"1")
    store.store(b"2", (HOST, KIB))
    slot = store.pin(b"0")
    effects = store.lease(B, 4, HOST, KIB)
    assert [type(effect) for effect in effects] == [DeleteFile, WriteFile]
    del store.pins.pinned[slot]
    assert only(Granted, store.finish(effects)).client == B
    assert store.where(b"2") == [DISK]


def test_marks() -> None:
    store = Books(64 * KIB, gpu=20 * KIB, high=0.8, low=0.5)
    moves: list[Move] = []
    for i in range(16):
        assert moves == []
        moves += [effect for effect in store.store(b"%d" % i, (GPU, KIB)) if isinstance(effect, Move)]
    moves += [effect for effect in store.store(b"16", (GPU, KIB)) if isinstance(effect, Move)]
    assert len(moves) == 7
    assert store.finish(list(moves)) == []
    assert store.usage(GPU).used == 10 * KIB
    assert [store.where(b"%d" % i) for i in range(17)] == [[HOST]] * 7 + [[GPU]] * 10


def test_what_tasks_reserve_is_kept_free_of_objects() -> None:
    store = Books(64 * KIB, gpu=4 * KIB)
    for i in range(4):
        store.store(b"%d" % i, (GPU, KIB))
    assert store.finish(store.reserve(GPU, 3 * KIB)) == []
    assert store.usage(GPU).sealed == KIB
    assert "3 KiB reserved by gpu_memory=" in store.describe_full(GPU, KIB)
    store.reserve(GPU, 0)
    assert store.lease(B, 1, GPU, 3 * KIB)[0] == Granted(B, 1, GPU, 0, 3 * KIB)


def test_a_failed_spill_is_not_tried_again_at_once() -> None:
    store = Books(64 * KIB, gpu=2 * KIB)
    store.store(b"0", (GPU, 2 * KIB))
    move = only(Move, store.lease(B, 1, GPU, KIB))
    assert store.finished(move.job, "failed: a bad day") == []
    assert store.usage(HOST).used == store.usage(GPU).leaving == 0
    store.expire(0.0)
    again = only(Move, store.expire(1.0))
    assert only(Granted, store.finished(again.job)).client == B


def test_a_free_while_it_leaves_takes_effect_when_the_job_ends() -> None:
    store = Books(64 * KIB, gpu=2 * KIB)
    store.store(b"0", (GPU, 2 * KIB))
    move = only(Move, store.lease(B, 1, GPU, KIB))
    assert store.free(b"0") == []
    assert store.usage(GPU).moving == store.usage(HOST).moving == 2 * KIB
    assert granted(store.finished(move.job)).client == B
    assert store.usage(HOST).used == 0


# ---- needs ----------------------------------------------------------------------------------------------------------


def test_a_copy_that_is_there_is_promised_at_once() -> None:
    store = Books(64 * KIB, gpu=2 * KIB)
    store.store(b"0", (GPU, KIB), (HOST, 100))
    found = only(Found, store.need(B, 1, b"0", [(1, HOST), (0, GPU)]))
    assert [(index, part.arena, part.size, part.home) for index, part in found.parts] == [
        (1, HOST, 100, HOST),
        (0, GPU, KIB, GPU),
    ]
    assert store.lease(C, 1, GPU, 2 * KIB) == []
    store.pin(b"0")
    store.mapped(B, 1)
    store.expire(0.0)
    assert store.expire(1.0) == []
    store.pins.pinned.clear()
    assert only(Granted, store.finish(store.expire(2.0))).client == C


def test_copies_are_made_on_peers_and_on_the_host_and_shared() -> None:
    store = Books(64 * KIB, gpu=2 * KIB, peer=2 * KIB)
    store.store(b"0", (GPU, KIB))
    move = only(Move, store.need(B, 1, b"0", [(0, PEER)]))
    assert (move.source, move.target) == ((GPU, 0), (PEER, 0))
    assert store.need(C, 1, b"0", [(0, PEER)], priority=1) == []
    effects = store.finished(move.job)
    assert [(e.client, e.parts[0][1].arena) for e in effects if isinstance(e, Found)] == [(B, PEER), (C, PEER)]
    assert store.moved_bytes["peer"] == KIB
    assert store.usage(PEER).secondary == KIB
    move = only(Move, store.need(B, 2, b"0", [(0, HOST)]))
    assert move.source == (GPU, 0)
    assert store.where(b"0") == [GPU]


def test_secondaries_go_first_and_at_once() -> None:
    store = Books(64 * KIB, gpu=2 * KIB, peer=2 * KIB)
    store.store(b"mine", (PEER, KIB))
    store.store(b"theirs", (GPU, KIB))
    store.finish(store.need(B, 1, b"theirs", [(0, PEER)]))
    store.mapped(B, 1)
    assert granted(store.lease(C, 1, PEER, KIB)).size == KIB
    assert store.where(b"mine") == [PEER]


def test_a_part_comes_back_from_disk_to_its_device() -> None:
    store = Books(4 * KIB, gpu=2 * KIB, peer=2 * KIB)
    store.store(b"0", (GPU, 2 * KIB))
    store.finish(store.lease(B, 1, GPU, 2 * KIB))
    store.store(b"h", (HOST, 2 * KIB))
    store.finish(store.lease(B, 2, HOST, 4 * KIB))
    store.client_died(B)
    assert store.where(b"0") == store.where(b"h") == [DISK]
    read = only(ReadFile, store.need(C, 1, b"0", [(0, GPU)]))
    assert store.usage(GPU).moving == store.usage(HOST).moving == 2 * KIB
    move = only(Move, store.finished(read.job))
    found = only(Found, store.finished(move.job))
    assert found.parts[0][1].arena == GPU
    assert store.usage(HOST).secondary == 2 * KIB, "the host copy is kept, as a secondary"
    store.mapped(C, 1)
    assert granted(store.lease(B, 3, HOST, 4 * KIB)).size == 4 * KIB


def test_what_is_not_there_or_never_fits() -> None:
    store = Books(4 * KIB, gpu=2 * KIB)
    store.store(b"0", (HOST, 3 * KIB))
    store.store(b"1", (GPU, KIB), (GPU, KIB))
    full = only(NotFound, store.need(B, 1, b"0", [(0, GPU)]))
    assert full.kind == "device_full"
    assert "3 KiB" in full.reason
    assert "can never fit" in full.reason
    assert only(NotFound, store.need(B, 2, b"0", [(1, HOST)])).kind == "unknown"
    assert only(NotFound, store.need(B, 3, b"0", [(0, PEER)])).kind == "device_lost"


def test_a_need_that_overtook_its_seal() -> None:
    store = Books(4 * KIB, gpu=2 * KIB)
    assert store.need(B, 1, b"0", [(0, GPU)]) == store.need(C, 1, b"1", [(0, GPU)]) == []
    assert only(Found, store.store(b"0", (GPU, KIB))).client == B
    store.expire(0.0)
    assert store.next_deadline() == 0.5
    assert only(NotFound, store.expire(0.5)).kind == "unknown"


def test_needs_end_at_their_deadline() -> None:
    store = Books(2 * KIB, gpu=2 * KIB)
    store.store(b"h", (HOST, 2 * KIB), slots=False)
    store.store(b"0", (GPU, KIB))
    store.need(B, 1, b"0", [(0, HOST)], deadline=1.0)
    effect = only(NotFound, store.expire(1.0))
    assert effect.kind == "full"
    assert "host_memory" in effect.reason
    store.free(b"h")
    move = only(Move, store.need(B, 2, b"0", [(0, HOST)], deadline=2.0))
    assert store.expire(2.0) == [], "it is on its way"
    due = store.next_deadline()
    assert due is not None and due > 2.0 + needs.MOVE_PATIENCE_S and store.expire(due - 0.1) == []
    assert only(NotFound, store.expire(due)).kind == "failed"
    store.finished(move.job)
    assert store.usage(HOST).secondary == KIB, "what nobody waits for any more is kept while there is room"


def test_a_failed_move_is_tried_again_and_then_told() -> None:
    store = Books(4 * KIB, gpu=2 * KIB)
    store.store(b"0", (GPU, KIB))
    effects = store.need(B, 1, b"0", [(0, HOST)])
    for _ in range(copying.MAX_ATTEMPTS - 1):
        effects = store.finished(only(Move, effects).job, "failed: again")
    effect = only(NotFound, store.finished(only(Move, effects).job, "failed: and again"))
    assert effect.kind == "failed"
    assert "and again" in effect.reason
    assert store.usage(HOST).used == 0


def test_who_comes_first_takes_what_is_held_for_others() -> None:
    """A need that has some of its parts gives way to an older request, so that no two wait for each other."""
    store = Books(64 * KIB, gpu=4 * KIB)
    store.store(b"late", (HOST, 2 * KIB), (HOST, 2 * KIB))
    store.store(b"fixed", (GPU, 2 * KIB), slots=False)
    (move,) = store.need(B, 1, b"late", [(0, GPU), (1, GPU)], priority=1)
    assert isinstance(move, Move)
    assert store.finished(move.job) == []
    assert store.usage(GPU).used == 4 * KIB
    effects = store.lease(C, 1, GPU, 2 * KIB, priority=GET)
    assert only(Granted, effects).client == C
    effects = store.give_back(C, GPU, only(Granted, effects).offset, 2 * KIB) + store.free(b"fixed")
    assert only(Found, store.finish(effects)).client == B


def test_a_need_whose_process_died_wants_nothing() -> None:
    store = Books(4 * KIB, gpu=4 * KIB)
    store.store(b"0", (GPU, KIB), (GPU, KIB))
    store.store(b"h", (HOST, 3 * KIB), slots=False)
    (move,) = store.need(B, 1, b"0", [(0, HOST), (1, HOST)])
    store.need(B, 2, b"0", [(0, GPU)])
    assert store.usage(HOST).waiting == 1
    store.client_died(B)
    assert store.usage(HOST).waiting == 0
    assert isinstance(move, Move)
    assert store.finished(move.job) == []
    assert only(Granted, store.finish(store.lease(C, 1, GPU, 2 * KIB))).client == C


def test_prefetches_take_spare_room_only() -> None:
    store = Books(64 * KIB, gpu=10 * KIB, high=0.8, low=0.5)
    store.store(b"0", (HOST, 2 * KIB))
    store.store(b"1", (HOST, 4 * KIB))
    store.store(b"2", (GPU, 4 * KIB))
    assert store.finish(store.prefetch(b"0", [(0, GPU)])) == []
    assert store.usage(GPU).sealed == 6 * KIB
    assert (
        store.prefetch(b"1", [(0, GPU)]) == store.prefetch(b"1", [(0, PEER)]) == store.prefetch(b"?", [(0, GPU)]) == []
    )
    assert store.usage(GPU).waiting == 1
    assert store.next_deadline() is None
    assert only(Found, store.finish(store.need(B, 1, b"1", [(0, GPU)]))).client == B, "it is made more urgent"


# ---- losses ---------------------------------------------------------------------------------------------------------


def test_a_lost_device_takes_its_copies_and_owners_are_told() -> None:
    store = Books(64 * KIB, gpu=8 * KIB)
    store.store(b"0", (GPU, KIB))
    store.store(b"1", (GPU, KIB), (HOST, 64))
    store.store(b"2", (GPU, KIB), owner=OTHER)
    store.finish(store.need(B, 1, b"2", [(0, HOST)]))
    grant = only(Granted, store.lease(B, 2, GPU, KIB))
    store.lease(B, 3, GPU, 8 * KIB)
    effects = store.remove_arena(GPU, "Xid 79")
    assert only(Lost, effects) == Lost(OWNER, [b"0", b"1"], "Xid 79")
    assert [e for e in effects if isinstance(e, Refused)] == [Refused(B, 3, GPU, "Xid 79", True, True)]
    assert [store.where(i) for i in (b"0", b"1", b"2")] == [[NOWHERE], [NOWHERE, HOST], [HOST]]
    lost = only(NotFound, store.need(C, 1, b"0", [(0, HOST)]))
    assert lost.kind == "lost"
    assert "Xid 79" in lost.reason
    assert only(NotFound, store.need(C, 2, b"2", [(0, GPU)])) == NotFound(C, 2, "device_lost", "Xid 79")
    assert "Xid 79" in refused(store.lease(C, 3, GPU, KIB)).reason
    assert store.give_back(B, GPU, grant.offset, KIB) == []
    assert only(Lost, store.seal(B, b"3", OWNER, [PartCopy(GPU, grant.offset, KIB)])).object_ids == [b"3"]
    store.add_arena(GPU, 8 * KIB, "device GPU-1", 2)
    assert store.give_back(B, GPU, grant.offset, KIB) == []
    assert only(Lost, store.seal(B, b"4", OWNER, [PartCopy(GPU, grant.offset, KIB)])).object_ids == [b"4"]
    assert store.store(b"0", (GPU, KIB)) == []
    assert store.where(b"0") == [GPU]
    assert store.remove_arena(PEER, "was never there") == []


def test_jobs_of_a_lost_device_end_with_it() -> None:
    store = Books(64 * KIB, gpu=4 * KIB, peer=4 * KIB)
    store.store(b"0", (GPU, KIB))
    store.store(b"1", (HOST, KIB))
    store.store(b"2", (GPU, KIB))
    store.finish(store.need(B, 9, b"2", [(0, PEER)]))
    jobs = [
        only(Move, store.need(B, 1, b"0", [(0, HOST)])).job,
        only(Move, store.need(B, 2, b"1", [(0, GPU)])).job,
        only(Move, store.need(B, 3, b"2", [(0, HOST)])).job,
    ]
    effects = store.remove_arena(GPU, "gone")
    assert {(e.request_id, e.kind) for e in effects if isinstance(e, NotFound)} == {(1, "lost"), (2, "device_lost")}
    again = only(Move, effects)
    assert again.source[0] == PEER
    assert [store.finished(job) for job in jobs] == [[], [], []]
    assert only(Found, store.finished(again.job)).request_id == 3


def test_unreadable_pieces_are_lost_but_not_those_nobody_tried_to_read() -> None:
    store = Books(2 * KIB)
    store.store(b"0", (HOST, KIB))
    store.store(b"1", (HOST, KIB))
    write = only(WriteFile, store.lease(B, 1, HOST, 2 * KIB))
    store.finished(write.job)
    store.client_died(B)
    read = only(ReadFile, store.need(C, 1, b"0", [(0, HOST)]))
    read = only(ReadFile, store.finished(read.job, "failed: the store process ended"))
    effects = store.finished(read.job, "corrupt: the checksum is wrong")
    assert only(Lost, effects) == Lost(OWNER, [b"0"], "corrupt: the checksum is wrong")
    assert only(NotFound, effects).kind == "lost"
    assert store.usage(HOST).used == 0
    assert store.free(b"1") == [DeleteFile(write.file)]
    assert store.free(b"0") == []


def test_a_second_execution_makes_a_lost_object_whole() -> None:
    store = Books(64 * KIB, gpu=4 * KIB)
    store.store(b"0", (HOST, KIB), (GPU, KIB))
    store.remove_arena(GPU, "gone")
    store.add_arena(GPU, 4 * KIB, "device GPU-1", 2)
    assert store.store(b"0", (HOST, KIB), (GPU, KIB)) == []
    assert store.where(b"0") == [HOST, GPU]
    assert dict(next(iter(store.objects()))[2]) == {HOST: 2 * KIB, GPU: KIB}
    store.free(b"0")
    assert store.usage(HOST).used == store.usage(GPU).used == 0
    assert len(store.pins.taken) == 0


def test_a_copy_without_a_slot_never_moves() -> None:
    store = Books(64 * KIB, gpu=4 * KIB)
    store.store(b"0", (GPU, 4 * KIB), slots=False)
    assert store.lease(B, 1, GPU, KIB) == []
    assert store.next_deadline() is None
    assert granted(store.free(b"0")).client == B
    store.store(b"1", (GPU, KIB))
    store.pins.free.clear()
    found = only(Found, store.finish(store.need(B, 2, b"1", [(0, HOST)])))
    assert found.parts[0][1].slot == 0


def test_who_comes_later_takes_nothing_that_is_held() -> None:
    store = Books(64 * KIB, gpu=4 * KIB)
    store.store(b"first", (HOST, 2 * KIB), (HOST, 2 * KIB))
    store.store(b"fixed", (GPU, 2 * KIB), slots=False)
    store.finish(store.need(B, 1, b"first", [(0, GPU), (1, GPU)]))
    assert store.finish(store.lease(C, 1, GPU, 2 * KIB)) == []
    assert only(Found, store.finish(store.free(b"fixed"))).client == B
    store.mapped(B, 1)
    store.expire(0.0)
    assert only(Granted, store.finish(store.expire(1.0))).client == C


def on_disk(store: Books, *places: tuple[int, int]) -> None:
    """Store object b"0" of these parts, and have the host's and the devices' copies driven out to disk."""
    store.store(b"0", *places)
    for request, arena in ((90, GPU), (91, HOST)):
        if arena in {place[0] for place in places} | {HOST}:
            store.finish(store.lease(C, request, arena, store.usage(arena).capacity))
    store.client_died(C)
    assert set(store.where(b"0")) == {DISK}


def test_a_restore_that_waits_for_the_host_is_hurried_and_refused_in_the_hosts_name() -> None:
    store = Books(4 * KIB, gpu=4 * KIB)
    on_disk(store, (GPU, KIB))
    store.store(b"fixed", (HOST, 4 * KIB), slots=False)
    assert store.lease(C, 1, HOST, KIB, priority=GET) == []
    assert store.need(B, 1, b"0", [(0, GPU)], priority=1) == []
    assert store.lease(C, 2, HOST, KIB) == []
    assert store.need(B, 2, b"0", [(0, GPU)], priority=GET, deadline=1.0) == []
    refusal = only(NotFound, store.expire(1.0))
    assert (refusal.request_id, refusal.kind) == (2, "full")
    effects = store.free(b"fixed")
    assert [(e.client, e.request_id) for e in effects if isinstance(e, Granted)] == [(C, 1), (C, 2)]
    assert only(Found, store.finish(effects)).request_id == 1


def test_freeing_an_object_ends_its_needs_and_restores() -> None:
    store = Books(4 * KIB, gpu=4 * KIB)
    on_disk(store, (GPU, KIB), (GPU, KIB))
    store.store(b"fixed", (HOST, 3 * KIB), slots=False)
    read = only(ReadFile, store.need(B, 1, b"0", [(0, GPU), (1, GPU)]))
    assert store.usage(HOST).waiting == 1
    effects = store.free(b"0")
    assert only(NotFound, effects).kind == "unknown"
    assert store.usage(HOST).waiting == store.usage(GPU).used == 0
    assert store.finished(read.job) == [DeleteFile(read.file)]
    assert store.usage(HOST).moving == 0


def test_a_prefetch_from_disk_does_not_wait_for_the_host() -> None:
    store = Books(4 * KIB, gpu=4 * KIB)
    on_disk(store, (GPU, KIB))
    assert store.finish(store.prefetch(b"0", [(0, GPU)])) == []
    assert store.where(b"0") == [GPU]
    store.free(b"0")
    on_disk(store, (HOST, KIB))
    store.store(b"fixed", (HOST, 4 * KIB), slots=False)
    assert store.prefetch(b"0", [(0, GPU)]) == []
    assert store.usage(GPU).used == store.usage(HOST).waiting == 0


def test_a_piece_that_cannot_be_read_fails_all_who_wait_for_it() -> None:
    store = Books(4 * KIB, gpu=4 * KIB, peer=4 * KIB)
    on_disk(store, (GPU, KIB))
    read = only(ReadFile, store.need(B, 1, b"0", [(0, GPU)]))
    assert store.need(B, 2, b"0", [(0, PEER)]) == store.need(C, 1, b"0", [(0, HOST)]) == []
    effects = store.finished(read.job, "unreadable: input/output error")
    assert sorted((e.request_id, e.kind) for e in effects if isinstance(e, NotFound)) == [
        (1, "lost"),
        (1, "lost"),
        (2, "lost"),
    ]
    assert all(store.usage(arena).used == 0 for arena in (HOST, GPU, PEER))


def test_a_disk_that_may_take_no_more() -> None:
    store = Books(4 * KIB, disk_limit_bytes=4096)
    on_disk(store, (HOST, KIB))
    store.store(b"1", (HOST, 4 * KIB))
    assert store.lease(B, 1, HOST, KIB, deadline=1.0) == []
    reason = refused(store.expire(1.0)).reason
    assert "the disk holds 4 KiB of at most 4 KiB" in reason
    assert store.lease(B, 2, HOST, KIB) == []
    effects = store.free(b"0")
    assert [type(effect) for effect in effects] == [DeleteFile, WriteFile]
    assert only(Granted, store.finish(effects)).client == B


def test_files_are_bounded() -> None:
    store = Books(200 << 20)
    for i in range(3):
        store.store(b"%d" % i, (HOST, 40 << 20))
    store.store(b"big", (HOST, 80 << 20))
    first, second = store.lease(B, 1, HOST, 200 << 20)
    assert isinstance(first, WriteFile)
    assert isinstance(second, WriteFile)
    assert len(first.pieces) == len(second.pieces) == 1
    effects = store.finish([first, second])
    assert only(Granted, effects).client == B
    assert store.usage(DISK).used == 200 << 20


def test_a_copy_of_a_second_execution_goes_with_its_device() -> None:
    store = Books(64 * KIB, gpu=4 * KIB)
    store.store(b"0", (HOST, KIB))
    store.store(b"0", (GPU, KIB))
    assert dict(next(iter(store.objects()))[2]) == {HOST: KIB, GPU: KIB}
    assert store.remove_arena(GPU, "gone") == []
    assert dict(next(iter(store.objects()))[2]) == {HOST: KIB}
    store.free(b"0")
    assert not store.pins.taken
