import math
import random

import pytest

from harness.stats import distinguishable, interval, perplexity_interval, resampled_means, shared_ranks


def windows(mean: float, spread: float, count: int = 40, seed: int = 0) -> list[float]:
    source = random.Random(seed)
    return [source.gauss(mean, spread) for _ in range(count)]


def test_the_interval_covers_the_truth_as_often_as_it_says():
    hits = 0
    for seed in range(200):
        low, high = interval(resampled_means(windows(3.0, 0.5, seed=seed)))
        hits += low <= 3.0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_pairing_sees_a_small_difference_that_intervals_hide():
    base = windows(3.0, 0.5)
    better = [value - 0.01 + noise for value, noise in zip(base, windows(0.0, 0.01, seed=9), strict=True)]
    assert perplexity_interval(base)[0] < math.exp(sum(better) / 40) < perplexity_interval(base)[1]
    assert distinguishable(base, better) and not distinguishable(base, base)


def test_ranks_are_shared_and_skip():
    base = windows(3.0, 0.5)
    worse = [value + 0.2 for value in base]
    noise = [value + n for value, n in zip(base, windows(0.0, 0.05, seed=3), strict=True)]
    assert shared_ranks([worse, base, noise]) == [3, 1, 1]
    assert shared_ranks([base]) == [1]


def test_resampling_is_the_same_everywhere():
    assert resampled_means([1.0, 2.0, 3.0])[:3].tolist() == resampled_means([1.0, 2.0, 3.0])[:3].tolist()
    assert interval(resampled_means([2.0] * 5)) == (2.0, 2.0)
    with pytest.raises(ValueError):
        distinguishable([1.0], [1.0, 2.0])
