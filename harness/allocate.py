"""Choosing a configuration per layer so that a whole model fits a stored-bit budget: one service for every method.

`uniform` gives all layers the same configuration. `mixed` minimises the predicted divergence (harness.sensitivity) over all
choices, a multiple-choice knapsack:

    min sum_l cost_l(c_l)   subject to   sum_l bits_l(c_l) <= budget * weights

solved as an integer programme by HiGHS. Two lower bounds say how far from the optimum a plan can be: the solver's own, and the
Lagrangian dual, computed here without it (Kellerer, Pferschy, Pisinger, Knapsack Problems, ch. 11).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from torch import Tensor, nn

from harness.files import digest, read_json, write_json
from harness.ledger import Ledger, planned
from harness.model import Inventory
from methods.base import LayerConfig, LayerSpec, Method, Sensitivity, layer_seed, shared_bits

MODES = ("ilp", "uniform")
REACH = 2.0  # bits per weight from the budget beyond which a configuration is not considered for any layer
TOLERANCE = 1e-6  # of the solver, relative to the cost of the plan
SAVE_SECONDS = 20.0  # between two writes of a table of costs
NODES = 20_000  # of the branch-and-bound tree: a limit that cuts every machine off at the same plan, as seconds would not


class BudgetError(ValueError):
    """No configuration of the method fits; the message says the least it reaches."""


@dataclass(frozen=True)
class Allocation:
    layers: dict[str, LayerConfig]
    ledger: Ledger
    predicted: float | None = None  # cost of the plan: nats per token for a calibrated method
    bound: float | None = None  # no plan of the considered configurations costs less under the budget

    @property
    def gap(self) -> float | None:
        """Share of the cost by which the best possible plan may be better."""
        if self.predicted is None or self.bound is None:
            return None
        return max(0.0, self.predicted - self.bound) / self.predicted if self.predicted > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        layers = {name: config.to_json() for name, config in self.layers.items()}
        return {"layers": layers, "predicted": self.predicted, "bound": self.bound, "gap": self.gap}


def common_candidates(method: Method, stock: Inventory) -> list[tuple[dict[str, LayerConfig], Ledger]]:
    """Every plan of one configuration for all layers (up to what `Method.family` leaves out), and what a whole model then stores."""
    alike = _alike(stock)
    own = {key: {method.family(config): config for config in method.candidates(layer)} for key, layer in alike.items()}
    found = []
    for family in next(iter(own.values())):
        if all(family in configs for configs in own.values()):
            plan = {layer.name: own[_sort(layer)][family] for layer in stock.layers}
            found.append((plan, planned(plan, stock.layers, stock.uncovered_bits, stock.weights)))
    return found


def uniform(method: Method, stock: Inventory, budget: Fraction | None) -> Allocation:
    """One configuration for every layer: the one the method prefers among those that fit.

    Raises BudgetError with the least the method reaches.
    """
    found = common_candidates(method, stock)
    fitting = [(plan, ledger) for plan, ledger in found if budget is None or not method.budgeted or ledger.fits(budget)]
    if not fitting:
        least = min((ledger.stored_bpw for _, ledger in found), default=math.inf)
        raise _least(method, least)
    first = stock.layers[0].name
    plan, ledger = max(fitting, key=lambda item: method.preference(item[0][first], item[1].bits, item[1].weights))
    return Allocation(plan, ledger)


def require_mixable(method: Method, stock: Inventory, budget: Fraction) -> None:
    """Raises BudgetError when even the smallest configuration of every layer, with no table to share, is too much together."""
    least = {
        key: min(
            (config.stored_bits(x).total for config in (*method.candidates(x), *method.mixed_candidates(x)) if not config.table_key),
            default=math.inf,
        )
        for key, x in _alike(stock).items()
    }
    bits = sum(least[_sort(layer)] for layer in stock.layers) + stock.uncovered_bits
    if bits > budget * stock.weights:
        raise _least(method, bits / stock.weights)


def considered(method: Method, layer: LayerSpec, room: Fraction) -> list[LayerConfig]:
    """Configurations worth an estimate for layers of this kind and shape: near `room` bits per weight, or near the most the method mixes if
    that is less, and always the smallest."""
    mixable = list(dict.fromkeys(method.mixed_candidates(layer)))
    size = {config: config.stored_bits(layer).total for config in (*mixable, *method.candidates(layer))}
    least = min((config for config in size if not config.table_key), key=size.__getitem__)
    centre = min(room * layer.weights, max((size[config] for config in mixable), default=size[least]))
    near = [config for config in mixable if abs(size[config] - centre) <= REACH * layer.weights]
    return near if least in near else [*near, least]


def expected_costs(
    method: Method,
    model: nn.Module,
    stock: Inventory,
    budget: Fraction,
    measured: Mapping[str, Sensitivity],
    seed: int,
    progress: Callable[[int, int], None] = lambda *_: None,
    known: CostTable | None = None,
) -> dict[str, dict[LayerConfig, float]]:
    """Predicted divergence of every candidate of every layer. A layer that no measured token reached (an expert, say) is taken to
    matter as much as the median layer of its shape, or of all. What `known` holds is not estimated again, and what is new is added."""
    costs = {}
    known = known or CostTable(None)
    room = (budget * stock.weights - stock.uncovered_bits) / sum(layer.weights for layer in stock.layers)
    configs_of = {key: considered(method, layer, room) for key, layer in _alike(stock).items()}
    for index, layer in enumerate(stock.layers):
        weight_OI = model.get_submodule(layer.name).weight.detach().float()
        sensitivity = measured.get(layer.name) or _median(measured, weight_OI)
        configs = configs_of[_sort(layer)]
        estimate = partial(method.expected_costs, weight_OI, sensitivity, layer, configs, layer_seed(seed, layer.name))
        costs[layer.name] = known.costs(layer.name, configs, estimate)
        progress(index + 1, len(stock.layers))
    known.save()
    return costs


class CostTable:
    """Estimates kept in a file, so that another budget, or the next attempt, finds them. They are found for the same configurations alone:
    a method may estimate several together, and a plan must not depend on what was asked for before."""

    def __init__(self, path: Path | None) -> None:
        self.path, self._saved = path, time.monotonic()
        self._costs: dict[str, list[float]] = read_json(path) if path and path.exists() else {}

    def costs(self, layer: str, configs: Sequence[LayerConfig], estimate: Callable[[], list[float]]) -> dict[LayerConfig, float]:
        key = digest([layer, [str(config) for config in configs]])[:24]
        if key not in self._costs:
            self._costs[key] = estimate()
            if time.monotonic() - self._saved > SAVE_SECONDS:
                self.save()
        return dict(zip(configs, self._costs[key], strict=True))

    def save(self) -> None:
        if self.path:
            write_json(self.path, self._costs)
            self._saved = time.monotonic()


def _median(measured: Mapping[str, Sensitivity], weight_OI: Tensor) -> Sensitivity:
    shape = tuple(weight_OI.shape)
    alike = [s for s in measured.values() if (len(s.row_O), len(s.column_I)) == shape] or list(measured.values())
    row, column = (
        median(float(vector.mean()) for vector in vectors) for vectors in zip(*((s.row_O, s.column_I) for s in alike), strict=True)
    )
    return Sensitivity(weight_OI.new_full(shape[:1], row), weight_OI.new_full(shape[1:], column))


def mixed(stock: Inventory, budget: Fraction, costs: Mapping[str, Mapping[LayerConfig, float]]) -> Allocation:
    """The plan of least total cost under the budget. `costs` holds every layer's candidates; the bound is over these."""
    capacity = math.floor(budget * stock.weights) - stock.uncovered_bits
    names = [layer.name for layer in stock.layers]
    _require_finite(own.values() for own in costs.values())
    configs, floor = _without_idle_tables(stock.layers, [costs[name] for name in names], capacity)
    bits = [[config.stored_bits(layer).total for config in own] for layer, own in zip(stock.layers, configs, strict=True)]
    room = capacity - shared_bits(config for own in configs for config in own).total
    picks, bound = choose(bits, [[costs[name][config] for config in own] for name, own in zip(names, configs, strict=True)], room)
    plan = {name: own[pick] for name, own, pick in zip(names, configs, picks, strict=True)}
    predicted = math.fsum(costs[name][config] for name, config in plan.items())
    ledger = planned(plan, stock.layers, stock.uncovered_bits, stock.weights)
    return Allocation(plan, ledger, predicted, bound if floor is None else floor)


