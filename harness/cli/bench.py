"""`bench`: memory and latency of a finished run again, or of single products of a published model's shapes without its
weights."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console

from harness.cli.options import Request, add_bench_options, add_plan_options, build_plan, read_request
from harness.cli.run import bench_cells, report
from harness.cli.sheets import print_table
from harness.data.presets import PRESETS
from harness.measure import machine
from harness.measure.layers import layer_times, random_group, vendor_group
from harness.model import half_dtype, inventory, read_config, skeleton
from harness.plan.allocation import BudgetError, uniform
from harness.report.latency import KERNEL_COLUMNS, kernel_rows, kernel_table
from harness.report.leaderboard import write_csv
from harness.store.cells import CellStore
from harness.store.files import write_json


def register(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser(
        "bench", help="measure memory and latency again, or products of a model's shapes", description=__doc__
    )
    add_plan_options(parser)
    add_bench_options(parser)
    parser.add_argument(
        "--out", type=Path, help="folder of the tables (default: results/<plan hash>, or results/kernels)"
    )
    parser.add_argument(
        "--shapes",
        metavar="MODELS",
        help=f"comma list of presets, folders or hub ids: random stored bits ({', '.join(PRESETS)})",
    )
    parser.set_defaults(main=main)


def main(arguments: argparse.Namespace) -> int:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    start = time.perf_counter()
    request = read_request(arguments)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.shapes:
        return _shapes(arguments, request, console)
    plan, _, _ = build_plan(arguments, request, lambda text: console.print(text, style="dim"))
    missing = [cell for cell in plan.cells if not cell.refusal and not CellStore(cell.key).artifact()]
    if missing:
        raise ValueError(
            f"{missing[0].label} has not been compressed with these options: the same line with `run` does it first"
        )
    return report(plan, {}, bench_cells(plan, arguments, console, again=True), arguments, console, start)


def _shapes(arguments: argparse.Namespace, request: Request, console: Console) -> int:
    """Every distinct matrix of the models, packed by every method with the one configuration for all matrices that fits
    the budget."""
    device, threads = arguments.device, arguments.bench_threads
    torch.set_num_threads(threads)
    timed: list[tuple[list[dict], str, str]] = []
    bandwidth = 0.0
    with machine.quiet(lambda: console.print("waiting until nothing else of ours runs on this machine", style="dim")):
        here = machine.identity(device) | machine.clocks(device) | {"threads": threads}
        for name in [part.strip() for part in arguments.shapes.split(",") if part.strip()]:
            config = read_config(name, arguments.revision)
            stock = inventory(skeleton(config))
            dtype = getattr(torch, arguments.dtype or ("float32" if device == "cpu" else half_dtype(config)))
            for text, method in request.methods:
                for budget in request.budgets if method.budgeted else []:
                    try:
                        plan = uniform(method, stock, budget.bpw).layers
                    except BudgetError as error:
                        console.print(f"refused: {text} {budget.text} ({error})", style="yellow")
                        continue
                    console.print(f"{name}, {text} {budget.text}", style="dim")
                    alike = {(layer.out_features, layer.in_features): plan[layer.name] for layer in stock.layers}
                    groups = [
                        random_group(dict(made.hyper) | {"format": made.format}, *shape, device)
                        for shape, made in alike.items()
                    ]
                    vendor = {shape: vendor_group(*shape, device, dtype) for shape in alike}
                    bandwidth = max(bandwidth, machine.bandwidth(device))
                    timed.append(
                        (
                            layer_times(groups, vendor, device, dtype, arguments.bench_seconds),
                            name,
                            f"{text} {budget.text}",
                        )
                    )
    if not timed:
        raise ValueError("nothing to time: no method given fits a budget")
    rows = [row for records, name, row in timed for row in kernel_rows(records, bandwidth, here, name, row, "")]
    folder = arguments.out or Path("results") / "kernels"
    write_csv(folder / "kernels.csv", list(KERNEL_COLUMNS), rows)
    write_json(folder / "machine.json", here)
    print_table(*kernel_table(rows))
    console.print(f"{folder}/kernels.csv", style="dim")
    return 0
