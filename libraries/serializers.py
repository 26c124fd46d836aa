"""`register_serializer`: how values of a class travel that pickle cannot take, or takes badly.

Theory of operation. All values are pickled by cloudpickle's pickler or one derived from it, and that asks a table of
its class before it asks the object. An entry of this table is what is registered here: it holds for this process, for values
of exactly this class, wherever in a value they are. What it pickles names the deserializer, so the process that reads needs
no entry. Plain `pickle`, and with it `copy`, are not concerned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cloudpickle import CloudPickler


def register_serializer(cls: type, *, serializer: Callable[[Any], Any], deserializer: Callable[[Any], Any]) -> None:
    """Send values of a class as what the serializer makes of them; in this process, until `deregister_serializer`.

    A worker that sends such values registers it too, for instance where the module of the class does.

    Args:
        cls: the class; those derived from it are not concerned.
        serializer: takes such a value, returns one that can be pickled.
        deserializer: takes what the serializer returned, returns the value.

    Raises:
        TypeError: `cls` is not a class, or the others are not callable.
    """
    if not isinstance(cls, type):
        raise TypeError(f"register_serializer() takes a class, not {cls!r}")
    for name, function in (("serializer", serializer), ("deserializer", deserializer)):
        if not callable(function):
            raise TypeError(f"{name}={function!r} must be callable")
    CloudPickler.dispatch_table[cls] = lambda value: (deserializer, (serializer(value),))


def deregister_serializer(cls: type) -> None:
    """Send values of the class as before; nothing happens if it was not registered."""
    CloudPickler.dispatch_table.maps[0].pop(cls, None)
