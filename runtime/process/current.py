"""What this interpreter is in a session, for code that nobody hands it to: refs, unpickling, and tasks that fork.

Set by `calls.participation` when a driver or worker joins, and forgotten when it leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Protocol

from afield.errors import NotInitializedError


class Holder(Protocol):
    """What a ref asks of its process: it is told of handles."""

    process_id: bytes

    def handle_dropped(self, object_id: bytes) -> None:
        """A handle is gone."""

    def pin_for_ever(self, object_id: bytes, why: str = ...) -> None:
        """Keep an object until the process ends."""

    def owner_of(self, object_id: bytes) -> bytes:
        """Return the owner's id of an object that the process holds."""

    def receive_ref(self, object_id: bytes, owner: bytes) -> None:
        """A ref was unpickled that nobody carries."""


class Values(Protocol):
    """What a ref, or an array that is unpickled, asks of its process."""

    def future(self, ref: Any) -> Future[Any]:
        """Return a future that is completed with the value."""

    def result(self, ref: Any) -> Coroutine[Any, Any, Any]:
        """Wait for the value on the running event loop."""

    def array_here(self, host: Any) -> Any:
        """Return a host array as an array of this process's device, or as it is where there is none."""


process: Holder | None = None
values: Values | None = None
#: Set in workers: tells whether an actor lives here.
in_actor: Callable[[], bool] | None = None
#: Set in workers: notes that the actor that lives here ends itself.
leave_actor: Callable[[], None] | None = None


def install(new_process: Holder | None, new_values: Values | None) -> None:
    """Make these the process and the values of this interpreter (None: there is no runtime)."""
    global process, values
    process, values = new_process, new_values


def require_values(otherwise: str) -> Values:
    """Return the values; raise `NotInitializedError` with the text `otherwise` if there is no runtime."""
    if values is None:
        raise NotInitializedError(otherwise)
    return values
