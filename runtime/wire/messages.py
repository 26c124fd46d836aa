"""Every message that crosses a process boundary inside a node: msgpack arrays with an integer tag.

Processes name each other by `ProcessID`. Tags below 20 travel between owners, borrowers and workers; the others between a
process and its node daemon.
"""

from __future__ import annotations

from typing import Any

import msgspec

from afield.runtime.wire.ownership_messages import Add as Add
from afield.runtime.wire.ownership_messages import Added as Added
from afield.runtime.wire.ownership_messages import Release as Release
from afield.runtime.wire.ownership_messages import Subscribe as Subscribe
from afield.runtime.wire.ownership_messages import Took as Took
from afield.runtime.wire.ownership_messages import Value as Value
from afield.runtime.wire.session_messages import WORKING as WORKING
from afield.runtime.wire.session_messages import Answer as Answer
from afield.runtime.wire.session_messages import Log as Log
from afield.runtime.wire.session_messages import Printed as Printed
from afield.runtime.wire.session_messages import Query as Query
from afield.runtime.wire.session_messages import Shutdown as Shutdown
from afield.runtime.wire.store_messages import StoreMessage
from afield.runtime.wire.tier_messages import AHEAD as AHEAD
from afield.runtime.wire.tier_messages import Collect as Collect
from afield.runtime.wire.tier_messages import Found as Found
from afield.runtime.wire.tier_messages import Free as Free
from afield.runtime.wire.tier_messages import GiveBack as GiveBack
from afield.runtime.wire.tier_messages import Held as Held
from afield.runtime.wire.tier_messages import Location as Location
from afield.runtime.wire.tier_messages import Mapped as Mapped
from afield.runtime.wire.tier_messages import Need as Need
from afield.runtime.wire.tier_messages import Part as Part
from afield.runtime.wire.tier_messages import Seal as Seal
from afield.runtime.wire.tier_messages import Spare as Spare
from afield.runtime.wire.tier_messages import StoreGrant as StoreGrant
from afield.runtime.wire.tier_messages import StoreLease as StoreLease
from afield.runtime.wire.tier_messages import TierMessage
from afield.runtime.wire.tier_messages import Trim as Trim

#: `num_returns` of a task that yields its outputs one by one.
STREAMING = -1

# Kinds of a value on its way: what `data` / `location` of a `Result` mean.
INLINE, LOCATED, FAILED = 0, 1, 2
#: Kind of a `Reply` to a push that has not run, because an argument's stored value is lost.
ARGUMENT_LOST = 4
#: FAILED, with an error that the caller wants the task to be run again for, as long as it has retries.
FAILED_AGAIN = 5


class Contained(msgspec.Struct, array_like=True, gc=False):
    """The refs inside a result. The sender keeps its hold on them until it is told `Took(token)`."""

    token: int
    refs: list[tuple[bytes, bytes]]  # (object id, owner)


class Result(msgspec.Struct, array_like=True, gc=False):
    """One output: `data` for INLINE (serialised value) and FAILED (serialised error), `location` for LOCATED."""

    kind: int
    data: bytes
    location: Location | None = None
    contained: Contained | None = None


class Dependency(msgspec.Struct, array_like=True, gc=False):
    """A resolved top-level argument; its ref is pinned by the submitter until the reply."""

    object_id: bytes
    owner: bytes
    kind: int
    data: bytes
    location: Location | None = None


# -- owner <-> worker ---------------------------------------------------------------------------------------------


class Define(msgspec.Struct, array_like=True, tag=1):
    """A function (or a method's name), sent once per connection; pushes then name it by `index`."""

    index: int
    name: str
    blob: bytes  # cloudpickled function; empty for an actor's method, and where the peer has it already, by its digest
    num_returns: int  # STREAMING for a generator
    backpressure: int  # items a generator may be ahead of its consumer; 0 for any number
    group: str  # the actor's concurrency group to run in; empty for the default
    once: bool  # never to be run again: the owner must know exactly whether it has started
    retry_on: bool | bytes = False  # which errors of the user's are to be retried: all, or serialised types
    method: str = ""  # of an actor, which is looked up there; `name` is what the call is called
    digest: bytes = b""  # of the pickled function: several that differ in their options have one


class Forget(msgspec.Struct, array_like=True, tag=69):
    """The sender will push nothing more for these functions, and has defined those digests for the last time."""

    indexes: list[int]
    digests: list[bytes]


class Push(msgspec.Struct, array_like=True, tag=2, gc=False):
    """Run a task. `sequence` is unique on the connection."""

    sequence: int
    task_id: bytes
    function: int
    arguments: bytes  # serialised (args, kwargs), empty for none
    location: Location | None = None  # of the arguments, when they are large
    dependencies: list[Dependency] | None = None


