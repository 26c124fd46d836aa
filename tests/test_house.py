"""The repository checks itself: what the house allows, what a file may hold, what the archives carry.

Each rule is a function from source files (or from an archive's names) to a list of complaints, so that it can be seen
to fail on a small bad input as well as to pass on the repository. A complaint reads `path:line: what is wrong`.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from configparser import ConfigParser
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent

PARTS = ("scheduler", "gpu_store", "transport", "runtime", "libraries")
LEAVES = (
    "causes",
    "errors",
    "ids",
    "units",
    "text",
    "clock",
    "machines",
    "mixing",
    "version",
    "code_names",
    "source_lines",
    "tracebacks",
)
SHIPPED = ("afield", *PARTS)

#: Layer -> the layers it may import. Tests and benchmarks may import anything; nothing imports them.
MAY_IMPORT = {
    "leaf": {"leaf"},
    "scheduler": {"leaf", "scheduler"},
    "gpu_store": {"leaf", "gpu_store"},
    "transport": {"leaf", "transport"},
    "runtime": {"leaf", "scheduler", "gpu_store", "transport", "runtime"},
    "face": {"leaf", "scheduler", "gpu_store", "transport", "runtime", "face"},
    "libraries": {"leaf", "face", "libraries"},
    "examples": {"leaf", "face", "libraries", "examples"},
}

#: The rooms of runtime/, bottom up: each imports only from itself and from those before it. `main` puts them together.
ROOMS = ("wire", "cores", "process", "values", "calls", "session", "tools", "face", "worker", "node", "main")
#: Files of these rooms may know each other in a circle: the parts of a node are told which node they are of, the methods of an
#: emulated array are its module's functions.
CIRCLES = ("runtime/node/", "gpu_store/emulated_arrays/")

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 500
MAX_TEST_FILE_LINES = 600

#: What a core may not import: whatever has a clock, threads, I/O, an environment or randomness of its own.
IMPURE = (
    "asyncio",
    "multiprocessing",
    "numpy.random",
    "os",
    "random",
    "secrets",
    "select",
    "selectors",
    "signal",
    "socket",
    "subprocess",
    "threading",
    "time",
    "afield.clock.monotonic",
)


@dataclass(frozen=True)
class Source:
    """One Python file: its path relative to the repository's root, and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def folder(self) -> str:
        return PurePosixPath(self.path).parts[0]


# ---- reading sources ------------------------------------------------------------------------------------------------


