"""What a report shows, as lists of plain values: all of it from a board (harness.report.board)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from statistics import fmean
from typing import Any

from harness.report.board import Board
from harness.report.rows import CellReport
from harness.report.sheet import Row, label
from harness.store.results import KLD_EDGES, Divergence

Lines = list[dict[str, Any]]
STEPS = 200  # points of a training curve: each the mean of the steps it stands for
DIGITS = 6  # of every number in the page


def page_rows(rows: Sequence[Row]) -> Lines:
    """The leaderboard's rows with what pictures need beside its columns; what is empty is left out."""
    found = []
    for row in rows:
        known = {name: value for name, value in row.items() if value != "" and not _nonfinite(value)}
        more = {
            "label": label(row),
            "series": label({**row, "budget_bpw": "", "seed": ""}),
            "budget": float(Fraction(row["budget_bpw"] or 0)),  # "13/4" is one, too
        }
        found.append({**known, **more})
    return found


def layers(board: Board, rows: Lines) -> Lines:
    """Every packed matrix of every row with a budget."""
    found = []
    for row, report in _reports(board, rows):
        if not report.artifact or not row["budget"]:
            continue
        predicted = report.artifact.allocation.costs if report.artifact.allocation else {}
        for name, layer in report.artifact.layers.items():
            block = name.removesuffix(f".{layer.role}").rpartition(".")[2]
            config = layer.config.to_json()
            found.append(
                {
                    "cell": row["cell"],
                    "layer": name,
                    "block": int(block) if block.isdecimal() else block,
                    "role": layer.role,
                    "bits": layer.stored_bpw,
                    "format": str(config["format"]),
                    "configuration": configuration(config),
                    "predicted": predicted.get(name),
                    "output_error": layer.report.get("output_error"),
                    "weight_error": layer.report.get("weight_error"),
                }
            )
    return found


def configuration(config: Mapping[str, Any]) -> str:
    """A layer's configuration in a few words: what is off or nothing is left out."""
    parts = [
        f"{name} {value}" for name, value in config.items() if name != "format" and value not in (0, False, "", None)
    ]
    return " ".join([str(config["format"]), *(part.removesuffix(" True") for part in parts)])


def parts(board: Board, rows: Lines) -> Lines:
    """Stored bits per weight of every row with a budget, by what they hold."""
    found = []
    for row, report in _reports(board, rows):
        if report.artifact and row["budget"]:
            of_part = report.artifact.ledger.bpw_by_part.to_json()
            found += [
                {"cell": row["cell"], "label": row["label"], "part": part, "bits": bits, "at": at}
                for at, (part, bits) in enumerate(of_part.items())
                if bits
            ]
    return found


def tokens(board: Board, rows: Lines) -> Lines:
    """Shares of tokens whose divergence lies between two edges."""
    found = []
    for line, _, divergence in _divergences(board, rows):
        total = sum(divergence.histogram)
        for low, high, count in zip(KLD_EDGES, KLD_EDGES[1:], divergence.histogram[1:], strict=False):
            if total:
                found.append({**line, "from": low, "to": high, "share": count / total})
    return found


def positions(board: Board, rows: Lines) -> Lines:
    """Mean divergence of every stretch of the windows, at its middle."""
    found = []
    for line, context, divergence in _divergences(board, rows):
        values = divergence.position_kld
        for index, value in enumerate(values):
            if math.isfinite(value):
                middle = (index + 0.5) / len(values) * (context - 1) + 1
                found.append({**line, "position": middle, "kld": value})
    return found


def _divergences(board: Board, rows: Lines) -> Iterator[tuple[dict[str, Any], int, Divergence]]:
    """({cell, protocol}, tokens of a window, divergence) of every score of a row with a budget."""
    for row, report in _reports(board, rows):
        for name, score in report.done.items():
            if row["budget"] and score.divergence:
                yield {"cell": row["cell"], "protocol": name}, score.protocol.context, score.divergence


def training(board: Board, rows: Lines) -> Lines:
    """Losses of rows that were trained, thinned to STEPS points."""
    found = []
    for row, report in _reports(board, rows):
        if report.artifact and (trained := report.artifact.training):
            losses = trained.losses
            size = max(1, math.ceil(len(losses) / STEPS))
            for start in range(0, len(losses), size):
                part = losses[start : start + size]
                line = {"cell": row["cell"], "of": trained.text.loss, "step": start + len(part)}
                found.append({**line, "loss": fmean(part)})
    return found


def kernels(board: Board) -> Lines:
    """Products of single matrices, with operations per stored byte."""
    found = []
    for line in board.kernel_rows():
        flop = 2 * int(line["rows"]) * int(line["columns"]) * int(line["batch"])
        stored = int(line["rows"]) * int(line["columns"]) * float(line["stored_bpw"]) / 8
        known = {name: value for name, value in line.items() if name in _KERNEL_SHOWN and value != ""}
        shape = f"{line['rows']} x {line['columns']}"
        speed = {"intensity": flop / stored, "gflop_s": flop / float(line["us"]) / 1e3}
        found.append({**known, **speed, "shape": shape})
    return found


_KERNEL_SHOWN = ("cell", "row", "config", "batch", "us", "bandwidth_pct", "speedup", "kind")


def accuracies(board: Board, rows: Lines) -> Lines:
    """Every row's accuracy of every task, by the task's headline metric."""
    found = []
    for row in rows:
        for task in board.tasks:
            name = f"{task.headline}_{task.name}"
            if name in row:
                line = {"cell": row["cell"], "task": task.name, "label": row["label"], "accuracy": row[name]}
                ends = {"low": row[f"{name}_lo"], "high": row[f"{name}_hi"], "flips": row.get(f"flips_{task.name}")}
                found.append(line | ends)
    return found


def columnar(lines: Lines) -> dict[str, Any]:
    """Lines as columns, each text named once: {"column": {"values": [...]}}, or with {"names": [...], "values":
    [places in names]} where all values are text; None for none."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for line in lines for name in line):
        values = [_short(line.get(name)) for line in lines]
        if all(value is None or isinstance(value, str) for value in values):
            names = {value: at for at, value in enumerate(v for v in dict.fromkeys(values) if v is not None)}
            found[name] = {"names": list(names), "values": [names.get(value) for value in values]}
        else:
            found[name] = {"values": values}
    return {"count": len(lines), "columns": found}


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def _nonfinite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _reports(board: Board, rows: Lines) -> list[tuple[dict[str, Any], CellReport]]:
    return [(row, board.reports[str(row["cell"])]) for row in rows]
