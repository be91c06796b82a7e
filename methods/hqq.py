"""HQQ (Badri, Shaji: Half-Quadratic Quantization of Large Machine Learning Models, mobiusml.github.io/hqq_blog, 2023):
uniform grids whose zero points are moved until the error is sparse. No data is looked at.

    minimise over z, E    |E|_p^p + beta / 2 |E - (W - s (Q - z))|^2,   p < 1,   Q = clamp(round(W / s + z))

by turns, with beta growing by `kappa` a turn:

    E <- shrink(W - s (Q - z)),  shrink(x) = sign(x) max(0, |x| - |x|^(p - 1) / beta)
    z <- mean over the group of Q - (W - E) / s

until the mean magnitude of the error no longer falls. Scales span each group and stay. p, beta, kappa and the number of
turns are the released code's defaults. Stored are scale and minimum, -s z, both fp16: 32 bits a group, as much as the
released code where it does not quantise its scales and zero points as well.

Divergences: the zero points of the turn with the least error are kept (the released code has moved them once more when
it sees that it should stop); those it starts from are not rounded at 4 bits; the last codes are of the grid as it is
stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kernels.formats.uniform import UniformLinear
from methods.base import Compressed, LayerConfig, LayerData, LayerSpec, Method, Sensitivity, Track
from methods.codecs.grids import Grid, fit_grid
from methods.uniform_grid import UniformGridMethod

SMALLEST = 1e-12  # magnitude of an error that is raised to a negative power


@dataclass(frozen=True, kw_only=True)
class HQQ(UniformGridMethod):
    """Zero points that leave a sparse error, on uniform grids."""

    name: ClassVar[str] = "hqq"
    version: ClassVar[int] = 1
    track: ClassVar[Track] = Track.DATA_FREE
    seeded: ClassVar[bool] = False

    offset: str | None = "minimum"
    norm: float = 0.7  # p
    beta: float = 10.0
    kappa: float = 1.01
    turns: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.offset != "minimum" or self.grid != "minmax":
            raise ValueError("hqq moves zero points that are real numbers: leave offset and grid out")
        if not 0 < self.norm <= 1 or not self.beta > 0 or not self.kappa >= 1 or self.turns < 1:
            raise ValueError("norm must be in (0, 1], beta positive, kappa and turns at least 1")

    def expected_costs(
        self, weight_OI: Tensor, sensitivity: Sensitivity, layer: LayerSpec, configs: Sequence[LayerConfig], seed: int
    ) -> list[float]:
        """A sample of rows, packed."""
        return Method.expected_costs(self, weight_OI, sensitivity, layer, configs, seed)

    def compress(self, data: LayerData, layer: LayerSpec, config: LayerConfig) -> Compressed:
        packed = config.layout(layer, data.weight_OI.device)
        assert isinstance(packed, UniformLinear)
        grid = self.moved(data.weight_OI, packed.bits, packed.group)
        packed.fill(**packed.tensors(grid.round(data.weight_OI), **grid.stored))
        return Compressed(packed)

    def moved(self, weight_OI: Tensor, bits: int, group: int) -> Grid:
        """A grid with its zero points where the mean magnitude of the error is least."""
        start = fit_grid(weight_OI, bits=bits, group=group, offset="minimum", search="minmax")
        scale_OGS = start.scale_OG[:, :, None]
        pad = -weight_OI.shape[1] % group
        weight_OGS = torch.nn.functional.pad(weight_OI, (0, pad)).unflatten(1, (-1, group))
        real_GS = torch.nn.functional.pad(torch.ones_like(weight_OI[0]), (0, pad)).view(-1, group)
        zero_OGS = -start.base_OG[:, :, None] / scale_OGS
        best_OGS, least, beta = zero_OGS, torch.inf, self.beta
        for _ in range(self.turns):
            code_OGS = torch.round(weight_OGS / scale_OGS + zero_OGS).clamp_(0, 2**bits - 1)
            off_OGS = (weight_OGS - scale_OGS * (code_OGS - zero_OGS)) * real_GS
            error = off_OGS.abs().mean().item()
            if error >= least:
                break
            best_OGS, least = zero_OGS, error
            sparse_OGS = shrink(off_OGS, beta, self.norm)
            wanted_OGS = (code_OGS - (weight_OGS - sparse_OGS) / scale_OGS) * real_GS
            zero_OGS = wanted_OGS.sum(dim=2, keepdim=True) / real_GS.sum(dim=1)[:, None]
            beta *= self.kappa
        minimum_OG = (-best_OGS * scale_OGS)[:, :, 0].half()
        stored = {"scale_OG": start.stored["scale_OG"], "minimum_OG": minimum_OG}
        return Grid(bits, group, start.scale_OG, minimum_OG.float(), stored)


def shrink(x: Tensor, beta: float, norm: float) -> Tensor:
    """The proximal step of |x|_p^p: soft thresholding for p = 1, and for less a threshold that large errors escape."""
    size = x.abs()
    return x.sign() * (size - size.clamp_min(SMALLEST).pow(norm - 1) / beta).clamp_min(0)
