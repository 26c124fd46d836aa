"""Every error that afield raises, in one hierarchy.

An error says what happened, whose fault it is, and what to do. The branches of the tree answer "whose fault":

- `UsageError`: the call was wrong (a bad option, a use after `shutdown`, a value that cannot be pickled).
- `TaskError`: the user's own code raised; the error is also an instance of the exception type that was raised.
- `LossError`: a process, device or node went away and took something with it.
- `CapacityError`: there was no room; the message carries the arithmetic.
- `SchedulingError`: what was asked for can never be placed.
- `InternalError`: afield itself is wrong.

All of them can be pickled, so that they travel as the value of a future.
"""

from __future__ import annotations

import pickle
from typing import Any, TypeVar

from afield.causes import (
    Cause,
    Unopened,
    add_note,
    copy_slots,
    group_of,
    is_a,
    name_of,
    new,
    notes_of,
    put_innate,
    state_of,
    text_of,
)
from afield.mixing import mixed, own
from afield.tracebacks import (
    Frame,
    Report,
    continued,
    describe,
    formatted,
    frames_of,
    is_shown_by_files,
    put_back,
    stand_in,
    traceback_of,
)

#: The one list of them; `afield` and `afield.exceptions` take it over.
__all__ = [
    "ActorConstructionError",
    "ActorDiedError",
    "ActorError",
    "ActorUnavailableError",
    "ActorUnschedulableError",
    "AfieldError",
    "AlreadyInitializedError",
    "CapacityError",
    "DeserializationError",
    "DeviceLostError",
    "GetTimeoutError",
    "InternalError",
    "InvalidOptionError",
    "LossError",
    "MessageTooLargeError",
    "NoClusterError",
    "NoDeviceError",
    "NotInitializedError",
    "ObjectLostError",
    "ObjectStoreFullError",
    "OutOfDeviceMemoryError",
    "OwnerDiedError",
    "PendingCallsLimitExceededError",
    "ReentrantUseError",
    "RuntimeDiedError",
    "SchedulingError",
    "SerializationError",
    "SpillError",
    "TaskCancelledError",
    "TaskError",
    "TaskInterruptedError",
    "TaskUnschedulableError",
    "UsageError",
    "VersionMismatchError",
    "WorkerCrashedError",
]


_T = TypeVar("_T", bound=BaseException)


class AfieldError(Exception):
    """Base of all errors that afield raises: `str` is one line, `repr` also tells the cause; both survive pickle."""

    #: It says all that there is to say; of other errors, those frames of ours are shown that they were raised in.
    _foreseen = True

    def __repr__(self) -> str:
        shown = f"{type(self).__name__}({', '.join(map(repr, self.args))})"
        return shown if self.__cause__ is None else f"{shown}\ncaused by {self.__cause__!r}"

    def __reduce__(self) -> tuple[Any, ...]:
        state = vars(self)
        cause = state.get(_UNOPENED) or (None if self.__cause__ is None else Cause(self.__cause__))
        return _rebuild_error, (type(self), self.args, {n: v for n, v in state.items() if n != _UNOPENED}, cause)


#: An attribute: the cause of an error that only passes through this process.
_UNOPENED = "_unopened"


def _rebuild_error(
    kind: type[AfieldError], args: tuple[Any, ...], state: dict[str, Any], cause: BaseException | Unopened | None
) -> AfieldError:
    error = kind(*args)
    vars(error).update(state)
    if type(cause) is Unopened:
        vars(error)[_UNOPENED] = cause
    else:
        error.__cause__ = cause  # type: ignore[assignment]
    return error


class UsageError(AfieldError):
    """The caller did something that cannot work; the message names the remedy."""


class NotInitializedError(UsageError):
    """The runtime was shut down (or lost by a fork) and the call needs it; call `afield.init()` again."""


class ReentrantUseError(UsageError, RuntimeError):
    """A signal handler or a finaliser used afield while it had interrupted afield itself; do it outside of there."""


