"""`plan`: what a run would do and store, from shapes alone; nothing is loaded."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import partial

from rich.console import Console

from harness.cli.options import add_plan_options, build_plan, read_request
from harness.ledger import Ledger
from harness.model import PRESETS, Inventory, read_config
from harness.plan.allocation import MIXED, common_candidates
from harness.plan.cells import Cell
from harness.plan.memory import predicted_peak_gib
from harness.store.cells import CellStore
from harness.store.records import AllocationRecord
from kernels.formats.layer import LayerConfig


def register(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser(
        "plan", help="cells, candidates and exact stored bits, without loading a model", description=__doc__
    )
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
    parser.set_defaults(main=main)


def main(arguments: argparse.Namespace) -> int:
    request = read_request(arguments)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    plan, stock, model = build_plan(arguments, request, partial(console.print, style="dim"), from_config=True)
    config = read_config(model.path, arguments.revision).get_text_config()
    print(
        f"{model.name}: {len(stock.blocks)} blocks, {len(stock.layers)} linear layers, {stock.weights:,} weights; ",
        end="",
    )
    print(f"{2 * stock.rest_weights / 2**30:.3f} GiB of embeddings, head and norms at 16 bits")
    if stock.uncovered:
        print(f"  {stock.uncovered_note}")
    for cell in plan.cells:
        if arguments.scope == "paper" and cell.budget:
            _print_paper_scope(cell, stock)
            continue
        peak = predicted_peak_gib(cell, stock, config.hidden_size, config.vocab_size)
        key = f"  [{cell.key}]" if model.fingerprint else ""
        budget = f"under {cell.budget.text}" if cell.budget else "no budget"
        print(f"\n{cell.method_text} {budget}{key}  predicted peak {peak:.1f} GiB")
        _print_cell(cell, stock, arguments.all)
    return 1 if arguments.scope == "stored" and any(cell.refusal for cell in plan.cells) else 0


def _print_paper_scope(cell: Cell, stock: Inventory) -> None:
    """Sizes as papers on adapters give them: the budget is the quantised part's, and adapters come on top."""
    assert cell.budget is not None
    print(f"\n{cell.method_text}: {cell.budget.text} for the quantised part")
    found = [
        (configs, ledger, ledger.stored_bits - ledger.bits.adapters)
        for configs, ledger in common_candidates(cell.method, stock)
    ]
    adapters = {ledger.bits.adapters for _, ledger, _ in found}
    if len(adapters) == 1:
        total = cell.budget.bpw + Fraction(adapters.pop(), stock.weights)
        above = math.ceil(total * 10_000) / 10_000
        print(f"  with adapters {float(total):.4f} stored: mixed over the matrices by `run --bits {above:.4f}`")
    fitting = sorted((item for item in found if item[2] <= cell.budget.bpw * stock.weights), key=lambda item: item[2])
    if fitting:
        print("  the largest that fit, one configuration for all matrices:")
        _print_candidates([(configs, ledger) for configs, ledger, _ in fitting[-3:]], stock, None)


def _print_cell(cell: Cell, stock: Inventory, everything: bool) -> None:
    if cell.refusal:
        print(f"  refused: {cell.refusal}")
    found = sorted(common_candidates(cell.method, stock), key=lambda item: item[1].stored_bits)
    chosen = cell.allocation.layers if cell.allocation else None

    def distance(item: tuple[dict[str, LayerConfig], Ledger]) -> float:
        return abs(item[1].stored_bpw - float(cell.budget.bpw)) if cell.budget and item[0] != chosen else 0.0

    near = [item for item in found if distance(item) <= 0.06]
    nearest = sorted(sorted(found, key=distance)[:3], key=lambda item: item[1].stored_bits)
    shown = found if everything else near or nearest
    print(
        f"  {len(found)} candidates for a whole model"
        + ("" if len(shown) == len(found) else f", {len(shown)} near the budget")
        + ":"
    )
    _print_candidates(shown, stock, chosen)
    if cell.allocate in MIXED and not cell.refusal:
        _print_mix(CellStore(cell.key).allocation(), stock)


def _print_candidates(
    shown: Sequence[tuple[dict[str, LayerConfig], Ledger]], stock: Inventory, chosen: dict[str, LayerConfig] | None
) -> None:
    print(f"    {'stored':>8} {'codes':>8} {'scales':>8} {'tables':>8} {'adapters':>8}")
    for configs, ledger in shown:
        print(f"  {'*' if configs == chosen else ' '} {_columns(ledger)}  {configs[stock.layers[0].name]}")


def _print_mix(allocation: AllocationRecord | None, stock: Inventory) -> None:
    if allocation is None:
        print(
            "  mixed over the matrices by `run`, which has the weights; afterwards this shows the mix "
            "(or: --allocate uniform)"
        )
        return
    print(
        f"  the mix: predicted divergence {allocation.predicted:.4g}, "
        f"at most {allocation.gap:.2g} of it above the best possible"
    )
    for layer in stock.layers:
        config = allocation.layers[layer.name]
        print(f"    {config.stored_bits(layer).total / layer.weights:8.4f}  {layer.name}  {config}")


def _columns(ledger: Ledger) -> str:
    parts = (ledger.bits.codes, ledger.bits.scales, ledger.bits.tables, ledger.bits.adapters)
    return f"{ledger.stored_bpw:8.4f} " + " ".join(f"{ledger.bpw(bits):8.4f}" for bits in parts)
