"""`bench`: memory and latency of a finished run again, or of single products of a published model's shapes without its
weights."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

from harness.cli.options import (
    add_bench_options,
    add_model_cell_option,
    add_plan_options,
    add_volume_options,
    build_plan,
    read_request,
)
from harness.cli.request import Options
from harness.cli.sheets import add_table_options
from harness.model import PRESETS
from harness.store.cells import CellStore


def register(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("bench", description=__doc__)
    add_plan_options(parser)
    add_model_cell_option(parser)
    add_bench_options(parser)
    add_volume_options(parser)
    add_table_options(parser)
    parser.add_argument(
        "--out", type=Path, help="folder of the tables (default: results/<plan hash>, or results/kernels)"
    )
    parser.add_argument(
        "--shapes",
        default="",
        metavar="MODELS",
        help=f"comma list of presets, folders or hub ids: random stored bits ({', '.join(PRESETS)})",
    )
    parser.add_argument(
        "--end-to-end",
        action="store_true",
        help="with --shapes: whole models of random stored bits in turn with the uncompressed one, no single products",
    )
    parser.set_defaults(main=main)


def main(typed: argparse.Namespace) -> int:
    arguments = Options.of(typed)
    start = time.perf_counter()
    if typed.end_to_end and not arguments.shapes:
        raise ValueError("--end-to-end builds random models: say of which shapes (--shapes llama3.2-1b)")
    request = read_request(arguments, presets=False)
    from harness.cli.leaderboard import folder_of, keeps_what_is_there, measure_stored, report, say_where, writable
    from harness.cli.progress import open_console
    from harness.engine.local import Interrupted

    console = open_console(arguments.quiet)
    if arguments.out:
        writable(arguments.out)
    if arguments.shapes:
        from harness.cli.shapes import models_of, time_models, time_products

        models = models_of(arguments)  # before anything is waited for
        return (time_models if typed.end_to_end else time_products)(models, arguments, request, console)
    plan, _, _ = build_plan(arguments, request, partial(console.print, style="dim"))
    if arguments.out:
        keeps_what_is_there(arguments.out, plan)
    if arguments.verbose:
        say_where(plan, folder_of(plan, arguments), console)
    missing = [cell for cell in plan.cells if not cell.refusal and not CellStore(cell.key).artifact()]
    if missing:
        raise ValueError(
            f"{missing[0].label} has not been compressed with these options: the same line with `run` does it first"
        )
    try:
        measured = measure_stored(plan, arguments, console, again=True)
    except Interrupted as stop:
        stop.kept = f"{sum(not outcome.error for outcome in stop.outcomes.values())} cells are measured again, and kept"
        raise
    return report(plan, {}, measured, arguments, console, start)
