"""The memory a cell will need, predicted from shapes: what each phase holds, by the constants of the phase itself."""

from __future__ import annotations

import torch

from harness.compress.block import passes_bytes, passes_take_turns
from harness.compress.distil import slice_tokens
from harness.compress.forward import BATCH_TOKENS
from harness.compress.training import KEPT_BYTES, kept_bytes
from harness.data.protocols import DISTIL
from harness.evaluate.score import HEAD_LOGITS, body_tokens
from harness.model import Inventory
from harness.plan.budgets import MIXED
from harness.plan.cells import Cell
from harness.plan.sensitivity import (
    FISHER_TOKENS,
    GRADIENT_TOKENS,
    HEAD_TOKENS,
    HESSIAN_TOKENS,
    RANDOM_CONTEXT,
    hessian_tokens,
)
from kernels.formats.layer import LayerSpec
from methods.base import Method

PYTHON = 0.33 * 2**30  # interpreter, torch and transformers

# Matrices of a layer's inputs by its inputs (tests/harness/plan/test_memory.py):
FACTORING = 2.2  # beside a Gram matrix whose pivots are computed
PACKING = 5  # a Hessian with all that methods make of it
TURNING = 3  # of a layer whose inputs are rotated, besides


def _turns(method: Method, layer: LayerSpec) -> bool:
    return any(dict(config.hyper).get("rotated") for config in method.candidates(layer))


def _rank(method: Method, layer: LayerSpec) -> int:
    return dict(method.candidates(layer)[0].hyper).get("rank", 0)


def predicted_peak_gib(cell: Cell, stock: Inventory, hidden: int, vocabulary: int, *, by_blocks: bool = False) -> float:
    """Process memory a cell will need at most, in GiB: the most of its phases."""
    return max(predicted_phases(cell, stock, hidden, vocabulary, by_blocks=by_blocks).values())


def predicted_phases(
    cell: Cell,
    stock: Inventory,
    hidden: int,
    vocabulary: int,
    *,
    by_blocks: bool = False,
    scored: int | None = None,
) -> dict[str, float]:
    """The same phase by phase (harness.engine.cell), each with the whole model in memory or, `by_blocks`, one block;
    `scored` tokens go through the model at once (None: as many as it takes).

    Measuring what errors cost, for a mixed plan, holds the states of some windows in front of every block (and of all
    of them at one), and the most of three: a Gram matrix for every layer of a block, one of them being factored; a
    window's activations, to go back through a block; copies of a slice of logits. Compressing holds every calibration
    token's hidden state and, inside one block, what passes hold that stand in it and a Hessian with what is made of it;
    twice the states for a method that also looks at the uncompressed model's. `by_blocks` states are in files, but for
    a method that tunes blocks. Training holds what is needed on the way back and logits a few times: of a window, or of
    a slice for two models. Scoring holds what is stored and one chunk of logits."""
    dtype_bytes = getattr(torch, cell.compute.dtype).itemsize
    calibration, layers = cell.calibration, stock.blocks[0].layers
    largest = max(sum(layer.weights for layer in block.layers) for block in stock.blocks)
    rest = stock.rest_weights * dtype_bytes
    model = rest + (largest if by_blocks else stock.weights) * dtype_bytes
    model += 2 * (stock.weights + stock.rest_weights) if cell.base else 0
    wide = max(layer.in_features for layer in stock.layers)
    inner = sum(layer.out_features for layer in layers)
    matrix = 4 * max(layer.weights for layer in stock.layers)
    # Whole, the checkpoint's 16 bits are in memory beside what is made of them.
    phases = {"load the reference": rest + 2 * matrix if by_blocks else model + 2 * stock.weights}
    if cell.allocate in MIXED:
        context = calibration.context if calibration else RANDOM_CONTEXT
        followed = FISHER_TOKENS if cell.method.needs.fisher else GRADIENT_TOKENS
        measured = hessian_tokens(stock) if calibration else HESSIAN_TOKENS
        # By blocks: those of the windows followed back, and their gradients, once for a checkpoint.
        states = max(measured, context) + len(stock.blocks) * max(followed, context) if not by_blocks else 0
        states = (states + 3 * max(followed, context)) * hidden * dtype_bytes
        inputs = {layer.role: layer.in_features for layer in layers}
        grams = FACTORING * 4 * wide * wide + sum(4 * size**2 for size in inputs.values()) if calibration else 0
        logits = 6 * 4 * HEAD_TOKENS * vocabulary
        phases["measure layers"] = model + states + max(grams, 2 * context * (hidden + inner) * dtype_bytes, logits)
        phases["estimate errors"] = (rest if by_blocks else model) + 4 * matrix
    tokens = cell.seen_tokens
    streams = 2 if cell.method.needs.original else 1
    held = 3 * tokens if cell.method.needs.outputs else 0 if by_blocks else streams * tokens  # tokens' states
    at_once = tokens
    if passes_take_turns(stock.blocks[0], tokens, hidden, dtype_bytes, streams):
        at_once = min(tokens, max(BATCH_TOKENS, calibration.context if calibration else 0))
    standing = passes_bytes(stock.blocks[0], at_once, hidden, dtype_bytes, streams)
    working = 3 * matrix
    if calibration:
        working = (PACKING + TURNING * _turns(cell.method, stock.layers[0])) * 4 * wide * wide
    phases["compress"] = model + held * hidden * dtype_bytes + standing + working
    if cell.training:
        width = cell.training.windows.context
        adaptation = cell.method.adaptation
        kept = kept_bytes(stock, width, dtype_bytes, adaptation is not None and adaptation.whole)
        if kept > KEPT_BYTES:  # then one block's, and the states in front of all
            kept = kept // len(stock.blocks) + width * len(stock.blocks) * hidden * dtype_bytes
        factors = sum(_rank(cell.method, layer) * (layer.in_features + layer.out_features) for layer in stock.layers)
        # Value, gradient and the optimiser's two moments.
        logits = 7 * min(width, slice_tokens(vocabulary)) if cell.training.loss == DISTIL else 5 * width
        phases["train"] = model + kept + 4 * logits * vocabulary + 4 * 4 * factors
    scored = scored or body_tokens(cell.compute.device.partition(":")[0], by_blocks=by_blocks)
    stored = float(cell.budget.bpw) / 8 if cell.budget else 2.0  # bytes per weight
    held = rest + stored * (largest if by_blocks else stock.weights)
    chunk = min(HEAD_LOGITS, scored * vocabulary)
    phases["score"] = held + scored * (4 * hidden + 3 * wide) * dtype_bytes + 4 * 4 * max(chunk, vocabulary)
    return {name: (bytes_held + PYTHON) / 2**30 for name, bytes_held in phases.items()}
