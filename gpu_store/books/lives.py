"""Core tables of the books: the life of a copy, of a copy in the making, and of a need.

They stand apart from the records that have these states (`records`), as each is moved on by several files.
"""

from __future__ import annotations

from afield.machines import Table

COPY = Table(
    "copy of a part",
    "kept",
    {
        ("kept", "leave"): "leaving",
        ("kept", "free"): "over",
        ("kept", "free_in_use"): "dying",
        ("kept", "lose"): "over",
        ("leaving", "stay"): "kept",
        ("leaving", "free_in_use"): "dying_leaving",
        ("leaving", "lose"): "over",
        ("dying", "bury"): "over",
        ("dying", "lose"): "over",
        ("dying_leaving", "stay"): "dying",
    },
    {
        "kept": "can be read; which shelf it stands on depends on the other copies of its part",
        "leaving": "can be read, and goes as soon as the copy of it that is being made below is there",
        "dying": "its object was freed while a job, or a promise, needs it: only its bytes are left, until nobody does",
        "dying_leaving": "the same, and it is being written to disk, in vain",
        "over": "its bytes are free, or went with their device",
    },
)

MAKING = Table(
    "copy in the making",
    "queued",
    {
        ("queued", "place"): "placed",
        ("queued", "give_up"): "over",
        ("placed", "run"): "running",
        ("placed", "give_up"): "over",
        ("running", "complete"): "over",
        ("running", "job_ended"): "placed",
        ("running", "make_void"): "void",
        ("running", "give_up"): "over",
        ("void", "job_ended"): "over",
    },
    {
        "queued": "waits for room in its arena",
        "placed": "has its place, and starts as soon as there is a copy to start from",
        "running": "a job fills its place",
        "void": "its object was freed, or the part is lost: nobody wants it, and only the end of its job is waited for",
        "over": "it is a copy, or nothing came of it",
    },
)

NEED = Table(
    "need of a process",
    "asked",
    {
        ("asked", "know"): "waiting",
        ("asked", "refuse"): "over",
        ("asked", "forget"): "over",
        ("waiting", "promise"): "promised",
        ("waiting", "extend"): "extended",
        ("waiting", "refuse"): "over",
        ("waiting", "forget"): "over",
        ("extended", "promise"): "promised",
        ("extended", "refuse"): "over",
        ("extended", "forget"): "over",
        ("promised", "mapped"): "over",
    },
    {
        "asked": "its object is not sealed yet, as far as is known here",
        "waiting": "has some of what it wants; the rest is being made",
        "extended": "its deadline is over, but all that it misses is on its way: that is waited for, once",
        "promised": "was told where everything is, and that it stays there until it has been pinned",
        "over": "is pinned, was refused, or its process is gone",
    },
)