@cache
def repository() -> tuple[Source, ...]:
    """Every Python file of the working tree, once: links are not followed, hidden and built folders are left out."""
    sources = []
    for folder, names, files in os.walk(ROOT):
        names[:] = sorted(n for n in names if not n.startswith(".") and n not in {"__pycache__", "build", "dist"})
        for file in sorted(f for f in files if f.endswith(".py")):
            path = Path(folder, file)
            sources.append(Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")))
    return tuple(sources)


def module_name(path: str) -> str:
    """The name a file is imported by: `runtime/worker/worker.py` -> `afield.runtime.worker.worker`."""
    parts = list(PurePosixPath(path).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    if parts and parts[0] in PARTS:
        parts.insert(0, "afield")
    return ".".join(parts)


def imports_of(source: Source) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of every import, wherever it stands; `from a import b` gives `a.b`."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module_name(source.path).split(".")
                drop = node.level - source.path.endswith("__init__.py")
                base = ".".join([*package[: len(package) - drop], *filter(None, [base])])
            for alias in node.names:
                yield node.lineno, base if alias.name == "*" else f"{base}.{alias.name}"
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = node.args[0] if node.args else None
            if called in {"import_module", "__import__"} and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value)


def layer_of_file(source: Source) -> str | None:
    """The layer a file belongs to, None where imports are free. afield/util/ re-exports libraries."""
    if source.path.startswith("afield/util/"):
        return "libraries"
    if source.folder == "afield":
        return "leaf" if PurePosixPath(source.path).stem in LEAVES else "face"
    return source.folder if source.folder in MAY_IMPORT else None


def layer_of_import(name: str) -> str | None:
    """The layer an imported name belongs to, None for what is not ours."""
    first, _, rest = name.partition(".")
    if first in {"examples", "tests", "benchmarks"}:
        return first
    if first != "afield":
        return None
    second = rest.partition(".")[0]
    if second in PARTS:
        return second
    if second == "util":
        return "libraries"
    return "leaf" if second in LEAVES else "face"


def is_core(source: Source) -> bool:
    """True for all of scheduler/, and for a shipped module whose docstring opens with a line that says "core"; one that
    also says "shell" is about the core's shell.
    """
    if source.folder not in SHIPPED:
        return False
    first_line = (ast.get_docstring(source.tree) or "").partition("\n")[0].lower()
    says_core = bool(re.search(r"\bcore\b", first_line)) and not re.search(r"\bshells?\b", first_line)
    return source.folder == "scheduler" or says_core


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


# ---- rules about sources --------------------------------------------------------------------------------------------


def import_direction(sources: Iterable[Source]) -> list[str]:
    """Imports run downward only, also inside functions and under TYPE_CHECKING."""
    complaints = []
    for source in sources:
        layer = layer_of_file(source)
        if layer is None:
            continue
        for line, name in imports_of(source):
            target = layer_of_import(name)
            if target is not None and target not in MAY_IMPORT[layer]:
                complaints.append(f"{source.path}:{line}: {layer} may not import {name} ({target})")
    return complaints


def room_of(name: str) -> str | None:
    """The room of runtime/ that a dotted name is in, None for what is outside."""
    parts = name.split(".")
    return parts[2] if parts[:2] == ["afield", "runtime"] and len(parts) > 2 and parts[2] in ROOMS else None


def rooms(sources: Iterable[Source]) -> list[str]:
    """A room of runtime/ imports only from the rooms below it, also inside functions and under TYPE_CHECKING."""
    complaints = []
    for source in sources:
        name = module_name(source.path)
        room = room_of(name)
        if source.folder == "runtime" and name != "afield.runtime" and room is None:
            complaints.append(f"{source.path}:1: stands in no room of {', '.join(ROOMS)}")
        for line, imported in imports_of(source) if room is not None else ():
            target = room_of(imported)
            if target is not None and ROOMS.index(target) > ROOMS.index(room or ""):
                complaints.append(f"{source.path}:{line}: {room} may not import {imported} ({target} is above it)")
    return complaints


def circles(sources: Iterable[Source]) -> list[str]:
    """No file imports itself by way of others, not even for types."""
    named = {module_name(source.path): source for source in sources if source.folder in SHIPPED}
    graph = {
        name: {each for _, full in imports_of(source) for each in (full, full.rpartition(".")[0]) if each in named}
        for name, source in named.items()
    }
    complaints = []
    for name, source in named.items():
        seen: set[str] = set()
        waiting = [name]
        while waiting:
            fresh = graph[waiting.pop()] - seen
            seen |= fresh
            waiting += fresh
        if name in seen and not source.path.startswith(CIRCLES) and not source.path.endswith("__init__.py"):
            complaints.append(f"{source.path}:1: imports itself by way of others")
    return complaints


def bare_names(sources: Iterable[Source]) -> list[str]:
    """The folders are imported as afield.x, never as x."""
    return [
        f"{source.path}:{line}: import afield.{name}, not {name}"
        for source in sources
        for line, name in imports_of(source)
        if name.partition(".")[0] in PARTS
    ]


def foreign_imports(sources: Iterable[Source]) -> list[str]:
    """grpc, ucxx, CUDA and ray are imported only where the house has a place for them."""
    complaints = []
    ucxx_files = set()
    for source in sources:
        path, shipped = source.path, source.folder in SHIPPED
        is_cuda_place = path == "gpu_store/backends/cuda.py" or PurePosixPath(path).name.startswith("interop")
        for line, name in imports_of(source):
            where = f"{path}:{line}: {name}"
            if within(name, "ray") and source.folder != "benchmarks":
                complaints.append(f"{where}: nothing here imports ray")
            if not shipped:
                continue
            if within(name, "grpc") and not path.startswith("runtime/control/"):
                complaints.append(f"{where}: grpc belongs under runtime/control/")
            if any(within(name, cuda) for cuda in ("cupy", "cupyx", "cuda", "numba.cuda")) and not is_cuda_place:
                complaints.append(f"{where}: CUDA belongs in gpu_store/backends/cuda.py and files named interop*")
            if within(name, "ucxx"):
                ucxx_files.add(path)
                if source.folder != "transport":
                    complaints.append(f"{where}: ucxx belongs in transport/")
    if len(ucxx_files) > 1:
        complaints.append(f"ucxx belongs in one file, not in {', '.join(sorted(ucxx_files))}")
    return complaints


def pure_cores(sources: Iterable[Source]) -> list[str]:
    """Cores have no clock, threads, I/O, environment or randomness of their own."""
    return [
        f"{source.path}:{line}: a core may not import {name}: have it handed in"
        for source in sources
        if is_core(source)
        for line, name in imports_of(source)
        if any(within(name, impure) for impure in IMPURE)
    ]


def lengths(sources: Iterable[Source]) -> list[str]:
    """Functions fit on a screen, files in one sitting."""
    complaints = []
    for source in sources:
        limit = MAX_TEST_FILE_LINES if source.folder in {"tests", "benchmarks"} else MAX_FILE_LINES
        lines = len(source.text.splitlines())
        if lines > limit:
            complaints.append(f"{source.path}: {lines} lines, the limit is {limit}")
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    complaints.append(
                        f"{source.path}:{node.lineno}: {node.name}: {length} lines, the limit is {MAX_FUNCTION_LINES}"
                    )
    return complaints


def theory_of_operation(sources: Iterable[Source]) -> list[str]:
    """Every module that ships says how it works."""
    return [
        f"{source.path}:1: no module docstring"
        for source in sources
        if source.folder in SHIPPED and not ast.get_docstring(source.tree)
    ]


RULES: tuple[Callable[[Iterable[Source]], list[str]], ...] = (
    import_direction,
    rooms,
    circles,
    bare_names,
    foreign_imports,
    pure_cores,
    lengths,
    theory_of_operation,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_repository_keeps(rule: Callable[[Iterable[Source]], list[str]]) -> None:
    complaints = rule(repository())
    assert not complaints, "\n" + "\n".join(complaints)


def test_repository_is_read_whole() -> None:
    """Rules that saw no files would pass."""
    paths = {source.path for source in repository()}
    assert {f"{part}/__init__.py" for part in PARTS} <= paths
    assert "tests/test_house.py" in paths
    assert not [path for path in paths if path.startswith(tuple(f"afield/{part}/" for part in PARTS))]


# ---- the rules can fail ---------------------------------------------------------------------------------------------

LONG_FUNCTION = "def f():\n" + "    pass\n" * MAX_FUNCTION_LINES

BAD = [
    (import_direction, "scheduler/a.py", "import afield.transport.loop"),
    (import_direction, "transport/a.py", "from afield.gpu_store import slab"),
    (import_direction, "gpu_store/a.py", "from afield import runtime"),
    (import_direction, "transport/a.py", "def f():\n    from afield.runtime.face.api import get"),
    (import_direction, "transport/a.py", "if TYPE_CHECKING:\n    from ..runtime import api"),
    (import_direction, "transport/__init__.py", "from .. import scheduler"),
    (import_direction, "gpu_store/a.py", "importlib.import_module('afield.scheduler')"),
    (import_direction, "runtime/a.py", "import afield"),
    (import_direction, "runtime/a.py", "from afield import *"),
    (import_direction, "runtime/a.py", "from afield import remote"),
    (import_direction, "runtime/a.py", "from tests import helpers"),
    (rooms, "runtime/wire/a.py", "from afield.runtime.cores import ownership"),
    (rooms, "runtime/cores/a.py", "if TYPE_CHECKING:\n    from afield.runtime.process.process import Process"),
    (rooms, "runtime/face/a.py", "def f():\n    from afield.runtime.worker.executor import Executor"),
    (rooms, "runtime/values/a.py", "from ..calls import participation"),
    (rooms, "runtime/a.py", ""),
    (circles, "runtime/cores/a.py", "from afield.runtime.cores import a"),
    (import_direction, "afield/ids.py", "from afield.scheduler import leases"),
    (import_direction, "afield/__init__.py", "import afield.libraries.shuffle"),
    (import_direction, "afield/__init__.py", "from afield import util"),
    (import_direction, "afield/util/queue.py", "from afield.runtime.process.refs import ObjectRef"),
    (import_direction, "libraries/a.py", "from afield.runtime.face.api import get"),
    (import_direction, "examples/a.py", "import afield.gpu_store"),
    (bare_names, "tests/a.py", "import runtime"),
    (bare_names, "examples/a.py", "from scheduler.leases import Lease"),
    (bare_names, "runtime/a.py", "def f():\n    __import__('transport')"),
    (foreign_imports, "tests/a.py", "import ray"),
    (foreign_imports, "runtime/a.py", "import grpc"),
    (foreign_imports, "transport/a.py", "from grpc import aio"),
    (foreign_imports, "runtime/a.py", "import ucxx"),
    (foreign_imports, "gpu_store/arena.py", "import cupy as cp"),
    (foreign_imports, "runtime/a.py", "from numba import cuda"),
    (pure_cores, "scheduler/a.py", "import time"),
    (pure_cores, "scheduler/deep/a.py", "def f():\n    from os import environ"),
    (pure_cores, "scheduler/a.py", "import numpy.random"),
    (pure_cores, "runtime/a.py", '"""The ownership table: a core.\n\nMore."""\nimport threading'),
    (pure_cores, "gpu_store/a.py", '"""Core of residency."""\nfrom afield.clock import monotonic'),
    (lengths, "runtime/a.py", LONG_FUNCTION),
    (lengths, "tests/a.py", "class C:\n    async " + LONG_FUNCTION.replace("\n", "\n    ")),
    (lengths, "runtime/a.py", "\n" * (MAX_FILE_LINES + 1)),
    (lengths, "tests/a.py", "\n" * (MAX_TEST_FILE_LINES + 1)),
    (theory_of_operation, "runtime/a.py", "x = 1"),
]

GOOD = [
    (import_direction, "scheduler/a.py", "from afield import errors, units\nfrom afield.scheduler import leases"),
    (import_direction, "runtime/a.py", "import afield.transport.loop\nfrom afield.ids import new_id\nimport numpy"),
    (
        import_direction,
        "afield/__init__.py",
        "from afield.runtime.face.api import get\nfrom afield.errors import TaskError",
    ),
    (
        import_direction,
        "libraries/a.py",
        "import afield\nfrom afield import remote\nfrom afield.errors import TaskError",
    ),
    (import_direction, "examples/a.py", "import afield as ray\nfrom afield.libraries import shuffle"),
    (import_direction, "afield/util/queue.py", "import queue\nfrom afield.libraries.queue import Queue"),
    (import_direction, "examples/a.py", "from afield.util import ActorPool"),
    (import_direction, "tests/a.py", "from afield.runtime import api\nfrom benchmarks import micro"),
    (rooms, "runtime/worker/a.py", "from afield.runtime.wire import messages\nimport afield.runtime.worker.b"),
    (rooms, "runtime/main.py", "from afield.runtime.node.daemon import NodeDaemon"),
    (rooms, "tests/a.py", "from afield.runtime.node.daemon import NodeDaemon"),
    (bare_names, "tests/a.py", "import afield.runtime\nfrom afield import scheduler\nimport runtimes"),
    (foreign_imports, "benchmarks/peers.py", "import ray"),
    (foreign_imports, "runtime/control/server.py", "import grpc"),
    (foreign_imports, "gpu_store/backends/cuda.py", "import cupy"),
    (foreign_imports, "runtime/interop_numba.py", "from numba import cuda"),
    (foreign_imports, "tests/test_gpu.py", "import cupy"),
    (pure_cores, "scheduler/a.py", "import dataclasses\nimport timeit_like\nfrom afield.clock import Clock"),
    (pure_cores, "runtime/a.py", '"""The shell around the lease core."""\nimport threading'),
    (pure_cores, "runtime/a.py", '"""Scores and hardcore things."""\nimport threading'),
    (lengths, "tests/a.py", LONG_FUNCTION.removesuffix("    pass\n") + "\n" * (MAX_FILE_LINES - 50)),
    (theory_of_operation, "tests/a.py", "x = 1"),
]


@pytest.mark.parametrize(("rule", "path", "text"), BAD)
def test_rule_fails(rule: Callable[[Iterable[Source]], list[str]], path: str, text: str) -> None:
    assert rule([Source(path, text)])


@pytest.mark.parametrize(("rule", "path", "text"), GOOD)
def test_rule_passes(rule: Callable[[Iterable[Source]], list[str]], path: str, text: str) -> None:
    assert rule([Source(path, text)]) == []


def test_ucxx_has_one_home() -> None:
    first, second = (Source(f"transport/{name}.py", "import ucxx") for name in ("ucx", "other"))
    assert foreign_imports([first]) == []
    assert len(foreign_imports([first, second])) == 1


# ---- bare names, really ---------------------------------------------------------------------------------------------

IMPORT_BARE = """
import importlib
for name in {parts!r}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        assert "afield." + name in str(error), error
    else:
        raise SystemExit(name + " was imported by its bare name")
"""


def test_bare_import_from_the_root_is_an_error() -> None:
    script = IMPORT_BARE.format(parts=PARTS)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_links_are_relative() -> None:
    """A checkout can be moved."""
    assert {part: os.readlink(ROOT / "afield" / part) for part in PARTS} == {part: f"../{part}" for part in PARTS}


# ---- what the archives hold -----------------------------------------------------------------------------------------


def shipped_names(sources: Iterable[Source]) -> set[str]:
    """The names that the shipped sources have inside an archive: `runtime/a.py` -> `afield/runtime/a.py`."""
    return {
        source.path if source.folder == "afield" else f"afield/{source.path}"
        for source in sources
        if source.folder in SHIPPED
    }


def wheel_contents(names: Iterable[str], expected: set[str]) -> list[str]:
    """One import package with every module of the house in it, and nothing else."""
    held = set(names)
    complaints = [f"missing: {name}" for name in sorted((expected | {"afield/py.typed"}) - held)]
    for name in sorted(held):
        parts = PurePosixPath(name).parts
        if parts[0] != "afield" and not re.fullmatch(r"afield-[^-]+\.dist-info", parts[0]):
            complaints.append(f"outside the package: {name}")
        elif {"tests", "benchmarks", "examples", "__pycache__"} & set(parts):
            complaints.append(f"not for users: {name}")
        elif parts[0] == "afield" and name.endswith(".py") and name not in expected:
            complaints.append(f"not in the working tree: {name}")
    if not any(re.fullmatch(r"afield-[^-]+\.dist-info/licenses/LICENSE", name) for name in held):
        complaints.append("missing: the licence")
    return complaints


DIST_INFO = "afield-0.1.0.dist-info/licenses/LICENSE"
GOOD_WHEEL = ["afield/__init__.py", "afield/py.typed", "afield/runtime/a.py", DIST_INFO]


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (GOOD_WHEEL, None),
        ([name for name in GOOD_WHEEL if "runtime" not in name], "missing: afield/runtime/a.py"),
        ([name for name in GOOD_WHEEL if "typed" not in name], "missing: afield/py.typed"),
        ([name for name in GOOD_WHEEL if "LICENSE" not in name], "missing: the licence"),
        ([*GOOD_WHEEL, "runtime/a.py"], "outside the package: runtime/a.py"),
        ([*GOOD_WHEEL, "tests/__init__.py"], "outside the package: tests/__init__.py"),
        ([*GOOD_WHEEL, "afield/runtime/tests/a.py"], "not for users: afield/runtime/tests/a.py"),
        ([*GOOD_WHEEL, "afield/stray.py"], "not in the working tree: afield/stray.py"),
    ],
)
def test_wheel_rule(names: list[str], complaint: str | None) -> None:
    expected = {"afield/__init__.py", "afield/runtime/a.py"}
    assert wheel_contents(names, expected) == ([] if complaint is None else [complaint])


