"""What attributes of a device array give: `x.flags` and `x.flat`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Flags:
    """What `x.flags` tells; to look at, not to set."""

    c_contiguous: bool
    f_contiguous: bool
    owndata: bool
    writeable: bool

    @property
    def forc(self) -> bool:
        return self.c_contiguous or self.f_contiguous

    @property
    def fnc(self) -> bool:
        return self.f_contiguous and not self.c_contiguous

    def __getitem__(self, name: str) -> bool:
        if name.lower() not in ("c_contiguous", "f_contiguous", "owndata", "writeable", "forc", "fnc"):
            raise KeyError(f"unknown flag {name!r}")
        value: bool = getattr(self, name.lower())
        return value


class FlatIterator:
    """`x.flat`: the items in C order, to read by a number or a slice, to set, or to go through."""

    def __init__(self, base: Any) -> None:
        self.base = base

    def copy(self) -> Any:
        copied: Any = self.base.flatten()
        return copied

    def __getitem__(self, key: int | slice) -> Any:
        items: Any = self.base.ravel()
        return items[key]

    def __setitem__(self, key: int | slice, value: Any) -> None:
        base = self.base
        base._array.flat[key] = base._assigned("flat", value)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.base.ravel())

    def __len__(self) -> int:
        size: int = self.base.size
        return size
