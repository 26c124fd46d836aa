"""This interpreter's part in a session: set by `init` or by a worker's main function, read by the public API.

A forked copy of a driver or a worker takes no part: its sockets and threads belong to the parent. That is seen to here, and
not in the face, which workers load only when code of the user's asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from afield.errors import NotInitializedError
from afield.runtime.calls.participant import Participant
from afield.runtime.process import current

participant: Participant | None = None
#: Starts a runtime on first use, or says why not; told whether the use is of something new. The face registers it.
starter: Callable[[bool], None] | None = None
#: In a forked copy of a process that takes part: why a first use must not start a runtime there.
copied = ""


def install(new: Participant | None) -> None:
    """Make `new` the participant of this interpreter (None: there is no runtime)."""
    global participant
    participant = new
    if new is None:
        current.install(None, None)
    else:
        current.install(new.process, new.values)


def _after_fork_in_child() -> None:
    """A copy of a participant is none: it would go on as a second one on the same sockets."""
    global copied
    if participant is not None:
        # Copies of descriptors would keep the session alive after its driver's end.
        participant.abandon()
        install(None)
        copied = (
            "this process was forked from one that uses afield and has no part in its runtime: leave afield to the "
            "parent, or call afield.init() here for a runtime of its own"
        )


os.register_at_fork(after_in_child=_after_fork_in_child)


def ensure(something_new: bool = True) -> Participant:
    """Return the participant, starting the runtime on first use.

    After a `shutdown` that is done only for `something_new`: what a ref stands for went with its runtime.
    """
    if participant is None and starter is not None:
        starter(something_new)
    return require("afield is not initialised; call afield.init() first")


def require(otherwise: str) -> Participant:
    """Return the participant; raise `NotInitializedError` with the text `otherwise` if there is none."""
    if participant is None:
        raise NotInitializedError(otherwise)
    return participant
