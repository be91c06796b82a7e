"""Bolaco (Ji et al., EMNLP 2024, arXiv 2405.10616): low rank by the features a layer puts out, not by its weights.

    factors    W ~ Q_r (Q_r^T W), Q the principal components of the outputs y = W x    codecs.factors.principal_factors
    pooling    their covariance is pooled: the mean of those of groups of the text     `Needs.pooled`: of every window
    mean       m - Q_r Q_r^T m puts back what the components leave of the mean m       stored: 16 bits an output
    ranks      ranks by Bayesian optimisation                                          `--allocate bayes`, an option

With one group, no mean taken off and no damping this is `svd:whitened` exactly: its left factor is the eigenvectors of
W H W^T too. So a difference between the two rows is what pooling and the mean are worth. Where it departs from the
paper: README.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from methods.base import LayerData, Needs, Track
from methods.codecs.error_feedback import NotFinite
from methods.codecs.factors import principal_factors
from methods.factored import Factored


@dataclass(frozen=True, kw_only=True)
class Bolaco(Factored):
    """Factors by the principal components of a layer's outputs."""

    name: ClassVar[str] = "bolaco"
    version: ClassVar[int] = 1
    track: ClassVar[Track] = Track.CALIBRATED
    shifted: ClassVar[bool] = True
    whole: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:
        return Needs(pooled=True)

    def factors(self, data: LayerData) -> tuple[Tensor, Tensor]:
        assert data.pooled is not None
        covariance_II = data.pooled.covariance_II
        if not bool(torch.isfinite(covariance_II).all()):
            raise NotFinite("the covariance of this layer's inputs is not finite: the model overflows on this text")
        if not covariance_II.any():  # no token came here: as if all inputs were alike
            covariance_II = torch.eye(len(covariance_II), device=covariance_II.device)
        return principal_factors(data.weight_OI, covariance_II)

    def shift(self, data: LayerData, decoded_OI: Tensor) -> dict[str, Tensor]:
        assert data.pooled is not None
        return {"shift": ((data.weight_OI - decoded_OI) @ data.pooled.mean_I).half()}
