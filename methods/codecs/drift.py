"""Weights that follow the drift of their inputs: a layer takes back what it can of the errors made before it.

With x the input behind the packed prefix, x' that of the uncompressed model, H = sum x x^T and D = sum (x' - x) x^T,
the layer's outputs are meant to be W x'. Whatever packs a layer under H alone aims at W x instead; given W + W D H^-1
to pack, the minimiser of sum |W x' - W' x|^2, it aims at W x'. That is the whole of it, for every method that packs
under a Hessian: Qronos (Zhang, Zhang, Colbert, Saab, arXiv 2505.11695) is GPTQ with this target and another value for
the first column (`first_column`), GPTAQ (Li et al., arXiv 2504.02692) goes part of the way.

From few calibration tokens the whole step fits their noise too, and may be worse than none: hence a share of it, and a
strong damping, which is a pull towards W: sum |W x' - W' x|^2 + damp |W' - W|^2."""

from __future__ import annotations

import torch
from torch import Tensor

FOLLOW_DAMP = 0.1  # share of mean diag(H)


def check_follow(share: float) -> None:
    """Raises ValueError."""
    if not 0 <= share <= 1:
        raise ValueError("follow must be 0 to 1")


def followed(
    weight_OI: Tensor, hessian_II: Tensor, drift_II: Tensor, share: float, damp: float = FOLLOW_DAMP
) -> Tensor:
    """The weight to quantise when inputs have drifted: W' = W + share * W D (H + damp * mean diag(H) I)^-1."""
    damped_II = hessian_II.clone()
    diagonal_I = damped_II.diagonal()
    diagonal_I[diagonal_I == 0] = diagonal_I.mean().clamp_min(1e-12)  # a column without input has no drift either
    diagonal_I += damp * diagonal_I.mean()
    return weight_OI + share * torch.linalg.solve(damped_II, (weight_OI @ drift_II).t()).t()


def first_column(
    weight_OI: Tensor, hessian_II: Tensor, drift_II: Tensor, share: float, damp: float, column: int
) -> Tensor:
    """What Qronos rounds its first column at [O]: the best value while all other columns are still what they were.

    Qronos alternates two steps (its sec. 3): a column is rounded at its best value given all others, and all columns
    not yet rounded are then set to their best. From the second column on the first of these finds the column already at
    its best, so all that is left of it is the first column's value, w + (W D)_1 / H_11; and the second step is error
    feedback towards `followed` (share 1), since both minimise the same quadratic."""
    diagonal_I = hessian_II.diagonal()
    size = diagonal_I[diagonal_I != 0].mean() if bool(diagonal_I.any()) else diagonal_I.new_ones(())
    pull_O = weight_OI @ drift_II[:, column]
    return weight_OI[:, column] + share * pull_O / (diagonal_I[column] + damp * size)