def build(kind: str, source: Path, target: Path) -> Path:
    """Build a "wheel" or "sdist" from a tree through the build backend's own entry point, in a process of its own."""
    script = f"import sys; from hatchling.build import build_{kind} as b; print(b(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", script, str(target)], cwd=source, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_the_house(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert wheel_contents(archive.namelist(), shipped_names(repository())) == []
        links = [info.filename for info in archive.infolist() if (info.external_attr >> 28) == 0o12]
        assert links == []
        for source in repository():
            if source.folder in PARTS:
                assert archive.read(f"afield/{source.path}").decode() == source.text
        scripts = ConfigParser()
        scripts.read_string(archive.read(f"{wheel.stem[:12]}.dist-info/entry_points.txt").decode())
    assert dict(scripts["console_scripts"]) == {"afield": "afield.runtime.tools.cli:main"}


def test_wheel_imports_on_its_own(wheel: Path, tmp_path: Path) -> None:
    """What was installed is what is imported, although an editable install may stand beside it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    script = (
        f"import afield.scheduler as s, afield.transport; assert s.__file__.startswith({str(tmp_path)!r}), s.__file__"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_source_archive_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    sdist = build("sdist", ROOT, tmp_path)
    with tarfile.open(sdist) as archive:
        assert [member.name for member in archive.getmembers() if member.issym() or member.islnk()] == []
        archive.extractall(tmp_path, filter="data")
    again = build("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path)
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())
