"""Sequential singular value decompositions: a matrix as the cores of a matrix product operator."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.formats.mpo import MpoLinear, to_sites
from methods.codecs.factors import falling_eigenvectors


def decompose(weight_OI: Tensor, packed: MpoLinear) -> list[Tensor]:
    """Cores A_1 ... A_n of the layout `packed`, fp32, each [X_(k-1), o_k, i_k, X_k] (Oseledets 2011, algorithm 1).

    Site by site from the left: what is left of the tensor, as a matrix of (bond in front, site) by (later sites), is
    cut to its first X_k singular vectors, which are the core; singular values times right vectors go on. All but the
    last core are orthonormal, so that rounding errors are not enlarged by what stands beside them. One cut is the
    truncated SVD of the reordered matrix; with several, squared errors are at most the sum of those of the cuts."""
    rest = to_sites(weight_OI, packed.rows, packed.columns).double().reshape(1, -1)
    cores = []
    for k, (row, column) in enumerate(zip(packed.rows[:-1], packed.columns[:-1], strict=True)):
        left, right = packed.bonds[k], packed.bonds[k + 1]
        core, rest = _cut(rest.reshape(left * row * column, -1), right)
        cores.append(core.reshape(left, row, column, right))
    cores.append(rest.reshape(packed.bonds[-2], packed.rows[-1], packed.columns[-1], 1))
    return [core.float() for core in cores]


def _cut(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(U, S V^T) of the first `rank` singular vectors, by the eigenproblem of the shorter side in fp64. A projection of
    the matrix either way: singular values too small for that problem to see cost nothing."""
    if len(matrix) <= matrix.shape[1]:
        u = falling_eigenvectors(matrix @ matrix.t())[:, :rank]
        return u, u.t() @ matrix
    v = falling_eigenvectors(matrix.t() @ matrix)[:, :rank]
    scaled = matrix @ v
    size = scaled.norm(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    return scaled / size, size[:, None] * v.t()
