"""The core of a link: its books, its hellos, and what happens to it under every cut; see `link_world`."""

from __future__ import annotations

import random
from typing import Any

import pytest

from afield.errors import InternalError
from afield.transport import link as core
from afield.transport.link import CLOSED, CONNECTED, COUNT_MASK, DISCONNECTED, HEADER, Link, LinkError, Links
from tests.link_world import ACCEPTOR, OPENER, World, WrongError, fingerprint

PEER, OTHER = b"opener!!", b"another!"


def joined() -> tuple[Links, Link, Links, Link]:
    """Return both sides of a new link."""
    ours, theirs = Links(), Links()
    link = ours.open()
    answer = theirs.answer(PEER, link.hello())
    assert answer.begins and answer.link is not None and answer.again == []
    assert link.on_answer(answer.reply) == []
    return ours, link, theirs, answer.link


def deliver(frame: bytes, to: Link) -> None:
    """Have a frame arrive."""
    size, acknowledged = HEADER.unpack_from(frame)
    to.on_acknowledged(acknowledged)
    if size:
        to.arrived(size)


# -- acknowledgements ------------------------------------------------------------------------------------------------


def test_frames_are_kept_until_the_other_side_has_answered() -> None:
    _, ours, _, theirs = joined()
    frames = [ours.frame(b"x" * 10) for _ in range(3)]
    assert ours.kept == 3 and ours.kept_bytes == 3 * (10 + HEADER.size)
    deliver(frames[0], theirs)
    deliver(frames[1], theirs)
    deliver(theirs.frame(b"answer"), ours)
    assert ours.kept == 1 and theirs.kept == 1
    deliver(frames[2], theirs)
    deliver(theirs.acknowledgement(), ours)
    assert ours.kept == 0


