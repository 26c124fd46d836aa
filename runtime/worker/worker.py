"""The main function of a worker process."""

from __future__ import annotations

import faulthandler
import os
import random
import sys
from functools import partial

import numpy as np

from afield.runtime.calls import participation
from afield.runtime.calls.participant import Participant
from afield.runtime.cores.work import RUNNING
from afield.runtime.process.configuration import ForkServerConfig, ProcessConfig
from afield.runtime.process.context import reset_root, running
from afield.runtime.process.environment import Environment
from afield.runtime.process.events import TICK
from afield.runtime.process.facts import Facts, install
from afield.runtime.process.stacks import RunningCall, answer_activity
from afield.runtime.tools.memory import answer_questions
from afield.runtime.values import accelerators
from afield.runtime.wire import messages
from afield.runtime.worker import ending
from afield.runtime.worker.executor import Executor
from afield.runtime.worker.output import WorkerStream
from afield.transport.channel import Channel

#: What a thread was writing to when it was to be flushed is looked at again after this time.
FLUSH_AGAIN_S = 0.01


def run_worker(config: ForkServerConfig, worker_id: bytes, variables: dict[str, str], encoded: bytes) -> None:
    """Serve the cluster until the daemon goes away, with these variables and this runtime environment."""
    environment = Environment.decode(encoded)
    environment.apply()
    os.environ.update(variables)
    os.environ["AFIELD_WORKER"] = worker_id.hex()
    reset_root()
    random.seed()
    np.random.seed()
    own = ProcessConfig.of_worker(variables)
    participant = Participant(config.session, own, worker_id)
    answer_questions(participant)
    executor = Executor(participant)
    named = [name for name, _ in environment.variables]
    executor.threads_by_cpus = config.session.threads_by_cpus and "OMP_NUM_THREADS" not in named
    process = participant.process
    activity = answer_activity(process.cores, lambda: _calls(executor), executor.coroutines)
    process.requests.answer("stack", activity)
    session, node_id, namespace = config.session.name, config.node_id.hex(), config.namespace
    install(Facts(session, node_id, namespace, environment, lambda: executor.assignment, executor.own_actor))
    participant.process.register(messages.Retire, partial(_retire, executor))

    def speaker() -> tuple[str, bytes]:
        task = running()
        return executor.running_name(), b"" if task is None else task.task_id

    out, err = WorkerStream(1, speaker), WorkerStream(2, speaker)

    def flush(now: float) -> float | None:
        if (out.unfinished or err.unfinished) and not (out.flush_if_free() & err.flush_if_free()):
            return now + FLUSH_AGAIN_S
        return None

    participant.process.subscribe(TICK, flush)
    vars(sys).update(stdout=out, __stdout__=out, stderr=err, __stderr__=err)
    faulthandler.enable(2)  # a crash in C code says where
    participation.install(participant)
    participant.values.parts.devices.prepare()
    accelerators.prepare(tuple(own.bound.values()), own.device_backend)
    participant.process.start()
    try:
        executor.run()
        if participant.process.dead:
            print(participant.process.dead, file=sys.stderr)  # nobody hears it if the daemon is gone
        elif executor.used:
            ending.end(executor.give_up_actor())
    finally:
        participation.install(None)


def _calls(executor: Executor) -> tuple[list[RunningCall], int]:
    """Return the calls that run here, and how many wait behind them."""
    work = executor.work
    calls = [
        RunningCall(each.name, each.task_id, "" if each.state == RUNNING else each.state) for each in work.started()
    ]
    return calls, len(work.queue)


def _retire(executor: Executor, channel: Channel, message: messages.Retire) -> None:
    """End this idle worker, unless somebody depends on it: no record of an object means that it holds and owes nothing."""
    process = executor.process
    if not message.later and (process.table.entries or executor.work.queue):
        channel.send(message)
        return

    def look(now: float) -> None:
        if not process.table.entries:
            executor.end()

    process.subscribe(TICK, look)  # after each event, so that waiting costs nothing
    look(0.0)