class AlreadyInitializedError(UsageError, RuntimeError):
    """`init` was called twice without `ignore_reinit_error=True` or a `shutdown` in between."""


class InvalidOptionError(UsageError, ValueError, TypeError):
    """An option is unknown or ill-typed; the message names it and the nearest valid one."""


class NoClusterError(InvalidOptionError, ConnectionError):
    """`init(address=...)` names a runtime that cannot be joined; also a ConnectionError, as programs expect of "auto"."""


class NoDeviceError(UsageError):
    """A device was asked for and there is none; the message names the setting that provides one."""


class SerializationError(UsageError, TypeError):
    """An argument or a result cannot be pickled; the message names the attribute that is to blame."""


class DeserializationError(AfieldError):
    """A value cannot be rebuilt here, usually because its class cannot be imported in this process."""


class GetTimeoutError(AfieldError, TimeoutError):
    """`get` waited as long as it was told to and the value was not ready; the task itself goes on."""


class SchedulingError(AfieldError):
    """What was asked for can never be scheduled on this cluster."""


class TaskUnschedulableError(SchedulingError):
    """No node can ever satisfy the task's resources; the message compares what was asked for with what there is."""


class _OfActor:
    """An error of one actor.

    Attributes:
        actor_id: the actor's id, as its own `get_runtime_context().get_actor_id()` gives it; None where that is not known.
    """

    actor_id: str | None = None

    def __init__(self, *args: Any, actor_id: bytes = b"") -> None:
        super().__init__(*args)  # of the error that this is mixed into
        if actor_id:
            self.actor_id = actor_id.hex()


class ActorUnschedulableError(_OfActor, SchedulingError):
    """No node can ever satisfy the actor's resources."""


class TaskCancelledError(AfieldError):
    """The task was cancelled before it finished."""


class InternalError(AfieldError):
    """A bug in afield: something happened that its own rules exclude. The text has what led to it; please report it."""

    _foreseen = False


class LossError(AfieldError):
    """A process, device or node went away and took something with it."""


class WorkerCrashedError(LossError):
    """The worker process that ran the task died, and its retries are used up."""


class ActorError(_OfActor, LossError):
    """An actor could not take or finish a call: it is dead, or not there at the moment."""


class ActorDiedError(ActorError):
    """The actor's process is gone (killed, crashed, or its constructor raised) and will not be restarted."""


class ActorUnavailableError(ActorError):
    """The actor is being restarted and the call may not be retried; call again later.

    Attributes:
        may_have_run: False if the call was made while the actor restarted: it never left, and is safe to make again.
    """

    may_have_run: bool = True


class ObjectLostError(LossError):
    """All copies of the object are gone and it cannot be computed again."""


class OwnerDiedError(ObjectLostError):
    """The process that owned the object is gone, and with it all knowledge of the object."""


class DeviceLostError(LossError):
    """A device failed or was reset while something depended on it."""


class SpillError(LossError):
    """A spill file could not be written or read back; the message names the file and what to do.

    Attributes:
        kind: "disk_full", "unreadable", "corrupt" or "failed".
    """

    kind: str = "failed"


class RuntimeDiedError(LossError):
    """The node daemon is gone; call `afield.shutdown()` and `afield.init()` to start afresh."""


class VersionMismatchError(RuntimeDiedError):
    """The session's processes found another version of afield than the driver runs; the message says where both are."""


class CapacityError(AfieldError):
    """There was no room."""


class ObjectStoreFullError(CapacityError, MemoryError):
    """The host store had no room in time; the message carries the arithmetic and the largest holders."""


class MessageTooLargeError(CapacityError):
    """Something cannot be told to another process, since it makes a message too large; the text says what and why."""


class PendingCallsLimitExceededError(_OfActor, CapacityError):
    """More calls to an actor are pending than its `max_pending_calls` allows; wait for some of them first."""


class OutOfDeviceMemoryError(CapacityError, MemoryError):
    """The device had no room in time; the message carries the arithmetic and the largest holders."""


