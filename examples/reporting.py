"""What the examples share and what is not their subject: the start of the runtime, bytes by kind, tables, exit statuses.

A table is drawn on a terminal. Elsewhere it is lines of "name  figure", which other programs can read.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.table import Table

import afield

# The counters of `afield.stats()` that count bytes, and what they mean.
KINDS = {
    "device_bytes_shared": "read in place, on devices",
    "device_bytes_born": "made in place, on devices",
    "device_bytes_copied": "copied within a device",
    "peer": "copied device to device",
    "device_to_host": "copied device to host",
    "host_to_device": "copied host to device",
    "disk_write": "written to disk",
    "disk_read": "read from disk",
    "bytes_shared": "read in place, on the host",
    "bytes_born": "made in place, on the host",
    "bytes_copied_in": "copied into the host store",
}
INTERRUPTED = 128 + 2  # What a shell reports of a program that SIGINT ended.


class Moved:
    """Counts the bytes that were read, made and copied since it was made, by kind."""

    def __init__(self) -> None:
        self._before = afield.stats()

    def bytes(self) -> dict[str, int]:
        """Return name of the counter -> bytes."""
        now = afield.stats()
        return {name: int(now[name] - self._before[name]) for name in KINDS}

    def rows(self) -> dict[str, str]:
        """Return what is counted, in words -> bytes, as text."""
        return {KINDS[name]: f"{count:,}" for name, count in self.bytes().items()}


def positive(text: str) -> int:
    """Read an option that must be 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text!r}")
    return int(text)


def run(parser: argparse.ArgumentParser, example: Callable[[argparse.Namespace, Console], int]) -> int:
    """Read the options, start the runtime, run the example, end the runtime; return the program's exit status."""
    options = parser.parse_args()
    console = Console()
    if options.devices is None:
        options.devices = "emulated:2"
        print("No devices are configured (AFIELD_DEVICES): two emulated ones stand in for GPUs.")
    try:
        info = _start(parser, options)
        if not info.devices:
            parser.error('this example needs a device, emulated or real: leave --devices out, or write "emulated:2"')
        return example(options, console)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    finally:
        afield.shutdown()


def _start(parser: argparse.ArgumentParser, options: argparse.Namespace) -> afield.ClusterInfo:
    try:
        return afield.init(devices=options.devices, host_memory=getattr(options, "host_memory", None))
    except afield.UsageError as error:
        parser.error(str(error))


def add_devices(parser: argparse.ArgumentParser) -> None:
    """Add the option that says which devices are used."""
    parser.add_argument(
        "--devices",
        default=os.environ.get("AFIELD_DEVICES"),
        help='"emulated:2", "emulated:2:1GiB" (memory of each) or "cuda"; by default what AFIELD_DEVICES says',
    )


def show(title: str, figures: Mapping[str, str | float], console: Console, unit: str = "result") -> None:
    """Print a table of two columns."""
    if not console.is_terminal:
        for name, figure in [(title, unit), *figures.items()]:
            print(f"{name:30} {figure:>16}")
        print()
        return
    table = Table(title, unit)
    table.columns[1].justify = "right"
    for name, figure in figures.items():
        table.add_row(name, str(figure))
    console.print(table)
