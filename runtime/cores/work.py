"""The calls at a worker, and how they are cancelled: a core.

Theory of operation. A call is what one push asks for: a task, or a call of an actor's method. It waits in `queue` until the
main thread takes it; where an actor runs several calls at once they are in `open` instead, and the way in which they run
decides when each begins. `TABLE` says what may happen to a call. Its phase (`state`) and its cancellation (`cancel`) are two
attributes, because two threads write them: the phase belongs to the thread that runs the call, the cancellation to whoever
handles messages. What a cancellation does depends on where the call is:

- It waits: it never starts, and is answered for at once.
- It is being prepared, runs, or its result is being pickled: it is interrupted there, once. Whatever it does about that, it
  ends as cancelled: who has cancelled a call never gets a value that was made after it.
- Its outcome is there, or it is known no more: nothing.

**Who may write what.** Everything here is called under the process's lock (`pump.lock`), but for what lies on the path of
each small task, which is the main thread's alone and takes no lock: `take`, `current`, and the phase of the call that it has
taken. That is sound because of these:

1. A call belongs to whoever gets it out of the deque. `append`, `popleft`, `pop` and `remove` are single operations in C that
   run no Python code (calls are compared by identity), so the interpreter's lock makes them atomic: of the main thread and a
   thread that cancels or recalls exactly one gets the call.
2. Between `popleft` and the store to `current` a call is in neither. Whoever cancels looks into the queue first and at
   `current` second. Finding it in neither and `current` empty, he leaves the name in `missed` and looks at `current` once
   more; the main thread stores `current` first and looks into `missed` second. So one of the two sees the other.
3. An interrupt is a signal, and handled late: its handler runs in the main thread and asks `may_interrupt` at that moment.
   `due` names one call, which is interrupted only while it is `current` and in a phase in which that can be. So a signal that
   comes after its call has ended does nothing, and no other cancellation can take its place: it does not name another call.

The phases on the main thread's path are plain stores; the table is consulted on all rarer ways, by `validate`, and for the
diagram. The recorder notes what is not on that path.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

from afield.machines import FlightRecorder, Table

QUEUED = "queued"
PREPARING = "preparing"
RUNNING = "running"
FINISHING = "finishing"
FAILING = "failing"
REPLYING = "replying"
ANSWERED = "answered"
CANCELLED = "cancelled"
HANDED_BACK = "handed_back"
DROPPED = "dropped"

TABLE = Table(
    "call at a worker",
    QUEUED,
    {
        (QUEUED, "start"): PREPARING,
        (QUEUED, "cancel"): CANCELLED,
        (QUEUED, "recall"): HANDED_BACK,
        (QUEUED, "block"): HANDED_BACK,
        (QUEUED, "caller gone"): DROPPED,
        (QUEUED, "actor leaves"): DROPPED,
        (PREPARING, "run"): RUNNING,
        (RUNNING, "return"): FINISHING,
        (PREPARING, "raise"): FAILING,
        (RUNNING, "raise"): FAILING,
        (FINISHING, "raise"): FAILING,
        (FINISHING, "encode"): REPLYING,
        (FAILING, "encode"): REPLYING,
        (REPLYING, "answer"): ANSWERED,
        (REPLYING, "answer as cancelled"): CANCELLED,
        (PREPARING, "cancel"): PREPARING,
        (RUNNING, "cancel"): RUNNING,
        (FINISHING, "cancel"): FINISHING,
        (FAILING, "cancel"): FAILING,
        (REPLYING, "cancel"): REPLYING,
    },
    {
        QUEUED: "waits for its turn",
        PREPARING: "its function and arguments are rebuilt, which may run code of the user's",
        RUNNING: "the user's code runs",
        FINISHING: "what it returned is pickled and stored, what it keeps of its arguments is noted",
        FAILING: "it raised: the error is made into a reply",
        REPLYING: "the reply is there, nothing interrupts it any more; a cancelled call's outcome is replaced now",
        ANSWERED: "the reply is queued",
        CANCELLED: "answered with TaskCancelledError",
        HANDED_BACK: "its caller has it again, to push it elsewhere",
        DROPPED: "never starts and has no answer: nobody is there who waits for one, or the daemon tells him",
    },
)

#: In these phases an interrupt is raised: code of the user's may be running.
INTERRUPTIBLE = frozenset([PREPARING, RUNNING, FINISHING])
#: In these a call has been started and not been answered.
STARTED = frozenset([PREPARING, RUNNING, FINISHING, FAILING, REPLYING])

# What whoever handles a cancellation has to do.
NOTHING, ANSWER, INTERRUPT, FLAGGED = "nothing", "answer", "interrupt", "flagged"

#: `validate` looks at no more calls of each kind.
MAX_VALIDATED = 1000

Key = tuple[Any, int]


class Call(Protocol):
    """What the core knows of a call."""

    #: The phase; written by the thread that has the call.
    state: str
    #: The request to cancel it, None while there is none; written once, by whoever handles messages.
    cancel: Any

    @property
    def caller(self) -> Any:
        """Who has pushed it: the same object for all calls of one caller."""

    @property
    def sequence(self) -> int:
        """Its number, unique among the calls of its caller."""


C = TypeVar("C", bound=Call)


class Work(Generic[C]):
    """All calls of one worker that are not answered."""

    __slots__ = ("blocked", "concurrent", "current", "due", "left", "missed", "open", "queue", "recorder")

    def __init__(self) -> None:
        #: Calls that wait for the main thread, the oldest first.
        self.queue: deque[C] = deque()
        #: The call that the main thread has taken, from PREPARING until it is answered.
        self.current: C | None = None
        #: Cancellations of calls that were not found while the main thread may have been taking one.
        self.missed: dict[Key, Any] = {}
        #: The call that the next interrupt is for.
        self.due: C | None = None
        #: An actor runs several calls at once here; they are in `open`.
        self.concurrent = False
        #: Calls of such an actor that wait or have been started.
        self.open: dict[Key, C] = {}
        #: The current call waits inside its code: what came behind it was handed back.
        self.blocked = False
        #: This worker's actor ends by its own will, or has ended: nothing starts here any more.
        self.left = False
        self.recorder = FlightRecorder()

    # -- pushes arrive and start ---------------------------------------------------------------------------------

    def arrived(self, call: C) -> bool:
        """A push arrived; return False if it will never start here."""
        if self.left:
            self._move(call, "actor leaves")
            return False
        if self.concurrent:
            self.open[call.caller, call.sequence] = call
        else:
            self.queue.append(call)
        return True

    def take(self) -> C:
        """Take the oldest call for the main thread; `IndexError` if there is none. Takes no lock: see 1 and 2 above."""
        call = self.current = self.queue.popleft()
        if self.missed:
            self._look_into_missed(call)
        return call

    def _look_into_missed(self, call: C) -> None:
        missed, self.missed = self.missed, {}
        request = missed.get((call.caller, call.sequence))
        if request is not None and call.cancel is None:
            call.cancel = request
            self.recorder.note((call.caller, call.sequence, "cancelled while it was taken"))

    def start(self, call: C) -> bool:
        """One of several concurrent calls has its turn; return False if it must not start any more."""
        if call.state != QUEUED:
            return False
        call.state = TABLE.after(QUEUED, "start", call.sequence)
        return True

    def ended(self, call: C) -> None:
        """A concurrent call is answered, or will never be."""
        self.open.pop((call.caller, call.sequence), None)

    def find(self, caller: Any, sequence: int) -> C | None:
        """Return a call that has started, or (of a concurrent actor) waits."""
        current = self.current
        if current is not None and current.sequence == sequence and current.caller is caller:
            return current
        return self.open.get((caller, sequence))

    # -- calls leave before they have started --------------------------------------------------------------------

    def recall(self, caller: Any, count: int) -> list[int]:
        """Take up to `count` of the newest waiting calls of a caller out; return their numbers, the oldest first."""
        taken: list[int] = []
        for call in reversed(list(self.queue)):
            if len(taken) >= count:
                break
            if call.caller is caller and self._claim(call, "recall"):
                taken.append(call.sequence)
        return taken[::-1]

    def block(self) -> dict[Any, list[int]]:
        """The current call waits inside its code: take all waiting calls out, as it may wait for one; caller -> numbers."""
        assert self.current is not None
        taken: dict[Any, list[int]] = {self.current.caller: []}
        for call in list(self.queue):
            if self._claim(call, "block"):
                taken.setdefault(call.caller, []).append(call.sequence)
        self.blocked = True
        self.recorder.note((self.current.sequence, "blocks; handed back", sum(map(len, taken.values()))))
        return taken

    def unblock(self) -> bool:
        """The current call computes again; return False if it was not blocked."""
        was, self.blocked = self.blocked, False
        return was

    def callers(self) -> list[Any]:
        """Return all who have calls that wait here."""
        return list({call.caller: None for call in [*list(self.queue), *self.open.values()]})

    def caller_gone(self, caller: Any) -> list[C]:
        """A caller is gone: return those of its calls that were waiting, which never start; what has started goes on."""
        waiting = [call for call in list(self.queue) if call.caller is caller]
        dropped = [call for call in waiting if self._claim(call, "caller gone")]
        for key in [key for key, call in self.open.items() if call.caller is caller and call.state == QUEUED]:
            call = self.open.pop(key)
            self._move(call, "caller gone")
            dropped.append(call)
        return dropped

    def leave(self) -> list[C]:
        """The actor ends by its own will: return what was waiting for the main thread and never starts."""
        self.left = True
        return [call for call in list(self.queue) if self._claim(call, "actor leaves")]

    def _claim(self, call: C, event: str) -> bool:
        """Get a call out of the queue before the main thread does; return False if it was quicker."""
        try:
            self.queue.remove(call)
        except ValueError:
            return False
        self._move(call, event)
        return True

    def _move(self, call: C, event: str) -> None:
        call.state = TABLE.after(call.state, event, call.sequence, self.recorder)

    # -- cancelling ----------------------------------------------------------------------------------------------

    def cancel(self, caller: Any, sequence: int, request: Any) -> tuple[C | None, str]:
        """A call is to be cancelled; return it, if it is here, and what is to be done.

        ANSWER: it never starts; answer for it. INTERRUPT: the main thread runs it: raise the signal. FLAGGED: it has started
        and will end as cancelled; if it runs beside others, interrupt it as that can be. NOTHING: it was cancelled before,
        or is not here (any more).
        """
        for call in list(self.queue):
            if call.sequence == sequence and call.caller is caller:
                if self._claim(call, "cancel"):
                    call.cancel = request
                    return call, ANSWER
                break  # the main thread took it at this moment
        current = self.current
        if current is None and not self.concurrent:
            self.missed[caller, sequence] = request
            current = self.current
        if current is not None and current.sequence == sequence and current.caller is caller:
            return self._cancel_started(current, request)
        waiting = self.open.get((caller, sequence))
        if waiting is None:
            return None, NOTHING
        if waiting.state != QUEUED:
            return self._cancel_started(waiting, request)
        del self.open[caller, sequence]
        waiting.cancel = request
        self._move(waiting, "cancel")
        return waiting, ANSWER

    def _cancel_started(self, call: C, request: Any) -> tuple[C, str]:
        state = call.state
        if call.cancel is not None or (state not in STARTED and state != QUEUED):
            return call, NOTHING
        call.cancel = request
        self.recorder.note((call.caller, call.sequence, "cancel", state))
        if call is not self.current:
            return call, FLAGGED
        self.due = call
        return call, INTERRUPT

    def started(self) -> list[C]:
        """Return the calls that have started and have not ended, in whatever thread."""
        return [call for call in [self.current, *self.open.values()] if call is not None and call.state in STARTED]

    def may_interrupt(self) -> bool:
        """Tell whether the main thread is to be interrupted where it is; the answer lasts only in that thread itself."""
        call = self.current
        return call is not None and call is self.due and call.state in INTERRUPTIBLE

    def take_interrupt(self) -> bool:
        """Tell the same, and that it is interrupted now: a call is interrupted once."""
        if not self.may_interrupt():
            return False
        self.due = None
        return True

    # -- looking at it -------------------------------------------------------------------------------------------

    def validate(self) -> list[str]:
        """Return what is wrong with the state, nothing if all is well. The caller holds the lock; the main thread may run."""
        complaints = []
        for call in islice(list(self.queue), MAX_VALIDATED):
            state = call.state
            if state != QUEUED and call in self.queue:  # otherwise it was taken at this moment
                complaints.append(f"call {call.sequence} is in the queue, and {state}")
            if call.cancel is not None and call in self.queue:
                complaints.append(f"call {call.sequence} is cancelled and in the queue")
        for (caller, sequence), call in islice(list(self.open.items()), MAX_VALIDATED):
            if call.caller is not caller or call.sequence != sequence:
                complaints.append(f"call {call.sequence} is known as {sequence}")
            if call.state in (HANDED_BACK, DROPPED) or (call.state == QUEUED and call.cancel is not None):
                complaints.append(f"call {sequence} is open, and {call.state}")
        if self.open and not self.concurrent:
            complaints.append(f"{len(self.open)} calls are open where one runs at a time")
        if self.queue and self.concurrent:
            complaints.append(f"{len(self.queue)} calls wait for the main thread, which takes none")
        due, current = self.due, self.current
        if due is not None and due.cancel is None:
            complaints.append(f"an interrupt is due for call {due.sequence}, which is not cancelled")
        if current is not None and current.state in (HANDED_BACK, DROPPED):
            complaints.append(f"call {current.sequence} runs, and is {current.state}")
        if self.blocked and current is None:
            complaints.append("blocked, though nothing runs")
        return complaints
