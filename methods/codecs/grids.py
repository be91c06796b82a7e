"""Uniform grids per group of columns: where the levels lie, and rounding onto them.

Every offset is one affine map, w ~ scale * q + base with q in [0, 2**bits): `base` is -scale * 2**(bits-1) for
"symmetric", -scale * zero for "zero" and the stored minimum for "minimum". Parameters are rounded to their stored
precision *before* any code is chosen, so codes are optimal for the grid that is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.formats.scales import per_column

SEARCHES = ("minmax", "mse", "hessian", "pivots")
COARSE = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # shares of the min-max range, tried for every group alike ...
FINE = (0.05, -0.05, 0.025, -0.025)  # ... and then steps from each group's own best
# GPTQ's released code; squares when the error is Hessian-weighted, where the weight already says what matters
MSE_NORM = 2.4


@dataclass(frozen=True)
class Grid:
    """`scale_OG` and `base_OG` are fp32 values of stored numbers; `stored` is what
    `UniformLinear.tensors` takes beside the codes, by name."""

    bits: int
    group: int
    scale_OG: Tensor
    base_OG: Tensor
    stored: dict[str, Tensor]

    def columns(self, count: int) -> tuple[Tensor, Tensor]:
        """(scale, base) of every column, each [count, O]: a column is a contiguous row."""
        scale_IO, base_IO = (per_column(p, self.group, count).t().contiguous() for p in (self.scale_OG, self.base_OG))
        return scale_IO, base_IO

    def round(self, weight_OI: Tensor) -> Tensor:
        """Codes of the nearest levels, int32 [O, I]."""
        count = weight_OI.shape[1]
        scale_OI, base_OI = (per_column(p, self.group, count) for p in (self.scale_OG, self.base_OG))
        return torch.round((weight_OI - base_OI) / scale_OI).clamp_(0, 2**self.bits - 1).to(torch.int32)

    def decode(self, codes_OI: Tensor) -> Tensor:
        """fp32 [O, I]."""
        scale_OI, base_OI = (per_column(p, self.group, codes_OI.shape[1]) for p in (self.scale_OG, self.base_OG))
        return codes_OI * scale_OI + base_OI


def fit_grid(
    weight_OI: Tensor,
    *,
    bits: int,
    group: int,
    offset: str,
    search: str = "minmax",
    importance_I: Tensor | None = None,
    shares: Sequence[float] = COARSE,
    steps: Sequence[float] = FINE,
) -> Grid:
    """Place a grid for every group of `group` columns (the last may be ragged).

    `search`: "minmax" spans the group (GPTQ's default), "mse" also tries shrunken ranges and keeps the one with the
    least |error|^2.4, "hessian" and "pivots" the one with the least squared error weighted by `importance_I` (diag H,
    or what is left of it once later columns have reacted). The searches also try a negated scale on symmetric grids,
    whose 2**bits levels reach one step further on the negative side."""
    assert search in SEARCHES
    rows, columns = weight_OI.shape
    pad = -columns % group
    # Padding repeats the last column, which changes no minimum or maximum, and carries no error weight.
    weight_OGS = torch.cat([weight_OI, weight_OI[:, -1:].expand(rows, pad)], dim=1).view(rows, -1, group)
    low_OG, high_OG = weight_OGS.amin(dim=2), weight_OGS.amax(dim=2)
    if search == "minmax":
        return _grid(low_OG, high_OG, bits, group, offset, torch.ones_like(low_OG))
    weight_I = torch.ones(columns, device=weight_OI.device) if search == "mse" or importance_I is None else importance_I
    importance_GS = torch.nn.functional.pad(weight_I, (0, pad)).view(-1, group)
    norm = MSE_NORM if search == "mse" else 2.0
    shrink_OG = torch.ones_like(low_OG)
    best, best_error_OG = None, torch.full_like(shrink_OG, torch.inf)

    def attempt(candidate_OG: Tensor) -> None:
        nonlocal best, best_error_OG, shrink_OG
        grid = _grid(low_OG, high_OG, bits, group, offset, candidate_OG)
        error_OG = _error(weight_OGS, grid, norm, importance_GS)
        better_OG = error_OG < best_error_OG
        best_error_OG = torch.where(better_OG, error_OG, best_error_OG)
        shrink_OG = torch.where(better_OG, candidate_OG, shrink_OG)
        best = grid if best is None else merge(better_OG, grid, best)

    for sign in (1, -1) if offset == "symmetric" else (1,):
        for share in shares:
            attempt(torch.full_like(shrink_OG, sign * share))
    for step in steps:
        attempt(shrink_OG + step)
    assert best is not None
    return best


def _error(weight_OGS: Tensor, grid: Grid, norm: float, importance_GS: Tensor) -> Tensor:
    scale_OGS, base_OGS = grid.scale_OG[..., None], grid.base_OG[..., None]
    error_OGS = (weight_OGS - base_OGS).div_(scale_OGS).round_().clamp_(0, 2**grid.bits - 1)
    error_OGS.mul_(scale_OGS).add_(base_OGS).sub_(weight_OGS)
    error_OGS = error_OGS.square_() if norm == 2.0 else error_OGS.abs_().pow_(norm)
    return torch.einsum("ogs,gs->og", error_OGS, importance_GS)


def _grid(low_OG: Tensor, high_OG: Tensor, bits: int, group: int, offset: str, shrink_OG: Tensor) -> Grid:
    """The grid that spans `shrink` times the range of every group; a negative share is a negated scale."""
    top = 2**bits - 1
    if offset == "symmetric":
        span_OG = 2 * torch.maximum(low_OG.abs(), high_OG.abs())
    elif offset == "zero":  # zero must lie inside the range, so that its code exists
        low_OG, high_OG = low_OG.clamp_max(0), high_OG.clamp_min(0)
        span_OG = high_OG - low_OG
    else:
        span_OG = high_OG - low_OG
    span_OG = torch.where(span_OG > 0, span_OG, 2.0)  # a constant group: any scale will do
    # fp16 holds 6e-8 to 65504; a smaller range decodes to its offset, a larger one does not occur in finite fp16
    # weights.
    half_OG = (span_OG * shrink_OG.abs() / top).clamp(2.0**-24, 65504.0).copysign(shrink_OG).half()
    scale_OG = half_OG.float()
    if offset == "symmetric":
        return Grid(bits, group, scale_OG, -(2 ** (bits - 1)) * scale_OG, {"scale_OG": half_OG})
    if offset == "zero":
        zero_OG = torch.round(-low_OG * shrink_OG / scale_OG).clamp_(0, top)
        return Grid(
            bits, group, scale_OG, -zero_OG * scale_OG, {"scale_OG": half_OG, "zero_OG": zero_OG.to(torch.int32)}
        )
    minimum_OG = (low_OG * shrink_OG).half()
    return Grid(bits, group, scale_OG, minimum_OG.float(), {"scale_OG": half_OG, "minimum_OG": minimum_OG})


def merge(take_OG: Tensor, new: Grid, old: Grid) -> Grid:
    """`new` for the groups to take, `old` for the others."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(take_OG, a, b)

    stored = {name: pick(new.stored[name], old.stored[name]) for name in old.stored}
    return Grid(old.bits, old.group, pick(new.scale_OG, old.scale_OG), pick(new.base_OG, old.base_OG), stored)
