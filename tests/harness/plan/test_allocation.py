"""Any budget is filled as far as a method reaches."""

from fractions import Fraction

import pytest

from harness.ledger import FILL_TOLERANCE
from harness.model import Inventory, inventory, read_config, skeleton
from harness.plan.allocation import BudgetError, mixed, require_mixable
from harness.plan.budgets import parse_budget
from harness.plan.costs import considered
from methods import parse_method


@pytest.mark.parametrize("bits", ["1.9", "3.25", "5", "8", "12", "16"])
@pytest.mark.parametrize("name", ["rtn", "nf", "reallm"])
def test_any_budget_is_filled_as_far_as_the_method_reaches(name, bits):
    # Eight blocks: fewer layers leave less to fill up with, and the solver takes seconds for thirty.
    stock = Inventory(inventory(skeleton(read_config("smollm2-135m"))).blocks[:8])
    method, budget = parse_method(name), parse_budget(bits)
    try:
        require_mixable(method, stock, budget)
    except BudgetError:
        assert bits == "1.9" and name != "reallm"
        return
    # A cost that falls with every bit: the plan spends what it can.
    of_role = {
        x.role: {c: x.weights * 4.0 ** (-c.stored_bits(x).total / x.weights) for c in considered(method, x, budget)}
        for x in stock.blocks[0].layers
    }
    ledger = mixed(stock, budget, {x.name: of_role[x.role] for x in stock.layers}).ledger
    most = sum(max(c.stored_bits(x).total for c in method.mixed_candidates(x)) for x in stock.blocks[0].layers) * len(
        stock.blocks
    )
    assert (
        min(budget - FILL_TOLERANCE, Fraction(most, stock.weights))
        <= Fraction(ledger.stored_bits, stock.weights)
        <= budget
    )
