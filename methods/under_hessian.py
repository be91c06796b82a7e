"""The base of `gptvq` and `reallm:calibrated`, which assign vectors under a layer's Hessian: their common options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from methods.base import LayerData, Needs
from methods.codecs.drift import check_follow, followed
from methods.codecs.error_feedback import check_damp, check_shrink
from methods.vector_quantised import VectorQuantised


@dataclass(frozen=True, kw_only=True)
class UnderHessian(VectorQuantised):
    """The options of methods that assign vectors under a layer's Hessian (methods.codecs.vector_feedback)."""

    later: ClassVar[tuple[str, ...]] = (*VectorQuantised.later, "follow", "shrink")

    act_order: bool = True
    damp: float = 0.1  # share of mean diag(H) added to it
    shrink: float = 0.15  # share of every column's own diag(H) added to it
    refit: int = 6  # conjugate-gradient steps on the codebook
    follow: float = 0.5  # share of the inputs' drift that weights, and blocks as they are tuned, take back

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damp(self.damp)
        check_shrink(self.shrink)
        check_follow(self.follow)
        if self.refit < 0:
            raise ValueError("refit must not be negative")

    @property
    def needs(self) -> Needs:
        return Needs(hessian=True, drift=self.follow > 0)

    def target(self, data: LayerData, hessian_II: Tensor) -> Tensor:
        """The weight to pack, moved against the drift of its inputs."""
        if data.drift_II is None:
            return data.weight_OI
        return followed(data.weight_OI, hessian_II, data.drift_II, self.follow)
