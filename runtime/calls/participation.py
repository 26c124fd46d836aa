"""This interpreter's part in a session: set by `init` or by a worker's main function, read by the public API."""

from __future__ import annotations

from collections.abc import Callable

from afield.errors import NotInitializedError
from afield.runtime.calls.participant import Participant
from afield.runtime.process import current

participant: Participant | None = None
#: Starts a runtime on first use; the face registers it.
starter: Callable[[], None] | None = None


def install(new: Participant | None) -> None:
    """Make `new` the participant of this interpreter (None: there is no runtime)."""
    global participant
    participant = new
    if new is None:
        current.install(None, None)
    else:
        current.install(new.process, new.values)


def ensure() -> Participant:
    """Return the participant, starting the runtime on first use."""
    if participant is None and starter is not None:
        starter()
    return require("afield is not initialised; call afield.init() first")


def require(otherwise: str) -> Participant:
    """Return the participant; raise `NotInitializedError` with the text `otherwise` if there is none."""
    if participant is None:
        raise NotInitializedError(otherwise)
    return participant
