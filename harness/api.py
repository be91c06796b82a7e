"""The harness from Python: a leaderboard as a DataFrame, a compressed model to call. What `import harness` offers.

Options are those of `run`, under the same names with underscores, read by the same parser: `compare(...)` is a run, its
cells and its files are the ones that the command line would make and find again."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Unpack

import torch
from rich.console import Console
from rich.control import Control
from transformers import PreTrainedModel

from harness.cli import run as runs
from harness.cli.engines import Loads, worker
from harness.cli.options import build_plan, read_request
from harness.cli.progress import open_console
from harness.cli.request import Given, Options, Parser, Texts, words
from harness.compressed import CompressedModel
from harness.data.assets import DEFAULT_MODEL
from harness.report.frame import Leaderboard
from harness.report.sheet import Row
from harness.report.sinks import Sinks
from harness.store.cells import CellStore

__all__ = ["Leaderboard", "compare", "compress", "load_results"]


def compare(
    model: str | os.PathLike[str] = DEFAULT_MODEL,
    methods: Texts = ("reallm", "gptq"),
    bits: float | Texts = 3.25,
    **options: Unpack[Given],
) -> Leaderboard:
    """Compress, score and rank, as `run` does: a row per cell, in the order and with the columns of leaderboard.csv.

    `model` is a pinned name, a local folder or a hub id, `methods` what `--methods` takes, `bits` budgets in stored
    bits per weight. A cell that fails is a row that says why (`status`, `reason`). What is finished is found again, and
    what an interrupt leaves goes on with the same call. The files are in the frame's `folder`. Raises ValueError with
    one line that says what to type next."""
    given = _options(model, methods, bits, options)
    with _children_of_nobody():
        _, folder = runs.run(given, _console(given.quiet), _show_nothing)
    return load_results(folder)


def compress(
    model: str | os.PathLike[str] = DEFAULT_MODEL,
    method: str = "reallm",
    bits: float | str = 3.25,
    **options: Unpack[Given],
) -> PreTrainedModel:
    """The model compressed by one method under a budget of `bits` stored bits per weight, to be called and to
    `generate` with: stored, and loaded again from those bytes alone. Its products are those that are scored and timed.

    The cell is that of `run` with the same options, so it is made once and found after that; it is not scored. Its
    tokenizer is at `model.name_or_path`. It computes in `dtype` (float32 on a CPU, unless given) on `device`. Options
    of scoring and measuring have no effect. Raises ValueError with one line for what was asked for wrongly, and where
    the method refuses or fails."""
    given = _options(model, [method], bits, options)
    request = replace(read_request(given), protocols=[], tasks=())  # nothing is scored
    if any(len(asked) != 1 for asked in (request.methods, request.budgets, request.seeds, request.act_bits)):
        raise ValueError(
            "a model is compressed by one method, for one budget, seed and width of activations: write "
            "compress(model, 'gptq', 3.25)"
        )
    console = _console(given.quiet)
    plan, stock, resolved = build_plan(given, request, partial(console.print, style="dim"))
    (cell,) = plan.cells[-1:]
    if cell.refusal:
        raise ValueError(f"{cell.label} is refused: {cell.refusal}")
    if given.fresh:
        CellStore(cell.key).forget()
    loads = Loads.of([cell], stock, resolved.path, given, request.jobs)
    work = worker(given, request.jobs, console, loads.memory_gib)
    with _children_of_nobody():
        outcomes = runs.finish(plan, [cell], given, work, console, Sinks({}), loads.by_blocks)
    if given.strict:
        outcomes |= runs.strictly([cell], outcomes)
    for outcome in outcomes.values():
        if outcome.error:
            raise ValueError(f"{cell.label}: {outcome.ending} ({outcome.error})")
    compressed = CompressedModel.load(
        CellStore(cell.key).folder,
        cell.compute.device,
        getattr(torch, cell.compute.dtype),
        cell.base,
        by_blocks=cell.key in loads.by_blocks,
    )
    compressed.model.config._name_or_path = compressed.model.name_or_path = str(resolved.path)
    return compressed.model


def load_results(folder: str | os.PathLike[str]) -> Leaderboard:
    """The leaderboard of a folder that a run wrote, or of its leaderboard.csv. Raises ValueError when it is none."""
    return Leaderboard.read(Path(folder).expanduser())


def _options(model: object, methods: object, bits: object, options: Any) -> Options:
    """As the command line would have read them. Raises ValueError."""
    parser = Parser(prog="harness", add_help=False, allow_abbrev=False)
    runs.add_options(parser)
    typed = words({"model": model, "methods": methods, "bits": bits, **options})
    return replace(Options.of(parser.parse_args(typed)), typed=["run", *typed])


class _Notebook(Console):
    """A notebook whose widgets let progress move as on a terminal; it has no cursor to be moved."""

    def __init__(self, quiet: bool) -> None:
        super().__init__(
            highlight=False,
            markup=False,
            emoji=False,
            soft_wrap=True,
            quiet=quiet,
            force_terminal=True,
            force_interactive=False,
        )

    def control(self, *control: Control) -> None:
        """Nothing."""


def _console(quiet: bool = False) -> Console:
    """Notes and progress. In a notebook with ipywidgets the bars move, elsewhere in one it is a line per phase."""
    console = open_console(quiet)
    return _Notebook(quiet) if console.is_jupyter and find_spec("ipywidgets") else console


def _show_nothing(rows: Sequence[Row]) -> None:
    """The frame shows itself."""


@contextmanager
def _children_of_nobody() -> Iterator[None]:
    """Cells are processes of their own, and each would begin by importing the script that called us, which calls us
    again. They need nothing of it, so while they are started it has no name to be imported by."""
    main = sys.modules["__main__"]
    kept = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    for name in kept:
        setattr(main, name, None)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(main, name, value)
