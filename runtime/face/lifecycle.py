"""The beginning and the end of a runtime as its driver sees them: `init`, the automatic start, `shutdown`, and forks."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from afield.errors import AlreadyInitializedError, NotInitializedError
from afield.runtime.calls import participation
from afield.runtime.calls.participant import Participant
from afield.runtime.face.printing import Printer
from afield.runtime.process.facts import Facts, install
from afield.runtime.process.process import SHUT_DOWN, Process
from afield.runtime.process.stacks import answer_activity
from afield.runtime.session.bootstrap import Session, SessionOptions
from afield.runtime.session.init_options import session_options
from afield.runtime.tools.memory import answer_questions
from afield.runtime.values import accelerators
from afield.runtime.wire import messages
from afield.transport.pump import Waiter
from afield.units import format_bytes

#: How long `shutdown` waits for whoever reads our output to take the last lines of the workers.
LAST_LINES_S = 2.0
#: The daemon says that it has ended within this time: it lets the workers end first.
END_WITHIN_S = 4.0

_session: Session | None = None
_printer: Printer | None = None
_restore_sigint: Callable[[], None] = lambda: None  # noqa: E731
#: Why a first use must not start the runtime by itself, once it must not.
_no_auto_init = participation.copied
_was_shut_down = False
#: Held while a runtime starts, so that the first uses of several threads start one.
_starting = threading.RLock()


@dataclass(frozen=True, slots=True)
class ClusterInfo:
    """What `init` started; as a context manager it ends it."""

    session: str
    num_cpus: float
    devices: list[str]
    host_memory: int
    #: Under the names that Ray has for them: "node_ip_address", "node_id", "session_dir"; also by `info["node_id"]`.
    address_info: dict[str, str]

    def __getitem__(self, name: str) -> str:
        return self.address_info[name]

    def disconnect(self) -> None:
        """End the runtime: the same as `shutdown`."""
        shutdown()

    def __enter__(self) -> ClusterInfo:
        return self

    def __exit__(self, *exception: object) -> None:
        shutdown()

    def __str__(self) -> str:
        devices = ", ".join(self.devices) or "no devices"
        return f"afield session {self.session}: {self.num_cpus:g} CPUs, {devices}, host store {format_bytes(self.host_memory)}"


def init(
    address: str | None = None,
    *,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    devices: str | int | None = None,
    resources: dict[str, float] | None = None,
    host_memory: int | str | None = None,
    spill_dir: str | None = None,
    namespace: str | None = None,
    runtime_env: Mapping[str, Any] | None = None,
    ignore_reinit_error: bool = False,
    log_to_driver: bool = True,
    **others: Any,
) -> ClusterInfo:
    """Start a runtime on this machine and connect to it as its driver.

    Args:
        address: None or "local" starts a runtime of our own.
        num_cpus: CPUs to schedule on; the machine's by default.
        num_gpus: checked against the devices that there are.
        devices: "emulated:2", "emulated:2:16GiB" (memory of each), "cuda", "cuda:2", "none"; AFIELD_DEVICES by default.
        resources: custom resources, name to amount.
        host_memory: capacity of the host store, in bytes or as text ("6GiB"); 30 % of the machine's by default.
        spill_dir: where the session keeps its files and spilled values; the system's temporary directory by default.
        namespace: names of actors are looked up in it.
        runtime_env: what tasks and actors run in unless they say otherwise: `env_vars`, `working_dir`, `py_modules`.
        ignore_reinit_error: return quietly if the runtime is running already.
        log_to_driver: show what workers print.
        others: `object_store_memory` for `host_memory` and `_temp_dir` for `spill_dir`; other arguments of Ray's `init` are
            accepted where they ask for nothing that is missing here, such as `include_dashboard=False`.

    Raises:
        AlreadyInitializedError: the runtime is running.
        InvalidOptionError: an argument is not valid.
        NoDeviceError: `num_gpus` exceeds the devices.
    """
    with _starting:
        if participation.participant is not None:
            if ignore_reinit_error and _session is not None:
                return _info(_session)
            raise AlreadyInitializedError(
                "afield is already initialised; call afield.shutdown() first, or pass ignore_reinit_error=True"
            )
        return _start(
            session_options(
                others,
                address=address,
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                devices=devices,
                resources=resources,
                host_memory=host_memory,
                spill_dir=spill_dir,
                namespace=namespace,
                log_to_driver=log_to_driver,
                runtime_env=runtime_env,
            )
        )


def _start(options: SessionOptions) -> ClusterInfo:
    global _session, _no_auto_init
    session = Session(options)
    _session, _no_auto_init = session, ""
    install(Facts(session.name, session.node_id, options.namespace, options.environment))
    devices = options.devices
    accelerators.prepare([device.uuid for device in devices], devices[0].kind if devices else "")
    _install_driver(session.participant)
    return _info(session)


def _info(session: Session) -> ClusterInfo:
    options = session.options
    address_info = {
        "node_ip_address": "127.0.0.1",
        "node_id": session.node_id,
        "session_dir": str(session.directory),
    }
    devices = [device.name for device in options.devices]
    return ClusterInfo(session.name, options.num_cpus, devices, options.store_bytes, address_info)


def _install_driver(participant: Participant) -> None:
    global _printer, _restore_sigint
    process = participant.process
    _printer = Printer(
        lambda size: _acknowledge(process, size),
        fold=os.environ.get("AFIELD_FOLD_OUTPUT") != "0",
        colour="NO_COLOR" not in os.environ,
    )
    post = _printer.post
    process.register(messages.Log, lambda channel, message: post(message))
    answer_questions(participant)
    process.requests.answer("stack", answer_activity(process.cores))
    participation.install(participant)
    _restore_sigint = process.pump.install_sigint()


def _acknowledge(process: Process, size: int) -> None:
    if not process.dead:
        process.locked(process.daemon.send, messages.Printed(size))


def auto_init(something_new: bool) -> None:
    """Initialise on first use; after `shutdown` again, as Ray does, if what is used is not of the runtime that ended."""
    with _starting:
        if _no_auto_init:
            raise NotInitializedError(_no_auto_init)
        if _was_shut_down and not something_new and participation.participant is None:
            raise NotInitializedError(
                "afield was shut down, and what belonged to that runtime went with it; make it again, or keep values"
            )
        if participation.participant is None:  # no other thread was faster
            init()


participation.starter = auto_init


def shutdown() -> None:
    """End the runtime: its processes, shared memory and sockets are gone when this returns. Does nothing without one."""
    global _printer, _session, _restore_sigint, _was_shut_down
    session, _session = _session, None  # only one thread ends it
    participant = participation.participant
    if session is None or participant is None:
        return
    # As soon as this one is not installed any more, another thread may start the next, which has its own.
    printer, _printer = _printer, None
    restore_sigint, _restore_sigint = _restore_sigint, lambda: None
    process = participant.process
    _was_shut_down = True
    try:
        if not process.dead:
            ended = Waiter()
            process.expect_end(ended.finish)
            process.locked(process.daemon.send, messages.Shutdown())
            process.locked(process.fail_everything, SHUT_DOWN)
            process.pump.wait_for(ended, END_WITHIN_S)
    finally:  # also if the user presses Ctrl-C once more
        accelerators.prepare((), "")
        participation.install(None)
        participant.close()
        session.end()
    if printer is not None:
        printer.close(LAST_LINES_S)
    restore_sigint()


def _at_exit() -> None:
    global _no_auto_init
    _no_auto_init = "the interpreter is about to end, and has shut afield down"
    shutdown()


atexit.register(_at_exit)


def _after_fork_in_child() -> None:
    """A copy of a driver has no session; `participation` has seen to the rest by now, as it was imported first."""
    global _printer, _session, _no_auto_init, _starting
    _starting = threading.RLock()
    if participation.copied:
        if _session is not None:
            _session.abandon()
        _session = _printer = None
        _no_auto_init = participation.copied


os.register_at_fork(after_in_child=_after_fork_in_child)


def is_initialized() -> bool:
    """Tell whether the runtime is running."""
    return participation.participant is not None
