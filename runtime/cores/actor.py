"""One actor as the directory knows it: the core that decides when it is constructed, starts again, and is over.

Theory of operation. An actor is constructed in a worker that is asked for; when that dies, another one is asked for while
`restarts_left` allows. An argument of its constructor may be lost by then: its creator is asked to make it again, and the
actor waits without a worker, as that can need just what the actor had. The directory (`runtime.node.actors`) is the shell: it
asks for workers, ends them, and tells those who call the actor what they have to know (`told`).
"""

from __future__ import annotations

from afield.machines import FlightRecorder, Table

ACTOR = Table(
    "actor in the directory",
    "asks",
    {
        ("asks", "is given a worker"): "begins",
        ("asks", "ends"): "dead",
        ("begins", "lives"): "alive",
        ("begins", "lacks an argument"): "lacks",
        ("begins", "starts again"): "asks",
        ("begins", "ends"): "dead",
        ("lacks", "has its arguments"): "asks",
        ("lacks", "ends"): "dead",
        ("alive", "starts again"): "asks",
        ("alive", "ends"): "dead",
    },
    {
        "asks": "a worker is asked for",
        "begins": "it is constructed in a worker",
        "lacks": "an argument of its constructor was lost: its creator makes it again, or says that it cannot",
        "alive": "it answers calls",
        "dead": "it is over for good, and how it ended is remembered for a while",
    },
    late=[("dead", "ends")],
)


class ActorLives:
    """The lives of one actor.

    Args:
        actor_id: which.
        max_restarts: how often it starts again; -1 for always.
        recorder: where its transitions are noted.
    """

    __slots__ = ("_actor_id", "_killed", "_recorder", "begun", "restarts", "restarts_left", "state", "why_again")

    def __init__(self, actor_id: bytes, max_restarts: int, recorder: FlightRecorder) -> None:
        self._actor_id = actor_id
        self._recorder = recorder
        self.state = ACTOR.initial
        #: It has had a worker: from then on it is not given up for a device that may come back.
        self.begun = False
        self.restarts = 0
        self.restarts_left = max_restarts
        #: Why it asks for another worker, once it does.
        self.why_again = ""
        #: Why its present worker is being ended, if somebody has asked for that.
        self._killed = ""

    @property
    def told(self) -> str:
        """Return what those who call it are told of its state."""
        if self.state in ("alive", "dead"):
            return self.state
        return "restarting" if self.restarts else "pending"

    def given(self) -> None:
        """It has a worker, and is constructed there."""
        self._go("is given a worker")
        self.begun = True

    def lives(self) -> None:
        """Its constructor has returned."""
        self._go("lives")

    def lacks(self, why: str) -> None:
        """Its constructor could not be given an argument, and its worker is ended."""
        self._go("lacks an argument")
        self.why_again = why

    def has_arguments(self) -> None:
        """They are there again: a worker is to be asked for."""
        self._go("has its arguments")

    def killed(self, reason: str, for_good: bool) -> None:
        """Somebody ends its worker, or (`for_good`) the actor."""
        if for_good:
            self.restarts_left = 0
        if self.state in ("begins", "alive"):
            self._killed = reason

    def dies(self, how: str) -> tuple[str, bool]:
        """Its worker is dead; return why, in words, and whether it starts again: then a worker is to be asked for."""
        reason, self._killed = self._killed or f"its process died ({how})", ""
        if not self.restarts_left:
            return reason, False
        self.restarts_left -= 1 if self.restarts_left > 0 else 0
        self.restarts += 1
        self.why_again = reason
        self._go("starts again")
        return reason, True

    def ends(self) -> bool:
        """It is over for good; False: it was already."""
        return self._go("ends")

    def _go(self, event: str) -> bool:
        before = self.state
        self.state = ACTOR.after(before, event, self._actor_id, self._recorder)
        return not ACTOR.is_late(before, event)
