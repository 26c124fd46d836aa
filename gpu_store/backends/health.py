"""What Xids, NVML's answers and CUDA's error codes mean: tables, and one function over each.

Theory of operation. Four kinds of signal say that something is wrong, and each asks for one of three answers: nothing
(`FINE`), the process must end (`PROCESS`), this life of the device is over (`DEVICE`). The driver writes Xids (NVIDIA, "Xid
errors", in the GPU deployment documentation), and the tables hold those whose meaning for a process or a device is known. An
Xid that is in no table is told and has no consequence by itself: what it broke shows in calls that fail. No clock, no I/O,
no driver: both backends and their tests use this module as it is.
"""

from __future__ import annotations

from enum import Enum


class Verdict(Enum):
    """What a signal asks for."""

    FINE = "fine"
    PROCESS = "process"
    DEVICE = "device"


#: Caused by what one process did: it has to be started again, and the device stays.
APPLICATION_XIDS = {
    13: "graphics engine exception",
    31: "memory page fault",
    43: "the process was stopped by an error",
    45: "preemptive cleanup after an error",
    68: "video engine exception",
    109: "context switch timeout",
}

#: The device, or what is in its memory, is gone.
FATAL_XIDS = {
    48: "double-bit ECC error",
    63: "a memory page or row has to be retired",
    64: "retiring a memory page or row failed",
    74: "NVLink error",
    79: "the device has fallen off the bus",
    94: "contained memory error",
    95: "uncontained memory error",
}

#: NVML's field NVML_FI_DEV_GET_GPU_RECOVERY_ACTION: what the driver wants done before the device is used again.
RECOVERY_ACTIONS = {
    0: "none",
    1: "reset the device",
    2: "reboot the machine",
    3: "drain peer-to-peer traffic",
    4: "drain and reset the device",
    5: "recover IMEX",
    6: "reset the bus",
    7: "reboot the system",
}

#: After these, every call of the process fails until it ends: its context is broken, the device is not.
STICKY_CODES = {
    700: "illegal address",
    702: "launch timeout",
    710: "device-side assertion",
    714: "hardware stack error",
    715: "illegal instruction",
    716: "misaligned address",
    717: "invalid address space",
    718: "invalid program counter",
    719: "launch failure",
}

#: An uncorrectable error of memory, or of NVLink.
LOST_CODES = {214: "uncorrectable ECC error", 220: "uncorrectable NVLink error"}

#: CUDA says: memory allocation failed.
OUT_OF_MEMORY_CODE = 2

#: The driver is missing or too old, or there is no device, or not for this process.
NO_DEVICE_CODES = {
    3: "initialisation failed",
    35: "driver too old",
    46: "device unavailable",
    100: "no device",
    101: "no such device",
}

#: NVML says: the device is lost, or has to be reset.
LOST_NVML_ERRORS = {15: "the device is lost", 16: "the device has to be reset"}


def judge_xid(xid: int) -> tuple[Verdict, str]:
    """Return what an Xid asks for, and what it means."""
    if xid in FATAL_XIDS:
        return Verdict.DEVICE, FATAL_XIDS[xid]
    if xid in APPLICATION_XIDS:
        return Verdict.PROCESS, APPLICATION_XIDS[xid]
    return Verdict.FINE, "no known consequence"


def judge_code(code: int) -> tuple[Verdict, str]:
    """Return what the code of a failed CUDA call asks for beyond the failure of the call, and what it means."""
    if code in STICKY_CODES:
        return Verdict.PROCESS, STICKY_CODES[code]
    if code in LOST_CODES:
        return Verdict.DEVICE, LOST_CODES[code]
    return Verdict.FINE, "the call failed"


def judge_recovery(action: int) -> tuple[Verdict, str]:
    """Return what a recovery action asks for; one that is not in the table is newer than it, and is taken seriously."""
    return (Verdict.FINE if action == 0 else Verdict.DEVICE), RECOVERY_ACTIONS.get(action, f"unknown action {action}")


def judge_nvml(code: int) -> tuple[Verdict, str]:
    """Return what the code of a failed NVML call says about the device."""
    if code in LOST_NVML_ERRORS:
        return Verdict.DEVICE, LOST_NVML_ERRORS[code]
    return Verdict.FINE, "the question was not answered"
