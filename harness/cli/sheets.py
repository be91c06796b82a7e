"""Sheets on the terminal, and the one JSON document of `--json`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from harness.report.sheet import Row, Sheet, decisive_sheet, notes_below


def add_cell_options(parser: argparse.ArgumentParser) -> None:
    """Those of a stored cell by its names (harness.portal.cells)."""
    parser.add_argument("cell", metavar="CELL", help="a cell's key (`ls runs`), or the folder a run wrote and --row")
    parser.add_argument("--row", help="of the folder: method, or method and budget, as its table names it")


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON document on stdout instead of text; null stands for no value, and for no finite number",
    )


def add_table_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--wide", action="store_true", help="print the whole table of leaderboard.md")
    add_json_option(parser)


def print_json(value: object) -> None:
    """The one document of `--json`, in standard JSON: numbers that are not finite are null."""
    print(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: object) -> object:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case Path():
            return str(value)
    return value


def json_rows(rows: Sequence[Row]) -> list[dict[str, object]]:
    """A table's rows, a column without a value as null."""
    return [{column: None if value == "" else value for column, value in row.items()} for row in rows]


def json_sheet(sheet: Sheet) -> list[dict[str, str]]:
    """A sheet's lines by the titles of its columns, as text."""
    return [dict(zip(sheet.header, line, strict=True)) for line in sheet.lines]


def print_sheet(sheet: Sheet) -> None:
    if sys.stdout.isatty():
        table = Table(*sheet.header)
        for line in sheet.lines:
            table.add_row(*line)
        Console(highlight=False, markup=False, emoji=False).print(table)
        return
    print(sheet.plain())


def print_decisive(rows: Sequence[Row], names: Sequence[str]) -> None:
    """The columns that decide, and under them what failed, and why."""
    print(decisive_sheet(rows, names).plain())
    for line in notes_below(rows, names):
        print(line)
