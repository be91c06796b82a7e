"""Every row with a budget against one method at that budget, or one outside any: what a change of method is worth, with
intervals.

Ratios are paired: both rows scored the same windows, and the same resamples are drawn for both (harness.report.stats).
Seeds are averaged window by window first, so the interval is that of the texts for these seeds' compressions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from harness.data.sealed import read_object
from harness.report.baseline import read_rows
from harness.report.ratios import divergence_ratio, perplexity_ratio
from harness.report.sheet import GOOD, Row, Sheet, label, number
from harness.store.results import Score

Windows = dict[str, list[float]]  # protocol -> one number per window


@dataclass(frozen=True)
class Entry:
    """A method at a budget, over its seeds."""

    name: str
    budget: str
    stored: float
    seeds: frozenset[str]
    seeded: bool  # whether a seed can change it; if not, its one row stands for every seed
    perplexity: dict[str, float]  # mean over seeds
    nll: Windows
    kld: Windows  # without those of a protocol that the reference did not score
    weight: dict[str, Sequence[float] | None]


@dataclass(frozen=True)
class _Cell:
    """What cells/<key>.json says of one seed."""

    row: Row
    seeded: bool
    scores: dict[str, Score]


def compare_methods(folder: Path, to: str) -> Sheet:
    """Rows of a budget at which `to` has no number are left without ratios. Raises ValueError when it has none at all,
    when seeds do not match, or when `folder` holds no run."""
    entries = read_entries(folder, to)
    names = list(dict.fromkeys(entry.name for entry in entries))
    if to not in names:
        raise ValueError(f"no numbers of a method '{to}' in {folder}: write --to with one of {', '.join(names)}")
    protocols = list(entries[0].nll)
    header = [
        "method",
        "budget",
        "stored",
        *(f"{what} {p}" for p in protocols for what in ("ppl", "ppl ratio", "kld ratio")),
    ]
    lines = []
    for entry in entries:
        base = next((other for other in entries if other.name == to and other.budget in (entry.budget, "")), None)
        if base is not None and entry.seeds != base.seeds and entry.seeded and base.seeded:
            raise ValueError(
                f"{entry.name} and {to} have numbers of different seeds at {entry.budget} bits: "
                "the run's command again may mend it"
            )
        line = [entry.name, entry.budget, f"{entry.stored:.4f}"]
        for protocol in protocols:
            line += [f"{entry.perplexity[protocol]:.2f}", *_ratios(entry, base, protocol)]
        lines.append(line)
    return Sheet(header, lines)


def _ratios(entry: Entry, base: Entry | None, protocol: str) -> tuple[str, str]:
    """The ratios of perplexity and of divergence, as text."""
    if base is None:
        return "", ""
    if entry is base:
        return "1", "1"
    weight = entry.weight[protocol]
    perplexity = str(perplexity_ratio(entry.nll[protocol], base.nll[protocol], weight))
    if protocol not in entry.kld or protocol not in base.kld:
        return perplexity, ""
    return perplexity, str(divergence_ratio(entry.kld[protocol], base.kld[protocol], weight) or "")


def read_entries(folder: Path, to: str = "") -> list[Entry]:
    """The rows of the run in `folder` that have numbers and a budget, or the name `to`, seeds together, in the
    leaderboard's order."""
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: give the one a run wrote")
    groups: dict[tuple[str, str], list[_Cell]] = {}
    seeds: dict[tuple[str, str], list[str]] = {}
    for row in read_rows(folder).values():
        name = label({**row, "budget_bpw": "", "seed": ""})
        if (row["budget_bpw"] or name == to) and row["status"] in GOOD:
            path = folder / "cells" / f"{row['cell']}.json"
            if not path.exists():
                raise ValueError(
                    f"no {path}: the run's own command writes it again, in seconds where its cells are still cached"
                )
            key = (name, row["budget_bpw"])
            groups.setdefault(key, []).append(_read_cell(path))
            seeds.setdefault(key, []).append(row["seed"])
    if not groups:
        raise ValueError(f"{folder} has no row with a budget and numbers")
    return [_entry(*key, cells, frozenset(seeds[key])) for key, cells in groups.items()]


def _read_cell(path: Path) -> _Cell:
    """One cell of a run, as `write_leaderboard` or an earlier version of it wrote it."""
    data = read_object(path)
    row, scores = data.get("row"), data.get("scores")
    if not isinstance(row, dict) or not isinstance(scores, dict):
        raise ValueError(f"{path} is no cell of a run: the run's own command writes it again")
    read = {name: Score.from_json(score, f"{path}: {name}") for name, score in scores.items()}
    return _Cell(row, data.get("seeded", True), read)


def _entry(name: str, budget: str, cells: Sequence[_Cell], seeds: frozenset[str]) -> Entry:
    protocols = list(cells[0].scores)
    of_protocol = {protocol: [cell.scores[protocol] for cell in cells] for protocol in protocols}
    divergences = {
        protocol: [score.divergence.window_kld for score in scores if score.divergence]
        for protocol, scores in of_protocol.items()
    }
    return Entry(
        name,
        budget,
        fmean(number(cell.row, "stored_bpw") for cell in cells),
        seeds,
        cells[0].seeded,
        {p: fmean(number(cell.row, f"ppl_{p}") for cell in cells) for p in protocols},
        {p: _averaged([score.window_nll for score in scores]) for p, scores in of_protocol.items()},
        {p: _averaged(windows) for p, windows in divergences.items() if len(windows) == len(cells)},
        {p: scores[0].window_weight for p, scores in of_protocol.items()},
    )


def _averaged(values: Sequence[Sequence[float]]) -> list[float]:
    """Window by window."""
    return [fmean(window) for window in zip(*values, strict=True)]
