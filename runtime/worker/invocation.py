"""One call's life at a worker, from its push to its answer, whatever runs it.

Theory of operation. An `Invocation` is made when its push arrives and is what the queue holds, what the code that runs in it
asks for its name and ids (`process.context`), and what `cores.work` decides about. Its phases are those of
`cores.work.TABLE`:

    prepare     the function and the arguments are rebuilt
    (the user's code runs)
    returned    the result is made into a reply, or
    raised      the error is
    answer      the reply is queued; that of a cancelled call is replaced by TaskCancelledError, whatever the call has returned
                or raised

`run` does all of it on the thread that calls it: the main thread and thread pools differ only in how they come by a call and
wait. `run_async` does it on an event loop.

**Interrupts.** KeyboardInterrupt is raised in the main thread while the phase is PREPARING, RUNNING or FINISHING, once for
each cancelled call. It may come between any two bytecodes: hence the phase changes for the last time inside of `try`, and
there is a second `except` for an interrupt that comes at the moment in which the first one is entered. Code of the user's may
catch it and go on: the outcome does not depend on that.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

from afield.causes import is_a
from afield.errors import AfieldError, DeviceLostError, TaskCancelledError
from afield.runtime.cores.work import (
    ANSWERED,
    CANCELLED,
    FAILING,
    FINISHING,
    PREPARING,
    QUEUED,
    REPLYING,
    RUNNING,
)
from afield.runtime.process import current
from afield.runtime.process.context import ActorExit, TaskContext, enter, leave_copy
from afield.runtime.wire import messages
from afield.runtime.worker.host import Host
from afield.runtime.worker.outcomes import LoadedCallee
from afield.runtime.worker.streaming import Stream
from afield.runtime.worker.yields import Yields, is_iterator
from afield.transport.channel import Channel
from afield.transport.interrupts import interruptible

#: Takes the place of a push that is answered: what the call's code has left behind may keep the call, but not its arguments.
_OVER = messages.Push(0, b"", 0, b"")


class StoppedError(Exception):
    """Ends a call that was cancelled before the user's code began; seen by nobody."""


