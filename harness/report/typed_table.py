"""Tables as pandas DataFrames: the one place that reads and writes CSV.

A file holds what a row holds, number for number: Python's shortest text that reads back as the same float, nothing for
what is missing. `typed` makes of that text a frame to compute with, whose dtypes follow from the columns' names alone.
Importing this module takes pandas' half a second, so it is imported where a table is at hand."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness.data.files import write_text
from harness.report.sheet import Value

# Columns of few different texts, of texts, and of whole numbers; all others are numbers.
CATEGORIES = "model method variant track kind status allocate device runner harness_version processor tie_.*"
TEXTS = "cell reason model_note provisional row config"
INTEGERS = (
    "seed seeds rank_.* checkpoint_bytes tuning_steps tuning_tokens training_steps training_tokens fallback_layers "
    "bench_threads rows columns layers batch threads rounds"
)
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would compute


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Value]]) -> None:
    """Write the rows as CSV with these columns, in this order; a column that a row has not is left empty."""
    rows = list(rows)
    assert all(row.keys() <= set(columns) for row in rows)
    written = [[_written(row.get(name, "")) for name in columns] for row in rows]
    frame = pd.DataFrame(written, columns=list(columns), dtype=object)
    write_text(path, frame.to_csv(index=False, lineterminator="\n"))


def _written(value: Value) -> Value:
    """Text that no spreadsheet takes for a formula; a number that is none as text, for pandas would leave it out."""
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def read_text(path: Path) -> pd.DataFrame:
    """The table as it stands in the file, every value a text. Raises ValueError when it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a line with more values than columns
            return pd.read_csv(path, dtype=str, keep_default_na=False, na_filter=False, index_col=False)
    except (pd.errors.ParserError, pd.errors.ParserWarning, pd.errors.EmptyDataError, UnicodeDecodeError):
        raise ValueError(f"{path} is no table of text: give a leaderboard.csv, or the folder a run wrote") from None


def typed(text: pd.DataFrame) -> pd.DataFrame:
    """The same table to compute with: categories and strings, Int64 and Float64; what is missing is NA.

    A perplexity that is no number (of a row `nonfinite`) stays NaN, which is not NA. An empty `variant` stays empty: it
    is the method as it is. A budget is its number, also where it was given as a fraction."""
    return pd.DataFrame({name: _column(name, text[name]) for name in text.columns}, index=text.index)


def _column(name: str, text: pd.Series[str]) -> pd.Series[Any]:
    present = text if name == "variant" else text.where(text != "", None)
    if _is(name, CATEGORIES):
        return present.astype("category")
    if _is(name, TEXTS):
        return present.astype("string")
    missing = (text == "").to_numpy()
    try:
        numbers = np.array([_number(value) if value else math.nan for value in text], dtype=np.float64)
    except ValueError:  # a column of another version, which was no number
        return present.astype("string")
    whole = _is(name, INTEGERS) and bool(np.all((numbers % 1 == 0) | missing))
    if whole:
        values = np.array([int(value) if value else 0 for value in text], dtype=np.int64)
        return pd.Series(pd.arrays.IntegerArray(values, missing), index=text.index)
    # Built of its parts, for a conversion would take NaN for missing.
    return pd.Series(pd.arrays.FloatingArray(numbers, missing), index=text.index)


def _number(text: str) -> float:
    return float(Fraction(text)) if "/" in text else float(text)


def _is(name: str, patterns: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns.split())
