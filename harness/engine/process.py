"""A process of ours at work: it says how far it is, and how it ended. Started by harness.engine.local.

Messages are {"phase", "done", "total"}, at last {"error"} or {"finished"}; everything that is printed goes to the
cell's log."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any


class Speaker:
    """Progress to the parent, at most a few lines a second. A parent that is gone ends the process: nobody will read
    the rest."""

    def __init__(self, messages: Connection) -> None:
        self.messages, self._last = messages, 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        if done == total or time.monotonic() - self._last > 0.2:
            self._last = time.monotonic()
            self.say(phase=phase, done=done, total=total)

    def say(self, **message: Any) -> None:
        self.messages.send(message)


Work = Callable[[dict[str, Any], Speaker], None]


def main(work: Work, spec: dict[str, Any], messages: Connection, log: str, variables: Mapping[str, str]) -> None:
    """Entry of the process, whose environment may be older than its orders: the server of the forks started once."""
    speak = Speaker(messages)
    try:
        os.environ.clear()
        os.environ.update(variables)
        with open(log, "a") as out:
            for descriptor in (1, 2):  # stdout, stderr
                os.dup2(out.fileno(), descriptor)
        work(spec, speak)
        speak.say(finished=True)
    except BrokenPipeError:
        sys.exit(1)
    except BaseException as error:  # the one place where every failure becomes a row
        traceback.print_exc()
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        speak.say(error=f"{type(error).__name__}: {first}" if not isinstance(error, ValueError) else first)
        sys.exit(1)
