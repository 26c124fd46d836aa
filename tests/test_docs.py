"""The documents tell the truth: every Python block in them runs.

A document is one program. Its blocks tagged `python` run in order in one fresh process, in a file in which everything
else became empty lines, so that a traceback names the document's own line. A block that shows an error on purpose is
tagged `python no-run`; it must still compile and must name an error. Blocks of other languages are only looked at for
tags that were meant to be `python`. A document that hangs is ended, and the traceback of each of its threads is shown.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    path
    for path in (ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("**/*.md")))
    if path.exists()
]

HANG_S = 90
ABORT_GRACE_S = 5

FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})\s*(?P<info>[^`]*?)\s*$")
ALMOST_PYTHON = {"py", "python3", "pycon", "ipython"}


@dataclass(frozen=True)
class Block:
    """A fenced block: the line its content starts at (from 1), its tag, its lines without the fence's indentation."""

    line: int
    info: str
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


def blocks_of(text: str) -> Iterator[Block]:
    """The fenced blocks of a Markdown text. Raises ValueError if one is not closed."""
    opening: re.Match[str] | None = None
    start = 0
    content: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        match = FENCE.match(line)
        if opening is None:
            if match:
                opening, start, content = match, number + 1, []
        elif match and not match["info"] and match["fence"].startswith(opening["fence"]):
            yield Block(start, opening["info"], tuple(content))
            opening = None
        else:
            indent = len(opening["indent"])
            content.append(line[indent:] if not line[:indent].strip() else line.lstrip())
    if opening is not None:
        raise ValueError(f"line {start - 1}: the block that starts here is not closed")


def program_of(text: str) -> str:
    """The document as a program: its Python blocks where they stand, empty lines elsewhere."""
    lines = [""] * len(text.splitlines())
    for block in blocks_of(text):
        if block.info == "python":
            lines[block.line - 1 : block.line - 1 + len(block.lines)] = block.lines
    return "\n".join(lines).rstrip() + "\n"


def tag_complaints(text: str) -> list[str]:
    """What is wrong with the blocks' tags: a Python block must not escape from being run."""
    complaints = []
    for block in blocks_of(text):
        language, *options = block.info.split() or [""]
        if language.lower() in ALMOST_PYTHON or (language.lower() == "python" and language != "python"):
            complaints.append(f"line {block.line}: tag it python, not {language}")
        elif language == "python" and options not in ([], ["no-run"]):
            complaints.append(f"line {block.line}: unknown option {' '.join(options)!r}")
        elif language == "python" and options:
            compile(block.text, f"line {block.line}", "exec")
            if not re.search(r"\b\w*(Error|Exception|Interrupt|Exit)\b", block.text):
                complaints.append(f"line {block.line}: only a block that names the error it shows is not run")
    return complaints


@dataclass(frozen=True)
class Outcome:
    exit_code: int | None  # None: it hung
    output: str


def run_program(program: Path, hang_s: float) -> Outcome:
    """Run a file as a program in its own process group; end all of it when it takes longer than `hang_s` seconds."""
    with subprocess.Popen(
        [sys.executable, "-X", "faulthandler", str(program)],
        cwd=program.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=hang_s)
            return Outcome(process.returncode, output)
        except subprocess.TimeoutExpired:
            # faulthandler answers this signal with the traceback of each thread.
            process.send_signal(signal.SIGABRT)
            try:
                output, _ = process.communicate(timeout=ABORT_GRACE_S)
            except subprocess.TimeoutExpired as late:
                output = (late.output or b"").decode(errors="replace")
            return Outcome(None, output)
        finally:
            if process.returncode != 0:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass


def documents(*, runnable: bool) -> list[object]:
    """Test parameters, one for each document (that has something to run); one that skips if there is none."""
    chosen = [path for path in DOCUMENTS if not runnable or program_of(path.read_text(encoding="utf-8")).strip()]
    params = [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in chosen]
    return list(params) or [pytest.param(None, id="none", marks=pytest.mark.skip("no such document yet"))]


@pytest.mark.slow
@pytest.mark.parametrize("document", documents(runnable=True))
def test_document_runs(document: Path, tmp_path: Path) -> None:
    # Called like the document, and a copy: the program lives beside nothing of the repository.
    program = tmp_path / f"{document.stem}.md.py"
    program.write_text(program_of(document.read_text(encoding="utf-8")), encoding="utf-8")
    outcome = run_program(program, HANG_S)
    assert outcome.exit_code == 0, (
        f"{document.name} {'hung' if outcome.exit_code is None else 'failed'}\n{outcome.output}"
    )


@pytest.mark.parametrize("document", documents(runnable=False))
def test_document_is_tagged_soundly(document: Path) -> None:
    assert tag_complaints(document.read_text(encoding="utf-8")) == []


# ---- the checks can fail --------------------------------------------------------------------------------------------

SAMPLE = """\
# Title

```python
x = 1
```

```text
not python
```

1. in a list

   ```python
   if x:

       print(x + 1)
   ```

````python no-run
raise ValueError("```")
````
"""


def test_program_keeps_line_numbers() -> None:
    expected = [""] * 3 + ["x = 1"] + [""] * 9 + ["if x:", "", "    print(x + 1)"]
    assert program_of(SAMPLE).splitlines() == expected
    assert [block.info for block in blocks_of(SAMPLE)] == ["python", "text", "python", "python no-run"]
    assert program_of("no block at all").strip() == ""


def test_open_block_is_an_error() -> None:
    with pytest.raises(ValueError, match="line 3"):
        list(blocks_of("a\n\n```python\nx = 1\n"))


@pytest.mark.parametrize(
    ("block", "complaint"),
    [
        ("```python\nx\n```", None),
        ("```bash\nls\n```", None),
        ("```\nplain\n```", None),
        ("```python no-run\nf()  # raises TypeError\n```", None),
        ("```python no-run\nf()\n```", "names the error"),
        ("```python norun\nf()\n```", "unknown option"),
        ("```py\nf()\n```", "tag it python"),
        ("```Python\nf()\n```", "tag it python"),
    ],
)
def test_tags(block: str, complaint: str | None) -> None:
    complaints = tag_complaints(block)
    assert len(complaints) == (complaint is not None)
    assert complaint is None or complaint in complaints[0]


def test_failing_program_is_seen(tmp_path: Path) -> None:
    program = tmp_path / "doc.py"
    program.write_text(program_of("text\n\n```python\nimport os\nassert not os\n```\n"))
    outcome = run_program(program, HANG_S)
    assert outcome.exit_code == 1
    assert "line 5" in outcome.output


def test_hanging_program_is_ended_with_a_traceback(tmp_path: Path) -> None:
    program = tmp_path / "doc.py"
    program.write_text("import threading\nthreading.Event().wait()\n")
    outcome = run_program(program, 0.5)
    assert outcome.exit_code is None
    assert "line 2" in outcome.output
