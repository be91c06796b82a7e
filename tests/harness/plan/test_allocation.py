import itertools
import math
import random
import time
from fractions import Fraction

import pytest
import torch

from harness.ledger import FILL_TOLERANCE
from harness.model import BlockSpec, Inventory, inventory, read_config, skeleton
from harness.plan.allocation import BudgetError, mixed, require_mixable
from harness.plan.budgets import parse_budget
from harness.plan.costs import CostCache, considered, expected_costs
from harness.plan.knapsack import choose
from kernels.formats.layer import LayerConfig, LayerSpec
from methods import parse_method
from methods.base import Sensitivity


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
    monkeypatch.setattr("harness.plan.allocation._highs", lambda *_: None)
    picks, bound = choose(bits, costs, capacity)
    assert total(bits, picks) <= capacity
    assert bound <= total(costs, exact) * (1 + 1e-12) <= total(costs, picks)
    assert total(costs, picks) <= 1.2 * bound


@pytest.mark.parametrize("bits", ["1.9", "3.25", "5", "8", "12", "16"])
@pytest.mark.parametrize("name", ["rtn", "nf", "reallm"])
def test_any_budget_is_filled_as_far_as_the_method_reaches(name, bits):
    stock, method, budget = inventory(skeleton(read_config("smollm2-135m"))), parse_method(name), parse_budget(bits)
    try:
        require_mixable(method, stock, budget)
    except BudgetError:
        assert bits == "1.9" and name != "reallm"
        return
    # A cost that falls with every bit: the plan spends what it can.
    of_kind = {
        x.kind: {c: x.weights * 4.0 ** (-c.stored_bits(x).total / x.weights) for c in considered(method, x, budget)}
        for x in stock.blocks[0].layers
    }
    ledger = mixed(stock, budget, {x.name: of_kind[x.kind] for x in stock.layers}).ledger
    most = sum(max(c.stored_bits(x).total for c in method.mixed_candidates(x)) for x in stock.blocks[0].layers) * len(
        stock.blocks
    )
    assert (
        min(budget - FILL_TOLERANCE, Fraction(most, stock.weights))
        <= Fraction(ledger.stored_bits, stock.weights)
        <= budget
    )


def test_a_layer_no_token_reached_is_like_the_median_of_its_shape():
    model = torch.nn.ModuleDict({name: torch.nn.Linear(64, 64, bias=False) for name in "abcd"})
    layers = tuple(LayerSpec(name, name, 64, 64, False) for name in "abcd")
    stock = Inventory((BlockSpec("block", layers),))
    for layer in model.values():
        layer.weight.data = model["a"].weight.data
    measured = {
        name: Sensitivity(torch.full((64,), value), torch.ones(64))
        for name, value in (("a", 1.0), ("b", 2.0), ("c", 9.0))
    }
    costs = expected_costs(parse_method("rtn"), model, stock, Fraction(4), measured, seed=0)
    for config, cost in costs["d"].items():
        assert cost == pytest.approx(2 * costs["a"][config])


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


def test_a_sample_without_weight_is_no_sample():
    row = torch.zeros(400)
    row[50:60] = 1.0
    weight = torch.randn(400, 32)
    sample, seen = Sensitivity(row, torch.ones(32)).sample(weight)
    assert torch.equal(sample, weight) and seen.cost(sample) > 0


def test_estimates_are_kept_for_the_very_same_configurations(tmp_path):
    asked = []

    def costs(table, *configs):
        return table.costs("layer", configs, lambda: asked.append(configs) or [float(c["bits"]) for c in configs])

    two, three = (LayerConfig.of("uniform", bits=bits, group=64, offset="symmetric") for bits in (2, 3))
    table = CostCache(tmp_path / "costs.json")
    assert costs(table, two, three) == {two: 2.0, three: 3.0}
    table.save()
    again = CostCache(tmp_path / "costs.json")
    assert costs(again, two, three) == {two: 2.0, three: 3.0} and len(asked) == 1
    assert costs(again, three) == {three: 3.0} and len(asked) == 2
