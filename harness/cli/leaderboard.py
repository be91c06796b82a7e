"""What `run` and `bench` both end with: measurements of stored cells, and the leaderboard."""

from __future__ import annotations

import os
import platform
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path

from rich.console import Console

from harness import __version__
from harness.cli.progress import Display, say_waiting
from harness.cli.request import Options
from harness.cli.sheets import json_rows, print_decisive, print_json, print_sheet
from harness.data.files import cache_dir
from harness.engine.local import measure_cells
from harness.measure.machine import cores, identity_key
from harness.measure.measurement import Conditions
from harness.plan.cells import Plan
from harness.report.baseline import perplexity_columns, read_rows
from harness.report.board import planned_board
from harness.report.leaderboard import write_leaderboard
from harness.report.sheet import GOOD, Row
from harness.report.task_pages import task_columns
from harness.store.cells import CellStore
from harness.store.records import Outcome

Show = Callable[[Sequence[Row]], None]


def measure_stored(plan: Plan, arguments: Options, console: Console, again: bool = False) -> dict[str, Outcome]:
    """Measure what is stored and has not been measured on this machine (with `again`, all of it), the reference
    first."""
    here = identity(plan, arguments)
    if CellStore(plan.reference.key).artifact() is None:
        return {}  # nothing to compare with
    stored = [cell for cell in plan.cells if not cell.refusal and CellStore(cell.key).artifact()]
    todo = [cell for cell in stored if again or not CellStore(cell.key).bench(here)]
    if not todo:
        return {}

    labels = {cell.key: f"{cell.label}, memory and latency" for cell in todo}
    specs = [cell.spec(plan.protocols, None, plan.reference.key) for cell in todo]
    with Display(console, labels, specs, "measured", len(stored) - len(todo), arguments.verbose) as display:
        conditions = Conditions(here, arguments.bench_seconds, arguments.bench_threads)
        return measure_cells(specs, conditions, display.message, partial(say_waiting, console), arguments.timeout)


def writable(folder: Path) -> None:
    """Raises OSError for a folder that will not take the tables: that should cost seconds, not a run."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".harness-") as probe:
        probe.write(b"\0" * 65536)
        probe.flush()
        os.fsync(probe.fileno())


def keeps_what_is_there(folder: Path, plan: Plan) -> None:
    """Raises ValueError when the folder holds rows or protocols that this plan would drop from its table."""
    path = folder / "leaderboard.csv"
    if not path.exists():
        return
    here, names = {cell.key for cell in plan.cells}, [f"ppl_{protocol.name}" for protocol in plan.protocols]
    rows = read_rows(path)
    lost = [name for name, row in rows.items() if row.get("cell") not in here]
    columns = next(iter(rows.values()))
    lost += [name for name in perplexity_columns(columns) if name not in names]
    lost += [name for name in columns if name.startswith("acc_") and name not in task_columns(plan.tasks)]
    if lost:
        raise ValueError(
            f"{folder} holds the table of another run, with {len(lost)} rows or columns that this one has not "
            f"({lost[0]} first): give another --out, or remove {path}"
        )


def say_where(plan: Plan, folder: Path, console: Console) -> None:
    """With --verbose: versions, and where files are."""
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "safetensors"))
    console.print(
        f"harness {__version__}, Python {platform.python_version()}, {packages}; {cores()} cores", style="dim"
    )
    console.print(f"model: {plan.reference.model.path}", style="dim")
    console.print(f"cells: {cache_dir('cells')}", style="dim")
    console.print(f"tables: {folder}", style="dim")


def report(
    plan: Plan,
    outcomes: Mapping[str, Outcome],
    measured: Mapping[str, Outcome],
    arguments: Options,
    console: Console,
    start: float,
    show: Show | None = None,
) -> int:
    """Write and print the leaderboard, or `show` its rows; returns the exit status. Raises ValueError when another run
    has put its own there meanwhile."""
    if arguments.out:
        keeps_what_is_there(arguments.out, plan)
    folder = folder_of(plan, arguments)
    board = planned_board(plan, outcomes, identity(plan, arguments), measured, [command(arguments)])
    rows, sheets = write_leaderboard(board, folder)
    if show:
        show(rows)
    elif arguments.json:
        print_json({"folder": folder, "rows": json_rows(rows)})
    elif arguments.wide:
        for sheet in sheets:
            print_sheet(sheet)
    else:
        print_decisive(rows, [protocol.name for protocol in plan.protocols])
    console.print(f"{folder}/leaderboard.csv  ({time.perf_counter() - start:.0f} s)", style="dim")
    good = all(row["status"] in GOOD for row in rows) and not any(outcome.error for outcome in measured.values())
    return 0 if good else 1


def command(arguments: Options) -> str:
    """What was typed, for those who want to do it again."""
    return shlex.join(["python", "-m", "harness", *arguments.typed])


def folder_of(plan: Plan, arguments: Options) -> Path:
    """Where the tables go."""
    return arguments.out or Path("results") / plan.key


def identity(plan: Plan, arguments: Options) -> str:
    """Of this machine's measurements of the plan's cells."""
    return identity_key(plan.reference.compute.device, arguments.bench_threads, plan.reference.key)
