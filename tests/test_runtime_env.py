"""Runtime environments by behaviour: what tasks and actors find in theirs, what is inherited, which workers are shared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import afield
from afield.runtime.face import api
from afield.runtime.process.environment import MAX_ENCODED_BYTES, Environment
from tests.helpers import poll

PATIENCE_S = 30.0


def get(ref: Any) -> Any:
    return afield.get(ref, timeout=PATIENCE_S)


def make_look() -> Any:
    """Return a task that says where it runs; made in each test, so that it travels by value and ends with its session."""

    @afield.remote
    def look(*names: str) -> tuple[int, str, list[str | None]]:
        return os.getpid(), os.getcwd(), [os.environ.get(name) for name in names]

    return look


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package and a single module, in folders that are not on anybody's path."""
    folder = tmp_path / "parts" / "far_package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("WHERE = 'package'\n")
    (tmp_path / "single").mkdir()
    (tmp_path / "single" / "far_module.py").write_text("WHERE = 'module'\n")
    return folder


# -- what is found ------------------------------------------------------------------------------------------------


def test_variables_are_set_for_those_who_ask(shared_runtime: None) -> None:
    look = make_look()
    with_variables = look.options(runtime_env={"env_vars": {"FAR": "1", "AWAY": "x=y"}})
    assert get(with_variables.remote("FAR", "AWAY"))[2] == ["1", "x=y"]
    assert get(look.remote("FAR", "AWAY"))[2] == [None, None]
    assert "FAR" not in os.environ


def test_a_variable_may_refer_to_what_is_there(shared_runtime: None) -> None:
    look = make_look()
    env = {"env_vars": {"FAR_PATH": "/far:${PATH}:${THERE_IS_NO_SUCH_VARIABLE}"}}
    assert get(look.options(runtime_env=env).remote("FAR_PATH"))[2] == [f"/far:{os.environ['PATH']}:"]


def test_the_working_directory(shared_runtime: None, tmp_path: Path) -> None:
    look = make_look()
    (tmp_path / "beside.txt").write_text("found")
    (tmp_path / "module_beside.py").write_text("VALUE = 7\n")

    @afield.remote(runtime_env={"working_dir": tmp_path})
    def read() -> tuple[str, str, int]:
        import module_beside

        return os.getcwd(), Path("beside.txt").read_text(), module_beside.VALUE

    assert get(read.remote()) == (str(tmp_path), "found", 7)
    assert get(look.remote())[1] == os.getcwd() != str(tmp_path)


def test_a_relative_path_is_that_of_the_one_who_wrote_it(
    shared_runtime: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = make_look()
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path)
    inner = look.options(runtime_env={"working_dir": "inner"})
    monkeypatch.chdir("/")
    assert get(inner.remote())[1] == str(tmp_path / "inner")


