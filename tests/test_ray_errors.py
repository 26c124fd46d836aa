"""Errors as programs written for Ray catch them: by the user's own type, by the actor, by the tasks that they went through."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import afield as ray
from afield.exceptions import (
    ActorConstructionError,
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    PendingCallsLimitExceededError,
    RayActorError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)

PATIENCE_S = 30.0


def get(refs: Any) -> Any:
    return ray.get(refs, timeout=PATIENCE_S)


class Stop(BaseException):
    """One that `except Exception` is not meant to catch."""


class Several(ExceptionGroup[Exception]):
    """A group of the user's own."""


@ray.remote
def fail(error: BaseException) -> None:
    raise error


@ray.remote
class Fails:
    def __init__(self, error: BaseException | None = None) -> None:
        if error is not None:
            raise error

    def fail(self, error: BaseException) -> None:
        raise error

    async def fail_async(self, error: BaseException) -> None:
        raise error

    def items(self, error: BaseException) -> Any:
        yield 1
        raise error


def _by_task(error: BaseException) -> Any:
    return fail.remote(error)


def _by_actor(error: BaseException) -> Any:
    return Fails.remote().fail.remote(error)


def _by_async_actor(error: BaseException) -> Any:
    return Fails.remote().fail_async.remote(error)


def _by_generator(error: BaseException) -> Any:
    items = Fails.remote().items.remote(error)
    assert get(next(items)) == 1
    return next(items)


WAYS = [_by_task, _by_actor, _by_async_actor, _by_generator]


@pytest.mark.parametrize("way", WAYS)
def test_an_exception_that_is_no_exception_class_is_caught_by_its_type(
    shared_runtime: None, way: Callable[[BaseException], Any]
) -> None:
    with pytest.raises(Stop, match="enough") as caught:
        get(way(Stop("enough")))
    assert isinstance(caught.value, RayTaskError) and isinstance(caught.value.cause, Stop)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [ExceptionGroup, Several])
def test_a_group_stays_a_group(
    shared_runtime: None, way: Callable[[BaseException], Any], kind: type[ExceptionGroup[Exception]]
) -> None:
    group = kind("both", [ValueError("v"), ExceptionGroup("inner", [TypeError("t"), KeyError("k")])])
    with pytest.raises(kind) as caught:
        get(way(group))
    error = caught.value
    assert isinstance(error, RayTaskError) and error.message == "both"
    assert [type(each) for each in error.exceptions] == [ValueError, ExceptionGroup]


def test_except_star_takes_a_group_apart(shared_runtime: None) -> None:
    seen: list[BaseException] = []
    group = ExceptionGroup("both", [ValueError("v"), ExceptionGroup("inner", [TypeError("t"), KeyError("k")])])
    with pytest.raises(ExceptionGroup) as rest:
        try:
            get(fail.remote(group))
        except* ValueError as found:
            seen += found.exceptions
        except* KeyError as found:
            seen += found.exceptions
    assert [str(each) for each in seen[:1]] == ["v"] and isinstance(seen[1], ExceptionGroup)
    assert rest.group_contains(TypeError) and not rest.group_contains(ValueError)


def test_a_group_goes_through_a_task_that_passes_it_on(shared_runtime: None) -> None:
    @ray.remote
    def relay(refs: list[Any]) -> Any:
        return ray.get(refs[0])

    with pytest.raises(Several) as caught:
        get(relay.remote([fail.remote(Several("all", [ValueError("v")]))]))
    assert [str(each) for each in caught.value.exceptions] == ["v"]


def test_a_group_of_more_than_exceptions_is_an_error_of_the_task(shared_runtime: None) -> None:
    with pytest.raises(RayTaskError) as caught:
        get(fail.remote(BaseExceptionGroup("hard", [Stop(), ValueError()])))
    assert isinstance(caught.value.cause, BaseExceptionGroup)


@pytest.mark.parametrize("kind", [Exception, BaseException])
def test_the_bases_of_all_errors_make_no_class_of_their_own(shared_runtime: None, kind: type[BaseException]) -> None:
    with pytest.raises(RayTaskError) as caught:
        get(fail.remote(kind("plain")))
    assert type(caught.value) is RayTaskError


def test_an_interrupt_of_the_tasks_own_counts_as_both(shared_runtime: None) -> None:
    for ref in (fail.remote(KeyboardInterrupt("mine")), Fails.remote().fail.remote(KeyboardInterrupt("mine"))):
        with pytest.raises(TaskCancelledError, match="KeyboardInterrupt: mine") as caught:
            get(ref)
        assert isinstance(caught.value, RayTaskError) and isinstance(caught.value.cause, KeyboardInterrupt)
        assert not isinstance(caught.value, KeyboardInterrupt)


