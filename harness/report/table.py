"""Tables as files and as data frames: every CSV of ours is written and read by pandas, here.

A file holds what was measured, digit for digit: pandas is handed text, and gives text back; numbers are made of it only
in `frame`. pandas is imported where it is used, for it takes as long to start as a command that needs no table."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.data.files import write_text
from harness.report.sheet import Value

if TYPE_CHECKING:
    from pandas import DataFrame, Series

# Columns of names, few of them many times; of text; and of whole numbers. All others are numbers. They are patterns.
CATEGORIES = "model method variant track kind status allocate device runner harness_version processor tie_.*"
TEXT = "cell reason model_note provisional training_loss row config"
COUNTS = (
    "seed seeds act_bits rank_.* checkpoint_bytes tuning_steps tuning_tokens training_steps training_tokens "
    "fallback_layers bench_threads rows columns layers batch threads rounds"
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
        with warnings.catch_warnings():
            warnings.simplefilter("error", pandas.errors.ParserWarning)  # a line with more values than columns
            table = pandas.read_csv(path, dtype=object, keep_default_na=False, index_col=False, encoding="utf-8")
    except (pandas.errors.ParserError, pandas.errors.ParserWarning, pandas.errors.EmptyDataError, UnicodeDecodeError):
        raise ValueError(f"{path} is no table of text: give a leaderboard.csv, or the folder a run wrote") from None
    return [{str(name): str(value) for name, value in row.items()} for row in table.to_dict("records")]


def frame(path: Path) -> DataFrame:
    """A CSV to compute with: names as categories, text as strings, whole numbers as Int64, other numbers as Float64,
    whatever rows there are; what is empty is NA. Raises ValueError when it is no table of text.

    A perplexity that is no number (of a row `nonfinite`) stays NaN, which is not NA. An empty `variant` stays empty: it
    is the method as it is. A budget is its number, also where it was given as a fraction."""
    import pandas

    rows = read_csv(path)
    columns = list(rows[0]) if rows else []
    return pandas.DataFrame({name: _typed(name, [row[name] for row in rows]) for name in columns})


def _typed(name: str, texts: Sequence[str]) -> Series[Any]:
    import numpy
    import pandas

    present = pandas.Series([text if text or name == "variant" else None for text in texts], dtype="string")
    if _is(name, CATEGORIES):
        return present.astype(object).astype("category")
    if _is(name, TEXT):
        return present
    missing = numpy.array([not text for text in texts])
    try:
        numbers = numpy.array([_number(text) if text else math.nan for text in texts])
    except ValueError:  # a column of another program's
        return present
    if _is(name, COUNTS) and numpy.all((numbers % 1 == 0) | missing):
        whole = numpy.array([int(text) if text else 0 for text in texts], dtype=numpy.int64)
        return pandas.Series(pandas.arrays.IntegerArray(whole, missing))
    # Built of its parts, for a conversion would take NaN for missing.
    return pandas.Series(pandas.arrays.FloatingArray(numbers, missing))


def _number(text: str) -> float:
    return float(Fraction(text)) if "/" in text else float(text)


def _is(name: str, patterns: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns.split())


def _plain(value: Value) -> Value:
    """Text that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
