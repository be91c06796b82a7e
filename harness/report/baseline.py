"""Regression on perplexity: a leaderboard against a baseline, from both sides.

A worse number is a regression; a better one is suspicious until explained. A baseline is the stored bits and the
perplexities of a leaderboard, one line per row, small enough to be committed and read in a diff."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from harness.ledger import FILL_TOLERANCE
from harness.plan.budgets import MIXED
from harness.report.latency import COLUMNS
from harness.report.sheet import GOOD, label
from harness.report.table import read_csv, write_csv

Rows = dict[str, dict[str, str]]
# The reference has no choices to make. A quantiser's roundings may fall differently in another CPU's arithmetic, and
# one code that flips early moves everything behind it, as does a near-tie of a mixed allocation. On three windows of
# two texts, two machines were up to 4.9 % apart (rtn; gptq 3.9 %, nf 2.2 %).
REFERENCE_TOLERANCE = 0.002
TOLERANCE = 0.08
STORED_TOLERANCE = 1e-9


def read_rows(path: Path) -> Rows:
    """Rows of a leaderboard or a baseline by label: method, variant, budget and seed. Raises ValueError when it is
    neither."""
    path = path / "leaderboard.csv" if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"no {path}: give a leaderboard.csv, or the folder a run wrote")
    rows = read_csv(path)
    needed = {"method", "variant", "budget_bpw", "seed", "stored_bpw"}
    if not rows or not needed <= rows[0].keys() or not perplexity_columns(rows[0]):
        raise ValueError(f"{path} is no leaderboard: it needs rows with {', '.join(sorted(needed))} and perplexities")
    return {label(row): row for row in rows}


def perplexity_columns(columns: Iterable[str]) -> list[str]:
    """Those of protocols, among the columns of a leaderboard or a baseline."""
    ends = ("_lo", "_hi", "_sd")
    return [name for name in columns if name.startswith("ppl_") and not name.endswith(ends) and name not in COLUMNS]


def compare(rows: Rows, baseline: Rows, tolerance: float = TOLERANCE) -> list[str]:
    """One line per disagreement; empty when all is as it was. Protocols and rows of the baseline must all be there."""
    problems = [f"{name}: not in this leaderboard" for name in baseline if name not in rows]
    for name, before in baseline.items():
        now = rows.get(name)
        if now is None:
            continue
        if now.get("status", "ok") not in GOOD:
            problems.append(f"{name}: {now['status']} ({now.get('reason', '')})")
            continue
        # A mixed allocation rests on a measurement, and may fall differently in another CPU's arithmetic too; both fill
        # the budget.
        exact = before.get("allocate") not in MIXED
        if not _close(
            now["stored_bpw"], before["stored_bpw"], STORED_TOLERANCE, 0.0 if exact else float(FILL_TOLERANCE)
        ):
            problems.append(f"{name}: stores {now['stored_bpw']} bits per weight, the baseline {before['stored_bpw']}")
        allowed = tolerance if before["budget_bpw"] else min(tolerance, REFERENCE_TOLERANCE)
        for column in perplexity_columns(next(iter(baseline.values()))):
            if column not in now:
                problems.append(f"{name}: no {column}; run with the baseline's --protocols")
            elif not _close(now[column], before[column], allowed):
                side = (
                    "worse"
                    if not float(now[column] or "nan") < float(before[column] or "nan")
                    else "better, which needs an explanation"
                )
                problems.append(
                    f"{name}: {column} is {now[column]}, the baseline {before[column]} (±{allowed:.1%}): {side}"
                )
    return problems


def write_baseline(rows: Rows, path: Path) -> int:
    """Rows that have numbers; returns how many. Raises ValueError when there are none: no baseline is lost to that."""
    columns = [
        "method",
        "variant",
        "budget_bpw",
        *(["act_bits"] if any("act_bits" in row for row in rows.values()) else []),
        "seed",
        "allocate",
        "stored_bpw",
        *perplexity_columns(next(iter(rows.values()))),
    ]
    kept = [row for row in rows.values() if row.get("status", "ok") in GOOD]
    if not kept:
        raise ValueError(f"no row of this leaderboard has numbers: {path} stays as it was; run again, then --update")
    write_csv(path, columns, kept)
    return len(kept)


def _close(now: str, before: str, relative: float, absolute: float = 0.0) -> bool:
    try:
        return math.isclose(float(now), float(before), rel_tol=relative, abs_tol=absolute)
    except ValueError:
        return False
