"""Round to nearest on a symmetric grid that ends short of a group's largest weight: a method of another package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from methods import Compressed, LayerConfig, LayerData, LayerSpec, Method, Track


@dataclass(frozen=True, kw_only=True)
class Clipped(Method):
    name: ClassVar[str] = "clipped"
    version: ClassVar[int] = 1
    track: ClassVar[Track] = Track.DATA_FREE
    seeded: ClassVar[bool] = False

    bits: int = 3
    clip: float = 0.8  # the end of the grid, as a share of the largest magnitude of a group

    def __post_init__(self) -> None:
        if not 0 < self.clip <= 1:
            raise ValueError("clip must be above 0 and at most 1")

    def candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        groups = [group for group in (32, 64, 96, 192) if layer.in_features % group == 0]
        return [LayerConfig.of("uniform", bits=self.bits, group=group, offset="symmetric") for group in groups]

    def compress(self, data: LayerData, layer: LayerSpec, config: LayerConfig) -> Compressed:
        weight_OGS = data.weight_OI.unflatten(1, (-1, config["group"]))
        half = 2 ** (self.bits - 1)
        largest_OG = weight_OGS.abs().amax(2)
        scale_OG = (self.clip * largest_OG / (half - 1)).clamp_min(1e-7).half()  # before rounding: it is what is stored
        code_OGS = torch.round(weight_OGS / scale_OG.float()[:, :, None]).clamp(-half, half - 1) + half
        packed = config.layout(layer, data.weight_OI.device)
        packed.fill(**packed.tensors(code_OGS.flatten(1).to(torch.int32), scale_OG))
        clipped = (weight_OGS.abs() > self.clip * largest_OG[:, :, None]).float().mean().item()
        return Compressed(packed, {"clipped": clipped})
