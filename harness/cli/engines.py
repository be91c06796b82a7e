"""Who runs the cells: `--engine`, and what it is told."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cli.request import Options
from harness.engine import ENGINES
from harness.model.described import describe

if TYPE_CHECKING:
    from rich.console import Console

    from harness.engine.process import Watch
    from harness.model import Inventory
    from harness.plan.cells import Cell
    from harness.store.records import CellSpec, Outcome

    Work = Callable[[Sequence[CellSpec], Watch], dict[str, Outcome]]


LOADS = ("auto", "whole", "blocks")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine",
        default="local",
        choices=("local", *ENGINES),
        help="who runs the cells: this machine, a Ray cluster, or SLURM; the machines share $HARNESS_CACHE, and "
        "nothing is measured (default: %(default)s)",
    )
    parser.add_argument(
        "--load",
        default="auto",
        choices=LOADS,
        help="whole: a cell holds the model in memory; blocks: one block at a time, the rest stays in its files (the "
        "same bytes and numbers); auto: blocks where the whole will not fit (default: %(default)s)",
    )
    parser.add_argument("--address", default="", help="of the Ray cluster (default: auto, the one of this machine)")
    parser.add_argument(
        "--slurm",
        default="",
        metavar="KEY=VALUE,...",
        help="for the jobs: minutes, partition, account and what else sbatch takes; cluster=local tries it here",
    )


def engine_options(arguments: Options) -> dict[str, str]:
    """What the engine is told. Raises ValueError for options of another engine, or what is no list of them."""
    for engine, name in (("ray", "address"), ("slurm", "slurm")):
        if getattr(arguments, name) and arguments.engine != engine:
            raise ValueError(f"--{name} is for --engine {engine}: write both, or neither")
    if arguments.address:
        return {"address": arguments.address}
    parts = [part.strip().partition("=") for part in arguments.slurm.split(",") if part.strip()]
    if not all(name and value for name, _, value in parts):
        raise ValueError(
            f"--slurm {arguments.slurm} is no list of KEY=VALUE: write for example minutes=240,partition=gpu"
        )
    return {name.strip(): value.strip() for name, _, value in parts}


@dataclass(frozen=True)
class Loads:
    """What every cell will need at most, in GiB by prediction, and which of them hold one block at a time; by key."""

    memory_gib: dict[str, float]
    by_blocks: frozenset[str]

    @classmethod
    def of(cls, cells: Sequence[Cell], stock: Inventory, model: Path, arguments: Options, jobs: int) -> Loads:
        """Raises ValueError for `--load blocks` where a pair or another program's checkpoint is to be loaded."""
        from harness.engine.places import room_bytes
        from harness.plan.memory import predicted_peak_gib

        pageable = [cell for cell in cells if not (cell.base or cell.source)]
        if arguments.load == "blocks" and len(pageable) < len(cells):
            raise ValueError(
                "a pair (--base) and a checkpoint of another program (--model-cell) are loaded whole: write --load auto"
            )
        known = describe(model)
        need = {cell.key: predicted_peak_gib(cell, stock, known.hidden, known.vocabulary) for cell in cells}
        # Another machine is asked for what is needed.
        room = room_bytes(arguments.device, jobs) / 2**30 if arguments.engine == "local" else inf
        by_blocks = {
            cell.key
            for cell in pageable
            if arguments.load == "blocks" or (arguments.load == "auto" and need[cell.key] > room)
        }
        need |= {
            cell.key: predicted_peak_gib(cell, stock, known.hidden, known.vocabulary, by_blocks=True)
            for cell in pageable
            if cell.key in by_blocks
        }
        return cls(need, frozenset(by_blocks))


def worker(arguments: Options, jobs: int, console: Console, memory_gib: Mapping[str, float]) -> Work:
    """What does the work of cells and says how each ended; `jobs` and `console` are for this machine, `memory_gib` for
    others."""
    if arguments.engine == "local":
        return partial(_here, jobs, arguments.timeout, console)
    engine = import_module(ENGINES[arguments.engine])
    return partial(
        engine.run_cells, timeout_s=arguments.timeout, memory_gib=memory_gib, options=engine_options(arguments)
    )


def _here(
    jobs: int, timeout_s: float | None, console: Console, specs: Sequence[CellSpec], watch: Watch
) -> dict[str, Outcome]:
    from harness.cli.progress import say_waiting
    from harness.engine.local import run_cells

    return run_cells(specs, jobs, watch, timeout_s, partial(say_waiting, console))
