"""The command `afield`: looks into the sessions that run on this machine.

Theory of operation. Sessions are found by their directories (`sessions`), and asked over their daemon's socket (`client`);
nothing is changed in them. What dead sessions left behind is swept on the way. On a terminal tables are drawn by rich;
elsewhere they are plain aligned text for other programs, and `--json` prints everything for programs that parse.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from afield.errors import AfieldError
from afield.runtime.session.sessions import SessionInfo, find_sessions, sweep
from afield.runtime.tools.client import Client
from afield.runtime.tools.memory import MemoryEntry, assemble
from afield.runtime.tools.security import security
from afield.runtime.tools.stack import MAX_WIDTH, Display, Line, as_json, processes_of, rendered
from afield.units import format_bytes

_ORDERS: dict[str, Callable[[MemoryEntry], Any]] = {
    "size": lambda entry: -entry.size,
    "owner": lambda entry: entry.owner,
    "tier": lambda entry: entry.tier,
    "site": lambda entry: entry.call_site or "~",
}
_EXAMPLES = """examples:
  afield status                     what runs on this machine
  afield memory                     the objects of the only session, the largest first
  afield memory --session 3f2a      of the session whose name begins with 3f2a
  afield memory --json | jq '.[0]'  for programs
  afield stack                      what every process is doing, where something hangs
  afield stack --pid 1234 --full    of one process, with afield's own frames
