"""`plan`: what a run would do and store, from shapes alone; nothing is loaded."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console

from harness.cli.options import add_plan_options, build_plan, read_request
from harness.cli.request import Options
from harness.cli.sheets import add_json_option, print_json
from harness.ledger import Ledger
from harness.model import PRESETS, Inventory
from harness.model.described import describe
from harness.plan.allocation import common_candidates
from harness.plan.budgets import MIXED
from harness.store.cells import CellStore
from harness.store.records import AllocationRecord
from kernels.formats.bits import PARTS
from kernels.formats.layer import LayerConfig

if TYPE_CHECKING:
    from harness.plan.cells import Cell


Found = dict[str, Any]  # what a plan says, as JSON


def register(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("plan", description=__doc__)
    add_plan_options(parser)
    parser.add_argument("--all", action="store_true", help="list every candidate, not only those near the budget")
    parser.add_argument(
        "--scope",
        choices=("stored", "paper"),
        default="stored",
        help="what --bits limits here: everything stored, as in `run`, or the quantised part without adapters, "
        "as papers count (default: %(default)s)",
    )
    parser.epilog = f"--model also takes a preset: {', '.join(PRESETS)}"
    add_json_option(parser)
    parser.set_defaults(main=main)


def main(arguments: argparse.Namespace) -> int:
    options = Options.of(arguments)
    request = read_request(options)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    plan, stock, model = build_plan(options, request, partial(console.print, style="dim"), from_config=True)
    from harness.plan.memory import predicted_peak_gib
    from harness.plan.work import predicted_flop

    known = describe(model.path, arguments.revision)
    found: Found = {
        "model": model.name,
        "blocks": len(stock.blocks),
        "layers": len(stock.layers),
        "weights": stock.weights,
        "rest_gib": 2 * stock.rest_weights / 2**30,  # embeddings, head and norms at 16 bits
        "note": stock.uncovered_note,
    }
    cells = []
    for cell in plan.cells:
        if arguments.scope == "paper" and cell.budget:
            cells.append(_paper_scope(cell, stock))
            continue
        peak, by_blocks = (
            predicted_peak_gib(cell, stock, known.hidden, known.vocabulary, by_blocks=way) for way in (False, True)
        )
        key = cell.key if model.fingerprint else None
        peaks = {"predicted_peak_gib": peak, "predicted_peak_by_blocks_gib": None if cell.base else by_blocks}
        work = {"predicted_flop": predicted_flop(cell, stock, known.hidden, known.vocabulary)}
        cells.append({"cell": key, **peaks, **work, **_planned(cell, stock, arguments.all)})
    if arguments.json:
        print_json({**found, "cells": cells})
    else:
        for line in _lines(found, cells):
            print(line)
    return 1 if arguments.scope == "stored" and any(cell.refusal for cell in plan.cells) else 0


def _paper_scope(cell: Cell, stock: Inventory) -> Found:
    """Sizes as papers on adapters give them: the budget is the quantised part's, and adapters come on top."""
    assert cell.budget is not None
    offered = [
        (configs, ledger, ledger.stored_bits - ledger.bits.adapters)
        for configs, ledger in common_candidates(cell.method, stock)
    ]
    adapters = {ledger.bits.adapters for _, ledger, _ in offered}
    with_adapters = None
    if len(adapters) == 1:
        total = cell.budget.bpw + Fraction(adapters.pop(), stock.weights)
        above = math.ceil(total * 10_000) / 10_000
        with_adapters = {"stored_bpw": float(total), "bits": f"{above:.4f}"}  # what `run` is to be asked for
    fitting = sorted((item for item in offered if item[2] <= cell.budget.bpw * stock.weights), key=lambda item: item[2])
    largest = [(configs, ledger) for configs, ledger, _ in fitting[-3:]]
    return {
        "scope": "paper",
        "method": cell.method_text,
        "budget": cell.budget.text,
        "with_adapters": with_adapters,
        "shown": _candidates(largest, stock, None),
    }


