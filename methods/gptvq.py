"""GPTVQ (van Baalen et al., arXiv 2402.15319): vector codebooks with GPTQ's error feedback, and nothing else.

    weights follow the drift of their inputs, half way                         methods.codecs.drift
    vectors assigned column by column, errors passed on (its algorithm 1)      methods.codecs.vector_feedback.assign
    codebooks by k-means weighted with the Hessian, under block scales         methods.codecs.vector.fit_codebook
    the codebook again, on the true objective tr(E H E^T)                      methods.codecs.vector.refit_codebook

`reallm:calibrated` quantises by the same codec, so the two differ in exactly what ReALLM adds: here no low-rank part,
no codebook shared between matrices, no trellises. Following is not in the paper: an ingredient that all calibrated
methods have here, for it favours whoever has it.

Divergences: d rows of one column make a vector, where the paper takes d columns of a row; one fp16 codebook per matrix,
not one of 8 bits per group of columns; scales in 4 bits, as there, but evenly spaced; conjugate gradients for the
paper's gradient descent on the codebook.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kernels.formats.codebook import CodebookLinear
from methods.base import Compressed, LayerConfig, LayerData, LayerSpec, Track
from methods.codecs.error_feedback import prepare, shrunk
from methods.codecs.vector_feedback import damped_hessian, quantise_vectors
from methods.under_hessian import UnderHessian


@dataclass(frozen=True, kw_only=True)
class GPTVQ(UnderHessian):
    """Error feedback on a vector codebook of each matrix's own."""

    name: ClassVar[str] = "gptvq"
    version: ClassVar[int] = 4  # block scales in 4 bits
    track: ClassVar[Track] = Track.CALIBRATED

    def compress(self, data: LayerData, layer: LayerSpec, config: LayerConfig) -> Compressed:
        assert data.hessian_II is not None
        packed = config.layout(layer, data.weight_OI.device)
        assert isinstance(packed, CodebookLinear)
        hessian_II = shrunk(data.hessian_II, self.shrink)
        target_OI = self.target(data, hessian_II)
        feedback = prepare(hessian_II, act_order=self.act_order, damp=self.damp)
        damped_II = damped_hessian(hessian_II, feedback)
        packed.fill(**quantise_vectors(target_OI, packed, feedback, damped_II, refit=self.refit, seed=data.seed))
        return Compressed(packed, {"dead_columns": feedback.dead, "damp": feedback.damp})
