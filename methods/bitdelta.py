"""BitDelta (Liu, Xiao, Li, et al.; NeurIPS 2024, arXiv 2402.10193): the signs of a difference under one scale a matrix.

    sec. 3.1   Delta = W_fine - W_base ~ alpha * sign(Delta), alpha = mean |Delta|     kernels.formats.signs
    sec. 3.2   the scales alone are then distilled: the outputs of the tuned model's   `bitdelta:distilled`, by the one
               are matched, everything else stands still                               training loop there is
    "successive" deltas: a mask for what the masks before it leave                     `masks`

Divergences: the paper has one mask for every matrix, here the plan may give a matrix none or several, as its budget
allows (a budget of 1 bit holds a mask for all but the last few matrices: a mask with its scale is a little more than a
bit); `masks=1` is the paper's. The paper matches logits by their squared difference, with Adam at 1e-4, on 800 samples
of C4 of 128 tokens; the loop's loss is the divergence, its text and steps are the run's, and a step is relative to the
scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kernels.formats.signs import SignsLinear
from methods.base import Compressed, LayerConfig, LayerData, LayerSpec, Method, Sensitivity, Track
from methods.distilled import Distils

MASKS = range(5)  # beyond four bits a weight a difference is not small


@dataclass(frozen=True, kw_only=True)
class BitDelta(Method):
    """Signs of a difference."""

    name: ClassVar[str] = "bitdelta"
    version: ClassVar[int] = 1
    track: ClassVar[Track] = Track.DELTA
    seeded: ClassVar[bool] = False
    reach: ClassVar[float] = 64.0  # a matrix may be worth nothing

    masks: int | None = None

    def __post_init__(self) -> None:
        if self.masks is not None and self.masks not in MASKS:
            raise ValueError(f"masks must be {MASKS[0]} to {MASKS[-1]}")

    @classmethod
    def variants(cls) -> dict[str, Method]:
        return {"distilled": Distilled()}

    def candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        return [LayerConfig.of("signs", masks=masks) for masks in (MASKS if self.masks is None else (self.masks,))]

    def expected_costs(
        self, weight_OI: Tensor, sensitivity: Sensitivity, layer: LayerSpec, configs: Sequence[LayerConfig], seed: int
    ) -> list[float]:
        """Of the whole matrix: a sample of its rows would have another scale."""
        packed = (self.compress(LayerData(weight_OI), layer, config).packed for config in configs)
        return [sensitivity.cost(weight_OI - masks.decode()) for masks in packed]

    def compress(self, data: LayerData, layer: LayerSpec, config: LayerConfig) -> Compressed:
        packed = config.layout(layer, data.weight_OI.device)
        assert isinstance(packed, SignsLinear)
        packed.fill(**packed.tensors(data.weight_OI))
        return Compressed(packed)


@dataclass(frozen=True, kw_only=True)
class Distilled(Distils, BitDelta):
    """The scales are trained afterwards."""

    version: ClassVar[int] = BitDelta.version + 1  # steps are relative to a scale
    track: ClassVar[Track] = Track.DELTA
