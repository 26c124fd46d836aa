"""Device arrays after the end of what they belong to: a session that was shut down, or a process that was forked."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import Any

import afield
from tests.device_helpers import PATIENCE_S, on_device, raised_by, runtime_with


def in_child(attempts: list[Callable[[], Any]]) -> list[str]:
    """Return how calls ended in a forked child: the names of the errors that they raised."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            for attempt in attempts:
                try:
                    attempt()
                    os.write(writer, b"nothing ")
                except Exception as error:
                    os.write(writer, f"{type(error).__name__} ".encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    assert os.waitpid(child, 0)[1] == 0
    with os.fdopen(reader) as answers:
        return answers.read().split()


def use_after_shutdown() -> None:
    module = afield.array_module()
    mine = module.arange(3)
    ref = afield.put(mine)
    stored, host = afield.get(ref, device=0), afield.get(ref)
    afield.shutdown()
    for use in (mine.get, stored.get, stored.tolist, lambda: mine + 1, lambda: module.ones(3)):
        assert "the runtime was shut down" in raised_by(use, afield.NotInitializedError)
    assert host.tolist() == [0, 1, 2]
    afield.init(num_cpus=1, devices="emulated:1:32MiB")
    assert "the runtime was shut down" in raised_by(lambda: afield.put(mine), afield.NotInitializedError)
    assert afield.get(afield.put(afield.array_module().arange(3))).tolist() == [0, 1, 2]
    afield.shutdown()


def use_after_fork() -> None:
    module = afield.array_module()
    array = module.ones(3)
    kinds = in_child([array.sum, array.get, lambda: module.zeros(3), lambda: array.fill(0)])
    assert kinds == ["NotInitializedError"] * 4
    assert array.tolist() == [1, 1, 1]


@on_device
def use_after_fork_in_a_task() -> None:
    use_after_fork()


def test_arrays_of_a_session_that_was_shut_down() -> None:
    with runtime_with("emulated:1:32MiB"):
        use_after_shutdown()


def test_a_forked_child_has_no_device() -> None:
    """It has a copy of what says which bytes are free, and would write to those that its parent uses next."""
    with runtime_with("emulated:1:32MiB"):
        use_after_fork()
        afield.get(use_after_fork_in_a_task.remote(), timeout=PATIENCE_S)
        afield.shutdown()
