"""The main function of a worker process."""

from __future__ import annotations

import io
import os
import random
import signal
import sys
from typing import Any

import numpy as np

from afield.runtime import current
from afield.runtime.context import reset_root
from afield.runtime.executor import Executor
from afield.runtime.forkserver import ForkServerConfig
from afield.runtime.participant import Participant

#: Starts a line of output and ends the name of the task that wrote it; the daemon turns it into a prefix.
NAME_MARK = "\x1e"


class _Output(io.TextIOWrapper):
    """A worker's stdout or stderr: marks each line with the name of what runs, and sends whole lines."""

    executor: Any = None
    _at_line_start = True

    def write(self, text: str) -> int:
        name = self.executor.running_name() if self.executor is not None else ""
        for line in text.splitlines(keepends=True):
            if self._at_line_start and name:
                super().write(NAME_MARK + name + NAME_MARK)
            super().write(line)
            self._at_line_start = line.endswith("\n")
        return len(text)


def _open_output(fd: int) -> _Output:
    return _Output(io.FileIO(fd, "w", closefd=False), encoding="utf-8", errors="replace", line_buffering=True)


def run_worker(config: ForkServerConfig, worker_id: bytes, environment: dict[str, str]) -> None:
    """Serve the cluster until the daemon goes away."""
    os.environ.update(environment)
    os.environ["AFIELD_WORKER"] = worker_id.hex()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    reset_root()
    random.seed()
    np.random.seed()
    participant = Participant(config.session_config(), worker_id, "worker")
    executor = Executor(participant.process, participant.values)
    out, err = _open_output(1), _open_output(2)
    out.executor = err.executor = executor
    sys.stdout, sys.stderr = out, err
    current.install(participant)
    participant.process.start()
    try:
        executor.run()
    finally:
        current.install(None)
