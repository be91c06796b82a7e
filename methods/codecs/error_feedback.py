"""Column-by-column quantisation with error feedback (GPTQ, arXiv 2210.17323, algorithm 1; OBQ, arXiv 2208.11580).

The layer objective is tr((W - Q) H (W - Q)^T) with H = X X^T. Quantising column i leaves an error that the columns not
yet quantised can partly cancel; with U the upper Cholesky factor of H^-1, the optimal update of column j > i is -(w_i -
q_i) / U_ii * U_ij. What "quantise" means is the caller's: a uniform grid (gptq) or a vector codebook (reallm)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DAMP_LADDER = 6  # attempts, each with ten times the damping of the one before


@dataclass(frozen=True)
class Feedback:
    """Cholesky factor of the damped inverse Hessian, in processing order."""

    order_I: Tensor  # processing order -> column
    upper_II: Tensor  # U in processing order
    diagonal_I: Tensor  # damped diag(H), per column
    dead: int  # columns no calibration token ever reached
    damp: float  # damping that made H positive definite, as a fraction of mean diag(H)

    @property
    def pivot_I(self) -> Tensor:
        """1 / [H^-1]_ii given the columns quantised before i, per column: what an error there costs once later columns
        have reacted to it."""
        pivot_I = self.upper_II.diagonal().square().reciprocal()
        return torch.empty_like(pivot_I).index_copy_(0, self.order_I, pivot_I)


class NotFinite(ValueError):
    """Activations or statistics overflowed."""


class Indefinite(ValueError):
    """A Hessian that no damping makes positive definite."""


def all_finite(values: Tensor) -> bool:
    """Without another tensor of that size, as `isfinite` would make two."""
    return all(math.isfinite(extreme.item()) for extreme in (values.amin(), values.amax()))


def check_damp(damp: float, name: str = "damp") -> None:
    """Raises ValueError."""
    if not 0 < damp < math.inf:
        raise ValueError(f"{name}={damp} must be a positive share of mean diag(H); write for example {name}=0.01")


def check_shrink(share: float) -> None:
    """Raises ValueError."""
    if not 0 <= share < math.inf:
        raise ValueError(f"shrink={share} must be a share of diag(H), 0 or more; write for example shrink=0.15")


def shrunk(hessian_II: Tensor, share: float) -> Tensor:
    """H + share * diag(H): what inputs have in common counts 1 / (1 + share) of what it did, beside what each is by
    itself, whatever its size. (Damping adds the same to all: of a column with small inputs hardly more is left.)

    Correlations among a few thousand tokens of a few texts are in part those texts' own, and codes that rely on them
    are the worse elsewhere: shrinkage towards a diagonal target (Ledoit & Wolf 2004; Schaefer & Strimmer 2005)."""
    if not share:
        return hessian_II
    shrunk_II = hessian_II.clone()
    shrunk_II.diagonal().mul_(1 + share)
    return shrunk_II


def prepare(hessian_II: Tensor, *, act_order: bool, damp: float) -> Feedback:
    """Damp, order and factor a Hessian (any scale, fp32 [I, I]).

    A column without input gets the mean of diag(H) and otherwise zeros: it neither gives nor takes error. (GPTQ's code
    also sets its weights to zero; ours keeps them, since a dead channel of a small calibration set may live elsewhere.)

    Raises NotFinite when H is not finite, and Indefinite when no step of the damping ladder makes it positive definite.
    """
    diagonal_I = hessian_II.diagonal().clone()
    dead_I = diagonal_I == 0
    mean = diagonal_I[~dead_I].mean().item() if not bool(dead_I.all()) else 1.0
    diagonal_I[dead_I] = mean
    order_I = (
        torch.argsort(diagonal_I, descending=True, stable=True)
        if act_order
        else torch.arange(len(diagonal_I), device=hessian_II.device)
    )
    if not all_finite(hessian_II):
        raise NotFinite(
            "the Hessian of this layer is not finite: the model or an earlier packed layer overflows "
            "on the calibration text"
        )
    for attempt in range(DAMP_LADDER):
        used = damp * 10**attempt
        damped_I = diagonal_I + used * mean
        upper_II = _factor(hessian_II, damped_I, order_I)
        if upper_II is not None:
            return Feedback(order_I, upper_II, damped_I, int(dead_I.sum()), used)
    raise Indefinite(
        f"the Hessian of this layer is not positive definite even with damping {used:g}; use more calibration tokens"
    )


def _factor(hessian_II: Tensor, diagonal_I: Tensor, order_I: Tensor) -> Tensor | None:
    """Upper Cholesky factor of the inverse, in processing order, of the Hessian with another diagonal; None where it is
    not positive definite. A wide layer's matrix is gigabytes: each is let go of before the next but one is made."""
    ordered_II = hessian_II[order_I][:, order_I]
    ordered_II.diagonal().copy_(diagonal_I[order_I])
    factor_II, info = torch.linalg.cholesky_ex(ordered_II)
    del ordered_II
    if info == 0:
        inverse_II = torch.cholesky_inverse(factor_II)
        del factor_II
        factor_II, info = torch.linalg.cholesky_ex(inverse_II, upper=True)
    return factor_II if info == 0 and all_finite(factor_II) else None


