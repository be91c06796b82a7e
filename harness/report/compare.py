"""Every row of a leaderboard against one of its methods: what a change of method is worth, with intervals.

Ratios are paired: both rows scored the same windows, and the same resamples are drawn for both (harness.stats). Seeds are averaged window
by window first, so the interval is that of the texts for these seeds' compressions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from harness.files import read_json
from harness.report.check import read_rows
from harness.report.table import GOOD, Shown, label
from harness.stats import interval, resampled_means

Windows = dict[str, list[float]]  # protocol -> one number per window


@dataclass(frozen=True)
class Entry:
    """A method at a budget, over its seeds."""

    name: str
    budget: str
    stored: float
    seeds: frozenset[str]
    nll: Windows
    kld: Windows
    weight: dict[str, list[float] | None]


def compare_methods(folder: Path, to: str) -> Shown:
    """Raises ValueError when `to`, a label without budget and seed, is not among the rows of a budget, or `folder` holds no run."""
    entries = read_entries(folder)
    names = list(dict.fromkeys(entry.name for entry in entries))
    if to not in names:
        raise ValueError(f"no method '{to}' in {folder}: write --to with one of {', '.join(names)}")
    protocols = list(entries[0].nll)
    header = ["method", "budget", "stored", *(f"{what} {p}" for p in protocols for what in ("ppl", "ppl ratio", "kld ratio"))]
    cells = []
    for entry in entries:
        base = next((other for other in entries if (other.name, other.budget) == (to, entry.budget)), None)
        if base is None:
            raise ValueError(f"'{to}' has no row at {entry.budget} bits in {folder}: run it with --bits {entry.budget}")
        if entry.seeds != base.seeds and len(entry.seeds) > 1:
            raise ValueError(f"{entry.name} and {to} have different seeds at {entry.budget} bits: run both with the same --seeds")
        line = [entry.name, entry.budget, f"{entry.stored:.4f}"]
        for protocol in protocols:
            weight = entry.weight[protocol]
            line.append(f"{math.exp(float(_mean(entry.nll[protocol], weight))):.2f}")
            if entry is base:
                line += ["1", "1"]
                continue
            difference = [a - b for a, b in zip(entry.nll[protocol], base.nll[protocol], strict=True)]
            line.append(_ratio(math.exp(_mean(difference, weight)), resampled_means(difference, weight).exp()))
            here, there = entry.kld[protocol], base.kld[protocol]
            line.append(_ratio(_mean(here, weight) / _mean(there, weight), resampled_means(here, weight) / resampled_means(there, weight)))
        cells.append(line)
    return header, cells


def read_entries(folder: Path) -> list[Entry]:
    """The rows of the run in `folder` that have numbers and a budget, seeds together, in the leaderboard's order."""
    groups: dict[tuple[str, str], list[dict]] = {}
    seeds: dict[tuple[str, str], list[str]] = {}
    for row in read_rows(folder).values():
        if row["budget_bpw"] and row["status"] in GOOD:
            path = folder / "cells" / f"{row['cell']}.json"
            if not path.exists():
                raise ValueError(f"no {path}: give the folder a run wrote; the run's own command writes it again in seconds")
            key = (label({**row, "budget_bpw": "", "seed": ""}), row["budget_bpw"])
            groups.setdefault(key, []).append(read_json(path))
            seeds.setdefault(key, []).append(row["seed"])
    if not groups:
        raise ValueError(f"{folder} has no row with a budget and numbers")
    return [_entry(*key, records, frozenset(seeds[key])) for key, records in groups.items()]


def _entry(name: str, budget: str, records: Sequence[dict], seeds: frozenset[str]) -> Entry:
    scores = [record["scores"] for record in records]
    protocols = list(scores[0])

    def averaged(values: Sequence[Sequence[float]]) -> list[float]:
        return [fmean(window) for window in zip(*values, strict=True)]

    return Entry(
        name, budget, fmean(record["row"]["stored_bpw"] for record in records), seeds,
        {p: averaged([score[p]["window_nll"] for score in scores]) for p in protocols},
        {p: averaged([score[p]["divergence"]["window_kld"] for score in scores]) for p in protocols},
        {p: scores[0][p].get("window_weight") for p in protocols},
    )  # fmt: skip


def _mean(values: Sequence[float], weight: Sequence[float] | None) -> float:
    return fmean(values, weight)


def _ratio(value: float, resampled_B: torch.Tensor) -> str:
    low, high = interval(resampled_B)
    return f"{value:.3f} [{low:.3f}, {high:.3f}]" + (" tie" if low <= 1 <= high else "")
