"""GPTVQ (van Baalen et al., arXiv 2402.15319): vector codebooks with GPTQ's error feedback, and nothing else.

    sec. 3.1, alg. 1   vectors assigned column by column, errors passed on              methods.reallm.calibrated.assign
    sec. 3.2           codebooks by k-means weighted with the Hessian                   methods.codecs.vector.fit_codebook
    sec. 3.3           block scales; the codebook again, by least squares on tr(E H E^T)   methods.codecs.vector.refit_codebook

It is what `reallm:calibrated` is built on, so the two share their code and differ in exactly what ReALLM adds: here no low-rank part,
no codebook shared between matrices, and weights that do not follow the drift of their inputs.

Divergences: d rows of one column make a vector, where the paper takes d columns of a row; one fp16 codebook per matrix, not one of 8 bits
per group of columns; scales in 8 bits on a linear grid; conjugate gradients for the paper's gradient descent on the codebook.
"""

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
