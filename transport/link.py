"""What two processes say to each other, in order and once, whatever happens to their sockets: a core without I/O.

Theory of operation. A *link* is one conversation of two processes. A socket carries it; when that breaks, both sides are
*disconnected*, the side that opened the link makes another socket, and the conversation goes on where it was. Nobody above
hears of that. A link ends only by a word: one side closes it on purpose (`GOODBYE`), or the node daemon says that the peer is
dead. A broken socket is neither: it says nothing of the process behind it.

Frames are counted from 1, in each direction for itself; the numbers are not sent. The header of each frame, and a bare header
without a body, says how many frames of the other direction have arrived (the low 32 bits are enough, as far fewer are
unacknowledged). A sender keeps its encoded frames until they are acknowledged. No clock is needed: a receiver that owes
`OWED_BYTES` sends a bare header, so at most so much is kept while nothing moves.

A new socket begins with a hello inside the mutual proof of `auth`, so that only the proven peer of a link can resume it, and
nobody can change what it says: the number of the link (the opener counts), which attempt this is, whether the peer has ever
answered, and how many frames have arrived. The other side answers with its own count. Each sends again what the other has not
got, from there. What is half received is forgotten with its socket, so a frame arrives once, and in order:

- The opener lets go of its old socket before it says how much it has, the acceptor when it answers. So neither count can grow
  between saying it and using the new socket.
- An old attempt that arrives late, beside a newer one, is refused by its number; it would only cost the newer socket.
- A peer that does not know a link that it has once answered has ended it: the link is *unknown*, which is final.
- A *fleeting* link (of a tool that only asks) is not resumed: its break is its end.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable

from afield.machines import FlightRecorder, Table

#: A receiver tells how many frames have arrived when those of which the peer does not know are so much: their bytes, and
#: `FRAME_COST_BYTES` for each, which makes at most 64 of them.
OWED_BYTES = 256 << 10
FRAME_COST_BYTES = 4 << 10

#: Size of the body, and how many frames have arrived here (its low 32 bits).
HEADER = struct.Struct("<II")
COUNT_MASK = 0xFFFFFFFF
#: In place of a size: this side has closed the link, and no frame follows.
GOODBYE = 0xFFFFFFFF

#: Of the opener: flags, number of the link, attempt, frames received. Of the acceptor: verdict, frames received.
_HELLO = struct.Struct("<BQQQ")
_ANSWER = struct.Struct("<BQ")
_ANSWERED_BEFORE, _FLEETING = 1, 2
_KNOWN, _UNKNOWN = 0, 1

OPENING, CONNECTED, DISCONNECTED, CLOSED = "opening", "connected", "disconnected", "closed"
_ALIVE = (OPENING, CONNECTED, DISCONNECTED)

LINK = Table(
    "link of two processes",
    OPENING,
    {
        (OPENING, "attached"): CONNECTED,
        (CONNECTED, "broke"): DISCONNECTED,
        (DISCONNECTED, "attached"): CONNECTED,
        (CONNECTED, "attached"): CONNECTED,  # the peer noticed the break first
        **{(state, "closed"): CLOSED for state in _ALIVE},
        (CONNECTED, "peer closed"): CLOSED,
        **{(state, "unknown"): CLOSED for state in (OPENING, DISCONNECTED)},
        **{(state, "died"): CLOSED for state in _ALIVE},
    },
    {
        OPENING: "no socket has carried it yet",
        CONNECTED: "a proven socket carries it",
        DISCONNECTED: "its socket broke; the side that opened it makes another one, and what was not acknowledged is kept",
        CLOSED: "one side has ended it, or its peer is dead: nothing is kept, and nothing resumes it",
    },
)


class LinkError(Exception):
    """What a peer says of a link cannot be: a fault of that process, or of ours."""


class Link:
    """One side of a conversation. The attributes are written here alone; `Channel` reads some on its way.

    Attributes:
        number: which of the opener's links it is.
        opener: whether this side opened it.
        fleeting: its break is its end.
        attempt: the last attempt to put it on a socket.
        state: one of `LINK`.
        sent, acknowledged: frames that left, in this direction, and how many of them the peer has.
        received: frames that arrived.
        owed_bytes: what those of them cost of which the peer does not know.
    """

    __slots__ = (
        "_answered",
        "_kept",
        "_recorder",
        "acknowledged",
        "attempt",
        "fleeting",
        "number",
        "opener",
        "owed_bytes",
        "received",
        "sent",
        "state",
    )

    def __init__(self, number: int, recorder: FlightRecorder, *, opener: bool, fleeting: bool = False) -> None:
        self.number = number
        self.opener = opener
        self.fleeting = fleeting
        self.attempt = 0
        self.state = OPENING
        self.sent = self.acknowledged = self.received = self.owed_bytes = 0
        self._kept: deque[bytes] = deque()  # frames acknowledged + 1 .. sent, encoded
        self._answered = False  # opener: the peer has known it once
        self._recorder = recorder

    # -- frames ----------------------------------------------------------------------------------------------------

    def frame(self, body: bytes) -> bytes:
        """Number and keep the next frame; return it as it is sent."""
        self.owed_bytes = 0
        frame = HEADER.pack(len(body), self.received & COUNT_MASK) + body
        self.sent += 1
        self._kept.append(frame)
        return frame

    def arrived(self, size: int) -> None:
        """A whole frame has arrived, and is handled from here on whatever happens."""
        self.received += 1
        self.owed_bytes += size + FRAME_COST_BYTES

    def on_acknowledged(self, low: int) -> None:
        """The peer says how many frames it has; forget those.

        Raises:
            LinkError: it says that it has what was never sent.
        """
        kept = self._kept
        more = (low - self.acknowledged) & COUNT_MASK
        if more > len(kept):
            if more <= COUNT_MASK >> 1:
                raise LinkError(f"acknowledges {more} frames of {len(kept)} on their way")
            return  # the header of a frame that was sent again: it was true once
        self.acknowledged += more
        if more == len(kept):
            kept.clear()
        else:
            for _ in range(more):
                kept.popleft()

    def acknowledgement(self) -> bytes:
        """Return the bare header that tells."""
        self.owed_bytes = 0
        return HEADER.pack(0, self.received & COUNT_MASK)

    def goodbye(self) -> bytes:
        """Return what tells the peer that this side closes the link."""
        return HEADER.pack(GOODBYE, self.received & COUNT_MASK)

    @property
    def moved(self) -> int:
        """How many frames are known to have arrived, in both directions."""
        return self.received + self.acknowledged

    @property
    def kept(self) -> int:
        """Frames that are kept, since the peer may not have them."""
        return len(self._kept)

    @property
    def kept_bytes(self) -> int:
        """How much they are."""
        return sum(map(len, self._kept))

    # -- sockets ---------------------------------------------------------------------------------------------------

    def hello(self) -> bytes:
        """Return what the opener says on a new socket; its old one is gone by now."""
        self.attempt += 1
        flags = (_ANSWERED_BEFORE if self._answered else 0) | (_FLEETING if self.fleeting else 0)
        return _HELLO.pack(flags, self.number, self.attempt, self.received)

    def on_answer(self, answer: bytes) -> list[bytes] | None:
        """The acceptor has answered: return the frames to send again; None if it does not know the link.

        Raises:
            LinkError: the answer makes no sense.
        """
        try:
            verdict, received = _ANSWER.unpack(answer)
        except struct.error:
            raise LinkError("the answer is no answer") from None
        if verdict != _KNOWN:
            self.end("unknown")
            return None
        self._answered = True
        return self.attached(received)

    def attached(self, peer_received: int) -> list[bytes]:
        """A proven socket carries the link from here on: return the frames to send again.

        Raises:
            LinkError: the peer has what was never sent, or no longer has what it has acknowledged.
        """
        if not 0 <= peer_received - self.acknowledged <= len(self._kept):
            raise LinkError(f"has {peer_received} frames of {self.sent}, {self.acknowledged} of them acknowledged")
        self.on_acknowledged(peer_received & COUNT_MASK)
        self.owed_bytes = 0  # the new socket began with it
        self._change("attached")
        return list(self._kept)

    def broke(self) -> None:
        """The socket is gone, for whatever reason."""
        self._change("broke")

    def end(self, event: str) -> None:
        """The link is over: "closed", "peer closed", "unknown" or "died"."""
        self._change(event)
        self._kept.clear()

    def _change(self, event: str) -> None:
        self.state = LINK.after(self.state, event, ("link", self.number, self.attempt), self._recorder)

    def complaints(self) -> Iterable[str]:
        """Yield what is wrong with the books."""
        if self.state != CLOSED and self.sent - self.acknowledged != len(self._kept):
            yield f"link {self.number}: {self.sent} sent, {self.acknowledged} acknowledged, {self.kept} kept"
        if not self.owed_bytes >= 0 or (self.owed_bytes and not self.received):
            yield f"link {self.number}: {self.received} received, {self.owed_bytes} bytes owed"
        if self.state == CLOSED and self._kept:
            yield f"link {self.number}: closed, and {self.kept} frames kept"


class Answer:
    """What an acceptor decides about a hello.

    Attributes:
        link: the link that goes on or begins; None if there is none.
        begins: whether it is new.
        again: the frames that the peer has not got.
        reply: what to say to the peer.
    """

    __slots__ = ("again", "begins", "link", "reply")

    def __init__(self, link: Link | None, *, begins: bool, again: list[bytes], reply: bytes) -> None:
        self.link = link
        self.begins = begins
        self.again = again
        self.reply = reply


class Links:
    """All links of one process: those it opened and those it accepted."""

    def __init__(self) -> None:
        self.recorder = FlightRecorder()
        self._opened: dict[int, Link] = {}
        self._accepted: dict[tuple[bytes, int], Link] = {}
        self._last_number = 0

    def open(self, *, fleeting: bool = False) -> Link:
        """Begin a link."""
        self._last_number += 1
        link = Link(self._last_number, self.recorder, opener=True, fleeting=fleeting)
        self._opened[link.number] = link
        return link

    def answer(self, peer_id: bytes, hello: bytes) -> Answer:
        """A proven peer has said hello on a new socket, which carries the link that it names from here on.

        Nothing may be read of the old socket after this: the reply says how much has arrived.

        Raises:
            LinkError: this is no hello, or one that a newer attempt has overtaken, or it makes no sense.
        """
        try:
            flags, number, attempt, received = _HELLO.unpack(hello)
        except struct.error:
            raise LinkError("this is no hello") from None
        link = self._accepted.get((peer_id, number))
        if link is None:
            if flags & _ANSWERED_BEFORE or received:
                self.recorder.note(((peer_id, number), "is not known here any more"))
                return Answer(None, begins=False, again=[], reply=_ANSWER.pack(_UNKNOWN, 0))
            link = Link(number, self.recorder, opener=False, fleeting=bool(flags & _FLEETING))
            self._accepted[peer_id, number] = link
            begins = True
        else:
            if attempt <= link.attempt:
                raise LinkError(f"attempt {attempt} of link {number} comes after attempt {link.attempt}")
            begins = False
        again = link.attached(received)
        link.attempt = attempt
        return Answer(link, begins=begins, again=again, reply=_ANSWER.pack(_KNOWN, link.received))

    def forget(self, link: Link, peer_id: bytes) -> None:
        """A link is over."""
        if link.opener:
            self._opened.pop(link.number, None)
        else:
            self._accepted.pop((peer_id, link.number), None)

    def all(self) -> list[Link]:
        """Return the links that are not over."""
        return [*self._opened.values(), *self._accepted.values()]

    def validate(self) -> list[str]:
        """Return complaints about the books, none if all is well."""
        links = self.all()
        closed = [f"link {link.number} is closed and still listed" for link in links if link.state == CLOSED]
        return closed + [complaint for link in links for complaint in link.complaints()]
