"""What `bench --shapes` measures: single products, or whole models, of random stored bits in the shapes of published
models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from rich.console import Console
from transformers import PretrainedConfig

from harness.cli.options import Request
from harness.cli.progress import say_waiting
from harness.cli.request import Options
from harness.cli.sheets import json_rows, print_json, print_sheet
from harness.data.files import write_json
from harness.measure import machine
from harness.measure.end_to_end import borrowed_bytes, random_model, uncompressed
from harness.measure.layers import product_times, random_group, vendor_group
from harness.measure.measurement import measure
from harness.model import Inventory, half_dtype, inventory, read_config, skeleton
from harness.plan.allocation import BudgetError, uniform
from harness.plan.budgets import Budget
from harness.progress import silent
from harness.report.latency import (
    END_TO_END_COLUMNS,
    KERNEL_COLUMNS,
    bench_values,
    best_bandwidth,
    end_to_end_sheet,
    kernel_rows,
    kernel_sheet,
)
from harness.report.sheet import Row, Sheet
from harness.report.table import write_csv
from harness.store.results import Bench, ProductTime
from kernels.formats.layer import LayerConfig
from kernels.timing import bandwidth

ROOM = 0.8  # of the free memory, where blocks are left out: prompts and caches need some
BEYOND_CACHES = 2**28  # bytes that no cache holds from one token to the next


@dataclass(frozen=True)
class Shapes:
    """A model whose shapes are measured."""

    name: str
    config: PretrainedConfig
    stock: Inventory


def time_products(models: Sequence[Shapes], arguments: Options, request: Request, console: Console) -> int:
    """Every distinct matrix of the models, packed by every method with the one configuration for all matrices that fits
    the budget."""
    device = arguments.device
    torch.set_num_threads(arguments.bench_threads)
    timed: list[tuple[str, str, tuple[ProductTime, ...]]] = []  # model, row, products
    readable = 0.0
    with machine.quiet(partial(say_waiting, console)):
        here = machine.describe(device, arguments.bench_threads)
        for name, config, stock in ((model.name, model.config, model.stock) for model in models):
            dtype = getattr(torch, arguments.dtype or ("float32" if device == "cpu" else half_dtype(config)))
            for row, configs in _uniform_rows(request, stock, console):
                console.print(f"{name}, {row}", style="dim")
                vendor = {shape: vendor_group(*shape, device, dtype) for shape in configs}
                groups = [random_group(config.to_json(), *shape, device) for shape, config in configs.items()]
                readable = max(readable, bandwidth(device))
                times = product_times(groups, vendor, device, dtype, arguments.bench_seconds)
                timed.append((name, row, times))
    if not timed:
        raise ValueError("nothing to time: no method given fits a budget")
    rows = [line for name, row, times in timed for line in kernel_rows(times, readable, here, name, row, "")]
    folder = arguments.out or Path("results") / "kernels"
    write_csv(folder / "kernels.csv", list(KERNEL_COLUMNS), rows)
    write_json(folder / "machine.json", here.to_json())
    _print(rows, kernel_sheet(rows), folder, arguments.json)
    console.print(f"{folder}/kernels.csv", style="dim")
    return 0


def time_models(models: Sequence[Shapes], arguments: Options, request: Request, console: Console) -> int:
    """Whole models of the shapes, packed by every method with one configuration for all matrices: a row each, and one
    of the uncompressed model, which all others take turns with."""
    device = arguments.device
    torch.set_num_threads(arguments.bench_threads)
    # model, row, stored bits, blocks held, what was found
    benches: list[tuple[str, str, float, int | None, Bench]] = []
    with machine.quiet(partial(say_waiting, console)):
        for name, config, stock in ((model.name, model.config, model.stock) for model in models):
            dtype = getattr(torch, arguments.dtype or ("float32" if device == "cpu" else half_dtype(config)))
            dense = dict.fromkeys((layer.name for layer in stock.layers), uncompressed(config))
            held = blocks_held(name, stock, request.budgets) if device == "cpu" else None
            load_reference = cache(partial(random_model, config, dense, device, dtype, held))
            for row, shapes in (("fp16", None), *_uniform_rows(request, stock, console)):
                console.print(f"{name}, {row}", style="dim")
                load = load_reference
                if shapes is not None:
                    layers = {layer.name: shapes[layer.out_features, layer.in_features] for layer in stock.layers}
                    load = cache(partial(random_model, config, layers, device, dtype, held))
                stored_bpw = load().ledger().stored_bpw  # before uncompressed layers become the device's own
                reference = None if load is load_reference else load_reference
                seconds = arguments.bench_seconds
                found = measure(load, reference, device, dtype, seconds, silent, random_bits=True)
                taken = found.memory.resident_bytes + borrowed_bytes(load())
                found = replace(found, memory=replace(found.memory, resident_bytes=taken))
                benches.append((name, row, stored_bpw, held, found))
    readable = best_bandwidth(bench for *_, bench in benches)
    rows: list[Row] = []
    for name, row, stored_bpw, held, bench in benches:
        values = bench_values(bench, readable)
        values |= {"model": name, "row": row, "stored_bpw": stored_bpw, "bytes_per_token": bench.bytes_per_token}
        values |= {"blocks_held": held} if held else {}
        rows.append({**values, "processor": bench.machine.gpu or bench.machine.processor})
    folder = arguments.out or Path("results") / "end-to-end"
    write_csv(
        folder / "end_to_end.csv",
        list(END_TO_END_COLUMNS),
        [{k: v for k, v in row.items() if k in END_TO_END_COLUMNS} for row in rows],
    )
    write_json(folder / "machine.json", benches[0][-1].machine.to_json())
    _print(rows, end_to_end_sheet(rows), folder, arguments.json)
    console.print(f"{folder}/end_to_end.csv", style="dim")
    return 0


def blocks_held(name: str, stock: Inventory, budgets: Sequence[Budget]) -> int | None:
    """How many blocks' bits memory has room for, uncompressed and compressed beside each other; None for all of them.
    Raises ValueError where those would be read from a cache."""
    bits = [float(budget.bpw) for budget in budgets] or [16.0]
    free, blocks = machine.available_bytes(), len(stock.blocks)
    rest = 8 * stock.rest_weights  # of either model made in fp32, before it is 16 bits
    need = (2 + max(bits) / 8) * stock.weights
    if rest + need <= free:
        return None
    held = int(ROOM * (free - rest) / (need / blocks))
    if held < 1 or held * min(bits) / 8 * stock.weights / blocks < BEYOND_CACHES:
        raise ValueError(
            f"{name} uncompressed and compressed beside each other take {(rest + need) / 2**30:.0f} GiB, and too few "
            f"of its {blocks} blocks find room in the {free / 2**30:.1f} GiB that are free: give smaller shapes to "
            "--end-to-end, or leave it out to time single products"
        )
    return held


def _print(rows: Sequence[Row], sheet: Sheet, folder: Path, as_json: bool) -> None:
    if as_json:
        print_json({"folder": folder, "rows": json_rows(rows)})
    else:
        print_sheet(sheet)


def models_of(arguments: Options) -> list[Shapes]:
    """Raises ValueError when there is none, or one that no model can be laid out of."""
    names = [part.strip() for part in arguments.shapes.split(",") if part.strip()]
    if not names:
        raise ValueError("--shapes names no model: give a preset, a folder or a hub id, as --shapes llama3.2-1b")
    configs = [read_config(name, arguments.revision) for name in names]
    return [Shapes(name, config, inventory(skeleton(config))) for name, config in zip(names, configs, strict=True)]


def _uniform_rows(
    request: Request, stock: Inventory, console: Console
) -> Iterator[tuple[str, dict[tuple[int, int], LayerConfig]]]:
    """(label, configuration by shape) for every method and budget that one configuration for all matrices fits."""
    for text, method in request.methods:
        for budget in request.budgets if method.budgeted else []:
            try:
                configs = uniform(method, stock, budget.bpw).layers
            except BudgetError as error:
                console.print(f"refused: {text} {budget.text} ({error})", style="yellow")
                continue
            shapes = {(layer.out_features, layer.in_features): configs[layer.name] for layer in stock.layers}
            yield f"{text} {budget.text}", shapes
