"""Expected costs of configurations, and the cache that keeps them."""

from fractions import Fraction

import pytest
import torch

from harness.model import BlockSpec, Inventory
from harness.plan.costs import CostCache, expected_costs
from kernels.formats.layer import LayerConfig, LayerSpec
from methods import parse_method
from methods.base import Sensitivity


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
