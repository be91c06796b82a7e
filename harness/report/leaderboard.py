"""The leaderboard: one row per cell, as CSV and Markdown, with one JSON per cell and one line per product in
kernels.csv beside it.

Columns of a protocol P: `ppl_P` with its 95 % interval `ppl_P_lo`, `ppl_P_hi`; `rank_P` within budget, track and seed,
shared by rows that cannot be told apart; `kld_P`, `kld_P_p90`, `top1_P` against the reference, whose own row shows the
noise floor. A cell scored on another token stream of the same name is refused rather than put beside the others."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from harness import __version__
from harness.data.files import Json, write_json, write_text
from harness.data.protocols import protocol_key
from harness.ledger import underspent
from harness.plan.cells import Cell, Plan
from harness.report import latency
from harness.report.sheet import Row, Sheet, allocation_sheet, label, leaderboard_sheet, number
from harness.report.stats import perplexity_interval
from harness.report.summary import add_ranks, summarise
from harness.report.task_pages import (
    TIME_COLUMN,
    fill_tasks,
    shown_tasks,
    task_columns,
    task_means,
    write_pages,
)
from harness.store.cells import CellStore
from harness.store.records import Artifact, LayerRecord, Outcome
from harness.store.results import Bench, Score, TaskResult

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


@dataclass(frozen=True)
class CellReport:
    """All that a leaderboard says of one cell; what is not stored is None."""

    row: Row
    seeded: bool  # whether a seed can change it
    artifact: Artifact | None
    scores: dict[str, Score | None]  # by protocol
    tasks: dict[str, TaskResult | None]  # by task
    bench: Bench | None

    @property
    def done(self) -> dict[str, Score]:
        return {name: score for name, score in self.scores.items() if score}

    def to_json(self) -> dict[str, Json]:
        """As `cells/<key>.json` has it: likelihoods of single answers stay in the store."""
        tasks = {name: result.to_json() if result else None for name, result in self.tasks.items()}
        return {
            "row": dict(self.row),
            "seeded": self.seeded,
            "artifact": self.artifact.to_json() if self.artifact else None,
            "scores": {name: score.to_json() if score else None for name, score in self.scores.items()},
            "tasks": {
                name: {key: value for key, value in result.items() if key != "loglikelihoods"} if result else None
                for name, result in tasks.items()
            },
            "bench": self.bench.to_json() if self.bench else None,
        }


def write_leaderboard(
    plan: Plan, outcomes: Mapping[str, Outcome], folder: Path, identity: str, measured: Mapping[str, Outcome]
) -> tuple[list[Row], list[Sheet]]:
    """Write leaderboard.csv, leaderboard.md, cells/<key>.json and, where there are any, kernels.csv and (with several
    seeds) summary.csv; returns the rows in order, and the sheets people see. `outcomes` are the cells', `measured`
    those of their measurements, which are looked up under this machine's `identity`."""
    names, tasks, reference = [protocol.name for protocol in plan.protocols], plan.tasks, plan.reference.key
    benches = {cell.key: CellStore(cell.key).bench(identity) for cell in plan.cells}
    bandwidth = latency.best_bandwidth(benches.values())
    reports = {
        cell.key: report_of(cell, plan, outcomes.get(cell.key), benches[cell.key], bandwidth, measured.get(cell.key))
        for cell in plan.cells
    }
    _require_one_stream(reports.values())
    for key, report in reports.items():
        write_json(folder / "cells" / f"{key}.json", report.to_json())
    rows = [report.row for report in reports.values()]
    losses = {key: {name: score.window_nll for name, score in report.done.items()} for key, report in reports.items()}
    weights = {name: score.window_weight for report in reports.values() for name, score in report.done.items()}
    answered = {key: report.tasks for key, report in reports.items()}
    unseeded = {key for key, report in reports.items() if not report.seeded}
    add_ranks(rows, losses, names, weights, unseeded)
    fill_tasks(rows, answered, tasks, reference, unseeded)
    rows.sort(key=lambda row: _order(row, names))
    columns = [*COLUMNS_BEFORE, *protocol_columns(names), *task_columns(tasks), *COLUMNS_AFTER]
    write_csv(folder / "leaderboard.csv", columns, rows)
    _write_kernels(folder / "kernels.csv", reports, bandwidth)
    write_pages(folder, rows, answered, tasks, reference)
    sheets = [leaderboard_sheet(rows, names, shown_tasks(tasks))]
    text = sheets[0].markdown()
    summary = summarise(rows, losses, names, weights)
    task_means(summary, rows, tasks)
    if any(number(row, "seeds") > 1 for row in summary):
        write_csv(folder / "summary.csv", list(summary[0]), summary)
        means = leaderboard_sheet(summary, names, shown_tasks(tasks, ranks=False)).markdown()
        text = means + "\nMean over seeds, ± standard deviation between them. Every cell:\n\n" + text
    if mixed := _mixed_layers(plan, reports):
        text += (
            "\nStored bits per weight of each kind of matrix, mean (least to most); every matrix is in `cells/`:\n\n"
        )
        sheets.append(allocation_sheet({label(row): mixed[str(row["cell"])] for row in rows if row["cell"] in mixed}))
        text += sheets[1].markdown()
    note = rows[0]["model_note"]
    write_text(folder / "leaderboard.md", text + (f"\nNote on {rows[0]['model']}: {note}.\n" if note else ""))
    return rows, sheets


def _require_one_stream(reports: Iterable[CellReport]) -> None:
    """Raises ValueError when one protocol's column would hold scores of different tokens."""
    streams: dict[str, str] = {}
    for report in reports:
        for name, score in report.done.items():
            if streams.setdefault(name, score.tokens_sha256) != score.tokens_sha256:
                raise ValueError(f"{name} was scored on two different token streams; run again with --fresh")


