"""The books of lineage: what its core keeps, and whether that is right; `lineage` alone writes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice

from afield.machines import FlightRecorder
from afield.runtime.cores.entries import MOST_VALIDATED
from afield.runtime.cores.lineage_records import ASKED, NOT, STARTED, Explain, Loss, Record
from afield.runtime.cores.objects import PENDING
from afield.runtime.cores.ownership import OwnershipTable


class LineageBooks:
    """What `Lineage` keeps."""

    def __init__(self, table: OwnershipTable, limit_bytes: int, explain: Explain, value_bytes: int | None) -> None:
        self.table = table
        self.limit_bytes = limit_bytes
        self.value_bytes = limit_bytes if value_bytes is None else min(value_bytes, limit_bytes)
        self.bytes = 0
        self.kept_bytes = 0  # of them, those of values
        self.inputs: dict[bytes, int] = {}
        self.recorder = FlightRecorder()
        self._explain = explain
        self._known = table.lineage_knows
        self._records: dict[bytes, Record] = {}  # output -> what it was made from
        self._count = 0
        self._by_age: dict[int, Record] = {}  # the records that can run again, oldest first
        self._users: dict[
            bytes, dict[int, Record]
        ] = {}  # input -> the records that can run again and take it, by number
        self._kept: dict[bytes, int] = {}  # held by lineage alone -> bytes of its value
        self._dearest: list[
            tuple[int, int, bytes]
        ] = []  # heap of (-bytes, age, object) with all in `_kept`, and old ones
        self._remains: set[bytes] = set()  # lost, and not freed: the store has what is left of them
        self._early: dict[bytes, Loss] = {}
        #: Objects that have failed for now, or are about to: see the module's docstring.
        self.postponed: set[bytes] = set()
        self._doomed: list[Record] = []
        self._dropping = False
        self._limiting = False

    # -- the books are right -------------------------------------------------------------------------------------

    def validate(self) -> list[str]:
        """Return what is wrong with the records; nothing, if all is well. For the moments between transitions."""
        records = list(islice(self._by_age.values(), MOST_VALIDATED))
        complaints = [f"record {record.number} {text}" for record in records for text in self._complaints(record)]
        if len(records) == len(self._by_age):
            inputs = Counter(each for record in records for each in record.inputs)
            users = {(each, record.number) for record in records for each in record.inputs}
            if users != {(each, number) for each, found in self._users.items() for number in found}:
                complaints.append("the records and what they take do not know each other")
            if inputs != self.inputs:
                complaints.append(f"the records hold {_shown(inputs)}, and {_shown(self.inputs)} is held")
            size = sum(record.size for record in records) + sum(self._kept.values())
            if size != self.bytes:
                complaints.append(f"the records and what they keep take {size} bytes, and {self.bytes} are counted")
            if sum(self._kept.values()) != self.kept_bytes:
                complaints.append(
                    f"the values kept take {sum(self._kept.values())} bytes, and {self.kept_bytes} are counted"
                )
        for what, object_ids in (("held", self.inputs), ("made by a record", self._records), ("lost", self._early)):
            for object_id in islice(object_ids, MOST_VALIDATED):
                if object_id not in self.table.entries or object_id not in self._known:
                    complaints.append(f"{object_id.hex()} is {what}, and the table does not know it")
        for object_id in [*islice(self._kept, MOST_VALIDATED), *self._unheld()]:
            if object_id not in self.inputs:
                complaints.append(f"{object_id.hex()} is there for the sake of lineage, and no record holds it")
        for output, record in islice(self._records.items(), MOST_VALIDATED):
            entry = self.table.entries.get(output)
            if entry is not None and entry.state == PENDING and not record.running:
                complaints.append(f"{output.hex()} is pending, and its record does not run")
        return complaints

    def _complaints(self, record: Record) -> Iterator[str]:
        """Say what is wrong with a record that can run again."""
        if record.left < -1 or record.running not in (NOT, ASKED, STARTED) or record.refused:
            yield f"may run {record.left} times, state {record.running}, refused {record.refused!r}"
        if not record.outputs and not record.running:
            yield "is kept for no output"
        for output in record.outputs:
            if self._records.get(output) is not record:
                yield f"makes {output.hex()}, which another record makes, or none"

    def _unheld(self) -> Iterator[bytes]:
        """Return the objects whose entries are there for the sake of lineage alone."""
        for object_id in islice(self._known, MOST_VALIDATED):
            entry = self.table.entries.get(object_id)
            if entry is not None and entry.state != PENDING and not (entry.handles or entry.pins or entry.borrowers):
                yield object_id


def _shown(counts: Mapping[bytes, int]) -> str:
    return ", ".join(f"{each.hex()} x{count}" for each, count in sorted(counts.items())) or "nothing"
