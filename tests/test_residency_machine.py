"""The books of all tiers against a memory of units: whatever happens, in any order, no byte is overwritten that somebody reads.

The memory of each arena and each spill file is modelled as units that hold a mark: who writes there, which job fills it, or
which part of which object it is. Grants, moves, writes and reads do to the marks what the real ones do to bytes, as late as
they may, and readers look at the marks: of what they have pinned after each step, and of what they find.
"""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from afield.gpu_store.books.disk_books import padded
from afield.gpu_store.books.residency import Residency
from afield.gpu_store.tiers import (
    ARGUMENT,
    DISK,
    GET,
    HOST,
    NOWHERE,
    SPARE,
    Collect,
    DeleteFile,
    Effect,
    Found,
    Granted,
    Lost,
    Move,
    NotFound,
    PartCopy,
    ReadFile,
    Refused,
    Trim,
    WriteFile,
)
from tests.store_books import FakePins

UNIT = 64
UNITS = {HOST: 40, 1: 24, 2: 16}
CLIENTS = st.sampled_from([b"A", b"B", b"C"])
IDS = st.sampled_from([b"o%d" % i for i in range(10)])
OWNERS = st.sampled_from([b"X", b"Y"])
ARENAS = st.sampled_from([HOST, 1, 1, 2])
Mark = Any


def layout(object_id: bytes) -> list[int]:
    """Tasks are deterministic: an object has the same parts, in units, whenever it is made."""
    number = int(object_id[1:])
    return [1 + (number + i) % 4 for i in range(1 + number % 3)]


