"""AWQ (Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han; MLSys 2024, arXiv 2306.00978): columns whose inputs are
large are scaled up before they are rounded, so that less of them is lost, and grids are clipped.

    sec. 3.2, eq. 4    minimise |Q(W diag(s)) diag(s)^-1 X - W X|^2 over s          `scaled`
    sec. 3.2, eq. 5    s = s_X^alpha, the best alpha of a grid over [0, 1]
    released code      s / sqrt(max(s) min(s)); then, group by group, the best of
                       ten clippings of the scaled weights, down to 0.55 of the largest    `clipped`

The stored scale of a column is 1 / s, fp16, and counted: kernels multiply the inputs by it. The paper merges it into
the operation in front of the layer, one vector for all layers of a stage, and where there is none to take it (behind
grouped-query attention) leaves it out; here a layer is its own bytes and each has a vector of its own, which costs 16
bits / rows per weight.

Divergences: s_X is the root mean square of a channel's inputs where the paper has their mean magnitude, for that is
what the diagonal of a Hessian knows; the error is that of the layer itself, exactly tr(E H E^T) with H the sum of x x^T
over all calibration tokens, where the released code takes that of the attention for query, key and value together and a
sample of tokens for clipping; query and key are clipped too; inputs are those behind packed blocks; codes are chosen
for scales as they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kernels.formats.uniform import UniformLinear
from methods.base import Compressed, LayerConfig, LayerData, LayerSpec, Method, Needs, Sensitivity, Track
from methods.codecs.error_feedback import NotFinite
from methods.codecs.grids import Grid, fit_grid, merge
from methods.uniform_grid import UniformGridMethod

SMALLEST = 1e-4  # factor of a column, of the largest one
HARDEST = 0.5  # share of a group's largest weight that clipping leaves at least
ESTIMATED_ALPHAS, ESTIMATED_CLIPS = 4, 3  # when only the outcome is wanted


@dataclass(frozen=True, kw_only=True)
class AWQ(UniformGridMethod):
    """Scaled columns and clipped groups on uniform grids."""

    name: ClassVar[str] = "awq"
    version: ClassVar[int] = 1
    track: ClassVar[Track] = Track.CALIBRATED

    offset: str | None = "zero"
    alphas: int = 20  # steps of the grid over [0, 1)
    clips: int = 10  # steps from no clipping to the hardest; 1: none is tried

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid != "minmax":
            raise ValueError("awq searches its clipping itself: write clips=10 and leave grid out")
        if self.alphas < 1 or self.clips < 1:
            raise ValueError("alphas and clips must be at least 1")

    @property
    def needs(self) -> Needs:
        return Needs(hessian=True, true_sequential=False)

    def candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        return [config.plus(column_scales=True) for config in super().candidates(layer)]

    def expected_costs(
        self, weight_OI: Tensor, sensitivity: Sensitivity, layer: LayerSpec, configs: Sequence[LayerConfig], seed: int
    ) -> list[float]:
        """A sample of rows, packed in fewer tries."""
        quick = replace(self, alphas=min(self.alphas, ESTIMATED_ALPHAS), clips=min(self.clips, ESTIMATED_CLIPS))
        return Method.expected_costs(quick, weight_OI, sensitivity, layer, configs, seed)

    def compress(self, data: LayerData, layer: LayerSpec, config: LayerConfig) -> Compressed:
        assert data.hessian_II is not None
        packed = config.layout(layer, data.weight_OI.device)
        assert isinstance(packed, UniformLinear)
        if not bool(torch.isfinite(data.hessian_II).all()):
            raise NotFinite("the inputs of this layer are not finite on the calibration text")
        column_I, alpha = scaled(data.weight_OI, data.hessian_II, packed, self.alphas)
        scaled_OI = data.weight_OI / column_I.float()
        hessian_II = data.hessian_II * column_I.float() * column_I.float()[:, None]
        codes_OI, grid = clipped(scaled_OI, hessian_II, packed, self.clips)
        packed.fill(**packed.tensors(codes_OI, **grid.stored, column_scale_I=column_I))
        return Compressed(packed, {"alpha": alpha})


def scaled(weight_OI: Tensor, hessian_II: Tensor, packed: UniformLinear, steps: int) -> tuple[Tensor, float]:
    """(1 / s as it is stored, fp16 [I]; alpha) of the least error at the layer's output."""
    best, least = (torch.ones_like(weight_OI[0]).half(), 0.0), torch.inf
    channel_I = hessian_II.diagonal().clamp_min(0).sqrt()
    channel_I = channel_I / channel_I.max().clamp_min(torch.finfo(torch.float32).tiny)
    for step in range(steps):
        alpha = step / steps
        s_I = channel_I.pow(alpha).clamp_min(SMALLEST)
        column_I = ((s_I.max() * s_I.min()).sqrt() / s_I).half()
        scaled_OI = weight_OI / column_I.float()
        grid = _fit(scaled_OI, packed)
        error_OI = grid.decode(grid.round(scaled_OI)) * column_I.float() - weight_OI
        error = torch.linalg.vecdot(error_OI @ hessian_II, error_OI).sum().item()
        if error < least:
            best, least = (column_I, alpha), error
    return best


def clipped(weight_OI: Tensor, hessian_II: Tensor, packed: UniformLinear, steps: int) -> tuple[Tensor, Grid]:
    """(codes, grid) with the clipping of every group that has the least error at the output, of the group alone."""
    columns, group = weight_OI.shape[1], packed.group
    pad = -columns % group
    padded_II = torch.nn.functional.pad(hessian_II, (0, pad, 0, pad)).view(packed.groups, group, packed.groups, group)
    hessian_GSS = padded_II.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    padded_OI = torch.nn.functional.pad(weight_OI, (0, pad))
    largest_OG = padded_OI.unflatten(1, (-1, group)).abs().amax(dim=2)
    codes_OI, best, least_OG = None, None, torch.full_like(largest_OG, torch.inf)
    for step in range(steps):
        limit_OI = (largest_OG * (1 - step * HARDEST / steps)).repeat_interleave(group, dim=1)[:, :columns]
        kept_OI = weight_OI.clamp(-limit_OI, limit_OI)
        grid = _fit(kept_OI, packed)
        tried_OI = grid.round(kept_OI)
        error_OI = torch.nn.functional.pad(grid.decode(tried_OI) - weight_OI, (0, pad))
        error_GOS = error_OI.unflatten(1, (-1, group)).transpose(0, 1)
        error_OG = torch.linalg.vecdot(error_GOS @ hessian_GSS, error_GOS).t()
        if codes_OI is None or best is None:
            codes_OI, best, least_OG = tried_OI, grid, error_OG
            continue
        better_OG = error_OG < least_OG
        least_OG = torch.where(better_OG, error_OG, least_OG)
        best = merge(better_OG, grid, best)
        better_OI = better_OG.repeat_interleave(group, dim=1)[:, :columns]
        codes_OI = torch.where(better_OI, tried_OI, codes_OI)
    assert codes_OI is not None and best is not None
    return codes_OI, best


def _fit(weight_OI: Tensor, packed: UniformLinear) -> Grid:
    return fit_grid(weight_OI, bits=packed.bits, group=packed.group, offset=packed.offset, search="minmax")
