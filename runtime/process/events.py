"""What happens to a process, and who is told.

An `Event` is a named value that says what its subscribers are called with; `Process.subscribe` checks that with types. Events
with `alone` stand for something to be done: exactly one part of the runtime does it, and a second subscriber is an error.
All are announced under the process's lock, so nobody may block or run code of the user's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from afield.errors import InternalError

_Callback = TypeVar("_Callback", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, eq=False)
class Event(Generic[_Callback]):
    """Something that happens; `alone` if exactly one subscriber makes sense."""

    name: str
    alone: bool = False


#: Nothing will be answered any more; all pending values have failed already. (the serialised error)
RUNTIME_DEAD: Event[Callable[[bytes], object]] = Event("the runtime is dead")
#: A living process has closed its channel with us, or broke the protocol; the table knows already. (process id)
PEER_LEFT: Event[Callable[[bytes], object]] = Event("a peer left")
#: The daemon says that a process died; what it had sent has been handled, and the table knows. (process id, why)
PROCESS_DIED: Event[Callable[[bytes, str], object]] = Event("a process died")
#: A round of events is over, and effects are executed. (monotonic seconds) -> when to be called again at the latest, or None.
TICK: Event[Callable[[float], float | None]] = Event("tick")
#: Nothing holds an object any more that stands for an actor or for the consumer of a stream. (object id)
LIFE_ENDED: Event[Callable[[bytes], object]] = Event("a life ended", alone=True)
#: All registrations that an obligation waited for are acknowledged. (the obligation's token)
OBLIGATION_MET: Event[Callable[[Any], object]] = Event("an obligation is met", alone=True)
#: Lineage wants a task to run again. (its record)
RECOMPUTE: Event[Callable[[Any], object]] = Event("a task is to run again", alone=True)

EVENTS: tuple[Event[Any], ...] = (
    RUNTIME_DEAD,
    PEER_LEFT,
    PROCESS_DIED,
    TICK,
    LIFE_ENDED,
    OBLIGATION_MET,
    RECOMPUTE,
)


def name_of(function: Callable[..., Any]) -> str:
    """Name a function in an error."""
    return str(getattr(function, "__qualname__", function))


class Subscribers:
    """Who listens to what in one process."""

    def __init__(self) -> None:
        self._of: dict[Event[Any], list[Callable[..., Any]]] = {event: [] for event in EVENTS}

    def of(self, event: Event[_Callback]) -> list[_Callback]:
        """Return those of an event, in the order in which they came; later ones will be in the same list."""
        return self._of[event]  # type: ignore[return-value]

    def add(self, event: Event[_Callback], callback: _Callback) -> None:
        """Have `callback` called whenever the event happens.

        Raises:
            InternalError: the event has its only subscriber already.
        """
        subscribers = self._of[event]
        if event.alone and subscribers:
            first, second = name_of(subscribers[0]), name_of(callback)
            raise InternalError(
                f"{event.name!r} is for one subscriber, which is {first}; {second} cannot be a second one"
            )
        subscribers.append(callback)