class ManyTiers(RuleBasedStateMachine):
    """What processes, store processes and devices do."""

    def __init__(self) -> None:
        super().__init__()
        self.pins = FakePins()
        self.books = Residency(UNITS[HOST] * UNIT, self.pins, device_alignment=UNIT)
        self.memory: dict[int, list[Mark]] = {HOST: [None] * UNITS[HOST]}
        self.files: dict[int, dict[int, Mark]] = {}
        self.jobs: dict[int, Move | WriteFile | ReadFile] = {}
        self.leased: dict[bytes, dict[tuple[int, int], int]] = {}  # client -> (arena, unit) -> of which grant
        self.asked: dict[tuple[bytes, int], list[tuple[int, int]] | None] = {}
        self.objects: set[bytes] = set()
        self.wanted: dict[tuple[bytes, int], bytes] = {}  # need -> object
        self.promised: dict[tuple[bytes, int], list[PartCopy]] = {}
        self.readers: list[tuple[bytes, PartCopy, Mark]] = []
        self.lives = {HOST: 1}
        self.late: dict[bytes, list[tuple[int, int, int]]] = {}  # client -> (arena, unit, life) that it had leased
        self.may_lose = False
        self.spares: set[bytes] = set()
        self.request = 0
        self.now = 0.0

    @initialize(reserved=st.sampled_from([0, 0, 8]), slots=st.sampled_from([1 << 10, 1 << 10, 12]))
    def devices(self, reserved: int, slots: int) -> None:
        self.pins.free = list(range(slots, 0, -1))
        for arena in (1, 2):
            self.add(arena)
        self.apply(self.books.reserve(2, reserved * UNIT))

    def add(self, arena: int) -> None:
        self.memory[arena] = [None] * UNITS[arena]
        life = self.lives[arena] = self.lives.get(arena, 0) + 1
        self.apply(self.books.add_arena(arena, UNITS[arena] * UNIT, f"device {arena}", life))

    # -- memory ---------------------------------------------------------------------------------------------------

    def span(self, arena: int, offset: int, size: int) -> range:
        start, rest = divmod(offset, UNIT)
        assert rest == 0
        assert 0 <= start <= start - (-size // UNIT) <= UNITS[arena]
        return range(start, start - (-size // UNIT))

    def fill(self, arena: int, offset: int, size: int, mark: Mark) -> None:
        for unit in self.span(arena, offset, size):
            self.memory[arena][unit] = mark

    def look(self, arena: int, offset: int, size: int) -> Mark:
        (mark,) = {self.memory[arena][unit] for unit in self.span(arena, offset, size)}
        return mark

    # -- effects --------------------------------------------------------------------------------------------------

    def apply(self, effects: list[Effect]) -> None:
        for effect in effects:
            getattr(self, "on_" + type(effect).__name__.lower())(effect)

    def on_granted(self, effect: Granted) -> None:
        assert self.asked.pop((effect.client, effect.request_id)) is None
        assert effect.life == self.lives[effect.arena]
        self.fill(effect.arena, effect.offset, effect.size, ("written by", effect.client))
        units = {(effect.arena, unit) for unit in self.span(effect.arena, effect.offset, effect.size)}
        assert not any(units & set(held) for held in self.leased.values())
        self.leased.setdefault(effect.client, {}).update(dict.fromkeys(units, effect.request_id))

    def on_refused(self, effect: Refused) -> None:
        assert self.asked.pop((effect.client, effect.request_id)) is None

    def on_found(self, effect: Found) -> None:
        request = effect.client, effect.request_id
        wants = self.asked.pop(request)
        assert wants is not None
        assert [(index, part.arena) for index, part in effect.parts] == list(dict.fromkeys(wants))
        object_id = self.wanted.pop(request)
        for index, part in effect.parts:
            assert self.look(part.arena, part.offset, part.size) == (object_id, index)
            assert part.life == self.lives[part.arena]
            assert not part.slot or self.pins.open[part.slot] == part.serial
        self.promised[request] = [part for _, part in effect.parts]

    def on_notfound(self, effect: NotFound) -> None:
        assert self.asked.pop((effect.client, effect.request_id)) is not None
        object_id = self.wanted.pop((effect.client, effect.request_id))
        if effect.kind == "lost":
            parts = self.books.parts(object_id)
            assert parts is not None
            assert NOWHERE in [part.arena for part in parts]

    def on_move(self, effect: Move) -> None:
        assert self.look(*effect.source, effect.size)[0] in self.objects
        self.fill(*effect.target, effect.size, ("job", effect.job))
        self.jobs[effect.job] = effect

    def on_writefile(self, effect: WriteFile) -> None:
        assert effect.file not in self.files
        end = 0
        for offset, size, at in effect.pieces:
            assert at == end
            end += padded(size)
            assert self.look(HOST, offset, size)[0] in self.objects
        self.jobs[effect.job] = effect

    def on_readfile(self, effect: ReadFile) -> None:
        assert effect.file_offset in self.files[effect.file]
        self.fill(HOST, effect.host_offset, effect.size, ("job", effect.job))
        self.jobs[effect.job] = effect

    def on_deletefile(self, effect: DeleteFile) -> None:
        assert not [job for job in self.jobs.values() if not isinstance(job, Move) and job.file == effect.file]
        self.files.pop(effect.file, None)

    def on_lost(self, effect: Lost) -> None:
        assert self.may_lose or (effect.kind == SPARE and self.spares.issuperset(effect.object_ids))
        assert set(effect.object_ids) <= self.objects

    def on_trim(self, effect: Trim) -> None:
        pass

    def on_collect(self, effect: Collect) -> None:
        pass

    # -- processes ------------------------------------------------------------------------------------------------

    def new_request(self, client: bytes, wants: list[tuple[int, int]] | None) -> int:
        self.request += 1
        self.asked[client, self.request] = wants
        return self.request

    @rule(
        client=CLIENTS,
        arena=ARENAS,
        units=st.sampled_from([1, 2, 3, 5, 8, 20]),
        priority=st.sampled_from([GET, ARGUMENT]),
        block=st.booleans(),
        patience=st.none() | st.integers(0, 5),
    )
    def lease(self, client: bytes, arena: int, units: int, priority: int, block: bool, patience: int | None) -> None:
        request = self.new_request(client, None)
        deadline = None if patience is None else self.now + patience
        self.apply(
            self.books.lease(client, request, arena, units * UNIT, priority=priority, block=block, deadline=deadline)
        )
        assert block or (client, request) not in self.asked

    @rule(client=CLIENTS, object_id=IDS, owner=OWNERS, data=st.data())
    def seal(self, client: bytes, object_id: bytes, owner: bytes, data: st.DataObject) -> None:
        places: list[tuple[int, int, int]] = []
        left = dict(self.leased.get(client, {}))
        for index, units in enumerate(layout(object_id)):
            spans = [[(arena, at + i) for i in range(units)] for arena, at in sorted(left)]
            spans = [span for span in spans if all(left.get(place) == left[span[0]] for place in span)]
            if not spans:
                return
            span = data.draw(st.sampled_from(spans))
            for place in span:
                del left[place]
            places.append((*span[0], units * UNIT - index))
        self.leased[client] = left
        self.seal_places(client, object_id, owner, places)

    @rule(client=CLIENTS, object_id=IDS, owner=OWNERS, arenas=st.lists(ARENAS, min_size=3, max_size=3))
    def store(self, client: bytes, object_id: bytes, owner: bytes, arenas: list[int]) -> None:
        """What most tasks do: each part gets an extent of its own."""
        places: list[tuple[int, int, int]] = []
        for index, units in enumerate(layout(object_id)):
            self.request += 1
            self.asked[client, self.request] = None
            self.apply(self.books.lease(client, self.request, arenas[index], units * UNIT, block=False))
            span = sorted(place for place, grant in self.leased.get(client, {}).items() if grant == self.request)
            if not span:
                return
            places.append((*span[0], units * UNIT - index))
        for (arena, at, _), units in zip(places, layout(object_id), strict=True):
            for unit in range(at, at + units):
                del self.leased[client][arena, unit]
        self.seal_places(client, object_id, owner, places)

    def seal_places(self, client: bytes, object_id: bytes, owner: bytes, places: list[tuple[int, int, int]]) -> None:
        parts: list[PartCopy] = []
        for index, (arena, at, size) in enumerate(places):
            self.fill(arena, at * UNIT, size, (object_id, index))
            slot, serial = self.pins.take()
            if slot:
                self.pins.publish(slot, serial)
            parts.append(PartCopy(arena, at * UNIT, size, slot, serial, arena, self.lives[arena]))
        self.objects.add(object_id)
        effects = self.books.seal(client, object_id, owner, parts)
        if self.books.parts(object_id) is None:
            self.objects.discard(object_id)  # it was freed before
        self.apply(effects)

    @rule(client=CLIENTS, data=st.data())
    def give_back(self, client: bytes, data: st.DataObject) -> None:
        held = sorted(self.leased.get(client, ()))
        if held:
            arena, unit = data.draw(st.sampled_from(held))
            del self.leased[client][arena, unit]
            self.apply(self.books.give_back(client, arena, unit * UNIT, UNIT, self.lives[arena]))

    @rule(object_id=IDS, early=st.sampled_from([False, False, False, True]))
    def free(self, object_id: bytes, early: bool) -> None:
        if any(mark[0] == object_id for _, _, mark in self.readers) or (object_id not in self.objects and not early):
            return
        effects = self.books.free(object_id)
        self.apply(effects)
        self.objects.discard(object_id)

    @rule(
        client=CLIENTS,
        priority=st.sampled_from([GET, ARGUMENT]),
        patience=st.none() | st.integers(1, 5),
        data=st.data(),
    )
    def need(self, client: bytes, priority: int, patience: int | None, data: st.DataObject) -> None:
        object_id = data.draw(st.sampled_from([*sorted(self.objects), b"o0"]))
        indices = range(len(layout(object_id)))
        wants = data.draw(st.lists(st.tuples(st.sampled_from(indices), ARENAS), min_size=1, max_size=3))
        request = self.new_request(client, wants)
        self.wanted[client, request] = object_id
        deadline = None if patience is None else self.now + patience
        self.apply(self.books.need(client, request, object_id, wants, priority=priority, deadline=deadline))

    @precondition(lambda self: self.promised)
    @rule(data=st.data(), pin=st.booleans())
    def mapped(self, data: st.DataObject, pin: bool) -> None:
        client, request = data.draw(st.sampled_from(sorted(self.promised)))
        for part in self.promised.pop((client, request)):
            if pin and self.memory.get(part.arena) and self.pins.open.get(part.slot) == part.serial:
                self.pin(client, part)
        self.apply(self.books.mapped(client, request))

    @rule(client=CLIENTS, object_id=IDS)
    def read_by_hint(self, client: bytes, object_id: bytes) -> None:
        for part in self.books.parts(object_id) or []:
            if part.slot and self.pins.open.get(part.slot) == part.serial:
                self.pin(client, part)

    def pin(self, client: bytes, part: PartCopy) -> None:
        mark = self.look(part.arena, part.offset, part.size)
        if mark[0] in self.objects:  # whoever reads it keeps it from being freed
            self.pins.pinned[part.slot] = self.pins.pinned.get(part.slot, 0) + 1
            self.readers.append((client, part, mark))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        self.drop_reader(data.draw(st.integers(0, len(self.readers) - 1)))

    def drop_reader(self, at: int) -> None:
        _, part, _ = self.readers.pop(at)
        self.pins.pinned[part.slot] -= 1

    @rule(object_id=IDS, spare=st.booleans())
    def only_lineage_needs_it(self, object_id: bytes, spare: bool) -> None:
        stored = self.books._catalogue.objects.get(object_id)
        if stored is not None:
            (self.spares.add if spare else self.spares.discard)(object_id)
            self.apply(self.books.set_spare(stored.owner, [object_id], spare))

    @rule(object_id=IDS, index=st.integers(0, 3), arena=ARENAS)
    def prefetch(self, object_id: bytes, index: int, arena: int) -> None:
        self.apply(self.books.prefetch(object_id, [(index, arena)]))

    @rule(client=CLIENTS, luck=st.sampled_from([0, 1, 2]))
    def client_dies(self, client: bytes, luck: int) -> None:
        if luck != 2:
            return
        for at in [at for at, reader in enumerate(self.readers) if reader[0] == client][::-1]:
            self.drop_reader(at)
        self.asked = {request: wants for request, wants in self.asked.items() if request[0] != client}
        self.wanted = {request: wanted for request, wanted in self.wanted.items() if request[0] != client}
        self.promised = {request: parts for request, parts in self.promised.items() if request[0] != client}
        self.leased.pop(client, None)
        self.apply(self.books.client_died(client))

    # -- stores and devices ---------------------------------------------------------------------------------------

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), fault=st.sampled_from(["", "", "", "", "", "failed: x", "corrupt: x"]))
    def job_ends(self, data: st.DataObject, fault: str) -> None:
        self.end_job(data.draw(st.sampled_from(sorted(self.jobs))), fault)

    def end_job(self, number: int, fault: str = "") -> None:
        job = self.jobs.pop(number)
        if isinstance(job, Move):
            mark = self.look(*job.source, job.size)
            assert mark[0] != "job"
            assert self.look(*job.target, job.size) == ("job", number)
            self.fill(*job.target, job.size, "half a copy" if fault else mark)
        elif isinstance(job, WriteFile):
            if not fault:
                self.files[job.file] = {at: self.look(HOST, offset, size) for offset, size, at in job.pieces}
        else:
            assert self.look(HOST, job.host_offset, job.size) == ("job", number)
            mark = "half a copy" if fault else self.files[job.file][job.file_offset]
            self.fill(HOST, job.host_offset, job.size, mark)
        self.may_lose = isinstance(job, ReadFile) and fault.startswith("corrupt")
        self.apply(self.books.finished(number, fault))
        self.may_lose = False

    @rule(arena=st.sampled_from([1, 2]), luck=st.sampled_from([0, 1, 2, 3, 4, 5]))
    def device_is_lost(self, arena: int, luck: int) -> None:
        if luck != 5:
            return
        for at in [at for at, reader in enumerate(self.readers) if reader[1].arena == arena][::-1]:
            self.drop_reader(at)
        for number, job in list(self.jobs.items()):
            if isinstance(job, Move) and arena in (job.source[0], job.target[0]):
                del self.jobs[number]
        for client, held in self.leased.items():
            for place in [place for place in held if place[0] == arena]:
                del held[place]
                self.late.setdefault(client, []).append((*place, self.lives[arena]))
        del self.memory[arena]
        self.may_lose = True
        self.apply(self.books.remove_arena(arena, "it fell off the bus"))
        self.may_lose = False
        self.add(arena)

    @precondition(lambda self: any(self.late.values()))
    @rule(data=st.data(), object_id=IDS, seals=st.booleans())
    def a_word_of_an_earlier_life(self, data: st.DataObject, object_id: bytes, seals: bool) -> None:
        """Who speaks of memory that went with a device changes nothing in what has the same place now."""
        client = data.draw(st.sampled_from(sorted(client for client, places in self.late.items() if places)))
        arena, unit, life = self.late[client].pop()
        if not seals:
            assert self.books.give_back(client, arena, unit * UNIT, UNIT, life) == []
        elif object_id not in self.objects and len(layout(object_id)) == 1:
            self.objects.add(object_id)
            self.may_lose = True
            part = PartCopy(arena, unit * UNIT, UNIT, 0, 0, arena, life)
            effects = self.books.seal(client, object_id, b"late", [part])
            self.apply(effects)
            self.may_lose = False
            parts = self.books.parts(object_id)
            if parts is None:
                self.objects.discard(object_id)  # it was freed before
            else:
                assert [copy.arena for copy in parts] == [NOWHERE]

    @rule(step=st.sampled_from([0.0, 0.1, 1.0, 3.0]))
    def time_passes(self, step: float) -> None:
        self.now += step
        self.apply(self.books.expire(self.now))

    @rule(object_id=IDS, owner=OWNERS)
    def change_owner(self, object_id: bytes, owner: bytes) -> None:
        """As when its task ran again for another process."""
        stored = self.books._catalogue.objects.get(object_id)
        if stored is not None:
            self.books._catalogue._set_owner(stored, owner)

    # -- what holds -----------------------------------------------------------------------------------------------

    @invariant()
    def readers_see_what_they_read(self) -> None:
        for _, part, mark in self.readers:
            assert self.pins.open[part.slot] == part.serial
            assert self.look(part.arena, part.offset, part.size) == mark

    @invariant()
    def the_books_have_no_complaints(self) -> None:
        assert self.books.validate() == []

    @invariant()
    def every_byte_is_accounted_for(self) -> None:
        inside = self.books._catalogue
        for arena in self.memory:
            books = self.books._arenas[arena]
            usage = self.books.usage(arena)
            assert usage.used == usage.leased + usage.sealed + usage.moving <= usage.capacity
            assert usage.leased == UNIT * sum(place[0] == arena for held in self.leased.values() for place in held)
            places = [(copy.offset, copy.room) for copy in books.copies()]
            places += [(making.offset, making.room) for making in books.makings if making.offset >= 0]
            places += [
                (job.making.offset, job.making.room)
                for job in self.books._copying.jobs.values()
                if job.making is not None and job.making.state == "void" and job.making.arena == arena
            ]
            units = [(arena, unit) for place in places for unit in self.span(arena, *place)]
            units += [place for held in self.leased.values() for place in held if place[0] == arena]
            assert len(units) == len(set(units)) == usage.used // UNIT
            assert usage.leaving == sum(copy.room for copy in books.leaving)
            assert all(copy.arena == arena for copy in books.copies())
        assert set(inside.objects) == self.objects
        assert set(self.books._copying.jobs) == set(self.jobs)

    @invariant()
    def no_part_is_nowhere_unless_it_was_lost(self) -> None:
        for stored in self.books._catalogue.objects.values():
            for part in stored.parts:
                assert bool(part.lost) == (not part.copies and part.disk is None)
                for copy in part.copies.values():
                    assert self.look(copy.arena, copy.offset, part.size) == (stored.id, part.index)
                if part.disk is not None:
                    assert self.files[part.disk.file][part.disk.offset] == (stored.id, part.index)

    @invariant()
    def nobody_waits_who_fits(self) -> None:
        for arena in self.memory:
            books = self.books._arenas[arena]
            head = books.queue.head
            if head is not None and head.key[0] <= ARGUMENT:
                assert head.room > books.extents.largest_free
        assert not self.books._catalogue.ready

    def teardown(self) -> None:
        """Without faults all is served that can be; and when all is freed, nothing is left."""
        movable = all(not books.fixed for books in self.books._arenas.values()) and len(self.pins.free) > 100
        while self.readers:
            self.drop_reader(0)
        for client in list(self.leased):
            for arena, unit in sorted(self.leased.pop(client)):
                self.apply(self.books.give_back(client, arena, unit * UNIT, UNIT, self.lives[arena]))
        rounds = 0
        while (self.jobs or self.promised or self.leased or self.asked) and rounds < 200:
            rounds += 1
            for request in list(self.promised):
                self.apply(self.books.mapped(*request))
                del self.promised[request]
            for number in list(self.jobs):
                if number in self.jobs:
                    self.end_job(number)
            for client in list(self.leased):
                for arena, unit in sorted(self.leased.pop(client)):
                    self.apply(self.books.give_back(client, arena, unit * UNIT, UNIT, self.lives[arena]))
            self.now += 0.4
            self.apply(self.books.expire(self.now))
        assert not self.jobs
        assert not (movable and self.asked), "somebody waits forever"
        for object_id in list(self.objects):
            self.apply(self.books.free(object_id))
        self.objects.clear()
        for client in (b"A", b"B", b"C"):
            self.client_dies(client, 2)
        for number in list(self.jobs):
            self.end_job(number)
        for arena in self.memory:
            usage = self.books.usage(arena)
            assert (usage.used, usage.sealed, usage.moving, usage.waiting, usage.leaving) == (0, 0, 0, 0, 0)
            assert not self.books._arenas[arena].makings
            assert not self.books._arenas[arena].owners
        assert self.books.usage(DISK).used == 0
        assert not self.files
        assert not self.pins.taken
        assert not self.books._copying.prefetches
        assert not self.books._catalogue.owners


TestManyTiers = ManyTiers.TestCase
TestManyTiers.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
