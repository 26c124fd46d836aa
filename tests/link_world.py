"""Two processes and the sockets between them, in memory: the real core of a link under everything that can befall sockets.

Theory of operation. A `Wire` is one socket: two queues of what was written and has not been read. A cut takes away the end of
both queues, from any place; what is left can still be read, by either side at its own time, and then comes the end of the
stream. The opener makes its next wire as soon as it has seen that, whatever the other side still reads of the old one: so
hellos arrive late and beside newer ones, and an acceptor has two wires of one link. The shells do what `Channel` and `Endpoint`
do.

What a side sends are numbers, and each arrival is checked: the next number, once. At the end, without faults, all have arrived,
and what is kept is within its bounds.
"""

from __future__ import annotations

import copyreg
import pickle
import random
from collections import deque
from typing import Any

from afield.machines import FlightRecorder
from afield.transport import link as core
from afield.transport.link import CONNECTED, DISCONNECTED, GOODBYE, HEADER, OPENING, LinkError, Links

OPENER, ACCEPTOR = 0, 1
PEER = b"opener!!"

Action = tuple[Any, ...]

copyreg.pickle(FlightRecorder, lambda recorder: (FlightRecorder, ()))


class WrongError(Exception):
    """Something arrived twice, out of order, or not at all."""


class Wire:
    """One socket; what side i has not read yet is `queues[i]`."""

    def __init__(self) -> None:
        self.queues: list[deque[tuple[str, bytes]]] = [deque(), deque()]
        self.cut = False
        self.closed = [False, False]  # sides that read it no more

    def put(self, side: int, kind: str, data: bytes) -> None:
        """Have `side` receive something, if the wire still carries it there."""
        if not self.cut and not self.closed[side]:
            self.queues[side].append((kind, data))

    def close(self, side: int) -> None:
        """One side lets go: it reads no more, and the other finds the end of the stream."""
        self.closed[side] = True
        self.queues[side].clear()
        self.cut = True


class Side:
    """One process: its end of the link, its wire, and what it has sent and received."""

    def __init__(self, which: int) -> None:
        self.which = which
        self.links = Links()
        self.link: core.Link | None = self.links.open() if which == OPENER else None
        self.wire: Wire | None = None
        self.waiting = 0  # in the outbox
        self.said = 0
        self.heard = 0
        self.over = ""
        self.dead = False