def _write_kernels(path: Path, reports: Mapping[str, CellReport], bandwidth: float) -> None:
    path.unlink(missing_ok=True)  # of an earlier measurement
    rows: list[Row] = []
    for key, report in reports.items():
        if bench := report.bench:
            model, row = str(report.row["model"]), label(report.row)
            rows += latency.kernel_rows(bench.kernels, bandwidth, bench.machine, model, row, key)
    if rows:
        write_csv(path, list(latency.KERNEL_COLUMNS), rows)


def _mixed_layers(plan: Plan, reports: Mapping[str, CellReport]) -> dict[str, dict[str, LayerRecord]]:
    """The layers of every cell that decided each layer's configuration by itself."""
    found = {}
    for cell in plan.cells:
        artifact = reports[cell.key].artifact
        if cell.allocate == "ilp" and artifact:
            found[cell.key] = artifact.layers
    return found


def report_of(
    cell: Cell, plan: Plan, outcome: Outcome | None, bench: Bench | None, bandwidth: float, measured: Outcome | None
) -> CellReport:
    """The report of a cell from what is stored; `bench` is this machine's measurement of it, if there is one,
    `bandwidth` the bytes that this machine reads in a second, `measured` how measuring ended."""
    store = CellStore(cell.key)
    artifact = store.artifact() if not cell.refusal else None
    scores = {p.name: store.score(protocol_key(p)) for p in plan.protocols} if artifact else {}
    tasks = {task.name: store.task(task.key) for task in plan.tasks} if artifact else {}
    error = cell.refusal or (outcome.error if outcome else "")
    bench = bench if artifact else None  # of an artifact that is there
    middle = (*protocol_columns([p.name for p in plan.protocols]), *task_columns(plan.tasks))
    row: Row = dict.fromkeys((*COLUMNS_BEFORE, *middle, *COLUMNS_AFTER), "")
    status = "skipped" if outcome and outcome.skipped else _status(cell, artifact, scores, tasks, error)
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
    report = CellReport(row, cell.method.seeded, artifact, scores, tasks, bench)
    done, answered = list(report.done.values()), [result for result in tasks.values() if result]
    if artifact:
        row |= _artifact_values(artifact)
        peaks = [artifact.peak_ram_gib, *(score.peak_ram_gib for score in done)]
        row["peak_ram_gib"] = max([*peaks, *(result.peak_ram_gib or 0.0 for result in answered)])
    if done:
        row |= {
            "kind": done[0].kind,
            "resident_bpw": done[0].resident_bpw,
            "eval_s": sum(score.seconds for score in done),
        }
        if any(seconds := [score.decode_s for score in done]):
            row["decode_s_on_load"] = max(seconds)
    if bench:
        row |= latency.bench_values(bench, bandwidth)
    for name, score in report.done.items():
        row |= _protocol_values(name, score)
    return report


def _artifact_values(artifact: Artifact) -> Row:
    row: Row = {
        "stored_bpw": artifact.stored_bpw,
        "code_bpw": artifact.code_bpw,
        "checkpoint_bytes": artifact.checkpoint_bytes,
        "weights_gib": artifact.checkpoint_bytes / 2**30,
        "compress_s": artifact.compress_s,
        "harness_version": artifact.environment.harness,
    }
    if found := artifact.allocation:
        row |= {"plan_cost": found.predicted, "plan_gap": found.gap, "plan_s": found.seconds}
    for name in ("tuning_steps", "tuning_tokens"):  # the same for every block
        row[name] = max((layer.report[name] for layer in artifact.layers.values() if name in layer.report), default="")
    if training := artifact.training:
        row |= {
            "training_steps": training.steps,
            "training_tokens": training.tokens,
            "training_s": training.seconds,
        }
    return row


def _protocol_values(name: str, score: Score) -> Row:
    values: Row = {f"ppl_{name}": score.ppl}
    if math.isfinite(score.ppl):
        low, high = perplexity_interval(score.window_nll, score.window_weight)
        values |= {f"ppl_{name}_lo": low, f"ppl_{name}_hi": high}
    if divergence := score.divergence:
        values |= {
            f"kld_{name}": divergence.kld,
            f"kld_{name}_p90": divergence.kld_p90,
            f"top1_{name}": divergence.top1,
        }
    return values


def _status(
    cell: Cell,
    artifact: Artifact | None,
    scores: Mapping[str, Score | None],
    tasks: Mapping[str, TaskResult | None],
    error: str,
) -> str:
    if cell.refusal:
        return "refused"
    if error or artifact is None or None in (*scores.values(), *tasks.values()):
        return "failed"
    if any(score.nonfinite_windows or not math.isfinite(score.ppl) for score in scores.values() if score):
        return "nonfinite"
    if any(result.nonfinite_items for result in tasks.values() if result):
        return "nonfinite"
    ledger = artifact.ledger
    return "underspent" if cell.budget and underspent(ledger.stored_bits, ledger.weights, cell.budget.bpw) else "ok"


def _order(row: Row, names: Sequence[str]) -> tuple[Fraction, float, str, str, float]:
    """The reference first, then by budget; inside a budget the better first perplexity first, rows without one last."""
    first = row[f"ppl_{names[0]}"] if names else ""
    value = first if isinstance(first, float) and math.isfinite(first) else math.inf
    return Fraction(row["budget_bpw"] or 0), value, str(row["method"]), str(row["variant"]), number(row, "seed")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
