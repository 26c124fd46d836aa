"""One call's life at a worker, interrupted at every bytecode: it has one answer, and whoever runs it goes on."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType, SimpleNamespace
from typing import Any

import cloudpickle
import pytest

from afield.errors import TaskCancelledError, TaskError
from afield.runtime.cores.objects import FAILED, INLINE
from afield.runtime.cores.work import ANSWERED, CANCELLED, INTERRUPT, Work
from afield.runtime.process import current
from afield.runtime.process.serialization import deserialize, dumps_plain
from afield.runtime.wire import messages
from afield.runtime.worker import invocation, outcomes, replies, streaming, yields
from afield.runtime.worker.host import Host
from afield.runtime.worker.invocation import Invocation
from afield.runtime.worker.outcomes import LoadedCallee
from afield.transport.interrupts import is_protected
from tests.bytecodes import Bytecodes, place_of

#: The files whose bytecodes are interrupted.
FILES = {each.__file__ for each in (invocation, outcomes, replies, streaming, yields)}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    """A worker's host without a session around it."""
    lock = threading.RLock()
    devices = SimpleNamespace(broken=lambda: "", settle=lambda: None)
    values = SimpleNamespace(parts=SimpleNamespace(devices=devices))
    process: Any = SimpleNamespace(
        subscribe=lambda event, handler: None,
        pump=SimpleNamespace(lock=lock, wake_standby=lambda: None),
        loop=SimpleNamespace(dirty=[]),
        after_events=lambda: None,
    )
    process.locked = lambda action, *args: action(*args)
    participant: Any = SimpleNamespace(process=process, values=values, cancellation=SimpleNamespace())
    participant.cancellation.cancel_children = lambda task_id: None
    monkeypatch.setattr(current, "process", process)
    return Host(participant)


class Peer:
    """A channel, as far as a call needs it."""

    peer_id = b"peer"
    closed = False


def call_of(function: Callable[..., Any], args: tuple[Any, ...] = (), num_returns: int = 1) -> Invocation:
    """Make a call as a push does."""
    define = messages.Define(1, function.__name__, cloudpickle.dumps(function), num_returns, 0, "", False)
    data = (dumps_plain((args, {})) or b"") if args else b""
    peer: Any = Peer()
    return Invocation(peer, messages.Push(7, b"t" * 16, 1, data), LoadedCallee(define))


def drive(host: Host, call: Invocation) -> None:
    """Do with a call what the main thread does."""
    work: Work[Invocation] = host.work
    work.arrived(call)
    taken = work.take()
    assert taken is call
    taken.run(host)
    work.current = None


class Interrupter(Bytecodes):
    """Cancels the running call before bytecode number `at` of the worker's files, and raises as the signal's handler does.

    Where it must not come it is held back, as `Pump.interrupt` has it.
    """

    def __init__(self, host: Host, at: int) -> None:
        super().__init__(FILES)
        self.host = host
        self.at = at
        self.where = ""
        self.held_back = False
        self.decision = ""

    def before(self, frame: FrameType) -> None:
        if self.count == self.at:
            self.where = place_of(frame)
            _, self.decision = self.host.work.cancel(self.host_channel, 7, messages.Cancel(7, True))
            self.held_back = self.decision == INTERRUPT
        if self.held_back and not is_protected(frame):
            self.held_back = False
            if self.host.work.take_interrupt():
                raise KeyboardInterrupt

    @property
    def host_channel(self) -> Any:
        """Who has called."""
        running = self.host.work.current
        return running.channel if running is not None else None


def returns(*args: Any) -> Any:
    """Return something plain."""
    return args


def raises(*args: Any) -> Any:
    """Raise something."""
    raise ValueError("of its own")


def swallows(*args: Any) -> Any:
    """Return in spite of an interrupt."""
    try:
        return list(args)
    except KeyboardInterrupt:
        return "swallowed"


def several(*args: Any) -> Any:
    """Return two values."""
    return [1, 2]


def items(*args: Any) -> Any:
    """Yield two values."""
    yield 1
    yield 2


CASES: list[tuple[Callable[..., Any], tuple[Any, ...], int]] = [
    (returns, (), 1),
    (returns, (1, "a"), 1),
    (raises, (), 1),
    (raises, (1,), 2),
    (swallows, (1,), 1),
    (several, (), 2),
    (items, (), messages.STREAMING),
    (items, (), 2),
]


@pytest.mark.parametrize(("function", "args", "num_returns"), CASES)
def test_an_interrupt_at_every_bytecode(
    host: Host, function: Callable[..., Any], args: tuple[Any, ...], num_returns: int
) -> None:
    # Python 3.12 traces bytecodes from the second `settrace` on: the first frames that ask for it turn it on.
    sys.settrace(Interrupter(host, sys.maxsize).trace)
    try:
        drive(host, call_of(function, args, num_returns))
    finally:
        sys.settrace(None)
    host.waiting.clear()
    at, outcomes_seen = 0, set()
    while True:
        at += 1
        call = call_of(function, args, num_returns)
        interrupter = Interrupter(host, at)
        sys.settrace(interrupter.trace)
        try:
            drive(host, call)
        except KeyboardInterrupt:
            pytest.fail(f"an interrupt came through at {interrupter.where}")
        finally:
            sys.settrace(None)
        answers = [answer for _, answer in host.waiting if type(answer) is not messages.Item]
        host.waiting.clear()
        assert len(answers) == 1, interrupter.where
        kind = outcome(answers[0])
        assert call.state == (CANCELLED if kind == "cancelled" else ANSWERED), interrupter.where
        if interrupter.decision == INTERRUPT and not interrupter.where.startswith(Invocation.answer.__name__ + ":"):
            assert kind == "cancelled", interrupter.where
        outcomes_seen.add(kind)
        assert host.work.validate() == []
        if interrupter.count < at:
            break
    assert at > 50
    assert outcomes_seen == {"cancelled", "error" if function is raises else "value"}


def outcome(answer: Any) -> str:
    """Say in a word what an answer is."""
    result = answer.results[0] if type(answer) is messages.ReplyMany else answer
    if result.kind == INLINE:
        return "value"
    assert result.kind == FAILED
    error = deserialize(result.data, "the error", None)
    if isinstance(error, TaskCancelledError) and not isinstance(error, TaskError):
        return "cancelled"
    assert isinstance(error, TaskError) and isinstance(error.cause, ValueError), error
    return "error"


REBUILT: list[int] = []


def rebuilt() -> Callable[..., Any]:
    """Note that a function was unpickled."""
    REBUILT.append(1)
    return returns


class Rebuilt:
    """A function that notes when it is unpickled."""

    __name__ = "rebuilt"

    def __call__(self) -> None:
        """Do nothing."""

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuilt, ()


def test_a_call_that_was_marked_while_it_was_taken_never_starts(host: Host) -> None:
    call = call_of(Rebuilt())
    host.work.missed[call.channel, 7] = messages.Cancel(7, False)
    drive(host, call)
    [(_, answer)] = host.waiting
    assert outcome(answer) == "cancelled"
    assert not REBUILT


def test_what_a_call_leaves_behind_does_not_keep_its_arguments(host: Host) -> None:
    call = call_of(returns, ("x" * 1000,))
    drive(host, call)
    assert call.push.arguments == b""
