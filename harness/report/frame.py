"""A leaderboard as a pandas data frame that shows itself well in a notebook."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pandas import DataFrame

from harness.report.baseline import perplexity_columns, read_rows
from harness.report.sheet import GOOD, label
from harness.report.table import frame

HEAD = "text-align:left;padding:.2em .7em"
CELL = "text-align:right;padding:.2em .7em"


class Leaderboard(DataFrame):
    """leaderboard.csv with types: the columns of docs/columns.md, a row per cell, in the leaderboard's order. What is
    cut out of it is a Leaderboard too; `folder` is where it was read."""

    _metadata = ("folder",)
    folder: Path

    @property
    def _constructor(self) -> type[Leaderboard]:
        return Leaderboard

    @property
    def protocols(self) -> list[str]:
        """Names of the protocols that its perplexities are of."""
        return [name.removeprefix("ppl_") for name in perplexity_columns(map(str, self.columns))]

    def _repr_html_(self) -> str:
        """The columns that decide; a row without numbers says why. All text is escaped."""
        if not {"method", "status", "budget_bpw"} <= set(self.columns):
            return str(DataFrame(self)._repr_html_())  # type: ignore[operator]  # of a selection of columns
        names = self.protocols
        heads = ["row", "stored", *(f"{what} {name}" for name in names for what in ("ppl", "kld", "rank"))]
        lines = [self._line({str(key): value for key, value in row.items()}) for row in self.to_dict("records")]
        head = "".join(f'<th style="{HEAD if n == 0 else CELL}">{html.escape(t)}</th>' for n, t in enumerate(heads))
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"

    def _line(self, row: Mapping[str, Any]) -> str:
        budget = row["budget_bpw"]
        known = {name: "" if _missing(row.get(name)) else row[name] for name in ("method", "variant", "seed")}
        title = html.escape(label({**known, "budget_bpw": "" if _missing(budget) else f"{budget:g}"}))
        status = str(row["status"])
        if status != "ok":
            title += f" <em>{html.escape(status)}</em>"
        if status not in GOOD:
            reason = "" if _missing(row.get("reason")) else html.escape(str(row["reason"]))
            return f'<tr><td style="{HEAD}">{title}</td><td colspan="99" style="{HEAD}">{reason}</td></tr>'
        texts = [_number(row.get("stored_bpw"), ".4f")]
        for name in self.protocols:
            tie = "" if _missing(row.get(f"tie_{name}")) else " tie"
            texts += [_number(row.get(f"ppl_{name}"), ".2f"), _number(row.get(f"kld_{name}"), ".4f")]
            texts.append(_number(row.get(f"rank_{name}"), ".0f") + tie)
        cells = "".join(f'<td style="{CELL}">{text}</td>' for text in texts)
        return f'<tr><td style="{HEAD}">{title}</td>{cells}</tr>'


def read_leaderboard(path: Path) -> Leaderboard:
    """Of a folder that a run wrote, or of a leaderboard.csv. Raises ValueError when there is none."""
    file = path / "leaderboard.csv" if path.is_dir() else path
    read_rows(file)  # says in one line what is wrong with it
    found = Leaderboard(frame(file))
    found.folder = file.parent
    return found


def _missing(value: object) -> bool:
    return value is None or value == "" or value != value or str(value) == "<NA>"


def _number(value: Any, pattern: str) -> str:
    return "" if _missing(value) else format(float(value), pattern)
