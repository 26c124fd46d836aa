"""Random numbers in device memory: the module's `random`.

Theory of operation. NumPy draws on the host and the result is copied to the device, so a seed gives the same numbers on
every run, but not those that CuPy's generators give. As in CuPy each device has a state of its own, `seed` sets that of
the current device, and most functions take `dtype`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from afield.gpu_store.emulated_arrays.array import EmulatedArray
from afield.gpu_store.emulated_arrays.delegation import Call
from afield.gpu_store.emulated_arrays.devices import DeviceSet
from afield.gpu_store.emulated_arrays.names import GENERATOR, RANDOM, RANDOM_STATE

#: Methods of NumPy that take `dtype` themselves; for the others the result is converted.
_OWN_DTYPE = {
    "RandomState": frozenset({"randint", "tomaxint"}),
    "Generator": frozenset({"integers", "random", "standard_exponential", "standard_gamma", "standard_normal"}),
}


class Draws:
    """The methods of one of NumPy's sources of random numbers, with operands and results in device memory."""

    devices: ClassVar[DeviceSet]
    names: ClassVar[frozenset[str]]

    def __init__(self, source: Any) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in self.names:
            raise AttributeError(f"CuPy's {type(self).__name__} has no {name!r}", name=name, obj=self)
        return self._draw(name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.names} - {"devices", "names"})

    def _draw(self, name: str) -> Callable[..., Any]:
        own_dtype = name in _OWN_DTYPE[type(self._source).__name__]

        def draw(*args: Any, dtype: Any = None, **kwargs: Any) -> Any:
            if dtype is not None and own_dtype:
                kwargs["dtype"] = dtype
            # `power` of the generator is a distribution; the name says so in messages.
            call = Call(f"random.{name}", EmulatedArray, self.devices.current)
            result = call.run(_drawn(getattr(self._source, name)), args, kwargs)
            return result.astype(dtype, copy=False) if dtype is not None and not own_dtype else result

        draw.__name__ = name
        return draw


class RandomState(Draws):
    """A state of its own: `cupy.random.RandomState`."""

    names = RANDOM_STATE

    def __init__(self, seed: Any = None, method: Any = None) -> None:
        super().__init__(np.random.RandomState(seed))

    def seed(self, seed: Any = None) -> None:
        self._source.seed(seed)


class BitGenerator:
    """What a `Generator` draws its bits from; NumPy's, whichever is asked for."""

    def __init__(self, seed: Any = None, *, size: int = -1) -> None:
        self._source = np.random.default_rng(seed)


class XORWOW(BitGenerator):
    """The one that `default_rng` takes."""


class MRG32k3a(BitGenerator):
    """Another."""


class Philox4x3210(BitGenerator):
    """And another."""


class Generator(Draws):
    """`cupy.random.Generator`, with those methods that CuPy's has."""

    names = GENERATOR

    def __init__(self, bit_generator: BitGenerator) -> None:
        super().__init__(bit_generator._source)


def _drawn(method: Callable[..., Any]) -> Callable[..., Any]:
    def drawn(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        # One number is an array, too: on a device nobody has waited for it.
        return np.asarray(result) if isinstance(result, bool | int | float) else result

    return drawn


class RandomNumbers:
    """What the functions of `random` share: a state per device."""

    def __init__(self, devices: DeviceSet) -> None:
        self._devices = devices
        self._states: dict[int, RandomState] = {}
        self.RandomState = type("RandomState", (RandomState,), {"devices": devices})
        self.Generator = type("Generator", (Generator,), {"devices": devices})

    def get_random_state(self) -> RandomState:
        """The state of the current device."""
        device = self._devices.current.id
        if device not in self._states:
            self._states.setdefault(device, self.RandomState())
        return self._states[device]

    def set_random_state(self, state: RandomState) -> None:
        self._states[self._devices.current.id] = state

    def seed(self, seed: Any = None) -> None:
        self.get_random_state().seed(seed)

    def reset_states(self) -> None:
        """Forget the states of all devices."""
        self._states.clear()

    def default_rng(self, seed: Any = None) -> Generator:
        if isinstance(seed, Generator):
            return seed
        made: Generator = self.Generator(seed if isinstance(seed, BitGenerator) else XORWOW(seed))
        return made

    def function(self, name: str) -> Callable[..., Any]:
        """Return `random.<name>`, which draws from the state of whatever device is current then."""

        def draw(*args: Any, **kwargs: Any) -> Any:
            return self.get_random_state()._draw(RANDOM[name])(*args, **kwargs)

        draw.__name__ = name
        return draw
