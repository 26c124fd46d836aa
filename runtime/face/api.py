"""The public functions on tasks, values and the cluster; `lifecycle` has those that start and end a runtime."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, ParamSpec, Protocol, TypeVar, overload

import numpy as np
import numpy.typing as npt

from afield.errors import InvalidOptionError
from afield.runtime.calls import participation
from afield.runtime.calls.generators import ObjectRefGenerator
from afield.runtime.calls.participant import Participant
from afield.runtime.face.actors import ActorClass
from afield.runtime.face.functions import RemoteFunction
from afield.runtime.face.handles import ActorHandle
from afield.runtime.face.options import seconds
from afield.runtime.process import current, facts
from afield.runtime.process.context import ActorExit
from afield.runtime.process.refs import ObjectRef
from afield.runtime.tools.memory import MemoryListing, assemble
from afield.runtime.wire import messages
from afield.tracebacks import trim

P = ParamSpec("P")
R = TypeVar("R")


class _Decorator(Protocol):
    """What `remote(**options)` returns."""

    @overload
    def __call__(self, target: type) -> ActorClass: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, target: Callable[P, R]) -> RemoteFunction[P, R]: ...


@overload
def remote(target: type, /) -> ActorClass: ...  # type: ignore[overload-overlap]
@overload
def remote(target: Callable[P, R], /) -> RemoteFunction[P, R]: ...
@overload
def remote(**options: Any) -> _Decorator: ...
def remote(*args: Any, **options: Any) -> Any:
    """Make a function a remote function, or a class an actor class; with or without options.

    Options of both: `num_cpus` (1 for a task, 0 for an actor), `num_gpus`, `memory`, `gpu_memory` (bytes), `resources`,
    `name`, `runtime_env` (a dict with `env_vars`, `working_dir`, `py_modules`), `scheduling_strategy` ("DEFAULT", "SPREAD",
    a `NodeAffinitySchedulingStrategy`).
    Of functions: `num_returns`, `max_retries` (3; how often a task is run again whose worker died). Of classes:
    `max_restarts`, `max_task_retries`.

    Raises:
        InvalidOptionError: an option is not known or not valid.
    """
    if len(args) == 1 and not options and callable(args[0]):
        return _make_remote(args[0], {})
    if args:
        raise TypeError("use @afield.remote, or @afield.remote(num_cpus=..., ...) with options as keywords")
    return lambda target: _make_remote(target, options)


def _make_remote(target: Any, options: dict[str, Any]) -> Any:
    if isinstance(target, (RemoteFunction, ActorClass)):
        raise TypeError(f"{target!r} is remote already; use .options(...) for other options")
    if isinstance(target, type):
        return ActorClass(target, options)
    if callable(target) and hasattr(target, "__qualname__"):
        return RemoteFunction(target, options)
    raise TypeError(f"@afield.remote works on functions and classes, not on {type(target).__name__}")


@overload
def get(refs: ObjectRef, *, timeout: float | timedelta | None = None, device: str | int | None = None) -> Any: ...
@overload
def get(
    refs: Sequence[ObjectRef], *, timeout: float | timedelta | None = None, device: str | int | None = None
) -> list[Any]: ...
def get(
    refs: ObjectRef | Sequence[ObjectRef], *, timeout: float | timedelta | None = None, device: str | int | None = None
) -> Any:
    """Return the value of a ref, or the values of a list of refs, waiting until they are there.

    Arrays come back as read-only views of shared memory. Device arrays come back on this process's device, which copies
    nothing where they are on it; a process without a device gets NumPy arrays.

    Args:
        refs: one ref or a list.
        timeout: seconds (or a timedelta) for all together; 0 asks without waiting.
        device: where device arrays are wanted instead: "host" (as NumPy arrays), or a device that this process may use, by
            UUID or by its number in `array_module().cuda.Device`.

    Raises:
        GetTimeoutError: not ready in time.
        TaskError: the task raised; also an instance of what it raised.
        LossError: the value was lost with a process or device, and could not be made again.
        ObjectStoreFullError, OutOfDeviceMemoryError: there was no room in time to bring it here.
    """
    try:
        values = (participation.participant or participation.ensure(something_new=False)).values
        limit_s = None if timeout is None else seconds(timeout, "get()")
        deadline = None if limit_s is None else time.monotonic() + limit_s
        into = None if device is None else values.parts.devices.arena_named(device)
        if type(refs) is ObjectRef:
            return values.get(refs, deadline, into=into)
        if isinstance(refs, ObjectRefGenerator):
            return refs  # what num_returns="dynamic" made: the value of its ref was a generator of refs
        if not isinstance(refs, (list, tuple)):
            raise InvalidOptionError(f"get() takes an ObjectRef or a list of them, not {_describe(refs)}")
        for ref in refs:
            if type(ref) is not ObjectRef:
                raise InvalidOptionError(f"get() takes an ObjectRef or a list of them; the list has {_describe(ref)}")
        return values.get_all(refs, deadline, into=into)
    except BaseException as error:
        trim(error)
        raise  # without a frame of this function


def _describe(value: Any) -> str:
    hint = ""
    if isinstance(value, ActorHandle):
        hint = " (call one of its methods with .remote() to get a ref)"
    elif isinstance(value, RemoteFunction):
        hint = " (call it with .remote() to get a ref)"
    return f"a {type(value).__name__}{hint}"


def put(value: Any) -> ObjectRef:
    """Store a value and return a ref to it; large ones are shared by all readers of the machine without copies.

    Raises:
        TypeError: the value is an ObjectRef already.
        SerializationError: it cannot be pickled.
        ObjectStoreFullError, OutOfDeviceMemoryError: there was no room in time.
    """
    if type(value) is ObjectRef:
        raise InvalidOptionError(
            "put() of an ObjectRef: it is a reference already; pass it on as it is, or put [ref] to nest it"
        )
    try:
        return (participation.participant or participation.ensure()).values.put(value)
    except BaseException as error:
        trim(error)
        raise


def wait(
    refs: Sequence[ObjectRef],
    *,
    num_returns: int = 1,
    timeout: float | timedelta | None = None,
    fetch_local: bool = True,
) -> tuple[list[ObjectRef], list[ObjectRef]]:
    """Wait until `num_returns` of the refs are ready (with a value or an error); return (ready, not ready).

    Both lists keep the order of `refs`; `ready` has at most `num_returns`.

    Args:
        refs: a list of different refs.
        num_returns: how many to wait for.
        timeout: seconds (or a timedelta); 0 asks without waiting.
        fetch_local: values of this machine are shared, so there is nothing to fetch yet.

    Raises:
        TypeError: not a list of refs, or `timeout` is no number.
        ValueError: duplicates, `num_returns` out of range, or `timeout` less than 0 or NaN.
    """
    ids = _distinct(refs)
    if not ids:
        return [], []
    limit_s = None if timeout is None else seconds(timeout, "wait()")
    if limit_s is not None and limit_s < 0:
        raise ValueError(f"timeout={timeout!r} is less than 0")
    count: object = num_returns
    if isinstance(count, np.integer):
        num_returns = int(count)
    if type(num_returns) is not int or num_returns < 1:
        raise ValueError(f"num_returns={num_returns!r} must be a whole number of at least 1")
    if num_returns > len(refs):
        raise ValueError(f"num_returns={num_returns} is more than the {len(refs)} refs given")
    try:
        values = (participation.participant or participation.ensure(something_new=False)).values
        deadline = None if limit_s is None else time.monotonic() + limit_s
        return values.wait(refs, ids, num_returns, deadline)
    except BaseException as error:
        trim(error)
        raise


def _distinct(refs: object) -> list[bytes]:
    """Check the argument of `wait`, as cheaply as the usual case allows: it is called in loops over long lists."""
    if isinstance(refs, (ObjectRef, ObjectRefGenerator)):
        raise InvalidOptionError("wait() takes a list of ObjectRefs, not a single one; use wait([ref])")
    if not isinstance(refs, (list, tuple)):
        raise InvalidOptionError("wait() takes a list of ObjectRefs")
    try:
        ids = [ref.id for ref in refs]
    except (AttributeError, TypeError):
        raise InvalidOptionError("wait() takes a list of ObjectRefs") from None
    if len(set(ids)) != len(ids):
        raise ValueError("wait() takes a list of different refs; this one has duplicates")
    return ids


def kill(actor: ActorHandle, *, no_restart: bool = True) -> None:
    """End an actor's process at once; its pending calls, and later ones of this process, fail with `ActorDiedError`."""
    if not isinstance(actor, ActorHandle):
        raise InvalidOptionError(f"kill() takes an actor's handle, not a {type(actor).__name__}")
    participant = _require()
    participant.process.soon(participant.actors.kill, actor._actor_id, no_restart)


