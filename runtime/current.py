"""The process's one handle on the runtime: set by `init` or by a worker's main function, read by the public API and by refs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from afield.errors import NotInitializedError

if TYPE_CHECKING:
    from afield.runtime.participant import Participant
    from afield.runtime.process import Process

participant: Participant | None = None
process: Process | None = None
#: Set in workers: tells whether an actor lives here.
in_actor: Callable[[], bool] | None = None


def install(new: Participant | None) -> None:
    """Make `new` the participant of this process (None: there is no runtime)."""
    global participant, process
    participant = new
    process = None if new is None else new.process


def ensure() -> Participant:
    """Return the participant, initialising the runtime on first use."""
    if participant is None:
        from afield.runtime import api  # the one cycle: the first use of a function starts the runtime

        api.auto_init()
    assert participant is not None
    return participant


def require(otherwise: str) -> Participant:
    """Return the participant; raise `NotInitializedError` with the text `otherwise` if there is none."""
    if participant is None:
        raise NotInitializedError(otherwise)
    return participant
