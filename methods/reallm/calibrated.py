"""`reallm:calibrated`, the default: the stored form of the paper, every choice made against the layer objective tr(E H
E^T).

    0  target            the weight moved against the drift of its inputs, half way      methods.codecs.drift
    1  low-rank part     the best one as the inputs see it: SVD of W C, H = C C^T        methods.codecs.svd
    2  the rest          vectors: scales, codebook, codes, codebook again, under H       methods.codecs.vector_feedback
                         or paths through a trellis, of the rotated rest, under H        methods.codecs.trellis
    3  low-rank part     again, of what is left of the target without the latent         methods.codecs.svd

Which latent a matrix gets, of what length and bits, is the plan's affair, as is its rank. None of this is in the ReALLM
paper, whose quantisation is data-free; vectors are close kin to GPTVQ (van Baalen et al., arXiv 2402.15319), and
`gptvq` is this method with them alone and without steps 1 and 3; trellises are those of `trellis`. Step 3 lowers the
layer's error by some 1 % at rank 2; a second round of 2 after it raises it again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kernels.formats.bits import StoredBits
from kernels.formats.codebook import CodebookLinear
from kernels.formats.trellis import WINDOWS, TrellisLinear
from methods.base import Compressed, LayerConfig, LayerData, LayerSpec, Sensitivity, Track
from methods.codecs.basis import turned
from methods.codecs.error_feedback import prepare, shrunk
from methods.codecs.svd import lowrank_part
from methods.codecs.trellis import CODES, expected_cost, quantise_paths
from methods.codecs.vector_feedback import damped_hessian, quantise_vectors
from methods.reallm.base import SharedCodebooks
from methods.under_hessian import UnderHessian

LATENTS = ("any", "vectors", "trellis")


@dataclass(frozen=True, kw_only=True)
class Calibrated(SharedCodebooks, UnderHessian):
    """The default: latents, codebooks and low-rank part chosen under the Hessian."""

    version: ClassVar[int] = 6  # block scales in 4 bits, low-rank parts fitted again
    track: ClassVar[Track] = Track.CALIBRATED

    latent: str = "any"  # on offer to the plan: vectors, trellises, or both
    window: int = 12  # bits of a trellis's window; the search takes twice as long for each

    def __post_init__(self) -> None:
        if self.decoder == "conv":
            raise ValueError(
                "a convolutional decoder is trained on the weights alone: write reallm:data-free,decoder=conv"
            )
        super().__post_init__()
        if self.latent not in LATENTS:
            raise ValueError(f"latent must be one of {', '.join(LATENTS)}")
        if self.window not in WINDOWS:
            raise ValueError(f"window must be {WINDOWS[0]} to {WINDOWS[-1]}")
        if self.latent == "trellis" and self.dim is not None:
            raise ValueError("dim and index_bits are those of vectors: leave latent=trellis out")

    def candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        vectors = super().candidates(layer) if self.latent != "trellis" else []
        if self.latent == "vectors" or self.dim is not None:
            return vectors
        trellises = [
            LayerConfig.of("trellis", bits=bits, dim=dim, window=self.window, rotated=True, rank=rank, **self.extras())
            for bits, dim in CODES
            for rank in self.ranks(layer)
            if rank < min(layer.in_features, layer.out_features)
        ]
        return vectors + trellises

    def preference(self, config: LayerConfig, bits: StoredBits, weights: int) -> tuple[float, ...]:
        """Trellises before vectors of as many bits: a path is as long as a column."""
        if config.format != "trellis":
            return super().preference(config, bits, weights)
        return (config["bits"] / config["dim"], math.inf, 0, bits.total / weights)

    def other_costs(
        self,
        weight_OI: Tensor,
        rest_OI: Tensor,
        sensitivity: Sensitivity,
        layer: LayerSpec,
        configs: Sequence[LayerConfig],
        seed: int,
    ) -> dict[LayerConfig, float]:
        return {c: expected_cost(rest_OI, sensitivity, c["bits"], c["dim"], c["window"]) for c in configs}

    def compress(self, data: LayerData, layer: LayerSpec, config: LayerConfig) -> Compressed:
        assert data.hessian_II is not None
        packed = config.layout(layer, data.weight_OI.device)
        assert isinstance(packed, CodebookLinear | TrellisLinear)
        if data.table is not None:
            packed.attach(data.table)
        hessian_II = shrunk(data.hessian_II, self.shrink)
        target_OI = self.target(data, hessian_II)
        feedback = prepare(hessian_II, act_order=self.act_order, damp=self.damp)
        damped_II = damped_hessian(hessian_II, feedback)
        whitener_II = torch.linalg.cholesky(damped_II) if packed.rank else None
        adapters, lowrank_OI = lowrank_part(target_OI, packed, whitener_II, data.seed)
        rest_OI = target_OI - lowrank_OI
        if isinstance(packed, TrellisLinear):
            rest_OI, turned_II, rotation = turned(packed, rest_OI, hessian_II, data.seed)
            feedback = prepare(turned_II, act_order=self.act_order, damp=self.damp)
            latent = rotation | quantise_paths(rest_OI, packed, feedback)
        else:
            latent = quantise_vectors(rest_OI, packed, feedback, damped_II, refit=self.refit, seed=data.seed)
        packed.fill(**adapters, **latent)
        if packed.rank:
            adapters, _ = lowrank_part(target_OI - packed.decode_base(), packed, whitener_II, data.seed)
            packed.refill(**adapters)
        return Compressed(packed, {"dead_columns": feedback.dead, "damp": feedback.damp})
