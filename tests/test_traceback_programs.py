"""What a program prints when a task's error is not caught: a script, the REPL, pytest and IPython."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import HANG_S, ROOT

pytestmark = pytest.mark.slow

SCRIPT = """
import os, sys, traceback
import afield

def helper(x):
    return 1 / x

@afield.remote
def task(x):
    y = x - 1
    return helper(y)

@afield.remote
class Actor:
    def method(self):
        return afield.get(task.remote(1))

afield.init(num_cpus=2)
"""
CAUSE = "The above exception was the direct cause of the following exception:"


def run(*command: str, stdin: str = "", **environment: str) -> str:
    """Run a program of this interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1", "PYTHON_COLORS": "0"} | environment,
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=HANG_S,
    )
    return done.stdout


def lines(output: str) -> list[str]:
    """Return what was printed without empty lines, and without the marks below source lines: each version has its own."""
    return [line for line in output.splitlines() if line.strip(" ^~")]


def where(line: int, name: str, text: str, file: str | Path) -> list[str]:
    """Return what Python prints of a frame."""
    return [f'  File "{file}", line {line}, in {name}', f"    {text}"]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "script.py"


def test_a_script(script: Path) -> None:
    """What the task prints itself shows the user's lines, and so does the error that ends the script."""
    script.write_text(
        SCRIPT + "@afield.remote\n"
        "def prints():\n"
        "    import warnings\n"
        "    warnings.warn('careful')\n"
        "    try:\n"
        "        helper(0)\n"
        "    except ZeroDivisionError:\n"
        "        traceback.print_exc()\n"
        "afield.get(prints.remote())\n"
        "afield.get(task.remote(1))\n"
    )
    output = lines(run(str(script)))
    printed = [line.partition(") ")[2] for line in output if line.startswith("(prints pid=")]
    assert [line for line in printed if line.strip(" ^~")] == [
        f"{script}:22: UserWarning: careful",
        "  warnings.warn('careful')",
        "Traceback (most recent call last):",
        *where(24, "prints", "helper(0)", script),
        *where(6, "helper", "return 1 / x", script),
        "ZeroDivisionError: division by zero",
    ]
    assert [line for line in output if not line.startswith("(prints pid=")] == [
        "Traceback (most recent call last):",
        *where(11, "task", "return helper(y)", script),
        *where(6, "helper", "return 1 / x", script),
        "ZeroDivisionError: division by zero",
        CAUSE,
        "Traceback (most recent call last):",
        *where(28, "<module>", "afield.get(task.remote(1))", script),
        "afield.errors.TaskError(ZeroDivisionError): task() raised ZeroDivisionError: division by zero",
    ]


def test_a_script_with_all_frames(script: Path) -> None:
    script.write_text(SCRIPT + "afield.get(task.remote(1))\n")
    output = run(str(script), AFIELD_FULL_TRACEBACKS="1")
    for file in ("worker/invocation.py", "face/api.py", "values/values.py"):
        assert f'afield/runtime/{file}", line ' in output


def test_a_script_that_is_edited_while_it_runs(script: Path) -> None:
    """Python 3.11 and 3.12 read the file when they print an error that nobody caught; so the lines are told beside it."""
    change = "open(__file__, 'w').write('# another script\\n' * 30)"
    script.write_text(SCRIPT + f"afield.get(task.remote(2))\n{change}\nafield.get(task.remote(1))\n")
    output = lines(run(str(script)))
    told = "Where task() ran, with the lines that it had then:"
    assert (told in output) == (sys.version_info < (3, 13))
    if told in output:
        output = output[output.index(told) :]
    shown = [*where(11, "task", "return helper(y)", script), *where(6, "helper", "return 1 / x", script)]
    assert shown == [line for line in output if line in shown]


def test_the_repl() -> None:
    """It keeps the source of what was typed from Python 3.13 on; before that there are no lines to show."""
    statements = SCRIPT.replace("\n\n", "\n\n\n") + "\nafield.get(task.remote(1))\n"
    output = [line.lstrip(">. ") for line in lines(run("-i", "-q", stdin=statements))]
    known = sys.version_info >= (3, 13)
    shown = ['File "<stdin>", line 4, in task', *["return helper(y)"][:known]]
    shown += ['File "<stdin>", line 2, in helper', *["return 1 / x"][:known], "ZeroDivisionError: division by zero"]
    start = output.index(shown[0])
    assert output[start : start + len(shown)] == shown
    assert not any("afield/runtime" in line for line in output)


def test_a_failing_test(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        SCRIPT.replace("afield.init(num_cpus=2)", "") + "def test_it(afield_session):\n"
        "    assert afield.get(task.remote(1)) == 5\n"
        "def test_through_an_actor(afield_session):\n"
        "    actor = Actor.remote()\n"
        "    assert afield.get(actor.method.remote()) == 5\n"
    )
    output = run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path / "test_it.py")
    )
    marked = [line for line in lines(output) if line[:1] in (">", "E")]
    error = "E       afield.errors.TaskError(ZeroDivisionError): task() raised ZeroDivisionError: division by zero"
    root = [">       return helper(y)", ">       return 1 / x", "E       ZeroDivisionError: division by zero"]
    assert marked == [
        *root,
        ">       assert afield.get(task.remote(1)) == 5",
        error,
        *root,
        ">       assert afield.get(actor.method.remote()) == 5",
        ">       return afield.get(task.remote(1))",
        f"{error} (passed on by method())",
    ]
    assert "afield/runtime" not in output and output.count("direct cause") == 2


IPYTHON = """
from IPython.terminal.interactiveshell import TerminalInteractiveShell
shell = TerminalInteractiveShell.instance(colors="{colors}")
for cell in {cells!r}:
    shell.run_cell(cell, store_history=True)
"""


def test_ipython() -> None:
    ipython = pytest.importorskip("IPython")
    cells = [SCRIPT, "afield.get(task.remote(1))", "afield.get(Actor.remote().method.remote())"]
    colors = "nocolor" if ipython.version_info[0] >= 9 else "NoColor"
    output = run("-c", IPYTHON.format(colors=colors, cells=cells))
    arrows = [
        line.partition("> ")[2].split(maxsplit=1)[1]
        for line in output.splitlines()
        if line.startswith("--") and "> " in line
    ]
    root = ["return helper(y)", "return 1 / x"]
    assert arrows == [
        *root,
        "afield.get(task.remote(1))",
        *root,
        "afield.get(Actor.remote().method.remote())",
        "return afield.get(task.remote(1))",
    ]
    assert "afield/runtime" not in output and output.count("direct cause") == 2
