"""Live progress of cells. On a terminal one display: a line for each cell at work, one for how many are done; a cell
that ends becomes a line above it. Elsewhere a line per phase, and in a long one a line now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from harness.engine.process import Ended, Message, Note, Phase
from harness.store.cells import CellStore
from harness.store.records import CellSpec, Ending

EVERY_S = 120  # seconds between lines about one phase
MEMORY_S = 3600.0  # over which a time that is left is estimated: a step of a phase may take minutes
COUNTED = {  # by phases; a protocol's counts windows, a task's tokens
    "compress": "block",
    "estimate errors": "layer",
    "remember": "window",
    "train": "step",
}
TOKENS = " (tokens)"  # how phases end that count them


def open_console(quiet: bool = False) -> Console:
    """Progress and notes, beside the tables. Names from outside are printed as they are."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True, quiet=quiet)


def say_waiting(console: Console) -> None:
    console.print("waiting until no other run of yours measures or works on this machine", style="dim")


def tokens_by_phase(spec: CellSpec) -> dict[str, int]:
    """How many tokens a step of a cell's phases has, where it has a fixed number."""
    found = {protocol.name: protocol.context for protocol in spec.protocols.values()}
    if training := spec.training:
        found |= {"remember": training.windows.context, "train": training.windows.context * training.batch}
    return found


@dataclass
class _Work:
    """A cell at work; moments are of the monotonic clock, in seconds."""

    start: float
    phase: str
    began: float  # when the phase was first heard of
    first: int  # how much of it was done by then: a resumed one begins in the middle
    said: float  # when the last line about it was printed


class Display:
    """Use as a context; `message` may be called from any thread.

    `labels` are the cells to be worked on, by key, and `specs` what is known of them; `what` is done to them, and
    `done` were found finished. A quiet console hears of errors alone."""

    def __init__(
        self,
        console: Console,
        labels: Mapping[str, str],
        specs: Sequence[CellSpec] = (),
        what: str = "cells",
        done: int = 0,
        verbose: bool = False,
    ) -> None:
        self.console, self.labels, self.verbose = console, labels, verbose
        self._errors = open_console() if console.quiet else console
        self._tokens = {spec.key: tokens_by_phase(spec) for spec in specs}
        self._lock, self._failed = threading.Lock(), 0
        self._work: dict[str, _Work] = {}
        self._tasks: dict[str, TaskID] = {}
        self._running = Progress(
            TextColumn("{task.description}", table_column=Column(max_width=32, no_wrap=True, overflow="ellipsis")),
            TextColumn("{task.fields[phase]}", table_column=Column(max_width=24, no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[place]}", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(),  # of this phase
            console=console,
            speed_estimate_period=MEMORY_S,
        )
        self._overall = Progress(
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[failed]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=24 * MEMORY_S,
        )
        self._whole = self._overall.add_task(what, total=done + len(labels), completed=done, failed="")
        live = console.is_terminal and not console.quiet
        self._live = Live(Group(self._running, self._overall), console=console, transient=True) if live else None

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

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
        now, work = time.monotonic(), self._work.get(key)
        if work is None or phase != work.phase:
            self._detail(key)
            if not self._live:
                self.console.print(f"{self.labels[key]}: {phase}")
            work = self._work[key] = _Work(work.start if work else now, phase, now, done, now)
            if key in self._tasks:
                self._running.reset(self._tasks[key])
        elif not self._live and work.first < done < total and now - work.said > EVERY_S:
            left = (now - work.began) * (total - done) / (done - work.first)
            self.console.print(f"{self.labels[key]}: {phase} {done / total:.0%}, about {left / 60:.0f} min left")
            work.said = now
        if self._live:
            self._show(key, work, done, total)

    def _show(self, key: str, work: _Work, done: int, total: int) -> None:
        """Update the line of a cell at work."""
        if key not in self._tasks:
            self._tasks[key] = self._running.add_task(self.labels[key], total=None, phase="", place="")
        counts_tokens, seconds = work.phase.endswith(TOKENS), time.monotonic() - work.began
        tokens = 1 if counts_tokens else self._tokens.get(key, {}).get(work.phase, 0)  # of a step
        parts = []
        if total > 1 and not counts_tokens:
            parts.append(f"{COUNTED.get(work.phase, 'window' if tokens else '')} {done} of {total}".strip())
        if tokens and done > work.first and seconds > 0:
            parts.append(f"{(done - work.first) * tokens / seconds:,.0f} tokens/s")
        name = work.phase.removesuffix(TOKENS)
        self._running.update(self._tasks[key], completed=done, total=total, phase=name, place="  ".join(parts))

    def _detail(self, key: str) -> None:
        """With --verbose: how long the phase took that is over, or where the cell's files are when none is."""
        if self.verbose:
            work = self._work.get(key)
            over = f"{work.phase} took {time.monotonic() - work.began:.1f} s" if work else CellStore(key).folder
            self.console.print(f"{self.labels[key]}: {over}", style="dim")

    def _end(self, key: str, ended: Ended) -> None:
        work = self._work.get(key)
        if work:
            self._detail(key)
        if (task := self._tasks.pop(key, None)) is not None:
            self._running.remove_task(task)
        if ended.ending == Ending.INTERRUPTED and not work:
            return  # it was told to end before it began
        self._failed += bool(ended.error)
        self._overall.update(self._whole, advance=1, failed=f"{self._failed} without a result" if self._failed else "")
        if ended.error:
            self._errors.print(f"{self.labels[key]}: {ended.ending}: {ended.error}", style="red")
        else:
            took = f"  ({time.monotonic() - work.start:.0f} s)" if self._live and work else ""
            self.console.print(f"{self.labels[key]}: done{took}")
