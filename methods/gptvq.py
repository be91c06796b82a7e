"""GPTVQ (van Baalen et al., arXiv 2402.15319): vector codebooks with GPTQ's error feedback, and nothing else.

    vectors assigned column by column, errors passed on (its algorithm 1)      methods.reallm.calibrated.assign
    codebooks by k-means weighted with the Hessian, under block scales         methods.codecs.vector.fit_codebook
    the codebook again, on the true objective tr(E H E^T)                      methods.codecs.vector.refit_codebook

It is what `reallm:calibrated` is built on, so the two share their code and differ in exactly what ReALLM adds: here no
low-rank part, no codebook shared between matrices, and weights that do not follow the drift of their inputs.

Divergences: d rows of one column make a vector, where the paper takes d columns of a row; one fp16 codebook per matrix,
not one of 8 bits per group of columns; scales in 8 bits on a linear grid; conjugate gradients for the paper's gradient
descent on the codebook."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from methods.reallm import ReALLM


@dataclass(frozen=True, kw_only=True)
class GPTVQ(ReALLM):
    name: ClassVar[str] = "gptvq"
    version: ClassVar[int] = 1
    variants: ClassVar[dict[str, dict[str, Any]]] = {}

    rank: int | None = 0
    share: str = "none"
    follow: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.calibrated, self.rank, self.share, self.follow, self.epochs) != (True, 0, "none", 0.0, 0):
            raise ValueError("calibrated, rank, share, follow and epochs are fixed; for anything else write reallm:...")
