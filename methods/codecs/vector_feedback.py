"""A vector codebook fitted and assigned under a layer's Hessian: every choice against tr(E H E^T).

    1  scales            absmax per block of columns, double-quantised
    2  codebook          k-means weighted by scale^2 / [H^-1]_ii: an error's cost once later columns have reacted to it
    3  codes             column by column with GPTQ's error feedback, whole vectors at a time
    4  codebook again    least squares on the true objective for the codes found

Steps 2 to 4 are GPTVQ's (van Baalen et al., arXiv 2402.15319, algorithm 1), which quantises d columns at a time where
this takes d rows of one column: the rows of a column are independent under H, so no vector has to look ahead."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.formats.codebook import CodebookLinear
from methods.codecs.error_feedback import Feedback, run
from methods.codecs.kmeans import NearestEntry
from methods.codecs.vector import absmax_scales, fit_codebook, refit_codebook


def damped_hessian(hessian_II: Tensor, feedback: Feedback) -> Tensor:
    """The Hessian with the damping that error feedback was prepared with, [I, I]."""
    damped_II = hessian_II.clone()
    damped_II.diagonal().copy_(feedback.diagonal_I)
    return damped_II


def quantise_vectors(
    target_OI: Tensor, packed: CodebookLinear, feedback: Feedback, damped_II: Tensor, *, refit: int, seed: int
) -> dict[str, Tensor]:
    """Buffers of `packed`, but for its low-rank part, that stand for `target_OI`.

    A codebook of the layer's own is fitted, and fitted again in `refit` steps of conjugate gradients; a shared table is
    taken as it is.
    """
    scales = absmax_scales(target_OI, packed.block, packed.scales.form)
    if packed.table_key:
        codebook_KD = packed.entries()
    else:
        pivot_I = torch.empty_like(feedback.diagonal_I).index_copy_(0, feedback.order_I, feedback.upper_II.diagonal())
        # U_ii^2 = [H^-1]_ii given the columns quantised before i.
        importance_OI = scales.scale_OI.square() / pivot_I.square()
        codebook_KD = fit_codebook(target_OI / scales.scale_OI, importance_OI, packed.dim, 2**packed.index_bits, seed)
    code_JI = assign(target_OI, scales.scale_OI, codebook_KD, feedback)
    if refit and not packed.table_key:
        codebook_KD = refit_codebook(target_OI, scales.scale_OI, code_JI, codebook_KD, damped_II, refit)
    return packed.tensors(code_JI, scales.stored, codebook_KD)


def assign(target_OI: Tensor, scale_OI: Tensor, codebook_KD: Tensor, feedback: Feedback) -> Tensor:
    """Codes [J, I] by error feedback: in each column the nearest entries, errors passed on to later columns."""
    rows, columns = target_OI.shape
    dim = codebook_KD.shape[1]
    pad = -rows % dim
    # Transposed and padded, so that a column of the weight is a contiguous run of whole vectors; padding has scale 0.
    scale_IO = torch.nn.functional.pad(scale_OI.t(), (0, pad)).contiguous()
    square_IO = scale_IO.square()
    nearest = NearestEntry(codebook_KD)
    code_IJ = torch.empty(columns, (rows + pad) // dim, dtype=torch.int64, device=target_OI.device)

    def quantise(position: int, column: int, values_O: Tensor) -> Tensor:
        padded_O = torch.nn.functional.pad(values_O, (0, pad)) if pad else values_O
        code_J = nearest(square_IO[column].view(-1, dim), (scale_IO[column] * padded_O).view(-1, dim))
        code_IJ[column] = code_J
        return (codebook_KD[code_J].view(-1) * scale_IO[column])[:rows]

    run(target_OI, feedback, quantise)
    return code_IJ.t().contiguous()