@pytest.mark.parametrize(("count", "size"), [(64, 1), (4, core.OWED_BYTES // 4 - 100)])
def test_a_receiver_that_has_nothing_to_say_owes_an_acknowledgement_within_bounds(count: int, size: int) -> None:
    _, ours, _, theirs = joined()
    for index in range(count):
        assert theirs.owed_bytes < core.OWED_BYTES, index
        deliver(ours.frame(bytes(size)), theirs)
    assert theirs.owed_bytes >= core.OWED_BYTES
    deliver(theirs.acknowledgement(), ours)
    assert not theirs.owed_bytes and ours.kept == 0


def test_counts_go_on_beyond_what_a_header_holds() -> None:
    ours, link, theirs, other = joined()
    for each in (link, other):
        each.sent = each.acknowledged = each.received = COUNT_MASK - 2
    for _ in range(6):
        deliver(link.frame(b"x"), other)
        deliver(other.frame(b"y"), link)
    assert link.received == COUNT_MASK + 4 and link.kept == 0 and other.kept == 1
    assert not ours.validate() and not theirs.validate()
    link.broke()
    link.frame(b"never written")
    answer = theirs.answer(PEER, link.hello())
    assert [frame[HEADER.size :] for frame in link.on_answer(answer.reply) or ()] == [b"never written"]


def test_an_old_acknowledgement_changes_nothing_and_an_impossible_one_is_a_fault() -> None:
    _, ours, _, theirs = joined()
    for _ in range(3):
        deliver(ours.frame(b"x"), theirs)
    old = theirs.acknowledgement()
    deliver(ours.frame(b"x"), theirs)
    deliver(theirs.acknowledgement(), ours)
    deliver(old, ours)
    assert ours.kept == 0 and ours.acknowledged == 4
    with pytest.raises(LinkError, match="acknowledges 1 frames of 0"):
        ours.on_acknowledged(5)


# -- new sockets -----------------------------------------------------------------------------------------------------


def test_each_side_sends_again_what_the_other_has_not_got() -> None:
    _, ours, links, theirs = joined()
    sent = [ours.frame(bytes([index])) for index in range(5)]
    deliver(sent[0], theirs)
    deliver(sent[1], theirs)
    answers = [theirs.frame(b"a"), theirs.frame(b"b")]
    deliver(answers[0], ours)
    ours.broke()
    answer = links.answer(PEER, ours.hello())
    assert answer.again == answers[1:]
    assert ours.on_answer(answer.reply) == sent[2:]
    assert (ours.state, theirs.state) == (CONNECTED, CONNECTED)


def test_a_link_is_resumed_only_by_its_peer() -> None:
    _, ours, links, theirs = joined()
    theirs.frame(b"not for others")
    ours.broke()
    answer = links.answer(OTHER, ours.hello())
    assert answer.link is None and answer.again == []
    assert ours.on_answer(answer.reply) is None and ours.state == CLOSED
    assert theirs.state == CONNECTED


def test_a_link_that_was_forgotten_does_not_begin_anew() -> None:
    _, ours, links, theirs = joined()
    theirs.end("closed")
    links.forget(theirs, PEER)
    ours.broke()
    assert ours.on_answer(links.answer(PEER, ours.hello()).reply) is None
    with pytest.raises(InternalError, match="attached in state closed"):
        ours.attached(0)


def test_a_peer_that_never_answered_may_have_begun() -> None:
    """The answer was lost with the socket: the second attempt finds the link."""
    ours, links = Links().open(), Links()
    first = links.answer(PEER, ours.hello())
    assert first.begins and first.link is not None
    first.link.frame(b"early")
    again = links.answer(PEER, ours.hello())
    assert not again.begins and again.link is first.link and len(again.again) == 1


def test_an_overtaken_attempt_is_refused() -> None:
    ours, links = Links().open(), Links()
    old, new = ours.hello(), ours.hello()
    assert links.answer(PEER, new).begins
    for late in (old, new):
        with pytest.raises(LinkError, match="comes after attempt 2"):
            links.answer(PEER, late)


@pytest.mark.parametrize("hello", [b"", b"x", bytes(24), bytes(26)])
def test_nonsense_is_no_hello_and_no_answer(hello: bytes) -> None:
    with pytest.raises(LinkError):
        Links().answer(PEER, hello)
    with pytest.raises(LinkError):
        Links().open().on_answer(hello)


def test_a_peer_that_has_what_was_never_sent_is_refused() -> None:
    _, ours, links, theirs = joined()
    ours.broke()
    ours.received = 1
    with pytest.raises(LinkError, match="has 1 frames of 0"):
        links.answer(PEER, ours.hello())
    assert theirs.attempt == 1


def test_the_books_complain() -> None:
    links, link, _, _ = joined()
    assert not links.validate()
    link.frame(b"x")
    link.sent += 1
    link.owed_bytes = -1
    assert len(links.validate()) == 2
    link.sent, link.owed_bytes = 1, 0
    link.end("died")
    assert links.validate() == [f"link {link.number} is closed and still listed"]


# -- everything at once ----------------------------------------------------------------------------------------------


def run(seed: int, *, ends: bool) -> World:
    """A random life of a link; at its end all is well."""
    rng = random.Random(seed)
    world = World()
    for _ in range(rng.randrange(20, 300)):
        what = rng.random()
        steps = world.steps()
        if what < 0.3:
            which = rng.choice((OPENER, ACCEPTOR))
            if not world.sides[which].over and not world.sides[which].dead:
                world.do(("say", which))
        elif what < 0.4 and (faults := world.faults()):
            world.do(rng.choice(faults))
        elif steps:
            world.do(rng.choice(steps))
    if ends:
        which = rng.choice((OPENER, ACCEPTOR))
        if rng.random() < 0.5:
            world.do(("close", which))
        else:
            world.do(("die", which))
            for _ in range(rng.randrange(10)):
                if steps := world.steps():
                    world.do(rng.choice(steps))
            world.do(("told", which))
    world.settle(rng)
    return world


@pytest.mark.parametrize("ends", [False, True])
def test_seeds(ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "FRAME_COST_BYTES", core.OWED_BYTES // 4)
    refused = resumed = heard = 0
    for seed in range(400):
        try:
            world = run(seed, ends=ends)
        except WrongError as error:
            raise AssertionError(f"seed {seed}") from error
        refused += world.refused
        resumed += world.resumed
        heard += sum(side.heard for side in world.sides)
    assert refused > 5 and resumed > 300 and heard > 5000, (refused, resumed, heard)


def explore(says: tuple[int, int], cuts: int) -> int:
    """Follow every interleaving of sending, cuts at every place, and reading; return how many states there are."""
    start = (World(), says, cuts)
    seen = {(fingerprint(start[0]), says, cuts)}
    open_states = [start]
    while open_states:
        world, left, cuts = open_states.pop()
        steps = world.steps()
        actions = [*steps, *(("say", which) for which in (OPENER, ACCEPTOR) if left[which])]
        if cuts:
            actions += world.faults()
        if not steps and not any(left):
            world.judge()
        for action in actions:
            after = world.copy()
            after.do(action)
            rest = left
            if action[0] == "say":
                rest = (left[0] - (action[1] == OPENER), left[1] - (action[1] == ACCEPTOR))
            state = (after, rest, cuts - (action[0] == "cut"))
            key = (fingerprint(after), *state[1:])
            if key not in seen:
                seen.add(key)
                open_states.append(state)
    return len(seen)


def test_every_interleaving_with_one_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "FRAME_COST_BYTES", core.OWED_BYTES // 2)
    assert explore((2, 1), 1) > 500


@pytest.mark.slow
def test_every_interleaving_with_two_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "FRAME_COST_BYTES", core.OWED_BYTES // 2)
    assert explore((2, 1), 2) > 5000


@pytest.mark.parametrize("fault", ["frames are not kept", "received is not told", "the old wire is read on"])
def test_the_simulation_can_fail(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these rules in the core's docstring is needed."""
    monkeypatch.setattr(core, "FRAME_COST_BYTES", core.OWED_BYTES // 4)
    attached = Link.attached

    def attach_and_read_on(self: World, side: Any, wire: Any, again: list[bytes]) -> None:
        side.wire = wire
        for frame in again:
            wire.put(1 - side.which, "frame", frame)
        self._flush(side)

    if fault == "frames are not kept":
        monkeypatch.setattr(Link, "attached", lambda self, received: attached(self, received)[1:])
    elif fault == "received is not told":
        monkeypatch.setattr(Link, "arrived", lambda self, size: setattr(self, "received", self.received + 1))
    else:
        monkeypatch.setattr(World, "_attach", attach_and_read_on)
    with pytest.raises((WrongError, LinkError, InternalError)):
        for seed in range(400):
            run(seed, ends=False)


def test_states_of_a_link() -> None:
    link = Links().open()
    with pytest.raises(InternalError, match="broke in state opening"):
        link.broke()
    link.attached(0)
    link.broke()
    assert link.state == DISCONNECTED
