"""GPTVQ (van Baalen et al., arXiv 2402.15319): vector codebooks with GPTQ's error feedback, and nothing else.

    vectors assigned column by column, errors passed on (its algorithm 1)      methods.codecs.vector_feedback.assign
    codebooks by k-means weighted with the Hessian, under block scales         methods.codecs.vector.fit_codebook
    the codebook again, on the true objective tr(E H E^T)                      methods.codecs.vector.refit_codebook

`reallm:calibrated` quantises by the same codec, so the two differ in exactly what ReALLM adds: here no low-rank part,
no codebook shared between matrices, and weights that do not follow the drift of their inputs.

Divergences: d rows of one column make a vector, where the paper takes d columns of a row; one fp16 codebook per matrix,
not one of 8 bits per group of columns; scales in 8 bits on a linear grid; conjugate gradients for the paper's gradient
descent on the codebook.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kernels.formats.codebook import CodebookLinear
from methods.base import Compressed, LayerConfig, LayerData, LayerSpec, Method, Needs, Track
from methods.codecs.drift import check_follow, followed
from methods.codecs.error_feedback import prepare
from methods.codecs.vector_feedback import damped_hessian, quantise_vectors
from methods.under_hessian import UnderHessian


@dataclass(frozen=True, kw_only=True)
class GPTVQ(UnderHessian):
    """Error feedback on a vector codebook of each matrix's own."""

    name: ClassVar[str] = "gptvq"
    version: ClassVar[int] = 1
    track: ClassVar[Track] = Track.CALIBRATED
    later: ClassVar[tuple[str, ...]] = (*Method.later, "follow")

    follow: float = 0.0  # share of the inputs' drift that weights take back

    def __post_init__(self) -> None:
        super().__post_init__()
        check_follow(self.follow)

    @property
    def needs(self) -> Needs:
        return Needs(hessian=True, drift=self.follow > 0)

    def compress(self, data: LayerData, layer: LayerSpec, config: LayerConfig) -> Compressed:
        assert data.hessian_II is not None
        packed = config.layout(layer, data.weight_OI.device)
        assert isinstance(packed, CodebookLinear)
        target_OI = data.weight_OI
        if data.drift_II is not None:
            target_OI = followed(target_OI, data.hessian_II, data.drift_II, self.follow)
        feedback = prepare(data.hessian_II, act_order=self.act_order, damp=self.damp)
        damped_II = damped_hessian(data.hessian_II, feedback)
        packed.fill(**quantise_vectors(target_OI, packed, feedback, damped_II, refit=self.refit, seed=data.seed))
        return Compressed(packed, {"dead_columns": feedback.dead, "damp": feedback.damp})
