"""Which afield this is."""

from __future__ import annotations

import os

VERSION = "0.1.0"
#: The folder that it was imported from.
PACKAGE = os.path.dirname(os.path.abspath(__file__))
