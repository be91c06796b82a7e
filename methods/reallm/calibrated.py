"""ReALLM with a Hessian: the stored form of the paper, every choice made against the layer objective tr(E H E^T).

    0  target            the weight moved against the drift of its inputs, half way                    `followed`
    1  low-rank part     the best rank-R part of W as the inputs see it: SVD of W C, H = C C^T
    2  scales            absmax per block of the rest, double-quantised
    3  codebook          k-means weighted by scale^2 / [H^-1]_ii: what an error costs once later columns have reacted to it
    4  codes             column by column in act-order with GPTQ's error feedback
    5  codebook again    least squares on the true objective for the codes found

None of this is in the ReALLM paper, whose quantisation is data-free; steps 3 to 5 are close kin to GPTVQ (van Baalen et
al., arXiv 2402.15319), which quantises d columns at a time where this takes d rows of one column."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.formats.codebook import CodebookLinear
from kernels.formats.packed import PackedLinear
from methods.codecs.error_feedback import Feedback, prepare, run
from methods.codecs.kmeans import NearestEntry
from methods.codecs.vector import absmax_scales, fit_codebook, refit_codebook
from methods.reallm.data_free import codebook_tensors, lowrank_part

FOLLOW_DAMP = 0.1  # share of mean diag(H)


def compress_calibrated(
    weight_OI: Tensor, hessian_II: Tensor, packed: PackedLinear, *, act_order: bool, damp: float, refit: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Buffers of `packed` (a laid out CodebookLinear), and {dead_columns, damp}."""
    assert isinstance(packed, CodebookLinear)
    feedback = prepare(hessian_II, act_order=act_order, damp=damp)
    damped_II = hessian_II.clone()
    damped_II.diagonal().copy_(feedback.diagonal_I)
    whitener_II = torch.linalg.cholesky(damped_II) if packed.rank else None
    adapters, lowrank_OI = lowrank_part(weight_OI, packed, whitener_II, seed)
    rest_OI = weight_OI - lowrank_OI
    scales = absmax_scales(rest_OI, packed.block, packed.scales.form)
    pivot_I = torch.empty_like(feedback.diagonal_I).index_copy_(0, feedback.order_I, feedback.upper_II.diagonal())
    importance_OI = (
        scales.scale_OI.square() / pivot_I.square()
    )  # U_ii^2 = [H^-1]_ii given the columns quantised before i
    if packed.table_key:
        codebook_KD = packed.entries()
    else:
        codebook_KD = fit_codebook(rest_OI / scales.scale_OI, importance_OI, packed.dim, 2**packed.index_bits, seed)
    code_JI = assign(rest_OI, scales.scale_OI, codebook_KD, feedback)
    if refit and not packed.table_key:
        codebook_KD = refit_codebook(rest_OI, scales.scale_OI, code_JI, codebook_KD, damped_II, refit)
    report = {"dead_columns": feedback.dead, "damp": feedback.damp}
    return adapters | codebook_tensors(packed, code_JI, codebook_KD, scales.stored), report


def followed(weight_OI: Tensor, hessian_II: Tensor, drift_II: Tensor, share: float) -> Tensor:
    """The weight to quantise when inputs have drifted: W' = W + share * W D (H + damp I)^-1.

    With x behind the packed prefix and x' of the uncompressed model, W + W D H^-1 minimises |W x' - W' x|^2 (D the sum
    of (x' - x) x^T): the layer takes back what it can of the errors made before it (as GPTAQ does, Li et al., arXiv
    2504.02692). From few calibration tokens the whole step fits their noise too, and is worse than none: hence a share
    of it, and a strong damping."""
    damped_II = hessian_II.clone()
    diagonal_I = damped_II.diagonal()
    diagonal_I[diagonal_I == 0] = diagonal_I.mean().clamp_min(1e-12)  # a column without input has no drift either
    diagonal_I += FOLLOW_DAMP * diagonal_I.mean()
    return weight_OI + share * torch.linalg.solve(damped_II, (weight_OI @ drift_II).t()).t()


def assign(target_OI: Tensor, scale_OI: Tensor, codebook_KD: Tensor, feedback: Feedback) -> Tensor:
    """Codes [V, I] by error feedback: in each column the nearest entries, errors passed on to later columns."""
    rows, columns = target_OI.shape
    dim = codebook_KD.shape[1]
    pad = -rows % dim
    # Transposed and padded, so that a column of the weight is a contiguous run of whole vectors; padding has scale 0.
    scale_IO = torch.nn.functional.pad(scale_OI.t(), (0, pad)).contiguous()
    square_IO = scale_IO.square()
    nearest = NearestEntry(codebook_KD)
    code_IJ = torch.empty(columns, (rows + pad) // dim, dtype=torch.int64, device=target_OI.device)

    def quantise(position: int, column: int, values_O: Tensor) -> Tensor:
        padded_scale_O = scale_IO[column]
        padded_O = torch.nn.functional.pad(values_O, (0, pad)) if pad else values_O
        code_J = nearest(square_IO[column].view(-1, dim), (padded_scale_O * padded_O).view(-1, dim))
        code_IJ[column] = code_J
        return (codebook_KD[code_J].view(-1) * padded_scale_O)[:rows]

    run(target_OI, feedback, quantise)
    return code_IJ.t().contiguous()
