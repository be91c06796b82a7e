"""Tables on the terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table


def print_table(header: list[str], cells: list[list[str]]) -> None:
    if sys.stdout.isatty():
        table = Table(*header)
        for line in cells:
            table.add_row(*line)
        Console(highlight=False).print(table)
        return
    widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]
    for line in [header, *cells]:
        print("  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)).rstrip())
    print()