class TaskError(AfieldError):
    """The user's code raised in a task or an actor call.

    `get` raises a subclass that is also an instance of the exception type that was raised, so that
    ``except ValueError`` works across processes. It is raised from the exception itself (`__cause__`), which has the traceback
    of where it ran; for one that could not be pickled another of the same name stands in there.

    Attributes:
        cause: the exception itself, or None where it could not be pickled.
        function_name: the task or method that raised.
        summary: the type and the text of the exception.
    """

    cause: BaseException | None = own()
    function_name: str = own()
    summary: str = own()
    _foreseen = True
    #: What the class was derived from when the user's exception type was mixed in.
    _base: type[TaskError]
    #: What is known of the exception, and where else this error was raised on its way here; or a text, if that is all.
    _remote: Report | str = own()
    _passed: tuple[Frame, ...] = own()
    #: The tasks that it went through as the error of an argument, or of a `get` of theirs.
    _through: tuple[str, ...] = own()

    def __init__(
        self, function_name: str, cause: BaseException | None, summary: str, remote_traceback: Report | str = ""
    ) -> None:
        # Not super().__init__: in the derived class the next base is the user's type, whose signature is unknown.
        put_innate(self, "args", (function_name, summary))
        put_innate(self, "__cause__", cause)
        self.function_name = function_name
        self.cause = cause
        self.summary = summary
        self._remote = remote_traceback
        self._passed, self._through = (), ()
        if type(remote_traceback) is str and remote_traceback:
            add_note(self, f"Where {function_name}() ran:\n{remote_traceback}")

    def __init_subclass__(cls) -> None:
        """The user's type does not take part in the making of the derived one."""

    @property
    def remote_traceback(self) -> str:
        """What Python prints of the exception where it was raised; with source lines that are known here."""
        if isinstance(self._remote, str):
            return self._remote
        text = formatted(self._remote)
        return continued(text, self, self._passed) if self._passed else text

    def as_instanceof_cause(self) -> TaskError:
        """Return the error itself, which is an instance of what was raised already; other programs ask for it."""
        return self

    def __str__(self) -> str:
        through = f" (passed on by {', '.join(f'{name}()' for name in self._through)})" if self._through else ""
        return f"{self.function_name}() raised {self.summary}{through}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self}\n\n{self.remote_traceback}"

    def __reduce__(self) -> tuple[Any, ...]:
        cause = state_of(self).get(_UNOPENED) or (None if self.cause is None else Cause(self.cause))
        return _rebuild_task_error, (
            self._base,
            self.function_name,
            cause,
            self.summary,
            self._remote,
            {name: state_of(self)[name] for name in _TRAVELLING if state_of(self).get(name)},
        )

    @classmethod
    def from_exception(
        cls, function_name: str, error: BaseException, remote_traceback: Report | str | None = None
    ) -> TaskError:
        """Wrap what a task raised; an exception that cannot make the round trip through pickle arrives as a description."""
        if is_a(error, TaskError):  # of a task that this one called: it goes on, and tells that it passed here
            passed: Any = error
            if not is_a(error, cls):  # what a constructor did not catch ends an actor
                passed = cls(passed.function_name, passed.cause, passed.summary, passed._remote)
                passed._through = error._through  # type: ignore[attr-defined]
            passed._passed = frames_of(error)
            pass_on(passed, function_name)
            return passed  # type: ignore[no-any-return]
        remote = describe(error) if remote_traceback is None else remote_traceback
        kind = TaskInterruptedError if cls is TaskError and is_a(error, KeyboardInterrupt) else cls
        return kind(function_name, error, summary_of(error), remote)

    @classmethod
    def described(cls, function_name: str, error: BaseException) -> TaskError:
        """Say what is known of an exception with which nothing else can be done."""
        name = name_of(type(error))[1]
        return cls(function_name, None, f"{name}: (nothing more can be told of it)")


TaskError._base = TaskError
#: What `TaskError`s keep beyond the arguments of their constructor.
_TRAVELLING = ("_passed", "_through", "actor_id")
#: So many tasks that an error went through are named; of more, the last ones.
_MAX_THROUGH = 8


