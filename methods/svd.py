"""Truncated singular value decompositions: what low rank alone can do, with nothing stored beside the factors.

    svd            W ~ U_r S_r V_r^T, the least squared error of the weights (Eckart and Young)
    svd:whitened   the least squared error of the layer's outputs: the SVD of W C, cut to r components and taken back
                   through C^-1, C C^T = X X^T + damping (SVD-LLM, Wang et al., arXiv 2403.07378, sec. 3.1;
                   the exact form of what ASVD, Yuan et al., arXiv 2312.05821, does with a diagonal C)

Which rank and how many bits a matrix gets is the plan's affair. Two factors of 16 bits at full rank take twice the bits
of a square matrix, so a rank is worth having at less than half of it; 8 bits for a number (a scale per component) and 4
(a scale per 64 numbers) are counted as they are stored.

Divergences: SVD-LLM gives every matrix the same ratio of parameters, at 16 bits, and has two parts more (closed-form
updates of one factor in turn, and LoRA); ASVD searches ratios layer by layer, by perplexity. Neither rounds its factors
(SVD-LLM may have GPTQ do it); here they are rounded to nearest. Estimates for the plan know only a diagonal of the
Hessian: they see less than what whitening saves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from methods.base import LayerData, Method, Needs, Track
from methods.codecs.error_feedback import check_damp
from methods.codecs.factors import best_factors, whitener
from methods.factored import Factored


@dataclass(frozen=True, kw_only=True)
class SVD(Factored):
    """The best factors of the weights."""

    name: ClassVar[str] = "svd"
    version: ClassVar[int] = 1
    track: ClassVar[Track] = Track.DATA_FREE
    seeded: ClassVar[bool] = False

    @property
    def packs_differences(self) -> bool:
        return True

    @classmethod
    def variants(cls) -> dict[str, Method]:
        return {"whitened": Whitened()}

    def factors(self, data: LayerData) -> tuple[Tensor, Tensor]:
        return best_factors(data.weight_OI)


@dataclass(frozen=True, kw_only=True)
class Whitened(SVD):
    """The best factors for the outputs of a layer."""

    algorithm: ClassVar[str] = "whitened"
    track: ClassVar[Track] = Track.CALIBRATED
    seeded: ClassVar[bool] = True

    damp: float = 0.01  # share of mean diag(H) added to it

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damp(self.damp)

    @property
    def needs(self) -> Needs:
        return Needs(hessian=True)

    def factors(self, data: LayerData) -> tuple[Tensor, Tensor]:
        assert data.hessian_II is not None
        return best_factors(data.weight_OI, whitener(data.hessian_II, self.damp))