class World:
    """Both sides, and every wire that somebody may still read."""

    def __init__(self) -> None:
        self.sides = (Side(OPENER), Side(ACCEPTOR))
        self.offered: Wire | None = None  # the wire on which the opener's hello is on its way
        self.wires: list[Wire] = []
        self.refused = self.resumed = 0

    # -- what can happen -------------------------------------------------------------------------------------------

    def steps(self) -> list[Action]:
        """Return what happens by itself."""
        opener = self.sides[OPENER]
        found: list[Action] = []
        if self.offered is None and not self._done(opener) and opener.link and opener.link.state != CONNECTED:
            found.append(("dial",))
        for index, wire in enumerate(self.wires):
            for side in (OPENER, ACCEPTOR):
                if not wire.closed[side] and not self.sides[side].dead and (wire.queues[side] or wire.cut):
                    found.append(("read", index, side))
        return found

    def faults(self) -> list[Action]:
        """Return the cuts that could be made, each at every place."""
        return [
            ("cut", index, keep, keep_too)
            for index, wire in enumerate(self.wires)
            if not wire.cut
            for keep in range(len(wire.queues[0]) + 1)
            for keep_too in range(len(wire.queues[1]) + 1)
        ]

    def do(self, action: Action) -> None:
        """Let something happen, and look at everything."""
        getattr(self, action[0])(*action[1:])
        self.wires = [wire for wire in self.wires if not all(wire.closed)]
        for side in self.sides:
            complaints = side.links.validate()
            if complaints:
                raise WrongError(f"{action}: {complaints}")

    # -- the shells ------------------------------------------------------------------------------------------------

    def say(self, which: int) -> None:
        """Send the next number."""
        side = self.sides[which]
        side.waiting += 1
        self._flush(side)

    def dial(self) -> None:
        """The opener offers a new wire."""
        link = self.sides[OPENER].link
        assert link is not None
        self.offered = wire = Wire()
        self.wires.append(wire)
        wire.put(ACCEPTOR, "hello", link.hello())

    def cut(self, index: int, keep: int, keep_too: int) -> None:
        """A wire breaks: of what has not been read so much can still be."""
        wire = self.wires[index]
        wire.cut = True
        for queue, left in zip(wire.queues, (keep, keep_too), strict=True):
            while len(queue) > left:
                queue.pop()

    def close(self, which: int) -> None:
        """A side closes the link on purpose."""
        side = self.sides[which]
        if side.link is not None and not side.over:
            if side.wire is not None:
                side.wire.put(1 - which, "frame", side.link.goodbye())
            self._end(side, "closed")

    def die(self, which: int) -> None:
        """A process dies: nobody reads its wires; the other is told at some time."""
        self.sides[which].dead = True
        for wire in self.wires:
            wire.close(which)

    def told(self, which: int) -> None:
        """The other side is told of a death, by the authority: it reads what is there, and that is all."""
        side = self.sides[1 - which]
        while side.wire is not None and side.wire.queues[side.which]:
            self._take(side, side.wire)
        if side.link is not None and not side.over:
            self._end(side, "died")

    def read(self, index: int, which: int) -> None:
        """A side reads one thing from a wire, or finds its end."""
        side, wire = self.sides[which], self.wires[index]
        if wire.queues[which]:
            self._take(side, wire)
            return
        wire.close(which)
        if wire is self.offered and which == OPENER:
            self.offered = None
        if wire is side.wire:
            side.wire = None
            if side.link is not None and not side.over:
                side.link.broke()

    def _take(self, side: Side, wire: Wire) -> None:
        kind, data = wire.queues[side.which].popleft()
        if kind == "hello":
            self._answer(wire, data)
        elif kind == "answer":
            self._answered(wire, data)
        else:
            self._hear(side, data)

    def _answer(self, wire: Wire, hello: bytes) -> None:
        side = self.sides[ACCEPTOR]
        try:
            answer = side.links.answer(PEER, hello)
        except LinkError:
            self.refused += 1
            wire.close(ACCEPTOR)
            return
        wire.put(OPENER, "answer", answer.reply)
        if answer.link is None:
            wire.close(ACCEPTOR)
            return
        if answer.begins and side.link is not None:
            raise WrongError("a link began for the second time")
        self.resumed += not answer.begins
        side.link = answer.link
        self._attach(side, wire, answer.again)

    def _answered(self, wire: Wire, answer: bytes) -> None:
        side = self.sides[OPENER]
        self.offered = None
        assert side.link is not None
        if side.over:
            wire.close(OPENER)
            return
        again = side.link.on_answer(answer)
        if again is None:
            wire.close(OPENER)
            side.links.forget(side.link, b"")
            side.over = "unknown"
        else:
            self._attach(side, wire, again)

    def _attach(self, side: Side, wire: Wire, again: list[bytes]) -> None:
        if side.wire is not None:
            side.wire.close(side.which)
        side.wire = wire
        for frame in again:
            wire.put(1 - side.which, "frame", frame)
        self._flush(side)

    def _flush(self, side: Side) -> None:
        while side.waiting and side.wire is not None and side.link is not None and not side.over:
            side.waiting -= 1
            side.said += 1
            side.wire.put(1 - side.which, "frame", side.link.frame(side.said.to_bytes(4, "little")))

    def _hear(self, side: Side, frame: bytes) -> None:
        link = side.link
        assert link is not None
        size, acknowledged = HEADER.unpack_from(frame)
        link.on_acknowledged(acknowledged)
        if size == GOODBYE:
            self._end(side, "peer closed")
            return
        if size:
            link.arrived(size)
            number = int.from_bytes(frame[HEADER.size :], "little")
            if number != side.heard + 1:
                raise WrongError(f"side {side.which} heard {number} after {side.heard}")
            side.heard = number
        if link.owed_bytes >= core.OWED_BYTES and side.wire is not None:
            side.wire.put(1 - side.which, "frame", link.acknowledgement())

    def _end(self, side: Side, event: str) -> None:
        assert side.link is not None
        side.over = event
        side.waiting = 0
        if side.wire is not None:
            # What was written is still on its way; we read no more.
            side.wire.closed[side.which] = True
            side.wire.queues[side.which].clear()
            side.wire.cut = True
            side.wire = None
        side.link.end(event)
        side.links.forget(side.link, PEER)

    def _done(self, side: Side) -> bool:
        return bool(side.over or side.dead)

    # -- the end ---------------------------------------------------------------------------------------------------

    def settle(self, rng: random.Random | None = None) -> None:
        """Without further faults, let everything happen that does, in any order; then all must be well."""
        count = 0
        while steps := self.steps():
            self.do(steps[0] if rng is None else rng.choice(steps))
            count += 1
            if count > 10_000:
                raise WrongError("it does not come to an end")
        self.judge()

    def judge(self) -> None:
        """Nothing can happen any more."""
        opener, acceptor = self.sides
        if not any(side.over or side.dead for side in self.sides):
            for one, other in ((opener, acceptor), (acceptor, opener)):
                if (one.waiting and one.link is not None) or one.said != other.heard:
                    raise WrongError(f"side {one.which} said {one.said}, {other.heard} arrived, {one.waiting} wait")
            for side in self.sides:
                if side.link is not None and side.link.kept * core.FRAME_COST_BYTES >= core.OWED_BYTES:
                    raise WrongError(f"side {side.which} keeps {side.link.kept} frames")
        for one, other in ((opener, acceptor), (acceptor, opener)):
            if one.over == "closed" and not other.dead and other.link is not None and not other.over:
                # Only an acceptor may wait: for an opener that is alive, and closed while no wire carried its goodbye.
                if not (other is acceptor and other.link.state in (DISCONNECTED, OPENING)):
                    raise WrongError(f"side {other.which} does not hear that the link is closed: {other.link.state}")
            if one.over and one.link is not None and one.link.kept:
                raise WrongError("frames of a closed link are kept")

    def copy(self) -> World:
        """Return a world that goes on for itself."""
        return pickle.loads(pickle.dumps(self))  # type: ignore[no-any-return]


def fingerprint(world: World) -> Any:
    """Return what the behaviour of a world depends on."""
    sides = []
    for side in world.sides:
        link = side.link
        state = (
            ()
            if link is None
            else (
                link.state,
                link.attempt,
                link.sent,
                link.acknowledged,
                link.received,
                link.owed_bytes,
                link._answered,
            )
        )
        index = world.wires.index(side.wire) if side.wire in world.wires else -1
        sides.append((state, index, side.waiting, side.said, side.heard, side.over, side.dead))
    wires = tuple((tuple(map(tuple, wire.queues)), wire.cut, tuple(wire.closed)) for wire in world.wires)
    offered = world.wires.index(world.offered) if world.offered in world.wires else -1
    return (*sides, wires, offered)