def cancel(ref: ObjectRef | ObjectRefGenerator, *, force: bool = False, recursive: bool = True) -> None:
    """Cancel the task that makes an object: its `get` raises `TaskCancelledError`.

    A task that waits never starts; one that runs gets KeyboardInterrupt (an async actor's call: CancelledError). Does
    nothing if the task has ended.

    Args:
        ref: one of the task's refs, or its generator.
        force: end the worker process that runs it.
        recursive: also cancel what the task has submitted.

    Raises:
        ValueError: `force` for an actor's call.
    """
    if isinstance(ref, ObjectRefGenerator):
        ref = ref.completed()
    if not isinstance(ref, ObjectRef):
        raise InvalidOptionError(f"cancel() takes an ObjectRef, not {_describe(ref)}; to end an actor use kill()")
    participant = _require()
    participant.process.soon(participant.cancellation.cancel, ref.id, force, recursive)


def exit_actor() -> None:
    """End the actor that this is called in, after the present call.

    Raises:
        TypeError: this is no actor.
    """
    if current.in_actor is None or current.leave_actor is None or not current.in_actor():
        raise TypeError("exit_actor() was called outside of an actor")
    current.leave_actor()
    raise ActorExit


def _require() -> Participant:
    return participation.require("afield is not initialised; call afield.init() first")


