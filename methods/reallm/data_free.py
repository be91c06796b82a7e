"""ReALLM without data: alternate a truncated SVD and vector quantisation of the rest (the paper's LQ loop, after
LQ-LoRA).

    Q = 0;  repeat:  L1, L2 = SVD_r(W - Q);  Q = VQ(W - L1 L2)

The released code stops when the error rises and keeps the iterate before; here the best iterate is kept and the loop
also stops at a relative gain below `tolerance`. Factors are rounded to their stored precision before the rest is
quantised. Where columns are reordered, their order is found once, from the first rest. DoRA's magnitude is one scale
per row: without training, the one of least error. Where Q is a convolutional decoder's, there is one round."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.formats.bitpack import pack
from kernels.formats.codebook import CodebookLinear
from kernels.formats.conv import ConvLinear
from kernels.formats.packed import PackedLinear
from methods.codecs.column_order import greedy_order
from methods.codecs.conv_training import fit_conv
from methods.codecs.kmeans import nearest
from methods.codecs.svd import stored_lowrank, svd_factors
from methods.codecs.vector import absmax_scales, fit_codebook, to_vectors

CONV_STEPS, CONV_SWEEPS = 200, 3  # of training a convolutional decoder


def compress_data_free(
    weight_OI: Tensor, packed: PackedLinear, *, rounds: int, tolerance: float, seed: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Buffers of `packed` (a laid out CodebookLinear), and {rounds, relative_error}."""
    assert isinstance(packed, CodebookLinear)
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
                *map(turn, (unit_OI, square_OI)), packed.dim, 2**packed.index_bits, seed, codebook_KD
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
            best = tensors | codebook_tensors(packed, code_JI, codebook_KD, scales.stored)
            best |= {f"order.{name}": tensor for name, tensor in order.items()}
        if not gain > tolerance * previous and done > 1:
            break
    return best, {"rounds": done, "relative_error": best_error}


def compress_conv(weight_OI: Tensor, packed: ConvLinear, *, seed: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Buffers of `packed`: the low-rank part once, a convolutional decoder trained on the rest; and {relative_error},
    of the weight."""
    tensors, lowrank_OI = lowrank_part(weight_OI, packed, None, seed)
    rest_OI = weight_OI - lowrank_OI
    drawn, report = fit_conv(rest_OI, packed, steps=CONV_STEPS, sweeps=CONV_SWEEPS, seed=seed)
    return tensors | drawn, {
        "relative_error": report["relative_error"] * float(rest_OI.norm()) / (float(weight_OI.norm()) or 1.0)
    }


def _row_scales(weight_OI: Tensor, decoded_OI: Tensor) -> Tensor:
    """fp16 [O]: the factor of every decoded row that leaves the least squared error."""
    square_O = decoded_OI.square().sum(dim=1)
    return torch.where(square_O > 0, (weight_OI * decoded_OI).sum(dim=1) / square_O, 1.0).half()


def lowrank_part(
    matrix_OI: Tensor, packed: CodebookLinear | ConvLinear, whitener_II: Tensor | None, seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Stored buffers of the low-rank branch fitted to `matrix_OI`, and what they decode to (zeros at rank 0)."""
    if packed.lowrank is None:
        return {}, torch.zeros_like(matrix_OI)
    return stored_lowrank(*svd_factors(matrix_OI, packed.rank, whitener_II, seed), packed)


def codebook_tensors(
    packed: CodebookLinear, code_JI: Tensor, codebook_KD: Tensor, scales: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Stored buffers of the quantised part."""
    own = {} if packed.table_key else {"codebook": codebook_KD.half()}
    return {
        "codes": pack(code_JI, packed.index_bits),
        **own,
        **{f"scales.{name}": tensor for name, tensor in scales.items()},
    }
