"""`run`: compress, score, measure, write the leaderboard."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cli.engines import Loads, add_engine_options, engine_options, worker
from harness.cli.options import (
    add_bench_options,
    add_model_cell_option,
    add_plan_options,
    add_volume_options,
    build_plan,
    positive_seconds,
    read_request,
)
from harness.cli.request import Options
from harness.cli.sheets import add_table_options
from harness.data.protocols import protocol_key
from harness.model.described import describe
from harness.report.sinks import Sinks, open_sinks
from harness.store.cells import CellStore
from harness.store.records import Ending, Outcome

if TYPE_CHECKING:
    from rich.console import Console

    from harness.cli.engines import Work
    from harness.cli.leaderboard import Show
    from harness.data.assets import ResolvedModel
    from harness.plan.cells import Cell, Plan
    from harness.progress import Say


def register(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("run", description=__doc__)
    add_options(parser)
    add_table_options(parser)
    parser.set_defaults(main=main)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of a run, whoever asks for it."""
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
    add_engine_options(parser)
    add_model_cell_option(parser)
    add_bench_options(parser)
    add_volume_options(parser)


def main(arguments: argparse.Namespace) -> int:
    return run(Options.of(arguments))[0]


def run(arguments: Options, console: Console | None = None, show: Show | None = None) -> tuple[int, Path]:
    """All of it: compress, score, measure, write the tables, print the short one or `show` its rows; returns the exit
    status and the folder. Raises ValueError for what was asked for wrongly, and Interrupted once the tables of what is
    finished are written."""
    start = time.perf_counter()
    request = read_request(arguments, presets=False)
    engine_options(arguments)
    sinks = open_sinks(arguments.log)
    from harness.cli.leaderboard import folder_of, keeps_what_is_there, measure_stored, report, say_where, writable
    from harness.cli.progress import open_console
    from harness.engine.local import Interrupted
    from harness.evaluate.zero_shot import prepare

    console = console or open_console(arguments.quiet)
    if arguments.out:
        writable(arguments.out)
    say = partial(console.print, style="dim")
    plan, stock, model = build_plan(arguments, request, say)
    if arguments.out:
        keeps_what_is_there(arguments.out, plan)
    if arguments.verbose:
        say_where(plan, folder_of(plan, arguments), console)
    if stock.uncovered:
        console.print(f"{model.name}: {stock.uncovered_note}", style="yellow")
    runnable = [cell for cell in plan.cells if not cell.refusal]
    for cell in plan.cells:
        if cell.refusal:
            console.print(f"refused: {cell.label} ({cell.refusal})", style="yellow")
    if len(runnable) < len(plan.cells) and all(cell.budget is None for cell in runnable):
        runnable = []  # everything asked for was refused: the reference is not loaded for nothing
    if runnable:
        _prepare_texts(plan, model, describe(model.path).vocabulary, arguments.data, say)
        prepare(plan.tasks, say)
        if not arguments.out:
            writable(Path("results") / plan.key)
    if arguments.fresh:
        for cell in runnable:
            CellStore(cell.key).forget()
    loads = Loads.of(runnable, stock, model.path, arguments, request.jobs)
    outcomes: dict[str, Outcome] = {}
    measuring = False
    try:
        work = worker(arguments, request.jobs, console, loads.memory_gib)
        outcomes = finish(plan, runnable, arguments, work, console, sinks, loads.by_blocks)
        if not runnable:
            skipped = Outcome(plan.reference.key, "everything else was refused", Ending.SKIPPED)
            outcomes = {plan.reference.key: skipped}
        if arguments.strict:
            outcomes |= strictly(runnable, outcomes)
        measuring = True
        here = arguments.bench and arguments.engine == "local"  # machines of a cluster are not alone
        measured = measure_stored(plan, arguments, console) if here else {}
        for cell in runnable if sinks and measured else ():
            _log(cell, plan, arguments, outcomes.get(cell.key), sinks, measured.get(cell.key))
    except Interrupted as stop:
        # What is finished is in the table; what is not says so.
        done, timed = (outcomes, stop.outcomes) if measuring else (stop.outcomes, {})
        report(plan, done, timed, arguments, console, start, show)
        finished = len(runnable) - len(_unfinished(plan, runnable))
        stop.kept = f"{finished} of {len(runnable)} cells are finished and kept"
        raise
    code = report(plan, outcomes, measured, arguments, console, start, show)
    return code, folder_of(plan, arguments)


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
    plan: Plan,
    runnable: list[Cell],
    arguments: Options,
    work: Work,
    console: Console,
    sinks: Sinks,
    by_blocks: frozenset[str] = frozenset(),
) -> dict[str, Outcome]:
    """Do what these cells still lack, those whose keys are `by_blocks` a block at a time; how the work ended, by the
    cells that lacked anything."""
    from harness.cli.progress import Display
    from harness.engine.process import Ended, Message

    todo = _unfinished(plan, runnable)
    for cell in runnable:
        if cell not in todo:
            console.print(f"{cell.label}: found, not repeated", style="dim")
            CellStore(cell.key).asked_for()
            _log(cell, plan, arguments, None, sinks)
    if not todo:
        return {}
    by_key = {cell.key: cell for cell in todo}
    labels = {cell.key: cell.label for cell in todo}
    specs = [
        replace(
            cell.spec(plan.protocols, arguments.data, plan.reference.key, plan.tasks), by_blocks=cell.key in by_blocks
        )
        for cell in todo
    ]
    for cell in todo:
        if cell.key in by_blocks and arguments.load == "auto":
            console.print(f"{cell.label}: more than this machine's memory: a block at a time (--load)", style="dim")
    with Display(console, labels, specs, done=len(runnable) - len(todo), verbose=arguments.verbose) as display:

        def watch(key: str, message: Message) -> None:
            display.message(key, message)
            if isinstance(message, Ended):
                _log(by_key[key], plan, arguments, Outcome(key, message.error, message.ending), sinks)

        return work(specs, watch)


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
    from harness.cli.leaderboard import identity
    from harness.report.latency import best_bandwidth
    from harness.report.rows import report_of
    from harness.report.sinks import Entry

    here = identity(plan, arguments)
    benches = {other.key: CellStore(other.key).bench(here) for other in plan.cells}
    report = report_of(cell, plan, outcome, benches[cell.key], measured).filled(best_bandwidth(benches.values()))
    config = {name: str(value) for name, value in asdict(cell.method).items()}
    config |= {"method_version": str(cell.method.version), "dtype": cell.compute.dtype}
    if cell.calibration:
        config["calibration"] = cell.calibration.name
    sinks.put(Entry.of(report.row, config))


