"""The parts of a process, put together: what the public API and a worker's main function hold on to."""

from __future__ import annotations

from afield.runtime.actor_calls import ActorCalls
from afield.runtime.process import Process, SessionConfig
from afield.runtime.submission import Submitter
from afield.runtime.values import Values


class Participant:
    """A driver's or worker's process, its values, its task submission and its actor calls."""

    def __init__(self, config: SessionConfig, process_id: bytes, kind: str, *, log_to_driver: bool = False) -> None:
        self.process = Process(config, process_id, kind, log_to_driver=log_to_driver)
        self.values = Values(self.process)
        self.submitter = Submitter(self.process, self.values)
        self.actors = ActorCalls(self.process, self.submitter)
