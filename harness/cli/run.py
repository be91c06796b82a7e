"""`run`: compress, score, measure, write the leaderboard."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from harness.cli.leaderboard import (
    folder_of,
    identity,
    keeps_what_is_there,
    measure_stored,
    open_console,
    report,
    say_waiting,
    writable,
)
from harness.cli.options import add_bench_options, add_plan_options, build_plan, positive_seconds, read_request
from harness.cli.progress import Display
from harness.cli.request import Options
from harness.cli.sheets import print_sheet
from harness.data.assets import ResolvedModel
from harness.data.protocols import protocol_key
from harness.data.streams import calibration_stream, evaluation_stream
from harness.data.texts import c4_documents
from harness.engine.local import Interrupted, run_cells
from harness.engine.process import Ended, Message
from harness.evaluate.zero_shot import prepare
from harness.model import read_config
from harness.plan.cells import Cell, Plan
from harness.progress import Say
from harness.report import latency
from harness.report.rows import report_of
from harness.report.sheet import Sheet, Value
from harness.report.sinks import Entry, Sinks, open_sinks
from harness.store.cells import CellStore
from harness.store.records import Ending, Outcome


def register(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("run", help="compress, score and rank", description=__doc__)
    add_options(parser)
    parser.set_defaults(main=main)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_plan_options(parser)
    parser.add_argument("--out", type=Path, help="folder of the leaderboard (default: results/<plan hash>)")
    parser.add_argument("--fresh", action="store_true", help="ignore finished work of these cells")
    parser.add_argument(
        "--bench",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure memory and latency of every row, once all are scored (default: yes)",
    )
    parser.add_argument(
        "--timeout",
        type=positive_seconds,
        metavar="SECONDS",
        help="of one cell, and of one measurement (default: none)",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="a row with layers that the numbers did not allow to be packed as asked for (fallback_layers) fails",
    )
    parser.add_argument(
        "--log",
        default="",
        metavar="SINKS",
        help="comma list of tensorboard:DIR, mlflow:URI, wandb:PROJECT: every cell is logged there when it ends",
    )
    add_bench_options(parser)


def main(arguments: argparse.Namespace) -> int:
    return run(Options.of(arguments), open_console()).code


@dataclass(frozen=True)
class Finished:
    """What a run left."""

    code: int  # 0 if every row is good
    folder: Path  # of its tables


def run(arguments: Options, console: Console, show: Callable[[Sheet], None] = print_sheet) -> Finished:
    """All of it: compress, score, measure, write the tables, `show` the short ones. Raises ValueError for what was
    asked for wrongly, and Interrupted once the tables of what is finished are written."""
    start = time.perf_counter()
    request = read_request(arguments)
    sinks = open_sinks(arguments.log)
    if arguments.out:
        writable(arguments.out)
    say = partial(console.print, style="dim")
    plan, stock, model = build_plan(arguments, request, say)
    if arguments.out:
        keeps_what_is_there(arguments.out, plan)
    if stock.uncovered:
        console.print(f"{model.name}: {stock.uncovered_note}", style="yellow")
    runnable = [cell for cell in plan.cells if not cell.refusal]
    for cell in plan.cells:
        if cell.refusal:
            console.print(f"refused: {cell.label} ({cell.refusal})", style="yellow")
    if len(runnable) < len(plan.cells) and all(cell.budget is None for cell in runnable):
        runnable = []  # everything asked for was refused: the reference is not loaded for nothing
    if runnable:
        _prepare_texts(plan, model, read_config(model.path).get_text_config().vocab_size, arguments.data, say)
        prepare(plan.tasks, say)
        if not arguments.out:
            writable(Path("results") / plan.key)
    if arguments.fresh:
        for cell in runnable:
            CellStore(cell.key).forget()
    outcomes: dict[str, Outcome] = {}
    measuring = False
    try:
        outcomes = finish(plan, runnable, arguments, request.jobs, console, sinks)
        if not runnable:
            skipped = Outcome(plan.reference.key, "everything else was refused", Ending.SKIPPED)
            outcomes = {plan.reference.key: skipped}
        if arguments.strict:
            outcomes |= strictly(runnable, outcomes)
        measuring = True
        measured = measure_stored(plan, arguments, console) if arguments.bench else {}
        for cell in runnable if sinks and measured else ():
            _log(cell, plan, arguments, outcomes.get(cell.key), sinks, measured.get(cell.key))
    except Interrupted as stop:
        # What is finished is in the table; what is not says so.
        done, timed = (outcomes, stop.outcomes) if measuring else (stop.outcomes, {})
        report(plan, done, timed, arguments, console, start, show)
        raise
    code = report(plan, outcomes, measured, arguments, console, start, show)
    return Finished(code, folder_of(plan, arguments))


def strictly(cells: list[Cell], outcomes: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """Cells with layers that could not be packed as asked for, as failures; those that failed anyway keep their
    reason."""
    found = {}
    for cell in cells:
        if (known := outcomes.get(cell.key)) and known.error:
            continue
        artifact = CellStore(cell.key).artifact()
        if artifact and artifact.fallback_layers:
            reason = f"{artifact.fallback_layers} layers were packed without error feedback (--strict); see its log"
            found[cell.key] = Outcome(cell.key, reason, Ending.FAILED)
    return found


def finish(
    plan: Plan, runnable: list[Cell], arguments: Options, jobs: int, console: Console, sinks: Sinks
) -> dict[str, Outcome]:
    """Do what these cells still lack; the outcomes of those that lacked anything, by key."""
    keys, tasks = [protocol_key(p) for p in plan.protocols], [task.key for task in plan.tasks]
    todo = [
        cell
        for cell in runnable
        if not CellStore(cell.key).finished(keys, tasks, is_reference=cell.key == plan.reference.key)
    ]
    for cell in runnable:
        if cell not in todo:
            console.print(f"{cell.label}: found, not repeated", style="dim")
            CellStore(cell.key).asked_for()
            _log(cell, plan, arguments, None, sinks)
    if not todo:
        return {}
    by_key = {cell.key: cell for cell in todo}
    with Display(console, {cell.key: cell.label for cell in todo}) as display:

        def watch(key: str, message: Message) -> None:
            display.message(key, message)
            if isinstance(message, Ended):
                _log(by_key[key], plan, arguments, Outcome(key, message.error, message.ending), sinks)

        specs = [cell.spec(plan.protocols, arguments.data, plan.reference.key, plan.tasks) for cell in todo]
        return run_cells(specs, jobs, watch, arguments.timeout, partial(say_waiting, console))


def _log(
    cell: Cell,
    plan: Plan,
    arguments: Options,
    outcome: Outcome | None,
    sinks: Sinks,
    measured: Outcome | None = None,
) -> None:
    """The row of a cell that has ended, with this machine's measurement where there is one, to the sinks of the run."""
    if not sinks:
        return
    here = identity(plan, arguments)
    benches = {other.key: CellStore(other.key).bench(here) for other in plan.cells}
    bench, bandwidth = benches[cell.key], latency.best_bandwidth(benches.values())
    row = report_of(cell, plan, outcome, bench, bandwidth, measured).row
    config: dict[str, Value] = {name: str(value) for name, value in asdict(cell.method).items()}
    config |= {"method_version": cell.method.version, "dtype": cell.compute.dtype, "seed": cell.seed}
    if cell.calibration:
        config["calibration"] = cell.calibration.name
    sinks.put(Entry.of(row, config))


def _prepare_texts(plan: Plan, model: ResolvedModel, vocabulary: int, data: str | None, say: Say) -> None:
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
            f"the tokenizer of {model.path} yields token {largest}, the model knows {vocabulary}: "
            "they do not belong together"
        )
