"""Messages about the session itself: questions to a process, what workers print, the end."""

from __future__ import annotations

from typing import Any

import msgspec


class Query(msgspec.Struct, array_like=True, tag=50):
    """Ask the daemon (or a process) for `what`; the `Answer` has the same request number."""

    request: int
    what: str
    argument: Any = None


class Answer(msgspec.Struct, array_like=True, tag=51):
    """The answer to a `Query`; `error` is empty when all is well."""

    request: int
    value: Any = None
    error: str = ""


#: The `error` of an answer that is still being made: the process is at it, and is to be waited for.
WORKING = "working"


class Log(msgspec.Struct, array_like=True, tag=52):
    """Lines that a worker wrote to `stream` ("out" or "err"); `size` comes back in a `Printed`."""

    name: str
    pid: int
    stream: str
    lines: list[str]
    size: int = 0


class Printed(msgspec.Struct, array_like=True, tag=54):
    """The driver has put out `size` bytes of `Log` messages."""

    size: int


class Shutdown(msgspec.Struct, array_like=True, tag=53):
    """The driver ends the cluster."""
