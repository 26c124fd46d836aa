"""A call's way in and out: arguments from bytes, results to bytes, and what is kept in between.

Theory of operation. Code of the user's runs while arguments are rebuilt and while a result is pickled; an interrupt may come
there. What must not be cut in half is marked `uninterruptible`: writing a pickled result and noting which arguments are kept.
A reply that was made in vain, because its call was cancelled meanwhile, is taken back with `discard`.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from afield.causes import is_a, name_of
from afield.errors import (
    ActorConstructionError,
    AfieldError,
    CapacityError,
    DeserializationError,
    MessageTooLargeError,
    TaskError,
    UsageError,
    of_actor,
    pass_on,
)
from afield.ids import ARGUMENTS_INDEX, object_id
from afield.runtime.calls.participant import Participant
from afield.runtime.cores.objects import FAILED, INLINE, LOCATED, Obligation
from afield.runtime.cores.work import REPLYING, Call
from afield.runtime.process.context import TaskContext
from afield.runtime.process.process import INLINE_BYTES
from afield.runtime.process.serialization import (
    Arg,
    Failure,
    Serialized,
    deserialize,
    dumps_plain,
    serialize,
)
from afield.runtime.values.definitions import rebuild
from afield.runtime.values.parts import ARGUMENT, PartsLostError
from afield.runtime.values.values import Values
from afield.runtime.wire import messages
from afield.tracebacks import describe
from afield.transport.interrupts import uninterruptible

#: The results of one reply may have so many bytes inside it, and an error as many; what is beyond them is stored.
MAX_REPLY_BYTES = 1 << 20
#: A result beyond that which is no larger is not stored: its location takes as much.
SMALL_BYTES = 256
#: Errors of the runtime's own that come of what a task does: of arguments or results that cannot be pickled, or find no room.
_OF_THE_TASK = (UsageError, CapacityError, DeserializationError)
#: In the data of a stored error: it is to be retried.
AGAIN = b"again"


class Code:
    """A function as its owner pickled it, for all callees that differ in their options; unpickled on first use."""

    __slots__ = ("_blob", "_function")

    def __init__(self, blob: bytes) -> None:
        self._blob = blob
        self._function: Callable[..., Any] | None = None

    def rebuild(self, name: str, values: Values) -> Callable[..., Any]:
        """Rebuild the function, which may run code of the user's, and return it."""
        if self._function is None:
            self._function = rebuild(self._blob, f"the function {name}()", values)
            self._blob = b""
        return self._function


class LoadedCallee:
    """A remote function or a method as its caller defined it."""

    __slots__ = (
        "backpressure",
        "code",
        "function",
        "group",
        "method",
        "name",
        "num_returns",
        "once",
        "plain",
        "retry_on",
    )

    def __init__(self, message: messages.Define, code: Code | None = None) -> None:
        self.name = message.name
        self.code = code or Code(message.blob)
        self.num_returns = message.num_returns
        self.backpressure = message.backpressure
        self.group = message.group
        self.once = message.once
        self.retry_on = message.retry_on
        self.method = message.method
        #: As nearly all are: one result, and it may run again.
        self.plain = message.num_returns == 1 and not message.once
        #: The function, once it was rebuilt; an actor's methods are looked up each time.
        self.function: Callable[..., Any] | None = None

    def rebuild(self, values: Values) -> Callable[..., Any]:
        """Rebuild the function, which may run code of the user's, and return it."""
        function = self.function = self.code.rebuild(self.name, values)
        return function


class Results:
    """The results of one reply: about `MAX_REPLY_BYTES` travel inside it, what comes later is stored."""

    __slots__ = ("_room", "made")

    def __init__(self) -> None:
        self.made: list[messages.Result] = []
        self._room = MAX_REPLY_BYTES

    @property
    def inline_bytes(self) -> int:
        """How large the next one may be inside the reply; what is no larger than a location takes no room to speak of."""
        return INLINE_BYTES if self._room >= 0 else SMALL_BYTES

    def add(self, result: messages.Result) -> None:
        """Here is the next one."""
        self.made.append(result)
        self._room -= len(result.data)


def _several(value: Any, callee: LoadedCallee) -> list[list[Any]]:
    """Return the results of a call that has several, each in a list of its own."""
    expected = callee.num_returns
    if expected == 0:
        return []
    if not isinstance(value, (tuple, list)) or len(value) != expected:
        found = f"{len(value)} values" if isinstance(value, (tuple, list)) else f"a {type(value).__name__}"
        raise ValueError(f"{callee.name}() has num_returns={expected} and must return {expected} values, not {found}")
    return [[item] for item in value]


