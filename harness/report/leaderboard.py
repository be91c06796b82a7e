"""The leaderboard: one row per cell, as CSV, Markdown and one JSON per cell.

`ppl_<protocol>` columns hold perplexities of one protocol over one token stream; a cell scored on another stream of the same
name is refused rather than put beside the others.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import __version__
from harness.engine.local import Outcome
from harness.files import write_json, write_text
from harness.plan import Cell, Plan
from harness.protocol import protocol_key
from harness.store import CellStore

COLUMNS_BEFORE = (
    "model", "method", "variant", "track", "kind", "status", "budget_bpw", "stored_bpw", "code_bpw", "resident_bpw",
    "checkpoint_bytes", "weights_gib",
)  # fmt: skip
COLUMNS_AFTER = ("compress_s", "eval_s", "peak_ram_gib", "seed", "harness_version", "cell", "reason", "model_note")
TIME_COLUMNS = ("compress_s", "eval_s", "peak_ram_gib")  # the only ones two identical runs may differ in


def row_of(cell: Cell, plan: Plan, outcome: Outcome | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(leaderboard row, full record) of a cell, from what is stored."""
    store = CellStore(cell.key)
    artifact = store.artifact() if not cell.refusal else None
    scores = {p: store.score(protocol_key(p)) for p in plan.protocols} if artifact else {}
    done = [score for score in scores.values() if score]
    error = cell.refusal or (outcome.error if outcome else "")
    row: dict[str, Any] = {
        "model": cell.model.name,
        "method": cell.method.name,
        "variant": _variant(cell),
        "track": str(cell.method.track),
        "kind": done[0]["kind"] if done else "",
        "status": _status(cell, artifact, scores, error),
        "budget_bpw": cell.budget.text if cell.budget else "",
        "stored_bpw": artifact["stored_bpw"] if artifact else "",
        "code_bpw": artifact["code_bpw"] if artifact else "",
        "resident_bpw": done[0]["resident_bpw"] if done else "",
        "checkpoint_bytes": artifact["checkpoint_bytes"] if artifact else "",
        "weights_gib": artifact["checkpoint_bytes"] / 2**30 if artifact else "",
        "compress_s": artifact["compress_s"] if artifact else "",
        "eval_s": sum(score["seconds"] for score in done) if done else "",
        "peak_ram_gib": max([artifact["peak_ram_gib"], *(score["peak_ram_gib"] for score in done)]) if artifact else "",
        "seed": cell.seed,
        "harness_version": __version__,
        "cell": cell.key,
        "reason": error,
        "model_note": cell.model.note,
    }
    for protocol, score in scores.items():
        row[f"ppl_{protocol.name}"] = score["ppl"] if score else ""
    record = {"row": row, "artifact": artifact, "scores": {p.name: score for p, score in scores.items()}}
    return row, record


def _variant(cell: Cell) -> str:
    options = cell.method_text.partition(":")[2]
    return cell.method.variant or options


def _status(cell: Cell, artifact: dict | None, scores: Mapping[Any, dict | None], error: str) -> str:
    if cell.refusal:
        return "refused"
    if error or artifact is None or any(score is None for score in scores.values()):
        return "failed"
    if any(score["nonfinite_windows"] or not math.isfinite(score["ppl"]) for score in scores.values() if score):
        return "nonfinite"
    assert cell.allocation is not None
    return "underspent" if cell.budget and cell.allocation.ledger.underspent(cell.budget.bpw) else "ok"


def write_leaderboard(plan: Plan, outcomes: Mapping[str, Outcome], folder: Path) -> list[dict[str, Any]]:
    """Write leaderboard.csv, leaderboard.md and cells/<key>.json; returns the rows in order."""
    rows = []
    streams: dict[str, str] = {}
    for cell in plan.cells:
        row, record = row_of(cell, plan, outcomes.get(cell.key))
        for name, score in record["scores"].items():
            if score and streams.setdefault(name, score["tokens_sha256"]) != score["tokens_sha256"]:
                raise ValueError(f"{name} was scored on two different token streams; run again with --fresh")
        write_json(folder / "cells" / f"{cell.key}.json", record)
        rows.append(row)
    perplexities = [f"ppl_{p.name}" for p in plan.protocols]
    rows.sort(key=lambda row: _order(row, perplexities))
    columns = [*COLUMNS_BEFORE, *perplexities, *COLUMNS_AFTER]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "leaderboard.csv", text.getvalue())
    write_text(folder / "leaderboard.md", markdown(rows, perplexities))
    return rows


def _order(row: dict[str, Any], perplexities: list[str]) -> tuple[Any, ...]:
    """The reference first, then by budget; inside a budget the better first perplexity first, rows without one last."""
    first = row.get(perplexities[0], "") if perplexities else ""
    value = first if isinstance(first, float) and math.isfinite(first) else math.inf
    return (float(row["budget_bpw"] or 0), value, row["method"], row["variant"])


SHOWN = {
    "method": "method", "budget_bpw": "budget", "stored_bpw": "stored", "code_bpw": "code", "kind": "kind", "track": "track",
    "weights_gib": "weights GiB", "compress_s": "compress s", "eval_s": "eval s", "peak_ram_gib": "peak RAM GiB", "status": "status",
}  # fmt: skip
FORMATS = {"stored_bpw": "{:.4f}", "code_bpw": "{:.3f}", "weights_gib": "{:.3f}", "compress_s": "{:.0f}", "eval_s": "{:.0f}", "peak_ram_gib": "{:.1f}"}


def shown_table(rows: list[dict[str, Any]], perplexities: list[str]) -> tuple[list[str], list[list[str]]]:
    """(header, cells) of the table people read; every column of the CSV that is not here is in the CSV."""
    order = [*list(SHOWN)[:4], *perplexities, *list(SHOWN)[4:]]
    header = [SHOWN.get(name, name.replace("ppl_", "ppl ")) for name in order]
    return header, [[_text(row, name) for name in order] for row in rows]


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name, "")
    if name == "method":
        return f"{value}:{row['variant']}" if row["variant"] else value
    if name == "status" and row["reason"]:
        return f"{value}: {row['reason']}"
    if isinstance(value, float):
        return FORMATS.get(name, "{:.2f}").format(value) if math.isfinite(value) else str(value)
    return str(value)


def markdown(rows: list[dict[str, Any]], perplexities: list[str]) -> str:
    header, cells = shown_table(rows, perplexities)
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(" --- " for _ in header) + "|"]
    lines += ["| " + " | ".join(value.replace("|", "\\|") for value in line) + " |" for line in cells]
    notes = sorted({row["model_note"] for row in rows if row["model_note"]})
    return "\n".join(lines + [""] + [f"Note on {rows[0]['model']}: {note}." for note in notes]).rstrip() + "\n"
