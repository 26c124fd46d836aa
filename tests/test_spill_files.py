"""Spill files: what was written comes back, from another process too, and what is damaged is refused with the reason."""

from __future__ import annotations

import errno
import os
import random
import stat
from pathlib import Path

import pytest

from afield.errors import SpillError
from afield.gpu_store import spill_files
from afield.gpu_store.spill_files import SpillFiles

PAGE = 4096


@pytest.fixture
def files(tmp_path: Path) -> SpillFiles:
    return SpillFiles(str(tmp_path / "spill"))


@pytest.fixture
def memory() -> memoryview:
    """A host store of 64 KiB full of noise."""
    return memoryview(bytearray(random.Random(7).randbytes(16 * PAGE)))


#: (offset in memory, size, offset in the file)
PIECES = [(5 * PAGE, 2 * PAGE, 0), (64, 1, 2 * PAGE), (PAGE, PAGE + 3, 3 * PAGE)]


def read(files: SpillFiles, file: int, offset: int, size: int) -> bytes:
    target = bytearray(size)
    files.read(file, offset, memoryview(target))
    return bytes(target)


def check(files: SpillFiles, memory: memoryview) -> None:
    for start, size, offset in PIECES:
        assert read(files, 3, offset, size) == memory[start : start + size]


def test_pieces_come_back_in_any_order(files: SpillFiles, memory: memoryview) -> None:
    files.write(3, PIECES, memory)
    check(files, memory)
    backwards = list(reversed(PIECES))
    assert [read(files, 3, at, size) for _, size, at in backwards] == [memory[a : a + n] for a, n, _ in backwards]


def test_another_process_can_read_them(files: SpillFiles, memory: memoryview) -> None:
    files.write(3, PIECES, memory)
    check(SpillFiles(files.directory), memory)


def test_what_a_dead_process_was_writing_is_removed(files: SpillFiles, memory: memoryview) -> None:
    files.write(3, PIECES, memory)
    Path(files.path(4) + ".part").write_bytes(b"half")
    check(SpillFiles(files.directory), memory)
    assert [path.name for path in Path(files.directory).iterdir()] == ["3"]


def test_pieces_larger_than_a_chunk(files: SpillFiles, memory: memoryview, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill_files, "CHUNK_BYTES", 1000)
    files.write(3, PIECES, memory)
    check(files, memory)
    monkeypatch.undo()
    check(SpillFiles(files.directory), memory)


def test_files_are_for_their_user_only_and_can_be_deleted(files: SpillFiles, memory: memoryview) -> None:
    files.write(3, PIECES, memory)
    assert stat.S_IMODE(os.stat(files.path(3)).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(files.directory).st_mode) == 0o700
    assert os.listdir(files.directory) == ["3"]
    assert files.free_bytes() > 0
    files.delete(3)
    files.delete(3)
    assert os.listdir(files.directory) == []
    with pytest.raises(SpillError, match=r"cannot be read .*No such file") as caught:
        read(files, 3, 0, 2 * PAGE)
    assert caught.value.kind == "unreadable"


@pytest.mark.parametrize(("offset", "size"), [(0, PAGE), (1, 2 * PAGE), (9 * PAGE, 1)])
def test_only_whole_pieces_can_be_read(files: SpillFiles, memory: memoryview, offset: int, size: int) -> None:
    files.write(3, PIECES, memory)
    with pytest.raises(SpillError, match="there is no piece") as caught:
        read(files, 3, offset, size)
    assert caught.value.kind == "corrupt"


@pytest.mark.parametrize("known", [True, False], ids=["its writer", "another process"])
@pytest.mark.parametrize(
    "damage", ["a bit", "cut in the data", "cut in the index", "emptied", "the index", "another file"]
)
def test_damage_is_noticed(files: SpillFiles, memory: memoryview, damage: str, known: bool) -> None:
    files.write(3, PIECES, memory)
    path = Path(files.path(3))
    content = bytearray(path.read_bytes())
    if damage == "a bit":
        content[PAGE] ^= 1
    elif damage == "another file":
        files.write(4, [(0, PAGE, 0)], memory)
        content = bytearray(Path(files.path(4)).read_bytes())
    elif damage == "the index":
        content[-60] ^= 1
    else:
        del content[{"cut in the data": PAGE, "cut in the index": len(content) - 5, "emptied": 0}[damage] :]
    path.write_bytes(content)
    reader = files if known else SpillFiles(files.directory)
    if known and damage in ("cut in the index", "the index"):
        check(reader, memory)  # it does not need it
        return
    with pytest.raises(SpillError, match="is not what afield wrote") as caught:
        read(reader, 3, 0, 2 * PAGE)
    assert caught.value.kind == "corrupt" and files.path(3) in str(caught.value)


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, "disk_full"), (errno.EDQUOT, "disk_full"), (errno.EIO, "failed")]
)
def test_a_write_that_fails_leaves_nothing(
    files: SpillFiles, memory: memoryview, monkeypatch: pytest.MonkeyPatch, number: int, kind: str
) -> None:
    real, calls = os.pwrite, []

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 3:
            raise OSError(number, os.strerror(number))
        return real(fd, data[:1000], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(SpillError, match="could not be spilled to") as caught:
        files.write(3, PIECES, memory)
    assert caught.value.kind == kind and "spill_dir" in str(caught.value)
    assert os.listdir(files.directory) == []
    files.write(3, PIECES, memory)  # in small steps
    monkeypatch.undo()
    check(files, memory)


def test_a_full_disk(memory: memoryview) -> None:
    """The system's own word for it."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    fd = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match="No space left") as caught:
        spill_files._write(fd, memory, 0)
    os.close(fd)
    assert spill_files._failure(caught.value, "x").kind == "disk_full"


def test_an_unreadable_disk(files: SpillFiles, memory: memoryview, monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    files.write(3, PIECES, memory)
    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(SpillError, match="Input/output error") as caught:
        read(files, 3, 0, 2 * PAGE)
    assert caught.value.kind == "unreadable"


@pytest.mark.parametrize("known", [True, False])
def test_a_fifo_in_the_place_of_a_file_holds_up_nobody(files: SpillFiles, memory: memoryview, known: bool) -> None:
    files.write(3, PIECES, memory)
    if not known:
        files = SpillFiles(files.directory)
    os.unlink(files.path(3))
    os.mkfifo(files.path(3))
    with pytest.raises(SpillError, match=r"cannot be read|is not what afield wrote"):
        read(files, 3, 0, 2 * PAGE)
    os.mkfifo(files.path(4) + ".part")
    with pytest.raises(SpillError):
        files.write(4, PIECES, memory)
    files.write(4, PIECES, memory)  # the failed write has removed what was in its way


def test_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SpillError, match="no directory for spill files"):
        SpillFiles(str(tmp_path / "file" / "spill"))
