"""The parts of a process, put together: what the public API and a worker's main function hold on to."""

from __future__ import annotations

from collections.abc import Callable

from afield.ids import TASK_ID_BYTES
from afield.runtime.calls.actor_calls import ActorCalls
from afield.runtime.calls.cancellation import Cancellation
from afield.runtime.calls.refusals import Refusals
from afield.runtime.calls.streams import Streams
from afield.runtime.calls.submission import Submitter
from afield.runtime.process.configuration import ProcessConfig, SessionConfig
from afield.runtime.process.events import LIFE_ENDED, RUNTIME_DEAD
from afield.runtime.process.process import Process
from afield.runtime.values.arguments import Arguments
from afield.runtime.values.definitions import Definitions
from afield.runtime.values.values import Values


class Participant:
    """A driver's or worker's process, its values, the tasks it submits and the actors it calls; arguments as of `Process`."""

    def __init__(
        self,
        config: SessionConfig,
        own: ProcessConfig,
        process_id: bytes,
        *,
        log_to_driver: bool = False,
        last_words: Callable[[], str] = lambda: "",
    ) -> None:
        #: Names this participant to those who outlive it, such as remote functions.
        self.key = object()
        self.process = Process(
            config,
            own,
            process_id,
            log_to_driver=log_to_driver,
            # A worker's messages are calls of others, of which it cannot know.
            expecting=self.expecting if own.kind == "driver" else lambda: True,
            last_words=last_words,
        )
        self.values = Values(self.process)
        self.definitions = Definitions(self.values)
        self.streams = Streams(self.process, self.values.blocking_wait)
        self.arguments = arguments = Arguments(self.process, self.values)
        self.submitter = Submitter(self.process, arguments, self.streams)
        self.actors = ActorCalls(self.process, self.submitter)
        Refusals(self.process, self.submitter, self.actors)
        self.cancellation = Cancellation(self.process, self.submitter, self.actors, self.streams)
        self.process.cores |= {"lanes": self.submitter.core, "actors": self.actors.core}
        self.process.subscribe(LIFE_ENDED, self._on_life_ended)
        self.process.subscribe(RUNTIME_DEAD, self.streams.fail_all)
        self.process.requests.answer("stats", lambda _: self.counters())

    def close(self) -> None:
        """Leave the cluster, and let go of the shared memory and of the tasks that will never end.

        Tasks and entries are hidden from the garbage collector, so the ring of references through them is cut by hand.
        """
        self.process.close()
        with self.process.pump.lock:  # other threads may be in the middle of a submission
            for lane in self.submitter.lanes.values():
                lane.close()
                for lease in lane.leases:
                    lease.inflight.clear()
        self.submitter.recovery.close()
        self.values.parts.close()

    def abandon(self) -> None:
        """Let go of the copies that a forked child has of what belongs to the process that it was forked from."""
        self.process.abandon()
        self.values.parts.pinner.forget()

    def counters(self) -> dict[str, float]:
        """Return what this process has counted."""
        store, devices = self.values.parts.store, self.values.parts.devices
        return {
            "tasks_submitted": self.submitter.tasks_submitted,
            "tasks_retried": self.submitter.tasks_retried,
            "tasks_recomputed": self.submitter.recovery.tasks_recomputed,
            "bytes_copied_in": store.bytes_copied_in,
            "bytes_shared": store.bytes_shared,
            "bytes_born": store.bytes_born,
            **devices.counters(),
        }

    def _on_life_ended(self, life: bytes) -> None:
        """Nothing holds the object any more that stands for an actor, or for the consumer of a stream."""
        if self.streams.get(life[:TASK_ID_BYTES]) is not None:
            self.cancellation.drop_stream(life)
        else:
            self.actors.end(life)

    def expecting(self) -> bool:
        """Tell whether the answer to a task or a call is on its way."""
        if any(lease.inflight for lease in list(self.submitter.leases.values())):
            return True
        if any(caller.pending for caller in list(self.actors.callers.values())):
            return True
        return self.submitter.core.any_waits()
