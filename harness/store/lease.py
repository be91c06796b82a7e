"""The lease of a cell: who works on it, on whatever machine that shares the folder.

`<cell>.lease` names its holder, who touches it every few seconds. A lease is free when its holder released it, when the
holder is a process of this machine that is no more, or when it has not been touched for `STALE_S` (a machine that went
away, a process that was stopped). Whoever finds a free one takes it over; a holder that finds its lease taken ends at
once. What both may have written is the same, file by file, whole or absent."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from harness.data.files import locked
from harness.data.record import Record
from harness.data.sealed import Damaged
from harness.progress import wait_in_silence

BEAT_S = 5.0
STALE_S = 90.0
POLL_S = 0.3
STOPPED = ("T", "t")
TAKEN = 75  # exit status of a process whose lease was taken over (EX_TEMPFAIL)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder(Record):
    """The process that holds a lease."""

    VERSION: ClassVar[int] = 1

    host: str
    place: str  # this boot of this machine, and the process ids that are meant
    pid: int
    started: str  # a later process may get the same id
    token: str

    @property
    def is_here(self) -> bool:
        return self.place == _place()

    @property
    def is_gone(self) -> bool:
        """Whether it is known to be no more."""
        return self.is_here and _started(self.pid) != self.started

    def is_silent(self, age_s: float) -> bool:
        """Whether it does nothing, that long after its last beat: of other machines only that tells; a process of this
        one must have been stopped, for after a night's sleep of a laptop all beats are old."""
        return age_s >= STALE_S and (not self.is_here or _state(self.pid) in STOPPED)


@contextmanager
def lease(folder: Path, waiting: Callable[[], None] = wait_in_silence) -> Iterator[None]:
    """Inside, this process works on `folder` and no other does. Waits for whoever does, says for whom, and calls
    `waiting` again and again."""
    path = folder.with_name(f"{folder.name}.lease")
    mine = Holder(socket.gethostname(), _place(), os.getpid(), _started(os.getpid()), uuid.uuid4().hex)
    told = False
    while (holder := _take(path, mine)) is not None:
        if not told:
            log.info("waiting for process %d on %s, which works on this cell", holder.pid, holder.host)
            told = True
        waiting()
        time.sleep(POLL_S)
    released = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, mine, released), daemon=True)
    beat.start()
    try:
        yield
    finally:
        released.set()
        beat.join()
        with locked(path, "a lease"):
            if _holder(path) == mine:
                path.unlink(missing_ok=True)


def _take(path: Path, mine: Holder) -> Holder | None:
    """Take a lease that is free; else its holder."""
    with locked(path, "a lease"):
        holder = _holder(path)
        if holder is not None and not holder.is_gone and not holder.is_silent(_age_s(path)):
            return holder
        if holder is not None and not holder.is_gone:
            log.warning("process %d on %s has been silent for long; its cell is taken over", holder.pid, holder.host)
        mine.write(path)
        return None


def _holder(path: Path) -> Holder | None:
    try:
        return Holder.read(path)
    except (FileNotFoundError, Damaged):
        return None


def _age_s(path: Path) -> float:
    """Since the last beat, by the clock of the file system that both see."""
    lock = path.with_name(f"{path.name}.lock")
    os.utime(lock)
    return lock.stat().st_mtime - path.stat().st_mtime


def _beat(path: Path, mine: Holder, released: threading.Event, end: Callable[[int], object] = os._exit) -> None:
    while not released.wait(BEAT_S):
        with suppress(OSError):  # a folder that cannot be reached for a moment: the next beat may find it again
            if _holder(path) != mine and not released.is_set():
                log.error("this cell was taken over by another process while this one stood still")
                end(TAKEN)
            os.utime(path)


def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _state(pid: int) -> str:
    """The letter of a process's state; empty where the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began, in the system's own units; empty for one that is no more, or only waits to be counted."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except OSError:
        import psutil

        try:
            return str(psutil.Process(pid).create_time())
        except psutil.Error:
            return ""
