"""Choosing a configuration per layer so that a whole model fits a stored-bit budget: one service for every method.

`uniform` gives all layers the same configuration. `mixed` minimises the predicted divergence (harness.plan.sensitivity)
over all choices, a multiple-choice knapsack (harness.plan.knapsack) in which a table that layers share is a fixed
charge."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from harness.ledger import Ledger, planned
from harness.model import Inventory
from harness.plan.knapsack import choose, lagrangian, require_finite
from kernels.formats.layer import LayerConfig, LayerSpec, shared_bits
from methods.base import Method

MODES = ("ilp", "bayes", "uniform")
MIXED = ("ilp", "bayes")  # give every matrix its own configuration, from estimates that need the weights


class BudgetError(ValueError):
    """No configuration of the method fits; the message says the least it reaches."""


@dataclass(frozen=True)
class Allocation:
    """Which configuration every layer gets, what that stores, and what it is expected to cost."""

    layers: dict[str, LayerConfig]
    ledger: Ledger
    predicted: float | None = None  # cost of the whole: nats per token for a calibrated method
    bound: float | None = None  # no allocation of the considered configurations costs less under the budget

    @property
    def gap(self) -> float | None:
        """Share of the cost by which the best possible allocation may be better."""
        if self.predicted is None or self.bound is None:
            return None
        return max(0.0, self.predicted - self.bound) / self.predicted if self.predicted > 0 else 0.0


def common_candidates(method: Method, stock: Inventory) -> list[tuple[dict[str, LayerConfig], Ledger]]:
    """Every allocation of one configuration for all layers (up to what `Method.family` leaves out), and what a whole
    model then stores."""
    representatives = alike(stock)
    own = {
        key: {method.family(config): config for config in method.candidates(layer)}
        for key, layer in representatives.items()
    }
    found = []
    for family in next(iter(own.values())):
        if all(family in of_sort for of_sort in own.values()):
            configs = {layer.name: own[sort_of(layer)][family] for layer in stock.layers}
            found.append((configs, planned(configs, stock.layers, stock.uncovered_bits, stock.weights)))
    return found


def uniform(method: Method, stock: Inventory, budget: Fraction | None) -> Allocation:
    """One configuration for every layer: the one the method prefers among those that fit.

    Raises BudgetError with the least the method reaches.
    """
    found = common_candidates(method, stock)
    fitting = [
        (configs, ledger) for configs, ledger in found if budget is None or not method.budgeted or ledger.fits(budget)
    ]
    if not fitting:
        least = min((ledger.stored_bpw for _, ledger in found), default=math.inf)
        raise _least(method, stock, least)
    first = stock.layers[0].name
    configs, ledger = max(fitting, key=lambda item: method.preference(item[0][first], item[1].bits, item[1].weights))
    return Allocation(configs, ledger)


def require_mixable(method: Method, stock: Inventory, budget: Fraction) -> None:
    """Raises BudgetError when even the smallest configuration of every layer, with no table to share, is too much
    together."""
    least = {
        key: min(
            (
                config.stored_bits(x).total
                for config in (*method.candidates(x), *method.mixed_candidates(x))
                if not config.table_key
            ),
            default=math.inf,
        )
        for key, x in alike(stock).items()
    }
    bits = sum(least[sort_of(layer)] for layer in stock.layers) + stock.uncovered_bits
    if bits > budget * stock.weights:
        raise _least(method, stock, bits / stock.weights)


def mixed(stock: Inventory, budget: Fraction, costs: Mapping[str, Mapping[LayerConfig, float]]) -> Allocation:
    """The allocation of least total cost under the budget. `costs` holds every layer's candidates; the bound is over
    these."""
    capacity = math.floor(budget * stock.weights) - stock.uncovered_bits
    names = [layer.name for layer in stock.layers]
    require_finite(own.values() for own in costs.values())
    offers, floor = _without_idle_tables(stock.layers, [costs[name] for name in names], capacity)
    bits = [
        [config.stored_bits(layer).total for config in own] for layer, own in zip(stock.layers, offers, strict=True)
    ]
    room = capacity - shared_bits(config for own in offers for config in own).total
    offer_costs = [[costs[name][config] for config in own] for name, own in zip(names, offers, strict=True)]
    picks, bound = choose(bits, offer_costs, room)
    configs = {name: own[pick] for name, own, pick in zip(names, offers, picks, strict=True)}
    predicted = math.fsum(costs[name][config] for name, config in configs.items())
    ledger = planned(configs, stock.layers, stock.uncovered_bits, stock.weights)
    return Allocation(configs, ledger, predicted, bound if floor is None else floor)


def _without_idle_tables(
    layers: Sequence[LayerSpec], costs: Sequence[Mapping[LayerConfig, float]], capacity: int
) -> tuple[list[list[LayerConfig]], float | None]:
    """Every layer's configurations less those whose shared table is not worth its bits, and a bound on the cost of any
    allocation with any tables (None where none are on offer).

    A table is a fixed charge. At the price of a bit (the Lagrange multiplier) it is worth what its users save on their
    own best choices without it; the least worth is dropped first, until all that are left save more than they take."""
    configs = [_by_size(own, layer) for layer, own in zip(layers, costs, strict=True)]
    keys = [[config.table_key for config in own] for own in configs]
    charge = {c.table_key: shared_bits([c]).total for own in configs for c in own if c.table_key}
    if not charge:
        return configs, None
    bits = [np.array([c.stored_bits(layer).total for c in own]) for layer, own in zip(layers, configs, strict=True)]
    cost = [np.array([own[c] for c in kept]) for own, kept in zip(costs, configs, strict=True)]
    if sum(int(b.min()) for b in bits) > capacity:
        raise ValueError("no choice fits the budget")
    uses = {key: [np.array([k == key for k in own]) for own in keys] for key in charge}
    floor = lagrangian(bits, cost, capacity)[1]  # as if tables took no bits: nothing can be cheaper
    gone = [np.zeros(len(own), dtype=bool) for own in keys]
    while charge:
        spare = capacity - sum(charge.values())
        if sum(int(b[~g].min()) for b, g in zip(bits, gone, strict=True)) > spare:
            worst = max(charge, key=charge.__getitem__)
        else:
            left = ([values[~g] for values, g in zip(rows, gone, strict=True)] for rows in (bits, cost))
            price = lagrangian(next(left), next(left), spare)[2]
            reduced = [np.where(g, np.inf, c + price * b) for b, c, g in zip(bits, cost, gone, strict=True)]
            # What its users save on their best choice without it, less its own bits.
            worth = {
                key: math.fsum(
                    np.where(use, np.inf, r).min() - r.min()
                    for use, r in zip(uses[key], reduced, strict=True)
                    if use.any()
                )
                - price * charge[key]
                for key in charge
            }
            worst = min(worth, key=worth.__getitem__)
            if worth[worst] >= 0:
                break
        del charge[worst]
        gone = [g | use for g, use in zip(gone, uses[worst], strict=True)]
    return [[c for c, out in zip(own, g, strict=True) if not out] for own, g in zip(configs, gone, strict=True)], floor


def _by_size(configs: Iterable[LayerConfig], layer: LayerSpec) -> list[LayerConfig]:
    """The smallest first."""
    return sorted(configs, key=lambda config: config.stored_bits(layer).total)


def sort_of(layer: LayerSpec) -> tuple[str, int, int]:
    """What a method's candidates may depend on."""
    return layer.role, layer.out_features, layer.in_features


def alike(stock: Inventory) -> dict[tuple[str, int, int], LayerSpec]:
    """One layer of every sort."""
    return {sort_of(layer): layer for layer in stock.layers}


def _least(method: Method, stock: Inventory, bpw: float) -> BudgetError:
    if math.isinf(bpw):
        return BudgetError(f"{method.name} has no configuration with these options for a layer of this model")
    why = f": {stock.uncovered_note}" if stock.uncovered else ""
    return BudgetError(f"{method.name} stores at least {bpw:.4f} bits per weight on this model{why}")
