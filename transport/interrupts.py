"""Where a SIGINT may raise KeyboardInterrupt: in code of the user's, and in ours only where it says so.

Theory of operation. The interpreter runs a signal's handler between any two bytecodes of the main thread, so an exception
of the handler could cut whatever runs there in half: between taking a lock and the `try` that gives it back, or in the midst
of a transition of state. So the stack is looked at, from the innermost frame outwards, and what is not known to be safe is
taken to be unsafe:

- A frame of ours that is marked `uninterruptible`, anywhere on the stack, protects everything that it calls.
- Otherwise the innermost frame of ours decides, whatever of other packages it may have called (locks, pickle, sockets): it
  protects, unless it is marked `interruptible`. Those frames have nothing to lose: they wait, or they run user code.
- A stack without frames of ours is the user's.

Ours are the packages of the runtime; what is built on the public names alone (`libraries`, `testing`) counts as the user's.
This costs nothing until a signal comes.

What does not work: a handler of the user's own for any signal. It runs wherever the main thread is, and if it raises there, the
exception goes through our frames. A long call of C code (one that does not return to the interpreter) delays every handler.

The rule is that of trio's `_core/_ki.py`: code of which nothing is known counts as protected.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])
_uninterruptible: set[CodeType] = set()
_interruptible: set[CodeType] = set()
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_OURS = tuple(os.path.join(_PACKAGE, name, "") for name in ("runtime", "transport", "gpu_store", "scheduler"))
#: NumPy's work on emulated devices is the user's computing; the accounting of their memory is ours.
_USERS = os.path.join(_PACKAGE, "gpu_store", "emulated_arrays", "")
_ACCOUNTING = tuple(os.path.join(_USERS, name) for name in ("account.py", "devices.py"))


def uninterruptible(function: _Function) -> _Function:
    """Mark a function as a transition that SIGINT must not cut in half, nor what it calls."""
    _uninterruptible.add(function.__code__)
    return function


def interruptible(function: _Function) -> _Function:
    """Mark a function that waits, or runs code of the user's, so that KeyboardInterrupt may come there."""
    _interruptible.add(function.__code__)
    return function


def _is_ours(name: str) -> bool:
    return name.startswith(_OURS) and (name in _ACCOUNTING or not name.startswith(_USERS))


def is_protected(frame: FrameType | None) -> bool:
    """Tell whether an interrupt at this frame of the main thread has to wait."""
    if frame is None:
        return True
    decided: bool | None = None
    while frame is not None:
        code = frame.f_code
        if code in _uninterruptible:
            return True
        if decided is None and _is_ours(code.co_filename):
            decided = code not in _interruptible
        frame = frame.f_back
    return bool(decided)


def let_sigint_be() -> None:
    """In a forked copy of a process of ours, which has nothing to protect: SIGINT does what Python has it do."""
    handler: Any = signal.getsignal(signal.SIGINT)
    code = getattr(getattr(handler, "__func__", handler), "__code__", None)
    if code is not None and _is_ours(code.co_filename):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def is_fault(error: BaseException) -> bool:
    """Tell whether our own code raised an error: no handler of a signal, or finaliser, of the user's has brought it in."""
    traceback = error.__traceback__
    while traceback is not None:
        if not _is_ours(traceback.tb_frame.f_code.co_filename):
            return False
        traceback = traceback.tb_next
    return True
