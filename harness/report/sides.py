"""Two leaderboards side by side: the rows that both have, with the ratio of the second to the first.

Rows are matched by label (method, variant, budget, seed). Ratios are paired window by window, so both must have scored
the same tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.data.sealed import read_object
from harness.report.baseline import read_rows
from harness.report.ratios import Ratio, divergence_ratio, perplexity_ratio
from harness.report.rows import CellReport
from harness.report.sheet import GOOD, Sheet
from harness.store.results import Score


@dataclass(frozen=True)
class Measure:
    """Perplexity or divergence of a row in both tables; what there is not is None."""

    first: float | None
    second: float | None
    ratio: Ratio | None  # of the second to the first

    def to_json(self) -> dict[str, object]:
        return {"a": self.first, "b": self.second, **(self.ratio or Ratio(float("nan"))).to_json()}


@dataclass(frozen=True)
class Pair:
    """A row that both tables have."""

    label: str
    statuses: tuple[str, str]
    stored: tuple[float | None, float | None]  # bits per weight
    perplexity: dict[str, Measure]  # by protocol; none where a row has no numbers
    divergence: dict[str, Measure]


@dataclass(frozen=True)
class Sides:
    folders: tuple[Path, Path]
    models: tuple[str, str]
    protocols: tuple[str, ...]  # that both were scored by
    pairs: tuple[Pair, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]  # labels of rows that the other has not

    def sheet(self) -> Sheet:
        """A line for every row and protocol."""
        header = ["row", "protocol", "ppl A", "ppl B", "ppl B/A", "kld A", "kld B", "kld B/A"]
        lines = []
        for pair in self.pairs:
            for protocol in pair.perplexity:
                perplexity, divergence = pair.perplexity[protocol], pair.divergence[protocol]
                line = [pair.label, protocol, f"{perplexity.first:.2f}", f"{perplexity.second:.2f}"]
                line += [str(perplexity.ratio), *map(_short, (divergence.first, divergence.second))]
                lines.append([*line, str(divergence.ratio or "")])
        return Sheet(header, lines)

    def notes(self) -> list[str]:
        """What is in no line of the sheet."""
        without = [f"{p.label} ({p.statuses[0]}, {p.statuses[1]})" for p in self.pairs if not p.perplexity]
        models = (f"{self.models[0]} in A, {self.models[1]} in B",) if self.models[0] != self.models[1] else ()
        found = [
            ("different models", models),
            ("without numbers in A or B", without),
            ("only in A", self.only[0]),
            ("only in B", self.only[1]),
        ]
        legend = (
            f"A is {self.folders[0]}, B is {self.folders[1]}; ratios are paired, window by window, with 95 % intervals"
        )
        return [legend, *(f"{what}: {', '.join(labels)}" for what, labels in found if labels)]

    def to_json(self) -> dict[str, object]:
        rows = [
            {
                "row": pair.label,
                "status": dict(zip("ab", pair.statuses, strict=True)),
                "stored_bpw": dict(zip("ab", pair.stored, strict=True)),
                "ppl": {name: measure.to_json() for name, measure in pair.perplexity.items()},
                "kld": {name: measure.to_json() for name, measure in pair.divergence.items()},
            }
            for pair in self.pairs
        ]
        names = {"a": self.folders[0], "b": self.folders[1], "models": list(self.models)}
        names |= {"protocols": list(self.protocols)}
        return {**names, "rows": rows, "only_a": list(self.only[0]), "only_b": list(self.only[1])}


def side_by_side(first: Path, second: Path) -> Sides:
    """Raises ValueError where one is no run, where a protocol was scored on different tokens, or where no protocol is
    common to both."""
    here, there = read_reports(first), read_reports(second)
    named = [dict.fromkeys(name for report in side.values() for name in report.scores) for side in (here, there)]
    protocols = [name for name in named[0] if name in named[1]]
    if not protocols:
        raise ValueError(
            f"no protocol in common: {first} has {', '.join(named[0]) or 'none'}, {second} has "
            f"{', '.join(named[1]) or 'none'}; run one of them again with the other's --protocols"
        )
    _require_equal_tokens(protocols, (first, second), (here, there))
    pairs = [_pair(label, here[label], there[label], protocols) for label in here if label in there]
    only = (tuple(n for n in here if n not in there), tuple(n for n in there if n not in here))
    models = tuple(str(next(iter(side.values())).row.get("model", "")) for side in (here, there))
    return Sides((first, second), (models[0], models[1]), tuple(protocols), tuple(pairs), only)


def read_reports(folder: Path) -> dict[str, CellReport]:
    """The cells of a run by their rows' labels, in its leaderboard's order. Raises ValueError."""
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: give the one a run wrote")
    found = {}
    for label, row in read_rows(folder).items():
        path = folder / "cells" / f"{row.get('cell', '')}.json"
        if not path.exists():
            raise ValueError(
                f"no {path}: the run's own command writes it again, in seconds where its cells are still cached"
            )
        found[label] = CellReport.from_json(read_object(path), str(path))
    return found


def _require_equal_tokens(
    protocols: Sequence[str], folders: tuple[Path, Path], sides: tuple[Mapping[str, CellReport], ...]
) -> None:
    for name in protocols:
        scored = [
            {score.tokens_sha256 for report in side.values() if (score := report.scores.get(name))} for side in sides
        ]
        if len(scored[0] | scored[1]) > 1:
            raise ValueError(
                f"{name} was scored on different tokens in {folders[0]} and {folders[1]}, so windows have no partners: "
                "give runs with one tokenizer and one text"
            )


def _pair(label: str, here: CellReport, there: CellReport, protocols: Sequence[str]) -> Pair:
    reports = (here, there)
    statuses = (str(here.row["status"]), str(there.row["status"]))
    perplexity, divergence = {}, {}
    for name in protocols:
        a, b = here.scores.get(name), there.scores.get(name)
        if a and b and all(status in GOOD for status in statuses):
            perplexity[name] = Measure(a.ppl, b.ppl, perplexity_ratio(b.window_nll, a.window_nll, a.window_weight))
            divergence[name] = _divergence(a, b)
    stored = [report.artifact.stored_bpw if report.artifact else None for report in reports]
    return Pair(label, statuses, (stored[0], stored[1]), perplexity, divergence)


def _divergence(a: Score, b: Score) -> Measure:
    first, second = a.divergence, b.divergence
    ratio = divergence_ratio(second.window_kld, first.window_kld, a.window_weight) if first and second else None
    return Measure(first.kld if first else None, second.kld if second else None, ratio)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if value >= 0.001 else f"{value:.1e}"
