"""A run's leaderboard as a pandas DataFrame, for notebooks (harness.api) and for what reads one from its folder."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness.report.baseline import perplexity_columns
from harness.report.sheet import GOOD, Row, Value, leaderboard_sheet
from harness.report.table import frame


class Leaderboard(pd.DataFrame):
    """A leaderboard as `run` wrote it: one row per cell, in its order, columns as docs/columns.md explains them.

    `folder` is where its files are. In a notebook it shows what the command line prints; every column is in the frame.
    """

    _metadata = ["folder"]
    folder: Path

    @property
    def _constructor(self) -> type[Leaderboard]:
        return Leaderboard

    @classmethod
    def read(cls, path: Path) -> Leaderboard:
        """Of a folder that a run wrote, or of its leaderboard.csv. Raises ValueError when there is none."""
        file = path / "leaderboard.csv" if path.is_dir() else path
        if not file.exists():
            raise ValueError(f"no {file}: give the folder a run wrote, or its leaderboard.csv")
        table = frame(file)
        if not len(table) or not {"method", "variant", "budget_bpw", "status", "seed"} <= set(table.columns):
            raise ValueError(f"{file} is no leaderboard: give the folder a run wrote, or its leaderboard.csv")
        board = cls(table)
        board.folder = file.parent
        return board

    def rows(self) -> list[Row]:
        """As the rest of the report has them: Python's numbers, "" for what is missing."""
        columns = {
            name: [
                "" if missing else _plain(value) for value, missing in zip(self[name], self[name].isna(), strict=True)
            ]
            for name in self.columns
        }
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _repr_html_(self) -> str | None:
        """The short table with ties and failures, escaped; of a part without its columns, what pandas shows."""
        protocols = [name.removeprefix("ppl_") for name in perplexity_columns(self.columns)]
        needed = {"method", "variant", "seed", "budget_bpw", "stored_bpw", "status", "reason"}
        if not len(self) or not needed <= set(self.columns) or not self.columns.is_unique:
            return pd.DataFrame(self)._repr_html_()  # type: ignore[operator]
        rows = self.rows()
        for row in rows:
            row["budget_bpw"] = f"{row['budget_bpw']:.6g}" if row["budget_bpw"] != "" else ""
        more = {"average acc": _average} if "acc_average" in self.columns else {}
        sheet = leaderboard_sheet(rows, protocols, more)
        head = "".join(f"<th>{html.escape(title)}</th>" for title in sheet.header)
        lines = []
        for row, line in zip(rows, sheet.lines, strict=True):
            style = "" if row["status"] in GOOD else ' style="color: #b00"'
            lines.append(f"<tr{style}>" + "".join(f"<td>{html.escape(text)}</td>" for text in line) + "</tr>")
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _plain(value: Any) -> Value:
    if isinstance(value, np.integer | int):
        return int(value)
    return float(value) if isinstance(value, float) else str(value)


def _average(row: Row) -> str:
    return f"{row['acc_average']:.3f}" if row["acc_average"] != "" else ""
