"""Amounts of resources, counted exactly.

Theory of operation. A request ("shape") and a node's total are both a `ResourceSet`: names mapped to amounts. Amounts
are integers in units of 1e-4, so that ten tasks with ``num_cpus=0.1`` take exactly one CPU; binary floating point
would leave a remainder that, after enough tasks, lets one too many in or keeps one out. The names are CPU, GPU,
memory (bytes of host memory), gpu_memory (bytes on each device of the request) and whatever names the user adds. A
name that is missing counts as zero, and zero is never stored, so equal sets compare and hash equal.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Mapping

from afield.errors import InvalidOptionError
from afield.text import is_text
from afield.units import format_bytes, parse_bytes

# Units per 1: the smallest amount that can be asked for is 0.0001.
UNIT = 10_000

CPU = "CPU"
GPU = "GPU"
MEMORY = "memory"
GPU_MEMORY = "gpu_memory"

# The option that sets each built-in resource; `resources=` must not name them a second time.
_OPTIONS = {CPU: "num_cpus", GPU: "num_gpus", MEMORY: "memory", GPU_MEMORY: "gpu_memory"}


class ResourceSet:
    """An immutable mapping of resource names to positive amounts, in units of 1e-4; hashable, usable as a dict key."""

    __slots__ = ("_hash", "_units")

    def __init__(self, units: Mapping[str, int]) -> None:
        """Take amounts in units of 1e-4, as `units()` returned them; raises ValueError for a negative one."""
        for name, amount in units.items():
            if amount < 0:
                raise ValueError(f"the amount of {name} is negative: {amount / UNIT:g}")
        self._units = {name: amount for name, amount in units.items() if amount}
        self._hash: int | None = None

    @classmethod
    def from_options(
        cls,
        num_cpus: float | None = None,
        num_gpus: float | None = None,
        memory: int | str | None = None,
        resources: Mapping[str, float] | None = None,
        gpu_memory: int | str | None = None,
    ) -> ResourceSet:
        """Build a set from the user's options; None means none of it; memory in bytes or as text such as "6GiB".

        Raises InvalidOptionError (a ValueError), naming the option, for what is no number, negative, finer than
        0.0001, for a GPU amount above 1 that is not whole, and for a custom resource with the name of a built-in one.
        """
        units: dict[str, int] = {}
        for name, number in ((CPU, num_cpus), (GPU, num_gpus)):
            if number is not None:
                units[name] = _to_units(_OPTIONS[name], number)
        if units.get(GPU, 0) > UNIT and units[GPU] % UNIT:
            raise InvalidOptionError(f"num_gpus={num_gpus}: above 1 only whole numbers of devices can be asked for")
        for name, size in ((MEMORY, memory), (GPU_MEMORY, gpu_memory)):
            if size is not None:
                units[name] = _bytes_to_units(_OPTIONS[name], size)
        if resources is not None and not isinstance(resources, Mapping):
            raise InvalidOptionError(f"resources={resources!r}: expected a dict of names and amounts")
        for name, amount in (resources or {}).items():
            _check_custom_name(name)
            units[name] = _to_units(f"resources[{name!r}]", amount)
        return cls(units)

    def __getitem__(self, name: str) -> int:
        return self._units.get(name, 0)

    def __iter__(self) -> Iterator[str]:
        return iter(self._units)

    def __len__(self) -> int:
        return len(self._units)

    def __eq__(self, other: object) -> bool:
        return self._units == other._units if isinstance(other, ResourceSet) else NotImplemented

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(self.key())
        return self._hash

    def __reduce__(self) -> tuple[type[ResourceSet], tuple[dict[str, int]]]:
        return ResourceSet, (self._units,)

    def __repr__(self) -> str:
        return f"ResourceSet({self})"

    def __str__(self) -> str:
        return ", ".join(f"{name} {format_amount(name, amount)}" for name, amount in self._units.items()) or "nothing"

    def items(self) -> Iterator[tuple[str, int]]:
        """Yield (name, amount in units of 1e-4)."""
        yield from self._units.items()

    def units(self) -> dict[str, int]:
        """Return the amounts in units of 1e-4, the form in which a set travels: `ResourceSet(s.units())` equals `s`."""
        return dict(self._units)

    def key(self) -> tuple[tuple[str, int], ...]:
        """Return a sorted tuple of (name, units of 1e-4) that is equal for equal sets."""
        return tuple(sorted(self._units.items()))

    def as_floats(self) -> dict[str, float]:
        """Return the amounts as the user counts them: CPUs, GPUs, bytes."""
        return {name: amount / UNIT for name, amount in self._units.items()}

    def fits(self, available: ResourceSet) -> bool:
        """Return whether this request fits into `available`."""
        there = available._units
        return all(amount <= there.get(name, 0) for name, amount in self._units.items())

    def add(self, other: ResourceSet) -> ResourceSet:
        """Return the sum of both."""
        units = dict(self._units)
        for name, amount in other._units.items():
            units[name] = units.get(name, 0) + amount
        return ResourceSet(units)


def format_amount(name: str, amount: int) -> str:
    """Return `amount` (units of 1e-4) of resource `name` for a message: bytes with a suffix, the rest as a number."""
    if name in (MEMORY, GPU_MEMORY):
        return format_bytes(amount // UNIT)
    whole, rest = divmod(amount, UNIT)
    return f"{whole}.{rest:04d}".rstrip("0") if rest else str(whole)


def _check_custom_name(name: object) -> None:
    if not is_text(name) or not name:
        raise InvalidOptionError(
            f"resources={{{name!r}: ...}}: a resource's name is a non-empty string, without lone surrogates"
        )
    if name in _OPTIONS:
        raise InvalidOptionError(f"resources={{{name!r}: ...}}: use {_OPTIONS[name]}= for the built-in {name}")


def _to_units(option: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidOptionError(f"{option}={value!r}: expected a number")
    if isinstance(value, numbers.Integral):
        units = int(value) * UNIT
    else:
        scaled = float(value) * UNIT
        if not math.isfinite(scaled):
            raise InvalidOptionError(f"{option}={value!r}: expected a finite number")
        units = round(scaled)
        # Sums such as 0.1 + 0.2 are off by a rounding of their last bit; that is not a fifth decimal.
        if abs(scaled - units) > 8 * math.ulp(scaled):
            raise InvalidOptionError(
                f"{option}={value!r} has more than 4 decimals: amounts are counted in steps of 0.0001"
            )
    if units < 0:
        raise InvalidOptionError(f"{option}={value!r} is negative")
    return units


def _bytes_to_units(option: str, value: int | str) -> int:
    try:
        return parse_bytes(value) * UNIT
    except ValueError as error:
        raise InvalidOptionError(f"{option}={value!r}: {error}") from None
