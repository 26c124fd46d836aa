"""The scripts that the explorer runs in every interleaving.

Process p0 runs `main`; a task runs one of `bodies`. A body's refs are named a0, a1, ... in the order in which they arrive
(nested ones first, then those inside top-level arguments), and a process's names are shared by the tasks it runs: what a
body `keep`s, a later one may use. A step whose name is not bound, because a get failed, is left out.

    ("put", name, *inside), ("store", name, *inside)    an inline or a stored value with refs inside
    ("submit", name, target, body, *refs)               nested refs; `name` is the output
    ("pass", name, target, body, *refs)                 top-level refs
    ("get", name, *names)                               wait for a value; the refs inside get names
    ("try", name)                                       begin to wait for a value and give up, wherever it is by then
    ("drop", *names)
    ("keep", name, as_name)                             what came with the task outlives it
    ("return", *names), ("return stored", *names)       the last step of a body: its output contains these refs
"""

from __future__ import annotations

from dataclasses import dataclass

Step = tuple[str | int, ...]
Steps = tuple[Step, ...]

P0, P1, P2 = "p0", "p1", "p2"


@dataclass(frozen=True, slots=True)
class Scenario:
    """`floor`: the explorer must find at least so many states. `mortal`: who may die, once, at any point."""

    name: str
    floor: int
    processes: int
    main: Steps
    bodies: tuple[Steps, ...]
    mortal: tuple[str, ...] = ()
    duplicates: bool = False


_KEEP: Steps = (("keep", "a0", "kept"), ("return",))
_FORGET: Steps = (("drop", "a0"), ("return",))

_BORROW_MAIN: Steps = (("put", "x"), ("submit", "r", P1, 0, "x"), ("drop", "x"), ("get", "r"), ("drop", "r"))
_ON_MAIN: Steps = (("put", "x"), ("submit", "r", P1, 0, "x"), ("drop", "x"), ("drop", "r"))
_ON_BODIES: tuple[Steps, ...] = ((("submit", "q", P2, 1, "a0"), ("drop", "a0", "q"), ("return",)), _KEEP)
_RETURN_BODIES: tuple[Steps, ...] = (
    (("submit", "q", P2, 1, "a0"), ("drop", "a0"), ("get", "q", "b"), ("drop", "q"), ("return",)),
    (("return", "a0"),),
)
_CONTAINER_BODIES: tuple[Steps, ...] = (
    (("put", "k", "a0"), ("drop", "a0"), ("submit", "q", P2, 1, "k"), ("drop", "k", "q"), ("return",)),
    (("keep", "a0", "k"), ("return",)),
    (("get", "k", "b"), ("drop", "k"), ("return",)),
)
_TWICE_BODIES: tuple[Steps, ...] = (
    (("submit", "q", P2, 1, "a0"), ("submit", "q2", P2, 2, "a0"), ("drop", "a0", "q", "q2"), ("return",)),
    _FORGET,
    _KEEP,
)

SCENARIOS: tuple[Scenario, ...] = (
    Scenario("borrow", 10, 2, _BORROW_MAIN, (_KEEP,)),
    Scenario("borrow, control messages twice", 10, 2, _BORROW_MAIN, (_KEEP,), duplicates=True),
    Scenario("borrow, the borrower dies", 10, 2, _BORROW_MAIN, (_KEEP,), mortal=(P1,)),
    Scenario("borrow, the owner dies", 10, 2, _BORROW_MAIN, (_KEEP,), mortal=(P0,)),
    Scenario("lend on", 10, 3, _ON_MAIN, _ON_BODIES),
    Scenario("lend on, any one dies", 10, 3, _ON_MAIN, _ON_BODIES, mortal=(P0, P1, P2)),
    Scenario("return a borrowed ref", 10, 3, _ON_MAIN, _RETURN_BODIES),
    Scenario("return a borrowed ref, any one dies", 10, 3, _ON_MAIN, _RETURN_BODIES, mortal=(P0, P1, P2)),
    Scenario(
        "get of a container",
        10,
        3,
        _ON_MAIN,
        (
            (("put", "k", "a0"), ("drop", "a0"), ("submit", "q", P2, 1, "k"), ("drop", "k", "q"), ("return",)),
            (("get", "a0", "b"), ("drop", "a0"), ("return",)),
        ),
    ),
    Scenario("borrow again after release", 10, 3, _ON_MAIN, _TWICE_BODIES),
)