class MoreDependencies(msgspec.Struct, array_like=True, tag=39, gc=False):
    """Arguments of the push `sequence` that follows, before those that it has itself: all together are much."""

    sequence: int
    dependencies: list[Dependency]


class Reply(msgspec.Struct, array_like=True, tag=3, gc=False):
    """The outcome of a task with one output."""

    sequence: int
    kind: int
    data: bytes
    location: Location | None = None
    contained: Contained | None = None


class ReplyMany(msgspec.Struct, array_like=True, tag=4, gc=False):
    """The outcome of a task with several outputs."""

    sequence: int
    results: list[Result]


class Recall(msgspec.Struct, array_like=True, tag=5, gc=False):
    """Hand back up to `count` tasks that have not started."""

    count: int


class HandBack(msgspec.Struct, array_like=True, tag=6, gc=False):
    """These pushes have not started and never will here. `blocked`: the worker waits inside a task; push no more."""

    sequences: list[int]
    blocked: bool


class Unblocked(msgspec.Struct, array_like=True, tag=7, gc=False):
    """The worker computes again and takes tasks."""


class Item(msgspec.Struct, array_like=True, tag=14, gc=False):
    """Item number `index` of the stream of push `sequence`; its `Reply` follows the last one, with their number."""

    sequence: int
    index: int
    kind: int
    data: bytes
    location: Location | None = None
    contained: Contained | None = None


class Consumed(msgspec.Struct, array_like=True, tag=15, gc=False):
    """The consumer of the stream of push `sequence` has taken `count` items."""

    sequence: int
    count: int


class Cancel(msgspec.Struct, array_like=True, tag=16, gc=False):
    """Do not start push `sequence`, or interrupt it; with `recursive`, also what it has submitted."""

    sequence: int
    recursive: bool


class CancelObject(msgspec.Struct, array_like=True, tag=17, gc=False):
    """A borrower asks the owner to cancel the task that makes the object."""

    object_id: bytes
    force: bool
    recursive: bool


# -- process <-> node daemon --------------------------------------------------------------------------------------


class Register(msgspec.Struct, array_like=True, tag=20):
    """A process introduces itself: `kind` is "driver", "worker", "store" or "client" (a tool that only asks)."""

    kind: str
    pid: int
    log_to_driver: bool = False


class Placement(msgspec.Struct, array_like=True, frozen=True):
    """What workers need besides resources: a runtime environment in its canonical form, and the node they must be on."""

    environment: bytes = b""  # empty for that of the job's start
    node: str = ""  # hexadecimal; empty for any


class Demand(msgspec.Struct, array_like=True, tag=21):
    """The owner wants `count` more leases of shape `key`; replaces the number it sent before."""

    key: int
    shape: dict[str, int]
    count: int
    placement: Placement | None = None


class Grant(msgspec.Struct, array_like=True, tag=22):
    """A lease on `worker` for shape `key`. The owner passes the assignment on, ahead of what it pushes."""

    key: int
    lease_id: int
    worker: bytes
    assignment: Assign


class Infeasible(msgspec.Struct, array_like=True, tag=23):
    """Shape `key` can never be met here."""

    key: int
    reason: str


class ReturnLease(msgspec.Struct, array_like=True, tag=24):
    """The owner is done with the lease. `wears_out`: and its worker is to serve nobody else, as `max_calls` says."""

    lease_id: int
    wears_out: bool = False


class Reclaim(msgspec.Struct, array_like=True, tag=25):
    """Somebody waits: return idle leases at once."""


class Blocked(msgspec.Struct, array_like=True, tag=26):
    """The sending worker waits inside a task (or, with False, computes again); `for_store`: for room in the store."""

    blocked: bool
    for_store: bool = False


class ProcessDied(msgspec.Struct, array_like=True, tag=27):
    """A process of the cluster is gone; `reason` says how."""

    process: bytes
    reason: str


class ActorFacts(msgspec.Struct, array_like=True):
    """Which actor a lease is for, and how often it was restarted."""

    actor_id: bytes
    class_name: str
    name: str
    restarts: int


class Assign(msgspec.Struct, array_like=True, tag=28):
    """What the worker's present lease is: its resources, its devices (UUIDs, and their numbers on the node), its actor.

    It comes on the same channel as what runs under it, and before that: from the owner, or, for an actor, from the daemon.
    """

    lease_id: int
    devices: list[str]
    device_numbers: list[int]
    shape: dict[str, int]  # in units of 1e-4
    actor: ActorFacts | None = None


