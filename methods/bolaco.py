"""Bolaco (Ji et al., EMNLP 2024, arXiv 2405.10616): low rank by the features a layer puts out, not by its weights.

    sec. 3.1   W ~ Q_r (Q_r^T W), Q the principal components of the outputs y = W x     codecs.factors.principal_factors
    sec. 3.1   their covariance is pooled: the mean of those of groups of the text      `Needs.pooled`: of every window
    sec. 3.1   b = m - Q_r Q_r^T m puts back what the components leave of the mean m    stored, 16 bits an output, counted
    sec. 3.2   ranks by Bayesian optimisation                                           `--allocate bayes`, an option

With one group, no mean taken off and no damping this is `svd:whitened` exactly: its left factor is the eigenvectors of
W H W^T too. So a difference between the two rows is what pooling and the mean are worth.

Divergences: ranks are the run's affair here, as for every method: by default one integer programme over predicted
costs, which finds a rank for each of the matrices where the paper searches five ratios (q and k, o, gate, up, down) for
all blocks alike; v stays whole there, here where the plan says so. The paper's objective is the perplexity of 50
compressed models on a small text; `--allocate bayes` searches a share for every role with a Gaussian process as well,
but asks the predicted divergence, which is the programme's own objective (harness.plan.bayes has the reason). Statistics
are of the text behind the packed prefix, the paper's of the uncompressed model, from 1,024 samples where a run of ours
has 24 windows. Factors may have 8 or 4 bits; the paper's have 16. LoRA afterwards is left out. The mean that is put back
is that of the rounded factors' error, so it takes their rounding's mean too."""

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