class Outcomes:
    """Rebuilds arguments and encodes outcomes for all calls of a worker."""

    def __init__(self, participant: Participant) -> None:
        self.process = participant.process
        self.values = participant.values
        self._next_token = itertools.count(1).__next__

    # -- arguments -----------------------------------------------------------------------------------------------

    def arguments(
        self, push: messages.Push, context: TaskContext, submitter: bytes, argument_pins: list[Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Rebuild the arguments; into `argument_pins` go those of stored values, which the submitter pins until the reply.

        Raises:
            PartsLostError: an argument has to be made again first.
        """
        on_ref = self._on_ref(context)
        if push.location is not None:
            argument_id = push.task_id + ARGUMENTS_INDEX
            args, kwargs = self._read(argument_id, submitter, push.location, "the arguments", on_ref, argument_pins)
        else:
            args, kwargs = deserialize(push.arguments, "the arguments", on_ref)
        if push.dependencies:
            values = [self._dependency(dependency, on_ref, argument_pins) for dependency in push.dependencies]
            args = [values[arg.index] if type(arg) is Arg else arg for arg in args]
            kwargs = {key: values[arg.index] if type(arg) is Arg else arg for key, arg in kwargs.items()}
        return args, kwargs

    def _on_ref(self, context: TaskContext) -> Callable[[bytes, bytes], None]:
        def on_ref(oid: bytes, owner: bytes) -> None:
            if context.obligation is None:
                context.obligation = Obligation()
            self.process.locked(self.process.table.receive, oid, owner, context.obligation)

        return on_ref

    def _read(
        self, oid: bytes, owner: bytes, location: messages.Location, what: str, on_ref: Any, argument_pins: list[Any]
    ) -> Any:
        """Rebuild a stored argument; what its memory is held by goes into `argument_pins`, as (weak reference, id, owner)."""

        def view_pin(slot: int) -> Any:
            made = self.values.parts.view_pin(slot, None)
            argument_pins.append((weakref.ref(made), oid, owner))
            return made

        value = self.values.parts.read(oid, location, what, on_ref, view_pin, priority=ARGUMENT)[0]
        if type(value) is Failure:
            raise value.error
        return value

    def _dependency(
        self, dependency: messages.Dependency, on_ref: Callable[[bytes, bytes], None], argument_pins: list[Any]
    ) -> Any:
        if dependency.kind != LOCATED:
            return deserialize(dependency.data, "an argument", on_ref)
        assert dependency.location is not None
        where = dependency.location
        return self._read(dependency.object_id, dependency.owner, where, "an argument", on_ref, argument_pins)

    @uninterruptible
    def keep_argument_pins(self, argument_pins: list[Any], context: TaskContext) -> None:
        """Memory of arguments that is used beyond the task counts as handles of their objects."""
        self.values.parts.devices.synchronize()
        for reference, oid, owner in argument_pins:
            view_pin = reference()
            if view_pin is not None:
                self._on_ref(context)(oid, owner)
                view_pin.object_id = oid

    # -- results -------------------------------------------------------------------------------------------------

    def reply(self, holder: list[Any], call: Call, push: messages.Push, owner: bytes, callee: LoadedCallee) -> Any:
        """Make the reply of a call that returned; `holder` has the only reference to the value.

        As soon as something of it is stored or handed on, the call settles: no interrupt may come between.
        """
        if callee.num_returns == 1 or callee.num_returns == messages.STREAMING:
            data = dumps_plain(holder[0])
            if data is not None and len(data) <= INLINE_BYTES:
                return messages.Reply(push.sequence, INLINE, data)
            # What is plain has been pickled already, however large.
            plain = Serialized(data, [], []) if data is not None else None
            return self._write_one(holder, plain or self.pickled(holder[0], callee.name), call, push, owner)
        holders = _several(holder.pop(), callee)
        # All are pickled before one is stored: what cannot be pickled then leaves nothing behind.
        pickled = [self.pickled(each[0], callee.name) for each in holders]
        return self._write_all(holders, pickled, call, push, owner)

    @uninterruptible
    def _write_one(
        self, holder: list[Any], value: Serialized, call: Call, push: messages.Push, owner: bytes
    ) -> messages.Reply:
        result = self.written(holder, value, push.task_id, 0, owner)
        call.state = REPLYING
        return messages.Reply(push.sequence, result.kind, result.data, result.location, result.contained)

    @uninterruptible
    def _write_all(
        self, holders: list[list[Any]], values: list[Serialized], call: Call, push: messages.Push, owner: bytes
    ) -> messages.ReplyMany:
        results = Results()
        try:
            for holder, value in zip(holders, values, strict=True):
                self.add(results, holder, value, push.task_id, owner)
        except BaseException:
            self._take_back(results.made, push.task_id, owner)
            raise
        call.state = REPLYING
        return messages.ReplyMany(push.sequence, results.made)

    def add(self, results: Results, holder: list[Any], value: Serialized, task_id: bytes, owner: bytes) -> None:
        """Write the next of several results of a call."""
        results.add(self.written(holder, value, task_id, len(results.made), owner, results.inline_bytes))

    @staticmethod
    def pickled(value: Any, name: str) -> Serialized:
        """Pickle a result, or an item of one."""
        data = dumps_plain(value)
        return serialize(value, f"the result of {name}()") if data is None else Serialized(data, [], [])

    def written(
        self,
        holder: list[Any],
        serialized: Serialized,
        task_id: bytes,
        index: int,
        owner: bytes,
        inline_bytes: int = INLINE_BYTES,
    ) -> messages.Result:
        """Make the result out of a pickled value, to which `holder` has the only reference; large ones are stored."""
        location = None
        if not serialized.fits(inline_bytes):
            # The refs inside are still held by the value: it is not in a frame of ours, but in the pickle's own list.
            pinned = self._pin_all(serialized.refs)
            try:
                location = self.values.parts.write(object_id(task_id, index), owner, serialized, holder)
            finally:
                contained = self._hand_on(serialized.refs, owner) if location is not None else None
                self._let_go(pinned)
            return messages.Result(LOCATED, b"", location, contained)
        return messages.Result(INLINE, serialized.pack(), None, self._hand_on(serialized.refs, owner))

    def _pin_all(self, refs: list[bytes]) -> list[bytes]:
        """Pin refs while the value that has them is on its way into the store."""
        for ref in refs:
            self.process.locked(self.process.table.pin, ref)
        return refs

    def _let_go(self, refs: list[bytes]) -> None:
        for ref in refs:
            self.process.locked(self.process.table.unpin, ref)

    def _hand_on(self, refs: list[bytes], owner: bytes) -> messages.Contained | None:
        """Hold the refs inside a result until its receiver holds them itself."""
        if not refs:
            return None
        token = self._next_token()
        return messages.Contained(token, self.process.locked(self.process.table.hand_on, owner, token, refs))

    def discard(self, reply: Any, push: messages.Push, owner: bytes) -> None:
        """A reply will not be sent, since another takes its place."""
        self._take_back(reply.results if type(reply) is messages.ReplyMany else [reply], push.task_id, owner)

    def _take_back(
        self, results: Sequence[messages.Result | messages.Reply], task_id: bytes, owner: bytes, first: int = 0
    ) -> None:
        """These, from the `first`, were made in vain: nobody will say `Took` for what is in them, or learn where they are."""
        stored = []
        for index in range(first, len(results)):
            contained = results[index].contained
            if contained is not None:
                self.process.locked(self.process.table.on_took, owner, contained.token)
            if results[index].location is not None:
                stored.append(object_id(task_id, index))
        if stored:
            self.process.locked(self.process.daemon.send, messages.Free(stored))

    def failure(
        self,
        sequence: int,
        task_id: bytes,
        callee: LoadedCallee,
        error: BaseException,
        in_user_code: bool,
        receiver: bytes,
        made: Sequence[messages.Result] = (),
    ) -> Any:
        """Make the reply of a task that raised; an error of the runtime's own that says nothing of the task goes on as it is.

        A large error is stored like a result: reading it raises it. Where that cannot be it is described instead. What was
        `made` before stays, and the error takes the places that are left.
        """
        if made and len(made) == callee.num_returns:
            _report(callee.name, error)
            return messages.ReplyMany(sequence, list(made))
        if is_a(error, PartsLostError) and not in_user_code:
            return messages.Reply(sequence, messages.ARGUMENT_LOST, b"")
        of_user = in_user_code or not is_a(error, AfieldError)
        if is_a(error, TaskError) and not in_user_code:  # of an argument that is so large that it came here to be read
            pass_on(error, callee.name)  # type: ignore[arg-type]
        again = of_user and callee.retry_on is not False and _is_to_be_retried(error, callee.retry_on)
        wraps = of_user or is_a(error, _OF_THE_TASK)
        serialized = _encoded(TaskError, callee.name, error) if wraps else serialize(error, "the error", stored=False)
        if serialized.size > MAX_REPLY_BYTES:
            why: BaseException = MessageTooLargeError(f"it has {serialized.size} bytes")
            if callee.num_returns != messages.STREAMING:
                try:
                    wrapped = TaskError.from_exception(callee.name, error) if wraps else error
                    return self._store_failure(sequence, task_id, callee, wrapped, receiver, again, made)
                except BaseException as failure:  # code of the user's has run
                    why = failure
            serialized = serialize(_described(TaskError, callee.name, error, why), "the error", stored=False)
        data, refs = serialized.pack(), serialized.refs
        kind = messages.FAILED_AGAIN if again else FAILED
        if callee.num_returns in (1, messages.STREAMING) or (again and not callee.num_returns):
            return messages.Reply(sequence, kind, data, None, self._hand_on(refs, receiver))
        results = list(made)
        while len(results) < callee.num_returns:
            results.append(messages.Result(kind, data, None, self._hand_on(refs, receiver)))
        return messages.ReplyMany(sequence, results)

    def _store_failure(
        self,
        sequence: int,
        task_id: bytes,
        callee: LoadedCallee,
        error: BaseException,
        receiver: bytes,
        again: bool,
        made: Sequence[messages.Result],
    ) -> Any:
        """Make the reply of a task that raised a large error; its `data` says whether it is to be retried."""
        value = serialize(Failure(error), "the error", stored=False)
        results = list(made)
        try:
            for index in range(len(made), callee.num_returns):
                results.append(self.written([], value, task_id, index, receiver))
                results[-1].data = AGAIN if again else b""
        except BaseException:
            self._take_back(results, task_id, receiver, len(made))
            raise
        if callee.num_returns != 1:
            return messages.ReplyMany(sequence, results)
        only = results[0]
        return messages.Reply(sequence, only.kind, only.data, only.location, only.contained)

    def constructor_failure(self, spec: messages.CreateActor, error: BaseException) -> bytes:
        """Serialise what an actor's constructor raised; what is too large for the daemon to keep is described."""
        name = f"{spec.class_name}.__init__"
        data = _encoded(ActorConstructionError, name, error, spec.actor_id).pack()
        if len(data) > MAX_REPLY_BYTES:
            too_large = MessageTooLargeError(f"it has {len(data)} bytes")
            described = of_actor(_described(ActorConstructionError, name, error, too_large), spec.actor_id)
            data = serialize(described, "the error", stored=False).pack()
        return data


def _described(kind: type[TaskError], name: str, error: BaseException, why: BaseException) -> TaskError:
    """Stand in for an error that cannot travel; `why` says what hinders it."""
    summary = name_of(type(error))[1]
    if is_a(why, CapacityError):
        summary += f" (the exception itself could not be sent: {type(why).__name__}: {str(why)[:500]})"
    return kind(name, None, summary, describe(error))


def _report(name: str, error: BaseException) -> None:
    """Print what a generator raised after its last result: there is no place left for it."""
    try:
        text = TaskError.from_exception(name, error).remote_traceback
    except BaseException:  # code of the user's has run
        text = TaskError.described(name, error).summary
    print(f"afield: {name}() raised after all of its results were there:\n{text}", file=sys.stderr)


def _encoded(kind: type[TaskError], name: str, error: BaseException, actor_id: bytes = b"") -> Serialized:
    """Pickle what the user's code raised, wrapped. Code of the user's runs here, and nothing that it raises leaves."""
    try:
        return serialize(of_actor(kind.from_exception(name, error), actor_id), "the error", stored=False)
    except BaseException:
        return serialize(of_actor(kind.described(name, error), actor_id), "the error", stored=False)


def _is_to_be_retried(error: BaseException, retry_on: bool | bytes) -> bool:
    """Tell whether a task that raised this is to be run again; its owner may not know the types."""
    if isinstance(retry_on, bool):
        return retry_on
    try:
        kinds = deserialize(retry_on, "retry_exceptions", None)
        cause = error.cause if isinstance(error, TaskError) else None
        return any(issubclass(kind, kinds) for kind in (type(error), TaskError, type(cause)))
    except BaseException:
        return False