class Unreachable(msgspec.Struct, array_like=True, tag=38):
    """A process asks the daemon about another: its channel broke and does not come back, or had to be closed for a `fault`.

    The daemon says `ProcessDied` if it knows of the death; else that follows when it happens. What has a fault is ended.
    """

    process: bytes
    fault: str = ""


class Retire(msgspec.Struct, array_like=True, tag=29):
    """Daemon to an idle worker: end, unless somebody depends on you. The worker sends it back if somebody does.

    `later`: if somebody does, end as soon as nobody does any more.
    """

    later: bool = False


class Lost(msgspec.Struct, array_like=True, tag=36):
    """Daemon to owner: these stored values are gone. `cause` in words;

    `kind` is "device" if they went with a device, "spare" if they were let go since only lineage needed them.
    """

    object_ids: list[bytes]
    cause: str
    kind: str = ""


class Unfit(msgspec.Struct, array_like=True, tag=37):
    """Worker to daemon: a device of mine is lost, or my context on it is broken: end me."""

    reason: str


class CreateActor(msgspec.Struct, array_like=True, tag=40):
    """Create an actor; the answer is a series of `ActorState`."""

    actor_id: bytes
    class_name: str
    blob: bytes
    shape: dict[str, int]
    arguments: bytes
    location: Location | None
    dependencies: list[Dependency] | None
    options: dict[str, Any]
    placement: Placement | None = None


class BecomeActor(msgspec.Struct, array_like=True, tag=41):
    """Daemon to worker: construct this actor and serve its calls until the end."""

    spec: CreateActor
    owner: bytes
    restarts: int


class ActorBorn(msgspec.Struct, array_like=True, tag=42):
    """Worker to daemon: the constructor returned, or raised `error` (serialised), or lacks an argument that is `lost`."""

    actor_id: bytes
    error: bytes
    lost: str = ""


class WatchActor(msgspec.Struct, array_like=True, tag=43):
    """Tell me the actor's state now and whenever it changes. Daemon to creator: will there be such an actor?"""

    actor_id: bytes
    creator: bytes = b""  # empty if the actor is detached


class ArgumentsLost(msgspec.Struct, array_like=True, tag=18):
    """Daemon to creator: an actor lacks an argument that is lost; the answer is `ActorArguments` or `ActorGone`."""

    actor_id: bytes
    why: str


class ActorArguments(msgspec.Struct, array_like=True, tag=19):
    """Creator to daemon: the constructor's arguments are there again, in these places."""

    actor_id: bytes
    arguments: bytes
    location: Location | None
    dependencies: list[Dependency] | None


class ActorGone(msgspec.Struct, array_like=True, tag=48):
    """Creator to daemon: the actor will not be created (any more); `error`: serialised cause, or empty."""

    actor_id: bytes
    error: bytes


class ActorState(msgspec.Struct, array_like=True, tag=44):
    """`state` is "pending", "alive" (at `worker`), "restarting" or "dead" (`error`: serialised cause)."""

    actor_id: bytes
    state: str
    worker: bytes
    error: bytes


class KillActor(msgspec.Struct, array_like=True, tag=45):
    """End the actor's process: at once, or (`gracefully`) after the calls that it has.

    Daemon to creator: if it is not created yet, as an argument of its constructor is not there, it never is.
    """

    actor_id: bytes
    no_restart: bool
    reason: str
    gracefully: bool = False
    creator: bytes = b""  # empty if the actor is detached


class KillWorker(msgspec.Struct, array_like=True, tag=47):
    """The owner of a lease ends its worker's process, to cancel what runs there."""

    lease_id: int


class Terminate(msgspec.Struct, array_like=True, tag=46):
    """Daemon to worker: end when the queue is empty, or at once, whatever waits or runs."""

    at_once: bool = False


Message = (
    Define
    | Forget
    | Push
    | MoreDependencies
    | Reply
    | ReplyMany
    | Recall
    | HandBack
    | Unblocked
    | Add
    | Added
    | Release
    | Subscribe
    | Value
    | Took
    | Item
    | Consumed
    | Cancel
    | CancelObject
    | Register
    | Demand
    | Grant
    | Infeasible
    | ReturnLease
    | Reclaim
    | Blocked
    | ProcessDied
    | Unreachable
    | Assign
    | Retire
    | TierMessage
    | Lost
    | Unfit
    | CreateActor
    | BecomeActor
    | ActorBorn
    | WatchActor
    | ArgumentsLost
    | ActorArguments
    | ActorGone
    | ActorState
    | KillActor
    | Terminate
    | KillWorker
    | Query
    | Answer
    | Log
    | Printed
    | Shutdown
    | StoreMessage
)

decode = msgspec.msgpack.Decoder(list[Message]).decode
