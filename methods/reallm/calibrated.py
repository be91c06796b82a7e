"""ReALLM with a Hessian: the stored form of the paper, every choice made against the layer objective tr(E H E^T).

    1  low-rank part     the best rank-R part of W as the inputs see it: SVD of W C, H = C C^T
    2  scales            absmax per block of the rest, double-quantised
    3  codebook          k-means weighted by scale^2 / [H^-1]_ii: what an error costs once later columns have reacted to it
    4  codes             column by column in act-order with GPTQ's error feedback
    5  codebook again    least squares on the true objective for the codes found

None of this is in the ReALLM paper, whose quantisation is data-free; steps 3 to 5 are close kin to GPTVQ (van Baalen et al.,
arXiv 2402.15319), which quantises d columns at a time where this takes d rows of one column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.codebook import CodebookLinear
from kernels.packed import PackedLinear
from methods.codecs.error_feedback import Feedback, prepare, run
from methods.codecs.kmeans import nearest
from methods.codecs.vector import absmax_scales, fit_codebook, refit_codebook
from methods.reallm.data_free import codebook_tensors, lowrank_part


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
    scales = absmax_scales(rest_OI, packed.block, packed.scales.kind)
    pivot_I = torch.empty_like(feedback.diagonal_I).index_copy_(0, feedback.order_I, feedback.upper_II.diagonal())
    importance_OI = scales.scale_OI.square() / pivot_I.square()  # U_ii^2 = [H^-1]_ii given the columns quantised before i
    codebook_KD = fit_codebook(rest_OI / scales.scale_OI, importance_OI, packed.dim, 2**packed.index_bits, seed)
    code_VI = assign(rest_OI, scales.scale_OI, codebook_KD, feedback)
    if refit:
        codebook_KD = refit_codebook(rest_OI, scales.scale_OI, code_VI, codebook_KD, damped_II, refit)
    report = {"dead_columns": feedback.dead, "damp": feedback.damp}
    return adapters | codebook_tensors(packed, code_VI, codebook_KD, scales.stored), report


def assign(target_OI: Tensor, scale_OI: Tensor, codebook_KD: Tensor, feedback: Feedback) -> Tensor:
    """Codes [V, I] by error feedback: in each column the nearest entries, errors passed on to later columns."""
    rows, columns = target_OI.shape
    dim = codebook_KD.shape[1]
    pad = -rows % dim
    # Transposed and padded, so that a column of the weight is a contiguous run of whole vectors; padding has scale 0.
    scale_IP = torch.nn.functional.pad(scale_OI.t(), (0, pad)).contiguous()
    square_IP = scale_IP.square()
    code_IV = torch.empty(columns, (rows + pad) // dim, dtype=torch.int64, device=target_OI.device)

    def quantise(position: int, column: int, values_O: Tensor) -> Tensor:
        scale_P = scale_IP[column]
        values_P = torch.nn.functional.pad(values_O, (0, pad)) if pad else values_O
        code_V = nearest(square_IP[column].view(-1, dim), (scale_P * values_P).view(-1, dim), codebook_KD)
        code_IV[column] = code_V
        return (codebook_KD[code_V].view(-1) * scale_P)[:rows]

    run(target_OI, feedback, quantise)
    return code_IV.t().contiguous()
