"""`report`: tables, pictures and the page again, from the folders that runs wrote; nothing is loaded or measured."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.cli.leaderboard import open_console, writable
from harness.report.board import stored_board
from harness.report.leaderboard import write_leaderboard


def register(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("report", help="tables, pictures and report.html of finished runs", description=__doc__)
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="FOLDER", help="of runs (default: the newest under results/)"
    )
    parser.add_argument("--out", type=Path, help="folder to write to (default: FOLDER; of several, results/report)")
    parser.add_argument("--plots", action="store_true", help="also write every picture as SVG and PNG to plots/")
    parser.add_argument("--paper", action="store_true", help="those in the style of a paper: one column wide, serif")
    parser.set_defaults(main=main)


def main(arguments: argparse.Namespace) -> int:
    console = open_console()
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
    return 0


def newest(results: Path) -> Path:
    """The folder of the run that wrote its leaderboard last. Raises ValueError when there is none."""
    found = [path for path in results.glob("*/leaderboard.csv") if (path.parent / "cells").is_dir()]
    if not found:
        raise ValueError(f"no run under {results}/: give the folder that one wrote, or `run` first")
    return max(found, key=lambda path: path.stat().st_mtime).parent
