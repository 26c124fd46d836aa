"""What runs where: the context of the running task, which names the ids of what it submits."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from contextvars import ContextVar
from typing import TYPE_CHECKING, NoReturn

from afield.ids import Scope

if TYPE_CHECKING:
    from afield.runtime.cores.objects import Obligation


class ActorExit(BaseException):
    """Raised by `exit_actor` inside an actor's method."""


class TaskContext:
    """A task in execution; in an async actor there are many at once, hence a context variable."""

    __slots__ = ("name", "obligation", "scope", "task_id")

    def __init__(self, task_id: bytes, name: str = "", scope: Scope | None = None) -> None:
        self.task_id = task_id
        self.name = name
        self.scope = scope
        #: Collects the registrations that the task's reply must wait for.
        self.obligation: Obligation | None = None

    def next_task_id(self) -> bytes:
        """Return an id for a submission; the same ones in each execution of the same task."""
        scope = self.scope
        if scope is None:
            scope = self.scope = Scope(self.task_id)
        return scope.next_task_id()


_running: ContextVar[TaskContext | None] = ContextVar("afield_task", default=None)
#: What a driver submits, and what a thread submits that is no task's own, belongs to the process.
_root = TaskContext(b"", scope=Scope())

running = _running.get
enter = _running.set


def reset_root() -> None:
    """Give this process a fresh root, after a fork."""
    global _root
    _root = TaskContext(b"", scope=Scope())


def calling_context() -> TaskContext:
    """Return the task that the caller belongs to, or the process's root."""
    return _running.get() or _root


def leave_copy(error: BaseException | None) -> NoReturn:
    """End this process, a child that a task made with `os.fork`: what it returns is not the task's result."""
    if error is not None and issubclass(type(error), SystemExit):
        code = vars(SystemExit)["code"].__get__(error)
        status = code if isinstance(code, int) else int(code is not None)
    elif error is not None:
        with contextlib.suppress(BaseException):  # its text is made by code of the user's
            traceback.print_exception(error)
        status = 1
    else:
        status = 0
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status & 0xFF)
