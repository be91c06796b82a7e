"""Paired ratios of two rows that scored the same windows, with the interval that says whether they differ.

The same resamples are drawn for both (harness.report.stats)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from harness.report.stats import MIN_WINDOWS, interval, resampled_means


@dataclass(frozen=True)
class Ratio:
    """A ratio with its 95 % interval, which a few windows have not."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def tie(self) -> bool | None:
        """Whether the interval includes no difference; None: nobody knows."""
        return None if self.low is None or self.high is None else self.low <= 1 <= self.high

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]" + (" tie" if self.tie else "")

    def to_json(self) -> dict[str, float | bool | None]:
        return {"ratio": self.value, "low": self.low, "high": self.high, "tie": self.tie}


Weights = Sequence[float] | None  # of the windows; None: all the same


def perplexity_ratio(here: Sequence[float], there: Sequence[float], weight: Weights) -> Ratio:
    """Of `here` to `there`, from the losses of their windows."""
    difference = [a - b for a, b in zip(here, there, strict=True)]
    return _ratio(math.exp(fmean(difference, weight)), resampled_means(difference, weight).exp(), len(difference))


def divergence_ratio(here: Sequence[float], there: Sequence[float], weight: Weights) -> Ratio | None:
    """Of `here` to `there`, from the divergences of their windows; None where they are not of the same windows: the
    reference's own is a noise floor, of a few."""
    if len(here) != len(there):
        return None
    resampled_Q = resampled_means(here, weight) / resampled_means(there, weight)
    return _ratio(fmean(here, weight) / fmean(there, weight), resampled_Q, len(here))


def _ratio(value: float, resampled_Q: torch.Tensor, windows: int) -> Ratio:
    return Ratio(value) if windows < MIN_WINDOWS else Ratio(value, *interval(resampled_Q))