def _unfinished(plan: Plan, cells: list[Cell]) -> list[Cell]:
    """Those that lack something that this plan asks for."""
    keys, tasks = [protocol_key(p) for p in plan.protocols], [task.key for task in plan.tasks]
    return [
        cell
        for cell in cells
        if not CellStore(cell.key).finished(keys, tasks, is_reference=cell.key == plan.reference.key)
    ]


def _prepare_texts(plan: Plan, model: ResolvedModel, vocabulary: int, data: str | None, say: Say) -> None:
    """Cut every text before any cell starts: a missing or short one should cost seconds, not a finished compression."""
    from harness.data.streams import calibration_stream, evaluation_stream, training_stream
    from harness.data.texts import c4_documents

    streams = [evaluation_stream(protocol, model, data, say) for protocol in plan.protocols]
    calibrated = {
        (cell.calibration, cell.seed, cell.bos) for cell in plan.cells if cell.calibration and not cell.refusal
    }
    streams += [
        calibration_stream(calibration, model, seed, bos, data, say)
        for calibration, seed, bos in calibrated
        if calibration
    ]
    trained = {(cell.training, cell.seed, cell.bos) for cell in plan.cells if cell.training and not cell.refusal}
    streams += [training_stream(training, model, seed, bos, data, say) for training, seed, bos in trained if training]
    c4_documents.cache_clear()  # most of a gigabyte, if it was read at all
    largest = max(int(stream.tokens_NT.max()) for stream in streams)
    if largest >= vocabulary:
        raise ValueError(
            f"the tokenizer of {model.path} yields token {largest}, the model knows {vocabulary}: "
            "they do not belong together"
        )
