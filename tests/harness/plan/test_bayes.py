"""The search of Bolaco against the integer programme, on made-up costs."""

import random
from fractions import Fraction

import pytest

from harness.ledger import FILL_TOLERANCE
from harness.model import Inventory, inventory, read_config, skeleton
from harness.plan import bayes
from harness.plan.allocation import mixed
from harness.plan.costs import considered
from methods import parse_method
from tests.helpers import run_harness


def costs_of(stock: Inventory, budget: Fraction) -> dict[str, dict]:
    """Costs that fall with every bit, by a factor and from a height of the layer's own."""
    draw, method = random.Random(0), parse_method("bolaco")
    found = {}
    for layer in stock.layers:
        height, base = draw.uniform(0.1, 10.0), draw.uniform(1.5, 4.0)
        found[layer.name] = {
            c: height * base ** (-c.stored_bits(layer).total / layer.weights) for c in considered(method, layer, budget)
        }
    return found


def test_the_search_fills_the_budget_and_does_not_beat_the_programme(monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.setattr(bayes, "TRIALS", 15)
    stock = Inventory(inventory(skeleton(read_config("smollm2-135m"))).blocks[:4])
    budget = Fraction(6)
    costs = costs_of(stock, budget)
    best, found, again = (
        mixed(stock, budget, costs),
        bayes.searched(stock, budget, costs, 0),
        bayes.searched(stock, budget, costs, 0),
    )
    assert budget - FILL_TOLERANCE <= Fraction(found.ledger.stored_bits, stock.weights) <= budget
    assert best.bound <= best.predicted <= found.predicted and found.gap > best.gap
    assert found.layers == again.layers
    offers = {layer.name: bayes._front(layer.name, stock, costs) for layer in stock.layers}
    alike = {layer.name: float(budget) * layer.weights for layer in stock.layers}
    assert found.predicted < bayes._cost(offers, bayes._within(offers, alike))  # the same bits for every matrix


def test_without_its_package_a_cell_is_refused_and_says_what_to_install(monkeypatch):
    monkeypatch.setattr(bayes, "find_spec", lambda name: None)
    done = run_harness("plan", "--methods", "bolaco", "--bits", "6", "--allocate", "bayes")
    assert "pip install 'optuna>=4'" in done.stdout + done.stderr
