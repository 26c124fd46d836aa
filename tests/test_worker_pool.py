"""The node's pool of workers: what becomes of a lease whose worker ends before it has connected."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from afield.runtime.node.workers import WorkerPool
from afield.scheduler.leases import Grant
from afield.scheduler.resources import ResourceSet


@pytest.mark.parametrize("ending", [False, True])
def test_another_worker_takes_the_place_of_one_that_ends_while_it_starts_unless_the_session_ends(ending: bool) -> None:
    """Nobody would tell it to end, and the end of the session would wait for it."""
    released: list[int] = []

    def nothing(*facts: Any) -> None:
        """What the daemon does about it is of no interest here."""

    daemon: Any = SimpleNamespace(
        config=SimpleNamespace(num_cpus=1, environment=b""),
        loop=SimpleNamespace(register=nothing, modify=nothing),
        tiers=SimpleNamespace(begin_process=lambda *facts: {}, stores=SimpleNamespace(backend_spec="")),
        environment_of=lambda grant: b"",
        output=SimpleNamespace(open=nothing, close=nothing),
        actors=SimpleNamespace(on_worker_died=nothing),
        leases=SimpleNamespace(release=released.append),
        process_died=nothing,
    )
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    with ours, theirs, child:
        pool = WorkerPool(daemon, ours)
        pool.provide(Grant(7, b"owner", 1, ResourceSet({}), ()))
        (worker,) = pool.by_id.values()
        pool._on_forked(worker.id, child.pid, [-1, -1])
        if ending:
            pool.end_all()
        else:
            child.kill()
        child.wait()
        pool._on_exit(child.pid, signal.SIGKILL)
        assert worker not in pool.by_id.values()
        assert (len(pool.by_id), released) == ((0, [7]) if ending else (1, []))
