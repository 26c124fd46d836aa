"""Text that comes from others: what of it is text at all, and what of it a terminal would execute."""

from __future__ import annotations

import re
from typing import TypeGuard

#: Control characters, but for the tab and the carriage return of progress bars; colours and weights (SGR) change how the text
#: around them looks and nothing else, so they are let through.
_CONTROL = re.compile(r"\x1b\[[0-9;:]{0,32}m|[\x00-\x08\x0a-\x0c\x0e-\x1f\x7f-\x9f]")


def is_text(value: object) -> TypeGuard[str]:
    """Tell whether a value is a string that can be written as UTF-8: one with a lone surrogate cannot."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def harmless(line: str) -> str:
    r"""Return a line as a terminal may get it: its escapes are shown (`\x1b`) and not executed, colours excepted."""
    return _CONTROL.sub(_shown, line)


def _shown(found: re.Match[str]) -> str:
    text = found.group()
    return text if len(text) > 1 else f"\\x{ord(text):02x}"
