"""Ranks within a track, and means over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence

from harness.report.sheet import GOOD, Row, act_bits, number
from harness.report.stats import shared_ranks

WindowLosses = Mapping[str, Mapping[str, Sequence[float]]]  # cell -> protocol -> loss of every window
Weights = Mapping[str, Sequence[float] | None]  # protocol -> weight of every window; None: all the same


def add_ranks(
    rows: Sequence[Row],
    losses: WindowLosses,
    names: Sequence[str],
    weights: Weights,
    unseeded: Container[str] = (),
) -> None:
    """Set `rank_<protocol>`, and `tie_<protocol>` where it is shared, within every budget, track, width of activations
    and seed.

    A row no seed can change (its cell is in `unseeded`) stands in every seed's ranking, and shows its rank in the
    first."""
    for group in ranked_together(rows, unseeded):
        for name in names:
            scored = [row for row in group if name in losses[str(row["cell"])]]
            ranks = shared_ranks([losses[str(row["cell"])][name] for row in scored], weights.get(name))
            for row, rank in zip(scored, ranks, strict=True):
                row[f"rank_{name}"] = rank
                row[f"tie_{name}"] = "tie" if ranks.count(rank) > 1 else ""


def ranked_together(rows: Sequence[Row], unseeded: Container[str] = ()) -> Iterator[list[Row]]:
    """Groups of rows with numbers that share budget, track, width of activations and seed; the first seed last, so that
    it has the last word on rows that stand in every seed's group."""
    ranked = [row for row in rows if row["budget_bpw"] and row["status"] in GOOD]
    for seed in sorted({number(row, "seed") for row in ranked if row["cell"] not in unseeded}, reverse=True) or [0]:
        present = [row for row in ranked if row["seed"] == seed or row["cell"] in unseeded]
        yield from _groups(present, lambda row: (row["budget_bpw"], row["track"], act_bits(row)))


def summarise(rows: Sequence[Row], losses: WindowLosses, names: Sequence[str], weights: Weights) -> list[Row]:
    """One row per method, budget and width of activations: mean perplexity over its seeds, `_sd` between them, ranks
    from losses averaged over seeds."""
    summary: list[Row] = []
    averaged: dict[str, dict[str, list[float]]] = {}
    for group in _groups(
        [row for row in rows if row["status"] in GOOD],
        lambda row: (row["method"], row["variant"], row["budget_bpw"], act_bits(row)),
    ):
        first = group[0]
        row = {
            key: first[key]
            for key in ("model", "method", "variant", "track", "status", "budget_bpw", "stored_bpw", "code_bpw")
        }
        row["act_bits"] = act_bits(first)
        for name in ("stored_bpw", "code_bpw"):  # mixed allocations differ between seeds
            row[name] = statistics.fmean(number(member, name) for member in group)
        row["status"] = max(str(member["status"]) for member in group)  # "underspent" if any is
        cells = [str(member["cell"]) for member in group]
        row |= {"seeds": len(group), "cell": "|".join(cells), "reason": "", "seed": 0}
        averaged["|".join(cells)] = {
            name: _average([losses[cell][name] for cell in cells])
            for name in names
            if all(name in losses[cell] for cell in cells)
        }
        for name in names:
            for column in (f"ppl_{name}", f"kld_{name}", f"top1_{name}"):
                values = [number(member, column) for member in group if member[column] != ""]
                row[column] = statistics.fmean(values) if values else ""
            perplexities = [number(member, f"ppl_{name}") for member in group if member[f"ppl_{name}"] != ""]
            row[f"ppl_{name}_sd"] = statistics.stdev(perplexities) if len(perplexities) > 1 else ""
            row[f"rank_{name}"] = row[f"tie_{name}"] = ""
        summary.append(row)
    add_ranks(summary, averaged, names, weights)
    return summary


def _groups(rows: Sequence[Row], key: Callable[[Row], Hashable]) -> list[list[Row]]:
    found: dict[Hashable, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return list(found.values())


def _average(window_nll: Sequence[Sequence[float]]) -> list[float]:
    return [math.fsum(values) / len(values) for values in zip(*window_nll, strict=True)]
