"""The composition root of a session's processes: what the fork server's interpreter runs, and what its children become.

Everything that a worker, a daemon or a store process needs is imported here, before the first fork, and so are the public
names, since what programs use is then in the pages that workers share.
"""

from __future__ import annotations

import linecache
import socket

import afield.runtime.face.api
import afield.runtime.face.lifecycle  # noqa: F401 - see above, and for what a copy of a worker is told by os.fork
from afield.runtime.node.daemon import NodeDaemon
from afield.runtime.process.configuration import ForkServerConfig
from afield.runtime.session.forkserver import Roles, serve
from afield.runtime.session.store_process import run_store
from afield.runtime.worker.worker import run_worker


def main(raw: bytes) -> None:
    """Run the fork server; `raw` is its configuration."""
    # From Python 3.13 on it has the command of this interpreter for the source of whatever is called so.
    linecache.cache.pop("<string>", None)
    serve(raw, Roles(_run_daemon, run_worker, run_store))


def _run_daemon(config: ForkServerConfig, fork_sock: socket.socket) -> None:
    NodeDaemon(config, fork_sock).run()
