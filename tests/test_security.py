"""What other users of the machine, and what a task does by accident, must not be able to do to a session."""

from __future__ import annotations

import contextlib
import fcntl
import grp
import json
import mmap
import os
import pwd
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import afield
from afield.runtime.face import lifecycle
from afield.runtime.process.configuration import address_of
from afield.runtime.session import directories, sessions
from afield.runtime.tools.security import listeners
from afield.transport import sockets
from tests.helpers import processes, program, traces

pytestmark = pytest.mark.slow

HANG_S = 60.0


# -- what is run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["json", "msgspec", "numpy", "os", "afield"])
def test_a_module_that_lies_in_the_working_directory_is_not_run(tmp_path: Path, name: str) -> None:
    """`python -c` puts the current directory first on the path, and the fork server was one."""
    trap = tmp_path / "shared"
    trap.mkdir()
    (trap / f"{name}.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w').close()\n")
    script = tmp_path / "own" / "script.py"
    script.parent.mkdir()
    script.write_text("import afield\nafield.init(num_cpus=1)\nprint(afield.get(afield.remote(lambda: 5).remote()))\n")
    # Found by an installation, as everywhere; a checkout on PYTHONPATH is the user's own doing.
    done = subprocess.run([sys.executable, str(script)], cwd=trap, capture_output=True, text=True, timeout=HANG_S)
    assert done.stdout == "5\n", done.stderr
    assert not (tmp_path / "run").exists()


# -- where files lie ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o722])
def test_a_directory_that_others_can_write_to_is_refused(tmp_path: Path, mode: int, no_runtime: None) -> None:
    base = tmp_path / "open"
    base.mkdir()
    base.chmod(mode)
    for place in (base, base / "inner"):
        place.mkdir(exist_ok=True)
        with pytest.raises(afield.InvalidOptionError, match=rf"spill_dir.*{base}.*sticky"):
            afield.init(num_cpus=1, spill_dir=str(place))
    base.chmod(mode | 0o1000)
    assert directories.complaint(str(base / "inner")) is None
    with afield.init(num_cpus=1, spill_dir=str(base)):
        assert afield.get(afield.put(1)) == 1


def test_a_temporary_directory_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    source = """
    try:
        afield.init(num_cpus=1)
    except afield.RuntimeDiedError as error:
        report(said=str(error))
    """
    os.environ["TMPDIR"], before = str(tmp_path), os.environ.get("TMPDIR")
    try:
        with program(source) as driver:
            said = driver.read()["said"]
            assert driver.end()[0] == 0
    finally:
        del os.environ["TMPDIR"]
        if before is not None:
            os.environ["TMPDIR"] = before
    assert str(tmp_path) in said and "TMPDIR" in said and "sticky" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a directory away")
@pytest.mark.parametrize("uid", [1234, sockets.OVERFLOW_UID])
def test_a_directory_of_another_user_is_refused(tmp_path: Path, uid: int, no_runtime: None) -> None:
    os.chown(tmp_path, uid, 0)
    with pytest.raises(afield.InvalidOptionError, match="belongs to the user"):
        afield.init(num_cpus=1, spill_dir=str(tmp_path))


def test_a_group_of_ones_own_is_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o770)
    own = pwd.struct_passwd(("me", "x", os.geteuid(), 4321, "", "/", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: own)
    monkeypatch.setattr(os, "lstat", _in_group(4321))
    for members, name, safe in ([], "me", True), (["me"], "me", True), (["you"], "me", False), ([], "staff", False):
        group = grp.struct_group((name, "x", 4321, members))
        monkeypatch.setattr(grp, "getgrgid", lambda gid, group=group: group)
        assert (directories.complaint(str(tmp_path)) is None) == safe


def _in_group(gid: int) -> Any:
    lstat = os.lstat

    def changed(path: str) -> os.stat_result:
        fields = list(lstat(path))
        fields[5] = gid
        return os.stat_result(fields)

    return changed


def test_a_link_in_the_place_of_a_file_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    base = directories.open_directory(str(_private(tmp_path / "base")))
    os.symlink(victim, "link", dir_fd=base)
    with pytest.raises(OSError):
        directories.create_file("link", base)
    with pytest.raises(OSError):
        directories.read_file("link", base)
    os.close(base)
    (tmp_path / "other").symlink_to(tmp_path / "base")
    with pytest.raises(OSError):
        directories.open_directory(str(tmp_path / "other"))
    assert victim.read_text() == "mine"


def _private(path: Path) -> Path:
    path.mkdir(mode=0o700)
    return path


# -- sockets ------------------------------------------------------------------------------------------------------


def test_addresses_cannot_be_told_without_the_secret(shared_runtime: None) -> None:
    names = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if "@afield-" in line]
    (session,) = [info for info in sessions.find_sessions() if info.driver_pid == os.getpid()]
    ours = [name[1:] for name in names if session.name in name]
    assert address_of(session.name, session.token()) in ours
    assert address_of(session.name, bytes(32)) not in ours
    hexadecimal = {info.hex() for info in [lifecycle._session.participant.process.process_id]}
    assert not any(known in name for known in hexadecimal for name in ours)