def test_as_instanceof_cause(shared_runtime: None) -> None:
    with pytest.raises(RayTaskError) as caught:
        get(fail.remote(ValueError("v")))
    assert isinstance(caught.value.as_instanceof_cause(), ValueError)


# ---- which tasks an error went through -------------------------------------------------------------------------------


@ray.remote
def first() -> float:
    return 1 / 0


@ray.remote
def takes(value: Any) -> Any:
    return value


@ray.remote
def gets(refs: list[Any]) -> Any:
    return ray.get(refs[0])


def test_an_error_says_through_which_tasks_it_came(shared_runtime: None) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        get(takes.remote(gets.remote([takes.remote(first.remote())])))
    text = str(caught.value)
    assert text == "first() raised ZeroDivisionError: division by zero (passed on by takes(), gets(), takes())"
    assert isinstance(caught.value.__cause__, ZeroDivisionError) and "1 / 0" in caught.value.remote_traceback


def test_one_error_of_several_tasks_names_each_in_its_own(shared_runtime: None) -> None:
    origin = first.remote()
    names = ["left", "left", "right", "left"]
    texts = []
    for ref in [*(takes.options(name=name).remote(origin) for name in names), origin]:
        with pytest.raises(ZeroDivisionError) as caught:
            get(ref)
        texts.append(str(caught.value).partition("by zero")[2])
    assert texts == [*(f" (passed on by {name}())" for name in names), ""]


def test_a_long_way_is_cut_short(shared_runtime: None) -> None:
    ref = first.remote()
    for number in range(30):
        ref = takes.options(name=f"step{number}").remote(ref)
    with pytest.raises(ZeroDivisionError) as caught:
        get(ref)
    assert str(caught.value).count("step") == 8 and "step29" in str(caught.value)


def test_a_lost_worker_is_said_of_the_task_that_took_its_result(shared_runtime: None) -> None:
    @ray.remote(max_retries=0)
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(WorkerCrashedError) as caught:
        get(takes.remote(die.remote()))
    assert any("takes()" in note for note in caught.value.__notes__)


def test_a_large_error_of_an_argument_says_so_too(shared_runtime: None) -> None:
    for size in (40_000, 3 << 20):  # one that is passed on as it is, and one that is read from the store
        with pytest.raises(ValueError, match="big") as caught:
            get(takes.remote(fail.remote(ValueError("big", np.zeros(size, np.uint8)))))
        assert ("passed on by takes()" in str(caught.value)) == (size > 1 << 20)


# ---- which actor an error is about -----------------------------------------------------------------------------------


def test_errors_of_actors_name_the_actor(shared_runtime: None) -> None:
    def name_of(actor: Any, call: Callable[[], Any], kind: type[BaseException]) -> None:
        with pytest.raises(kind) as caught:
            get(call())
        assert caught.value.actor_id == actor._actor_id.hex(), type(caught.value)  # type: ignore[attr-defined]
        assert get(ray.remote(lambda e: e.actor_id).remote(caught.value)) == actor._actor_id.hex()  # type: ignore[attr-defined]

    class Plain:
        def pid(self) -> int:
            return os.getpid()

        def wait(self) -> None:
            signal.pause()

    plain = ray.remote(Plain)
    killed = plain.remote()
    get(killed.pid.remote())
    ray.kill(killed)
    name_of(killed, lambda: killed.pid.remote(), ActorDiedError)
    failed = Fails.remote(ValueError("no"))
    name_of(failed, lambda: failed.fail.remote(ValueError()), ActorConstructionError)
    unborn = Fails.remote(first.remote())
    name_of(unborn, lambda: unborn.fail.remote(ValueError()), ActorConstructionError)
    huge = plain.options(num_cpus=10_000).remote()
    name_of(huge, lambda: huge.pid.remote(), ActorUnschedulableError)
    full = plain.options(max_pending_calls=1).remote()
    first_call = full.wait.remote()
    name_of(full, lambda: full.pid.remote(), PendingCallsLimitExceededError)
    ray.kill(full)
    name_of(full, lambda: first_call, ActorDiedError)


