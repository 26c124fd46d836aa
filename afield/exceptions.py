"""Every exception that afield raises, and when.

Theory of operation. This module has no code of its own: it gathers what `afield.errors` defines under the name where users
of this field look for it. All of these exceptions travel between processes with their cause and, for `TaskError`, with the
traceback of the process where it began. `str(error)` is one line; `repr(error)` is complete.

=================================  ==========================================================================================
raised                             when
=================================  ==========================================================================================
**Your code raised**
`TaskError`                        `get` of a task or an actor call that raised. It is also an instance of what was raised, so
                                   `except ValueError` works; `.cause` is the original, `.remote_traceback` its traceback. A
                                   task whose argument failed fails with the argument's error.
`TaskCancelledError`               `get` of a task that `cancel` ended.
`TaskInterruptedError`             a task raised KeyboardInterrupt by itself, or its process got SIGINT; a `TaskError` and a
                                   `TaskCancelledError`.
**The call was wrong** (`UsageError`)
`InvalidOptionError`               an option of `init`, `remote` or `.options` is unknown or not valid; also a ValueError and a
                                   TypeError.
`NotInitializedError`              something needs the runtime after `shutdown`, or in a forked copy of the driver.
`ReentrantUseError`                a signal handler or a finaliser used afield that it had interrupted.
`AlreadyInitializedError`          a second `init` without `shutdown` or `ignore_reinit_error=True`, and `init` in a worker.
`NoClusterError`                   `init(address=...)` names a runtime that cannot be joined; also a ConnectionError.
`NoDeviceError`                    devices were asked for and there are none, or fewer.
`SerializationError`               `put`, `.remote` or a return of a value that cannot be pickled; also a TypeError.
**Values**
`GetTimeoutError`                  `get(timeout=...)` was over before the value was there; also a TimeoutError.
`DeserializationError`             a value cannot be rebuilt here, mostly because its class cannot be imported.
**What is asked for can never be placed** (`SchedulingError`)
`TaskUnschedulableError`           `get` of a task whose resources no node has.
`ActorUnschedulableError`          a call of an actor whose resources no node has.
**There is no room** (`CapacityError`)
`ObjectStoreFullError`             `put`, a result or `empty` found no room in the host store in time; also a MemoryError.
`OutOfDeviceMemoryError`           the same for a device.
`MessageTooLargeError`             something that cannot go to the store, such as millions of refs in one value, is too large
                                   to be told to another process.
`PendingCallsLimitExceededError`   an actor has `max_pending_calls` calls pending.
**Something was lost** (`LossError`)
`ActorError`                       never by itself: either of `ActorDiedError` and `ActorUnavailableError`.
`WorkerCrashedError`               the process that ran a task died, and the task has no retries left.
`ActorDiedError`                   a call of an actor that was killed, crashed or left.
`ActorConstructionError`           a call of an actor whose constructor raised: an `ActorDiedError`, a `TaskError` with the
                                   cause, and an instance of what was raised.
`ActorUnavailableError`            a call that may not be retried, of an actor that is being restarted.
`ObjectLostError`                  no copy of a value is left, and it cannot be computed again.
`OwnerDiedError`                   the process that owned an object is gone, and all knowledge of the object with it.
`DeviceLostError`                  a device failed or was reset, and a value or task with it.
`SpillError`                       never by itself: the reason in an `ObjectStoreFullError` (the disk is full) or an
                                   `ObjectLostError` (a spill file is unreadable or corrupt).
`RuntimeDiedError`                 the node's daemon is gone, or the runtime could not start: `shutdown` and `init` again.
`VersionMismatchError`             `init`: the session's processes found another version of afield, mostly as the package was
                                   upgraded while the program ran; a `RuntimeDiedError`.
**afield is wrong**
`InternalError`                    something happened that afield's own rules exclude: a bug; please report it with its text.
=================================  ==========================================================================================
"""

from __future__ import annotations

import afield.errors as errors
from afield.errors import *  # noqa: F403 - the list stands there
from afield.errors import (
    ActorError,
    AfieldError,
    InternalError,
    ObjectLostError,
    PendingCallsLimitExceededError,
    RuntimeDiedError,
    TaskError,
)

__all__ = [
    "LocalRayletDiedError",
    "NodeDiedError",
    "ObjectReconstructionFailedError",
    "PendingCallsLimitExceeded",
    "RayActorError",
    "RayError",
    "RaySystemError",
    "RayTaskError",
]
__all__ += errors.__all__  # in the form that type checkers read

# The names of Ray, so that its `except` clauses mean the same here; the other names are the same in both.
RayError = AfieldError
RayTaskError = TaskError
RayActorError = ActorError
PendingCallsLimitExceeded = PendingCallsLimitExceededError
RaySystemError = InternalError
NodeDiedError = LocalRayletDiedError = RuntimeDiedError
ObjectReconstructionFailedError = ObjectLostError
