"""Which differences are real: bootstrap intervals over windows, paired between rows, and ranks that methods may share.

The unit of resampling is the scored window (a block of consecutive tokens): tokens of one window depend on each other,
windows of the same text spread over it much less. Two rows of one protocol scored the same windows, so their losses are
compared window by window; what makes a window hard for everyone cancels."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 10_000
COVERAGE = 0.95
MIN_WINDOWS = 3  # fewer say nothing about their own spread
_SEED = 20_260_101  # the resamples are part of the protocol, not of a run


def resampled_means(window_values: Sequence[float], weights: Sequence[float] | None = None) -> Tensor:
    """Means of RESAMPLES draws with replacement; the same draws for every row with as many windows, so differences
    pair. `weights`: of the windows, if they differ (articles of unequal length)."""
    index_QN = _draws(len(window_values))
    values_N = torch.tensor(window_values, dtype=torch.float64)
    if weights is None:
        return values_N[index_QN].mean(dim=1)
    weight_N = torch.tensor(weights, dtype=torch.float64)
    return (values_N * weight_N)[index_QN].sum(dim=1) / weight_N[index_QN].sum(dim=1)


@lru_cache(maxsize=4)
def _draws(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(count, (RESAMPLES, count), generator=generator)


def interval(means_Q: Tensor) -> tuple[float, float]:
    """Percentile interval of COVERAGE."""
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(means_Q.numpy(), [tail, 1 - tail]).tolist()  # torch sorts all of them
    return low, high


def perplexity_interval(window_nll: Sequence[float], weights: Sequence[float] | None = None) -> tuple[float, float]:
    """95 % interval of exp(mean loss), from resampled windows."""
    low, high = interval(resampled_means(window_nll, weights))
    return math.exp(low), math.exp(high)


def distinguishable(
    first_nll: Sequence[float], second_nll: Sequence[float], weights: Sequence[float] | None = None
) -> bool:
    """Whether the paired 95 % interval of the mean difference excludes zero."""
    differences = [a - b for a, b in zip(first_nll, second_nll, strict=True)]
    if len(differences) < MIN_WINDOWS:
        return False
    low, high = interval(resampled_means(differences, weights))
    return low > 0 or high < 0


def shared_ranks(window_nll: Sequence[Sequence[float]], weights: Sequence[float] | None = None) -> list[int]:
    """Rank of every row, best 1. A row shares the rank of the best row it cannot be told from, so ranks can repeat:
    ties.

    A row that can be told from its group's best starts a group of its own, numbered by its position (1, 1, 3).
    """
    totals = [math.fsum(map(operator.mul, row, weights or [1.0] * len(row))) for row in window_nll]
    return _ranks(totals, lambda row, leader: distinguishable(window_nll[row], window_nll[leader], weights))


def _ranks(totals: Sequence[float], differ: Callable[[int, int], bool]) -> list[int]:
    """`shared_ranks` of rows by their totals, the least first, when `differ(row, leader)` tells rows apart."""
    order = sorted(range(len(totals)), key=totals.__getitem__)
    ranks = [0] * len(totals)
    leader, rank = None, 0
    for position, row in enumerate(order, start=1):
        if leader is None or differ(row, leader):
            leader, rank = row, position
        ranks[row] = rank
    return ranks


# Items of tasks. Each is right or wrong, so a mean is known from counts, and so is a resampled one: drawing n items
# with replacement is drawing the counts of -1, 0 and 1 from a multinomial distribution. That is the bootstrap itself,
# without ten thousand draws of ten thousand indices. Items of different tasks are drawn apart, and a mean over tasks
# weighs every task alike.

Correct = Sequence[Sequence[int]]  # task -> item -> 1 if right, else 0


def resampled_shares(items: Sequence[int], seed: int = _SEED) -> Tensor:
    """Means of RESAMPLES draws with replacement from items that are -1, 0 or 1 [RESAMPLES]."""
    count = len(items)
    plus, minus = sum(item > 0 for item in items) / count, sum(item < 0 for item in items) / count
    drawn_QK = np.random.default_rng(seed).multinomial(count, [plus, minus, max(0.0, 1 - plus - minus)], RESAMPLES)
    return torch.from_numpy((drawn_QK[:, 0] - drawn_QK[:, 1]) / count)


def accuracy_interval(correct: Correct) -> tuple[float, float]:
    """95 % interval of the accuracy of one task, or of its mean over several."""
    return interval(_mean_over_tasks(correct))


def accuracy_difference(first: Correct, second: Correct) -> tuple[float, float, float]:
    """(difference, and its paired 95 % interval) of two rows' accuracies on the same items of one task, or of their
    means over several."""
    differences = [[a - b for a, b in zip(one, other, strict=True)] for one, other in zip(first, second, strict=True)]
    return (
        math.fsum(sum(d) / len(d) for d in differences) / len(differences),
        *interval(_mean_over_tasks(differences)),
    )


def accuracy_ranks(correct: Sequence[Correct]) -> list[int]:
    """`shared_ranks` of rows by accuracy, the highest first; rows whose paired interval includes no difference share a
    rank."""
    wrong = [-math.fsum(sum(items) / len(items) for items in row) for row in correct]

    def differ(row: int, leader: int) -> bool:
        if min(map(len, correct[row])) < MIN_WINDOWS:
            return False
        _, low, high = accuracy_difference(correct[row], correct[leader])
        return low > 0 or high < 0

    return _ranks(wrong, differ)


def _mean_over_tasks(items: Correct) -> Tensor:
    # Different draws for every task: with the same, two tasks of one size would move together.
    return torch.stack([resampled_shares(task, seed) for seed, task in enumerate(items, start=_SEED)]).mean(dim=0)
