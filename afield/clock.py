"""The one place where the runtime reads time, so that cores can be handed a simulated clock instead."""

from __future__ import annotations

import time
from collections.abc import Callable

#: Seconds on a clock that never goes back.
Clock = Callable[[], float]

monotonic: Clock = time.monotonic