def test_a_call_that_a_restart_cut_off_names_the_actor(shared_runtime: None) -> None:
    @ray.remote(max_restarts=1)
    class Restarts:
        def die(self) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    actor = Restarts.remote()
    with pytest.raises(ActorUnavailableError) as caught:
        get(actor.die.remote())
    assert caught.value.actor_id == actor._actor_id.hex()


def test_what_a_constructor_did_not_catch_ends_the_actor(shared_runtime: None) -> None:
    @ray.remote
    class Reads:
        def __init__(self, refs: list[Any]) -> None:
            self.value = ray.get(refs[0])

        def ping(self) -> None: ...

    with pytest.raises(RayActorError, match=r"passed on by .*Reads\.__init__") as caught:
        get(Reads.remote([first.remote()]).ping.remote())
    assert isinstance(caught.value, ZeroDivisionError)


# ---- errors of ours that come of what a task does --------------------------------------------------------------------


class Unreadable:
    """Cannot be rebuilt anywhere."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


def test_what_a_task_cannot_return_or_read_is_an_error_of_the_task(no_runtime: None) -> None:
    ray.init(num_cpus=1, host_memory=64 << 20)

    @ray.remote
    class Returns:
        def too_much(self) -> Any:
            return np.zeros(100 << 20, np.uint8)

        def unpicklable(self) -> Any:
            return (i for i in ())

        def items(self) -> Any:
            yield 1
            yield (i for i in ())

        def take(self, value: Any) -> None: ...

    actor = Returns.remote()
    items = actor.items.remote()
    assert get(next(items)) == 1
    for ref, kind, text in (
        (actor.too_much.remote(), ray.ObjectStoreFullError, r"^too_much\(\) raised ObjectStoreFullError"),
        (actor.unpicklable.remote(), ray.SerializationError, r"^unpicklable\(\) raised SerializationError"),
        (next(items), ray.SerializationError, r"^items\(\) raised SerializationError"),
        (actor.take.remote(ray.put(Unreadable())), ray.DeserializationError, r"^take\(\) raised DeserializationError"),
    ):
        with pytest.raises(RayTaskError, match=text) as caught:
            get(ref)
        assert isinstance(caught.value, kind)


class Code(Exception):  # noqa: N818 - as a user may call it
    """Its constructor takes something else than it passes on."""

    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


class Holds(Exception):  # noqa: N818 - as a user may call it
    """Cannot be pickled, and travels without what it holds."""

    def __init__(self) -> None:
        super().__init__("holds")
        self.held = threading.Lock()


class Never(Exception):  # noqa: N818 - as a user may call it
    """Cannot travel at all."""

    def __init__(self, held: Any) -> None:
        super().__init__(held)


def test_a_group_comes_with_members_that_pickle_cannot_rebuild(shared_runtime: None) -> None:
    @ray.remote
    def several() -> None:
        inner = Several("inner", [Holds(), ValueError("v")])
        inner.number = 5  # type: ignore[attr-defined]
        raise ExceptionGroup("outer", [Code(code=3), inner])

    with pytest.raises(ExceptionGroup) as caught:
        get(several.remote())
    code, inner = caught.value.exceptions
    assert isinstance(code, Code) and code.code == 3
    assert isinstance(inner, Several) and inner.number == 5  # type: ignore[attr-defined]
    assert isinstance(inner.exceptions[0], Holds) and str(inner.exceptions[1]) == "v"
    assert "several" in "".join(traceback.format_exception(caught.value))


def test_a_member_that_cannot_travel_is_described(shared_runtime: None) -> None:
    @ray.remote
    def several() -> None:
        class StuckError(Exception):
            lock = threading.Lock()  # a class that cannot be pickled, by value nor by name

        raise ExceptionGroup("outer", [StuckError("s"), Never(threading.Lock()), ValueError("v")])

    with pytest.raises(ExceptionGroup) as caught:
        get(several.remote())
    lost, in_words, other = caught.value.exceptions
    assert type(in_words) is Never and "lock object" in str(in_words)
    assert type(lost) is Exception and "StuckError: s (it could not be pickled)" in str(lost)
    assert isinstance(other, ValueError)


def test_refs_in_members_of_a_group_are_kept(shared_runtime: None) -> None:
    @ray.remote
    def several() -> None:
        code = Code(code=1)
        code.ref = ray.put("kept")  # type: ignore[attr-defined]
        raise ExceptionGroup("outer", [code])

    with pytest.raises(ExceptionGroup) as caught:
        get(several.remote())
    assert get(caught.value.exceptions[0].ref) == "kept"  # type: ignore[union-attr]