def _without_idle_tables(
    layers: Sequence[LayerSpec], costs: Sequence[Mapping[LayerConfig, float]], capacity: int
) -> tuple[list[list[LayerConfig]], float | None]:
    """Every layer's configurations less those whose shared table is not worth its bits, and a bound on the cost of any plan with any
    tables (None where none are on offer).

    A table is a fixed charge. At the price of a bit (the Lagrange multiplier) it is worth what its users save on their own best
    choices without it; the least worth is dropped first, until all that are left save more than they take.
    """
    configs = [sorted(own, key=lambda c, layer=layer: c.stored_bits(layer).total) for layer, own in zip(layers, costs, strict=True)]
    keys = [[config.table_key for config in own] for own in configs]
    charge = {c.table_key: shared_bits([c]).total for own in configs for c in own if c.table_key}
    if not charge:
        return configs, None
    bits = [np.array([c.stored_bits(layer).total for c in own]) for layer, own in zip(layers, configs, strict=True)]
    cost = [np.array([own[c] for c in kept]) for own, kept in zip(costs, configs, strict=True)]
    if sum(int(b.min()) for b in bits) > capacity:
        raise ValueError("no choice fits the budget")
    uses = {key: [np.array([k == key for k in own]) for own in keys] for key in charge}
    floor = _lagrangian(bits, cost, capacity)[1]  # as if tables took no bits: nothing can be cheaper
    gone = [np.zeros(len(own), dtype=bool) for own in keys]
    while charge:
        spare = capacity - sum(charge.values())
        if sum(int(b[~g].min()) for b, g in zip(bits, gone, strict=True)) > spare:
            worst = max(charge, key=charge.__getitem__)
        else:
            left = [[values[~g] for values, g in zip(rows, gone, strict=True)] for rows in (bits, cost)]
            price = _lagrangian(*left, spare)[2]
            reduced = [np.where(g, np.inf, c + price * b) for b, c, g in zip(bits, cost, gone, strict=True)]
            # What its users save on their best choice without it, less its own bits.
            worth = {
                key: math.fsum(np.where(use, np.inf, r).min() - r.min() for use, r in zip(uses[key], reduced, strict=True) if use.any())
                - price * charge[key]
                for key in charge
            }
            worst = min(worth, key=worth.__getitem__)
            if worth[worst] >= 0:
                break
        del charge[worst]
        gone = [g | use for g, use in zip(gone, uses[worst], strict=True)]
    return [[c for c, out in zip(own, g, strict=True) if not out] for own, g in zip(configs, gone, strict=True)], floor