# -- memory -------------------------------------------------------------------------------------------------------


@afield.remote
def try_to_cut() -> list[str]:
    """Try to change the size of all memory that a worker shares; return what was said."""
    said = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            if "memfd:afield" in os.readlink(f"/proc/self/fd/{fd}"):
                for size in (0, 1 << 40):
                    try:
                        os.ftruncate(int(fd), size)
                        said.append(f"cut {fd}")
                    except PermissionError:
                        said.append("refused")
        except FileNotFoundError:
            pass
    return said


def test_shared_memory_cannot_be_cut(shared_runtime: None) -> None:
    """A task that did so once killed the driver."""
    said = afield.get(try_to_cut.remote(), timeout=HANG_S)
    assert said and set(said) == {"refused"}, said


@afield.remote
def what_a_program_inherits() -> str:
    """Return what a program that a task starts has open."""
    return subprocess.run(["ls", "-l", "/proc/self/fd"], close_fds=False, capture_output=True, text=True).stdout


def test_a_program_that_a_task_starts_inherits_nothing(shared_runtime: None) -> None:
    assert "afield" not in afield.get(what_a_program_inherits.remote(), timeout=HANG_S)


@afield.remote
def mappings_in_a_core() -> list[str]:
    """Return the mappings of the session's memory that the kernel would write into a core of this process."""
    found, name = [], ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            name = line
        elif line.startswith("VmFlags:") and "memfd:afield" in name:
            found.append(f"{name}: {line}" if " dd" not in line else "left out")
    return found


def test_values_are_left_out_of_cores(no_runtime: None) -> None:
    task = mappings_in_a_core.options(num_gpus=1)
    with afield.init(num_cpus=1, devices="emulated:1"):
        afield.get(afield.remote(num_gpus=1)(lambda: afield.array_module().zeros(1000)).remote())
        found = afield.get(task.remote(), timeout=HANG_S)
    assert len(found) > 3 and set(found) == {"left out"}, found


def test_sealed_memory_has_its_size_for_good() -> None:
    from afield.gpu_store import shared_memory

    fd = shared_memory.create("afield-test", 8192)
    assert not os.get_inheritable(fd)
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SEAL
    memory = shared_memory.mapped(fd, 4096, offset=4096, prot=mmap.PROT_READ)
    assert len(memory) == 4096
    for size in (0, 4096, 16384):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    os.close(fd)


# -- names that are no text ---------------------------------------------------------------------------------------


def test_names_that_are_no_text_are_no_obstacle(tmp_path: Path) -> None:
    """A directory, an argument and a path of modules with bytes that are no UTF-8."""
    where = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(where)
    with open(where + b"/neighbour.py", "w") as file:
        file.write("VALUE = 7\n")
    with open(where + b"/script.py", "w") as file:
        file.write("""
import os, sys, afield
def where():
    import neighbour
    return neighbour.VALUE, os.getcwdb(), os.fsencode(sys.argv[1])
if __name__ == "__main__":
    with afield.init(num_cpus=1, spill_dir=os.getcwd()):
        value = afield.get(afield.remote(where).remote())
        assert value == where(), value
        assert afield.get(afield.put(bytes(1 << 20))) == bytes(1 << 20)
        from afield.runtime.session import sessions
        assert sessions.find_sessions(os.getcwd())
    print("done")
""")
    command = [os.fsencode(sys.executable), where + b"/script.py", b"caf\xe9"]
    done = subprocess.run(command, cwd=where, capture_output=True, timeout=HANG_S)
    assert done.stdout == b"done\n", done.stderr.decode(errors="replace")


def test_the_user_for_whom_the_kernel_has_no_number_is_nobodys_friend(monkeypatch: pytest.MonkeyPatch) -> None:
    for uid, friends in (1000, {1000, 0}), (0, {0}), (sockets.OVERFLOW_UID, {0}):
        monkeypatch.setattr(os, "geteuid", lambda uid=uid: uid)
        assert {peer for peer in (0, 1000, 1001, sockets.OVERFLOW_UID) if sockets.is_us(peer)} == friends
    with pytest.raises(afield.RuntimeDiedError, match="nobody"):
        afield.init(num_cpus=1)


