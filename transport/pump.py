"""Who drives a process's loop: whichever thread waits for a result, else a standby thread.

Theory of operation. A hand-over between threads costs as much as a whole task, so the thread that blocks in `get` drives
the loop itself (it *leads*) and finds its result without any hand-over. Only while no thread waits does the standby
thread lead, so that a process also answers others while its own code computes.

- `_leader` is held by the foreground thread that drives the loop. Other foreground threads wait on a lock of their own,
  which the leader releases when their waiter is done or the lead becomes free.
- The standby thread looks every `TICK_S` whether the foreground has stopped driving (a long task, a computing driver) and
  then blocks on the loop itself, and on a descriptor of its own through which a foreground thread that comes back sends it
  away. Nobody waits until it has gone: events are level-triggered and handled under `lock`, so whoever comes second finds
  nothing left to do; and if it was the standby thread that came first, it kicks the leader, who may be waiting for just that.
- When nothing happens the standby thread sleeps until it is called: an idle process uses no CPU.

SIGINT: where `interrupts` does not allow a KeyboardInterrupt it is held back, and comes as soon as it may: at the next wait
(`deliver`), or in the code that our caller goes on with, where a reminder finds it.

User code that runs inside of ours on the same thread (a signal handler, `__del__` called by the collector) may use afield
again. If this thread leads, it waits in the loop by now: the lead is a lock that can be taken again, the inner wait drives the
loop as the outer one did, and wakes that up afterwards, since it may have handled what the outer one waits for. If this thread
is in the midst of a transition, nothing can be answered before that has ended: `refuse_reentry` raises `ReentrantUseError`.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType

from afield.errors import ReentrantUseError
from afield.transport.interrupts import interruptible, is_fault, is_protected, uninterruptible
from afield.transport.loop import Loop

#: How often the standby thread looks while the process is active.
TICK_S = 0.005
#: After this many ticks without any activity the standby thread sleeps until it is called.
IDLE_TICKS = 20
#: A KeyboardInterrupt that was held back comes after this time at the latest, once it may.
REMIND_S = 0.005
#: `close` waits this long for the thread that drives the loop; it is late only if `close` was called from its own handlers.
LEAVE_S = 1.0


class Waiter:
    """What a foreground thread waits for; `done` is set, under the pump's lock, by whoever fulfils it."""

    __slots__ = ("_signal", "done", "leader", "leads", "parked")

    def __init__(self) -> None:
        #: The loop that its thread drives while it waits, and that thread; None while it does not.
        self.leads: Loop | None = None
        self.leader = 0
        self.done = False
        self.parked = False
        self._signal: threading.Lock | None = None

    def finish(self) -> None:
        """Mark as done and wake the thread if it sleeps."""
        self.done = True
        if self.parked:
            self.nudge()
        elif self.leads is not None and self.leader != threading.get_ident():
            self.leads.kick()  # its thread sleeps in the loop, and this thread is another

    @interruptible
    def park(self, timeout_s: float) -> None:
        """Sleep until nudged or the time is over."""
        if self._signal is None:
            self._signal = threading.Lock()
            self._signal.acquire()
        self.parked = True
        if not self.done:
            self._signal.acquire(timeout=timeout_s)
        self.parked = False

    def nudge(self) -> None:
        """Wake the parked thread; spurious wakes are allowed."""
        if self._signal is not None and self._signal.locked():
            try:
                self._signal.release()
            except RuntimeError:
                pass  # two nudges at once


