"""The leaderboard: one row per cell, as CSV and Markdown, with one JSON per cell and one line per product in
kernels.csv beside it.

Columns of a protocol P: `ppl_P` with its 95 % interval `ppl_P_lo`, `ppl_P_hi`; `rank_P` within budget, track and seed,
shared by rows that cannot be told apart; `kld_P`, `kld_P_p90`, `top1_P` against the reference, whose own row shows the
noise floor. A cell scored on another token stream of the same name is refused rather than put beside the others."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from harness import __version__
from harness.data.protocols import protocol_key
from harness.engine.local import Outcome
from harness.ledger import underspent
from harness.plan.cells import Cell, Plan
from harness.report import latency
from harness.report.sheet import Shown, label, markdown, plan_table, shown_table
from harness.report.stats import perplexity_interval
from harness.report.summary import add_ranks, summarise
from harness.report.task_pages import (
    TIME_COLUMN,
    Results,
    fill_tasks,
    shown_tasks,
    task_columns,
    task_means,
    write_pages,
)
from harness.store.cells import CellStore
from harness.store.files import write_json, write_text

COLUMNS_BEFORE = (
    "model",
    "method",
    "variant",
    "track",
    "kind",
    "status",
    "budget_bpw",
    "stored_bpw",
    "code_bpw",
    "resident_bpw",
    "checkpoint_bytes",
    "weights_gib",
)
COLUMNS_AFTER = (
    *latency.COLUMNS,
    "allocate",
    "plan_cost",
    "plan_gap",
    "plan_s",
    "compress_s",
    "eval_s",
    "decode_s_on_load",
    "peak_ram_gib",
    "tuning_steps",
    "tuning_tokens",
    "training_steps",
    "training_tokens",
    "training_s",
    "device",
    "seed",
    "harness_version",
    "cell",
    "reason",
    "model_note",
)
# The only ones two identical runs may differ in:
TIME_COLUMNS = (
    "plan_s",
    "compress_s",
    "eval_s",
    "decode_s_on_load",
    "peak_ram_gib",
    "training_s",
    TIME_COLUMN,
    *latency.COLUMNS,
)


def protocol_columns(names: Sequence[str]) -> list[str]:
    """All perplexities first, then what qualifies them."""
    more = [
        f"{c}_{n}{s}"
        for n in names
        for c, s in (
            ("ppl", "_lo"),
            ("ppl", "_hi"),
            ("rank", ""),
            ("tie", ""),
            ("kld", ""),
            ("kld", "_p90"),
            ("top1", ""),
        )
    ]
    return [f"ppl_{name}" for name in names] + more


def write_leaderboard(
    plan: Plan, outcomes: Mapping[str, Outcome], folder: Path, identity: str, measured: Mapping[str, Outcome]
) -> tuple[list[dict[str, Any]], list[Shown]]:
    """Write leaderboard.csv, leaderboard.md, cells/<key>.json and, where there are any, kernels.csv and (with several
    seeds) summary.csv; returns the rows in order, and the tables people see. `outcomes` are the cells', `measured`
    those of their measurements, which are looked up under this machine's `identity`."""
    names = [protocol.name for protocol in plan.protocols]
    tasks = plan.tasks
    rows, losses, stored, answered = [], {}, {}, {}
    streams: dict[str, str] = {}
    weights: dict[str, list[float] | None] = {}
    kernels: list[dict[str, Any]] = []
    benches = {cell.key: CellStore(cell.key).bench(identity) for cell in plan.cells}
    bandwidth = latency.best_bandwidth(benches.values())
    for cell in plan.cells:
        row, record = row_of(cell, plan, outcomes.get(cell.key), benches[cell.key], bandwidth, measured.get(cell.key))
        if bench := record["bench"]:
            kernels += latency.kernel_rows(
                bench.get("kernels", []), bandwidth, bench["machine"], row["model"], label(row), cell.key
            )
        for name, score in record["scores"].items():
            if score and streams.setdefault(name, score["tokens_sha256"]) != score["tokens_sha256"]:
                raise ValueError(f"{name} was scored on two different token streams; run again with --fresh")
        weights |= {name: score.get("window_weight") for name, score in record["scores"].items() if score}
        answered[cell.key] = record["tasks"]
        losses[cell.key] = {name: score["window_nll"] for name, score in record["scores"].items() if score}
        write_json(folder / "cells" / f"{cell.key}.json", record)
        if cell.allocate == "ilp" and record["artifact"]:
            stored[cell.key] = record["artifact"]["layers"]
        rows.append(row)
    unseeded = {cell.key for cell in plan.cells if not cell.method.seeded}
    add_ranks(rows, losses, names, weights, unseeded)
    fill_tasks(rows, answered, tasks, plan.reference.key, unseeded)
    rows.sort(key=lambda row: _order(row, names))
    write_csv(
        folder / "leaderboard.csv",
        [*COLUMNS_BEFORE, *protocol_columns(names), *task_columns(tasks), *COLUMNS_AFTER],
        rows,
    )
    (folder / "kernels.csv").unlink(missing_ok=True)  # of an earlier measurement
    if kernels:
        write_csv(folder / "kernels.csv", list(latency.KERNEL_COLUMNS), kernels)
    write_pages(folder, rows, answered, tasks, plan.reference.key)
    tables = [shown_table(rows, names, shown_tasks(tasks))]
    text = markdown(*tables[0])
    summary = summarise(rows, losses, names, weights)
    task_means(summary, rows, tasks)
    if any(row["seeds"] > 1 for row in summary):
        write_csv(folder / "summary.csv", list(summary[0]), summary)
        means = markdown(*shown_table(summary, names, shown_tasks(tasks, ranks=False)))
        text = means + "\nMean over seeds, ± standard deviation between them. Every cell:\n\n" + text
    if stored:
        text += (
            "\nStored bits per weight of each kind of matrix, mean (least to most); every matrix is in `cells/`:\n\n"
        )
        tables.append(plan_table({label(row): stored[row["cell"]] for row in rows if row["cell"] in stored}))
        text += markdown(*tables[1])
    note = rows[0]["model_note"]
    write_text(folder / "leaderboard.md", text + (f"\nNote on {rows[0]['model']}: {note}.\n" if note else ""))
    return rows, tables


