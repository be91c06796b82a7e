"""Live progress of cells: bars on a terminal; elsewhere a line per phase, and in a long one a line now and then."""

from __future__ import annotations

import threading
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from harness.engine.process import Ended, Message, Note, Phase

EVERY_S = 120  # seconds between lines about one phase


class Display:
    """Use as a context; `message` may be called from any thread."""

    def __init__(self, console: Console, labels: dict[str, str]) -> None:
        self.console, self.labels = console, labels
        self._lock, self._phase = threading.Lock(), dict.fromkeys(labels, "")
        self._began: dict[str, tuple[float, float]] = {}  # of each cell's phase, and of the last line about it
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[phase]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),  # of this phase
        )
        self._bars = Progress(*columns, console=console) if console.is_terminal else None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Display:
        if self._bars:
            self._bars.start()
            self._tasks = {
                key: self._bars.add_task(label, total=None, phase="waiting", start=False)
                for key, label in self.labels.items()
            }
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def message(self, key: str, message: Message) -> None:
        with self._lock:
            match message:
                case Phase():
                    self._progress(key, message.phase, message.done, message.total)
                case Note():
                    style = "yellow" if message.warning else "dim"
                    self.console.print(f"{self.labels[key]}: {message.text}", style=style)
                case Ended():
                    self._end(key, message)

    def _progress(self, key: str, phase: str, done: int, total: int) -> None:
        if self._bars:
            self._bars.start_task(self._tasks[key])
            self._bars.update(self._tasks[key], completed=done, total=total, phase=phase)
        elif phase != self._phase[key]:
            self.console.print(f"{self.labels[key]}: {phase}")
            self._began[key] = (time.monotonic(), time.monotonic())
        elif 0 < done < total and time.monotonic() - self._began[key][1] > EVERY_S:
            began = self._began[key][0]
            left = (time.monotonic() - began) * (total - done) / done
            self.console.print(f"{self.labels[key]}: {phase} {done / total:.0%}, about {left / 60:.0f} min left")
            self._began[key] = (began, time.monotonic())
        self._phase[key] = phase

    def _end(self, key: str, ended: Ended) -> None:
        word = str(ended.ending) if ended.error else "done"
        if self._bars:
            self._bars.stop_task(self._tasks[key])
            self._bars.update(self._tasks[key], phase=word)
        if ended.error or not self._bars:
            text = f"{word}: {ended.error}" if ended.error else word
            self.console.print(f"{self.labels[key]}: {text}", style="red" if ended.error else "")
