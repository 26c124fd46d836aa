"""Who says what: the messages that only some kinds of processes may send.

A message from whom it is not for costs its channel: a lease that no daemon has granted, or a death that it has not seen, would
be taken for true.
"""

from __future__ import annotations

from typing import Final, get_args

from afield.runtime.wire import messages
from afield.runtime.wire.store_messages import StoreMessage

#: What a process says that it is (`messages.Register`), and who of them run code of the user's.
KINDS: Final[frozenset[str]] = frozenset({"driver", "worker", "store", "client"})
PROCESSES: Final[frozenset[str]] = frozenset({"driver", "worker"})

#: What the node daemon does not take from drivers and workers, or not from them alone.
MAY_SEND: Final[dict[type, frozenset[str]]] = {
    messages.Query: KINDS - {"store"},
    messages.Answer: KINDS - {"client"},
    messages.Shutdown: frozenset({"driver"}),
    **dict.fromkeys(get_args(StoreMessage), frozenset({"store"})),
}

#: What drivers and workers take from the node daemon alone.
DAEMON_SAYS: Final[frozenset[type]] = frozenset(
    {
        messages.ActorState,
        messages.Answer,
        messages.ArgumentsLost,
        messages.BecomeActor,
        messages.Collect,
        messages.Found,
        messages.Grant,
        messages.Held,
        messages.Infeasible,
        messages.Log,
        messages.Lost,
        messages.ProcessDied,
        messages.Query,
        messages.Reclaim,
        messages.Retire,
        messages.StoreGrant,
        messages.Terminate,
        messages.Trim,
        messages.WatchActor,
    }
)
