"""Fitting ReALLM's decoder to a table's vectors (arXiv 2405.13155, sec. 3): the numerics behind
`kernels.formats.mlp_table.MlpTable`.

    min over levels and D_phi of  sum_n w_n (v_n - D_phi(z_k(n)))^2,   k(n) the nearest entry

Vectors are assigned a batch at a time. For fixed codes the loss is that of K weighted means, so several Adam steps
follow each assignment at the price of the table, not of the batch. Weights pass through their stored form at every step
(straight-through rounding), as the paper trains its decoder.

It starts from a product quantiser: every dimension has digits of its own, their levels a 1-d k-means codebook written
as a sum over its digits, and the perceptron begins near zero. All entries then lie in order along the digits, so an
entry that no vector chooses is moved by what moves its neighbours; there is no other treatment of dead codes, and none
was found to be needed. Nothing of a layer's latent is predicted by an encoder: the nearest entry is the best code there
is."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.formats.mlp_table import MlpTable
from methods.codecs.kmeans import kmeans, nearest

STEPS_PER_BATCH = 20  # Adam steps on the means of one assignment
# Vectors per entry in the first and in the last batch: the later, the finer the gradient must be.
FIRST_BATCH, LAST_BATCH = (4, 12)
SMALLEST_BATCH = 16384
SAMPLE_1D, ITERATIONS_1D = 8192, 30  # of the scalar codebooks it starts from
RATE, WARM_UP, LAST_RATE = 2e-2, 0.02, 0.02  # Adam's rate, cosine to a fiftieth
BETAS = (0.9, 0.95)


def fit_mlp_table(vector_ND: Tensor, weight_ND: Tensor, table: MlpTable, *, seed: int, steps: int = 2000) -> MlpTable:
    """`table`, which is on the vectors' device, filled: it locally minimises sum weight (vector - nearest entry)^2."""
    assert vector_ND.shape == weight_ND.shape and vector_ND.shape[1] == table.dim and steps >= 1
    index_bits, layers, dim = table.index_bits, table.layers, table.dim
    generator = torch.Generator().manual_seed(seed)
    # Unit variance: rates and first weights then suit every table.
    scale = (weight_ND * vector_ND.square()).sum().div(weight_ND.sum()).sqrt().clamp_min(2.0**-20)
    start = _product_quantiser(table, vector_ND / scale, weight_ND, generator, seed)
    level_L, weight_M, bias_F = (tensor.requires_grad_() for tensor in start)
    optimiser = torch.optim.Adam([level_L, weight_M, bias_F], lr=RATE, betas=BETAS)
    index_KE = table.level_index()
    batches = _batches(len(vector_ND), 2**index_bits, -(-steps // STEPS_PER_BATCH), generator)
    for step in range(steps):
        if step % STEPS_PER_BATCH == 0:
            chosen = next(batches).to(vector_ND.device)
            with torch.no_grad():
                entry_KD = table.evaluate(index_KE, level_L, table.straight_through(weight_M), bias_F)
            mass_KD, mean_KD = _moments(vector_ND[chosen] / scale, weight_ND[chosen], entry_KD)
        optimiser.param_groups[0]["lr"] = RATE * _schedule(step / steps)
        optimiser.zero_grad()
        entry_KD = table.evaluate(index_KE, level_L, table.straight_through(weight_M), bias_F)
        (mass_KD * (entry_KD - mean_KD).square()).sum().backward()
        optimiser.step()
    with torch.no_grad():
        for matrix in table.matrices(weight_M)[-2 if layers else -1 :]:  # views: W and S take the vectors' own scale
            matrix *= scale
        bias_F[-dim:] *= scale
    table.fill(**table.store(level_L.detach(), weight_M.detach(), bias_F.detach()))
    return table


def _schedule(progress: float) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return min(1.0, progress / WARM_UP + 0.05) * (LAST_RATE + (1 - LAST_RATE) * cosine)


def _batches(vectors: int, entries: int, count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of growing batches, each pass over the vectors in a new order."""
    order_N, start = torch.randperm(vectors, generator=generator), 0
    for batch in range(count):
        per_entry = FIRST_BATCH + (LAST_BATCH - FIRST_BATCH) * batch / count
        size = min(vectors, max(SMALLEST_BATCH, int(entries * per_entry)))
        if start + size > vectors:
            order_N, start = torch.randperm(vectors, generator=generator), 0
        yield order_N[start : start + size]
        start += size


def _moments(vector_ND: Tensor, weight_ND: Tensor, entry_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Share of the weight that chose each entry, and the weighted mean of the vectors that did, both [K, D]."""
    code_N = nearest(weight_ND, weight_ND * vector_ND, entry_KD)
    mass_KD = torch.zeros_like(entry_KD).index_add_(0, code_N, weight_ND)
    moment_KD = torch.zeros_like(entry_KD).index_add_(0, code_N, weight_ND * vector_ND)
    mean_KD = moment_KD / mass_KD.clamp_min(torch.finfo(mass_KD.dtype).tiny)
    return mass_KD * (entry_KD.shape[1] / mass_KD.sum()), mean_KD


def _product_quantiser(
    table: MlpTable, unit_ND: Tensor, weight_ND: Tensor, generator: torch.Generator, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, weights and biases to start from: S a product quantiser, the perceptron small.

    Digit e belongs to axis e modulo d. With fewer digits than dimensions the axes are the principal ones, the others
    all zero."""
    dim, digits, device = table.dim, len(table.digit_bits), unit_ND.device
    axis_DD = torch.eye(dim, device=device)
    if digits < dim:
        axis_DD = torch.linalg.eigh((weight_ND * unit_ND).t() @ unit_ND).eigenvectors.flip(1)
    picked = torch.randperm(len(unit_ND), generator=generator)[:SAMPLE_1D].to(device)
    levels: dict[int, Tensor] = {}
    for axis in range(min(dim, digits)):
        mine = range(axis, digits, dim)
        grid = (unit_ND[picked] @ axis_DD[:, axis])[:, None], weight_ND[picked].mean(dim=1, keepdim=True)
        count = 2 ** sum(table.digit_bits[digit] for digit in mine)
        rest = kmeans(*grid, count, seed=seed, iterations=ITERATIONS_1D).flatten().sort().values
        rest = rest.view([2 ** table.digit_bits[digit] for digit in mine])
        for place, digit in enumerate(
            mine
        ):  # additive: each level is the mean of what it is part of, less what comes before
            digit_first = rest.movedim(place, 0)
            levels[digit] = digit_first.reshape(len(digit_first), -1).mean(dim=1)
            rest = rest - levels[digit].view([-1 if other == place else 1 for other in range(rest.ndim)])
    weights = [torch.randn(shape, generator=generator).mul_(shape[1] ** -0.5).to(device) for shape in table.shapes]
    for matrix, gain in zip(weights, _first_gains(table), strict=True):
        matrix *= gain
    for digit in range(digits):
        weights[-1][:, digit] = axis_DD[:, digit % dim]
    # Biases of the first layer spread the kinks of the perceptron over the levels.
    bias_F = torch.randn(len(table.biases), generator=generator).mul_(0.5).to(device)
    bias_F[-dim:] = 0
    level_L = torch.cat([levels[digit] for digit in range(digits)])
    return level_L, torch.cat([matrix.flatten() for matrix in weights]), bias_F


def _first_gains(table: MlpTable) -> list[float]:
    """Sizes of the random weights, over one by the root of the inputs: the output layer is next to nothing, the skip
    not random."""
    if len(table.shapes) == 1:
        return [1.0]
    return [1.5, *[0.5] * (len(table.shapes) - 3), 0.05, 1.0]
