"""The peers: Ray and Dask behind the same face, each measured in an environment of its own.

Theory of operation. `python -m benchmarks.peers ray --cases a,b` runs in an interpreter that has the peer and numpy,
but not this runtime. It writes one JSON line per case to standard output as soon as the case is done; whatever the
peer itself prints goes to standard error. `measure_peer` is the other end: it starts that interpreter, reads the
lines and ends the process group when it takes too long. Task bodies are functions inside functions, so that every
system ships them by value and no worker has to import this module.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cases import PEER, PEER_QUICK, SLOTS, Scale, System, select
from benchmarks.runner import Outcome, as_json, run_cases

PEER_LIMIT_S = 900.0
"""A peer that has not finished all of its cases in this time is ended; what it gave until then is kept."""

_ROOT = Path(__file__).resolve().parent.parent
_INSTALL = {"ray": "'ray==2.60.0' numpy", "dask": "'distributed==2026.8.0' numpy"}
_MODULE = {"ray": "ray", "dask": "distributed"}


def _bodies() -> dict[str, Any]:
    """Return the task bodies; they are made inside a function so that they are pickled by value."""

    def noop() -> None:
        return None

    def after(_value: object) -> None:
        return None

    def array(size_bytes: int) -> Any:
        import numpy

        return numpy.zeros(size_bytes // 8)

    def nap(seconds: float) -> int:
        import os
        import time

        time.sleep(seconds)
        return os.getpid()

    def gate(path: str) -> None:
        import os
        import time

        while not os.path.exists(path):
            time.sleep(0.02)

    class Actor:
        def call(self) -> None:
            return None

    return {"noop": noop, "after": after, "array": array, "nap": nap, "gate": gate, "actor": Actor}


class RayLike:
    """Ray, and every runtime that has the same names for its core API."""

    def __init__(self, name: str, module: Any, **options: Any) -> None:
        self.name = name
        self._module = module
        self._options = options

    def start(self) -> None:
        module, bodies = self._module, _bodies()
        module.init(num_cpus=SLOTS, **self._options)
        # Bound once: what is measured is the runtime's call, not this class's.
        self.get, self.put = module.get, module.put
        self.noop = module.remote(bodies["noop"]).remote
        self.after = module.remote(bodies["after"]).remote
        self.array = module.remote(bodies["array"]).remote
        self.nap = module.remote(bodies["nap"]).remote
        self.gate = module.remote(bodies["gate"]).remote
        self.actor = module.remote(num_cpus=0)(bodies["actor"]).remote

    def stop(self) -> None:
        self._module.shutdown()

    def wait_all(self, refs: list[Any]) -> None:
        self._module.wait(refs, num_returns=len(refs))

    def wait_each(self, refs: list[Any]) -> None:
        pending = refs
        while pending:
            _, pending = self._module.wait(pending)

    def call(self, actor: Any) -> Any:
        return actor.call.remote()

    def end_actor(self, actor: Any) -> None:
        self._module.kill(actor)


class Dask:
    """Dask's distributed scheduler with processes on this machine."""

    name = "dask"

    def __init__(self, module: Any) -> None:
        self._module = module
        self._bodies = _bodies()

    def start(self) -> None:
        self._cluster = self._module.LocalCluster(
            n_workers=SLOTS, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=logging.ERROR
        )
        self._client = self._module.Client(self._cluster)

    def stop(self) -> None:
        self._client.close()
        self._cluster.close()

    def get(self, refs: Any) -> Any:
        if not isinstance(refs, list):
            return refs.result()
        if refs and isinstance(refs[0], self._module.Future):
            return self._client.gather(refs)
        return [ref.result() for ref in refs]

    def put(self, value: Any) -> Any:
        return self._client.scatter(value, hash=False)

    def wait_all(self, refs: list[Any]) -> None:
        self._module.wait(refs)

    def wait_each(self, refs: list[Any]) -> None:
        for _ in self._module.as_completed(refs):
            pass

    def _submit(self, body: str, *args: Any, **options: Any) -> Any:
        return self._client.submit(self._bodies[body], *args, pure=False, **options)

    def noop(self) -> Any:
        return self._submit("noop")

    def after(self, ref: Any) -> Any:
        return self._submit("after", ref)

    def array(self, size_bytes: int) -> Any:
        return self._submit("array", size_bytes)

    def nap(self, seconds: float) -> Any:
        return self._submit("nap", seconds)

    def gate(self, path: str) -> Any:
        return self._submit("gate", path)

    def actor(self) -> Any:
        return self._submit("actor", actor=True).result()

    def call(self, actor: Any) -> Any:
        return actor.call()

    def end_actor(self, actor: Any) -> None:
        """An actor ends when its last handle goes, which the caller is about to drop."""


