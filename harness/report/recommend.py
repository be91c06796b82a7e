"""Which rows of a run are worth having within limits of memory, stored bits and speed.

Rows over several seeds are one: quality window by window their mean, of memory and bits the most, of speed the least.
A row is dominated by another that is at least as good in everything (quality, resident memory, stored bits, tokens per
second) and better in something, by their numbers. Numbers of quality have intervals: a row that cannot be told from the
best one is called a tie, and shown even where it is dominated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from harness.report.baseline import read_rows
from harness.report.ratios import Ratio, Weights, divergence_ratio, perplexity_ratio
from harness.report.rows import CellReport
from harness.report.sheet import GOOD, Sheet, Value, label
from harness.report.sides import read_reports
from harness.report.stats import MIN_WINDOWS, interval, resampled_means

MEASURES = ("kld", "ppl")
REMARKS = {  # of kinds
    "fused-16": "activations of few bits are multiplied as 16-bit integers: no faster than without",
    "decode-on-load": "decoded when loaded: memory is that of decoded weights",
    "decode-per-call": "decoded for every product: no kernel serves it here",
}


@dataclass(frozen=True)
class Limits:
    """What is asked for; None is no limit."""

    memory_gib: float | None = None
    bits: float | None = None
    tokens_s: float | None = None

    def broken(self, row: Candidate) -> bool:
        return (
            (self.memory_gib is not None and row.memory_gib > self.memory_gib)
            or (self.bits is not None and row.stored_bpw > self.bits)
            or (self.tokens_s is not None and (row.tokens_s is None or row.tokens_s < self.tokens_s))
        )

    def __str__(self) -> str:
        texts = (
            f"{self.memory_gib:.4g} GiB" if self.memory_gib is not None else "",
            f"{self.bits:g} stored bits" if self.bits is not None else "",
            f"at least {self.tokens_s:g} tokens/s" if self.tokens_s is not None else "",
        )
        return ", ".join(filter(None, texts))


@dataclass(frozen=True)
class Candidate:
    """A method at a budget, over its seeds."""

    name: str
    compressed: bool  # False: of no budget
    track: str
    stored_bpw: float
    memory_gib: float  # resident, or where it was not measured the files' size
    measured: bool  # whether it is resident memory
    tokens_s: float | None
    windows: Sequence[float]  # of the measure, averaged over seeds
    weight: Weights
    measure: str
    remarks: tuple[str, ...]

    @property
    def quality(self) -> float:
        mean = fmean(self.windows, self.weight)
        return mean if self.measure == "kld" else math.exp(mean)

    @property
    def interval(self) -> tuple[float, float] | None:
        if len(self.windows) < MIN_WINDOWS:
            return None
        low, high = interval(resampled_means(self.windows, self.weight))
        return (low, high) if self.measure == "kld" else (math.exp(low), math.exp(high))

    def against(self, best: Candidate) -> Ratio | None:
        """The ratio of its quality to another's, where it can be paired: an uncompressed row's divergence is noise."""
        if self.measure == "kld" and not (self.compressed and best.compressed):
            return None
        if self.measure == "kld":
            return divergence_ratio(self.windows, best.windows, self.weight)
        return perplexity_ratio(self.windows, best.windows, self.weight)

    def dominates(self, other: Candidate) -> bool:
        better = False
        for mine, theirs in (
            (self.quality, other.quality),
            (self.memory_gib, other.memory_gib),
            (self.stored_bpw, other.stored_bpw),
            (_slowness(self), _slowness(other)),
        ):
            if mine is None and theirs is None:
                continue
            if mine is None or theirs is None or mine > theirs:
                return False
            better |= mine < theirs
        return better


def _slowness(row: Candidate) -> float | None:
    return None if row.tokens_s is None else -row.tokens_s


@dataclass(frozen=True)
class Choice:
    """A row that is recommended, or a tie of the best."""

    row: Candidate
    ratio: Ratio | None  # of its quality to the best's; None: the best itself, or nobody knows
    dominated_by: str = ""

    @property
    def tie(self) -> bool:
        return self.ratio is not None and self.ratio.tie is True

    def to_json(self) -> dict[str, object]:
        row = self.row
        low, high = row.interval or (None, None)
        return {
            "row": row.name,
            "track": row.track,
            row.measure: row.quality,
            "low": low,
            "high": high,
            "tie_with_best": None if self.ratio is None else self.ratio.tie,
            "dominated_by": self.dominated_by or None,
            "memory_gib": row.memory_gib,
            "memory_measured": row.measured,
            "stored_bpw": row.stored_bpw,
            "tokens_s": row.tokens_s,
            "remarks": list(row.remarks),
        }


@dataclass(frozen=True)
class Recommendation:
    protocol: str
    measure: str
    limits: Limits
    choices: tuple[Choice, ...]  # the best first; empty when nothing is within the limits
    sentence: str
    beyond: tuple[str, ...]  # rows outside the limits
    left_out: tuple[str, ...]  # rows without numbers that count, with the reason

    def sheet(self) -> Sheet:
        header = [
            "row",
            f"{self.measure} {self.protocol}",
            "against the best",
            "GiB",
            "stored",
            "tokens/s",
            "track",
            "remarks",
        ]
        lines = []
        for choice in self.choices:
            row = choice.row
            remarks = [f"{choice.dominated_by} is as good or better in everything"] if choice.dominated_by else []
            lines.append(
                [
                    row.name,
                    _quality(row),
                    str(choice.ratio or ""),
                    f"{row.memory_gib:.3f}",
                    f"{row.stored_bpw:.4f}",
                    "" if row.tokens_s is None else f"{row.tokens_s:.1f}",
                    row.track,
                    "; ".join([*remarks, *row.remarks]),
                ]
            )
        return Sheet(header, lines)

    def notes(self) -> list[str]:
        named = (("beyond the limits", self.beyond), ("left out", self.left_out))
        return [f"{what}: {', '.join(labels)}" for what, labels in named if labels]

    def to_json(self) -> dict[str, object]:
        return {
            "sentence": self.sentence,
            "protocol": self.protocol,
            "measure": self.measure,
            "limits": vars(self.limits),
            "rows": [choice.to_json() for choice in self.choices],
            "beyond": list(self.beyond),
            "left_out": list(self.left_out),
        }


def recommend(folder: Path, limits: Limits, protocol: str = "", measure: str = "") -> Recommendation:
    """Of the run in `folder`, by `measure` (divergence where all compressed rows have one, else perplexity) on
    `protocol` (the first). Raises ValueError where there is no such run, protocol or number."""
    reports, table = read_reports(folder), read_rows(folder)
    protocols = list(dict.fromkeys(name for report in reports.values() for name in report.scores))
    if protocol and protocol not in protocols:
        raise ValueError(
            f"{folder} was not scored on '{protocol}': write --protocol with one of {', '.join(protocols)}"
        )
    protocol = protocol or next(iter(protocols), "")
    groups: dict[str, list[str]] = {}
    left_out = []
    for name, report in reports.items():
        status, score = str(report.row["status"]), report.scores.get(protocol)
        if status in GOOD and score and report.artifact:
            groups.setdefault(label({**report.row, "seed": ""}), []).append(name)
        else:
            left_out.append(f"{name} ({status}{', ' + str(reason) if (reason := report.row.get('reason')) else ''})")
    if not groups:
        raise ValueError(f"{folder} has no row with numbers: its leaderboard says why; run its command again")
    compressed = [reports[name] for names in groups.values() for name in names if reports[name].row["budget_bpw"]]
    known = all(_divergence(report, protocol) for report in compressed)
    if measure == "kld" and not known:
        raise ValueError(f"not every row has a divergence on {protocol}: write --by ppl, or run its command again")
    measure = measure or ("kld" if known else "ppl")
    rows = [
        _candidate(name, [reports[n] for n in names], [table[n] for n in names], protocol, measure)
        for name, names in groups.items()
        if measure == "ppl" or all(_divergence(reports[n], protocol) for n in names)
    ]
    within = sorted((row for row in rows if not limits.broken(row)), key=lambda row: row.quality)
    beyond = tuple(f"{row.name} ({_size(row)})" for row in rows if limits.broken(row))
    if not within:
        return Recommendation(protocol, measure, limits, (), _nothing(rows, limits), beyond, tuple(left_out))
    best = next((row for row in within if row.compressed), within[0])
    choices = []
    for row in within:
        ratio = row.against(best) if row is not best else None
        over = next((other.name for other in within if other.dominates(row)), "")
        if not over or (ratio is not None and ratio.tie):
            choices.append(Choice(row, ratio, over))
    choices.sort(key=lambda choice: choice.row is not best)
    sentence = _sentence(best, choices, within, limits, protocol)
    return Recommendation(protocol, measure, limits, tuple(choices), sentence, beyond, tuple(left_out))


def _divergence(report: CellReport, protocol: str) -> Sequence[float]:
    score = report.scores.get(protocol)
    return score.divergence.window_kld if score and score.divergence else ()


def _candidate(
    name: str, reports: Sequence[CellReport], table: Sequence[Mapping[str, str]], protocol: str, measure: str
) -> Candidate:
    scores = [score for report in reports if (score := report.scores[protocol])]
    windows = [_divergence(report, protocol) for report in reports]
    windows = windows if measure == "kld" else [score.window_nll for score in scores]
    mean = [fmean(window) for window in zip(*windows, strict=True)]
    weight = scores[0].window_weight if len(mean) == len(scores[0].window_nll) else None
    resident = [value for report in reports if (value := _number(report.row, "resident_gib")) is not None]
    speeds = [value for report in reports if (value := _number(report.row, "decode_tok_s_b1")) is not None]
    measured = len(resident) == len(reports)
    sizes = (
        resident if measured else [report.artifact.checkpoint_bytes / 2**30 for report in reports if report.artifact]
    )
    first = reports[0].row
    remarks = [REMARKS[str(first["kind"])]] if first.get("kind") in REMARKS else []
    remarks += (
        ["underspent: stores less than its budget"] if any(r.row["status"] == "underspent" for r in reports) else []
    )
    remarks += [f"provisional: {text}" for text in sorted({row.get("provisional", "") for row in table} - {""})]
    remarks += [] if measured else ["memory not measured, this is its files' size: `bench` measures it"]
    return Candidate(
        name,
        bool(first["budget_bpw"]),
        str(first["track"]),
        max(report.artifact.stored_bpw for report in reports if report.artifact),
        max(sizes),
        measured,
        min(speeds) if len(speeds) == len(reports) else None,
        mean,
        weight,
        measure,
        tuple(remarks),
    )


def _number(row: Mapping[str, Value], column: str) -> float | None:
    value = row.get(column, "")
    return None if isinstance(value, str) else float(value)


def _quality(row: Candidate) -> str:
    pattern = "{:.2f}" if row.measure == "ppl" else "{:.4f}" if row.quality >= 0.001 else "{:.1e}"
    found = row.interval
    text = pattern.format(row.quality)
    return f"{text} [{pattern.format(found[0])}, {pattern.format(found[1])}]" if found else text


def _size(row: Candidate) -> str:
    memory = f"{row.memory_gib:.3f} GiB {'resident' if row.measured else 'of files, memory not measured'}"
    speed = "no tokens/s measured" if row.tokens_s is None else f"{row.tokens_s:.0f} tokens/s"
    return f"{memory}, {row.stored_bpw:.4g} bits, {speed}"


def _sentence(
    best: Candidate, choices: Sequence[Choice], within: Sequence[Candidate], limits: Limits, protocol: str
) -> str:
    among = (
        f"{len(within)} row{'s' if len(within) > 1 else ''} within {limits}" if str(limits) else f"{len(within)} rows"
    )
    ties = [choice.row.name for choice in choices if choice.tie]
    text = f"{best.name} ({_size(best)}) has the lowest {best.measure} of {among}: {_quality(best)} on {protocol}"
    if ties:
        text += f"; {', '.join(ties)} cannot be told from it (tie)"
    elif len(best.windows) < MIN_WINDOWS:
        text += f"; {len(best.windows)} windows say nothing about ties"
    plain = [choice.row.name for choice in choices if not choice.row.compressed and choice.row is not best]
    if best.compressed and plain:
        text = text.replace(" has the lowest", ", of the compressed rows, has the lowest", 1)
        text += f"; uncompressed, {', '.join(plain)} is within them too" if str(limits) else ""
    return text + "."


def _nothing(rows: Sequence[Candidate], limits: Limits) -> str:
    """What comes nearest, limit by limit."""
    nearest = []
    if limits.memory_gib is not None:
        row = min(rows, key=lambda row: row.memory_gib)
        nearest.append(f"the smallest is {row.name} ({_size(row)})")
    if limits.bits is not None:
        row = min(rows, key=lambda row: row.stored_bpw)
        nearest.append(f"the one of fewest bits {row.name} ({row.stored_bpw:.4f})")
    if limits.tokens_s is not None:
        timed = [row for row in rows if row.tokens_s is not None]
        fastest = max(timed, key=lambda row: row.tokens_s or 0.0, default=None)
        nearest.append(
            f"the fastest {fastest.name} ({fastest.tokens_s:.1f} tokens/s)"
            if fastest
            else "no row's speed was measured: `bench` does it"
        )
    return f"No row is within {limits}: {'; '.join(nearest)}."
