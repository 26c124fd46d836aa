"""Faults of emulated devices: what goes wrong, and at which call.

Theory of operation. A fault is data: which device, what kind, and `at`, the number of the call that it meets, counted from
the moment it is injected over all processes of the machine (or those of process `pid`). A plan is a sequence of faults; it
is handed in when the machine is made, or one by one later, from any process. Faults that wait lie on the board, so a test
in one process decides what happens to the third allocation of another.

`strike` is asked before every call of a device. It acts on the board for what concerns the device (loss, Xid, slow links)
and returns, as an enum, what the call itself has to raise. Nothing here knows the time, and nothing is drawn at random.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

from afield.gpu_store.backends.base import DeviceUsageError
from afield.gpu_store.backends.board import Board
from afield.gpu_store.backends.health import STICKY_CODES, Verdict, judge_xid
from afield.gpu_store.backends.streams import is_limited


class FaultKind(IntEnum):
    """What goes wrong. The first three happen to a call, the others to the device."""

    OUT_OF_MEMORY = 1
    FAILED_IMPORT = 2
    STICKY_ERROR = 3
    XID = 4
    LOST = 5
    SLOW_LINK = 6


class Call(IntEnum):
    """The calls that faults distinguish."""

    ALLOCATE = 1
    IMPORT = 2
    OTHER = 3


class Fault(msgspec.Struct, frozen=True):
    """One fault of a plan; make it with the functions below."""

    device_uuid: str
    kind: FaultKind
    #: The number of the call it meets, from 1; 0 is now.
    at: int = 0
    #: The sticky error's code, or the Xid.
    code: int = 0
    #: By how much links get slower.
    factor: float = 1.0
    #: Count only the calls of this process; 0 counts all.
    pid: int = 0


_OF_ANY_CALL = frozenset({FaultKind.STICKY_ERROR, FaultKind.XID, FaultKind.LOST, FaultKind.SLOW_LINK})
_COUNTED = {
    Call.ALLOCATE: frozenset(map(int, _OF_ANY_CALL | {FaultKind.OUT_OF_MEMORY})),
    Call.IMPORT: frozenset(map(int, _OF_ANY_CALL | {FaultKind.FAILED_IMPORT})),
    Call.OTHER: frozenset(map(int, _OF_ANY_CALL)),
}


def out_of_memory(device_uuid: str, at: int = 1) -> Fault:
    """The `at`-th slab allocation finds no room, whatever there is."""
    return Fault(device_uuid, FaultKind.OUT_OF_MEMORY, _call(at))


def failed_import(device_uuid: str, at: int = 1) -> Fault:
    """The `at`-th import of a slab is refused."""
    return Fault(device_uuid, FaultKind.FAILED_IMPORT, _call(at))


def sticky_error(device_uuid: str, code: int = 700, at: int = 1, pid: int = 0) -> Fault:
    """The `at`-th call breaks the context of the process that makes it, until that ends or the device is reset."""
    if code not in STICKY_CODES:
        raise DeviceUsageError(
            f"{code} is not the code of a sticky error; those are {', '.join(map(str, STICKY_CODES))}"
        )
    return Fault(device_uuid, FaultKind.STICKY_ERROR, _call(at), code, pid=pid)


def xid(device_uuid: str, code: int, at: int = 0) -> Fault:
    """The driver writes an Xid, now or at the `at`-th call; a fatal one loses the device."""
    return Fault(device_uuid, FaultKind.XID, at, code)


def lost(device_uuid: str, at: int = 0) -> Fault:
    """The device is lost for all processes, now or at the `at`-th call, with all its memory, until it is reset."""
    return Fault(device_uuid, FaultKind.LOST, at)


def slow_link(device_uuid: str, factor: float, at: int = 0) -> Fault:
    """The device's links take `factor` times as long, now or from the `at`-th call on; 1.0 mends them."""
    if factor <= 0:
        raise DeviceUsageError(f"a link cannot get slower by a factor of {factor}")
    return Fault(device_uuid, FaultKind.SLOW_LINK, at, factor=factor)


def inject(board: Board, fault: Fault) -> None:
    """Let a fault happen: now, or when its call comes.

    Raises NoDeviceError for a device that there is not, and DeviceUsageError for a slow link where every link is
    unlimited, which would change nothing.
    """
    index = board.index(fault.device_uuid)
    own = [link for link in board.links if fault.device_uuid in (link.source, link.target)]
    if fault.kind == FaultKind.SLOW_LINK and not any(map(is_limited, own)):
        raise DeviceUsageError(
            f"the links of {fault.device_uuid} are unlimited, and cannot get slower: make the machine with a bandwidth"
        )
    if fault.at:
        board.arm(index, fault.kind, fault.at, fault.code, fault.factor, fault.pid)
    else:
        _happen(board, index, fault.kind, fault.code, fault.factor)


def strike(board: Board, index: int, call: Call) -> list[tuple[FaultKind, int]]:
    """Count a call; return (kind, code) of the faults that the call itself has to raise, in no order."""
    if not board.armed(index):
        return []
    of_the_call: list[tuple[FaultKind, int]] = []
    for number, code, factor in board.count_down(index, _COUNTED[call]):
        kind = FaultKind(number)
        if kind in (FaultKind.OUT_OF_MEMORY, FaultKind.FAILED_IMPORT, FaultKind.STICKY_ERROR):
            of_the_call.append((kind, code))
        else:
            _happen(board, index, kind, code, factor)
    return of_the_call


def _happen(board: Board, index: int, kind: FaultKind, code: int, factor: float) -> None:
    with board.locked():
        if kind == FaultKind.SLOW_LINK:
            board.set_slowness(index, factor)
            return
        fatal = kind == FaultKind.LOST or judge_xid(code)[0] is Verdict.DEVICE
        board.announce(index, "lost" if kind == FaultKind.LOST else "xid", code, fatal=fatal)
        # A device that is lost already is not lost once more: one loss, however many signals.
        if fatal and not board.lost(index):
            board.end_life(index, lost=True)


def _call(at: int) -> int:
    if at < 1:
        raise DeviceUsageError(f"calls are counted from 1, so nothing can happen at call {at}")
    return at