def _planned(cell: Cell, stock: Inventory, everything: bool) -> Found:
    """What a cell may store, or will."""
    found = sorted(common_candidates(cell.method, stock), key=lambda item: item[1].stored_bits)
    chosen = cell.allocation.layers if cell.allocation else None

    def distance(item: tuple[dict[str, LayerConfig], Ledger]) -> float:
        return abs(item[1].stored_bpw - float(cell.budget.bpw)) if cell.budget and item[0] != chosen else 0.0

    near = [item for item in found if distance(item) <= 0.06]
    nearest = sorted(sorted(found, key=distance)[:3], key=lambda item: item[1].stored_bits)
    mixed = cell.allocate in MIXED and not cell.refusal
    allocation = CellStore(cell.key).allocation() if mixed else None
    return {
        "scope": "stored",
        "method": cell.method_text,
        "budget": cell.budget.text if cell.budget else None,
        "refusal": cell.refusal or None,
        "candidates": len(found),
        "shown": _candidates(found if everything else near or nearest, stock, chosen),
        "mixed": mixed,
        "mix": allocation and _mix(allocation, stock),
    }


def _candidates(
    shown: Sequence[tuple[dict[str, LayerConfig], Ledger]], stock: Inventory, chosen: dict[str, LayerConfig] | None
) -> list[Found]:
    """Configurations for a whole model, in stored bits per weight by part."""
    return [
        {
            "config": str(configs[stock.layers[0].name]),
            "chosen": configs == chosen,
            "stored": ledger.stored_bpw,
            **{part: ledger.bpw(getattr(ledger.bits, part)) for part in PARTS},
        }
        for configs, ledger in shown
    ]


def _mix(allocation: AllocationRecord, stock: Inventory) -> Found:
    layers = []
    for layer in stock.layers:
        config = allocation.layers[layer.name]
        bpw = config.stored_bits(layer).total / layer.weights
        layers.append({"layer": layer.name, "stored_bpw": bpw, "config": str(config)})
    return {"predicted": allocation.predicted, "gap": allocation.gap, "layers": layers}


def _lines(found: Found, cells: Sequence[Found]) -> Iterator[str]:
    yield (
        f"{found['model']}: {found['blocks']} blocks, {found['layers']} linear layers, {found['weights']:,} weights; "
        f"{found['rest_gib']:.3f} GiB of embeddings, head and norms at 16 bits"
    )
    if found["note"]:
        yield f"  {found['note']}"
    for cell in cells:
        yield ""
        yield from _paper_lines(cell) if cell["scope"] == "paper" else _cell_lines(cell)


def _paper_lines(cell: Found) -> Iterator[str]:
    yield f"{cell['method']}: {cell['budget']} for the quantised part"
    if total := cell["with_adapters"]:
        yield (
            f"  with adapters {total['stored_bpw']:.4f} stored: mixed over the matrices by `run --bits {total['bits']}`"
        )
    if cell["shown"]:
        yield "  the largest that fit, one configuration for all matrices:"
        yield from _candidate_lines(cell["shown"])


def _cell_lines(cell: Found) -> Iterator[str]:
    from harness.plan.work import SCORED

    key = f"  [{cell['cell']}]" if cell["cell"] else ""
    budget = f"under {cell['budget']}" if cell["budget"] else "no budget"
    blocks = cell["predicted_peak_by_blocks_gib"]
    less = f", a block at a time {blocks:.1f}" if blocks else ""
    yield f"{cell['method']} {budget}{key}  predicted peak {cell['predicted_peak_gib']:.1f} GiB{less}"
    flop = dict(cell["predicted_flop"])
    scoring = flop.pop("score")
    parts = [f"{name} {count / 1e12:,.1f}" for name, count in flop.items()]
    yield f"  TFLOP: {', '.join([*parts, f'score {SCORED} tokens {scoring / 1e12:,.1f}'])}"
    if cell["refusal"]:
        yield f"  refused: {cell['refusal']}"
    count, shown = cell["candidates"], cell["shown"]
    near = "" if len(shown) == count else f", {len(shown)} near the budget"
    yield f"  {count} candidates for a whole model{near}:"
    yield from _candidate_lines(shown)
    if mix := cell["mix"]:
        yield (
            f"  the mix: predicted divergence {mix['predicted']:.4g}, "
            f"at most {mix['gap']:.2g} of it above the best possible"
        )
        yield from (f"    {layer['stored_bpw']:8.4f}  {layer['layer']}  {layer['config']}" for layer in mix["layers"])
    elif cell["mixed"]:
        yield (
            "  mixed over the matrices by `run`, which has the weights; afterwards this shows the mix "
            "(or: --allocate uniform)"
        )


def _candidate_lines(shown: Sequence[Found]) -> Iterator[str]:
    columns = ("stored", *PARTS)
    yield "    " + " ".join(f"{column:>8}" for column in columns)
    for candidate in shown:
        numbers = " ".join(f"{candidate[column]:8.4f}" for column in columns)
        yield f"  {'*' if candidate['chosen'] else ' '} {numbers}  {candidate['config']}"
