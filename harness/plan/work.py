"""The arithmetic a cell will take: floating-point operations of its matrix products and factorisations, phase by phase.

Counted from shapes, by the constants of the phases themselves, as two to a multiplication and addition. What a method
does besides, element by element (searching grids, nearest entries, best paths through a trellis), is not among them:
that is measured (docs/scaling.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch

from harness.compress.block import passes_take_turns
from harness.model import BlockSpec, Inventory
from harness.plan.budgets import MIXED
from harness.plan.cells import Cell
from harness.plan.sensitivity import RANDOM_CONTEXT, measured_windows
from kernels.formats.layer import LayerSpec

PIVOTS = 10 / 3  # of n^3: two Cholesky factors, an inverse, a product
FACTORS = 4 / 3  # two Cholesky factors and an inverse
SOLVE = 2 / 3  # by LU, for weights that follow the drift of their inputs
SCORED = 1000  # tokens


def predicted_flop(cell: Cell, stock: Inventory, hidden: int, vocabulary: int) -> dict[str, float]:
    """By the names of the phases (harness.engine.cell); of scoring for SCORED tokens."""
    calibration, needs = cell.calibration, cell.method.needs
    context = calibration.context if calibration else RANDOM_CONTEXT
    weights = sum(layer.weights for layer in stock.layers)

    def forward(tokens: int, length: int) -> float:
        return 2 * tokens * (weights + 2 * length * hidden * len(stock.blocks))

    def measuring(measure: str) -> float:
        """On the way back a block runs once more, and has a gradient of its input alone, as the head has; the Fisher
        information takes all windows, and the gradient of every weight."""
        feedback = measure == "feedback"
        windows, back = measured_windows(stock, context, feedback)
        if calibration:
            windows = calibration.sequences if measure == "fisher" else min(windows, calibration.sequences)
        back = (windows if measure == "fisher" else min(windows, back)) * context
        total = forward(windows * context, context) + 2 * forward(back, context) + 4 * back * hidden * vocabulary
        if measure == "fisher":
            total += 2 * back * weights
        for stage in (stage for block in stock.blocks for stage in stages(block)) if feedback else ():
            total += windows * context * stage[0].in_features ** 2 + PIVOTS * stage[0].in_features ** 3
        return total

    phases: dict[str, float] = {}
    measures = {needs.sensitivity} if cell.allocate in MIXED else set()
    if measures := measures | ({"fisher"} if needs.fisher else set()):
        phases["measure layers"] = sum(map(measuring, measures))
    tokens = cell.seen_tokens
    if needs.hessian or needs.pooled or needs.inputs or needs.original:
        streams = 2 if needs.original else 1
        total = forward(tokens, context) * streams * _passes(cell, stock.blocks[0], tokens, hidden, streams)
        for block in stock.blocks:
            for stage in stages(block):
                wide = stage[0].in_features
                total += tokens * wide**2 * ((1 if needs.hessian else 0) + (2 if needs.drift else 0))
                for layer in stage if needs.hessian else ():
                    total += FACTORS * wide**3 + layer.out_features * wide**2  # the column loop passes errors on
                    total += (SOLVE * wide**3 + 4 * layer.out_features * wide**2) if needs.drift else 0
        phases["compress"] = total
    heads = 2 if cell.budget else 1  # the reference's logits are made anew from its states
    phases["score"] = forward(SCORED, context) + 2 * SCORED * hidden * vocabulary * heads
    return phases


def _passes(cell: Cell, block: BlockSpec, tokens: int, hidden: int, streams: int) -> float:
    """How often a block is run: once, or where its passes would hold too much, anew up to every stage."""
    if not passes_take_turns(block, tokens, hidden, getattr(torch, cell.compute.dtype).itemsize, streams):
        return 1
    whole, done, passes = sum(layer.weights for layer in block.layers), 0, 1.0
    for stage in stages(block):
        passes += done / whole
        done += sum(layer.weights for layer in stage)
    return passes


def stages(block: BlockSpec) -> Iterator[Sequence[LayerSpec]]:
    """Layers that will share an input, as far as names and shapes tell: those of one module, but for its last, which
    takes what the others made. (In a run they are seen, not named: harness.compress.block.)"""
    for _, group in groupby(block.layers, key=lambda layer: layer.name.rpartition(".")[0]):
        layers = list(group)
        if len(layers) > 1 and len({layer.in_features for layer in layers[:-1]}) == 1:
            yield layers[:-1]
            yield layers[-1:]
        else:
            yield from ([layer] for layer in layers)
