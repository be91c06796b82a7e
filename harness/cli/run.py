"""`run`: compress, score, measure, write the leaderboard."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from harness.cli.options import add_bench_options, add_plan_options, build_plan, read_request
from harness.cli.progress import Display
from harness.cli.sheets import print_table
from harness.data.assets import Say
from harness.data.protocols import protocol_key
from harness.data.streams import calibration_stream, evaluation_stream
from harness.data.texts import c4_documents
from harness.engine.local import Outcome, measure_cells, run_cells
from harness.evaluate.zero_shot import prepare
from harness.measure.machine import identity_key
from harness.model import read_config
from harness.plan.cells import Cell, Plan
from harness.report.leaderboard import write_leaderboard
from harness.report.sheet import GOOD
from harness.store.cells import CellStore


def register(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("run", help="compress, score and rank", description=__doc__)
    add_plan_options(parser)
    parser.add_argument("--out", type=Path, help="folder of the leaderboard (default: results/<plan hash>)")
    parser.add_argument("--fresh", action="store_true", help="ignore finished work of these cells")
    parser.add_argument(
        "--bench",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure memory and latency of every row, once all are scored (default: yes)",
    )
    add_bench_options(parser)
    parser.set_defaults(main=main)


def main(arguments: argparse.Namespace) -> int:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    start = time.perf_counter()
    request = read_request(arguments)
    if arguments.out:
        arguments.out.mkdir(
            parents=True, exist_ok=True
        )  # a folder that cannot be written should cost seconds, not a run
    say = lambda text: console.print(text, style="dim")  # noqa: E731
    plan, _, model = build_plan(arguments, request, say)
    runnable = [cell for cell in plan.cells if not cell.refusal]
    for cell in plan.cells:
        if cell.refusal:
            console.print(f"refused: {cell.label} ({cell.refusal})", style="yellow")
    if len(runnable) < len(plan.cells) and all(cell.budget is None for cell in runnable):
        runnable = []  # everything asked for was refused: the reference is not loaded for nothing
    if runnable:
        _prepare_texts(plan, model.to_json(), read_config(model.path).get_text_config().vocab_size, arguments.data, say)
        prepare(plan.tasks, say)
    if arguments.fresh:
        for cell in runnable:
            CellStore(cell.key).forget()
    outcomes = _run(plan, runnable, arguments.data, request.jobs, console)
    if not runnable:
        outcomes = {plan.reference.key: Outcome(plan.reference.key, "everything else was refused", skipped=True)}
    measured = bench_cells(plan, arguments, console) if arguments.bench else {}
    return report(plan, outcomes, measured, arguments, console, start)


def report(
    plan: Plan,
    outcomes: Mapping[str, Outcome],
    measured: Mapping[str, Outcome],
    arguments: argparse.Namespace,
    console: Console,
    start: float,
) -> int:
    """Write and print the leaderboard; returns the exit status."""
    folder = arguments.out or Path("results") / plan.key
    rows, tables = write_leaderboard(plan, outcomes, folder, _identity(plan, arguments), measured)
    for table in tables:
        print_table(*table)
    console.print(f"{folder}/leaderboard.csv  ({time.perf_counter() - start:.0f} s)", style="dim")
    return (
        0
        if all(row["status"] in GOOD for row in rows) and not any(outcome.error for outcome in measured.values())
        else 1
    )


def _identity(plan: Plan, arguments: argparse.Namespace) -> str:
    return identity_key(plan.reference.compute.device, arguments.bench_threads, plan.reference.key)


def bench_cells(plan: Plan, arguments: argparse.Namespace, console: Console, again: bool = False) -> dict[str, Outcome]:
    """Measure what is stored and has not been measured on this machine (with `again`, all of it), the reference
    first."""
    identity = _identity(plan, arguments)
    if CellStore(plan.reference.key).artifact() is None:
        return {}  # nothing to be timed beside
    stored = [cell for cell in plan.cells if not cell.refusal and CellStore(cell.key).artifact()]
    todo = [cell for cell in stored if again or not CellStore(cell.key).bench(identity)]
    if not todo:
        return {}
    waiting = lambda: console.print(
        "waiting until nothing else of ours runs on this machine, to measure undisturbed", style="dim"
    )  # noqa: E731
    with Display(console, {cell.key: f"{cell.label}, memory and latency" for cell in todo}) as display:
        how = {"identity": identity, "seconds": arguments.bench_seconds, "threads": arguments.bench_threads}
        specs = [cell.to_json(plan.protocols, None, plan.reference.key) | {"bench": how} for cell in todo]
        return measure_cells(specs, display.message, waiting)


def _run(plan: Plan, runnable: list[Cell], data: str | None, jobs: int, console: Console) -> dict[str, Outcome]:
    keys, tasks = [protocol_key(p) for p in plan.protocols], [task.key for task in plan.tasks]
    todo = [cell for cell in runnable if not CellStore(cell.key).finished(keys, tasks)]
    for cell in runnable:
        if cell not in todo:
            console.print(f"{cell.label}: found, not repeated", style="dim")
    if not todo:
        return {}
    with Display(console, {cell.key: cell.label for cell in todo}) as display:
        specs = [cell.to_json(plan.protocols, data, plan.reference.key, plan.tasks) for cell in todo]
        return run_cells(specs, jobs, display.message)


def _prepare_texts(plan: Plan, model: dict[str, str], vocabulary: int, data: str | None, say: Say) -> None:
    """Cut every text before any cell starts: a missing or short one should cost seconds, not a finished compression."""
    streams = [evaluation_stream(protocol, model, data, say) for protocol in plan.protocols]
    calibrated = {
        (cell.calibration, cell.seed, cell.bos) for cell in plan.cells if cell.calibration and not cell.refusal
    }
    streams += [
        calibration_stream(calibration, model, seed, bos, data, say)
        for calibration, seed, bos in calibrated
        if calibration
    ]
    trained = {
        (cell.training.windows, cell.seed, cell.bos) for cell in plan.cells if cell.training and not cell.refusal
    }
    streams += [calibration_stream(windows, model, seed, bos, data, say) for windows, seed, bos in trained]
    c4_documents.cache_clear()  # most of a gigabyte, if it was read at all
    largest = max(int(stream.tokens_NT.max()) for stream in streams)
    if largest >= vocabulary:
        raise ValueError(
            f"the tokenizer of {model['path']} yields token {largest}, the model knows {vocabulary}: they do not belong together"
        )