def choose(bits: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], capacity: int) -> tuple[list[int], float]:
    """One index per row, least total cost within `capacity` bits, and a lower bound on that cost.

    Raises ValueError when nothing fits, or a cost is not a number.
    """
    _require_finite(costs)
    fronts = [_pareto(b, c) for b, c in zip(bits, costs, strict=True)]
    spare = capacity - sum(row[front[0]] for row, front in zip(bits, fronts, strict=True))
    if spare < 0:
        raise ValueError("no choice fits the budget")
    more = [np.array([row[i] - row[front[0]] for i in front]) for row, front in zip(bits, fronts, strict=True)]  # bits over the least
    cost = [np.array([row[i] for i in front]) for row, front in zip(costs, fronts, strict=True)]
    picks, bound, price = _lagrangian(more, cost, spare)
    if _total(cost, picks) > bound:
        solved = _highs(more, cost, spare, _in_question(more, cost, price, _total(cost, picks) - bound), _total(cost, picks))
        if solved is not None:
            bound = max(bound, solved[1])
            picks = min(picks, solved[0], key=lambda p: _total(cost, p))
    assert _total(more, picks) <= spare
    return [front[pick] for front, pick in zip(fronts, picks, strict=True)], bound


def _require_finite(costs: Iterable[Iterable[float]]) -> None:
    if not all(math.isfinite(cost) for row in costs for cost in row):
        raise ValueError("an expected error is not a finite number: the model overflows on the calibration text")


