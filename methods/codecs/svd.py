"""Low-rank factors: the best rank-R part of a matrix, plainly or as the layer's inputs see it."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.formats.lowrank import LowRank, quantise_lowrank
from kernels.formats.packed import PackedLinear


def svd_factors(
    matrix_OI: Tensor, rank: int, whitener_II: Tensor | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(left [O, R], right [R, I]) minimising ||(matrix - left @ right) C||_F, singular values split evenly.

    Without `whitener_II` (C = identity) this is the truncated SVD of the matrix. With C the lower Cholesky factor of
    H = C C^T it minimises the layer's output error tr(E H E^T): the SVD of matrix @ C, mapped back through C^-1.
    Randomised (Halko et al., arXiv 0909.4061) with oversampling and power iterations; the seed decides its test matrix.
    """
    seen_OI = matrix_OI if whitener_II is None else matrix_OI @ whitener_II
    with torch.random.fork_rng(devices=[matrix_OI.device] if matrix_OI.is_cuda else []):
        torch.manual_seed(seed)
        u_OR, s_R, v_IR = torch.svd_lowrank(seen_OI, q=min(rank + 10, *matrix_OI.shape), niter=4)
    root_R = s_R[:rank].sqrt()
    left_OR, right_RI = u_OR[:, :rank] * root_R, (v_IR[:, :rank] * root_R).t()
    if whitener_II is not None:  # right @ C^-1
        right_RI = torch.linalg.solve_triangular(whitener_II, right_RI, upper=False, left=False)
    return left_OR.contiguous(), right_RI.contiguous()


def stored_lowrank(left_OR: Tensor, right_RI: Tensor, packed: PackedLinear) -> tuple[dict[str, Tensor], Tensor]:
    """The factors as the low-rank part of `packed` stores them, and what they then decode to [O, I]."""
    assert packed.lowrank is not None
    stored = quantise_lowrank(left_OR, right_RI, packed.lowrank.bits)
    decoder = LowRank(packed.in_features, packed.out_features, packed.rank, packed.lowrank.bits)
    for name, tensor in stored.items():
        setattr(decoder, name, tensor)
    return {f"lowrank.{name}": tensor for name, tensor in stored.items()}, decoder.decode()


def lowrank_part(
    matrix_OI: Tensor, packed: PackedLinear, whitener_II: Tensor | None, seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Stored buffers of the low-rank branch fitted to `matrix_OI`, and what they decode to (zeros at rank 0)."""
    if packed.lowrank is None:
        return {}, torch.zeros_like(matrix_OI)
    return stored_lowrank(*svd_factors(matrix_OI, packed.rank, whitener_II, seed), packed)
