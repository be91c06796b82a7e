"""Sheets on the terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from harness.report.sheet import Sheet


def print_sheet(sheet: Sheet) -> None:
    if sys.stdout.isatty():
        table = Table(*sheet.header)
        for line in sheet.lines:
            table.add_row(*line)
        Console(highlight=False, markup=False, emoji=False).print(table)
        return
    widths = [max(len(line[i]) for line in [sheet.header, *sheet.lines]) for i in range(len(sheet.header))]
    for line in [sheet.header, *sheet.lines]:
        print("  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)).rstrip())
    print()
