"""A process of ours at work: it says how far it is, what it noticed, and how it ended. Started by harness.engine.local.

Everything that is printed goes to the cell's log."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import harness
import kernels
import methods
from harness.progress import lacks_memory, printable
from harness.store.records import Ending

OURS = tuple(Path(package.__path__[0]) for package in (harness, kernels, methods))


WAITING = "waiting"  # how phases begin in which a process only waits


@dataclass(frozen=True)
class Phase:
    """How far a process is with what it does."""

    phase: str
    done: int
    total: int


@dataclass(frozen=True)
class Note:
    """Something a person should know, in one line."""

    text: str
    warning: bool


@dataclass(frozen=True)
class Ended:
    """The last message of a process."""

    error: str = ""  # one line; empty when the work was finished
    ending: Ending = Ending.OK


Message = Phase | Note | Ended
Watch = Callable[[str, Message], None]  # (cell key, message of the cell's process)
INTERRUPTED = Ended("the same command goes on from here", Ending.INTERRUPTED)


class Speaker:
    """The progress of a process, to its parent: at most a few lines a second."""

    def __init__(self, messages: Connection) -> None:
        self.messages, self._last, self._lock = messages, 0.0, threading.Lock()

    def __call__(self, phase: str, done: int, total: int) -> None:
        if done == total or time.monotonic() - self._last > 0.2:
            self._last = time.monotonic()
            self.say(Phase(phase, done, total))

    def say(self, message: Message) -> None:
        with self._lock:  # notes come from other threads too
            self.messages.send(message)


class _Notes(logging.Handler):
    """What is logged, as notes to the parent."""

    def __init__(self, speak: Speaker, level: int) -> None:
        super().__init__(level)
        self.speak = speak

    def emit(self, record: logging.LogRecord) -> None:
        self.speak.say(Note(printable(record.getMessage()), record.levelno >= logging.WARNING))


Work = Callable[[Speaker], None]


def main(
    work: Work, messages: Connection, alive: Connection, log: str, variables: Mapping[str, str], level: int
) -> None:
    """Entry of the process, whose environment may be older than its orders: the server of the forks started once. A
    parent that is gone (`alive` ends) ends the process at once: nobody will read the rest. What is logged at `level`
    and above is noted."""
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
    speak = Speaker(messages)
    try:
        os.environ.clear()
        os.environ.update(variables)
        with open(log, "a") as out:
            for descriptor in (1, 2):  # stdout, stderr
                os.dup2(out.fileno(), descriptor)
        logger = logging.getLogger("harness")
        logger.setLevel(level)
        logger.handlers = [_Notes(speak, level), logging.StreamHandler()]
        work(speak)
        speak.say(Ended())
    except BrokenPipeError:
        sys.exit(1)
    except BaseException as error:  # the one place where every failure becomes a row
        traceback.print_exc()
        speak.say(ended(error))
        sys.exit(1)


def _end_with(alive: Connection) -> None:
    try:
        alive.recv()
    except (EOFError, OSError):
        os._exit(1)


def ended(error: BaseException) -> Ended:
    """How work ended that raised this."""
    found = _ended(error)
    return replace(found, error=printable(found.error))


def _ended(error: BaseException) -> Ended:
    import torch

    from methods.codecs.error_feedback import NotFinite

    lines = str(error).strip().splitlines()
    first = lines[0][:300] if lines else ""
    if isinstance(error, KeyboardInterrupt):  # Ctrl-C, which a terminal sends to all processes
        return INTERRUPTED
    if isinstance(error, torch.OutOfMemoryError):
        return Ended(f"out of memory on the device ({first})", Ending.OUT_OF_MEMORY)
    if lacks_memory(error):
        return Ended(f"out of memory on the host ({first or 'no more was to be had'})", Ending.OUT_OF_MEMORY)
    if isinstance(error, NotFinite):
        return Ended(first, Ending.NON_FINITE)
    if isinstance(error, ValueError) and first and _is_ours(error):
        return Ended(first, Ending.FAILED)
    if isinstance(error, OSError) and error.errno:
        what = f"{error.strerror}: {error.filename}" if error.filename else f"{error.strerror} ({_where(error)})"
        return Ended(f"{what}; free or repair it, the same command goes on", Ending.FAILED)
    return Ended(f"{type(error).__name__}: {first} ({_where(error)})", Ending.CRASHED)


def _is_ours(error: BaseException) -> bool:
    """Whether this project raised it, on purpose: then it says what to do."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not _in_ours(frames[-1]):
        return False
    line = frames[-1].line  # of what int(), zip() and the like raise, ours is the last line too, but it raises nothing
    return not line or "raise " in line


def _where(error: BaseException) -> str:
    """The last line of ours that the error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = ([f for f in frames if _in_ours(f)] or list(frames))[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def _in_ours(frame: traceback.FrameSummary) -> bool:
    return any(Path(frame.filename).is_relative_to(folder) for folder in OURS)
