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
    ("keep", name, as_name)                             what a body has outlives it; all else is dropped when it returns
    ("die",)                                            the process ends here
    ("return", *names), ("return stored", *names)       the last step of a body: its output contains these refs
"""

from __future__ import annotations

from dataclasses import dataclass

Step = tuple[str | int, ...]
Steps = tuple[Step, ...]

P0, P1, P2 = ANYONE = ("p0", "p1", "p2")


@dataclass(frozen=True, slots=True)
class Scenario:
    """`floor`: the explorer must find at least so many states. `mortal`: who may die, once, at any point.

    `copies`: so many control messages are handled twice, whichever they are.
    `losses`: so many stored values are lost, whichever and whenever. `left`: so often tasks may run again after that.
    `large`: takes so long that the tests leave it out.
    """

    name: str
    floor: int
    processes: int
    main: Steps
    bodies: tuple[Steps, ...]
    mortal: tuple[str, ...] = ()
    copies: int = 0
    losses: int = 0
    left: int = 0
    large: bool = False


# -- main programs: p0 makes an object, lends it, and forgets it ------------------------------------------------------

_LEND: Steps = (("put", "x"), ("submit", "r", P1, 0, "x"), ("drop", "x", "r"))
_LEND_STORED: Steps = (("store", "x"), *_LEND[1:])
_LEND_AND_WAIT: Steps = (("put", "x"), ("submit", "r", P1, 0, "x"), ("drop", "x"), ("get", "r"), ("drop", "r"))
_LEND_PENDING: Steps = (("submit", "x", P1, 0), ("submit", "r", P2, 1, "x"), ("drop", "x", "r"))
_PASS_PENDING: Steps = (
    ("submit", "x", P1, 0),
    ("pass", "r", P2, 1, "x"),
    ("drop", "x"),
    ("get", "r", "y"),
    ("drop", "r"),
)

_GET: Steps = (("submit", "x", P1, 0), ("get", "x"), ("drop", "x"))
_CHAIN: Steps = (("submit", "x", P1, 0), ("pass", "y", P1, 1, "x"), ("drop", "x"), ("get", "y"), ("drop", "y"))
_FROM_STORED: Steps = (("store", "x"), ("pass", "y", P1, 0, "x"), ("drop", "x"), ("get", "y"), ("drop", "y"))

# -- bodies ----------------------------------------------------------------------------------------------------------

_KEEP: Steps = (("keep", "a0", "kept"), ("return",))
_FORGET: Steps = (("drop", "a0"), ("return",))
_READ: Steps = (("get", "a0", "b"), ("drop", "a0"), ("keep", "b", "kept"), ("return",))
_GIVE_UP: Steps = (("try", "a0"), ("drop", "a0"), ("return",))
_LEND_ON: tuple[Steps, ...] = ((("submit", "q", P2, 1, "a0"), ("drop", "a0", "q"), ("return",)), _KEEP)
_ASK_BACK: tuple[Steps, ...] = (
    (("submit", "q", P2, 1, "a0"), ("drop", "a0"), ("get", "q", "b"), ("drop", "q"), ("return",)),
    (("return", "a0"),),
)
_LEND_INSIDE: tuple[Steps, ...] = (
    (("put", "k", "a0"), ("drop", "a0"), ("submit", "q", P2, 1, "k"), ("drop", "k", "q"), ("return",)),
    _READ,
)
_LEND_TWICE: Steps = (
    ("submit", "q", P2, 1, "a0"),
    ("submit", "q2", P2, 2, "a0"),
    ("drop", "a0", "q", "q2"),
    ("return",),
)
_LEND_TWICE_AND_DIE: Steps = (*_LEND_TWICE[:2], ("die",))
_MAKE_STORED: Steps = (("return stored",),)
_MAKE_INSIDE: Steps = (("put", "y"), ("return", "y"))

SCENARIOS: tuple[Scenario, ...] = (
    Scenario("borrow", 40, 2, _LEND_AND_WAIT, (_KEEP,)),
    Scenario("borrow, two control messages arrive twice", 180, 2, _LEND_AND_WAIT, (_KEEP,), copies=2),
    Scenario("borrow, the borrower dies", 80, 2, _LEND_AND_WAIT, (_KEEP,), (P1,)),
    Scenario("borrow, the owner dies", 70, 2, _LEND_AND_WAIT, (_KEEP,), (P0,)),
    Scenario("lend on", 250, 3, _LEND, _LEND_ON),
    Scenario("lend on, anyone dies", 1900, 3, _LEND, _LEND_ON, ANYONE),
    Scenario("return a borrowed ref", 200, 3, _LEND, _ASK_BACK),
    Scenario("return a borrowed ref, one message arrives twice", 900, 3, _LEND, _ASK_BACK, copies=1),
    Scenario("return a borrowed ref, anyone dies", 2400, 3, _LEND, _ASK_BACK, ANYONE),
    Scenario("get of a container", 500, 3, _LEND, _LEND_INSIDE),
    Scenario("get of a container, anyone dies", 5000, 3, _LEND, _LEND_INSIDE, ANYONE),
    Scenario("borrow again after release", 3500, 3, _LEND, (_LEND_TWICE, _FORGET, _KEEP)),
    Scenario(
        "borrow again after release, a borrower dies",
        12000,
        3,
        _LEND,
        (_LEND_TWICE, _FORGET, _KEEP),
        (P1, P2),
        large=True,
    ),
    Scenario(
        "a value for a ref that was given up",
        11000,
        3,
        _LEND_STORED,
        (_LEND_TWICE_AND_DIE, _GIVE_UP, _READ),
        large=True,
    ),
    Scenario(
        "a value for a ref that was given up, the lender dies",
        24000,
        3,
        _LEND_STORED,
        (_LEND_TWICE, _GIVE_UP, _READ),
        (P1,),
        large=True,
    ),
    Scenario("a value that is still to be made, anyone dies", 1200, 3, _LEND_PENDING, (_MAKE_STORED, _READ), ANYONE),
    Scenario(
        "a result inside a result, anyone dies", 1900, 3, _PASS_PENDING, (_MAKE_INSIDE, (("return", "a0"),)), ANYONE
    ),
    Scenario("a result is lost, twice", 55, 2, _GET, (_MAKE_STORED,), losses=2, left=1),
    Scenario("a result is lost, anyone dies", 160, 2, _GET, (_MAKE_STORED,), (P0, P1), losses=1, left=1),
    Scenario("a link of a chain is lost, twice", 1100, 2, _CHAIN, (_MAKE_STORED, _MAKE_STORED), losses=2, left=1),
    Scenario("an argument that nobody can make again is lost", 350, 2, _FROM_STORED, (_MAKE_STORED,), losses=2, left=1),
    Scenario("a borrowed value is lost", 480, 3, _LEND_PENDING, (_MAKE_STORED, _READ), losses=1, left=1),
    Scenario(
        "a borrowed value is lost, anyone dies", 4500, 3, _LEND_PENDING, (_MAKE_STORED, _READ), ANYONE, losses=1, left=1
    ),
)
