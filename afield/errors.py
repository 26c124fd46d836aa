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
from typing import Any

from afield.tracebacks import (
    Frame,
    Report,
    UnknownError,
    continued,
    describe,
    formatted,
    frames_of,
    is_shown_by_files,
    put_back,
    stand_in,
    text_of,
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
    "ReentrantUseError",
    "ObjectLostError",
    "ObjectStoreFullError",
    "OutOfDeviceMemoryError",
    "OwnerDiedError",
    "PendingCallsLimitExceededError",
    "RuntimeDiedError",
    "SchedulingError",
    "SerializationError",
    "SpillError",
    "TaskCancelledError",
    "TaskError",
    "TaskUnschedulableError",
    "UsageError",
    "VersionMismatchError",
    "WorkerCrashedError",
]


class AfieldError(Exception):
    """Base of all errors that afield raises: `str` is one line, `repr` also tells the cause; both survive pickle."""

    #: It says all that there is to say; of other errors, those frames of ours are shown that they were raised in.
    _foreseen = True

    def __repr__(self) -> str:
        shown = f"{type(self).__name__}({', '.join(map(repr, self.args))})"
        return shown if self.__cause__ is None else f"{shown}\ncaused by {self.__cause__!r}"

    def __reduce__(self) -> tuple[Any, ...]:
        cause: Any = self.__cause__
        if cause is not None and not _survives(cause):
            cause = _Parts(cause) if _survives(_Parts(cause)) else None
        return _rebuild_error, (type(self), self.args, vars(self), cause)


def _rebuild_error(
    kind: type[AfieldError], args: tuple[Any, ...], state: dict[str, Any], cause: BaseException | None
) -> AfieldError:
    error = kind(*args)
    vars(error).update(state)
    error.__cause__ = cause
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


class ActorUnschedulableError(SchedulingError):
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


class ActorError(LossError):
    """An actor could not take or finish a call: it is dead, or not there at the moment."""


class ActorDiedError(ActorError):
    """The actor's process is gone (killed, crashed, or its constructor raised) and will not be restarted."""


class ActorUnavailableError(ActorError):
    """The actor is being restarted and the call may not be retried; call again later."""


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


class PendingCallsLimitExceededError(CapacityError):
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

    cause: BaseException | None
    function_name: str
    summary: str
    _foreseen = True
    #: What the class was derived from when the user's exception type was mixed in.
    _base: type[TaskError]
    #: What is known of the exception, and where else this error was raised on its way here; or a text, if that is all.
    _remote: Report | str
    _passed: tuple[Frame, ...] = ()

    def __init__(
        self, function_name: str, cause: BaseException | None, summary: str, remote_traceback: Report | str = ""
    ) -> None:
        # Not super().__init__: in the derived class the next base is the user's type, whose signature is unknown.
        Exception.__init__(self, function_name, summary)
        self.function_name = function_name
        self.cause = cause
        self.summary = summary
        self._remote = remote_traceback
        self.__cause__ = cause
        if remote_traceback and isinstance(remote_traceback, str):
            self.add_note(f"Where {function_name}() ran:\n{remote_traceback}")

    @property
    def remote_traceback(self) -> str:
        """What Python prints of the exception where it was raised; with source lines that are known here."""
        if isinstance(self._remote, str):
            return self._remote
        text = formatted(self._remote)
        return continued(text, self, self._passed) if self._passed else text

    def __str__(self) -> str:
        return f"{self.function_name}() raised {self.summary}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self}\n\n{self.remote_traceback}"

    def __reduce__(self) -> tuple[Any, ...]:
        cause: Any = self.cause
        if cause is not None and not _survives(cause):
            cause = _Parts(cause)
        return _rebuild_task_error, (
            self._base,
            self.function_name,
            cause,
            self.summary,
            self._remote,
            self._passed,
        )

    @classmethod
    def from_exception(
        cls, function_name: str, error: BaseException, remote_traceback: Report | str | None = None
    ) -> TaskError:
        """Wrap what a task raised; an exception that cannot make the round trip through pickle is described instead."""
        if isinstance(error, TaskError):  # of a task that this one called: it goes on, and tells that it passed here
            error._passed = frames_of(error)
            return error
        remote = describe(error) if remote_traceback is None else remote_traceback
        cause = error if _survives(error) or _survives(_Parts(error)) else None
        return _new_task_error(cls, function_name, cause, summary_of(error), remote)


TaskError._base = TaskError


class ActorConstructionError(TaskError, ActorDiedError):
    """The actor's constructor raised: every call of the actor raises this, with the cause, also as the user's type."""


ActorConstructionError._base = ActorConstructionError


def summary_of(error: BaseException) -> str:
    """Return the type and the text of an exception in a line."""
    text = text_of(error)
    name = type(error).__name__
    return f"{name}: {text}" if text else name


def _survives(value: object) -> bool:
    """Tell whether `value` makes the round trip; classes of `__main__` travel by value, which plain pickle cannot do."""
    import cloudpickle

    try:
        pickle.loads(cloudpickle.dumps(value, 5))
    except Exception:
        return False
    return True


class _Parts:
    """Carries an exception that pickle cannot rebuild, mostly because its constructor takes something else than `args`.

    Attributes that cannot be pickled stay behind.
    """

    def __init__(self, error: BaseException) -> None:
        state = {name: value for name, value in vars(error).items() if _survives(value)}
        self._parts = type(error), error.args, state

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_parts, self._parts


def _from_parts(kind: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    error = kind.__new__(kind, *args)
    error.args = args
    vars(error).update(state)
    return error


_derived: dict[tuple[type, type], type[TaskError]] = {}


def _rebuild_task_error(
    base: type[TaskError],
    function_name: str,
    cause: BaseException | None,
    summary: str,
    remote: Report | str,
    passed: tuple[Frame, ...],
) -> TaskError:
    """Make the error that has arrived, with the traceback and the chain of what was raised."""
    if isinstance(cause, UnknownError):
        cause = None
    error = _new_task_error(base, function_name, cause, summary, remote)
    error._passed = passed
    if isinstance(remote, str):
        return error
    if cause is None:
        error.__cause__, lent = stand_in(remote)
    else:
        lent = put_back(cause, remote)
    error.__traceback__, more = traceback_of(passed)
    if (lent or more) and is_shown_by_files():
        error.add_note(f"Where {function_name}() ran, with the lines that it had then:\n{error.remote_traceback}")
    return error


def _new_task_error(
    base: type[TaskError], function_name: str, cause: BaseException | None, summary: str, remote: Report | str
) -> TaskError:
    error = _task_error_class(base, cause)(function_name, cause, summary, remote)
    if cause is not None:
        for name, value in vars(cause).items():  # so that `error.code` works where the user's type has it
            if name != "__notes__":  # they are shown with the cause
                vars(error).setdefault(name, value)
    return error


def _task_error_class(base: type[TaskError], cause: BaseException | None) -> type[TaskError]:
    """Return the subclass of `base` and of the cause's type.

    `SystemExit` and `KeyboardInterrupt` are not mixed in: raised from `get` they would end the reader.
    """
    kind = type(cause)
    if cause is None or not isinstance(cause, Exception):
        return base
    known = _derived.get((base, kind))
    if known is None:
        try:
            known = type(f"{base.__name__}({kind.__name__})", (base, kind), {"__module__": __name__})
            known("f", cause, "", "")
        except Exception:  # layout conflict, or a type that refuses to be derived from or constructed
            known = base
        _derived[base, kind] = known
    return known