def run(
    weight_OI: Tensor,
    feedback: Feedback,
    quantise: Callable[[int, int, Tensor], Tensor],
    *,
    block: int = 128,
    enter: Callable[[int, Tensor], None] | None = None,
    first_O: Tensor | None = None,
) -> Tensor:
    """Quantise every column in processing order; returns the decoded weight [O, I] in column order.

    `quantise(position, column, values_O)` returns the decoded values (and keeps the codes). `enter(position, rest_IO)`
    is called at the start of every lazy block with the updated, not yet quantised rows of the transposed weight: grids
    that are placed during the loop (dynamic groups) are placed there, so `block` must be a multiple of their group.
    `first_O`: what the first column is quantised at in place of its own values; its error counts from the latter."""
    rest_IO = weight_OI[:, feedback.order_I].t().contiguous()  # transposed: a column of the weight is a contiguous row
    decoded_IO = torch.empty_like(rest_IO)
    columns = feedback.order_I.tolist()
    upper_II, count = feedback.upper_II, len(columns)
    pivot_I = upper_II.diagonal().tolist()
    for start in range(0, count, block):
        stop = min(start + block, count)
        errors_IO = torch.empty(stop - start, rest_IO.shape[1], dtype=rest_IO.dtype, device=rest_IO.device)
        if enter is not None:
            enter(start, rest_IO)
        for i in range(start, stop):
            decoded_IO[i] = quantise(i, columns[i], first_O if i == 0 and first_O is not None else rest_IO[i])
            error_O = torch.sub(rest_IO[i], decoded_IO[i], out=errors_IO[i - start]).div_(pivot_I[i])
            if i + 1 < stop:
                rest_IO[i + 1 : stop].addr_(upper_II[i, i + 1 : stop], error_O, alpha=-1)
        if stop < count:
            rest_IO[stop:].addmm_(upper_II[start:stop, stop:].t(), errors_IO, alpha=-1)
    return torch.empty_like(weight_OI).index_copy_(1, feedback.order_I, decoded_IO.t())


def layer_error(weight_OI: Tensor, decoded_OI: Tensor, hessian_II: Tensor) -> float:
    """Relative output error tr(E H E^T) / tr(W H W^T), E = W - decoded."""
    error_OI = weight_OI - decoded_OI
    error = torch.sum((error_OI @ hessian_II) * error_OI, dtype=torch.float64)
    scale = torch.sum((weight_OI @ hessian_II) * weight_OI, dtype=torch.float64)
    return float(error / scale) if scale > 0 else 0.0
