"""Messages that cannot be sent, as they are too large or hold what has no encoding: whoever waits gets an error.

Theory of operation. A channel hands such a message to us (`Channel.on_refused`) and goes on. What is large goes to the store
before it becomes a message (`values.definitions`, arguments, results), so what arrives here is rare: millions of refs
inside one value, a name that is no text. Each kind of message has one way to fail: the task ends with an error, the answer is
replaced by one that says why. For the others nobody waits by name; their loss is printed.

We are called under the lock, in the middle of a flush; what follows leaves with the same flush.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from afield.errors import AfieldError, MessageTooLargeError
from afield.runtime.calls.actor_calls import ActorCalls
from afield.runtime.calls.pushes import PeerState
from afield.runtime.calls.submission import Submitter
from afield.runtime.cores.objects import FAILED
from afield.runtime.process.process import Process
from afield.runtime.process.serialization import serialize_error
from afield.runtime.wire import messages
from afield.transport.channel import Channel


class Refusals:
    """What follows in one process from a message that cannot be sent."""

    def __init__(self, process: Process, submitter: Submitter, actors: ActorCalls) -> None:
        self._process = process
        self._submitter = submitter
        self._actors = actors
        self._handlers: dict[type, Callable[[Channel, Any, AfieldError], Any]] = {
            messages.Define: self._define,
            messages.Push: self._push,
            messages.MoreDependencies: self._push,
            messages.Reply: self._reply,
            messages.ReplyMany: self._reply_many,
            messages.Item: self._item,
            messages.Value: self._value,
            messages.Query: self._question,
            messages.Need: self._question,
            messages.Answer: self._answer,
            messages.CreateActor: self._create,
            messages.Demand: self._demand,
        }
        process.channels.on_refused = self._refused

    def _refused(self, channel: Channel, message: Any, why: str) -> Any:
        """Do what follows; return what is to be sent instead, if anything."""
        handler = self._handlers.get(type(message))
        text = f"a message to another process ({type(message).__name__}) could not be sent: {why}"
        if handler is None:
            print(f"afield: {text}", file=sys.stderr)
            return None
        instead = handler(channel, message, MessageTooLargeError(text))
        if self._process.table.effects:
            self._process.run_effects()
        return instead

    # -- of an owner -----------------------------------------------------------------------------------------------

    def _define(self, channel: Channel, message: messages.Define, error: AfieldError) -> None:
        """The worker will know nothing of the function: it drops what is pushed for it."""
        state: PeerState = channel.context
        state.unknown(message.index)
        inflight = self._inflight(state)
        for sequence in [number for number, task in inflight.items() if task.function.index == message.index]:
            self._fail(channel, sequence, error)

    def _push(self, channel: Channel, message: Any, error: AfieldError) -> None:
        self._fail(channel, message.sequence, error)

    def _inflight(self, state: PeerState) -> dict[int, Any]:
        return state.lease.inflight if state.lease is not None else state.inflight

    def _fail(self, channel: Channel, sequence: int, error: AfieldError) -> None:
        state: PeerState = channel.context
        task = self._inflight(state).pop(sequence, None)
        if task is None:
            return
        self._submitter.fail_with(task, error)
        if state.lease is not None:
            state.lease.lane.replied(state.lease, 1, time.monotonic())
        elif state.on_batch is not None:
            state.on_batch(1)

    def _create(self, channel: Channel, message: messages.CreateActor, error: AfieldError) -> None:
        self._actors.creation_refused(message.actor_id, error)

    def _demand(self, channel: Channel, message: messages.Demand, error: AfieldError) -> None:
        self._submitter.infeasible(message.key, str(error))

    def _question(self, channel: Channel, message: Any, error: AfieldError) -> None:
        self._process.requests.answered(message.request, error)

    # -- of whoever answers ----------------------------------------------------------------------------------------

    def _reply(self, channel: Channel, message: messages.Reply, error: AfieldError) -> Any:
        return messages.Reply(message.sequence, FAILED, serialize_error(error))

    def _reply_many(self, channel: Channel, message: messages.ReplyMany, error: AfieldError) -> Any:
        data = serialize_error(error)
        results = [messages.Result(FAILED, data) for _ in message.results]
        return messages.ReplyMany(message.sequence, results)

    def _item(self, channel: Channel, message: messages.Item, error: AfieldError) -> Any:
        return messages.Item(message.sequence, message.index, FAILED, serialize_error(error))

    def _value(self, channel: Channel, message: messages.Value, error: AfieldError) -> Any:
        return messages.Value(message.object_id, FAILED, serialize_error(error))

    def _answer(self, channel: Channel, message: messages.Answer, error: AfieldError) -> Any:
        return messages.Answer(message.request, None, str(error))
