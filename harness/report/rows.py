"""The row of one cell, from what is stored of it: columns, values, status.

Columns of a protocol P: `ppl_P` with its 95 % interval `ppl_P_lo`, `ppl_P_hi`; `rank_P` within budget, track and seed,
shared by rows that cannot be told apart; `kld_P` with interval and percentiles, `reverse_kld_P`, `top1_P` against the
reference, whose own row shows the noise floor. Columns of memory and latency are in harness.report.latency, of tasks in
harness.report.task_pages."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from harness import __version__
from harness.data.files import Json
from harness.data.protocols import protocol_key
from harness.ledger import underspent
from harness.plan.budgets import MIXED
from harness.plan.cells import Cell, Plan
from harness.report import latency
from harness.report.sheet import Row
from harness.report.stats import MIN_WINDOWS, interval, perplexity_interval, resampled_means
from harness.report.task_pages import TIME_COLUMN
from harness.store.cells import CellStore
from harness.store.records import Artifact, Ending, LayerRecord, Outcome
from harness.store.results import Bench, Score, TaskResult
from methods.base import Track

COLUMNS_BEFORE = (
    "model",
    "method",
    "variant",
    "track",
    "kind",
    "status",
    "budget_bpw",
    "act_bits",
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
    "training_loss",
    "training_s",
    "fallback_layers",
    "device",
    "seed",
    "harness_version",
    "cell",
    "reason",
    "model_note",
)
TENANTS = {f"gib_{count}_tenants": count for count in (1, 10, 100)}  # models that share one base
NEEDED = {"model", "method", "variant", "budget_bpw", "seed", "track", "status", "cell"}  # columns of every row
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
            ("kld", "_lo"),
            ("kld", "_hi"),
            ("kld", "_p90"),
            ("kld", "_p99"),
            ("kld", "_p999"),
            ("reverse_kld", ""),
            ("top1", ""),
        )
    ]
    return [f"ppl_{name}" for name in names] + more


def role_columns(reports: Iterable[CellReport]) -> list[str]:
    """`bpw_<role>` of every role of matrix that a packed model of these has; experts count as one role."""
    found = (name for report in reports if report.artifact for name in role_bits(report.artifact))
    return list(dict.fromkeys(f"bpw_{name}" for name in found))


def role_bits(artifact: Artifact) -> dict[str, float]:
    """Stored bits per weight of each role of matrix: the mean over its matrices."""
    found: dict[str, list[float]] = {}
    for layer in artifact.layers.values():
        found.setdefault(_EXPERT.sub(".*", layer.role), []).append(layer.stored_bpw)
    return {role: fmean(bits) for role, bits in found.items()}


def delta_columns(reports: Iterable[CellReport]) -> list[str]:
    """Those of models that are a pair, where there are any."""
    return ["delta_bpw", *TENANTS] if any(r.row["track"] == Track.DELTA for r in reports) else []


_EXPERT = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True)
class CellReport:
    """All that a leaderboard says of one cell; what is not stored is None."""

    row: Row  # not every column: those of ranks are a table's, and some are of other protocols
    seeded: bool  # whether a seed can change it
    artifact: Artifact | None
    scores: dict[str, Score | None]  # by protocol
    tasks: dict[str, TaskResult | None]  # by task
    bench: Bench | None

    @property
    def done(self) -> dict[str, Score]:
        return {name: score for name, score in self.scores.items() if score}

    @property
    def mixed_layers(self) -> dict[str, LayerRecord]:
        """The layers, where each one's configuration was decided by itself."""
        return self.artifact.layers if self.artifact and self.row["allocate"] in MIXED else {}

    def to_json(self) -> dict[str, Json]:
        """What `cells/<key>.json` holds: likelihoods of single answers stay in the store."""
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

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> CellReport:
        """What `to_json` of this or an earlier version wrote. Raises ValueError, naming `where`."""
        row, scores, tasks = (data.get(name, {}) for name in ("row", "scores", "tasks"))
        if not all(isinstance(part, dict) for part in (row, scores, tasks)) or not row.keys() >= NEEDED:
            raise ValueError(f"{where} is no cell of a run: the run's own command writes it again")
        artifact, bench = data.get("artifact"), data.get("bench")
        return cls(
            row,
            data.get("seeded", True),
            Artifact.from_json(artifact, f"{where}: artifact") if artifact else None,
            {name: Score.from_json(part, f"{where}: {name}") if part else None for name, part in scores.items()},
            {name: TaskResult.from_json(part, f"{where}: {name}") if part else None for name, part in tasks.items()},
            Bench.from_json(bench, f"{where}: bench") if bench else None,
        )

    def filled(self, bandwidth: float) -> CellReport:
        """The report with all that its row says of what is stored. `bandwidth`: bytes that this machine reads in a
        second."""
        row, done = dict(self.row), list(self.done.values())
        if self.artifact:
            row |= _artifact_values(self.artifact)
            peaks = [self.artifact.peak_ram_gib, *(score.peak_ram_gib for score in done)]
            answered = [result for result in self.tasks.values() if result]
            row["peak_ram_gib"] = max([*peaks, *(result.peak_ram_gib or 0.0 for result in answered)])
        if done:
            row |= {
                "kind": done[0].kind,
                "resident_bpw": done[0].resident_bpw,
                "eval_s": sum(score.seconds for score in done),
            }
            if any(seconds := [score.decode_s for score in done]):
                row["decode_s_on_load"] = max(seconds)
        if self.bench:
            row |= latency.bench_values(self.bench, bandwidth)
        for name, score in self.done.items():
            row |= _protocol_values(name, score)
        return replace(self, row=row)


