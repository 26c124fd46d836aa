"""A small client for tools: asks a session's daemon questions, one at a time, and takes no part in the session.

Theory of operation. It proves with the session's token that it belongs to the same user, registers as a "client" (which
owns nothing and is asked nothing), and drives its own loop while it waits for an answer. Its channel is *fleeting*: the daemon
keeps nothing for a tool that may have been ended with Ctrl-C. When it breaks, the tool asks its question, which changes
nothing, again on another one.
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
from afield.transport.channel import Channel
from afield.transport.endpoint import Endpoint
from afield.transport.loop import Loop

#: A question is asked so often at most; nobody's luck is worse than that.
MAX_ATTEMPTS = 5


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
        self._loop = Loop()
        try:
            token = session.token()
            self._address = address_of(session.name, token)
            self._endpoint = Endpoint(
                self._loop,
                token,
                new_process_id(),
                messages.decode,
                self._on_messages,
                lambda channel: None,
            )
            self._channel = self._connect()
        except (OSError, ValueError):
            self._loop.close()
            raise self._gone() from None

    def _connect(self) -> Channel:
        channel = self._endpoint.open(self._address, fleeting=True)
        channel.send(messages.Register("client", os.getpid()))
        return channel

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
        deadline = time.monotonic() + self._timeout_s
        attempts = 0
        while not self._answers:
            if attempts == 0 or self._channel.closed:
                self._ask_again(attempts, messages.Query(1, what, argument))
                attempts += 1
            left = deadline - time.monotonic()
            if left <= 0:
                raise GetTimeoutError(f"the session {self._session.name} did not answer within {self._timeout_s:g} s")
            self._loop.step(left)
        answer = self._answers.pop()
        if answer.error:
            raise AfieldError(answer.error)
        return answer.value

    def _ask_again(self, attempts: int, question: messages.Query) -> None:
        """Send a question, on a new channel if the last one is over."""
        if self._channel.closed:
            try:
                if attempts >= MAX_ATTEMPTS:
                    raise self._gone()
                self._channel = self._connect()
            except OSError:
                raise self._gone() from None
        self._channel.send(question)
        self._loop.flush()

    def close(self) -> None:
        """End the connection."""
        self._endpoint.close()
        self._loop.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
