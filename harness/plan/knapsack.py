"""The multiple-choice knapsack, and nothing else: one choice per row, least total cost, bits within a capacity.

    min sum_l cost_l(c_l)   subject to   sum_l bits_l(c_l) <= capacity

solved as an integer programme by HiGHS. Two lower bounds say how far from the optimum a choice can be: the solver's
own, and the Lagrangian dual, computed here without it (Kellerer, Pferschy, Pisinger, Knapsack Problems, ch. 11). Knows
neither models nor methods."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

TOLERANCE = 1e-6  # of the solver, relative to the cost of the choice
# Of the branch-and-bound tree: a limit that cuts every machine off at the same choice, as seconds would not.
NODES = 20_000


def choose(bits: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], capacity: int) -> tuple[list[int], float]:
    """One index per row, least total cost within `capacity` bits, and a lower bound on that cost.

    Raises ValueError when nothing fits, or a cost is not a number.
    """
    require_finite(costs)
    fronts = [_pareto(b, c) for b, c in zip(bits, costs, strict=True)]
    spare = capacity - sum(row[front[0]] for row, front in zip(bits, fronts, strict=True))
    if spare < 0:
        raise ValueError("no choice fits the budget")
    # Bits over the least.
    more = [np.array([row[i] - row[front[0]] for i in front]) for row, front in zip(bits, fronts, strict=True)]
    cost = [np.array([row[i] for i in front]) for row, front in zip(costs, fronts, strict=True)]
    picks, bound, price = lagrangian(more, cost, spare)
    if _total(cost, picks) > bound:
        solved = _highs(
            more, cost, spare, _in_question(more, cost, price, _total(cost, picks) - bound), _total(cost, picks)
        )
        if solved is not None:
            bound = max(bound, solved[1])
            picks = min(picks, solved[0], key=lambda p: _total(cost, p))
    assert _total(more, picks) <= spare
    return [front[pick] for front, pick in zip(fronts, picks, strict=True)], bound


def require_finite(costs: Iterable[Iterable[float]]) -> None:
    if not all(math.isfinite(cost) for row in costs for cost in row):
        raise ValueError("an expected error is not a finite number: the model overflows on the calibration text")


def _pareto(bits: Sequence[int], costs: Sequence[float]) -> list[int]:
    """Indices by rising bits and strictly falling cost; the others are never part of a best choice."""
    front: list[int] = []
    for index in sorted(range(len(bits)), key=lambda i: (bits[i], costs[i])):
        if not front or costs[index] < costs[front[-1]]:
            front.append(index)
    return front


def _total(rows: Sequence[np.ndarray], picks: Sequence[int]) -> float:
    return math.fsum(row[pick].item() for row, pick in zip(rows, picks, strict=True))


def lagrangian(bits: Sequence[np.ndarray], cost: Sequence[np.ndarray], spare: int) -> tuple[list[int], float, float]:
    """(a feasible choice, the dual bound max over price >= 0 of sum min(cost + price * bits) - price * spare, that
    price)."""

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
    """Indices per row that can still be in a better choice: any other costs, at this price, more than the gap there
    is."""
    reduced = [c + price * b for b, c in zip(bits, cost, strict=True)]
    return [np.flatnonzero(r - r.min() <= gap * (1 + 1e-9)) for r in reduced]


def _highs(
    bits: Sequence[np.ndarray], cost: Sequence[np.ndarray], spare: int, rows: Sequence[np.ndarray], unit: float
) -> tuple[list[int], float] | None:
    """(choice, bound) from the integer programme over the indices in `rows`; None when the solver finds nothing within
    its limits.

    It works in floating point, on costs in `unit`s, and may overstep the budget by its tolerance; bits are counted
    again, and the room it is given shrinks by what it overstepped until its choice fits exactly."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    sizes = [len(row) for row in rows]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    one_each = csr_matrix((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    flat_bits, flat_cost = (
        np.concatenate([v[row] for v, row in zip(values, rows, strict=True)]) for values in (bits, cost)
    )
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
        picks = [
            int(row[np.argmax(solved.x[start : start + len(row)])]) for start, row in zip(starts, rows, strict=True)
        ]
        over = int(_total(bits, picks)) - spare
        if over <= 0:
            # A bound proven with less room than there is would prove nothing.
            return picks, (float(solved.mip_dual_bound) - TOLERANCE) * unit if room == spare else -math.inf
        room -= over
    return None
