"""The multiple-choice knapsack against brute force."""

import itertools
import math
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.plan.knapsack import choose


def random_problem(layers: int, configs: int, seed: int) -> tuple[list[list[int]], list[list[float]]]:
    """Sizes in whole words and costs that fall with size, by and large, as errors do."""
    source = random.Random(seed)
    bits = [[32 * source.randint(10, 60) for _ in range(configs)] for _ in range(layers)]
    costs = [
        [2 ** (-b / 300) * source.lognormvariate(0, 0.7) * 10 ** source.uniform(-6, 0) for b in row] for row in bits
    ]
    return bits, costs


def total(rows, picks):
    return sum(row[pick] for row, pick in zip(rows, picks, strict=True))


BITS = st.integers(0, 40)
# Few different costs, so that many are equal, or any at all.
COSTS = st.one_of(st.integers(0, 5).map(float), st.floats(1e-3, 1e3))
ROWS = st.lists(st.lists(st.tuples(BITS, COSTS), min_size=1, max_size=5), min_size=1, max_size=5)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(rows=ROWS, tenths=st.integers(-1, 11))
def test_a_choice_is_the_cheapest_that_fits(rows, tenths):
    """Against all choices there are: at any capacity, too small ones included, with equal sizes and equal costs."""
    bits, costs = ([[pair[which] for pair in row] for row in rows] for which in (0, 1))
    least, most = sum(map(min, bits)), sum(map(max, bits))
    capacity = least + (most - least) * tenths // 10
    fitting = [p for p in itertools.product(*map(range, map(len, rows))) if total(bits, p) <= capacity]
    if not fitting:
        with pytest.raises(ValueError, match="no choice fits"):
            choose(bits, costs, capacity)
        return
    best = min(total(costs, picks) for picks in fitting)
    picks, bound = choose(bits, costs, capacity)
    assert total(bits, picks) <= capacity
    assert total(costs, picks) == pytest.approx(best, rel=2e-6)
    assert bound <= best * (1 + 1e-12) + 1e-12


@pytest.mark.parametrize("seed", range(30))
def test_the_plan_is_the_best_there_is(seed):
    bits, costs = random_problem(layers=5, configs=5, seed=seed)
    least, most = sum(map(min, bits)), sum(map(max, bits))
    capacity = least + (most - least) * seed // 30
    every = itertools.product(range(5), repeat=5)
    best = min(total(costs, picks) for picks in every if total(bits, picks) <= capacity)
    picks, bound = choose(bits, costs, capacity)
    assert total(bits, picks) <= capacity
    assert total(costs, picks) == pytest.approx(best, rel=2e-6)
    assert bound <= best * (1 + 1e-12)


def test_a_whole_model_is_planned_in_seconds_and_never_over_budget():
    bits, costs = random_problem(layers=224, configs=100, seed=0)
    capacity = sum(sorted(row)[30] for row in bits) + 1  # no multiple of any size
    start = time.perf_counter()
    picks, bound = choose(bits, costs, capacity)
    assert time.perf_counter() - start < 30  # 1 s on a quiet machine
    assert total(bits, picks) <= capacity
    assert 0 <= total(costs, picks) - bound <= 1e-3 * total(costs, picks)


def test_the_lagrangian_bound_needs_no_solver(monkeypatch):
    bits, costs = random_problem(layers=60, configs=20, seed=1)
    capacity = sum(sorted(row)[8] for row in bits)
    exact, _ = choose(bits, costs, capacity)
    monkeypatch.setattr("harness.plan.knapsack._highs", lambda *_: None)
    picks, bound = choose(bits, costs, capacity)
    assert total(bits, picks) <= capacity
    assert bound <= total(costs, exact) * (1 + 1e-12) <= total(costs, picks)
    assert total(costs, picks) <= 1.2 * bound


def test_edges():
    assert choose([[10, 20]], [[2.0, 1.0]], 20) == ([1], 1.0)
    assert choose([[10, 20]], [[2.0, 1.0]], 10)[0] == [0]
    assert choose([[10, 20], [5, 5]], [[1.0, 2.0], [3.0, 3.0]], 100)[0] == [0, 0]  # larger and worse is never taken
    assert choose([[1], [1]], [[0.0], [0.0]], 2) == ([0, 0], 0.0)
    with pytest.raises(ValueError, match="no choice fits"):
        choose([[10, 20]], [[2.0, 1.0]], 9)
    for cost in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not a finite number"):
            choose([[10, 20]], [[cost, 1.0]], 20)
