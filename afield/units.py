"""Byte quantities as people write them, and back.

Theory of operation: options such as ``host_memory="6GiB"`` reach afield as text or as plain integers. Everything
inside counts bytes with integers, so text is parsed once, here, exactly (no binary floating point on the way), and is
formatted once, in messages. Binary suffixes (KiB, MiB, ...) are powers of 1024, decimal ones (kB, MB, ...) powers of
1000. Single letters ("6G") are refused because half of their readers expect the other base.
"""

from __future__ import annotations

import operator
import re
from fractions import Fraction

_SUFFIXES = {
    "": 1,
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_FORM = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*\Z", re.ASCII)
_ACCEPTED = "a whole number of bytes, or text such as '512MiB', '6GiB', '1.5 GB' (kB, MB, GB, TB, KiB, MiB, GiB, TiB)"

# Longer text is no quantity; the bound keeps a hostile string from costing time in big-integer arithmetic.
_MAX_TEXT = 64


def parse_bytes(value: int | str) -> int:
    """Return the number of bytes that `value` stands for; a fraction of a byte is rounded down.

    Raises ValueError, naming the accepted forms, for anything else (negative numbers, bools and unknown suffixes
    included).
    """
    if isinstance(value, str):
        match = _FORM.match(value) if len(value) <= _MAX_TEXT else None
        factor = _SUFFIXES.get(match[2]) if match else None
        if match is None or factor is None:
            raise _not_bytes(value)
        return int(Fraction(match[1]) * factor)
    if isinstance(value, bool):
        raise _not_bytes(value)
    try:
        count = operator.index(value)
    except TypeError:
        raise _not_bytes(value) from None
    if count < 0:
        raise _not_bytes(value)
    return count


def format_bytes(size_bytes: int) -> str:
    """Return `size_bytes` with a binary suffix: exact where it divides evenly ("6 GiB"), else with one decimal."""
    sign, rest = ("-", -size_bytes) if size_bytes < 0 else ("", size_bytes)
    if rest < 1024:
        return f"{sign}{rest} B"
    for suffix in ("KiB", "MiB", "GiB", "TiB"):
        factor = _SUFFIXES[suffix]
        # From 1023.95 on one decimal would read "1024.0": such a number belongs to the next larger suffix.
        if rest < factor * 1024 - factor // 20:
            break
    if rest % factor == 0:
        return f"{sign}{rest // factor} {suffix}"
    tenths = (rest * 10 + factor // 2) // factor
    return f"{sign}{tenths // 10}.{tenths % 10} {suffix}"


def _not_bytes(value: object) -> ValueError:
    shown = repr(value)
    if len(shown) > _MAX_TEXT:
        shown = shown[:_MAX_TEXT] + "..."
    return ValueError(f"{shown} is not a number of bytes: write {_ACCEPTED}")
