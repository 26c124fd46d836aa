"""State machines as tables, and the flight recorder that every core keeps.

Theory of operation. What a core decides about one thing (a task at a worker, an actor, a lease) is a small machine: a
`Table` from (state, event) to the next state. Whatever the table does not name is illegal and raises `InternalError`, with the
thing's key, its state, the event, what would have been legal, and the core's last transitions. An event that may arrive after
what it is about is over (two messages that crossed) is named as *late*: it is legal and changes nothing. The diagrams in
`docs/state-machines.md` are drawn from the tables (`Table.diagram`), so that they cannot drift.

A `FlightRecorder` keeps the last transitions of one core, in memory that is bounded. It has no clock: order is what counts.
It is written on rare paths only; what happens once for each small task is not recorded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from afield.errors import InternalError

#: Transitions that a core remembers.
REMEMBERED = 64
#: What an error says of one core at most: so many transitions, so many complaints, and characters in a line.
MOST_TOLD, MOST_COMPLAINTS, MOST_CHARACTERS = 16, 8, 200


class FlightRecorder:
    """The last transitions of a core, the oldest first."""

    __slots__ = ("_notes", "note")

    def __init__(self, limit: int = REMEMBERED) -> None:
        self._notes: deque[tuple[Any, ...]] = deque(maxlen=limit)
        #: Remembers one transition, a tuple of what happened to whom; ids may be bytes. Takes 30 ns.
        self.note = self._notes.append

    def notes(self) -> list[tuple[Any, ...]]:
        """Return what is remembered as it was noted."""
        return list(self._notes)

    def story(self) -> list[str]:
        """Return what is remembered as lines."""
        return [" ".join(map(_shown, note)) for note in self.notes()]


class Core(Protocol):
    """What every core has for those who look into a process (`afield stack`, the tests)."""

    @property
    def recorder(self) -> FlightRecorder:
        """Its last transitions."""

    def validate(self) -> list[str]:
        """Return complaints about its own state, none if all is well; the work is bounded."""


def _shown(part: Any) -> str:
    if isinstance(part, tuple):
        return "/".join(map(_shown, part))
    return part.hex() if isinstance(part, bytes) else str(part)


def complaints_of(core: Core, most: int) -> list[str]:
    """Return what a core complains of, and after so many complaints how many more there are."""
    try:
        complaints = core.validate()
    except Exception as error:  # what is wrong is so wrong that it cannot even be looked at
        complaints = [f"its state cannot be looked through: {error!r}"]
    more = [f"{len(complaints) - most} more complaints"] if len(complaints) > most else []
    return complaints[:most] + more


def account(cores: Mapping[str, Core]) -> str:
    """Return what cores complain of and what they did last, bounded: it becomes part of the error of an internal fault."""
    lines = []
    for name, core in cores.items():
        lines += [f"{name} is wrong: {each}" for each in complaints_of(core, MOST_COMPLAINTS)]
        lines += [f"{name} did: {each}" for each in core.recorder.story()[-MOST_TOLD:]]
    return "\n".join(line[:MOST_CHARACTERS] for line in lines)


class Table:
    """The transitions of one kind of thing.

    Args:
        name: what it is, such as "task at a worker".
        initial: the state that it begins in.
        transitions: (state, event) -> next state.
        states: state -> one line that says what it means.
        late: (state, event) that may happen in spite of the state, and change nothing.
    """

    __slots__ = ("_late", "_next", "initial", "name", "states")

    def __init__(
        self,
        name: str,
        initial: str,
        transitions: Mapping[tuple[str, str], str],
        states: Mapping[str, str],
        late: Iterable[tuple[str, str]] = (),
    ) -> None:
        self.name = name
        self.initial = initial
        self.states = dict(states)
        self._next = dict(transitions)
        in_order = tuple(late)
        self._late = frozenset(in_order)
        assert not self._late & set(self._next), f"{name}: both late and not: {self._late & set(self._next)}"
        self._next |= {(state, event): state for state, event in in_order}
        named = {initial, *self._next.values(), *(state for state, _ in self._next)}
        assert named == set(self.states), f"{name}: states without a meaning, or never reached: {named ^ set(states)}"

    def after(self, state: str, event: str, key: object = "", recorder: FlightRecorder | None = None) -> str:
        """Return the state that `event` leads to from `state`, and note it.

        Raises:
            InternalError: the table has no such transition; `key` and what the recorder remembers are in the text.
        """
        target = self._next.get((state, event))
        if target is None:
            raise illegal(f"{self.name} {_shown(key)}", state, event, self.events(state), recorder)
        if recorder is not None:
            recorder.note((key, event, state, "->", target))
        return target

    def allows(self, state: str, event: str) -> bool:
        """Tell whether the event is legal in a state."""
        return (state, event) in self._next

    def is_late(self, state: str, event: str) -> bool:
        """Tell whether the event is one that changes nothing, as what it is about is over."""
        return (state, event) in self._late

    def events(self, state: str) -> list[str]:
        """Return the events that are legal in a state."""
        return [event for known, event in self._next if known == state]

    def final(self) -> list[str]:
        """Return the states that nothing leads out of."""
        going_on = {state for state, event in self._next if (state, event) not in self._late}
        return [state for state in self.states if state not in going_on]

    def transitions(self) -> dict[tuple[str, str], str]:
        """Return (state, event) -> next state, the late ones included."""
        return dict(self._next)

    def diagram(self) -> str:
        """Return the table as a Mermaid state diagram; what may come late and changes nothing stands in parentheses."""
        lines = ["stateDiagram-v2", f"    [*] --> {self.initial}"]
        joined: dict[tuple[str, str], list[str]] = {}
        for (state, event), target in self._next.items():
            late = (state, event) in self._late
            joined.setdefault((state, target), []).append(f"({event})" if late else event)
        lines += [f"    {state} --> {target}: {', '.join(events)}" for (state, target), events in joined.items()]
        lines += [f"    {state} --> [*]" for state in self.final()]
        return "\n".join(lines)


def illegal(
    what: str, state: object, event: object, legal: Iterable[object] = (), recorder: FlightRecorder | None = None
) -> InternalError:
    """Make the error of a transition that must not happen."""
    could = ", ".join(map(str, legal)) or "nothing"
    story = "".join(f"\n  {line}" for line in recorder.story()) if recorder is not None else ""
    return InternalError(
        f"{what}: {event} in state {state}, where only {could} may happen{'; before that:' if story else ''}{story}"
    )
