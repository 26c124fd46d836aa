"""What of a session other users of the machine could reach: its directory, its shared memory, what it listens on.

Theory of operation. Everything is looked at from outside, as it is, and not as it was meant to be: rights of files, seals of
memory by descriptors of the processes, sockets by the kernel's tables. What is not as it should be is a warning.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from afield.runtime.session import directories
from afield.runtime.session.sessions import SessionInfo

_RESIZED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_NETWORK = ("tcp", "tcp6", "udp", "udp6")
#: A TCP socket that listens, in the kernel's tables.
_LISTENS = "0A"
#: Marks the listener itself among the unix sockets of its name (`__SO_ACCEPTCON`).
_ACCEPTS = 0x10000


def security(session: SessionInfo, pids: Iterable[int]) -> dict[str, Any]:
    """Return what is to be said of a session whose processes are `pids`, and `warnings` about it."""
    files, warnings = _files(session.directory)
    memory, sockets = _memory(pids), _sockets(pids)
    listening = listeners(session.name)
    for name, sealed in memory.items():
        if not sealed:
            warnings.append(f"the memory {name} can be resized by whoever has it")
    warnings += [f"process {pid} listens on the network: {where}" for pid, where in sockets]
    return {
        "directory": session.directory,
        "files": files,
        "memory": [{"name": name, "sealed": sealed} for name, sealed in sorted(memory.items())],
        "listeners": [f"@{name}" for name in listening],
        "network": [{"pid": pid, "address": where} for pid, where in sockets],
        "warnings": warnings,
    }


def _files(directory: str) -> tuple[list[dict[str, str]], list[str]]:
    warnings = []
    try:
        complaint = directories.complaint(os.path.dirname(directory))
    except OSError as error:
        complaint = str(error)
    if complaint is not None:
        warnings.append(complaint)
    files = []
    for path in [
        directory,
        *(os.path.join(directory, name) for name in ("token", "info.json", "node.log", "lock", "spill")),
    ]:
        with contextlib.suppress(FileNotFoundError):
            status = os.lstat(path)
            mode = stat.S_IMODE(status.st_mode)
            files.append({"path": path, "mode": f"{mode:04o}", "uid": str(status.st_uid)})
            if status.st_uid != os.geteuid() or (path == directory and mode & 0o077):
                warnings.append(f"{path} belongs or is open to others (mode {mode:04o}, uid {status.st_uid})")
    return files, warnings


def _memory(pids: Iterable[int]) -> dict[str, bool]:
    """Return the shared memory of processes, by name, and whether its size is final."""
    found: dict[str, bool] = {}
    for _, path, target in _descriptors(pids):
        if target.startswith("/memfd:afield"):
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _RESIZED == _RESIZED
                finally:
                    os.close(fd)
                name = target.removeprefix("/memfd:").removesuffix(" (deleted)")
                found[name] = found.get(name, True) and sealed
    return found


def _descriptors(pids: Iterable[int]) -> Iterator[tuple[int, str, str]]:
    """Yield (pid, path, what it is) of the open files of processes."""
    for pid in pids:
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                path = f"/proc/{pid}/fd/{fd}"
                with contextlib.suppress(OSError):
                    yield pid, path, os.readlink(path)


def _sockets(pids: Iterable[int]) -> list[tuple[int, str]]:
    """Return (pid, protocol and address) of the sockets of processes that the network can reach; tasks may have opened them."""
    bound: dict[str, str] = {}
    for protocol in _NETWORK:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{protocol}").read_text().splitlines()[1:]:
                fields = line.split()
                if protocol.startswith("udp") or fields[3] == _LISTENS:
                    bound[f"socket:[{fields[9]}]"] = f"{protocol} {_address(fields[1])}"
    return sorted({(pid, bound[target]) for pid, _, target in _descriptors(pids) if target in bound})


def _address(text: str) -> str:
    """Return an address of the kernel's tables (little-endian words in hexadecimal) as people write it."""
    host, _, port = text.partition(":")
    words = [bytes.fromhex(host[at : at + 8])[::-1] for at in range(0, len(host), 8)]
    if len(words) == 1:
        return f"{'.'.join(map(str, words[0]))}:{int(port, 16)}"
    return f"[{b''.join(words).hex(':', 2)}]:{int(port, 16)}"


def listeners(session: str) -> list[str]:
    """Return the abstract names that the session of this name listens on."""
    found = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/unix").read_text(errors="replace").splitlines()[1:]:
            fields = line.split()
            if len(fields) > 7 and fields[7].startswith(f"@afield-{session}-") and int(fields[3], 16) & _ACCEPTS:
                found.add(fields[7][1:])
    return sorted(found)
