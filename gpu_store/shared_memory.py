"""Memory that the processes of a session share: anonymous files of a size that is final, and not in any dump of a process.

Theory of operation. A `memfd` has no name and ends with its last user. Whoever has its descriptor could cut it, and the others
would be killed (SIGBUS) where they touch what is gone: so it is sealed against any change of its size, and so are its seals.
The kernel would write what a crashed process has mapped into its core, which is every value of the session: a mapping says
that it is not to.
"""

from __future__ import annotations

import fcntl
import mmap
import os

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_PROTECTION = mmap.PROT_READ | mmap.PROT_WRITE


def create(name: str, size_bytes: int) -> int:
    """Return the descriptor of new memory of this size, for good; programs that are started do not inherit it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def mapped(fd: int, size_bytes: int, *, offset: int = 0, prot: int = _PROTECTION) -> mmap.mmap:
    """Map shared memory, or a piece of it."""
    memory = mmap.mmap(fd, size_bytes, prot=prot, offset=offset)
    memory.madvise(mmap.MADV_DONTDUMP)
    return memory
