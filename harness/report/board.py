"""A board: the reports of cells that are scored by the same protocols and tasks.

A run has its own from the store; `stored_board` reads those that runs wrote, from their folders alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from harness.data.sealed import read_object
from harness.data.tasks import Task
from harness.plan.cells import Plan
from harness.report import latency
from harness.report.rows import (
    COLUMNS_AFTER,
    COLUMNS_BEFORE,
    CellReport,
    delta_columns,
    protocol_columns,
    report_of,
    role_columns,
)
from harness.report.sheet import Row, label
from harness.report.task_pages import task_columns
from harness.store.cells import CellStore
from harness.store.records import Outcome
from harness.store.results import Score
from methods.base import Track

RUN_FILE = "run.json"  # beside a leaderboard: what only the run itself knows


@dataclass(frozen=True)
class Board:
    reports: dict[str, CellReport]  # by cell
    protocols: tuple[str, ...]  # names
    tasks: tuple[Task, ...]
    reference: str  # the uncompressed model's cell; "" when a folder has none
    commands: tuple[str, ...]  # that made it

    @property
    def columns(self) -> list[str]:
        """Of its rows, in order."""
        roles = role_columns(self.reports.values())
        return [
            *COLUMNS_BEFORE,
            *delta_columns(self.reports.values()),
            *roles,
            *protocol_columns(self.protocols),
            *task_columns(self.tasks),
            *COLUMNS_AFTER,
        ]

    @property
    def bandwidth(self) -> float:
        """Bytes per second that the machine of its measurements can read."""
        return latency.best_bandwidth(report.bench for report in self.reports.values())

    @cached_property
    def filled(self) -> dict[str, CellReport]:
        """The reports with all that their rows say; resampling takes a while, so once."""
        return {key: report.filled(self.bandwidth) for key, report in self.reports.items()}

    @property
    def losses(self) -> dict[str, dict[str, tuple[float, ...]]]:
        """What ranks compare of every window, by cell and protocol: its loss, or, of a difference of two models, its
        divergence from the tuned one. That is what a difference is to give back; what is lost of it may well lower a
        perplexity."""
        return {key: {n: _compared(r, score) for n, score in r.done.items()} for key, r in self.reports.items()}

    @property
    def weights(self) -> dict[str, tuple[float, ...] | None]:
        """The weight of every window, by protocol; None: all the same."""
        return {name: score.window_weight for r in self.reports.values() for name, score in r.done.items()}

    def rows(self) -> list[Row]:
        """One per cell, with every column; ranks and tasks are left for the table to fill."""
        empty = dict.fromkeys(self.columns, "")
        filled = (report.row for report in self.filled.values())
        return [{**empty, **{name: value for name, value in row.items() if name in empty}} for row in filled]

    def kernel_rows(self) -> list[Row]:
        """The lines of kernels.csv."""
        found: list[Row] = []
        for key, report in self.reports.items():
            if bench := report.bench:
                model, row = str(report.row["model"]), label(report.row)
                found += latency.kernel_rows(bench.kernels, self.bandwidth, bench.machine, model, row, key)
        return found


def planned_board(
    plan: Plan,
    outcomes: Mapping[str, Outcome],
    identity: str,
    measured: Mapping[str, Outcome],
    commands: Sequence[str] = (),
) -> Board:
    """`outcomes` are the cells', `measured` those of their measurements, which are looked up under this machine's
    `identity`. Raises ValueError when a protocol's column would hold scores of different tokens."""
    reports = {
        cell.key: report_of(
            cell, plan, outcomes.get(cell.key), CellStore(cell.key).bench(identity), measured.get(cell.key)
        )
        for cell in plan.cells
    }
    _require_one_stream(reports.values())
    names = tuple(protocol.name for protocol in plan.protocols)
    return Board(reports, names, tuple(plan.tasks), plan.reference.key, tuple(commands))


def stored_board(folders: Sequence[Path]) -> Board:
    """The cells of the runs in `folders` as one board. Raises ValueError when there is nothing to read, when they are
    of different models, or were scored on different tokens of the same name."""
    reports: dict[str, CellReport] = {}
    commands: list[str] = []
    for folder in folders:
        paths = sorted((folder / "cells").glob("*.json"))
        if not paths:
            raise ValueError(f"no {folder}/cells/*.json: give a folder that a run wrote, as results/<plan hash>")
        for path in paths:
            report = CellReport.from_json(read_object(path), str(path))
            reports.setdefault(str(report.row["cell"]), report)
        if (folder / RUN_FILE).exists():
            commands += read_object(folder / RUN_FILE).get("commands", [])
    models = dict.fromkeys(str(report.row["model"]) for report in reports.values())
    if len(models) > 1:
        raise ValueError(f"these folders are of different models ({', '.join(models)}): give those of one")
    _require_one_stream(reports.values())
    _require_one_task(reports.values())
    protocols = dict.fromkeys(name for report in reports.values() for name in report.scores)
    tasks = {n: result.task for r in reports.values() for n, result in r.tasks.items() if result}
    references = [key for key, report in reports.items() if report.artifact and report.artifact.spec.is_reference]
    for key, report in reports.items():  # tasks and protocols that another folder's run did not ask for
        scores = {name: report.scores.get(name) for name in protocols} if report.artifact else {}
        reports[key] = replace(report, scores=scores, tasks={name: report.tasks.get(name) for name in tasks})
    reference = references[0] if references else ""
    return Board(reports, tuple(protocols), tuple(tasks.values()), reference, tuple(dict.fromkeys(commands)))


def _require_one_stream(reports: Iterable[CellReport]) -> None:
    streams: dict[str, str] = {}
    for report in reports:
        for name, score in report.done.items():
            if streams.setdefault(name, score.tokens_sha256) != score.tokens_sha256:
                raise ValueError(
                    f"{name} was scored on two different token streams ({label(report.row)}); run again with --fresh"
                )


def _require_one_task(reports: Iterable[CellReport]) -> None:
    keys: dict[str, str] = {}
    for report in reports:
        for name, result in report.tasks.items():
            if result and keys.setdefault(name, result.task.key) != result.task.key:
                raise ValueError(f"{name} is of different items in these folders: give those of one --limit")


def newest(results: Path) -> Path:
    """The folder of the run that wrote its leaderboard last. Raises ValueError when there is none."""
    found = [path for path in results.glob("*/leaderboard.csv") if (path.parent / "cells").is_dir()]
    if not found:
        raise ValueError(f"no run under {results}/: give the folder that one wrote, or `run` first")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def _compared(report: CellReport, score: Score) -> tuple[float, ...]:
    divergence = score.divergence
    if report.row["track"] != Track.DELTA or divergence is None or score.window_weight is not None:
        return score.window_nll
    return divergence.window_kld