def report_of(
    cell: Cell, plan: Plan, outcome: Outcome | None, bench: Bench | None, measured: Outcome | None
) -> CellReport:
    """The report of a cell from what is stored, not `filled` yet; `bench` is this machine's measurement of it, if there
    is one, `measured` how measuring ended."""
    store = CellStore(cell.key)
    artifact = store.artifact() if not cell.refusal else None
    scores = {p.name: store.score(protocol_key(p)) for p in plan.protocols} if artifact else {}
    tasks = {task.name: store.task(task.key) for task in plan.tasks} if artifact else {}
    if (
        outcome
        and outcome.ending == Ending.INTERRUPTED
        and artifact
        and None not in (*scores.values(), *tasks.values())
    ):
        outcome = None  # another run has finished what this one was taken away from
    error = cell.refusal or (outcome.error if outcome else "")
    row: Row = {
        "model": cell.model.name,
        "method": cell.method.name,
        "variant": cell.method.variant or cell.method_text.partition(":")[2],
        "track": str(cell.track),
        "status": str(_status(cell, artifact, scores, tasks, outcome)),
        "budget_bpw": cell.budget.text if cell.budget else "",
        "act_bits": cell.act_bits,
        "seed": cell.seed,
        "device": cell.compute.device,
        "allocate": cell.allocate if cell.budget else "",
        "harness_version": __version__,
        "cell": cell.key,
        "model_note": cell.model.note,
        "reason": error or (measured.error if measured else "") or _overflow(scores) or _no_divergence(scores),
    }
    return CellReport(row, cell.method.seeded, artifact, scores, tasks, bench if artifact else None)


def _overflow(scores: Mapping[str, Score | None]) -> str:
    """What is not finite, of a row without another reason."""
    found = {name: score.nonfinite_windows for name, score in scores.items() if score and score.nonfinite_windows}
    return "; ".join(f"{count} windows of {name} have no finite loss" for name, count in found.items())


def _no_divergence(scores: Mapping[str, Score | None]) -> str:
    """What is missing of a row that was scored while the reference was not."""
    missing = [name for name, score in scores.items() if score and score.divergence is None]
    return f"the reference was not scored on {', '.join(missing)}: the same command adds kld" if missing else ""


def _artifact_values(artifact: Artifact) -> Row:
    row: Row = {
        "stored_bpw": artifact.stored_bpw,
        "code_bpw": artifact.code_bpw,
        "checkpoint_bytes": artifact.checkpoint_bytes,
        "weights_gib": artifact.checkpoint_bytes / 2**30,
        "compress_s": artifact.compress_s,
        "fallback_layers": artifact.fallback_layers,
        "harness_version": artifact.environment.harness,
    }
    if artifact.base_bytes is not None:
        row["delta_bpw"] = artifact.stored_bpw
        row |= {
            column: (artifact.base_bytes + count * artifact.checkpoint_bytes) / 2**30
            for column, count in TENANTS.items()
        }
    if artifact.source_note:
        row["model_note"] = "; ".join(filter(None, (artifact.spec.model.note, artifact.source_note)))
    if found := artifact.allocation:
        row |= {"plan_cost": found.predicted, "plan_gap": found.gap, "plan_s": found.seconds}
    for name in ("tuning_steps", "tuning_tokens"):  # the same for every block
        row[name] = max((layer.report[name] for layer in artifact.layers.values() if name in layer.report), default="")
    row |= {f"bpw_{role}": bits for role, bits in role_bits(artifact).items()}
    if training := artifact.training:
        row |= {
            "training_steps": training.steps,
            "training_tokens": training.tokens,
            "training_loss": training.text.loss,
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
            f"kld_{name}_p99": divergence.kld_p99,
            f"top1_{name}": divergence.top1,
        }
        if len(divergence.window_kld) >= MIN_WINDOWS and score.window_weight is None and math.isfinite(divergence.kld):
            low, high = interval(resampled_means(divergence.window_kld))
            values |= {f"kld_{name}_lo": low, f"kld_{name}_hi": high}
        if divergence.reverse_kld is not None and divergence.kld_p999 is not None:
            values |= {f"kld_{name}_p999": divergence.kld_p999, f"reverse_kld_{name}": divergence.reverse_kld}
    return values


def _status(
    cell: Cell,
    artifact: Artifact | None,
    scores: Mapping[str, Score | None],
    tasks: Mapping[str, TaskResult | None],
    outcome: Outcome | None,
) -> str:
    if cell.refusal:
        return Ending.REFUSED
    if outcome and outcome.ending != Ending.OK:
        return outcome.ending
    if artifact is None or None in (*scores.values(), *tasks.values()):
        return Ending.FAILED
    if any(score.nonfinite_windows or not math.isfinite(score.ppl) for score in scores.values() if score):
        return Ending.NON_FINITE
    if any(result.nonfinite_items for result in tasks.values() if result):
        return Ending.NON_FINITE
    ledger = artifact.ledger
    spent = not cell.budget or not underspent(ledger.stored_bits, ledger.weights, cell.budget.bpw)
    return Ending.OK if spent else "underspent"
