"""Byte quantities: what is accepted, what is refused, and that the two directions agree."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afield.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0, 0),
        (4096, 4096),
        (np.int64(7), 7),
        ("0", 0),
        ("123", 123),
        ("123 B", 123),
        ("2kB", 2_000),
        ("2KB", 2_000),
        ("3MB", 3_000_000),
        ("1.5GB", 1_500_000_000),
        ("1TB", 10**12),
        ("1KiB", 1024),
        (" 512 MiB ", 512 * 2**20),
        ("6GiB", 6 * 2**30),
        ("0.1GiB", 107_374_182),
        ("2TiB", 2 * 2**40),
    ],
)
def test_accepted_forms(text: int | str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "bad", ["", "GiB", "6G", "6gib", "-1", "-1GiB", "1e9", "1.GiB", "nan", "6 Gi B", "٣MB", "9" * 100]
)
def test_refused_text_names_the_accepted_forms(bad: str) -> None:
    with pytest.raises(ValueError, match="6GiB") as raised:
        parse_bytes(bad)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("bad", [-1, True, None, 1.5, b"1GiB", [1]])
def test_refused_values_name_the_accepted_forms(bad: object) -> None:
    with pytest.raises(ValueError, match="whole number of bytes"):
        parse_bytes(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size_bytes", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (-1536, "-1.5 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (2**20, "1 MiB"),
        (6 * 2**30, "6 GiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
def test_format(size_bytes: int, expected: str) -> None:
    assert format_bytes(size_bytes) == expected


@given(st.integers(min_value=0, max_value=2**50))
def test_format_is_parsed_back_within_its_rounding(size_bytes: int) -> None:
    text = format_bytes(size_bytes)
    assert abs(parse_bytes(text) - size_bytes) <= size_bytes * 0.06
    assert not text.startswith("1024.") or size_bytes >= 2**50 - 2**40


@given(st.integers(min_value=0, max_value=1023), st.sampled_from(["B", "KiB", "MiB", "GiB", "TiB"]))
def test_whole_quantities_survive_the_round_trip(count: int, suffix: str) -> None:
    size_bytes = parse_bytes(f"{count}{suffix}")
    assert parse_bytes(format_bytes(size_bytes)) == size_bytes