# -- another user of the machine ----------------------------------------------------------------------------------

STRANGER = 23456


def as_stranger(work: Any) -> Any:
    """Return what `work` returns in a copy of this process that belongs to another user."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            os.setgroups([])
            os.setgid(STRANGER)
            os.setuid(STRANGER)
            answer = json.dumps(work())
        except BaseException as error:
            answer = json.dumps(f"{type(error).__name__}: {error}")
        os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return json.loads(text)


needs_another_user = pytest.mark.skipif(
    os.geteuid() != 0, reason="NOT TESTED: what another user can do; it needs root, to become one"
)


@needs_another_user
def test_another_user_can_reach_nothing_of_a_session(shared_runtime: None) -> None:
    (info,) = [one for one in sessions.find_sessions() if one.driver_pid == os.getpid()]
    pids = list(processes(traces()))
    addresses = listeners(info.name)

    def attempts() -> list[str]:
        done = []

        def attempt(what: str, work: Any) -> None:
            try:
                done.append(f"{what}: {work()!r}")
            except (OSError, ConnectionError):
                pass

        attempt("list", lambda: os.listdir(info.directory))
        for name in ("token", "info.json", "node.log", "lock"):
            attempt(name, lambda name=name: Path(info.directory, name).read_bytes())
        attempt("rename", lambda: os.rename(info.directory, info.directory + "x"))
        for pid in pids:
            attempt("kill", lambda pid=pid: os.kill(pid, signal.SIGTERM))
            attempt("fds", lambda pid=pid: os.listdir(f"/proc/{pid}/fd"))
            attempt("memory", lambda pid=pid: os.open(f"/proc/{pid}/mem", os.O_RDONLY))
        for address in addresses:
            attempt("connect", lambda address=address: said_to_us(address) or pytest.fail("nothing"))
        return done

    assert as_stranger(attempts) == []
    assert set(pids) <= processes(traces()).keys()


def said_to_us(address: str) -> bytes:
    """Return what a listener of a session says first; raises ConnectionError if it hangs up."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        sock.connect("\0" + address)
        data = sock.recv(100)
    if not data:
        raise ConnectionResetError
    return data


@needs_another_user
def test_a_flood_of_connections_of_another_user_starves_nobody(no_runtime: None) -> None:
    """The daemon once accepted as long as somebody connected."""
    with afield.init(num_cpus=1):
        echo = afield.remote(lambda value: value)
        afield.get(echo.remote(1))
        addresses = listeners(traces().name)

        def flood() -> int:
            count, end = 0, time.monotonic() + 3.0
            while time.monotonic() < end:
                for address in addresses:
                    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                        sock.setblocking(False)
                        sock.connect("\0" + address)
                        count += 1
            return count

        result: list[Any] = []
        thread = threading.Thread(target=lambda: result.append(as_stranger(flood)))
        thread.start()
        done = 0
        while thread.is_alive():
            actor = afield.remote(type("A", (), {"f": lambda self: 1})).remote()  # takes the daemon
            assert afield.get(actor.f.remote(), timeout=HANG_S) == 1
            assert afield.get(echo.remote(done), timeout=HANG_S) == done
            del actor
            done += 1
        thread.join()
        assert result[0] > 1000, "it was no flood"
        assert done > 3, "the session stood still"


@pytest.mark.parametrize("closed", [(0, 1), (1, 2), (0, 1, 2)])
def test_a_program_with_closed_streams_has_a_session_that_nobody_sweeps(
    closed: tuple[int, ...], tmp_path: Path
) -> None:
    """What a session opens does not take the numbers of streams, which no program inherits: its lock, its shared memory."""
    result = tmp_path / "result"
    source = f"""
        import os, traceback
        for fd in {closed!r}:
            os.close(fd)
        import afield
        from afield.runtime.session import sessions
        try:
            info = afield.init(num_cpus=1, spill_dir={str(tmp_path)!r})
            swept = sessions.sweep({str(tmp_path)!r})
            value = afield.get(afield.remote(lambda: 5).remote())
            text = f"{{value}} {{swept}} {{[os.fstat(fd).st_rdev for fd in {closed!r}]}}"
        except BaseException:
            text = traceback.format_exc()
        with open({str(result)!r}, "w") as file:
            file.write(text)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(source)], capture_output=True, timeout=HANG_S)
    null = os.stat(os.devnull).st_rdev
    assert done.returncode == 0
    assert result.read_text() == f"5 [] {[null for _ in closed]}"
