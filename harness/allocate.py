"""Choosing one configuration per layer so that a whole model fits a stored-bit budget."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from harness.ledger import Ledger, planned
from harness.model import Inventory
from methods.base import LayerConfig, Method


class BudgetError(ValueError):
    """No configuration of the method fits; the message says the least it reaches."""


@dataclass(frozen=True)
class Allocation:
    layers: dict[str, LayerConfig]
    ledger: Ledger


def candidates(method: Method, stock: Inventory) -> list[tuple[LayerConfig, Ledger]]:
    """Every configuration that all layers can take, with what the whole model would then store."""
    common: dict[LayerConfig, None] | None = None
    for layer in {(x.out_features, x.in_features): x for x in stock.layers}.values():
        own = dict.fromkeys(method.candidates(layer))
        common = own if common is None else {config: None for config in common if config in own}
    found = []
    for config in common or {}:
        plan = {layer.name: config for layer in stock.layers}
        found.append((config, planned(plan, stock.layers, stock.uncovered_bits, stock.weights)))
    return found


def uniform(method: Method, stock: Inventory, budget: Fraction | None) -> Allocation:
    """One configuration for every layer: the one the method prefers among those that fit.

    Raises BudgetError with the least the method reaches.
    """
    found = candidates(method, stock)
    fitting = [(c, ledger) for c, ledger in found if budget is None or not method.budgeted or ledger.fits(budget)]
    if not fitting:
        least = min((ledger.stored_bpw for _, ledger in found), default=float("inf"))
        raise BudgetError(f"{method.name} stores at least {least:.4f} bits per weight on this model")
    config, ledger = max(fitting, key=lambda item: method.preference(item[0], item[1].bits, item[1].weights))
    return Allocation({layer.name: config for layer in stock.layers}, ledger)
