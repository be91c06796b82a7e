"""How long work reports where it stands, and says what it does: the two signatures every part shares."""

from __future__ import annotations

import re
from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # (phase: what is going on, done, total)
Say = Callable[[str], None]  # one line for the person who waits


def silent(phase: str, done: int, total: int) -> None:
    """The `Progress` of a caller who does not want to know."""


def say_nothing(text: str) -> None:
    """The `Say` of a caller who does not want to know."""


def wait_in_silence() -> None:
    """What to do while waiting: nothing."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def lacks_memory(error: BaseException) -> bool:
    """Whether memory of the host is what was missing: Python, torch and safetensors each say so in their own way."""
    return isinstance(error, MemoryError) or bool(re.search("can(no|')t allocate memory", str(error), re.IGNORECASE))


def printable(text: str) -> str:
    """Text that moves no cursor and ends no line, whatever name from outside is in it."""
    return "".join(c if c.isprintable() else "?" for c in text)