def row_of(
    cell: Cell,
    plan: Plan,
    outcome: Outcome | None,
    bench: Mapping[str, Any] | None,
    bandwidth: float,
    measured: Outcome | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(leaderboard row, full record) of a cell, from what is stored; `bench` is this machine's measurement of it, if
    there is one, and `bandwidth` what this machine reads in a second."""
    store = CellStore(cell.key)
    artifact = store.artifact() if not cell.refusal else None
    scores = {p.name: store.score(protocol_key(p)) for p in plan.protocols} if artifact else {}
    answered: Results = {task.name: store.task(task.key) for task in plan.tasks} if artifact else {}
    done = [score for score in scores.values() if score]
    error = cell.refusal or (outcome.error if outcome else "")
    bench = bench if artifact else None  # of an artifact that is there
    middle = (*protocol_columns([p.name for p in plan.protocols]), *task_columns(plan.tasks))
    row: dict[str, Any] = dict.fromkeys((*COLUMNS_BEFORE, *middle, *COLUMNS_AFTER), "")
    status = "skipped" if outcome and outcome.skipped else _status(cell, artifact, scores, answered, error)
    row |= {
        "model": cell.model.name,
        "method": cell.method.name,
        "variant": cell.method.variant or cell.method_text.partition(":")[2],
        "track": str(cell.method.track),
        "status": status,
        "budget_bpw": cell.budget.text if cell.budget else "",
        "seed": cell.seed,
        "device": cell.compute.device,
        "allocate": cell.allocate if cell.budget else "",
        "harness_version": __version__,
        "cell": cell.key,
        "model_note": cell.model.note,
        "reason": error or (measured.error if measured else ""),
    }
    if artifact:
        row |= {name: artifact[name] for name in ("stored_bpw", "code_bpw", "checkpoint_bytes", "compress_s")}
        row["harness_version"] = artifact["environment"]["harness"]
        if allocation := artifact["allocation"]:
            row |= {
                "plan_cost": allocation["predicted"],
                "plan_gap": allocation["gap"],
                "plan_s": allocation["seconds"],
            }
        for name in ("tuning_steps", "tuning_tokens"):  # the same for every block
            row[name] = max(
                (layer["report"][name] for layer in artifact["layers"].values() if name in layer["report"]), default=""
            )
        if training := artifact.get("training"):
            row |= {
                f"training_{what}": training[name]
                for what, name in (("steps", "steps"), ("tokens", "tokens"), ("s", "seconds"))
            }
        row["weights_gib"] = artifact["checkpoint_bytes"] / 2**30
        results = (artifact, *done, *filter(None, answered.values()))
        row["peak_ram_gib"] = max(result["peak_ram_gib"] for result in results)
    if done:
        row |= {
            "kind": done[0]["kind"],
            "resident_bpw": done[0]["resident_bpw"],
            "eval_s": sum(score["seconds"] for score in done),
        }
        if any(seconds := [score.get("decode_s") or 0.0 for score in done]):
            row["decode_s_on_load"] = max(seconds)
    if bench:
        row |= latency.bench_values(bench, bandwidth)
    for name, score in scores.items():
        if score:
            row |= _protocol_values(name, score)
    # Likelihoods of single answers stay in the store.
    short = {
        name: {k: v for k, v in result.items() if k != "loglikelihoods"} if result else None
        for name, result in answered.items()
    }
    record = {"artifact": artifact, "scores": scores, "tasks": short, "bench": bench}
    return row, {"row": row, "seeded": cell.method.seeded, **record}


def _protocol_values(name: str, score: dict[str, Any]) -> dict[str, Any]:
    values = {f"ppl_{name}": score["ppl"]}
    if math.isfinite(score["ppl"]):
        values[f"ppl_{name}_lo"], values[f"ppl_{name}_hi"] = perplexity_interval(
            score["window_nll"], score.get("window_weight")
        )
    if divergence := score["divergence"]:
        values |= {
            f"kld_{name}": divergence["kld"],
            f"kld_{name}_p90": divergence["kld_p90"],
            f"top1_{name}": divergence["top1"],
        }
    return values


def _status(cell: Cell, artifact: dict | None, scores: Mapping[str, dict | None], tasks: Results, error: str) -> str:
    if cell.refusal:
        return "refused"
    if error or artifact is None or any(result is None for result in (*scores.values(), *tasks.values())):
        return "failed"
    if any(score["nonfinite_windows"] or not math.isfinite(score["ppl"]) for score in scores.values() if score):
        return "nonfinite"
    if any(result["nonfinite_items"] for result in tasks.values() if result):
        return "nonfinite"
    ledger = artifact["ledger"]
    return (
        "underspent" if cell.budget and underspent(ledger["stored_bits"], ledger["weights"], cell.budget.bpw) else "ok"
    )


def _order(row: dict[str, Any], names: Sequence[str]) -> tuple[Any, ...]:
    """The reference first, then by budget; inside a budget the better first perplexity first, rows without one last."""
    first = row[f"ppl_{names[0]}"] if names else ""
    value = first if isinstance(first, float) and math.isfinite(first) else math.inf
    return (Fraction(row["budget_bpw"] or 0), value, row["method"], row["variant"], row["seed"])


def write_csv(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