def make_system(peer: str) -> System:
    """Return the peer of this name; raises `ImportError` where this interpreter does not have it."""
    module = importlib.import_module(_MODULE[peer])
    if peer == "dask":
        return Dask(module)
    quiet = {"include_dashboard": False, "logging_level": logging.ERROR, "log_to_driver": False}
    return RayLike("ray", module, **quiet)


def peer_scale(peer: str, *, quick: bool) -> Scale:
    """Return how much a peer does: Dask takes 2 ms a task, so it gets fewer of them."""
    scale = PEER_QUICK if quick else PEER
    return replace(scale, tasks=min(scale.tasks, 2_000), pending=min(scale.pending, 2_000)) if peer == "dask" else scale


def peer_python(peer: str, chosen: str | None) -> str | None:
    """Return the interpreter that has this peer: the chosen, the environment's, or this one; None if none has it."""
    candidates = [chosen] if chosen else [os.environ.get(f"AFIELD_PEER_{peer.upper()}"), sys.executable]
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{_MODULE[peer]}') is None)"
    for python in filter(None, candidates):
        with contextlib.suppress(OSError):
            if subprocess.run([python, "-c", probe], capture_output=True, check=False).returncode == 0:
                return python
    return None


def install_hint(peer: str) -> str:
    """Return the message that says how to make an environment with this peer."""
    return (
        f"no interpreter with {peer} found: python -m venv .peer-{peer} && "
        f".peer-{peer}/bin/pip install {_INSTALL[peer]}, then --peer-python {peer}=.peer-{peer}/bin/python "
        f"(or AFIELD_PEER_{peer.upper()})"
    )


def measure_peer(
    peer: str, python: str, cases: list[str], *, quick: bool, module: str = "benchmarks.peers"
) -> Iterator[tuple[str, Outcome]]:
    """Run the cases in the peer's interpreter and yield its version and each outcome as it arrives.

    `module` is the one that runs there, with the arguments of `benchmarks.peers`.

    Raises `RuntimeError` with the peer's exit status when it ends with an error or had to be ended.
    """
    command = [python, "-m", module, peer, "--cases", ",".join(cases), *(["--quick"] if quick else [])]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, cwd=_ROOT, env=environment, start_new_session=True
        ) as child,
    ):
        end = threading.Timer(PEER_LIMIT_S, os.killpg, (child.pid, signal.SIGKILL))
        end.start()
        try:
            assert child.stdout is not None
            for line in child.stdout:
                data = json.loads(line)
                yield data.pop("version"), Outcome(**data)
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            raise
        finally:
            end.cancel()
        if child.wait():
            said.seek(0)
            last = (said.read().strip().splitlines() or ["it said nothing"])[-1]
            raise RuntimeError(f"{peer} ended with status {child.returncode}: {last}")


def main() -> None:
    """Measure one peer in this interpreter and write one JSON line per case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=main.__doc__)
    parser.add_argument("peer", choices=sorted(_MODULE))
    parser.add_argument("--cases", default="", help="names, separated by commas (all)")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # What the peer prints must not mix with the lines.
    system = make_system(options.peer)
    version = importlib.import_module(_MODULE[options.peer]).__version__
    cases = select([name for name in options.cases.split(",") if name], peers=True)
    for outcome in run_cases(system, cases, peer_scale(options.peer, quick=options.quick), limits=False):
        lines.write(json.dumps({"version": version, **as_json(outcome)}) + "\n")


if __name__ == "__main__":
    main()
