"""Values: put, get and wait."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from afield.errors import GetTimeoutError, ObjectLostError, RuntimeDiedError
from afield.gpu_store.client import ViewPin
from afield.ids import PUT_INDEX
from afield.runtime.cores.objects import FAILED, INLINE, LOCATED, PENDING, Entry, Obligation
from afield.runtime.process.context import calling_context, running
from afield.runtime.process.process import INLINE_BYTES, Process
from afield.runtime.process.refs import ObjectRef
from afield.runtime.process.serialization import Failure, Serialized, deserialize, dumps_plain, serialize
from afield.runtime.values.futures import ValueFuture
from afield.runtime.values.parts import Parts, PartsLostError, WouldBlockError
from afield.tracebacks import trim
from afield.transport.interrupts import uninterruptible
from afield.transport.pump import Waiter

#: How long a wait inside a task may last before the task gives its CPUs back.
MOMENT_S = 0.001


class Stream(Protocol):
    """What can stand among refs in `wait`: ready when its next item is there."""

    @property
    def id(self) -> bytes:
        """Names it among the refs."""

    def next_ready(self) -> bool:
        """Tell whether the next item is there."""

    def when_ready(self, notify: Callable[[], None]) -> bool:
        """Call `notify` once it is there; return True (and do not call) if it is there."""

    def stop_waiting(self, notify: Callable[[], None]) -> None:
        """Call `notify` no more."""


class Values:
    """The values of one process."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.table = process.table
        self.pump = process.pump
        self.parts = Parts(process, self._wait_for_answer)
        #: A worker sets these: what to do before and after a long wait inside a task.
        self.on_block: Callable[[bool], None] | None = None
        self.on_unblock: Callable[[], None] | None = None

    # -- values --------------------------------------------------------------------------------------------------

    def put(self, value: Any) -> ObjectRef:
        """Make an object of ours out of `value`."""
        self.process.check_usable()
        object_id = calling_context().next_task_id() + PUT_INDEX
        data = dumps_plain(value)
        large: Serialized | None = None
        refs: list[bytes] = []
        if data is None:
            serialized = serialize(value, "the value given to put()")
            refs = serialized.refs
            if not serialized.fits(INLINE_BYTES):
                large = serialized
            else:
                data = serialized.pack()
        elif len(data) > INLINE_BYTES:
            large = Serialized(data, [], [])
        return self.own(object_id, data, large, refs)

    @uninterruptible
    def own(self, object_id: bytes, data: bytes | None, large: Serialized | None, refs: list[bytes]) -> ObjectRef:
        """Enter a value of ours; what has been stored has a holder from here on, whatever interrupts."""
        kind: int = INLINE
        stored: Any = data
        if large is not None:
            kind, stored = LOCATED, self.parts.write(object_id, self.process.process_id, large, [])
        if refs:
            self.process.locked(self.table.put, object_id, kind, stored, refs)
        else:
            self.table.put(object_id, kind, stored, refs)
        if len(self.process.dropped) > 256:
            self.process.locked(self.process.after_events)
        return ObjectRef(object_id)

    def get(self, ref: ObjectRef, deadline: float | None, *, into: int | None = None) -> Any:
        """Return the value of `ref`, driving the loop until it is there; device arrays in arena `into`.

        Raises:
            GetTimeoutError: `deadline` (monotonic seconds) passed first.
        """
        while True:
            entry = self.table.entries.get(ref.id)
            if entry is None:
                raise ObjectLostError(f"{ref!r} belongs to a runtime that was shut down")
            if entry.state == PENDING or (entry.state == FAILED and self.table.is_postponed(ref.id)):
                self.wait_done(ref, deadline)
            try:
                return self.value_of(ref, entry, deadline, into=into)
            except PartsLostError as lost:
                self.process.locked(self.table.lost, ref.id, str(lost))
            # However often it is there again and lost by the time that it is read.
            if entry.state == LOCATED and deadline is not None and time.monotonic() >= deadline:
                raise GetTimeoutError(f"{ref!r} was lost, and is not there again in time")

    def _entry(self, ref: ObjectRef) -> Entry:
        """Return the entry of an object that is done; the runtime may have been shut down since it was."""
        entry = self.table.entries.get(ref.id)
        if entry is None:
            raise RuntimeDiedError(self.process.dead or "the runtime was shut down")
        return entry

    def get_all(self, refs: Sequence[ObjectRef], deadline: float | None, *, into: int | None = None) -> list[Any]:
        """Return the values of `refs`; raises as soon as one of them has failed, whatever the others do."""
        entries = self.table.entries
        values: list[Any] = []
        failed: list[bytes] = []
        waiting: list[Waiter] = []
        ids: set[bytes] = set()
        watching = False

        def tell(object_id: bytes) -> None:
            if object_id in ids:
                failed.append(object_id)
                for waiter in waiting:
                    waiter.finish()

        try:
            for index, ref in enumerate(refs):
                entry = entries.get(ref.id)
                if entry is not None and entry.state == PENDING and index + 1 < len(refs):
                    if not watching:  # the first that has to be waited for: from here on, each of the rest may fail
                        watching = True
                        ids.update(other.id for other in refs[index:])
                        self.process.locked(self.table.watch_for_failures, ids, tell)
                    waiting[:] = [Waiter()]
                    if not failed:
                        self.wait_done(ref, deadline, waiting[0])
                    if failed:
                        self.process.locked(self.table.stop_waiting, ref.id, waiting[0].finish)
                        first = next(other for other in refs if other.id == failed[0])
                        self.get(first, deadline, into=into)  # raises, unless it is made again by now
                        failed.clear()
                values.append(self.get(ref, deadline, into=into))
                ids.discard(ref.id)
        finally:
            if watching:
                self.process.locked(self.table.on_failed.remove, tell)
        return values

    def wait_done(self, ref: ObjectRef, deadline: float | None, waiter: Waiter | None = None) -> None:
        """Block until the value of `ref` is there, or somebody else finishes the waiter."""
        waiter = waiter or Waiter()
        finish = waiter.finish
        if self.process.locked(self.table.when_done, ref.id, finish):
            return
        try:
            if not self.blocking_wait(waiter, deadline):
                if self.process.dead:
                    raise RuntimeDiedError(self.process.dead)
                raise GetTimeoutError(f"{ref!r} was not ready in time; its task goes on")
        finally:
            if not waiter.done:
                self.process.locked(self.table.stop_waiting, ref.id, finish)

    def _wait_for_answer(self, waiter: Waiter, deadline: float | None, for_store: bool) -> bool:
        return self.blocking_wait(waiter, deadline, for_store=for_store)

    def blocking_wait(self, waiter: Waiter, deadline: float | None, *, for_store: bool = False) -> bool:
        """Wait for `waiter`; inside a task, give up its CPUs if it takes longer than a moment."""
        if self.on_block is None or running() is None:
            return self.pump.wait_for(waiter, None if deadline is None else deadline - time.monotonic())
        moment = MOMENT_S if deadline is None else min(MOMENT_S, deadline - time.monotonic())
        if self.pump.wait_for(waiter, moment):
            return True
        self.on_block(for_store)
        try:
            return self.pump.wait_for(waiter, None if deadline is None else deadline - time.monotonic())
        finally:
            assert self.on_unblock is not None
            self.on_unblock()

    def future(self, ref: ObjectRef) -> Future[Any]:
        """Return a future that is completed with the value; its callbacks run on whatever thread completes it."""
        future = ValueFuture(lambda: self.value_of(ref, self._entry(ref), blocking=False), lambda: self.get(ref, None))
        if self.process.locked(self.table.when_done, ref.id, lambda: self.pump.callbacks.append(future.complete)):
            future.complete()
        return future

    async def result(self, ref: ObjectRef) -> Any:
        """Wait for the value on the running event loop, without blocking it."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not done.done():
                done.set_result(None)

        def notify() -> None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits any more
                loop.call_soon_threadsafe(wake)

        if not self.process.locked(self.table.when_done, ref.id, notify):
            try:
                await done
            finally:
                if not done.done() or done.cancelled():
                    self.process.locked(self.table.stop_waiting, ref.id, notify)
        try:
            try:
                return self.value_of(ref, self._entry(ref), blocking=False)
            except (WouldBlockError, PartsLostError):  # `get` waits for either
                return await loop.run_in_executor(None, self.get, ref, None)
        except BaseException as error:
            trim(error)
            raise

    def value_of(
        self,
        ref: ObjectRef,
        entry: Entry,
        deadline: float | None = None,
        *,
        into: int | None = None,
        blocking: bool = True,
    ) -> Any:
        """Rebuild the value of a finished entry, or raise the error that it is.

        Raises:
            PartsLostError: it has to be made again.
            WouldBlockError: it has to be brought here first, and the caller must not wait (`blocking`).
        """
        object_id = ref.id
        if entry.state == INLINE and not entry.value:
            return None
        if entry.state == PENDING:  # it was lost since somebody looked
            raise PartsLostError("the value was lost")
        on_ref = self._on_ref_in(object_id)
        if entry.state != LOCATED:
            if entry.state == FAILED:
                try:
                    value = deserialize(entry.value, "the value", on_ref)
                    raise value
                finally:
                    value = None  # else it refers to itself, by way of this frame, and keeps what all its frames have
            return deserialize(entry.value, "the value", on_ref)
        value, location = self.parts.read(
            object_id,
            entry.value,
            "the value",
            on_ref,
            self._view_pins_of(object_id, entry),
            into=into,
            deadline=deadline,
            blocking=blocking,
        )
        if location is not entry.value:
            self.table.moved(entry, location)
        if type(value) is Failure:
            try:
                raise value.error
            finally:
                value = None
        return value

    def _on_ref_in(self, container: bytes) -> Callable[[bytes, bytes], None]:
        def on_ref(object_id: bytes, owner: bytes) -> None:
            self.process.locked(self.table.receive, object_id, owner, Obligation(container=container))

        return on_ref

    def _view_pins_of(self, object_id: bytes, entry: Entry) -> Callable[[int], ViewPin]:
        """Return what makes the view pins of a value's parts: each counts as a handle of the object."""

        @uninterruptible
        def view_pin(slot: int) -> ViewPin:
            self.table.add_handle(entry)
            return self.parts.view_pin(slot, object_id)

        return view_pin

    def array_here(self, host: Any) -> Any:
        """Return a host array as an array of this process's device, or as it is where there is none."""
        devices = self.parts.devices
        return devices.module().asarray(host) if devices.bound else host

    def wait(
        self, refs: Sequence[ObjectRef | Stream], ids: list[bytes], num_returns: int, deadline: float | None
    ) -> tuple[list[Any], list[Any]]:
        """Return (ready, not ready), both in the order given, once `num_returns` are ready or the time is over."""
        self.pump.refuse_reentry()
        ready = self._first_ready(refs, ids, num_returns)
        # More than once where a value is lost again before all are there.
        again = True
        while len(ready) < num_returns and again:
            again = self._wait_for(refs, num_returns, deadline)
            ready = self._first_ready(refs, ids, num_returns)
        rest: list[Any] = []
        start = 0
        for index in ready:
            rest += refs[start:index]
            start = index + 1
        rest += refs[start:]
        return [refs[index] for index in ready], rest

    def _first_ready(self, refs: Sequence[ObjectRef | Stream], ids: list[bytes], limit: int) -> list[int]:
        """Return the positions of the first `limit` refs that are ready."""
        entries = self.table.entries
        ready: list[int] = []
        for index, object_id in enumerate(ids):
            entry = entries.get(object_id)
            if entry is None or entry.life:
                if entry is not None and not self._is_ready(refs[index], None):
                    continue
            elif entry.state == PENDING:
                continue
            ready.append(index)
            if len(ready) == limit:
                break
        return ready

    def _wait_for(self, refs: Sequence[ObjectRef | Stream], num_returns: int, deadline: float | None) -> bool:
        """Block until so many of the refs were ready, or return False: the time is over, or the runtime."""
        waiter = Waiter()
        missing = [num_returns]

        def one_done() -> None:
            missing[0] -= 1
            if missing[0] <= 0:
                waiter.finish()

        def subscribe() -> list[ObjectRef | Stream]:
            pending = []
            for ref in refs:
                if self._is_ready(ref, one_done):
                    missing[0] -= 1
                else:
                    pending.append(ref)
            if missing[0] <= 0:
                waiter.done = True
            return pending

        pending = self.process.locked(subscribe)
        try:
            return waiter.done or self.blocking_wait(waiter, deadline)
        finally:
            self.process.locked(self._stop_waiting_all, pending, one_done)

    def _is_ready(self, ref: ObjectRef | Stream, notify: Callable[[], None] | None) -> bool:
        """Tell whether a ref, or the next one of a generator, is ready; `notify` is called later if it is not."""
        if not isinstance(ref, ObjectRef):
            return ref.next_ready() if notify is None else ref.when_ready(notify)
        entry = self.table.entries.get(ref.id)
        if entry is None or entry.state != PENDING:
            return True
        return notify is not None and self.table.when_done(ref.id, notify)

    def _stop_waiting_all(self, pending: list[ObjectRef | Stream], notify: Callable[[], None]) -> None:
        for ref in pending:
            if isinstance(ref, ObjectRef):
                self.table.stop_waiting(ref.id, notify)
            else:
                ref.stop_waiting(notify)