def pass_on(error: AfieldError, function_name: str) -> None:
    """The error becomes that of another task as well, which took it as an argument or did not catch it; it says so."""
    if is_a(error, TaskError):
        through: Any = error
        through._through = (*through._through, function_name)[-_MAX_THROUGH:]
    elif len(notes_of(error)) < _MAX_THROUGH:
        add_note(error, f"It is also the error of {function_name}(), which took it as an argument.")


class TaskInterruptedError(TaskError, TaskCancelledError):
    """The task's own code raised KeyboardInterrupt, or somebody sent its process a SIGINT; `cancel` was not called."""


TaskInterruptedError._base = TaskInterruptedError


class ActorConstructionError(TaskError, ActorDiedError):
    """The actor's constructor raised: every call of the actor raises this, with the cause, also as the user's type."""


ActorConstructionError._base = ActorConstructionError


def of_actor(error: _T, actor_id: bytes) -> _T:
    """Note in an error of a constructor which actor is meant; return it."""
    if actor_id:
        state_of(error)["actor_id"] = actor_id.hex()
    return error


def of_constructor(function_name: str, error: BaseException, actor_id: bytes = b"") -> ActorConstructionError:
    """Make the error of an actor whose constructor never ran, since `error`, read with `load_unopened`, is an argument's."""
    return of_actor(_of_constructor(function_name, error), actor_id)


def _of_constructor(function_name: str, error: BaseException) -> ActorConstructionError:
    if not is_a(error, TaskError):
        made = ActorConstructionError(function_name, None, summary_of(error), describe(error))
        state_of(made)[_UNOPENED] = Unopened(pickle.dumps(error, 5))
        return made
    of_task: Any = error
    made = ActorConstructionError(function_name, None, of_task.summary, of_task._remote)
    state_of(made)[_UNOPENED] = state_of(error).get(_UNOPENED)
    return made


def summary_of(error: BaseException) -> str:
    """Return the type and the text of an exception in a line."""
    text = text_of(error)
    name = name_of(type(error))[1].rpartition(".")[2]
    return f"{name}: {text}" if text else name


def _rebuild_task_error(
    base: type[TaskError],
    function_name: str,
    cause: BaseException | Unopened | None,
    summary: str,
    remote: Report | str,
    state: dict[str, Any],
) -> TaskError:
    """Make the error that has arrived, with the traceback and the chain of what was raised."""
    if type(cause) is Unopened:
        error = base(function_name, None, summary, remote)
        state_of(error).update(state)
        state_of(error)[_UNOPENED] = cause
        return error
    error = _new_task_error(base, function_name, cause, summary, remote)  # type: ignore[arg-type]
    state_of(error).update(state)
    if isinstance(remote, str):
        return error
    if cause is None:
        shown, lent = stand_in(remote)
        put_innate(error, "__cause__", shown)
    else:
        lent = put_back(cause, remote)  # type: ignore[arg-type]
    traceback, more = traceback_of(state.get("_passed", ()))
    put_innate(error, "__traceback__", traceback)
    if (lent or more) and is_shown_by_files():
        add_note(error, f"Where {function_name}() ran, with the lines that it had then:\n{error.remote_traceback}")
    return error


def _new_task_error(
    base: type[TaskError], function_name: str, cause: BaseException | None, summary: str, remote: Report | str
) -> TaskError:
    if cause is None:
        return base(function_name, None, summary, remote)
    kind = mixed(base, type(cause))
    error: TaskError = new(kind, group_of(cause) if kind is not base else ())
    TaskError.__init__(error, function_name, cause, summary, remote)
    if type(error) is not base:
        copy_slots(cause, error)
    taken = {*vars(TaskError), *vars(AfieldError), "__notes__"}  # notes are shown with the cause
    for name, value in state_of(cause).items():  # so that `error.code` works where the user's type has it
        if name not in taken:
            state_of(error).setdefault(name, value)
    return error
