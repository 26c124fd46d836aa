"""`concurrent.futures.Future`s of values: completed on whatever thread finds that the value is there.

Theory of operation. Who completes a future is seldom who waits for it: a main thread that waits for something else does so in
passing. Ctrl-C there is meant for that thread. It may cut short what is the user's (rebuilding the value, the future's
callbacks), but never lose the completion, or another thread would wait for ever: if it meets the rebuilding, a thread of its
own does that again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from afield.runtime.values.parts import PartsLostError, WouldBlockError
from afield.tracebacks import trim
from afield.transport.interrupts import interruptible


class ValueFuture(Future[Any]):
    """The future of a value.

    Args:
        read: returns the value, or raises that it would have to wait.
        fetch: does the same and waits.
    """

    def __init__(self, read: Callable[[], Any], fetch: Callable[[], Any]) -> None:
        super().__init__()
        self._read: Callable[[], Any] | None = interruptible(lambda: read())
        self._fetch: Callable[[], Any] | None = fetch
        self.set_running_or_notify_cancel()

    def complete(self) -> None:
        """Complete it: the value is there, or at least it was."""
        assert self._read is not None
        try:
            try:
                value = self._read()
            except (WouldBlockError, PartsLostError):  # `get` waits for either
                self._fetch_elsewhere()
                return
        except BaseException as error:
            if type(error) is KeyboardInterrupt:
                self._fetch_elsewhere()
                raise
            self._fail(error)
        else:
            self._succeed(value)

    def _fetch_elsewhere(self) -> None:
        try:
            threading.Thread(target=self._wait_and_complete, name="afield-fetch", daemon=True).start()
        except RuntimeError as error:  # the system has no thread for us: whoever waits hears so
            self._fail(error)

    def _wait_and_complete(self) -> None:
        assert self._fetch is not None
        try:
            value = self._fetch()
        except BaseException as error:
            self._fail(error)
        else:
            self._succeed(value)

    def _succeed(self, value: Any) -> None:
        self._read = self._fetch = None  # they refer to the runtime
        self.set_result(value)

    def _fail(self, error: BaseException) -> None:
        trim(error, always=True)  # frames of ours refer to the future
        self._read = self._fetch = None
        self.set_exception(error)

    @interruptible
    def _invoke_callbacks(self) -> None:
        super()._invoke_callbacks()  # type: ignore[misc]
