"""The harness in Python: `compare`, `compress`, `load_results`.

Every option of `run` is a keyword with an underscore for each hyphen (`bench_seconds=1`, `seeds=[0, 1]`,
`bench=False`), read and checked by the same parser, so that Python and the command line make the same cells and find
each other's."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from harness.report.frame import Leaderboard, read_leaderboard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from harness.plan.cells import Plan

Option = str | int | float | bool | Path | None | Sequence[str | int | float]


def compare(
    model: str | Path | None = None,
    methods: str | Sequence[str] = ("reallm", "gptq"),
    bits: float | str | Sequence[float | str] = 3.25,
    *,
    quiet: bool = False,
    **options: Option,
) -> Leaderboard:
    """Compress `model` (a folder, an id of the hub, or None for the default model) by every method at every budget of
    stored bits per weight, score and measure it; what was done before is found. Returns leaderboard.csv as a data frame
    (harness.report.frame), which knows its `folder`.

    `options` are those of `python -m harness run`. Raises ValueError with one line that says what to give instead, and
    KeyboardInterrupt (harness.cli.run.Stopped, with what is finished) when it is interrupted."""
    from harness.cli.options import read_request
    from harness.cli.progress import open_console
    from harness.cli.run import work

    arguments = _arguments(model=model, methods=methods, bits=bits, quiet=quiet, **options)
    request = read_request(arguments, presets=False)
    written = work(arguments, request, open_console(quiet))
    return load_results(written.folder)


def compress(
    model: str | Path | None = None,
    method: str = "reallm",
    bits: float | str = 3.25,
    *,
    quiet: bool = False,
    **options: Option,
) -> PreTrainedModel:
    """The model compressed by a method under a budget, as one can call it: the stored cell, loaded from its own files,
    its layers running on the fused products. It is the cell that `run` would make, and either finds the other's.

    `options` as of `compare` (those of scoring have no effect). Raises ValueError with one line that says what to give
    instead, or why the cell did not finish."""
    import torch

    from harness.cli.options import build_plan, read_request
    from harness.cli.progress import Display, open_console
    from harness.compressed import CompressedModel
    from harness.engine.local import run_cells
    from harness.store.cells import CellStore

    arguments = _arguments(model=model, methods=method, bits=bits, quiet=quiet, **options)
    request = read_request(arguments, presets=False)
    console = open_console(quiet)
    plan, _, _ = build_plan(arguments, request, lambda text: console.print(text, style="dim"))
    cell = _only_cell(plan)
    store = CellStore(cell.key)
    if store.artifact() is None:
        specs = [cell.spec((), arguments.data, plan.reference.key)]
        with Display(console, {cell.key: cell.label}, specs) as display:
            outcome = run_cells(specs, 1, display.message, arguments.timeout)[cell.key]
        if outcome.error:
            raise ValueError(f"{cell.label}: {outcome.error}")
    store.asked_for()
    return CompressedModel.load(store.folder, cell.compute.device, getattr(torch, cell.compute.dtype)).model


def load_results(folder: str | Path) -> Leaderboard:
    """The leaderboard in a folder that a run wrote (or a leaderboard.csv) as a data frame. Raises ValueError when there
    is none."""
    return read_leaderboard(Path(folder))


def _only_cell(plan: Plan) -> Any:
    cells = [cell for cell in plan.cells if cell.key != plan.reference.key]
    if not cells:  # the uncompressed model was asked for
        return plan.reference
    if len(cells) > 1:
        raise ValueError(f"{len(cells)} models are meant: give one method, one number of bits and one seed")
    if cells[0].refusal:
        raise ValueError(cells[0].refusal)
    return cells[0]


class _Parser(argparse.ArgumentParser):
    """Errors are raised, not printed."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.replace("unrecognized arguments: --", "no such option: "))


def _arguments(**options: Option) -> argparse.Namespace:
    """What the command line would have made of these."""
    from harness.cli import run

    words = ["run"]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words += [f"--{flag}"] if value else ([f"--no-{flag}"] if name == "bench" else [])
        elif isinstance(value, Sequence) and not isinstance(value, str):
            words += [f"--{flag}", ",".join(map(str, value))]
        elif value is not None:
            words += [f"--{flag}", str(value)]
    parser = _Parser(prog="harness")
    run.register(parser.add_subparsers())
    arguments = parser.parse_args(words)
    arguments.typed = words
    return arguments
