"""The base of `gptvq` and `reallm:calibrated`, which assign vectors under a layer's Hessian: their common options."""

from __future__ import annotations

from dataclasses import dataclass

from methods.codecs.error_feedback import check_damp
from methods.vector_quantised import VectorQuantised


@dataclass(frozen=True, kw_only=True)
class UnderHessian(VectorQuantised):
    """The options of methods that assign vectors under a layer's Hessian (methods.codecs.vector_feedback)."""

    act_order: bool = True
    damp: float = 0.1  # share of mean diag(H) added to it
    refit: int = 6  # conjugate-gradient steps on the codebook

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damp(self.damp)
        if self.refit < 0:
            raise ValueError("refit must not be negative")
