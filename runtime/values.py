"""Values: put, get and wait, and this process's side of the host store."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from afield.errors import GetTimeoutError, ObjectLostError, ObjectStoreFullError, RuntimeDiedError
from afield.gpu_store.client import HostStoreClient, View
from afield.ids import PUT_INDEX
from afield.runtime import messages as m
from afield.runtime.context import calling_context, running
from afield.runtime.ownership import FAILED, INLINE, LOCATED, PENDING, Entry, Obligation
from afield.runtime.process import Process
from afield.runtime.refs import ObjectRef
from afield.runtime.serialization import Serialized, deserialize, dumps_plain, serialize
from afield.transport.channel import Channel
from afield.transport.pump import Waiter, uninterruptible

if TYPE_CHECKING:
    from afield.runtime.streams import ObjectRefGenerator

#: Values up to this size travel inside messages; larger ones stay in the store.
INLINE_BYTES = 100 * 1024
#: How long a wait inside a task may last before the task gives its CPUs back.
MOMENT_S = 0.001

# The interpreter calls these at any moment, and an exception in them would be lost, with what they had to do.
uninterruptible(View.__del__)
uninterruptible(HostStoreClient.on_born_died)


class Values:
    """The values of one process."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.table = process.table
        self.pump = process.pump
        config = process.config
        self.store = HostStoreClient(config.slab_fd, config.capacity, self._lease_store, self._give_back)
        #: A worker sets these: what to do before and after a long wait inside a task.
        self.on_block: Callable[[bool], None] | None = None
        self.on_unblock: Callable[[], None] | None = None
        self._given_back: deque[tuple[int, int]] = deque()
        process.handlers[m.StoreGrant] = self._on_store_grant
        process.tickers.append(self._send_given_back)

    # -- the store -----------------------------------------------------------------------------------------------

    def _give_back(self, offset: int, size: int) -> None:
        self._given_back.append((offset, size))
        self.pump.wake_standby()

    def _send_given_back(self, now: float) -> None:
        while self._given_back:
            self.process.daemon.send(m.GiveBack(*self._given_back.popleft()))

    def _on_store_grant(self, channel: Channel, message: m.StoreGrant) -> None:
        refused = ObjectStoreFullError(message.refusal) if message.refusal else None
        if not self.process.answered(message.request, refused or (message.offset, message.size)) and refused is None:
            self._give_back(message.offset, message.size)  # whoever asked was interrupted

    def _lease_store(self, size: int) -> tuple[int, int]:
        wait_s = self.process.config.store_wait_s
        granted: tuple[int, int] = self.process.request(
            lambda request: m.StoreLease(request, size, wait_s),
            give_up=lambda unwanted: self._give_back(*unwanted),
            # While a producer waits for room, its CPU is for those whose work makes room.
            wait=lambda waiter: self.blocking_wait(waiter, None, for_store=True),
        )
        return granted

    @uninterruptible
    def write_object(self, object_id: bytes, owner: bytes, value: Serialized, holder: list[Any]) -> m.Location:
        """Write a value into the store as object `object_id` of `owner`; blocks while there is no room."""
        (offset, size), pieces = self.store.store(value, holder)
        with self.pump.lock:  # leaves with the next flush, before anything that could name the location
            self.process.daemon.send(m.Seal(object_id, owner, pieces))
        return m.Location(0, offset, size)

    # -- values --------------------------------------------------------------------------------------------------

    def put(self, value: Any) -> ObjectRef:
        """Make an object of ours out of `value`."""
        self.process.check_alive()
        object_id = calling_context().next_task_id() + PUT_INDEX
        data = dumps_plain(value)
        large: Serialized | None = None
        refs: list[bytes] = []
        if data is None:
            serialized = serialize(value, "the value given to put()")
            refs = serialized.refs
            if serialized.size > INLINE_BYTES:
                large = serialized
            else:
                data = serialized.pack()
        elif len(data) > INLINE_BYTES:
            large = Serialized(data, [], [])
        return self._own(object_id, data, large, refs)

    @uninterruptible
    def _own(self, object_id: bytes, data: bytes | None, large: Serialized | None, refs: list[bytes]) -> ObjectRef:
        """Enter a value of ours; what has been stored has a holder from here on, whatever interrupts."""
        kind: int = INLINE
        stored: Any = data
        if large is not None:
            kind, stored = LOCATED, self.write_object(object_id, self.process.process_id, large, [])
        if refs:
            self.process.locked(self.table.put, object_id, kind, stored, refs)
        else:
            self.table.put(object_id, kind, stored, refs)
        if len(self.process.dropped) > 256:
            self.process.locked(self.process.after_events)
        return ObjectRef(object_id)

    def get(self, ref: ObjectRef, deadline: float | None) -> Any:
        """Return the value of `ref`, driving the loop until it is there.

        Raises:
            GetTimeoutError: `deadline` (monotonic seconds) passed first.
        """
        entry = self.table.entries.get(ref.id)
        if entry is None:
            raise ObjectLostError(f"{ref!r} belongs to a runtime that was shut down")
        if entry.state == PENDING:
            self.wait_done(ref, deadline)
        return self.value_of(ref, entry)

    def wait_done(self, ref: ObjectRef, deadline: float | None) -> None:
        """Block until the value of `ref` is there."""
        waiter = Waiter()
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
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()

        def complete() -> None:
            try:
                value = self.value_of(ref, self.table.entries[ref.id])
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(value)

        if self.process.locked(self.table.when_done, ref.id, lambda: self.pump.callbacks.append(complete)):
            complete()
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
        return self.value_of(ref, self.table.entries[ref.id])

    def value_of(self, ref: ObjectRef, entry: Entry) -> Any:
        """Rebuild the value of a finished entry, or raise the error that it is."""
        object_id = ref.id
        if entry.state == INLINE and not entry.value:
            return None
        if entry.state == LOCATED:
            data: Any = self._map(object_id, entry, entry.value.offset, entry.value.size)
        else:
            data = entry.value
        value = deserialize(data, "the value", self._on_ref_in(object_id), self._resolver(object_id, entry))
        if entry.state == FAILED:
            raise value
        return value

    def _on_ref_in(self, container: bytes) -> Callable[[bytes, bytes], None]:
        def on_ref(object_id: bytes, owner: bytes) -> None:
            self.process.locked(self.table.receive, object_id, owner, Obligation(container=container))

        return on_ref

    def _resolver(self, object_id: bytes, entry: Entry) -> Callable[[int, int], memoryview]:
        return lambda offset, size: self._map(object_id, entry, offset, size)

    @uninterruptible
    def _map(self, object_id: bytes, entry: Entry, offset: int, size: int) -> memoryview:
        """Return stored bytes whose last view gives up the handle that it has of the object."""
        view = self.store.view(offset, size, self.process.handle_dropped)
        entry.handles += 1
        view.hold = object_id
        return view.data

    def wait(
        self, refs: Sequence[ObjectRef | ObjectRefGenerator], ids: list[bytes], num_returns: int, deadline: float | None
    ) -> tuple[list[Any], list[Any]]:
        """Return (ready, not ready), both in the order given, once `num_returns` are ready or the time is over."""
        ready = self._first_ready(refs, ids, num_returns)
        if len(ready) < num_returns:
            self._wait_for(refs, num_returns, deadline)
            ready = self._first_ready(refs, ids, num_returns)
        rest: list[Any] = []
        start = 0
        for index in ready:
            rest += refs[start:index]
            start = index + 1
        rest += refs[start:]
        return [refs[index] for index in ready], rest

    def _first_ready(self, refs: Sequence[ObjectRef | ObjectRefGenerator], ids: list[bytes], limit: int) -> list[int]:
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

    def _wait_for(
        self, refs: Sequence[ObjectRef | ObjectRefGenerator], num_returns: int, deadline: float | None
    ) -> None:
        """Block until `num_returns` of the refs are ready or the time is over."""
        waiter = Waiter()
        missing = [num_returns]

        def one_done() -> None:
            missing[0] -= 1
            if missing[0] <= 0:
                waiter.finish()

        def subscribe() -> list[bytes]:
            pending = []
            for ref in refs:
                if self._is_ready(ref, one_done):
                    missing[0] -= 1
                elif isinstance(ref, ObjectRef):
                    pending.append(ref.id)
            if missing[0] <= 0:
                waiter.done = True
            return pending

        pending = self.process.locked(subscribe)
        try:
            if not waiter.done:
                self.blocking_wait(waiter, deadline)
        finally:
            self.process.locked(self._stop_waiting_all, pending, one_done)

    def _is_ready(self, ref: ObjectRef | ObjectRefGenerator, notify: Callable[[], None] | None) -> bool:
        """Tell whether a ref, or the next one of a generator, is ready; `notify` is called later if it is not."""
        if not isinstance(ref, ObjectRef):
            return ref.next_ready() if notify is None else ref.when_ready(notify)
        entry = self.table.entries.get(ref.id)
        if entry is None or entry.state != PENDING:
            return True
        return notify is not None and self.table.when_done(ref.id, notify)

    def _stop_waiting_all(self, object_ids: list[bytes], notify: Callable[[], None]) -> None:
        for object_id in object_ids:
            self.table.stop_waiting(object_id, notify)
