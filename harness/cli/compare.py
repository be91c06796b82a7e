"""`compare`: every row of a finished run against one of its methods, as paired ratios with intervals."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.cli.sheets import add_json_option, json_sheet, print_json, print_sheet


def register(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("compare", description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder a run wrote")
    parser.add_argument(
        "--to",
        required=True,
        metavar="METHOD",
        help="the method all others are divided by, as the leaderboard names it",
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    add_json_option(parser)
    parser.set_defaults(main=main)


def main(arguments: argparse.Namespace) -> int:
    from harness.report.pairs import compare_methods

    sheet = compare_methods(arguments.folder, arguments.to)
    if arguments.json:
        print_json(json_sheet(sheet))
    elif arguments.markdown:
        print(sheet.markdown(), end="")
    else:
        print_sheet(sheet)
    return 0