class Pump:
    """Drives `loop` for all threads of a process.

    Args:
        loop: the loop of the process.
        after_events: called under the lock after each round of handlers, before flushing.
        expecting: tells whether messages are likely to come soon; otherwise the standby thread lets some time pass before
            it leads, because sending it away again costs the next call a little.
        due_in: seconds until `after_events` has to be called again even if nothing happens; None for never.
    """

    def __init__(
        self,
        loop: Loop,
        after_events: Callable[[], None],
        due_in: Callable[[], float | None],
        expecting: Callable[[], bool] = lambda: True,
    ) -> None:
        self.loop = loop
        self.lock = threading.RLock()
        #: Tells whether this thread is in the midst of a transition, which user code then has interrupted.
        self.in_transition: Callable[[], bool] = self.lock._is_owned  # type: ignore[attr-defined]
        self._after_events = after_events
        self._due_in = due_in
        self._expecting = expecting
        self._leader = threading.RLock()
        self._leads = 0  # how deep, in its holder
        self._followers: deque[Waiter] = deque()
        self._foreground = 0
        self._rounds = 0
        self._closed = False
        self._make_way = False
        #: Left by transitions for the time after them, when no lock is held: they may run code of the user's.
        self.callbacks: deque[Callable[[], None]] = deque()
        #: A SIGINT came inside a transition; whoever sees it calls `deliver`.
        self.interrupted = False
        #: Called if handling what arrived ends by an exception of ours, in whichever thread.
        self.on_crash: Callable[[BaseException], None] = lambda error: None
        self._reminding = False
        self._has_reminder = False
        #: Whether what is held back is still to be raised; True uses the interrupt up. A worker interrupts one call once.
        self.take_interrupt: Callable[[], bool] = lambda: True
        #: True while the standby thread blocks in the loop, so that state left for it needs a kick.
        self.standby_leads = False
        self._standby_kicked = False
        self.standby_sleeps = False
        self._standby_wake = threading.Lock()
        self._standby_wake.acquire()
        self._standby_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._standby_poller = select.poll()
        self._standby_poller.register(loop.fileno(), select.POLLIN)
        self._standby_poller.register(self._standby_fd, select.POLLIN)
        self._standby = threading.Thread(target=self._stand_by, name="afield-pump", daemon=True)

    def start(self) -> None:
        """Start the standby thread."""
        self._standby.start()

    # -- the foreground ------------------------------------------------------------------------------------------

    def wait_for(self, waiter: Waiter, timeout_s: float | None = None) -> bool:
        """Drive the loop until `waiter.done`; return False if the time was over first."""
        self.refuse_reentry()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._foreground += 1
        try:
            while not waiter.done and not self._closed:
                if self.interrupted:
                    self.deliver()
                remaining = self._due_in()
                left = None
                if deadline is not None:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        break
                    remaining = left if remaining is None else min(left, remaining)
                if not self._lead(remaining, waiter):
                    self._follow(waiter, left)  # what is due is the leader's business
        finally:
            self._foreground -= 1
            if self._followers:
                self._pass_lead()
            if self.standby_sleeps:
                self._call_standby()
        return waiter.done

    def poll(self) -> None:
        """Handle what has already arrived, without blocking; the standby thread is asked to make way."""
        if not self.in_transition():  # else a user's event loop runs in a signal handler, say
            self._lead(0)

    def _lead(self, timeout_s: float | None, waiter: Waiter | None = None) -> bool:
        """Take the lead for one round; return False if another thread has it."""
        if not self._leader.acquire(False):
            return False
        self._leads += 1
        try:
            if self.standby_leads and not self._make_way:
                self._dismiss_standby()
            if waiter is not None:
                waiter.leader, waiter.leads = threading.get_ident(), self.loop
                if waiter.done:  # by somebody who did not see that this thread leads, and kicks nobody
                    timeout_s = 0
            self._round(timeout_s)
        finally:
            if waiter is not None:
                waiter.leads = None
            self._leads -= 1
            if self._leads:
                self.loop.kick()  # the outer wait of this thread sleeps, and what it waits for may be done
            self._leader.release()
        if self.callbacks:
            self.run_callbacks()
        return True

    def refuse_reentry(self) -> None:
        """Raise if this thread is in the midst of a transition: user code has interrupted it, and cannot wait for it.

        Raises:
            ReentrantUseError: it is.
        """
        if self.in_transition():
            raise ReentrantUseError(
                "afield was used by code that has interrupted afield itself on the same thread (a signal handler, or __del__ "
                "called by the garbage collector), in the midst of a change of its state. Do it later: let the handler "
                "set a flag or wake another thread, give what is to be freed to a thread or an explicit close()"
            )

    def run_callbacks(self) -> None:
        """Run what transitions have left; the caller holds no lock.

        None is lost to an interrupt: it may come in them, where they say so, and not between them.
        """
        while self.callbacks:
            try:
                callback = self.callbacks.popleft()
            except IndexError:  # another thread took it
                return
            callback()

    def _follow(self, waiter: Waiter, left_s: float | None) -> None:
        self._followers.append(waiter)
        try:
            # The bound covers the moment between a leader's last look at the followers and our joining them.
            waiter.park(0.05 if left_s is None else min(0.05, left_s))
        finally:
            waiter.parked = False
            with contextlib.suppress(ValueError):
                self._followers.remove(waiter)

    def _pass_lead(self) -> None:
        try:
            self._followers[0].nudge()
        except IndexError:
            pass

    def _round(self, timeout_s: float | None) -> None:
        """Wait once and handle what came; the caller holds `_leader`."""
        events = self.loop.wait(timeout_s)
        self._rounds += 1
        try:
            self._handle(events)
        except BaseException as error:
            if is_fault(error):
                self.on_crash(
                    error
                )  # as in the standby thread: of what had arrived a part is lost, and others wait for it
            raise
        if self.interrupted:
            self.deliver()

    @uninterruptible
    def _handle(self, events: list[tuple[int, int]]) -> None:
        loop = self.loop
        with self.lock:
            loop.run(events)
            self._after_events()
            if loop.dirty:
                loop.flush()

    # -- SIGINT --------------------------------------------------------------------------------------------------

    def deliver(self) -> None:
        """Raise the KeyboardInterrupt that was held back, in the main thread."""
        if self.interrupted and threading.current_thread() is threading.main_thread():
            self.interrupted = False
            if self.take_interrupt():
                raise KeyboardInterrupt

    def install_sigint(self) -> Callable[[], None]:
        """Defer KeyboardInterrupt out of transitions; return what puts the old handler back.

        Does nothing outside the main thread or where the program has its own handler.
        """
        if threading.current_thread() is not threading.main_thread():
            return lambda: None
        present = signal.getsignal(signal.SIGINT)
        # A runtime that was shut down by another thread could not take its handler back.
        left_over = getattr(present, "__func__", None) is Pump.on_sigint
        if present is not signal.default_int_handler and not left_over:
            return lambda: None

        handler = self.on_sigint

        def restore() -> None:
            in_main = threading.current_thread() is threading.main_thread()
            if in_main and signal.getsignal(signal.SIGINT) is handler:
                signal.signal(signal.SIGINT, signal.default_int_handler)

        signal.signal(signal.SIGINT, handler)
        return restore

    def on_sigint(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGINT: raise KeyboardInterrupt now, or as soon as it may come."""
        reminder, self._reminding = self._reminding, False
        if not reminder or self.interrupted:
            self.interrupt(frame)

    def interrupt(self, frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt in the main thread, whose frame this is, or hold it back where it must not come."""
        if is_protected(frame):
            self.interrupted = True
            self.loop.kick()  # it may be about to wait: then that is over now
            # Not every caller of ours looks, and `__del__` has none that could.
            if not self._has_reminder:
                self._has_reminder = True
                try:
                    _thread.start_new_thread(self._remind, ())
                except RuntimeError:  # no threads are left; it comes with the next wait
                    self._has_reminder = False
        else:
            self.interrupted = False
            if self.take_interrupt():
                raise KeyboardInterrupt

    def _remind(self) -> None:
        """Interrupt the main thread again until it has raised: a signal just before a system call does not cut that short."""
        while self._has_reminder:
            time.sleep(REMIND_S)
            if self._is_held_back():
                self._reminding = True
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            else:
                self._has_reminder = False
                if self._is_held_back():  # one came meanwhile, and counts on us
                    self._has_reminder = True

    def _is_held_back(self) -> bool:
        return self.interrupted

    @contextlib.contextmanager
    def driven_elsewhere(self) -> Iterator[None]:
        """While an event loop of the user's watches `Loop.fileno` and calls `poll`, the standby thread stays away."""
        self._foreground += 1
        try:
            yield
        finally:
            self._foreground -= 1

    # -- the standby thread --------------------------------------------------------------------------------------

    def wake_standby(self) -> None:
        """Make sure that some thread looks at what was just left for the loop; safe in `__del__`."""
        if self.standby_leads:
            self._kick_standby()
        elif self.standby_sleeps:
            self._call_standby()

    def _call_standby(self) -> None:
        self.standby_sleeps = False
        try:
            self._standby_wake.release()
        except RuntimeError:
            pass  # called twice before it woke

    def _kick_standby(self) -> None:
        if not self._standby_kicked:
            self._standby_kicked = True
            os.eventfd_write(self._standby_fd, 1)

    def _dismiss_standby(self) -> None:
        self._make_way = True
        self._kick_standby()

    def _stand_by(self) -> None:
        try:
            self._watch()
        except BaseException as error:
            # A bug: without this thread the process would stop answering, so everything that waits must be told.
            self.on_crash(error)
            raise

    def _watch(self) -> None:
        seen_rounds, quiet = -1, 0
        while not self._closed:
            if self._rounds != seen_rounds:
                quiet = 0
            elif self._foreground == 0 and (quiet > IDLE_TICKS or self._expecting() or self._due_in() == 0):
                self._lead_in_background()
                quiet = 0
            else:
                quiet += 1
                if self._foreground and self._due_in() == 0:
                    self.loop.kick()  # another thread left something while the leader blocks
            seen_rounds = self._rounds
            if quiet > IDLE_TICKS and self._foreground:
                quiet = 0
                self.standby_sleeps = True
                # Who leaves something, or goes, calls us from here on; what came between our look and the flag is seen now.
                if self._foreground and self._due_in() != 0:
                    self._standby_wake.acquire()
                self.standby_sleeps = False
            else:
                self._standby_wake.acquire(timeout=TICK_S)

    def _lead_in_background(self) -> None:
        self._make_way = False
        self._handle([])  # What was queued while nobody led must leave before we block.
        poller = self._standby_poller
        while not self._dismissed():
            self.standby_leads = True
            # Whoever leaves something for the loop kicks us from here on; `due_in` sees what came before.
            due = 0 if self._foreground else self._due_in()
            for fd, _ in poller.poll(None if due is None else due * 1000):
                if fd == self._standby_fd:
                    os.eventfd_read(fd)
                    self._standby_kicked = False  # after it, as in `Loop._absorb_kick`
            self.standby_leads = False
            if not self._dismissed():
                self._rounds += 1
                self._handle(self.loop.wait(0))
                if self._dismissed():
                    self.loop.kick()
                self.run_callbacks()

    def _dismissed(self) -> bool:
        return bool(self._foreground or self._make_way or self._closed)

    def close(self) -> None:
        """Stop driving; wakes every waiting thread. Does nothing the second time."""
        if self._closed:
            return
        self._closed = True
        self.loop.kick()
        self._kick_standby()
        self._call_standby()
        for waiter in list(self._followers):
            waiter.nudge()
        if self._standby.is_alive() and threading.current_thread() is not self._standby:
            self._standby.join(LEAVE_S)  # it may be in a callback of the user's; afterwards it touches nothing of ours
        if self.callbacks:
            # They are the user's, and may block: whoever closes us is not to wait for them longer than for that.
            last = threading.Thread(target=self.run_callbacks, name="afield-callbacks", daemon=True)
            last.start()
            last.join(LEAVE_S)
        # Whoever leads has been kicked: let it go before its descriptors are closed. The lead is never free again.
        self._leader.acquire(timeout=LEAVE_S)
        self._standby_kicked = True  # nothing is written any more to a descriptor that will be another file's
        os.close(self._standby_fd)
