"""How a worker ends in good order: what user code has asked to be done at the end is done, for a bounded time.

Theory of operation. A process that was forked ends by `os._exit`, which does nothing for anybody. So a worker that has run
user code first does what an interpreter would: it calls the actor's `__afield_shutdown__` (or `__ray_shutdown__`), runs what
was registered with `atexit` (which ends `multiprocessing`'s daemonic children), lets go of the actor, and flushes the files
that are still open. The runtime can still be used meanwhile. Threads are not waited for, as they may never end.

The kernel keeps the time: an alarm without a handler ends the process, whatever it does by then. This is for ends that the
actor's owner or the program wants (the last handle is gone, `exit_actor`, `shutdown`, an idle worker that is not needed). What
is killed gets none of it: `kill`, a lost device, a driver that died.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import inspect
import io
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

#: All of it may take so long.
END_WITHIN_S = 5.0
#: What an actor's class may define.
HOOKS = ("__afield_shutdown__", "__ray_shutdown__")

_FILES = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom, io.BufferedRWPair)


def set_alarm() -> None:
    """End this process before long, however busy it is; called in the main thread, the alarm cannot be caught either."""
    signal.setitimer(signal.ITIMER_REAL, END_WITHIN_S)


def end(holder: list[Any]) -> None:
    """Do what is to be done before this process ends; `holder` has the actor, to which it is the only reference.

    Called in the main thread.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    set_alarm()
    _guarded(lambda: _call_hook(holder[0]))
    _guarded(atexit._run_exitfuncs)
    holder.clear()
    _guarded(gc.collect)
    _guarded(_flush)


def _call_hook(actor: Any) -> None:
    for name in HOOKS:
        if inspect.getattr_static(type(actor), name, None) is not None:
            result = getattr(actor, name)()
            if inspect.isawaitable(result):
                asyncio.run(_wait_for(result))
            return


async def _wait_for(result: Any) -> None:
    await result


def _flush() -> None:
    """Write out what files hold back, of whoever still has them open."""
    for each in gc.get_objects():
        if issubclass(type(each), _FILES) and not each.closed:  # `isinstance` would ask a class of the user's
            _guarded(each.flush)


def _guarded(step: Callable[[], object]) -> None:
    """Do one thing, whatever it raises: the others are still to be done."""
    try:
        step()
    except BaseException:
        traceback.print_exc(file=sys.stderr)
