"""Code that is interrupted at a chosen bytecode: a trace function that counts those of some files."""

from __future__ import annotations

from collections.abc import Set
from types import FrameType
from typing import Any


class Bytecodes:
    """Counts the bytecodes of `files` that run, and has `before` look at each; `trace` is the trace function."""

    def __init__(self, files: Set[str | None]) -> None:
        self._files = files
        self.count = 0

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Be the trace function."""
        if frame.f_code.co_filename not in self._files:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.count += 1
            self.before(frame)
        return self.trace

    def before(self, frame: FrameType) -> None:
        """The next bytecode of this frame is number `count`; may raise."""
        raise NotImplementedError


def place_of(frame: FrameType) -> str:
    """Say where a frame is."""
    return f"{frame.f_code.co_name}:{frame.f_lineno}:{frame.f_lasti}"
