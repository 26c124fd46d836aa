"""What references cost: `python -m benchmarks.references [--objects N] [--borrowers N] [--refs N] [--json FILE]`.

Three parts. The ownership table alone: many objects, lent to many borrowers in turn, and one object lent to all of them at
once; printed are bytes for each object and each borrower, and microseconds for each `Add` and `Release`. Then a real driver:
refs made and dropped by the million, and what is left of them in memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from pathlib import Path

import afield
from afield.runtime.cores.ownership import OwnershipTable
from afield.runtime.wire.messages import INLINE, Add

#: Each borrower holds this many objects at a time.
HELD_AT_ONCE = 1000
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """Return the resident set of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def name(kind: bytes, index: int) -> bytes:
    """Return a distinct id of the length that real ones have."""
    return kind + index.to_bytes(7, "big")


def lend_in_turn(objects: int, borrowers: int) -> dict[str, float]:
    """Lend each of `borrowers` a thousand of `objects` for a moment; measure the table."""
    table = OwnershipTable(b"owner---", lambda owner: b"")
    before = resident_bytes()
    ids = [b"object-------" + index.to_bytes(7, "big") for index in range(objects)]
    ids_bytes = resident_bytes() - before
    for object_id in ids:
        table.put(object_id, INLINE, b"")
    bytes_per_object = (resident_bytes() - before - ids_bytes) / objects
    peak = 0
    started = time.perf_counter()
    events = 0
    for index in range(borrowers):
        borrower = name(b"b", index)
        start = index * HELD_AT_ONCE % objects
        held = ids[start : start + HELD_AT_ONCE]
        for object_id in held:
            table.on_add(borrower, Add(object_id, 1))
        if index % 1000 == 0:
            peak = max(peak, resident_bytes())
        for object_id in held:
            table.on_release(borrower, object_id)
        events += 2 * len(held)
        table.effects.clear()
    elapsed_s = time.perf_counter() - started
    gc.collect()
    left = (resident_bytes() - before - ids_bytes) / objects
    for object_id in ids:
        table.drop(object_id)
    assert not table.entries
    return {
        "objects": objects,
        "borrowers": borrowers,
        "bytes_per_object": bytes_per_object,
        "bytes_per_object_at_peak": (peak - before - ids_bytes) / objects,
        "bytes_per_object_after_all_borrowers": left,
        "us_per_add_or_release": elapsed_s / events * 1e6,
    }


def lend_to_all(borrowers: int) -> dict[str, float]:
    """Lend one object to all borrowers at once; measure each."""
    table = OwnershipTable(b"owner---", lambda owner: b"")
    table.put(b"object", INLINE, b"")
    before = resident_bytes()
    for index in range(borrowers):
        table.on_add(name(b"b", index), Add(b"object", 1))
        table.effects.clear()
    per_borrower = (resident_bytes() - before) / borrowers
    for index in range(borrowers):
        table.on_release(name(b"b", index), b"object")
    table.drop(b"object")
    assert not table.entries
    return {"borrowers_of_one_object": borrowers, "bytes_per_borrower": per_borrower}


def make_and_drop(refs: int) -> dict[str, float]:
    """Make and drop refs in a real driver; what is left must not grow with their number."""
    afield.init(num_cpus=1)
    try:

        def round_of(count: int) -> None:
            batch = [afield.put(index) for index in range(count)]
            del batch

        round_of(min(refs, 100_000))  # warm: pools of the allocator
        gc.collect()
        before = resident_bytes()
        started = time.perf_counter()
        for _ in range(max(1, refs // 100_000)):
            round_of(min(refs, 100_000))
        elapsed_s = time.perf_counter() - started
        gc.collect()
        return {
            "refs": refs,
            "driver_grew_mb": (resident_bytes() - before) / 1e6,
            "us_per_ref": elapsed_s / refs * 1e6,
        }
    finally:
        afield.shutdown()


def main() -> None:
    """Run all parts and print them."""
    parser = argparse.ArgumentParser(description="what references cost")
    parser.add_argument("--objects", type=int, default=100_000)
    parser.add_argument("--borrowers", type=int, default=10_000)
    parser.add_argument("--refs", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = (
        lend_in_turn(options.objects, options.borrowers) | lend_to_all(options.borrowers) | make_and_drop(options.refs)
    )
    for key, value in results.items():
        print(f"{key:40} {value:>14,.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
