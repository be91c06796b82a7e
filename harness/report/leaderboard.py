"""The leaderboard: one row per cell (harness.report.rows), as CSV and Markdown, with one JSON per cell and one line per
product in kernels.csv.

A cell scored on another token stream of the same name is refused rather than put into one column with the others."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from harness.data.files import write_json, write_text
from harness.plan.allocation import MIXED
from harness.plan.cells import Plan
from harness.report import latency
from harness.report.rows import CellReport, all_columns, report_of
from harness.report.sheet import Row, Sheet, Value, allocation_sheet, escaped, label, leaderboard_sheet, number
from harness.report.summary import add_ranks, summarise
from harness.report.task_pages import fill_tasks, shown_tasks, task_means, write_pages
from harness.store.cells import CellStore
from harness.store.records import LayerRecord, Outcome


def write_leaderboard(
    plan: Plan, outcomes: Mapping[str, Outcome], folder: Path, identity: str, measured: Mapping[str, Outcome]
) -> tuple[list[Row], list[Sheet]]:
    """Write leaderboard.csv, leaderboard.md, cells/<key>.json and, where there are any, kernels.csv and (with several
    seeds) summary.csv; returns the rows in order, and the sheets people see. `outcomes` are the cells', `measured`
    those of their measurements, which are looked up under this machine's `identity`."""
    names, tasks, reference = [protocol.name for protocol in plan.protocols], plan.tasks, plan.reference.key
    benches = {cell.key: CellStore(cell.key).bench(identity) for cell in plan.cells}
    bandwidth = latency.best_bandwidth(benches.values())
    reports = {
        cell.key: report_of(cell, plan, outcomes.get(cell.key), benches[cell.key], bandwidth, measured.get(cell.key))
        for cell in plan.cells
    }
    _require_one_stream(reports.values())
    for key, report in reports.items():
        write_json(folder / "cells" / f"{key}.json", report.to_json())
    rows = [report.row for report in reports.values()]
    losses = {key: {name: score.window_nll for name, score in report.done.items()} for key, report in reports.items()}
    weights = {name: score.window_weight for report in reports.values() for name, score in report.done.items()}
    answered = {key: report.tasks for key, report in reports.items()}
    unseeded = {key for key, report in reports.items() if not report.seeded}
    add_ranks(rows, losses, names, weights, unseeded)
    fill_tasks(rows, answered, tasks, reference, unseeded)
    rows.sort(key=lambda row: _order(row, names))
    write_csv(folder / "leaderboard.csv", all_columns(plan), rows)
    _write_kernels(folder / "kernels.csv", reports, bandwidth)
    write_pages(folder, rows, answered, tasks, reference)
    sheets = [leaderboard_sheet(rows, names, shown_tasks(tasks))]
    text = sheets[0].markdown()
    summary = summarise(rows, losses, names, weights)
    task_means(summary, rows, tasks)
    if any(number(row, "seeds") > 1 for row in summary):
        write_csv(folder / "summary.csv", list(summary[0]), summary)
        means = leaderboard_sheet(summary, names, shown_tasks(tasks, ranks=False)).markdown()
        text = means + "\nMean over seeds, ± standard deviation between them. Every cell:\n\n" + text
    if mixed := _mixed_layers(plan, reports):
        text += (
            "\nStored bits per weight of each role of matrix, mean (least to most); every matrix is in `cells/`:\n\n"
        )
        sheets.append(allocation_sheet({label(row): mixed[str(row["cell"])] for row in rows if row["cell"] in mixed}))
        text += sheets[1].markdown()
    note = rows[0]["model_note"]
    write_text(
        folder / "leaderboard.md",
        text + (f"\nNote on {escaped(str(rows[0]['model']))}: {escaped(str(note))}.\n" if note else ""),
    )
    return rows, sheets


def _require_one_stream(reports: Iterable[CellReport]) -> None:
    """Raises ValueError when one protocol's column would hold scores of different tokens."""
    streams: dict[str, str] = {}
    for report in reports:
        for name, score in report.done.items():
            if streams.setdefault(name, score.tokens_sha256) != score.tokens_sha256:
                raise ValueError(f"{name} was scored on two different token streams; run again with --fresh")


def _write_kernels(path: Path, reports: Mapping[str, CellReport], bandwidth: float) -> None:
    path.unlink(missing_ok=True)  # of an earlier measurement
    rows: list[Row] = []
    for key, report in reports.items():
        if bench := report.bench:
            model, row = str(report.row["model"]), label(report.row)
            rows += latency.kernel_rows(bench.kernels, bandwidth, bench.machine, model, row, key)
    if rows:
        write_csv(path, list(latency.KERNEL_COLUMNS), rows)


def _mixed_layers(plan: Plan, reports: Mapping[str, CellReport]) -> dict[str, dict[str, LayerRecord]]:
    """The layers of every cell that decided each layer's configuration by itself."""
    found = {}
    for cell in plan.cells:
        artifact = reports[cell.key].artifact
        if cell.allocate in MIXED and artifact:
            found[cell.key] = artifact.layers
    return found


def _order(row: Row, names: Sequence[str]) -> tuple[Fraction, float, str, str, float]:
    """The reference first, then by budget; inside a budget the better first perplexity first, rows without one last."""
    first = row[f"ppl_{names[0]}"] if names else ""
    value = first if isinstance(first, float) and math.isfinite(first) else math.inf
    return Fraction(row["budget_bpw"] or 0), value, str(row["method"]), str(row["variant"]), number(row, "seed")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _plain(value) for name, value in row.items()} for row in rows)
    write_text(path, text.getvalue())


def _plain(value: Value) -> Value:
    """Text that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
