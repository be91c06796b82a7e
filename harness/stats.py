"""Which differences are real: bootstrap intervals over windows, paired between rows, and ranks that methods may share.

The unit of resampling is the scored window (a block of consecutive tokens): tokens of one window depend on each
other, windows of the same text spread over it much less. Two rows of one protocol scored the same windows, so their losses are
compared window by window; what makes a window hard for everyone cancels.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

RESAMPLES = 10_000
COVERAGE = 0.95
MIN_WINDOWS = 3  # fewer say nothing about their own spread
_SEED = 20_260_101  # the resamples are part of the protocol, not of a run


def resampled_means(window_values: Sequence[float], weights: Sequence[float] | None = None) -> Tensor:
    """Means of RESAMPLES draws with replacement; the same draws for every row with as many windows, so differences pair. `weights`:
    of the windows, if they differ (articles of unequal length)."""
    count = len(window_values)
    generator = torch.Generator().manual_seed(_SEED)
    index_BN = torch.randint(count, (RESAMPLES, count), generator=generator)
    values_N = torch.tensor(window_values, dtype=torch.float64)
    if weights is None:
        return values_N[index_BN].mean(dim=1)
    weight_N = torch.tensor(weights, dtype=torch.float64)
    return (values_N * weight_N)[index_BN].sum(dim=1) / weight_N[index_BN].sum(dim=1)


def interval(means_B: Tensor) -> tuple[float, float]:
    """Percentile interval of COVERAGE."""
    tail = (1 - COVERAGE) / 2
    low, high = torch.quantile(means_B, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def perplexity_interval(window_nll: Sequence[float], weights: Sequence[float] | None = None) -> tuple[float, float]:
    """95 % interval of exp(mean loss), from resampled windows."""
    low, high = interval(resampled_means(window_nll, weights))
    return math.exp(low), math.exp(high)


def distinguishable(first_nll: Sequence[float], second_nll: Sequence[float], weights: Sequence[float] | None = None) -> bool:
    """Whether the paired 95 % interval of the mean difference excludes zero."""
    differences = [a - b for a, b in zip(first_nll, second_nll, strict=True)]
    if len(differences) < MIN_WINDOWS:
        return False
    low, high = interval(resampled_means(differences, weights))
    return low > 0 or high < 0


def shared_ranks(window_nll: Sequence[Sequence[float]], weights: Sequence[float] | None = None) -> list[int]:
    """Rank of every row, best 1. A row shares the rank of the best row it cannot be told from, so ranks can repeat: ties.

    A row that can be told from its group's best starts a group of its own, numbered by its position (1, 1, 3).
    """
    weighted = [list(map(operator.mul, row, weights or [1.0] * len(row))) for row in window_nll]
    order = sorted(range(len(window_nll)), key=lambda row: math.fsum(weighted[row]))
    ranks = [0] * len(window_nll)
    leader, rank = None, 0
    for position, row in enumerate(order, start=1):
        if leader is None or distinguishable(window_nll[row], window_nll[leader], weights):
            leader, rank = row, position
        ranks[row] = rank
    return ranks
