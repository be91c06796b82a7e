"""`check`: compare a leaderboard with a baseline; exit 1 when a perplexity moved, in either direction."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.cli.sheets import add_json_option, print_json
from harness.report.baseline import TOLERANCE, compare, read_rows, write_baseline


def register(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("check", description=__doc__)
    parser.add_argument("leaderboard", type=Path, help="leaderboard.csv, or the folder a run wrote")
    parser.add_argument("baseline", type=Path, help="a baseline CSV (results/baselines/), or another leaderboard")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="relative, both ways (default: %(default)s)")
    parser.add_argument("--update", action="store_true", help="write the leaderboard's numbers to the baseline instead")
    add_json_option(parser)
    parser.set_defaults(main=main)


def main(arguments: argparse.Namespace) -> int:
    rows = read_rows(arguments.leaderboard)
    if arguments.update:
        written = write_baseline(rows, arguments.baseline)
        if arguments.json:
            print_json({"baseline": arguments.baseline, "rows_written": written})
        else:
            print(f"{arguments.baseline}: {written} rows written")
        return 0
    if not arguments.tolerance > 0:
        raise ValueError(
            f"--tolerance {arguments.tolerance} leaves no number unchanged; write for example --tolerance 0.05"
        )
    baseline = read_rows(arguments.baseline)
    problems = compare(rows, baseline, arguments.tolerance)
    if arguments.json:
        print_json({"baseline": arguments.baseline, "rows": len(baseline), "problems": problems})
        return 1 if problems else 0
    for problem in problems:
        print(problem)
    if not problems:
        print(f"{len(baseline)} rows as in {arguments.baseline}")
    return 1 if problems else 0
