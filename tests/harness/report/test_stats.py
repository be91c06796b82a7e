import math
import random

import pytest

from harness.report.stats import distinguishable, interval, perplexity_interval, resampled_means, shared_ranks
from harness.report.summary import add_ranks


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
    assert not distinguishable([1.0], [1.0 + 1e-7])  # one window says nothing about its own spread
    with pytest.raises(ValueError):
        distinguishable([1.0], [1.0, 2.0])


def row(method, seed, cell, budget="3.25"):
    return {
        "method": method,
        "variant": "",
        "track": "data-free",
        "budget_bpw": budget,
        "seed": seed,
        "cell": cell,
        "status": "ok",
    }


def test_a_row_no_seed_can_change_is_ranked_among_those_of_the_first_seed():
    base = windows(3.0, 0.1)
    losses = {"r": {"p": [v + 1 for v in base]}, "a1": {"p": base}, "a2": {"p": [v + 2 for v in base]}}
    rows = [row("rtn", 0, "r"), row("a", 1, "a1"), row("a", 2, "a2")]
    add_ranks(rows, losses, ["p"], {}, unseeded={"r"})
    assert [r["rank_p"] for r in rows] == [2, 1, 2]


def test_long_articles_weigh_more():
    values, weights = [1.0, 2.0, 4.0], [10.0, 1.0, 1.0]
    low, high = interval(resampled_means(values, weights))
    assert low == 1.0 and 2 < high <= 4.0
    assert resampled_means(values, [3.0] * 3).tolist() == pytest.approx(resampled_means(values).tolist())
    worse_where_it_counts, better = [3.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]
    assert shared_ranks([worse_where_it_counts, better]) == [1, 1]
    assert shared_ranks([[3.0] * 4, better], [1000.0, 1, 1, 1]) == [2, 1]
