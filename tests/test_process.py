"""Where the parts of a process are joined: handlers, events, questions, and what is told of an internal fault."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import afield
from afield.errors import InternalError, RuntimeDiedError
from afield.machines import MOST_CHARACTERS, MOST_COMPLAINTS, MOST_TOLD, FlightRecorder, account
from afield.runtime.calls import participation
from afield.runtime.process.events import EVENTS, LIFE_ENDED, OBLIGATION_MET, RECOMPUTE, TICK, Event, Subscribers
from afield.runtime.process.frees import FREE_DELAY_S, MAX_FREED, Frees
from afield.runtime.process.process import Process
from afield.runtime.wire import messages
from tests.helpers import poll


def process_here() -> Process:
    """Return the driver's process."""
    assert participation.participant is not None
    return participation.participant.process


# -- handlers and events ---------------------------------------------------------------------------------------------


def test_a_message_type_has_one_handler(shared_runtime: None) -> None:
    before = dict(process_here().handlers)
    first = "Process._install_handlers.<locals>.<lambda>"
    with pytest.raises(
        InternalError, match=f"^Added is handled by {re.escape(first)} already; print cannot be a second"
    ):
        process_here().register(messages.Added, print)
    assert process_here().handlers == before


def test_what_one_does_cannot_be_done_by_two(shared_runtime: None) -> None:
    for event, first in ((LIFE_ENDED, "Participant._on_life_ended"), (RECOMPUTE, "Recovery._recompute")):
        text = f"^'{event.name}' is for one subscriber, which is {first}; print cannot be a second one"
        with pytest.raises(InternalError, match=text):
            process_here().subscribe(event, print)  # type: ignore[misc]


def test_events_reach_all_in_the_order_of_their_coming() -> None:
    subscribers, told = Subscribers(), list[str]()
    ticks = subscribers.of(TICK)
    subscribers.add(TICK, lambda now: told.append("first"))
    subscribers.add(TICK, lambda now: told.append("second"))
    for tick in ticks:  # who took the list earlier sees who came later
        tick(0.0)
    assert told == ["first", "second"]
    assert [event for event in EVENTS if event.alone] == [LIFE_ENDED, OBLIGATION_MET, RECOMPUTE]
    with pytest.raises(KeyError):
        subscribers.of(Event("nobody announces it"))


def test_a_question_has_one_answer(shared_runtime: None) -> None:
    with pytest.raises(InternalError, match=r"^the question 'stats' is answered by Participant\."):
        process_here().requests.answer("stats", lambda argument: argument)


# -- frees -----------------------------------------------------------------------------------------------------------


def test_frees_of_a_moment_leave_together() -> None:
    sent: list[list[bytes]] = []
    frees = Frees(sent.append)
    frees.add(b"a", soon=False)
    assert frees.tick(1.0) is None and sent == [[b"a"]]  # the first after a while leaves at once
    frees.add(b"b", soon=False)
    frees.add(b"c", soon=False)
    assert frees.tick(1.0) == 1.0 + FREE_DELAY_S and len(sent) == 1
    assert frees.tick(1.0 + FREE_DELAY_S) is None and sent[1:] == [[b"b", b"c"]]
    frees.add(b"d", soon=True)
    assert frees.tick(1.0 + FREE_DELAY_S) is None and sent[2:] == [[b"d"]]
    for _ in range(MAX_FREED):
        frees.add(b"e", soon=False)
    assert frees.tick(1.0 + FREE_DELAY_S) is None and len(sent[3]) == MAX_FREED
    frees.flush()
    assert len(sent) == 4


# -- internal faults -------------------------------------------------------------------------------------------------


class Wrong:
    """A core that is wrong a thousand times."""

    def __init__(self) -> None:
        self.recorder = FlightRecorder()

    def validate(self) -> list[str]:
        """Complain."""
        return ["x" * 1000] * 1000


class Unreadable(Wrong):
    """A core so wrong that it cannot be looked at."""

    def validate(self) -> list[str]:
        """Fail."""
        raise KeyError("entry")


def test_an_account_is_bounded_and_never_fails() -> None:
    wrong, unreadable = Wrong(), Unreadable()
    for number in range(100):
        wrong.recorder.note((b"\x01", "happens", number))
    lines = account({"wrong": wrong, "unreadable": unreadable}).splitlines()
    assert len(lines) == MOST_COMPLAINTS + 1 + MOST_TOLD + 1
    assert max(map(len, lines)) == MOST_CHARACTERS
    assert lines[MOST_COMPLAINTS] == f"wrong is wrong: {1000 - MOST_COMPLAINTS} more complaints"
    assert lines[-2] == "wrong did: 01 happens 99"
    assert lines[-1] == "unreadable is wrong: its state cannot be looked through: KeyError('entry')"


@pytest.fixture
def crashes(runtime: afield.ClusterInfo, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What ended threads."""
    ended: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", ended.append)
    yield ended
    ended.clear()  # it refers to frames of the runtime


def test_an_internal_fault_tells_what_the_cores_know(crashes: list[Any]) -> None:
    @afield.remote
    def wait_for_ever() -> None:
        threading.Event().wait()

    process = process_here()
    assert set(process.cores) >= {"ownership", "lineage"}
    stored = afield.put(np.zeros(1 << 16))
    gone = stored.hex()
    del stored
    pending, broken = wait_for_ever.remote(), afield.put(1)
    entry = process.table.entries[broken.id]
    process.locked(setattr, entry, "pins", -1)

    def fault(now: float) -> None:
        if threading.current_thread().name == "afield-pump":
            raise InternalError("what must not happen has happened")

    process.subscribe(TICK, fault)
    process.pump.wake_standby()
    poll(lambda: process.dead and crashes)
    process.locked(setattr, entry, "pins", 0)
    with pytest.raises(RuntimeDiedError) as raised:
        afield.get(pending)
    text = str(raised.value)
    assert text.startswith("a bug in the runtime: InternalError: what must not happen has happened\n")
    assert f"ownership is wrong: {broken.hex()} has 1 handles and -1 pins" in text
    assert f"ownership did: {gone} is collected, and freed in the store" in text


def test_an_internal_fault_in_a_thread_that_waits_is_told_to_all(runtime: afield.ClusterInfo) -> None:
    @afield.remote
    def wait_for_ever() -> None:
        threading.Event().wait()

    told: list[BaseException] = []

    def wait() -> None:
        try:
            afield.get(wait_for_ever.remote())
        except BaseException as error:
            told.append(error)

    process = process_here()
    thread = threading.Thread(target=wait)
    with process.pump.driven_elsewhere():  # the standby thread stays away
        thread.start()
        process.locked(process.loop.after, 0.01, dict[str, int]().popitem)
        with pytest.raises((KeyError, RuntimeDiedError)):
            afield.get(wait_for_ever.remote())
        thread.join(20)
    assert told and type(told[0]) in (KeyError, RuntimeDiedError)
    with pytest.raises(RuntimeDiedError, match="a bug in the runtime: KeyError"):
        afield.get(wait_for_ever.remote())