def test_modules_by_path_and_as_they_are(
    shared_runtime: None, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def where() -> tuple[str, str]:
        import far_module
        import far_package

        return far_package.WHERE, far_module.WHERE

    module = tmp_path / "single" / "far_module.py"
    by_path = afield.remote(runtime_env={"py_modules": [package, str(module)]})(where)
    assert get(by_path.remote()) == ("package", "module")
    with pytest.raises(ModuleNotFoundError):
        get(afield.remote(where).remote())

    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.syspath_prepend(str(module.parent))
    import far_module
    import far_package

    as_they_are = afield.remote(runtime_env={"py_modules": [far_package, far_module]})(where)
    assert get(as_they_are.remote()) == ("package", "module")
    for name in ("far_module", "far_package"):
        del sys.modules[name]


def test_an_actor_has_its_own_also_after_a_restart(shared_runtime: None, tmp_path: Path) -> None:
    @afield.remote(max_restarts=1, max_task_retries=1)
    class Actor:
        def __init__(self) -> None:
            self.born_in = os.getcwd()

        def look(self) -> tuple[int, str, str | None]:
            return os.getpid(), self.born_in, os.environ.get("FAR")

    env = {"env_vars": {"FAR": "actor"}, "working_dir": str(tmp_path)}
    actor = Actor.options(runtime_env=env).remote()
    pid, *found = get(actor.look.remote())
    assert found == [str(tmp_path), "actor"]
    afield.kill(actor, no_restart=False)
    assert poll(lambda: get(actor.look.remote())[0] != pid)
    assert get(actor.look.remote())[1:] == (str(tmp_path), "actor")


def test_with_a_device(shared_runtime: None) -> None:
    look = make_look()
    on_device = look.options(num_gpus=1, runtime_env={"env_vars": {"FAR": "gpu"}})
    _, _, (far, devices) = get(on_device.remote("FAR", "AFIELD_VISIBLE_DEVICES"))
    assert far == "gpu" and devices


# -- what is inherited --------------------------------------------------------------------------------------------


def test_the_job_s_is_everybody_s_default(no_runtime: None, tmp_path: Path) -> None:
    look = make_look()
    afield.init(num_cpus=2, runtime_env={"env_vars": {"FAR": "job", "AWAY": "job"}, "working_dir": str(tmp_path)})
    assert get(look.remote("FAR"))[1:] == (str(tmp_path), ["job"])
    own = look.options(runtime_env={"env_vars": {"FAR": "own"}})
    assert get(own.remote("FAR", "AWAY"))[1:] == (str(tmp_path), ["own", "job"])
    assert "FAR" not in os.environ


def test_children_inherit_that_of_their_parent(shared_runtime: None, tmp_path: Path) -> None:
    look = make_look()
    child = look

    @afield.remote(runtime_env={"env_vars": {"FAR": "parent", "AWAY": "parent"}, "working_dir": str(tmp_path)})
    def parent() -> list[Any]:
        changed = child.options(runtime_env={"env_vars": {"FAR": "child"}})
        return afield.get([child.remote("FAR", "AWAY"), changed.remote("FAR", "AWAY")])

    plain, changed = get(parent.remote())
    assert plain[1:] == (str(tmp_path), ["parent", "parent"])
    assert changed[1:] == (str(tmp_path), ["child", "parent"])


# -- which workers are shared -------------------------------------------------------------------------------------


def workers() -> int:
    return len(api.query("workers"))


def test_a_worker_serves_one_environment_only(runtime: None) -> None:
    look = make_look()

    def pids(**variables: str) -> set[int]:
        env = {"env_vars": variables}
        return {pid for pid, _, _ in get([look.options(runtime_env=env).remote() for _ in range(8)])}

    plain, one, two = pids(), pids(A="1", B="2"), pids(B="2")
    assert not plain & one and not plain & two and not one & two
    # Equal environments are the same one, however they are written.
    again = [look.options(runtime_env={"env_vars": env}).remote() for env in ({"A": "1", "C": ""}, {"C": "", "A": "1"})]
    assert len({pid for pid, _, _ in get(again[:1]) + get(again[1:])}) == 1
    assert poll(lambda: workers() <= 4)


@pytest.mark.slow
def test_idle_workers_with_environments_of_their_own_are_bounded(runtime: None) -> None:
    look = make_look()
    for number in range(12):
        assert get(look.options(runtime_env={"env_vars": {"N": str(number)}}).remote("N"))[2] == [str(number)]
    # Two of the job's environment, and as many others.
    assert poll(lambda: workers() <= 4)


def test_a_worker_that_owns_what_others_hold_stays(runtime: None) -> None:
    look = make_look()

    @afield.remote(runtime_env={"env_vars": {"FAR": "owner"}})
    def make() -> list[Any]:
        return [afield.put("kept")]

    (kept,) = get(make.remote())
    for number in range(6):
        get(look.options(runtime_env={"env_vars": {"N": str(number)}}).remote())
    assert get(kept) == "kept"


# -- wrong uses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("env", "expected a dict with 'env_vars', 'working_dir', 'py_modules'"),
        ({"env_var": {}}, "no key 'env_var'; did you mean 'env_vars'"),
        ({"pip": ["x"]}, "no key 'pip'; it takes"),
        ({"env_vars": ["A=1"]}, "expected a dict of names and texts"),
        ({"env_vars": {"A": 1}}, r"env_vars\['A'\]=1: expected a text; write '1'"),
        ({"env_vars": {"": "x"}}, "cannot be a variable's name"),
        ({"env_vars": {"A=B": "x"}}, "cannot be a variable's name"),
        ({"env_vars": {"A": "\ud800"}}, "cannot be written as UTF-8"),
        ({"env_vars": {"CUDA_VISIBLE_DEVICES": "0"}}, "ask for devices with num_gpus="),
        ({"working_dir": 7}, "working_dir: expected a path, not 7"),
        ({"working_dir": ""}, "working_dir: expected a path"),
        ({"working_dir": os.fsdecode(b"/\xff")}, "cannot be written as UTF-8"),
        ({"working_dir": "/there/is/none"}, "give an existing directory of this machine"),
        ({"py_modules": "/tmp"}, "expected a list of paths or imported modules"),
        ({"py_modules": ["/there/is/none"]}, "neither a package's folder nor a .py file"),
        ({"py_modules": [sys]}, "the module sys has no file; leave it out"),
        ({"env_vars": {"A": "x" * (MAX_ENCODED_BYTES + 1)}}, "pass data as arguments or with put"),
    ],
)
def test_wrong_environments(env: Any, message: str, no_runtime: None) -> None:
    def plain() -> None:
        """A task."""

    class Plain:
        """An actor."""

    for wrong in (
        lambda: afield.remote(runtime_env=env)(plain),
        lambda: afield.remote(plain).options(runtime_env=env),
        lambda: afield.remote(runtime_env=env)(Plain),
        lambda: afield.init(runtime_env=env),
    ):
        with pytest.raises(afield.InvalidOptionError, match=message):
            wrong()
    assert not afield.is_initialized()


