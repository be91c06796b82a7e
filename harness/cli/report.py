"""`report`: tables, pictures and the page again, from the folders that runs wrote; nothing is loaded or measured."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.cli.options import add_volume_options
from harness.cli.sheets import add_json_option, json_rows, print_json


def register(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("report", description=__doc__)
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="FOLDER", help="of runs (default: the newest under results/)"
    )
    parser.add_argument("--out", type=Path, help="folder to write to (default: FOLDER; of several, results/report)")
    parser.add_argument("--plots", action="store_true", help="also write every picture as SVG and PNG to plots/")
    parser.add_argument("--paper", action="store_true", help="those in the style of a paper: one column wide, serif")
    add_volume_options(parser)
    add_json_option(parser)
    parser.set_defaults(main=main)


def main(arguments: argparse.Namespace) -> int:
    from harness.cli.leaderboard import writable
    from harness.cli.progress import open_console
    from harness.report.board import newest, stored_board
    from harness.report.leaderboard import write_leaderboard

    console = open_console(arguments.quiet)
    folders = arguments.folders or [newest(Path("results"))]
    out = arguments.out or (folders[0] if len(folders) == 1 else Path("results") / "report")
    board = stored_board(folders)
    writable(out)
    rows, _ = write_leaderboard(board, out)
    if arguments.plots or arguments.paper:
        from harness.report.page.pictures import write_pictures

        written = write_pictures(board, rows, out, "paper" if arguments.paper else "light")
        console.print(f"{out}/plots: {len(written)} files", style="dim")
    console.print(f"{out}/report.html, {len(rows)} rows", style="dim")
    if arguments.json:
        print_json({"folder": out, "rows": json_rows(rows)})
    return 0
