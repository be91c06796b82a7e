"""The control row of a pair: the base's block weights with no difference added, in no bits.

What the pair differs in outside of the blocks' matrices (norms, say) is stored for it as for all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kernels.formats.signs import SignsLinear
from methods.base import Compressed, LayerConfig, LayerData, LayerSpec, Method, Track


@dataclass(frozen=True, kw_only=True)
class BaseAlone(Method):
    """No difference at all."""

    name: ClassVar[str] = "base"
    version: ClassVar[int] = 1
    track: ClassVar[Track] = Track.DELTA
    seeded: ClassVar[bool] = False
    budgeted: ClassVar[bool] = False

    def candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        return [LayerConfig.of("signs", masks=0)]

    def compress(self, data: LayerData, layer: LayerSpec, config: LayerConfig) -> Compressed:
        packed = config.layout(layer, data.weight_OI.device)
        assert isinstance(packed, SignsLinear)
        packed.fill(**packed.tensors(data.weight_OI))
        return Compressed(packed)
