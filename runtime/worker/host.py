"""What all calls of a worker share: its queue, the actor that lives here, the way in and out, and how the process ends.

An actor that ends itself (`exit_actor`) answers the call that did so, then tells the daemon, who tells its callers; nothing
more starts here. A process that cannot go on, as its device is lost or its context broken, says so and is ended; what it was
doing fails for that reason and is done elsewhere.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from afield.runtime.calls.participant import Participant
from afield.runtime.cores.work import Work
from afield.runtime.process.context import ActorExit
from afield.runtime.wire import messages
from afield.runtime.worker import ending
from afield.runtime.worker.outcomes import LoadedCallee, Outcomes
from afield.runtime.worker.replies import Replies


class Host:
    """One worker, as its calls see it."""

    def __init__(self, participant: Participant) -> None:
        self.participant = participant
        self.process = participant.process
        self.work: Work[Any] = Work()  # of `Invocation`s, which know this class
        self.outcomes = Outcomes(participant)
        self.replies = Replies(participant.process)
        self.waiting = self.replies.waiting
        #: The actor that lives here, once it is constructed, and its id, from when this worker becomes an actor.
        self.actor: Any = None
        self.actor_id = b""
        #: Why the actor ends by its own will, once it wants to.
        self.goodbye = ""

    def start(self, call: Any) -> bool:
        """One of several concurrent calls has its turn; return False if it must not start any more."""
        with self.process.pump.lock:
            return self.work.start(call)

    def function(self, callee: LoadedCallee) -> Callable[..., Any]:
        """Return the function of a callee that is not rebuilt yet, or the actor's method."""
        if not self.actor_id:
            return callee.rebuild(self.participant.values)
        special = _SPECIAL.get(callee.method)
        return _method(self.actor, callee.method) if special is None else partial(special, self.actor)

    def leave(self, reason: str) -> NoReturn:
        """This process is of no use any more: what it was doing failed for that, and is to be done elsewhere."""
        self.replies.flush()
        self.process.locked(self.process.daemon.send, messages.Unfit(reason))
        time.sleep(ending.END_WITHIN_S)  # the daemon ends us
        os._exit(1)

    def say_goodbye(self) -> None:
        """Tell the daemon that this actor ends by its own will, after its caller has its answer."""
        reason, self.goodbye = self.goodbye, ""
        if not reason:  # another has said it
            return
        ending.set_alarm()  # what else runs here has so long to end
        self.process.locked(self.work.leave)
        self.replies.flush()
        self.process.locked(self.process.daemon.send, messages.KillActor(self.actor_id, True, reason, True))


def _method(actor: Any, name: str) -> Callable[..., Any]:
    """Return a method as the actor's class has it: an attribute of the instance may have the same name."""
    cls = type(actor)
    for kind in cls.__mro__:
        if name in kind.__dict__:
            member = kind.__dict__[name]
            bind = getattr(type(member), "__get__", None)
            return member if bind is None else bind(member, actor, cls)  # type: ignore[no-any-return]
    found: Callable[..., Any] = getattr(actor, name)  # its `__new__` has made something else of it
    return found


def _ready(actor: Any) -> bool:
    return True


def _exit(actor: Any) -> None:
    raise ActorExit


def _call(actor: Any, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return function(actor, *args, **kwargs)


#: The methods that every actor has, beside those of its class.
_SPECIAL: dict[str, Callable[..., Any]] = {
    "__afield_ready__": _ready,
    "__afield_terminate__": _exit,
    "__afield_call__": _call,
}
