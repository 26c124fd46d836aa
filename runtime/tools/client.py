"""A small client for tools: asks a session's daemon questions, one at a time, and takes no part in the session.

Theory of operation. It proves with the session's token that it belongs to the same user, registers as a "client" (which
owns nothing and is asked nothing), and drives its own loop while it waits for an answer.
"""

from __future__ import annotations

import os
import time
from typing import Any

from afield.errors import AfieldError, GetTimeoutError, RuntimeDiedError
from afield.ids import new_process_id
from afield.runtime.process.configuration import address_of
from afield.runtime.session.sessions import SessionInfo
from afield.runtime.wire import messages
from afield.transport.auth import Handshake
from afield.transport.channel import Channel, connect
from afield.transport.loop import Loop


class Client:
    """A connection to the node daemon of a session.

    Args:
        session: which one.
        timeout_s: how long an answer may take.

    Raises:
        RuntimeDiedError: the session has ended.
    """

    def __init__(self, session: SessionInfo, timeout_s: float = 10.0) -> None:
        self._session = session
        self._timeout_s = timeout_s
        self._answers: list[messages.Answer] = []
        try:
            token = session.token()
            sock = connect(address_of(session.name))
        except (OSError, ValueError):
            raise self._gone() from None
        self._loop = Loop()
        handshake = Handshake(token, new_process_id(), os.urandom(32), server=False)
        self._channel = Channel(self._loop, sock, handshake, messages.decode, self._on_messages, lambda channel: None)
        self._channel.send(messages.Register("client", os.getpid()))

    def _gone(self) -> RuntimeDiedError:
        return RuntimeDiedError(f"the session {self._session.name} does not answer: it is starting or has just ended")

    def _on_messages(self, channel: Channel, batch: list[Any]) -> None:
        self._answers += [message for message in batch if isinstance(message, messages.Answer)]

    def ask(self, what: str, argument: Any = None) -> Any:
        """Return the daemon's answer.

        Raises:
            RuntimeDiedError: the session has ended.
            GetTimeoutError: there was no answer in time.
            AfieldError: the daemon does not know the question.
        """
        self._answers.clear()
        self._channel.send(messages.Query(1, what, argument))
        self._loop.flush()
        deadline = time.monotonic() + self._timeout_s
        while not self._answers:
            if self._channel.closed:
                raise self._gone()
            left = deadline - time.monotonic()
            if left <= 0:
                raise GetTimeoutError(f"the session {self._session.name} did not answer within {self._timeout_s:g} s")
            self._loop.step(left)
        answer = self._answers.pop()
        if answer.error:
            raise AfieldError(answer.error)
        return answer.value

    def close(self) -> None:
        """End the connection."""
        self._channel.close()
        self._loop.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
