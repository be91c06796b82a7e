"""The table people read; every column that is not here is in the CSV."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

HEAD = {"method": "method", "budget_bpw": "budget", "stored_bpw": "stored"}
TAIL = {
    "kind": "kind",
    "track": "track",
    "weights_gib": "GiB",
    "resident_gib": "resident GiB",
    "decode_ms_b1": "ms/token",
    "decode_speedup_b1": "speed-up",
    "roofline_pct_b1": "roofline %",
    "prefill_tok_s": "prompt tok/s",
    "compress_s": "compress s",
    "status": "status",
}
FORMATS = {
    "stored_bpw": "{:.4f}",
    "weights_gib": "{:.3f}",
    "resident_gib": "{:.3f}",
    "decode_ms_b1": "{:.1f}",
    "roofline_pct_b1": "{:.0f}",
    "prefill_tok_s": "{:.0f}",
    "compress_s": "{:.0f}",
}
GOOD = ("ok", "underspent")  # statuses of rows whose numbers count

Shown = tuple[list[str], list[list[str]]]  # header and cells, as text


def label(row: Mapping[str, Any]) -> str:
    """What tells a row from the others of its table: method, variant, budget and seed. A row may come from a CSV, all
    text."""
    name = f"{row['method']}:{row['variant']}" if row["variant"] else row["method"]
    seed = f"seed {row['seed']}" if str(row["seed"]) not in ("", "0") else ""
    return " ".join(part for part in (name, row["budget_bpw"], seed) if part)


def shown_table(
    rows: Sequence[dict[str, Any]],
    names: Sequence[str],
    more: Mapping[str, Callable[[dict[str, Any]], str]] | None = None,
) -> Shown:
    """`more`: further columns behind the protocols', title -> text of a row."""
    more = more or {}
    protocols = [(kind, name) for name in names for kind in SHOWN]
    tail = {column: title for column, title in TAIL.items() if column in rows[0]}
    header = [
        *HEAD.values(),
        *(f"{kind} {name}" if kind == "ppl" else kind for kind, name in protocols),
        *more,
        *tail.values(),
    ]
    cells = []
    for row in rows:
        middle = [*(SHOWN[kind](row, name) for kind, name in protocols), *(text(row) for text in more.values())]
        cells.append([*(_text(row, column) for column in HEAD), *middle, *(_text(row, column) for column in tail)])
    return header, cells


def _perplexity(row: dict[str, Any], name: str) -> str:
    """Value with its spread over seeds (a summary), else with its 95 % interval."""
    text = _text(row, f"ppl_{name}")
    if row.get(f"ppl_{name}_sd"):
        return f"{text} ± {row[f'ppl_{name}_sd']:.2f}"
    low, high = row.get(f"ppl_{name}_lo"), row.get(f"ppl_{name}_hi")
    return f"{text} [{low:.1f}, {high:.1f}]" if isinstance(low, float) else text


def _rank(row: dict[str, Any], name: str) -> str:
    return f"{_text(row, f'rank_{name}')} {row.get(f'tie_{name}', '')}".strip()


def _text(row: dict[str, Any], column: str) -> str:
    value = row.get(column, "")
    if column == "method":
        return label({**row, "budget_bpw": ""})  # the budget has a column of its own
    if column == "status" and row["reason"]:
        return f"{value}: {row['reason']}"
    if isinstance(value, float):
        pattern = (
            ("{:.4f}" if value >= 0.001 else "{:.1e}") if column.startswith("kld") else FORMATS.get(column, "{:.2f}")
        )
        return pattern.format(value) if math.isfinite(value) else str(value)
    return str(value)


def plan_table(stored: Mapping[str, Mapping[str, dict[str, Any]]]) -> Shown:
    """What the allocation gave each kind of matrix; `stored` is label -> layer -> its record in an artifact."""
    kinds = list(dict.fromkeys(layer["kind"] for layers in stored.values() for layer in layers.values()))
    cells = []
    for label, layers in stored.items():
        of_kind = {kind: [layer["stored_bpw"] for layer in layers.values() if layer["kind"] == kind] for kind in kinds}
        cells.append(
            [label, *(f"{fmean(v):.2f} ({min(v):.2f} to {max(v):.2f})" if v else "" for v in of_kind.values())]
        )
    return ["stored bits per weight", *kinds], cells


def markdown(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(" --- " for _ in header) + "|"]
    return (
        "\n".join(lines + ["| " + " | ".join(value.replace("|", "\\|") for value in line) + " |" for line in cells])
        + "\n"
    )


# Per protocol, in this order.
SHOWN: dict[str, Callable[[dict[str, Any], str], str]] = {
    "ppl": _perplexity,
    "rank": _rank,
    "kld": lambda row, name: _text(row, f"kld_{name}"),
}
