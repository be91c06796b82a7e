"""`plan`: what a run would do and store, from shapes alone; nothing is loaded."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from harness.allocate import common_candidates
from harness.cli.options import add_plan_options, build_plan, read_request
from harness.ledger import Ledger
from harness.model import Inventory, read_config
from harness.plan import Cell, predicted_peak_gib
from harness.presets import PRESETS
from harness.store import CellStore
from methods.base import LayerConfig


def register(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("plan", help="cells, candidates and exact stored bits, without loading a model", description=__doc__)
    add_plan_options(parser)
    parser.add_argument("--all", action="store_true", help="list every candidate, not only those near the budget")
    parser.epilog = f"--model also takes a preset: {', '.join(PRESETS)}"
    parser.set_defaults(main=main)


def main(arguments: argparse.Namespace) -> int:
    request = read_request(arguments)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    plan, stock, model = build_plan(arguments, request, lambda text: console.print(text, style="dim"), from_config=True)
    config = read_config(model.path, arguments.revision).get_text_config()
    print(f"{model.name}: {len(stock.blocks)} blocks, {len(stock.layers)} linear layers, {stock.weights:,} weights; ", end="")
    print(f"{2 * stock.rest_weights / 2**30:.3f} GiB of embeddings, head and norms at 16 bits")
    for name, count in list(stock.uncovered.items())[:4]:
        print(f"  not covered by any method, counted at 16 bits: {name} ({count:,} weights)")
    for cell in plan.cells:
        peak = predicted_peak_gib(cell, stock, config.hidden_size, config.vocab_size)
        key = f"  [{cell.key}]" if model.fingerprint else ""
        budget = f"under {cell.budget.text}" if cell.budget else "no budget"
        print(f"\n{cell.method_text} {budget}{key}  predicted peak {peak:.1f} GiB")
        _print_cell(cell, stock, arguments.all)
    return 1 if any(cell.refusal for cell in plan.cells) else 0


def _print_cell(cell: Cell, stock: Inventory, everything: bool) -> None:
    if cell.refusal:
        print(f"  refused: {cell.refusal}")
    found = sorted(common_candidates(cell.method, stock), key=lambda item: item[1].stored_bits)
    chosen = next(iter(cell.allocation.layers.values())) if cell.allocation else None
    near = [item for item in found if item[0] == chosen or not cell.budget or abs(item[1].stored_bpw - cell.budget.bpw) <= 0.06]
    shown = found if everything else near or found[:3]
    print(f"  {len(found)} candidates for a whole model" + ("" if len(shown) == len(found) else f", {len(shown)} near the budget") + ":")
    print(f"    {'stored':>8} {'codes':>8} {'scales':>8} {'tables':>8} {'adapters':>8}")
    for config, ledger in shown:
        print(f"  {'*' if config == chosen else ' '} {_columns(ledger)}  {config}")
    if cell.allocate == "ilp" and not cell.refusal:
        _print_mix(CellStore(cell.key).plan(), stock)


def _print_mix(plan: dict[str, Any] | None, stock: Inventory) -> None:
    if plan is None:
        print("  mixed over the matrices by `run`, which has the weights; afterwards this shows the mix (or: --allocate uniform)")
        return
    print(f"  the mix: predicted divergence {plan['predicted']:.4g}, at most {plan['gap']:.2g} of it above the best possible")
    for layer in stock.layers:
        config = LayerConfig.from_json(plan["layers"][layer.name])
        print(f"    {config.stored_bits(layer).total / layer.weights:8.4f}  {layer.name}  {config}")


def _columns(ledger: Ledger) -> str:
    parts = (ledger.bits.codes, ledger.bits.scales, ledger.bits.tables, ledger.bits.adapters)
    return f"{ledger.stored_bpw:8.4f} " + " ".join(f"{ledger.bpw(bits):8.4f}" for bits in parts)
