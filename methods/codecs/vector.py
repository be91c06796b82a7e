"""Vector codebooks under block scales: the numerics behind `CodebookLinear`.

A matrix [O, I] divided by its block scales is a set of vectors of d consecutive rows of one column, `vector_JID` with
J = ceil(O / d). Rows are padded with zeros up to a multiple of d, and padded entries weigh nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kernels.formats.scales import BlockScales, ScaleForm, per_column, quantise_scales
from methods.codecs.kmeans import kmeans, nearest

SAMPLE = 16384  # vectors a codebook is fitted on, at least; and SAMPLE_PER_ENTRY for each of its entries
SAMPLE_PER_ENTRY = 128
# Of Lloyd's algorithm, from k-means++ and from the codebook of a similar matrix.
COLD_ITERATIONS, WARM_ITERATIONS = (15, 4)
# Of a table that many matrices share: vectors per entry, of all of them; with 64 it is 5 % worse on others.
TABLE_SAMPLE = 128
MEASURED = 512  # entries of the longest codebook that an estimate is measured for
TINY = 2.0**-20  # an all-zero block still needs a scale to divide by


@dataclass(frozen=True)
class Scales:
    """Block scales as they are stored and what they decode to, one value per weight."""

    stored: dict[str, Tensor]
    scale_OI: Tensor


def block_absmax(weight_OI: Tensor, block: int) -> Tensor:
    """Largest magnitude per block of consecutive columns of a row, [O, G]; the last block may be ragged."""
    rows, columns = weight_OI.shape
    return (
        torch.nn.functional.pad(weight_OI, (0, -columns % block))
        .view(rows, -1, block)
        .abs()
        .amax(dim=2)
        .clamp_min(TINY)
    )


def absmax_scales(weight_OI: Tensor, block: int, form: ScaleForm) -> Scales:
    """Absmax block scales, rounded to their stored form."""
    absmax_OG = block_absmax(weight_OI, block)
    stored = quantise_scales(absmax_OG, form)
    rows, blocks = absmax_OG.shape
    decoder = BlockScales(rows, blocks, form).to(weight_OI.device)
    for name, tensor in stored.items():
        setattr(decoder, name, tensor)
    return Scales(stored, per_column(decoder.decode(), block, weight_OI.shape[1]))


def to_vectors(matrix_OI: Tensor, dim: int) -> Tensor:
    """[O, I] -> [J, I, D], rows padded with zeros."""
    rows, columns = matrix_OI.shape
    padded = torch.nn.functional.pad(matrix_OI, (0, 0, 0, -rows % dim))
    return padded.view(-1, dim, columns).transpose(1, 2)


def from_vectors(vector_JID: Tensor, rows: int) -> Tensor:
    """[J, I, D] -> [O, I], padding cut off."""
    vectors, columns, dim = vector_JID.shape
    return vector_JID.transpose(1, 2).reshape(vectors * dim, columns)[:rows]


def fit_codebook(
    unit_OI: Tensor, importance_OI: Tensor, dim: int, count: int, seed: int, start_KD: Tensor | None = None
) -> Tensor:
    """Weighted k-means over a sample of the vectors of a scaled matrix; fp32 values of fp16 numbers [K, D]."""
    vector_ND = to_vectors(unit_OI, dim).reshape(-1, dim)
    weight_ND = to_vectors(importance_OI, dim).reshape(-1, dim)
    generator = torch.Generator().manual_seed(seed)
    sample = max(SAMPLE, SAMPLE_PER_ENTRY * count)
    if len(vector_ND) > sample:
        chosen = torch.randint(len(vector_ND), (sample,), generator=generator).to(unit_OI.device)
        vector_ND, weight_ND = vector_ND[chosen], weight_ND[chosen]
    iterations = COLD_ITERATIONS if start_KD is None else WARM_ITERATIONS
    return kmeans(vector_ND, weight_ND, count, seed=seed, iterations=iterations, start_KD=start_KD).half().float()


def table_sample(
    matrices: Iterable[tuple[Tensor, int]], count: int, dim: int, entries: int, seed: int, along: str = "rows"
) -> tuple[Tensor, Tensor]:
    """Vectors under block scales and their weights, both [N, D], TABLE_SAMPLE for each of `entries`: an equal share of
    each of the `count` matrices, given with their block sizes. `along`: see kernels.formats.codebook."""
    generator = torch.Generator().manual_seed(seed)
    each = -(-TABLE_SAMPLE * entries // count)
    vectors, weights = [], []
    for weight_OI, block in matrices:
        absmax_OG = block_absmax(weight_OI, block)
        scale_OI = per_column(absmax_OG, block, weight_OI.shape[1])
        # What an error costs goes with the square of the scale, within a matrix; between matrices all count alike.
        pair = (weight_OI / scale_OI, (scale_OI / absmax_OG.square().mean().sqrt()).square())
        vector_ND, weight_ND = (to_vectors(m if along == "rows" else m.t(), dim).reshape(-1, dim) for m in pair)
        chosen_N = torch.randint(len(vector_ND), (each,), generator=generator).to(weight_OI.device)
        vectors.append(vector_ND[chosen_N])
        weights.append(weight_ND[chosen_N])
    mixed_N = torch.randperm(each * count, generator=generator).to(vectors[0].device)
    return torch.cat(vectors)[mixed_N], torch.cat(weights)[mixed_N]


def fit_table(vector_ND: Tensor, weight_ND: Tensor, entries: int, seed: int, start_KD: Tensor | None = None) -> Tensor:
    """A codebook [entries, D] of a `table_sample` by k-means; fp32 values of fp16 numbers. `start_KD` is that of other
    matrices: under their scales all are much alike."""
    if start_KD is None:  # most of the way on an eighth of the sample
        eighth = len(vector_ND) // 8
        start_KD = kmeans(vector_ND[:eighth], weight_ND[:eighth], entries, seed=seed, iterations=COLD_ITERATIONS)
    return (
        kmeans(vector_ND, weight_ND, entries, seed=seed, iterations=WARM_ITERATIONS, start_KD=start_KD).half().float()
    )


@cache
def gaussian_error(dim: int, count: int, block: int) -> float:
    """Mean squared error per weight of a k-means codebook on normal weights divided by their blocks' absmax.

    Blocks of real matrices are near enough to normal for an estimate: what differs between matrices is the scale. Long
    codebooks are taken to follow Zador's law (IEEE Trans. Inf. Theory 28, 1982), error ~ K^(-2/d), instead of being
    fitted."""
    if count > MEASURED:
        return gaussian_error(dim, MEASURED, block) * (MEASURED / count) ** (2 / dim)
    generator = torch.Generator().manual_seed(0)
    sample = max(SAMPLE, SAMPLE_PER_ENTRY * count) * dim
    weight_OI = torch.randn(dim * -(-sample // (4 * dim * block)), 4 * block, generator=generator)
    unit_OI = weight_OI / per_column(block_absmax(weight_OI, block), block, weight_OI.shape[1])
    codebook_KD = fit_codebook(unit_OI, torch.ones_like(unit_OI), dim, count, 0)
    vector_ND = to_vectors(unit_OI, dim).reshape(-1, dim)
    code_N = nearest(torch.ones_like(vector_ND), vector_ND, codebook_KD)
    return float((vector_ND - codebook_KD[code_N]).square().mean())


def refit_codebook(
    target_OI: Tensor, scale_OI: Tensor, code_JI: Tensor, codebook_KD: Tensor, hessian_II: Tensor, iterations: int
) -> Tensor:
    """The codebook that minimises tr(E H E^T), E = target - scale * codebook[code], for fixed codes.

    A linear least-squares problem in K * D unknowns. Its normal matrix couples all columns of a row, so it is never
    formed: conjugate gradients, each step one product with H, preconditioned by the part of the diagonal that diag(H)
    gives (sum of scale^2 H_ii over the uses of an entry). Unused entries stay as they are."""
    rows = target_OI.shape[0]
    count, dim = codebook_KD.shape
    flat_N = code_JI.reshape(-1)

    def decode(entries_KD: Tensor) -> Tensor:
        return from_vectors(torch.nn.functional.embedding(code_JI, entries_KD), rows) * scale_OI

    def collect(gradient_OI: Tensor) -> Tensor:
        per_vector_ND = to_vectors(gradient_OI * scale_OI, dim).reshape(-1, dim)
        return torch.zeros_like(codebook_KD).index_add_(0, flat_N, per_vector_ND)

    diagonal_KD = collect(scale_OI * hessian_II.diagonal())
    used_KD = diagonal_KD > 0
    inverse_KD = torch.where(used_KD, 1 / diagonal_KD.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
    solution_KD = codebook_KD.clone()
    residual_KD = collect((target_OI - decode(solution_KD)) @ hessian_II)
    step_KD = inverse_KD * residual_KD
    rho = torch.sum(residual_KD * step_KD)
    for _ in range(iterations):
        if not rho > 0:
            break
        curved_KD = collect(decode(step_KD) @ hessian_II)
        alpha = rho / torch.sum(step_KD * curved_KD)
        solution_KD += alpha * step_KD
        residual_KD -= alpha * curved_KD
        preconditioned_KD = inverse_KD * residual_KD
        previous, rho = rho, torch.sum(residual_KD * preconditioned_KD)
        step_KD = preconditioned_KD + (rho / previous) * step_KD
    return solution_KD.half().float()
