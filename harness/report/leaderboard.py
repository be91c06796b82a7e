"""The leaderboard of a board (harness.report.board): one row per cell, as CSV and Markdown, with one JSON per cell and
one line per product in kernels.csv."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from harness.data.files import write_json, write_text
from harness.report import latency
from harness.report.board import RUN_FILE, Board
from harness.report.page import write_page
from harness.report.sheet import Row, Sheet, act_bits, allocation_sheet, escaped, label, leaderboard_sheet, number
from harness.report.summary import add_ranks, summarise
from harness.report.table import write_csv
from harness.report.task_pages import fill_tasks, shown_tasks, task_means, write_pages


def write_leaderboard(board: Board, folder: Path) -> tuple[list[Row], list[Sheet]]:
    """Write leaderboard.csv, leaderboard.md, run.json, cells/<key>.json and, where there are any, kernels.csv and (with
    several seeds) summary.csv; returns the rows in order, and the sheets people see."""
    reports, names, tasks = board.reports, board.protocols, board.tasks
    for key, report in board.filled.items():
        write_json(folder / "cells" / f"{key}.json", report.to_json())
    write_json(folder / RUN_FILE, {"commands": list(board.commands)})
    rows = ranked_rows(board)
    losses, weights = board.losses, board.weights
    write_csv(folder / "leaderboard.csv", board.columns, rows)
    _write_kernels(folder / "kernels.csv", board)
    answered = {key: report.tasks for key, report in reports.items()}
    write_pages(folder, rows, answered, tasks, board.reference)
    sheets = [leaderboard_sheet(rows, names, shown_tasks(tasks))]
    text = sheets[0].markdown()
    summary = summarise(rows, losses, names, weights)
    task_means(summary, rows, tasks)
    seeded = any(number(row, "seeds") > 1 for row in summary)
    if seeded:
        write_csv(folder / "summary.csv", list(summary[0]), summary)
        means = leaderboard_sheet(summary, names, shown_tasks(tasks, ranks=False)).markdown()
        text = means + "\nMean over seeds, ± standard deviation between them. Every cell:\n\n" + text
    mixed = {label(row): layers for row in rows if (layers := reports[str(row["cell"])].mixed_layers)}
    if mixed:
        text += (
            "\nStored bits per weight of each role of matrix, mean (least to most); every matrix is in `cells/`:\n\n"
        )
        sheets.append(allocation_sheet(mixed))
        text += sheets[1].markdown()
    write_page(board, rows, summary if seeded else [], folder)
    notes = {str(rows[0]["model"]): str(rows[0]["model_note"])}
    notes |= {label(row): artifact.source_note for row in rows if (artifact := reports[str(row["cell"])].artifact)}
    for name, note in notes.items():
        text += f"\nNote on {escaped(name)}: {escaped(note)}.\n" if note else ""
    write_text(folder / "leaderboard.md", text)
    return rows, sheets


def ranked_rows(board: Board) -> list[Row]:
    """The board's rows with ranks and tasks, in the leaderboard's order."""
    rows = board.rows()
    unseeded = {key for key, report in board.reports.items() if not report.seeded}
    add_ranks(rows, board.losses, board.protocols, board.weights, unseeded)
    answered = {key: report.tasks for key, report in board.reports.items()}
    fill_tasks(rows, answered, board.tasks, board.reference, unseeded)
    rows.sort(key=lambda row: _order(row, board.protocols))
    return rows


def _write_kernels(path: Path, board: Board) -> None:
    path.unlink(missing_ok=True)  # of an earlier measurement
    if rows := board.kernel_rows():
        write_csv(path, list(latency.KERNEL_COLUMNS), rows)


def _order(row: Row, names: Sequence[str]) -> tuple[Fraction, int, float, str, str, float]:
    """The reference first, then by budget, then the wider activations first; among these the better first perplexity
    first, rows without one last."""
    first = row[f"ppl_{names[0]}"] if names else ""
    value = first if isinstance(first, float) and math.isfinite(first) else math.inf
    kind = Fraction(row["budget_bpw"] or 0), -act_bits(row)
    return *kind, value, str(row["method"]), str(row["variant"]), number(row, "seed")
