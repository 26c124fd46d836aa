"""What wrong use gets: a typed error that names the remedy, at the call that is wrong where that can be known there."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import afield
from afield.errors import SchedulingError

PATIENCE_S = 30.0


@afield.remote
def nothing() -> None:
    """Do nothing; never called, so that workers need not import this module."""


class Plain:
    """An actor class; never created, as above."""

    def work(self) -> None:
        """Do nothing."""


# -- wrong calls --------------------------------------------------------------------------------------------------


def test_calling_directly() -> None:
    with pytest.raises(TypeError, match=r"nothing\.remote\(\.\.\.\) for a future, or nothing\.__wrapped__"):
        nothing()
    with pytest.raises(TypeError, match=r"cannot be instantiated directly; use Plain\.remote\("):
        afield.remote(Plain)()


def test_calling_an_actor_method_directly(shared_runtime: None) -> None:
    class Local:
        def work(self) -> None:
            pass

    actor = afield.remote(Local).remote()
    with pytest.raises(TypeError, match=r"use \.work\.remote\("):
        actor.work()
    with pytest.raises(AttributeError, match="has no method 'wrok'; did you mean 'work'"):
        actor.wrok.remote()
    with pytest.raises(AttributeError, match="has no method 'zzz'"):
        actor.zzz.remote()


@pytest.mark.parametrize("value", [1, "ref", None, {}, {1}, [1], [None, "x"]])
def test_get_of_no_ref(shared_runtime: None, value: Any) -> None:
    with pytest.raises(TypeError, match=r"get\(\) takes an ObjectRef or a list of them"):
        afield.get(value)


def test_get_of_a_function_or_an_actor_says_what_was_forgotten(shared_runtime: None) -> None:
    class Local:
        pass

    with pytest.raises(TypeError, match=r"a RemoteFunction \(call it with \.remote\(\)"):
        afield.get(nothing)
    with pytest.raises(TypeError, match=r"an? ActorHandle \(call one of its methods"):
        afield.get([afield.remote(Local).remote()])


def test_put_of_a_ref(shared_runtime: None) -> None:
    with pytest.raises(TypeError, match=r"put \[ref\] to nest it|pass it on as it is"):
        afield.put(afield.put(1))


def test_wrong_arguments_of_wait(shared_runtime: None) -> None:
    a, b = afield.put(1), afield.put(2)
    with pytest.raises(ValueError, match="duplicates"):
        afield.wait([a, b, a])
    with pytest.raises(TypeError, match=r"use wait\(\[ref\]\)"):
        afield.wait(a)  # type: ignore[arg-type]
    for refs in (None, 1, {a}, [a, 1]):
        with pytest.raises(TypeError, match="a list of ObjectRefs"):
            afield.wait(refs)  # type: ignore[arg-type]
    for count in (0, -1, True, 1.0, "1"):
        with pytest.raises(ValueError, match="whole number of at least 1"):
            afield.wait([a, b], num_returns=count)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="more than the 2 refs"):
        afield.wait([a, b], num_returns=3)


@pytest.mark.parametrize("value", [None, "actor", Plain, nothing])
def test_kill_of_no_actor(shared_runtime: None, value: Any) -> None:
    with pytest.raises(TypeError, match="actor's handle"):
        afield.kill(value)


@pytest.mark.parametrize("value", [1, None, "f"])
def test_remote_on_no_function(value: Any) -> None:
    with pytest.raises(TypeError, match=r"afield\.remote"):
        afield.remote(value)
    with pytest.raises(TypeError, match="functions and classes"):
        afield.remote(num_cpus=1)(value)


# -- options ------------------------------------------------------------------------------------------------------


def f() -> None:
    """Stand for any function."""


def on_function(options: dict[str, Any]) -> None:
    """Give the options to a function."""
    afield.remote(**options)(f)


def on_class(options: dict[str, Any]) -> None:
    """Give the options to a class."""
    afield.remote(**options)(Plain)


def later(options: dict[str, Any]) -> None:
    """Give the options afterwards."""
    nothing.options(**options)


@pytest.mark.parametrize("give", [on_function, on_class, later])
@pytest.mark.parametrize(
    ("name", "nearest"), [("num_cpu", "num_cpus"), ("numgpus", "num_gpus"), ("resource", "resources")]
)
def test_an_unknown_option_is_told_the_nearest(give: Callable[[dict[str, Any]], None], name: str, nearest: str) -> None:
    with pytest.raises(afield.InvalidOptionError, match=f"no option '{name}'; did you mean '{nearest}'"):
        give({name: 1})


@pytest.mark.parametrize("give", [on_function, later])
def test_an_option_of_the_other_kind(give: Callable[[dict[str, Any]], None]) -> None:
    with pytest.raises(afield.InvalidOptionError, match=r"no option 'max_restarts'.*max_retries"):
        give({"max_restarts": 1})
    with pytest.raises(afield.InvalidOptionError, match=r"no option 'num_returns'.*max_restarts"):
        on_class({"num_returns": 2})


WRONG = [
    ("num_cpus", "two"),
    ("num_cpus", -1),
    ("num_cpus", True),
    ("num_cpus", float("nan")),
    ("num_gpus", 1.5),
    ("num_gpus", [1]),
    ("memory", "6G"),
    ("memory", -5),
    ("gpu_memory", 1.5),
    ("resources", ["a"]),
    ("resources", {"CPU": 1}),
    ("resources", {"a": "b"}),
    ("name", 5),
]


@pytest.mark.parametrize("give", [on_function, on_class, later])
@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda x: str(x))
def test_an_ill_typed_option_is_named(give: Callable[[dict[str, Any]], None], name: str, value: Any) -> None:
    with pytest.raises(afield.InvalidOptionError, match=name) as caught:
        give({name: value})
    assert {ValueError, TypeError} <= set(type(caught.value).__mro__)


@pytest.mark.parametrize(
    ("name", "value"), [("num_returns", -1), ("num_returns", 1.0), ("max_retries", -2), ("max_retries", "3")]
)
def test_ill_typed_counts(name: str, value: Any) -> None:
    with pytest.raises(afield.InvalidOptionError, match=f"{name}={value!r}.* whole number"):
        on_function({name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_cpus": -1}, "num_cpus"),
        ({"num_cpus": "many"}, "num_cpus"),
        ({"resources": {"x": -1}}, "resources"),
        ({"host_memory": "lots"}, "host_memory='lots'.*6GiB"),
        ({"host_memory": 1000}, "1 MiB"),
        ({"devices": "emulated"}, "emulated:2"),
        ({"devices": "emulated:0"}, "emulated:2"),
        ({"devices": 2}, "emulated:2"),
        ({"address": "10.0.0.1:5"}, "address="),
    ],
)
def test_wrong_arguments_of_init(no_runtime: None, options: dict[str, Any], message: str) -> None:
    with pytest.raises(afield.InvalidOptionError, match=message):
        afield.init(**options)
    assert not afield.is_initialized()


def test_a_wrong_setting_in_the_environment(no_runtime: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFIELD_DEVICES", "fast ones")
    with pytest.raises(afield.InvalidOptionError, match="emulated:2"):
        afield.init()
    assert not afield.is_initialized()


def test_devices_that_are_not_there(no_runtime: None) -> None:
    with pytest.raises(afield.NoDeviceError, match="AFIELD_DEVICES=emulated:3"):
        afield.init(num_gpus=3)
    with pytest.raises(afield.NoDeviceError, match="emulated:2"):
        afield.init(devices="cuda")
    with pytest.raises(TypeError):
        afield.init(num_cpu=2)  # type: ignore[call-arg]
    assert not afield.is_initialized()


# -- what can never be scheduled ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"num_cpus": 64}, ["64", "CPU", "2"]),
        ({"resources": {"licence": 1}}, ["licence"]),
        ({"num_gpus": 1}, ["GPU", "AFIELD_DEVICES=emulated"]),
        ({"memory": "900TiB"}, ["900 TiB", "memory"]),
    ],
)
def test_a_request_that_no_node_can_meet(runtime: None, options: dict[str, Any], parts: list[str]) -> None:
    class Local:
        def work(self) -> None:
            pass

    ref = afield.remote(**options)(lambda: None).remote()
    with pytest.raises(afield.TaskUnschedulableError) as of_task:
        afield.get(ref, timeout=PATIENCE_S)
    ref = afield.remote(**options)(Local).remote().work.remote()
    with pytest.raises(afield.ActorUnschedulableError) as of_actor:
        afield.get(ref, timeout=PATIENCE_S)
    for caught in (of_task, of_actor):
        assert isinstance(caught.value, SchedulingError)
        for part in parts:
            assert part in str(caught.value), str(caught.value)
    assert afield.get(afield.remote(lambda: 1).remote(), timeout=PATIENCE_S) == 1


# -- what cannot be pickled ---------------------------------------------------------------------------------------


class Box:
    """Holds something; importable here, so it travels by reference."""

    def __init__(self, content: Any) -> None:
        self.content = content


@pytest.mark.contract("cloudpickle")
def test_arguments_that_cannot_be_pickled_name_the_attribute(shared_runtime: None) -> None:
    take = afield.remote(lambda *args, **named: None)
    with pytest.raises(afield.SerializationError, match=r"content\['lock'\] is a _thread\.lock") as caught:
        take.remote(1, Box({"fine": 1, "lock": threading.Lock()}))
    assert "the arguments of" in str(caught.value) and isinstance(caught.value, TypeError)
    with pytest.raises(afield.SerializationError, match=r"\['key'\]\[1\] is a _thread\.lock"):
        take.remote(key=[1, threading.Lock()])
    with pytest.raises(afield.SerializationError, match="put"):
        afield.put(threading.Lock())
    assert afield.get(take.remote(1)) is None


@pytest.mark.contract("cloudpickle")
def test_functions_and_classes_that_cannot_be_pickled_name_what_they_captured(shared_runtime: None) -> None:
    lock = threading.Lock()

    class Local:
        def work(self) -> Any:
            return lock

    with pytest.raises(afield.SerializationError, match=r"captured 'lock'\) is a _thread\.lock"):
        afield.remote(lambda: lock).remote()
    with pytest.raises(afield.SerializationError, match="the class Local"):
        afield.remote(Local).remote()


def test_results_that_cannot_be_pickled_name_the_attribute(shared_runtime: None) -> None:
    class Local:
        def work(self) -> Any:
            return {"a": threading.Lock()}

    def make() -> Any:
        return {"a": [threading.Lock()]}

    with pytest.raises(afield.SerializationError, match=r"\['a'\]\[0\] is a _thread\.lock") as caught:
        afield.get(afield.remote(make).remote())
    assert "make()" in str(caught.value)
    with pytest.raises(afield.SerializationError, match=r"\['a'\] is a _thread\.lock"):
        afield.get(afield.remote(Local).remote().work.remote())
    for ref in afield.remote(num_returns=2)(lambda: (1, threading.Lock())).remote():
        with pytest.raises(afield.SerializationError):
            afield.get(ref)


def test_a_result_whose_class_does_not_exist_at_the_reader(shared_runtime: None) -> None:
    def make() -> Any:
        import sys
        import types

        module = types.ModuleType("only_at_the_worker")
        exec("class Thing: pass", module.__dict__)
        sys.modules["only_at_the_worker"] = module
        return [module.Thing()]

    with pytest.raises(afield.DeserializationError, match=r"only_at_the_worker.*install the module that defines them"):
        afield.get(afield.remote(make).remote())


def test_an_argument_whose_class_does_not_exist_at_the_worker(
    shared_runtime: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_at_the_driver.py").write_text("class Thing: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_at_the_driver  # type: ignore[import-not-found]

    ref = afield.remote(lambda x: x).remote([only_at_the_driver.Thing()])
    with pytest.raises(afield.DeserializationError, match="only_at_the_driver"):
        afield.get(ref, timeout=PATIENCE_S)


def test_a_value_whose_class_is_there_and_cannot_be_called_so(shared_runtime: None) -> None:
    class NeedsTwoError(Exception):
        def __init__(self, first: str, second: str) -> None:
            super().__init__(f"{first} and {second}")

    ref = afield.put([NeedsTwoError("a", "b")])
    with pytest.raises(
        afield.DeserializationError, match=r"__init__\(\) missing.*rebuilt by a call of its class"
    ) as caught:
        afield.get(ref)
    assert "install the module" not in str(caught.value)


# -- what a function raises ---------------------------------------------------------------------------------------


class NeedsArgumentsError(Exception):
    """An exception whose constructor does not take what `args` holds."""

    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(f"code {code}: {detail}")
        self.code = code
        self.detail = detail


@pytest.mark.contract("cloudpickle")
def test_a_task_error_is_also_what_was_raised(shared_runtime: None) -> None:
    @afield.remote
    def fail(x: int) -> int:
        return {}[x]  # type: ignore[index]

    with pytest.raises(KeyError) as caught:
        afield.get(fail.remote(5))
    error: Any = caught.value
    assert isinstance(error, afield.TaskError) and isinstance(error, afield.AfieldError)
    assert type(error.cause) is KeyError and error.cause.args == (5,)
    assert error.function_name.endswith("fail") and "KeyError: 5" in str(error)
    assert "return {}[x]" in error.remote_traceback and "in fail" in error.remote_traceback
    assert "executor.py" not in error.remote_traceback
    assert error.__cause__ is error.cause


def test_a_users_exception_keeps_its_attributes(shared_runtime: None) -> None:
    class LocalError(Exception):
        def __init__(self, code: int, *, detail: str) -> None:
            super().__init__(f"code {code}: {detail}")
            self.code = code
            self.detail = detail

    @afield.remote
    def fail() -> None:
        raise LocalError(7, detail="seven")

    with pytest.raises(afield.TaskError, match="code 7: seven") as caught:
        afield.get(fail.remote())
    error: Any = caught.value
    assert type(error.cause).__name__ == "LocalError"
    assert (error.code, error.detail) == (7, "seven")
    assert (error.cause.code, error.cause.detail) == (7, "seven")


def test_an_importable_exception_with_required_arguments(shared_runtime: None) -> None:
    def fail() -> None:
        from tests.test_errors import NeedsArgumentsError

        raise NeedsArgumentsError(7, detail="seven")

    with pytest.raises(NeedsArgumentsError, match="code 7: seven") as caught:
        afield.get(afield.remote(fail).remote())
    assert isinstance(caught.value, afield.TaskError)
    assert (caught.value.code, caught.value.detail) == (7, "seven")


@pytest.mark.contract("cloudpickle")
def test_an_exception_that_cannot_be_pickled(shared_runtime: None) -> None:
    class LocalError(Exception):
        def __init__(self) -> None:
            super().__init__(threading.Lock())

    @afield.remote
    def fail() -> None:
        raise LocalError

    with pytest.raises(afield.TaskError, match="LocalError") as caught:
        afield.get(fail.remote())
    cause = caught.value.cause
    assert type(cause).__name__ == "LocalError" and "lock object" in str(cause)
    assert "raise LocalError" in caught.value.remote_traceback


@pytest.mark.contract("cloudpickle")
def test_what_cannot_be_pickled_of_an_exception_stays_behind(shared_runtime: None) -> None:
    class LocalError(ValueError):
        def __init__(self) -> None:
            super().__init__("the text")
            self.lock = threading.Lock()
            self.code = 5

    @afield.remote
    def fail() -> None:
        raise LocalError

    with pytest.raises(ValueError, match="the text") as caught:
        afield.get(fail.remote())
    error: Any = caught.value
    assert error.code == 5 and error.cause.code == 5 and not hasattr(error, "lock")


def test_an_exception_whose_text_raises(shared_runtime: None) -> None:
    class LocalError(Exception):
        def __str__(self) -> str:
            raise ValueError("no text")

    @afield.remote
    def fail() -> None:
        raise LocalError

    with pytest.raises(afield.TaskError, match="cannot be shown"):
        afield.get(fail.remote(), timeout=PATIENCE_S)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_what_would_end_a_program_ends_only_the_task(shared_runtime: None, kind: type[BaseException]) -> None:
    @afield.remote
    def leave() -> None:
        raise kind(3)

    class Local:
        def leave(self) -> None:
            raise kind(3)

        def here(self) -> bool:
            return True

    actor = afield.remote(Local).remote()
    for ref in (leave.remote(), actor.leave.remote()):
        with pytest.raises(afield.TaskError, match=kind.__name__) as caught:
            afield.get(ref, timeout=PATIENCE_S)
        assert not isinstance(caught.value, kind)
    assert afield.get(actor.here.remote(), timeout=PATIENCE_S)


def test_a_chain_of_causes_is_in_the_remote_traceback(shared_runtime: None) -> None:
    @afield.remote
    def fail() -> None:
        try:
            raise OSError("the first")
        except OSError as error:
            raise ValueError("the second") from error

    with pytest.raises(ValueError, match="the second") as caught:
        afield.get(fail.remote())
    text = caught.value.remote_traceback  # type: ignore[attr-defined]
    assert "the first" in text and "direct cause" in text


def test_an_error_goes_on_to_those_who_take_the_result(shared_runtime: None) -> None:
    @afield.remote
    def fail() -> int:
        raise ValueError("at the source")

    @afield.remote
    def add(x: int, y: int) -> int:
        return x + y

    class Local:
        def __init__(self, x: int = 0) -> None:
            pass

        def add(self, x: int) -> int:
            return x

    bad = fail.remote()
    actor = afield.remote(Local)
    for ref in (add.remote(bad, 1), add.remote(add.remote(1, bad), 1), actor.remote().add.remote(bad)):
        with pytest.raises(ValueError, match="at the source") as caught:
            afield.get(ref, timeout=PATIENCE_S)
        assert "fail" in caught.value.function_name  # type: ignore[attr-defined]
    with pytest.raises((ValueError, afield.ActorDiedError), match="at the source"):
        afield.get(actor.remote(bad).add.remote(1), timeout=PATIENCE_S)


def test_an_error_inside_a_nested_get(shared_runtime: None) -> None:
    @afield.remote
    def inner() -> None:
        raise ValueError("deep")

    @afield.remote
    def outer() -> None:
        afield.get(inner.remote())

    with pytest.raises(ValueError, match="deep"):
        afield.get(outer.remote(), timeout=PATIENCE_S)


def test_an_error_raises_afresh_each_time(shared_runtime: None) -> None:
    @afield.remote
    def fail() -> None:
        raise ValueError("again")

    ref = fail.remote()
    caught = []
    for _ in range(2):
        with pytest.raises(ValueError, match="again") as info:
            afield.get(ref)
        caught.append(info.value)
    assert caught[0] is not caught[1]


def test_task_errors_can_be_pickled() -> None:
    error = afield.TaskError.from_exception("f", ValueError("x"), "the traceback")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, ValueError) and isinstance(again, afield.TaskError)
    assert str(again) == str(error) == "f() raised ValueError: x" and again.remote_traceback == "the traceback"


# -- actors -------------------------------------------------------------------------------------------------------


def test_wrong_arguments_of_a_constructor_are_told_at_once(shared_runtime: None) -> None:
    class Local:
        def __init__(self, a: int, *, b: int = 0) -> None:
            pass

    for args, named in [((), {}), ((1, 2), {}), ((1,), {"c": 1})]:
        with pytest.raises(TypeError, match=r"Local\.remote\(\)"):
            afield.remote(Local).remote(*args, **named)


def test_wrong_arguments_of_a_method_and_a_function(shared_runtime: None) -> None:
    class Local:
        def work(self, a: int) -> int:
            return a

    with pytest.raises(TypeError, match="argument"):
        afield.get(afield.remote(Local).remote().work.remote(), timeout=PATIENCE_S)
    with pytest.raises(TypeError, match="argument"):
        afield.get(afield.remote(lambda a: a).remote(1, 2), timeout=PATIENCE_S)


def test_a_constructor_that_raises(shared_runtime: None) -> None:
    class Local:
        def __init__(self, start: int) -> None:
            self.value = 1 // start

        def work(self) -> int:
            return self.value

    actor = afield.remote(Local).remote(0)
    for _ in range(2):
        with pytest.raises((afield.ActorDiedError, afield.TaskError), match="ZeroDivisionError") as caught:
            afield.get(actor.work.remote(), timeout=PATIENCE_S)
        assert "Local" in str(caught.value)
