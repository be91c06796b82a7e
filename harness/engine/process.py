"""A process of ours at work: it says how far it is, and how it ended. Started by harness.engine.local.

Everything that is printed goes to the cell's log."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection


@dataclass(frozen=True)
class Phase:
    """How far a process is with what it does."""

    phase: str
    done: int
    total: int


@dataclass(frozen=True)
class Ended:
    """The last message of a process."""

    error: str = ""  # one line; empty when the work was finished


Message = Phase | Ended


class Speaker:
    """The progress of a process, to its parent: at most a few lines a second. A parent that is gone ends the process:
    nobody will read the rest."""

    def __init__(self, messages: Connection) -> None:
        self.messages, self._last = messages, 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        if done == total or time.monotonic() - self._last > 0.2:
            self._last = time.monotonic()
            self.say(Phase(phase, done, total))

    def say(self, message: Message) -> None:
        self.messages.send(message)


Work = Callable[[Speaker], None]


def main(work: Work, messages: Connection, log: str, variables: Mapping[str, str]) -> None:
    """Entry of the process, whose environment may be older than its orders: the server of the forks started once."""
    speak = Speaker(messages)
    try:
        os.environ.clear()
        os.environ.update(variables)
        with open(log, "a") as out:
            for descriptor in (1, 2):  # stdout, stderr
                os.dup2(out.fileno(), descriptor)
        work(speak)
        speak.say(Ended())
    except BrokenPipeError:
        sys.exit(1)
    except BaseException as error:  # the one place where every failure becomes a row
        traceback.print_exc()
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        speak.say(Ended(first if isinstance(error, ValueError) and first else f"{type(error).__name__}: {first}"))
        sys.exit(1)
