"""Random numbers in device memory: the module's `random`.

Theory of operation. NumPy draws on the host and the result is copied to the device, so a seed gives the same numbers on
every run, but not those that CuPy's generators give. As in CuPy each device has a state of its own, `seed` sets that of
the current device, and most functions take `dtype`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from afield.gpu_store.emulated_arrays.array import EmulatedArray
from afield.gpu_store.emulated_arrays.delegation import Call
from afield.gpu_store.emulated_arrays.devices import DeviceSet
from afield.gpu_store.emulated_arrays.names import RANDOM, words

#: Methods of NumPy that take `dtype` themselves; for the others the result is converted.
_OWN_DTYPE = {
    "RandomState": frozenset({"randint"}),
    "Generator": frozenset({"integers", "random", "standard_exponential", "standard_gamma", "standard_normal"}),
}

_OF_GENERATOR = RANDOM - words("rand randn randint random_integers random_sample ranf sample bytes") | {
    "integers",
    "permuted",
}


class Draws:
    """The methods of one of NumPy's sources of random numbers, with operands and results in device memory."""

    def __init__(self, source: Any, devices: DeviceSet, names: frozenset[str]) -> None:
        self._source = source
        self._devices = devices
        self._names = names

    def seed(self, seed: Any = None) -> None:
        self._source.seed(seed)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_") or name not in self._names:
            raise AttributeError(f"emulated random numbers have no {name!r}", name=name, obj=self)
        name = "random_sample" if name in ("random", "ranf", "sample") and self._names is RANDOM else name
        own_dtype = name in _OWN_DTYPE[type(self._source).__name__]

        def draw(*args: Any, dtype: Any = None, **kwargs: Any) -> Any:
            if dtype is not None and own_dtype:
                kwargs["dtype"] = dtype
            # `power` of the generator is a distribution; the name says so in messages.
            call = Call(f"random.{name}", EmulatedArray, self._devices.current)
            result = call.run(_drawn(getattr(self._source, name)), args, kwargs)
            return result.astype(dtype, copy=False) if dtype is not None and not own_dtype else result

        draw.__name__ = name
        return draw


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
        self._states: dict[int, Draws] = {}

    def get_random_state(self) -> Draws:
        """The state of the current device."""
        device = self._devices.current.id
        if device not in self._states:
            self._states.setdefault(device, self.RandomState())
        return self._states[device]

    def set_random_state(self, state: Draws) -> None:
        self._states[self._devices.current.id] = state

    def seed(self, seed: Any = None) -> None:
        self.get_random_state().seed(seed)

    def RandomState(self, seed: Any = None, method: Any = None) -> Draws:  # noqa: N802 - CuPy's name
        return Draws(np.random.RandomState(seed), self._devices, RANDOM)

    def default_rng(self, seed: Any = None) -> Draws:
        return seed if isinstance(seed, Draws) else Draws(np.random.default_rng(seed), self._devices, _OF_GENERATOR)

    def function(self, name: str) -> Callable[..., Any]:
        """Return `random.<name>`, which draws from the state of whatever device is current then."""

        def draw(*args: Any, **kwargs: Any) -> Any:
            return getattr(self.get_random_state(), name)(*args, **kwargs)

        draw.__name__ = name
        return draw
