"""Ranks, or whatever a method's configurations are, by Bayesian optimisation: `--allocate bayes` (Bolaco, Ji et al.,
arXiv 2405.10616, sec. 3.2), to be held against the integer programme.

As there, the search is over one share for every role of matrix, the same in all blocks, by a Gaussian process with
expected improvement (optuna's), `TRIALS` times. Shares say how the budget is split: they are scaled together until it
is full, and every matrix gets the configuration of least cost within its role's bits. What is left over in the end is
given to the matrices that gain most by it.

Theirs asks for the perplexity of a compressed model in every trial. Here a trial asks for the predicted divergence that
the integer programme minimises too: it is what a method can say of any configuration before anything is packed, and
fifty models packed and scored would cost fifty cells. With that objective the programme cannot be beaten, and its bound
says how far the search is from it (`allocation gap` of the row)."""

from __future__ import annotations

import heapq
import math
import warnings
from collections.abc import Mapping, Sequence
from fractions import Fraction
from importlib.util import find_spec

from harness.ledger import planned
from harness.model import Inventory
from harness.plan.allocation import Allocation, mixed
from kernels.formats.layer import LayerConfig

TRIALS = 50  # Bolaco's
STARTUP = 10  # of them at random, before there is a process to ask
LEAST = 0.2  # of a role's share, the largest being 1: Bolaco's range
HALVINGS = 60  # of the scale that fills the budget

Offer = Sequence[tuple[int, float, LayerConfig]]  # bits, cost: what is worth its bits, the smallest first


def missing() -> str:
    """Why the search cannot run here; "" where it can."""
    return "" if find_spec("optuna") else "--allocate bayes needs optuna: pip install 'optuna>=4'"


def searched(
    stock: Inventory, budget: Fraction, costs: Mapping[str, Mapping[LayerConfig, float]], seed: int
) -> Allocation:
    """The best allocation that the search finds under the budget; the bound is that of the integer programme. Tables
    that layers share are not on offer."""
    import optuna

    capacity = math.floor(budget * stock.weights) - stock.uncovered_bits
    offers = {layer.name: _front(layer.name, stock, costs) for layer in stock.layers}
    roles = sorted({layer.role for layer in stock.layers})
    role_of = {layer.name: layer.role for layer in stock.layers}
    weights = {layer.name: layer.weights for layer in stock.layers}

    def split(shares: Mapping[str, float]) -> dict[str, int]:
        low, high = 0.0, 64.0 / LEAST  # bits per weight that no configuration has more of
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            picks = _within(offers, {name: middle * shares[role_of[name]] * size for name, size in weights.items()})
            low, high = (middle, high) if _bits(offers, picks) <= capacity else (low, middle)
        return _within(offers, {name: low * shares[role_of[name]] * size for name, size in weights.items()})

    def objective(trial: optuna.Trial) -> float:
        return _cost(offers, split({role: trial.suggest_float(role, LEAST, 1.0) for role in roles}))

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optuna calls the sampler experimental
        sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP, deterministic_objective=True)
        study = optuna.create_study(sampler=sampler)
        study.enqueue_trial(dict.fromkeys(roles, 1.0))  # one share for all, as an allocation without any search
        study.optimize(objective, n_trials=TRIALS)
    picks = _filled(offers, split(study.best_params), capacity)
    configs = {name: offers[name][pick][2] for name, pick in picks.items()}
    plain = {name: {offer[2]: offer[1] for offer in own} for name, own in offers.items()}
    ledger = planned(configs, stock.layers, stock.uncovered_bits, stock.weights)
    return Allocation(configs, ledger, _cost(offers, picks), mixed(stock, budget, plain).bound)


def _front(name: str, stock: Inventory, costs: Mapping[str, Mapping[LayerConfig, float]]) -> Offer:
    """A layer's configurations by rising bits and falling cost."""
    layer = next(layer for layer in stock.layers if layer.name == name)
    every = [(c.stored_bits(layer).total, cost, c) for c, cost in costs[name].items() if not c.table_key]
    front: list[tuple[int, float, LayerConfig]] = []
    for offer in sorted(every, key=lambda offer: offer[:2]):
        if not front or offer[1] < front[-1][1]:
            front.append(offer)
    return front


def _within(offers: Mapping[str, Offer], room: Mapping[str, float]) -> dict[str, int]:
    """The largest configuration of every layer within its room, or its smallest."""
    return {name: max((i for i, o in enumerate(own) if o[0] <= room[name]), default=0) for name, own in offers.items()}


def _bits(offers: Mapping[str, Offer], picks: Mapping[str, int]) -> int:
    return sum(offers[name][pick][0] for name, pick in picks.items())


def _cost(offers: Mapping[str, Offer], picks: Mapping[str, int]) -> float:
    return math.fsum(offers[name][pick][1] for name, pick in picks.items())


def _filled(offers: Mapping[str, Offer], picks: dict[str, int], capacity: int) -> dict[str, int]:
    """The same, with what room there is given away step by step, the most saved for a bit first."""
    picks, room = dict(picks), capacity - _bits(offers, picks)
    waiting: list[tuple[float, str]] = []

    def offer(name: str) -> None:
        own, now = offers[name], picks[name]
        if now + 1 < len(own):
            gain = (own[now][1] - own[now + 1][1]) / (own[now + 1][0] - own[now][0])
            heapq.heappush(waiting, (-gain, name))

    for name in offers:
        offer(name)
    while waiting:
        _, name = heapq.heappop(waiting)
        own, now = offers[name], picks[name]
        if own[now + 1][0] - own[now][0] <= room:
            room -= own[now + 1][0] - own[now][0]
            picks[name] = now + 1
            offer(name)
    return picks
