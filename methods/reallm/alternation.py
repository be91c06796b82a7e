"""The paper's loop without data: alternate a truncated SVD and vector quantisation of the rest (after LQ-LoRA).

    Q = 0;  repeat:  L1, L2 = SVD_r(W - Q);  Q = VQ(W - L1 L2)

The released code stops when the error rises and keeps the iterate before; here the best iterate is kept and the loop
also stops at a relative gain below `tolerance`. Factors are rounded to their stored precision before the rest is
quantised. Where columns are reordered, their order is found once, from the first rest. DoRA's magnitude is one scale
per row: without training, the one of least error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.formats.codebook import CodebookLinear
from methods.codecs.column_order import greedy_order
from methods.codecs.kmeans import nearest
from methods.codecs.svd import lowrank_part
from methods.codecs.vector import absmax_scales, fit_codebook, to_vectors


def alternate(
    weight_OI: Tensor, packed: CodebookLinear, *, rounds: int, tolerance: float, seed: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Buffers of `packed` (a laid out CodebookLinear), and {rounds, relative_error}."""
    norm = float(weight_OI.norm()) or 1.0
    quantised_OI = torch.zeros_like(weight_OI)
    best: dict[str, Tensor] = {}
    best_error, done = float("inf"), 0
    codebook_KD: Tensor | None = None
    order: dict[str, Tensor] = {}

    def turn(matrix: Tensor) -> Tensor:  # vectors along columns are vectors along the rows of the transposed matrix
        return matrix.t() if packed.along == "columns" else matrix

    for done in range(1, (rounds if packed.rank else 1) + 1):
        tensors, lowrank_OI = lowrank_part(weight_OI - quantised_OI, packed, None, seed)
        rest_OI = weight_OI - lowrank_OI
        if packed.order is not None:
            if not order:
                order = packed.order.store(greedy_order(rest_OI, packed.order.band))
                packed.order.packed = order["packed"]
            rest_OI = rest_OI.gather(1, packed.order.per_row())
        scales = absmax_scales(rest_OI, packed.block, packed.scales.form)
        square_OI = scales.scale_OI.square()  # an error of a scaled entry costs scale^2
        if packed.table_key:
            codebook_KD = packed.entries()
        else:
            unit_OI = rest_OI / scales.scale_OI
            codebook_KD = fit_codebook(
                turn(unit_OI), turn(square_OI), packed.dim, 2**packed.index_bits, seed, codebook_KD
            )
        square_JID, cross_JID = (
            to_vectors(turn(matrix_OI), packed.dim) for matrix_OI in (square_OI, scales.scale_OI * rest_OI)
        )
        code_N = nearest(square_JID.reshape(-1, packed.dim), cross_JID.reshape(-1, packed.dim), codebook_KD)
        code_JI = turn(code_N.view(square_JID.shape[:2]))
        quantised_OI = packed.unit(code_JI, codebook_KD) * scales.scale_OI
        if packed.order is not None:
            quantised_OI = packed.order.restore(quantised_OI)
        decoded_OI = quantised_OI + lowrank_OI
        if packed.row_scale is not None:
            tensors["row_scale"] = _row_scales(weight_OI, decoded_OI)
            decoded_OI = decoded_OI * tensors["row_scale"].float()[:, None]
        error = float((weight_OI - decoded_OI).norm()) / norm
        gain, previous = best_error - error, best_error
        if error < best_error:
            best_error = error
            best = tensors | packed.tensors(code_JI, scales.stored, codebook_KD)
            best |= {f"order.{name}": tensor for name, tensor in order.items()}
        if not gain > tolerance * previous and done > 1:
            break
    return best, {"rounds": done, "relative_error": best_error}


def _row_scales(weight_OI: Tensor, decoded_OI: Tensor) -> Tensor:
    """fp16 [O]: the factor of every decoded row that leaves the least squared error."""
    square_O = decoded_OI.square().sum(dim=1)
    return torch.where(square_O > 0, (weight_OI * decoded_OI).sum(dim=1) / square_O, 1.0).half()