class Invocation(TaskContext):
    """One call."""

    __slots__ = ("cancel", "channel", "callee", "argument_pins", "push", "sequence", "state", "stream", "yields")

    def __init__(self, channel: Channel, push: messages.Push, callee: LoadedCallee) -> None:
        self.task_id = push.task_id
        self.name = callee.name
        self.scope = None
        self.obligation = None
        self.channel = channel
        self.push = push
        self.sequence = push.sequence
        self.callee = callee
        self.state = QUEUED
        #: The request to cancel it.
        self.cancel: messages.Cancel | None = None
        #: Its items, if it yields them one by one.
        self.stream: Stream | None = None
        #: Its results, if it yields those.
        self.yields: Yields | None = None
        #: The memory that its arguments lie in, which it may keep: (weak reference, object id, owner).
        self.argument_pins: list[Any] | None = None

    @property
    def caller(self) -> Channel:
        """Who has pushed it."""
        return self.channel

    # -- the phases ----------------------------------------------------------------------------------------------

    def prepare(self, host: Host) -> tuple[Callable[..., Any], Any, dict[str, Any]]:
        """Rebuild the function and its arguments.

        Raises:
            StoppedError: it was cancelled meanwhile, and the code that ran did not let the interrupt through.
        """
        self.state = PREPARING
        push, callee = self.push, self.callee
        if self.cancel is not None:  # at the moment in which it was taken
            raise StoppedError
        function = callee.function
        if function is None:
            function = host.function(callee)
        if push.arguments or push.location is not None:
            self.argument_pins = []
            args, kwargs = host.outcomes.arguments(push, self, self.channel.peer_id, self.argument_pins)
        else:
            args, kwargs = (), {}
        if not callee.plain:
            if callee.once and host.replies.waiting:
                host.replies.flush()  # should it end this process, the owner takes the oldest without a reply for it
            if callee.num_returns == messages.STREAMING:
                self.stream = Stream(host.outcomes, host.replies, self.channel, push, callee, host.work.concurrent)
        if self.cancel is not None:
            raise StoppedError
        return function, args, kwargs

    def _yields(self, host: Host) -> Yields:
        self.yields = Yields(host.outcomes, self.push, self.callee, self.channel.peer_id)
        return self.yields

    def returned(self, host: Host, holder: list[Any]) -> Any:
        """Make the reply out of what it returned, to which `holder` has the only reference."""
        self.state = FINISHING
        if current.process is not host.process:
            leave_copy(None)
        if self.argument_pins:
            host.outcomes.keep_argument_pins(self.argument_pins, self)
        if self.yields is None:
            reply = host.outcomes.reply(holder, self, self.push, self.channel.peer_id, self.callee)
        else:
            reply = messages.ReplyMany(self.sequence, self.yields.results.made)
        self.state = REPLYING
        return reply

    def raised(self, host: Host, error: BaseException) -> Any:
        """Make the reply out of what it raised; None for a cancelled call, which needs no other than `answer` makes."""
        made = self.yields.results.made if self.yields is not None else ()
        in_user_code = self.state == RUNNING and not (self.yields is not None and self.yields.writing)
        self.state = FAILING
        if current.process is not host.process:
            leave_copy(error)
        # Outside of user code it is our own device that is lost: where arguments go to, or results come from.
        lost = is_a(error, DeviceLostError) and not in_user_code
        broken = str(error) if lost else host.participant.values.parts.devices.broken()
        if broken:
            host.leave(broken)
        if is_a(error, ActorExit):
            host.goodbye = "it ended itself"
            nothing = [self._nothing()]
            reply = host.outcomes.reply(nothing, self, self.push, self.channel.peer_id, self.callee)
            if made:
                reply.results[: len(made)] = made
        elif self.cancel is not None:
            reply = None
        else:
            reply = host.outcomes.failure(
                self.sequence, self.task_id, self.callee, error, in_user_code, self.channel.peer_id, made
            )
        self.state = REPLYING
        return reply

    def _nothing(self) -> Any:
        """Return what a call has returned that ended its actor instead."""
        if self.stream is not None:
            return self.stream.sent
        return None if self.callee.num_returns == 1 else [None] * self.callee.num_returns

    def keep_argument_pins_of_failed(self, host: Host) -> None:
        """Keep what user code has put aside before it raised; the frames that only took part are gone with the error.

        What it began on the device may end badly only here: then this process cannot go on.
        """
        try:
            host.outcomes.keep_argument_pins(self.argument_pins or [], self)
        except AfieldError as error:
            host.leave(str(error))

    def answer(self, host: Host, reply: Any) -> None:
        """Queue the reply; it waits until the refs that the call keeps are registered with their owners."""
        if self.cancel is None:
            self.state = ANSWERED
        else:
            reply = self._as_cancelled(host, reply)
            self.state = CANCELLED
        enter(None)
        self.push, self.yields = _OVER, None
        if self.obligation is not None and host.replies.wait_for_registration(self.obligation, self.channel, reply):
            return
        host.waiting.append((self.channel, reply))
        if host.goodbye:
            host.say_goodbye()

    def _as_cancelled(self, host: Host, reply: Any) -> Any:
        assert self.cancel is not None
        if reply is None and self.yields is not None:
            reply = messages.ReplyMany(self.sequence, self.yields.results.made)
        if reply is not None:
            host.outcomes.discard(reply, self.push, self.channel.peer_id)
        if self.cancel.recursive:  # also what it has submitted after the cancellation, and before it was interrupted
            host.process.locked(host.participant.cancellation.cancel_children, self.task_id)
        return self.cancelled(host, "while it ran")

    def cancelled(self, host: Host, when: str) -> Any:
        """Make the reply of a call that was cancelled."""
        error = TaskCancelledError(f"{self.name}() was cancelled {when}")
        return host.outcomes.failure(self.sequence, self.task_id, self.callee, error, False, self.channel.peer_id)

    # -- ways of running -----------------------------------------------------------------------------------------

    @interruptible
    def run(self, host: Host) -> None:
        """Run on this thread, from the arguments to the answer."""
        enter(self)
        failed = False
        try:
            try:
                function, args, kwargs = self.prepare(host)
                self.state = RUNNING
                holder = [function(*args, **kwargs)]
                del args, kwargs
                if not self.callee.plain:
                    if self.stream is not None:
                        holder = [self.stream.run(holder)]
                    elif self.callee.num_returns != 1 and is_iterator(holder[0]):
                        self._yields(host).run(holder)
                reply = self.returned(host, holder)
            except BaseException as error:
                reply = self.raised(host, error)
                failed = True
        except KeyboardInterrupt as late:
            reply = self.raised(host, late)
            failed = True
        if failed and self.argument_pins:
            args, kwargs = (), {}  # noqa: F841 - lets go of them
            self.keep_argument_pins_of_failed(host)
        self.answer(host, reply)

    async def run_async(self, host: Host) -> None:
        """Run on the event loop of the calling task, from the arguments to the answer."""
        enter(self)
        failed = False
        try:
            function, args, kwargs = self.prepare(host)
            self.state = RUNNING
            value = function(*args, **kwargs)
            del args, kwargs
            if self.stream is not None:
                value = await self.stream.run_async(value)
            elif inspect.isawaitable(value):
                value = await value
            if self.callee.num_returns not in (1, messages.STREAMING) and is_iterator(value):
                await self._yields(host).run_async(value)
            holder = [value]
            del value
            reply = self.returned(host, holder)
        except asyncio.CancelledError:
            if host.work.left and self.cancel is None:
                return  # the actor has left: its callers hear that it is dead
            self.state = FAILING
            if self.cancel is None and self.yields is not None:  # code of its own has cancelled it
                made = messages.ReplyMany(self.sequence, self.yields.results.made)
                host.outcomes.discard(made, self.push, self.channel.peer_id)
            reply = self.cancelled(host, "while it ran") if self.cancel is None else None
            self.state = REPLYING
            failed = True
        except BaseException as error:
            reply = self.raised(host, error)
            failed = True
        if failed and self.argument_pins:
            args, kwargs = (), {}  # noqa: F841 - lets go of them
            self.keep_argument_pins_of_failed(host)
        self.answer(host, reply)
