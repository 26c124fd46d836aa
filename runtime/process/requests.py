"""Questions between a process and the node daemon, in both directions, and their answers.

Theory of operation. A question of ours has a number; whoever asks blocks, driving the loop, until the answer with that number
is handed to `answered`, by the handler of `Answer` here or of a more special message elsewhere. Whoever is interrupted while
he waits has given up: if the answer has come by then it is given back, and one that comes later is refused (`answered` says
so), so that nothing that was granted is forgotten.

The daemon asks too (`Query`, for `node.census`): parts of the runtime leave what answers a question of some name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from afield.errors import AfieldError, InternalError, RuntimeDiedError
from afield.runtime.process.events import name_of
from afield.runtime.wire import messages
from afield.transport.channel import Channel
from afield.transport.pump import Pump, Waiter


class Shell(Protocol):
    """What requests need of their process."""

    pump: Pump

    @property
    def daemon(self) -> Channel:
        """Return the channel to the node daemon."""

    def locked(self, action: Callable[[], None]) -> None:
        """Call `action` as one transition."""

    def check_alive(self) -> None:
        """Raise if nothing can be answered any more."""

    def tidy(self) -> None:
        """Do what has been left for later, as far as it may make room; the caller holds the lock."""


class _Then:
    """Stands where a thread would wait for an answer."""

    __slots__ = ("finish",)

    def __init__(self, finish: Callable[[], None]) -> None:
        self.finish = finish


class Requests:
    """The questions of one process and those to it."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._slots: dict[int, list[Any]] = {}  # number -> [who waits, the answer]
        self._number = 0
        self._answers: dict[str, Callable[[Any], Any]] = {}
        self._takes_long: dict[str, Callable[[], bool]] = {}

    # -- ours ----------------------------------------------------------------------------------------------------

    def ask(
        self,
        make: Callable[[int], Any],
        give_up: Callable[[Any], None] | None = None,
        wait: Callable[[Waiter], bool] | None = None,
    ) -> Any:
        """Send the daemon a message with a request number and block until it is answered.

        Args:
            make: returns the message.
            give_up: called with an answer that came although the wait was interrupted.
            wait: how to wait; the pump's way by default.
        """
        shell = self._shell
        waiter = Waiter()
        slot: list[Any] = [waiter, None]

        def send() -> None:
            shell.check_alive()
            shell.tidy()
            self._number += 1
            self._slots[self._number] = slot
            shell.daemon.send(make(self._number))

        shell.locked(send)
        try:
            while not (wait or shell.pump.wait_for)(waiter):
                shell.check_alive()
        except BaseException:
            with shell.pump.lock:
                for number in [number for number, asked in self._slots.items() if asked is slot]:
                    del self._slots[number]
            if waiter.done and give_up is not None and not isinstance(slot[1], BaseException):
                give_up(slot[1])
            raise
        answer = slot.pop()
        if isinstance(answer, BaseException):
            try:
                raise answer
            finally:
                del answer  # else it refers to itself, by way of this frame, and keeps what all its frames have
        return answer

    def ask_nowait(self, make: Callable[[int], Any], then: Callable[[], None]) -> None:
        """Send the daemon such a message and have `then` called, under the lock, when it is answered, or never will be.

        The caller holds the lock.
        """
        self._number += 1
        self._slots[self._number] = [_Then(then), None]
        self._shell.daemon.send(make(self._number))

    def answered(self, request: int, value: Any) -> bool:
        """Hand a value (or an error to raise) to the thread that made the request; return False if it has given up."""
        slot = self._slots.pop(request, None)
        if slot is None:
            return False
        slot[1] = value
        slot[0].finish()
        return True

    def on_answer(self, channel: Channel, message: messages.Answer) -> None:
        """The daemon has answered."""
        self.answered(message.request, AfieldError(message.error) if message.error else message.value)

    def fail_all(self, reason: str) -> None:
        """Nothing will be answered any more."""
        for slot in self._slots.values():
            slot[1] = RuntimeDiedError(reason)
            slot[0].finish()

    # -- the daemon's --------------------------------------------------------------------------------------------

    def answer(self, what: str, how: Callable[[Any], Any], takes_long: Callable[[], bool] = lambda: False) -> None:
        """Have questions called `what` answered by `how(argument)`, which is called under the lock.

        Where it `takes_long`, the daemon is told beforehand that the answer is being made.

        Raises:
            InternalError: they are answered already.
        """
        if what in self._answers:
            first, second = name_of(self._answers[what]), name_of(how)
            raise InternalError(
                f"the question {what!r} is answered by {first} already; {second} cannot be a second one"
            )
        self._answers[what] = how
        self._takes_long[what] = takes_long

    def on_query(self, channel: Channel, message: messages.Query) -> None:
        """The daemon asks."""
        how = self._answers.get(message.what)
        if how is None:
            channel.send(messages.Answer(message.request, None, f"this process does not know {message.what!r}"))
        else:
            if self._takes_long[message.what]():
                channel.send(messages.Answer(message.request, None, messages.WORKING))
                channel.flush()
            channel.send(messages.Answer(message.request, how(message.argument)))
