"""`reallm:calibrated`, the default: the stored form of the paper, every choice made against the layer objective tr(E H
E^T).

    0  target            the weight moved against the drift of its inputs, half way      methods.codecs.drift
    1  low-rank part     the best one as the inputs see it: SVD of W C, H = C C^T        methods.codecs.svd
    2  the rest          scales, codebook, codes and codebook again under H             methods.codecs.vector_feedback

None of this is in the ReALLM paper, whose quantisation is data-free; step 2 is close kin to GPTVQ (van Baalen et al.,
arXiv 2402.15319), and `gptvq` is this method without steps 0 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kernels.formats.codebook import CodebookLinear
from methods.base import Compressed, LayerConfig, LayerData, LayerSpec, Needs, Track
from methods.codecs.drift import followed
from methods.codecs.error_feedback import prepare
from methods.codecs.svd import lowrank_part
from methods.codecs.vector_feedback import damped_hessian, quantise_vectors
from methods.reallm.base import SharedCodebooks
from methods.under_hessian import UnderHessian


@dataclass(frozen=True, kw_only=True)
class Calibrated(SharedCodebooks, UnderHessian):
    """The default: vectors, codebooks and low-rank part chosen under the Hessian."""

    track: ClassVar[Track] = Track.CALIBRATED

    follow: float = 0.5  # share of the inputs' drift that weights, and blocks as they are tuned, take back

    def __post_init__(self) -> None:
        if self.decoder == "conv":
            raise ValueError(
                "a convolutional decoder is trained on the weights alone: write reallm:data-free,decoder=conv"
            )
        super().__post_init__()
        if not 0 <= self.follow <= 1:
            raise ValueError("follow must be 0 to 1")

    @property
    def needs(self) -> Needs:
        return Needs(hessian=True, drift=self.follow > 0)

    def compress(self, data: LayerData, layer: LayerSpec, config: LayerConfig) -> Compressed:
        assert data.hessian_II is not None
        packed = config.layout(layer, data.weight_OI.device)
        assert isinstance(packed, CodebookLinear)
        if data.table is not None:
            packed.attach(data.table)
        target_OI = data.weight_OI
        if data.drift_II is not None:
            target_OI = followed(target_OI, data.hessian_II, data.drift_II, self.follow)
        feedback = prepare(data.hessian_II, act_order=self.act_order, damp=self.damp)
        damped_II = damped_hessian(data.hessian_II, feedback)
        whitener_II = torch.linalg.cholesky(damped_II) if packed.rank else None
        adapters, lowrank_OI = lowrank_part(target_OI, packed, whitener_II, data.seed)
        rest_OI = target_OI - lowrank_OI
        vectors = quantise_vectors(rest_OI, packed, feedback, damped_II, refit=self.refit, seed=data.seed)
        packed.fill(**adapters, **vectors)
        return Compressed(packed, {"dead_columns": feedback.dead, "damp": feedback.damp})
