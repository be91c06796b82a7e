"""`compare`: two finished runs side by side, or every row of one against one of its methods; as paired ratios with
intervals."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.cli.sheets import add_json_option, json_sheet, print_json, print_sheet


def register(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("compare", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="A", help="the folder a run wrote")
    parser.add_argument(
        "other", type=Path, nargs="?", metavar="B", help="that of another run: rows of B over those of A"
    )
    parser.add_argument(
        "--to",
        metavar="METHOD",
        help="without B: the method all others are divided by, as the leaderboard names it",
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    add_json_option(parser)
    parser.set_defaults(main=main)


def main(arguments: argparse.Namespace) -> int:
    if (arguments.other is None) == (arguments.to is None):
        raise ValueError("give two folders (compare A B), or one and a method of it (compare A --to gptq)")
    notes: list[str] = []
    if arguments.other is not None:
        from harness.report.sides import side_by_side

        sides = side_by_side(arguments.folder, arguments.other)
        sheet, notes = sides.sheet(), sides.notes()
        document: object = sides.to_json()
    else:
        from harness.report.pairs import compare_methods

        sheet = compare_methods(arguments.folder, arguments.to)
        document = json_sheet(sheet)
    if arguments.json:
        print_json(document)
    elif arguments.markdown:
        print(sheet.markdown(), end="")
    else:
        print_sheet(sheet)
    for note in notes if not arguments.json else ():
        print(f"\n{note}" if arguments.markdown else note)
    return 0