def query(what: str, argument: Any = None) -> Any:
    """Ask the node daemon."""
    return (participation.participant or participation.ensure(something_new=False)).process.requests.ask(
        lambda n: messages.Query(n, what, argument)
    )


def cluster_resources() -> dict[str, float]:
    """Return all resources of the cluster: CPUs, GPUs, bytes of memory, custom amounts."""
    total: dict[str, float] = query("total")
    return total


def available_resources() -> dict[str, float]:
    """Return what is not leased at this moment; what is used up is not among it."""
    available: dict[str, float] = query("available")
    return {name: amount for name, amount in available.items() if amount}


def nodes() -> list[dict[str, Any]]:
    """Return what is known of each node, under the names that Ray has for it; there is one."""
    resources = cluster_resources()
    return [
        {
            "NodeID": facts.facts.node_id,
            "Alive": True,
            "alive": True,
            "NodeManagerAddress": "127.0.0.1",
            "NodeManagerHostname": socket.gethostname(),
            "Resources": resources,
        }
    ]


def empty(shape: int | tuple[int, ...], dtype: npt.DTypeLike = "float64") -> npt.NDArray[Any]:
    """Return an uninitialised array whose memory is in the host store, so that returning it from a task copies nothing.

    The store keeps the memory as it is if nothing but the returned value refers to the array any more; otherwise it copies.

    Raises:
        ObjectStoreFullError: there was no room in time.
        TypeError: the dtype holds Python objects.
    """
    return (participation.participant or participation.ensure()).values.parts.store.empty(shape, dtype)


def array_module() -> Any:
    """Return the array library of this process's devices: CuPy, or the emulated module with the names of NumPy's API.

    What a task allocates with it lies in the device's store, so that returning it copies nothing. In a worker the devices are
    those of its lease, in the driver all of the node.

    Raises:
        NoDeviceError: this process has no devices; says how to get some.
        ImportError: the devices are CUDA devices and CuPy is not installed.
    """
    return (participation.participant or participation.ensure()).values.parts.devices.module()


def stats(*, local: bool = False) -> dict[str, float]:
    """Return counters: tasks submitted, retried and recomputed, and bytes by kind of movement.

    Bytes of host memory: `bytes_copied_in`, `bytes_shared` (read without a copy), `bytes_born` (kept without a copy). Of device
    memory: `device_bytes_shared`, `device_bytes_born`, `device_bytes_copied` (within a device, where a result could not be
    kept as it was). Between tiers: `device_to_host`, `host_to_device`, `peer`, `disk_write`, `disk_read`.

    They are sums over the processes of the cluster. A process that cannot answer within a second, and one that has ended,
    count with what they had when they were last asked.

    Args:
        local: count this process only.
    """
    participant = _require()
    total: dict[str, float] = participant.counters() if local else query("stats")
    return total


def memory() -> MemoryListing:
    """Return the live objects of the cluster, the largest first: size, where they lie, and why they are alive.

    At most 100,000 are listed; the list's `total` says how many there are, `left_out` how many of them it lacks, and `silent`
    which processes did not answer in time.
    With AFIELD_RECORD_CALL_SITES=1 in the environment of `init`, also where they were created.
    """
    _require()
    return assemble(query("memory"))