Set AFIELD_RECORD_CALL_SITES=1 before a program starts to see where its objects are created.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 1 when there is nothing to look at, 2 for wrong usage."""
    options = _parser().parse_args(arguments)
    if not hasattr(options, "run"):
        _parser().print_help()
        return 2
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except AfieldError as error:
        print(f"afield: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="afield",
        description="Look into the afield sessions of this machine.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.set_defaults(run=run)
        return added

    memory = command("memory", "list live objects: size, where they lie, who owns them, why they are alive", _memory)
    memory.add_argument("--sort", choices=list(_ORDERS), default="size", help="order of the objects (default: size)")
    memory.add_argument("--limit", type=int, metavar="N", help="show only the first N objects")
    status = command("status", "show the sessions: resources, store, processes", _status)
    stack = command("stack", "show what every process does: its threads' Python stacks, and the task that runs", _stack)
    stack.add_argument("--pid", type=int, action="append", metavar="PID", help="only this process; may be repeated")
    stack.add_argument("--full", action="store_true", help="show afield's own frames as well")
    stack.add_argument(
        "--cores", "--debug", action="store_true", help="also what afield's own state machines did last and complain of"
    )
    for added in (memory, stack):
        added.add_argument(
            "--session", metavar="NAME", help="the session (or how its name begins), if there are several"
        )
    for added in (memory, status, stack):
        added.add_argument("--json", action="store_true", help="print JSON")
        added.add_argument("--dir", metavar="PATH", help="look for sessions here (the spill_dir of init)")
    status.add_argument("--security", action="store_true", help="also what of the session others could reach")
    command("version", "print the version", _version)
    return parser


# -- commands -----------------------------------------------------------------------------------------------------


def _version(options: argparse.Namespace) -> int:
    print(f"afield {importlib.metadata.version('afield')}")
    return 0


def _status(options: argparse.Namespace) -> int:
    sessions = _sessions(options)
    if not sessions:
        return _nothing(options)
    described = []
    for session in sessions:
        try:
            facts = _describe(session)
            if options.security:
                facts["security"] = security(session, [process["pid"] for process in facts["processes"]])
            described.append(facts)
        except AfieldError as error:  # it ends while we look
            print(f"afield: {error}", file=sys.stderr)
    if options.json:
        print(json.dumps(described, indent=2))
        return 0 if described else 1
    for index, facts in enumerate(described):
        if index:
            print()
        _print_status(facts)
        if options.security:
            _print_security(facts["security"])
    return 0 if described else 1


def _describe(session: SessionInfo) -> dict[str, Any]:
    with Client(session) as client:
        workers = {worker["pid"]: worker for worker in client.ask("workers")}
        total, available = client.ask("total"), client.ask("available")
        processes = [
            {"pid": pid, "kind": kind, "name": name, "busy": bool(workers.get(pid, {}).get("lease"))}
            for _, pid, kind, name in client.ask("census")
        ]
        processes += [
            {"pid": one["pid"], "kind": "store", "name": one["device"] or "disk", "busy": False}
            for one in client.ask("stores")
            if one["pid"]
        ]
        return {
            "session": session.name,
            "driver_pid": session.driver_pid,
            "started_at": session.started_at,
            "directory": session.directory,
            "resources": {
                name: {"total": amount, "available": available.get(name, 0)} for name, amount in total.items()
            },
            "store": client.ask("store"),
            "processes": processes,
        }


def _print_status(facts: dict[str, Any]) -> None:
    age = time.time() - facts["started_at"]
    store = facts["store"]
    print(f"session {facts['session']}, driver pid {facts['driver_pid']}, up {_duration(age)}")
    print(
        f"store {format_bytes(store['used'])} of {format_bytes(store['capacity'])} used, {store['objects']} objects\n"
    )
    if _is_tiered(store["tiers"]):
        tiers = [
            (
                name,
                *(format_bytes(tier[key]) for key in ("used", "sealed", "leased")),
                format_bytes(tier["capacity"]) if tier["capacity"] else "",
            )
            for name, tier in store["tiers"].items()
        ]
        _table(("tier", "used", "by objects", "by processes", "capacity"), tiers, right=(1, 2, 3, 4))
        print()
    rows = [
        (name, _amount(name, amount["available"]), _amount(name, amount["total"]))
        for name, amount in facts["resources"].items()
    ]
    _table(("resource", "available", "total"), rows, right=(1, 2))
    print()
    processes = [
        (str(process["pid"]), process["kind"], process["name"], "leased" if process["busy"] else "")
        for process in facts["processes"]
    ]
    _table(("pid", "kind", "name", "state"), processes, right=(0,))


def _print_security(facts: dict[str, Any]) -> None:
    print()
    _table(("file", "mode", "uid"), [(one["path"], one["mode"], one["uid"]) for one in facts["files"]], right=(1, 2))
    print()
    memory = [(one["name"], "sealed" if one["sealed"] else "NOT SEALED") for one in facts["memory"]]
    _table(("shared memory", "size"), memory, right=())
    print()
    _table(("listens on",), [(name,) for name in facts["listeners"]], right=())
    print()
    print("\n".join(f"WARNING {warning}" for warning in facts["warnings"]) or "nothing that others could reach")


def _is_tiered(tiers: dict[str, Any]) -> bool:
    """Tell whether there is more to say than how full the host store is."""
    return len(tiers) > 2 or bool(tiers["disk"]["used"])


def _memory(options: argparse.Namespace) -> int:
    session = _the_session(options)
    if session is None:
        return 1
    with Client(session) as client:
        answer = client.ask("memory")
    entries = assemble(answer)
    entries.sort(key=_ORDERS[options.sort])
    if entries.silent:
        silent = ", ".join(entries.silent)
        print(f"afield: busy, and did not answer in time: {silent}; what they hold is missing", file=sys.stderr)
    shown = entries if options.limit is None else entries[: options.limit]
    if options.json:
        print(json.dumps([asdict(entry) for entry in shown], indent=2))
        return 0
    rows = [
        (
            entry.object_id,
            format_bytes(entry.size),
            entry.tier,
            entry.owner,
            "; ".join(entry.why),
            entry.call_site or "",
        )
        for entry in shown
    ]
    _table(("object", "size", "tier", "owner", "why it is alive", "created at"), rows, right=(1,))
    total = sum(entry.size for entry in entries)
    left_out = f", {len(entries) - len(shown)} of them not shown" if len(shown) < len(entries) else ""
    more = f"; and {entries.left_out} smaller ones, which are not listed" if entries.left_out else ""
    print(f"{len(entries)} objects, {format_bytes(total)}{left_out}{more}")
    return 0


def _stack(options: argparse.Namespace) -> int:
    session = _the_session(options)
    if session is None:
        return 1
    with Client(session) as client:
        processes = processes_of(client.ask("stack", options.cores))
    if options.pid:
        missing = sorted(set(options.pid) - {process.pid for process in processes})
        processes = [process for process in processes if process.pid in options.pid]
        if missing:
            named = ", ".join(map(str, missing))
            print(f"afield: {named}: no such process in session {session.name}; see `afield status`", file=sys.stderr)
        if not processes:
            return 1
    if options.json:
        print(json.dumps(as_json(processes), indent=2))
        return 0
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else MAX_WIDTH
    _print_lines(rendered(processes, Display(width, options.full)))
    return 0


def _the_session(options: argparse.Namespace) -> SessionInfo | None:
    """Return the session that is meant; None, and a word about it, if there is none, or several."""
    sessions = _sessions(options)
    if options.session:
        sessions = [session for session in sessions if session.name.startswith(options.session)]
    if not sessions:
        _nothing(options)
        return None
    if len(sessions) > 1:
        listed = "\n".join(f"  {session.name}  driver pid {session.driver_pid}" for session in sessions)
        print(f"afield: several sessions run here; choose one with --session:\n{listed}", file=sys.stderr)
        return None
    return sessions[0]


def _sessions(options: argparse.Namespace) -> list[SessionInfo]:
    sweep(options.dir)
    return find_sessions(options.dir)


def _nothing(options: argparse.Namespace) -> int:
    named = f" whose name begins with {options.session}" if getattr(options, "session", None) else ""
    hint = "" if options.dir else " (one with a spill_dir of its own is found with --dir)"
    print(f"afield: no session of yours{named} runs on this machine{hint}", file=sys.stderr)
    return 1


# -- tables -------------------------------------------------------------------------------------------------------


#: On a terminal: what a line is -> how it looks.
_STYLES = {"head": "bold", "source": "", "ours": "dim", "wrong": "bold red"}


def _print_lines(lines: Iterable[Line]) -> None:
    """Print lines: with styles on a terminal, as they are elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.text import Text

        console = Console(highlight=False)
        for line in lines:
            console.print(Text(line.text, _STYLES.get(line.role, "")), no_wrap=True, crop=True)
        return
    for line in lines:
        print(line.text)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Print a table: drawn on a terminal, aligned text elsewhere; the columns `right` are aligned to the right."""
    if sys.stdout.isatty():
        from rich.console import Console  # not needed by whoever reads us through a pipe
        from rich.table import Table
        from rich.text import Text

        drawn = Table(header_style="bold")
        for index, title in enumerate(head):
            drawn.add_column(title, justify="right" if index in right else "left", overflow="fold")
        for row in rows:
            drawn.add_row(*map(Text, row))
        Console().print(drawn)
        return
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head))]
    for line in (head, *rows):
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _amount(name: str, amount: float) -> str:
    return format_bytes(int(amount)) if name.endswith("memory") else f"{amount:g}"


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds // 60) % 60, int(seconds // 3600)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{int(seconds)} s"


if __name__ == "__main__":
    sys.exit(main())
