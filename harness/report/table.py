"""Tables as files and as data frames: every CSV of ours is written and read by pandas, here.

A file holds what was measured, digit for digit: pandas is handed text, and gives text back; numbers are made of it only
in `frame`. pandas is imported where it is used, for it takes as long to start as a command that needs no table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.data.files import write_text
from harness.report.sheet import Value

if TYPE_CHECKING:
    from pandas import DataFrame, Series

# Columns of names, few of them many times; of text; and how the names of whole numbers begin. All others are numbers.
CATEGORIES = (
    "model",
    "method",
    "variant",
    "track",
    "kind",
    "status",
    "allocate",
    "device",
    "runner",
    "harness_version",
)
TEXT = ("cell", "reason", "model_note", "provisional", "training_loss")
COUNTS = (
    "seed",
    "rank_",
    "checkpoint_bytes",
    "fallback_layers",
    "bench_threads",
    "tuning_",
    "training_steps",
    "training_tokens",
)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Value]]) -> None:
    """Rows with these columns, in this order; one that is missing is empty."""
    import pandas

    lines = [[str(_plain(row.get(name, ""))) for name in columns] for row in rows]
    table = pandas.DataFrame(lines, columns=list(columns), dtype=object)
    write_text(path, table.to_csv(index=False, lineterminator="\n"))


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV as text, "" for what is empty. Raises ValueError when it is no table of text."""
    import pandas

    try:
        table = pandas.read_csv(path, dtype=object, keep_default_na=False, index_col=False, encoding="utf-8")
    except (pandas.errors.ParserError, pandas.errors.EmptyDataError, UnicodeDecodeError):
        raise ValueError(f"{path} is no table of text: give a leaderboard.csv, or the folder a run wrote") from None
    return [{str(name): str(value) for name, value in row.items()} for row in table.to_dict("records")]


def frame(path: Path) -> DataFrame:
    """A CSV with types: names as categories, whole numbers as Int64, other numbers as float64, text as strings; what is
    empty is missing. Raises ValueError when it is no table of text."""
    import pandas

    rows = read_csv(path)
    table = pandas.DataFrame(rows, columns=list(rows[0]) if rows else None).replace("", None)
    for name in table.columns:
        table[name] = _typed(str(name), table[name])
    return table


def _typed(name: str, values: Series) -> Series:
    import pandas

    if name in CATEGORIES or name.startswith("tie_"):
        return values.astype("category")
    if name in TEXT:
        return values.astype("string")
    try:
        numbers = pandas.to_numeric(values)
    except ValueError:  # a column of another program's
        return values.astype("string")
    return numbers.astype("Int64" if name.startswith(COUNTS) else "float64")


def _plain(value: Value) -> Value:
    """Text that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
