"""`reallm:data-free`: the paper's alternation of SVD and vector quantisation, which looks at nothing but the weights.

With `decoder=conv` a convolutional decoder per matrix is on offer to mixed allocations, beside the vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kernels.formats.codebook import CodebookLinear
from kernels.formats.conv import ConvLinear
from methods.base import Compressed, LayerConfig, LayerData, LayerSpec, Option, Sensitivity, Track
from methods.codecs.conv_training import fit_conv, unlikeness
from methods.codecs.svd import lowrank_part
from methods.reallm.alternation import alternate
from methods.reallm.base import SharedCodebooks

CONV: dict[str, Option] = dict(patch=64, latent_bits=2, stages=1, width=12, weight_bits=6, block=64, reorder=True)
# Of the latents: 1, 1.5 and 2 bits a weight; at more they lose to vectors wherever it was tried.
CONV_CHANNELS = (2, 3, 4)
# `unlikeness` of rows beyond which no decoder has been seen to beat vectors: none is trained for an estimate.
CONV_UNLIKE = 0.85
CONV_STEPS, CONV_SWEEPS = 200, 3  # of training a convolutional decoder


@dataclass(frozen=True, kw_only=True)
class DataFree(SharedCodebooks):
    """The alternation, and what it offers a mixed allocation."""

    algorithm: ClassVar[str] = "data-free"
    track: ClassVar[Track] = Track.DATA_FREE
    decoders: ClassVar[tuple[str, ...]] = ("identity", "mlp", "conv")

    along: str = "rows"  # what a vector's weights are consecutive along, or "columns"
    rounds: int = 10  # alternations at most
    tolerance: float = 1e-3  # stop at a smaller relative gain

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise ValueError("rounds must be at least 1")
        if self.along not in ("rows", "columns"):
            raise ValueError("along must be rows or columns")

    def extras(self) -> dict[str, Option]:
        return super().extras() | ({"along": self.along} if self.along != "rows" else {})

    def mixed_candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        vectors = super().mixed_candidates(layer)
        if self.decoder != "conv":
            return vectors
        # With a low-rank part of its own choice it has not been seen to win: what makes rows alike is of low rank.
        form = CONV | {"scales": self.scales, "adapter_bits": self.adapter_bits, "rank": self.rank or 0}
        return vectors + [LayerConfig.of("conv", latent_channels=count, **form) for count in CONV_CHANNELS]

    def other_costs(
        self,
        weight_OI: Tensor,
        rest_OI: Tensor,
        sensitivity: Sensitivity,
        layer: LayerSpec,
        configs: Sequence[LayerConfig],
        seed: int,
    ) -> dict[LayerConfig, float]:
        """A convolutional decoder by training it, where rows are alike enough, and elsewhere as if it drew nothing."""
        if not configs:
            return {}
        if not unlikeness(rest_OI) < CONV_UNLIKE:
            return dict.fromkeys(configs, sensitivity.cost(rest_OI))
        data = LayerData(weight_OI, seed)
        return {c: sensitivity.cost(weight_OI - self.compress(data, layer, c).packed.decode()) for c in configs}

    def compress(self, data: LayerData, layer: LayerSpec, config: LayerConfig) -> Compressed:
        packed = config.layout(layer, data.weight_OI.device)
        if isinstance(packed, ConvLinear):
            tensors, report = draw_matrix(data.weight_OI, packed, seed=data.seed)
        else:
            assert isinstance(packed, CodebookLinear)
            if data.table is not None:
                packed.attach(data.table)
            tensors, report = alternate(
                data.weight_OI, packed, rounds=self.rounds, tolerance=self.tolerance, seed=data.seed
            )
        packed.fill(**tensors)
        return Compressed(packed, report)


def draw_matrix(weight_OI: Tensor, packed: ConvLinear, *, seed: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Buffers of `packed`: the low-rank part once, a convolutional decoder trained on the rest; and {relative_error},
    of the weight."""
    tensors, lowrank_OI = lowrank_part(weight_OI, packed, None, seed)
    rest_OI = weight_OI - lowrank_OI
    drawn, report = fit_conv(rest_OI, packed, steps=CONV_STEPS, sweeps=CONV_SWEEPS, seed=seed)
    relative_error = report["relative_error"] * float(rest_OI.norm()) / (float(weight_OI.norm()) or 1.0)
    return tensors | drawn, {"relative_error": relative_error}
