"""Work on values that are together four times larger than the device: what has no room moves to the host, then to disk.

Nothing in this program says where a value is. Blocks are made on the device; when it fills up, the store moves those that
were not needed lately to host memory, and from there to files. A task that takes a block gets it on its device again. Blocks
are read in order, pass after pass, which is the hardest case: what comes next is always what was used longest ago.

By default the device is a small emulated one, and the host store so small that a good part goes to disk. Try another
`--host-memory`: with 512MiB nothing is written to disk.

    python examples/working_set.py [--devices emulated:1:64MiB] [--host-memory 96MiB] [--times 4] [--passes 3]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from typing import Any

from reporting import Moved, positive, run
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

import afield
from afield.units import format_bytes

DEVICES = "emulated:1:64MiB"
BLOCKS_PER_DEVICE = 16
ITEM_BYTES = 4

MOVES = {"device_to_host": "to host", "host_to_device": "to device", "disk_write": "to disk", "disk_read": "from disk"}
TIERS = ["device", "host", "disk"]


@afield.remote(num_gpus=1)
def make(number: int, items: int) -> Any:
    """Make a block: the numbers from `number` on."""
    xp = afield.array_module()
    return xp.arange(number, number + items, dtype="int32")


@afield.remote(num_gpus=1)
def check(block: Any, number: int) -> bool:
    """Read a whole block; return whether it is what `make` made."""
    xp = afield.array_module()
    return bool((block == xp.arange(number, number + len(block), dtype="int32")).all())


def where(size: int) -> list[str]:
    """Return how many values of `size` bytes or more have a copy on a device, on the host and on disk."""
    tiers: Counter[str] = Counter()
    for entry in afield.memory():
        if entry.size >= size:
            tiers.update({tier.split()[0] for tier in entry.tier.split("+")})  # "device 0+host"
    return [str(tiers[tier]) for tier in TIERS]


def work(options: argparse.Namespace, console: Console) -> int:
    """Make the blocks, read them in passes, print what moved; return 1 if a block was wrong."""
    capacity = afield.array_module().cuda.Device(0).mem_info[1]
    items = capacity // BLOCKS_PER_DEVICE // ITEM_BYTES
    count = options.times * BLOCKS_PER_DEVICE
    size = items * ITEM_BYTES
    print(f"{count} blocks of {format_bytes(size)}: {options.times} times a device of {format_bytes(capacity)}")
    blocks: list[afield.ObjectRef] = []
    wrong = 0
    rows = []
    for number in range(options.passes + 1):
        name = f"pass {number}" if number else "make"
        moved = Moved()
        started = time.perf_counter()
        if number:
            answers = [check.remote(block, at) for at, block in enumerate(blocks)]
        else:
            answers = blocks = [make.remote(at, items) for at in range(count)]
        for answer in track(answers, name, console=console, disable=not console.is_terminal, transient=True):
            afield.wait([answer])
        if number:
            wrong += sum(not right for right in afield.get(answers))
        seconds = time.perf_counter() - started
        bytes_moved = moved.bytes()
        figures = [f"{bytes_moved[kind] / 2**20:.0f}" for kind in MOVES]
        rows.append([name, f"{seconds:.2f}", *figures, *where(size)])
    show_table(["", "seconds", *MOVES.values(), *TIERS], rows, console)
    print("What moved, in MiB, and how many blocks have a copy in which tier afterwards.")
    print("All blocks are right." if not wrong else f"{wrong} blocks are WRONG.")
    return 1 if wrong else 0


def show_table(heads: list[str], rows: list[list[str]], console: Console) -> None:
    """Print a table, or lines in columns where there is no terminal."""
    if console.is_terminal:
        table = Table(*heads, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    for row in [heads, *rows]:
        print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))


def main() -> int:
    """Run the example as a program."""
    parser = argparse.ArgumentParser(description="Work on values that do not fit on the device, with afield.")
    parser.add_argument("--devices", default=DEVICES, help=f"default: {DEVICES}; AFIELD_DEVICES is not looked at")
    parser.add_argument(
        "--host-memory", default="96MiB", help="room in host memory, default: 96MiB; the rest goes to disk"
    )
    parser.add_argument("--times", type=positive, default=4, help="size of all blocks, in devices")
    parser.add_argument("--passes", type=positive, default=3)
    return run(parser, work)


if __name__ == "__main__":
    sys.exit(main())