def test_a_method_call_has_no_environment_of_its_own(shared_runtime: None) -> None:
    @afield.remote
    class Actor:
        def work(self) -> None:
            """Do nothing."""

    with pytest.raises(afield.InvalidOptionError, match="no option 'runtime_env'"):
        Actor.remote().work.options(runtime_env={})


def test_a_directory_that_is_gone_fails_the_task_and_the_actor(shared_runtime: None, tmp_path: Path) -> None:
    look = make_look()
    folder = tmp_path / "gone"
    folder.mkdir()
    env = {"working_dir": folder}
    task = look.options(runtime_env=env)

    @afield.remote(runtime_env=env)
    class Actor:
        def work(self) -> None:
            """Do nothing."""

    folder.rmdir()
    with pytest.raises(
        afield.TaskUnschedulableError, match="gone' is gone; keep it as long as tasks and actors use it"
    ):
        get(task.remote())
    with pytest.raises(afield.ActorUnschedulableError, match=r"Actor: runtime_env: .*gone' is gone"):
        get(Actor.remote().work.remote())


def test_workers_that_cannot_start_are_given_up(shared_runtime: None, tmp_path: Path) -> None:
    look = make_look()
    folder = tmp_path / "changed"
    folder.mkdir()
    env = {"working_dir": folder}
    task = look.options(runtime_env=env)

    @afield.remote(runtime_env=env)
    class Actor:
        def work(self) -> None:
            """Do nothing."""

    folder.rmdir()
    folder.touch()
    for ref in [task.remote() for _ in range(5)]:
        with pytest.raises(
            afield.TaskUnschedulableError, match="no worker for it could start in 3 attempts; the last: pid"
        ):
            get(ref)
    with pytest.raises(afield.ActorDiedError, match="its process died"):
        get(Actor.remote().work.remote())
    folder.unlink()
    folder.mkdir()
    assert get(task.remote())[1] == str(folder)


def test_none_and_empty_change_nothing(shared_runtime: None) -> None:
    look = make_look()
    assert get(look.options(runtime_env=None).remote("FAR"))[2] == [None]
    assert get(look.options(runtime_env={}).remote("FAR"))[2] == [None]
    set_and_unset = look.options(runtime_env={"env_vars": {"FAR": "1"}}).options(runtime_env=None)
    assert get(set_and_unset.remote("FAR"))[2] == [None]


# -- the canonical form -------------------------------------------------------------------------------------------


def test_the_canonical_form_and_laying_one_over_another(tmp_path: Path) -> None:
    one = Environment.of({"env_vars": {"B": "2", "A": "1"}, "working_dir": tmp_path})
    assert one.encode() == Environment.of({"working_dir": f"{tmp_path}/.", "env_vars": {"A": "1", "B": "2"}}).encode()
    assert Environment.decode(one.encode()) == one
    assert Environment.of({}).encode() == b"" and Environment.decode(b"") == Environment()
    over = Environment.of({"env_vars": {"B": "3"}}).over(one)
    assert dict(over.variables) == {"A": "1", "B": "3"} and over.working_dir == str(tmp_path)
    assert Environment().over(one) == one == one.over(Environment())


def test_python_path_is_read_as_a_new_interpreter_would() -> None:
    program = (
        "import json, sys; from afield.runtime.process.environment import Environment; before = list(sys.path);"
        "Environment.of({'env_vars': {'PYTHONPATH': '/far:/away', 'TZ': 'UTC'}, 'working_dir': '/'}).apply();"
        "print(json.dumps([before, sys.path]))"
    )
    root = Path(__file__).resolve().parent.parent
    out = subprocess.run([sys.executable, "-c", program], cwd=root, check=True, capture_output=True, text=True).stdout
    before, after = json.loads(out)
    assert after == ["/", "/far", "/away", *before]
