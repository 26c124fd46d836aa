"""Where objects were created, which is recorded only if `AFIELD_RECORD_CALL_SITES=1` when the session starts.

`RecordingTable` then takes the place of the ordinary table, which has no code for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from afield.runtime.cores.ownership import OwnershipTable

#: The folder of the runtime: code below it is no user's.
_RUNTIME = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def _is_runtime(filename: str) -> bool:
    """Tell whether a file is part of the runtime."""
    return os.path.abspath(filename).startswith(_RUNTIME)


class RecordingTable(OwnershipTable):
    """An ownership table that notes where each object of ours was created."""

    def own(self, object_id: bytes, task: Any) -> None:
        """A task was submitted."""
        super().own(object_id, task)
        self.created(object_id, call_site())

    def put(self, object_id: bytes, kind: int, value: Any, contained: Iterable[bytes] = ()) -> None:
        """A value was put."""
        super().put(object_id, kind, value, contained)
        self.created(object_id, call_site())

    def begin_life(self, object_id: bytes) -> None:
        """An actor was created."""
        super().begin_life(object_id)
        self.created(object_id, call_site())


def call_site() -> str:
    """Return "file:line in function" of the innermost caller that is no part of the runtime."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_runtime(frame.f_code.co_filename):
        frame = frame.f_back
    return sys.intern(f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}()")
