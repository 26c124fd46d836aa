"""The repository checks itself: nobody but the ownership table writes to entries.

An entry is written to by many rules at once, and whoever else wrote to it would have to know all of them. So the fields of
`Entry`, and the dictionary of entries, are read everywhere and written in two files.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator

import pytest

from afield.runtime.cores.objects import Entry
from tests.test_house import Source, repository

#: The only files of runtime/ that write to entries, and what an entry has.
TABLE_FILES = ("runtime/cores/entries.py", "runtime/cores/ownership.py")
ENTRY_FIELDS = frozenset(Entry.__struct_fields__)
MUTATORS = {"add", "append", "clear", "discard", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update"}


def _writes(function: ast.AST, entries: set[str], tables: set[str]) -> Iterator[tuple[int, str]]:
    """(line, what) of each write to an entry, or into the dictionary of them, under the names that these have here."""

    def is_entry(node: ast.AST) -> bool:
        if isinstance(node, ast.Name):
            return node.id in entries
        if isinstance(node, ast.Subscript):
            return is_table(node.value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            return node.func.attr in {"get", "pop"} and is_table(node.func.value)
        return False

    def is_table(node: ast.AST) -> bool:
        return (isinstance(node, ast.Attribute) and node.attr == "entries") or (
            isinstance(node, ast.Name) and node.id in tables
        )

    def written(node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute):
            return node.attr == "entries" or (node.attr in ENTRY_FIELDS and is_entry(node.value))
        if isinstance(node, ast.Subscript):  # an entry, or something in a field of one
            return is_table(node.value) or written(node.value)
        return False

    for node in ast.walk(function):
        if isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load) and written(node):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call):
            called = node.func
            if (
                isinstance(called, ast.Attribute)
                and called.attr in MUTATORS
                and (is_table(called.value) or (isinstance(called.value, ast.Attribute) and written(called.value)))
            ):
                yield node.lineno, ast.unparse(called)
            elif isinstance(called, ast.Name) and called.id in {"setattr", "delattr"} and is_entry(node.args[0]):
                yield node.lineno, ast.unparse(node)
            elif getattr(called, "id", getattr(called, "attr", "")) == "Entry":
                yield node.lineno, ast.unparse(called)


def _names_of_entries(function: ast.AST) -> tuple[set[str], set[str]]:
    """The local names that are entries (by annotation, or by where they come from), and those that are dictionaries of them."""
    entries, tables = {"entry"}, set[str]()
    for node in ast.walk(function):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            name = node.arg if isinstance(node, ast.arg) else getattr(node.target, "id", "")
            annotation = ast.unparse(node.annotation)
            if re.fullmatch(r"(objects\.)?Entry( \| None)?", annotation):
                entries.add(name)
            elif re.fullmatch(r"(dict|Mapping)\[bytes, Entry\]", annotation):
                tables.add(name)
        if isinstance(node, ast.arg) and node.arg == "entries":
            tables.add(node.arg)
    sources = re.compile(r"(.*\.)?entries(\[.*\]|\.(get|pop)\(.*\))|(.*\._hold|Entry)\(.*\)", re.DOTALL)
    for node in ast.walk(function):
        pairs: list[tuple[ast.AST, ast.AST]] = []
        if isinstance(node, ast.Assign):
            pairs = [(target, node.value) for target in node.targets]
        elif isinstance(node, ast.NamedExpr):
            pairs = [(node.target, node.value)]
        elif isinstance(node, ast.For | ast.comprehension):
            iterated = ast.unparse(node.iter)
            found = re.search(r"\bentries\.(items|values)\(\)", iterated)
            if found:
                target: ast.AST = node.target
                if found[1] == "items" and isinstance(target, ast.Tuple) and len(target.elts) == 2:
                    target = target.elts[1]
                entries.add(getattr(target, "id", ""))
        for target, value in pairs:
            if isinstance(target, ast.Name):
                if sources.fullmatch(ast.unparse(value)):
                    entries.add(target.id)
                elif isinstance(value, ast.Attribute) and value.attr == "entries":
                    tables.add(target.id)
    return entries, tables


def _scopes(tree: ast.Module) -> Iterator[ast.AST]:
    """Each function with those inside it, and what stands outside of all."""
    outside: list[ast.stmt] = []
    waiting = list(tree.body)
    while waiting:
        statement = waiting.pop()
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            yield statement
        elif isinstance(statement, ast.ClassDef):
            waiting += statement.body
        else:
            outside.append(statement)
    yield ast.Module(outside, [])


def one_writer(sources: Iterable[Source]) -> list[str]:
    """Nobody but the ownership table makes entries, writes their fields or puts them into `.entries`.

    An AST has no types: an entry is what is annotated or named so, or comes from `.entries`; fields are those of `Entry`.
    """
    complaints = []
    for source in sources:
        if source.folder != "runtime" or source.path in TABLE_FILES:
            continue
        if "entr" not in source.text.lower():
            continue
        found = {
            f"{source.path}:{line}: writes {what}; only {' and '.join(TABLE_FILES)} may, so give the table a method"
            for scope in _scopes(source.tree)
            for line, what in _writes(scope, *_names_of_entries(scope))
        }
        complaints += sorted(found)
    return complaints


def test_nobody_else_writes_to_entries() -> None:
    complaints = one_writer(repository())
    assert not complaints, "\n" + "\n".join(complaints)


def test_the_table_would_be_seen() -> None:
    """The rule knows the writes of the two files that may, so that moving one of their methods elsewhere is noticed."""
    for path in TABLE_FILES:
        [source] = [source for source in repository() if source.path == path]
        assert len(one_writer([Source("runtime/calls/a.py", source.text)])) > 15


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("runtime/calls/a.py", "def f(entry):\n    entry.state = 1"),
        ("runtime/calls/a.py", "def f(held: Entry | None):\n    held.handles += 1"),
        ("runtime/calls/a.py", "def f(table):\n    found = table.entries[b'x']\n    found.task = None"),
        (
            "runtime/calls/a.py",
            "def f(table):\n    if (e := table.entries.get(b'x')):\n        e.value, x = 1, 2",
        ),
        (
            "runtime/calls/a.py",
            "def f(table):\n    for _, e in list(table.entries.items()):\n        e.owner = b''",
        ),
        ("runtime/calls/a.py", "def f(self):\n    self.table.entries[b'x'].waiters = []"),
        ("runtime/calls/a.py", "def f(entry):\n    entry.waiters.append(print)"),
        ("runtime/calls/a.py", "def f(entry):\n    entry.contained[0] = b'y'"),
        ("runtime/calls/a.py", "def f(entry):\n    setattr(entry, 'state', 1)"),
        ("runtime/calls/a.py", "def f(entry):\n    del entry.borrowers"),
        ("runtime/cores/lineage.py", "def f(self, entry):\n    entry.waiters = entry.waiters or []"),
        ("runtime/process/a.py", "def f(self):\n    self.table.entries[b'x'] = None"),
        ("runtime/process/a.py", "def f(self):\n    del self.table.entries[b'x']"),
        ("runtime/process/a.py", "def f(self):\n    self.table.entries.clear()"),
        ("runtime/process/a.py", "def f(self):\n    self.table.entries = {}"),
        ("runtime/process/a.py", "def f(self):\n    entries = self.table.entries\n    entries[b'x'] = None"),
        ("runtime/process/a.py", "def f(self):\n    known = self.table.entries\n    known.pop(b'x')"),
        ("runtime/calls/a.py", "from afield.runtime.cores.objects import Entry\nx = Entry()"),
    ],
)
def test_rule_fails(path: str, text: str) -> None:
    assert one_writer([Source(path, text)])


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "runtime/cores/entries.py",
            "def f(self, entry):\n    entry.state = 1\n    self.entries[b'x'] = Entry()",
        ),
        ("tests/a.py", "def f(entry):\n    entry.state = 1"),
        ("runtime/calls/a.py", "def f(caller, record, task):\n    caller.state = record.task = task.value = 1"),
        ("runtime/calls/a.py", "def f(self, entry):\n    self.value = entry.value\n    entry.value.offset = 1"),
        (
            "runtime/calls/a.py",
            "def f(table, names):\n    e = table.entries.get(b'x')\n    names[e.task] = e.owner",
        ),
        (
            "runtime/calls/a.py",
            "def f(entries):\n    for name, e in entries.items():\n        print(e.contained)",
        ),
        (
            "runtime/calls/a.py",
            "def f(entry: Entry) -> Entry:\n    other = list(entry.contained)\n    other.append(1)",
        ),
        ("runtime/tools/a.py", "def f():\n    entries = []\n    entries.append(1)"),
    ],
)
def test_rule_passes(path: str, text: str) -> None:
    assert one_writer([Source(path, text)]) == []