def _pareto(bits: Sequence[int], costs: Sequence[float]) -> list[int]:
    """Indices by rising bits and strictly falling cost; the others are never part of a best plan."""
    front: list[int] = []
    for index in sorted(range(len(bits)), key=lambda i: (bits[i], costs[i])):
        if not front or costs[index] < costs[front[-1]]:
            front.append(index)
    return front


def _total(rows: Sequence[np.ndarray], picks: Sequence[int]) -> float:
    return math.fsum(row[pick].item() for row, pick in zip(rows, picks, strict=True))


def _lagrangian(bits: Sequence[np.ndarray], cost: Sequence[np.ndarray], spare: int) -> tuple[list[int], float, float]:
    """(a feasible choice, the dual bound max over price >= 0 of sum min(cost + price * bits) - price * spare, that price)."""

    def priced(price: float) -> list[int]:
        return [int(np.argmin(c + price * b)) for b, c in zip(bits, cost, strict=True)]  # ties: fewer bits

    def dual(price: float) -> float:
        return math.fsum(float(np.min(c + price * b)) for b, c in zip(bits, cost, strict=True)) - price * spare

    free = priced(0.0)
    if _total(bits, free) <= spare:
        return free, dual(0.0), 0.0
    low, high = 0.0, 1.0
    while _total(bits, priced(high)) > spare:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if _total(bits, priced(middle)) <= spare else (middle, high)
    best = max(low, high, key=dual)
    return priced(high), dual(best), best


def _in_question(bits: Sequence[np.ndarray], cost: Sequence[np.ndarray], price: float, gap: float) -> list[np.ndarray]:
    """Indices per row that can still be in a better choice: any other costs, at this price, more than the gap there is."""
    reduced = [c + price * b for b, c in zip(bits, cost, strict=True)]
    return [np.flatnonzero(r - r.min() <= gap * (1 + 1e-9)) for r in reduced]


def _highs(
    bits: Sequence[np.ndarray], cost: Sequence[np.ndarray], spare: int, rows: Sequence[np.ndarray], unit: float
) -> tuple[list[int], float] | None:
    """(choice, bound) from the integer programme over the indices in `rows`; None when the solver finds nothing within its limits.

    It works in floating point, on costs in `unit`s, and may overstep the budget by its tolerance; bits are counted again, and the
    room it is given shrinks by what it overstepped until its plan fits exactly.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    sizes = [len(row) for row in rows]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    one_each = csr_matrix((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    flat_bits, flat_cost = (np.concatenate([v[row] for v, row in zip(values, rows, strict=True)]) for values in (bits, cost))
    room, starts = spare, np.cumsum([0, *sizes[:-1]])
    for _ in range(4):
        solved = milp(
            flat_cost / unit,
            integrality=np.ones(len(owner)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(csr_matrix(flat_bits / max(1, spare)), -np.inf, room / max(1, spare)),
            ],
            options={"mip_rel_gap": TOLERANCE, "node_limit": NODES},
        )
        if solved.x is None:
            return None
        picks = [int(row[np.argmax(solved.x[start : start + len(row)])]) for start, row in zip(starts, rows, strict=True)]
        over = int(_total(bits, picks)) - spare
        if over <= 0:
            # A bound proven with less room than there is would prove nothing.
            return picks, (float(solved.mip_dual_bound) - TOLERANCE) * unit if room == spare else -math.inf
        room -= over
    return None


def _sort(layer: LayerSpec) -> tuple[str, int, int]:
    """What a method's candidates may depend on."""
    return layer.kind, layer.out_features, layer.in_features


def _alike(stock: Inventory) -> dict[tuple[str, int, int], LayerSpec]:
    """One layer of every sort."""
    return {_sort(layer): layer for layer in stock.layers}


def _least(method: Method, bpw: float) -> BudgetError:
    if math.isinf(bpw):
        return BudgetError(f"{method.name} has no configuration with these options for a layer of this model")
    return BudgetError(f"{method.name} stores at least {bpw:.4f} bits per weight on this model")
