"""The model card of an export: how to load it, its ledger, its results, and the command that made it."""

from __future__ import annotations

import math
import shlex

from harness.portal.cells import StoredCell
from harness.report.stats import perplexity_interval
from harness.store.records import CellSpec
from harness.store.results import Score, TaskResult
from kernels.formats.bits import FULL


def card(cell: StoredCell, format: str, load: str) -> str:
    """README.md of an exported folder; every number of it is of the stored cell."""
    artifact, spec, store = cell.artifact, cell.artifact.spec, cell.store
    parts = artifact.ledger.bpw_by_part
    ledger = {
        "stored bits of the block weights": f"{artifact.ledger.stored_bits:,}",
        "block weights": f"{artifact.ledger.weights:,}",
        "stored bits per weight": f"{artifact.stored_bpw:.4f}",
        "of these: codes": f"{parts.codes:.4f}",
        "scales": f"{parts.scales:.4f}",
        "tables": f"{parts.tables:.4f}",
        "adapters": f"{parts.adapters:.4f}",
        "budget": spec.budget or "none",
        "cell": store.key,
    }
    scores = {p.name: store.score(key) for key, p in spec.protocols.items()}
    results = [_score_line(name, score) for name, score in scores.items() if score]
    tasks = [line for key in spec.tasks for line in _task_lines(store.task(key))]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [quantized, ptq-harness]",
        "---",
        "",
        f"# {spec.model.name}, {cell.label}",
        "",
        f"{_origin(spec)} and exported as `{format}` by ptq-harness {artifact.environment.harness}.",
        *([f"Of the model: {spec.model.note}."] if spec.model.note else []),
        *([f"Of the checkpoint: {artifact.source_note}."] if artifact.source_note else []),
        "",
        "```python",
        load,
        "```",
        "",
        "## Ledger",
        "",
        f"{_counted(spec)}; this folder's own may be laid out otherwise.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in ledger.items()),
        "",
        "## Results",
        "",
        "Of the cell, under the harness's protocols; `kld` is the divergence from the uncompressed model in nats.",
        "",
        *(
            ["| protocol | perplexity | kld | top-1 agreement |", "| --- | --- | --- | --- |", *results]
            if results
            else []
        ),
        *(["", "| task | metric | value | standard error |", "| --- | --- | --- | --- |", *tasks] if tasks else []),
        *([] if results or tasks else ["Not scored."]),
        "",
        "## Command",
        "",
        "```sh",
        command(spec),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _origin(spec: CellSpec) -> str:
    if spec.source:
        return f"{spec.model.name} as the checkpoint `{spec.source.name}` of another program has it, read"
    what = f"{spec.model.name} compressed by `{spec.method_text}`"
    return f"{what} to its difference from {spec.base.name}" if spec.base else what


def _counted(spec: CellSpec) -> str:
    """What the ledger is of."""
    if spec.source:
        return f"Of the checkpoint `{spec.source.name}`, counted from the bytes of its own tensors"
    if spec.base:
        return f"Of the difference, counted from the bytes of its tensors; {spec.base.name} is here in 16 bits as well"
    return "Of the cell, counted from the bytes of its tensors"


def command(spec: CellSpec) -> str:
    """What makes the cell again."""
    words = ["python", "-m", "harness", "run", "--model", spec.model.name]
    words += ["--base", spec.base.name] if spec.base else []
    if spec.source:  # its method is no text that can be typed; the reference is there without being named
        words += ["--methods", "fp16", "--model-cell", str(spec.source.path)]
    else:
        words += ["--methods", spec.method_text]
        words += ["--bits", spec.budget] if spec.budget else []
        words += ["--act-bits", str(spec.act_bits)] if spec.act_bits != FULL else []
        words += ["--allocate", spec.allocate, "--seeds", str(spec.seed)]
    words += ["--calibration", spec.calibration.text] if spec.calibration else []
    words += ["--training", spec.training.text] if spec.training else []
    words += ["--protocols", ",".join(p.name for p in spec.protocols.values())] if spec.protocols else []
    words += ["--tasks", ",".join(task.name for task in spec.tasks.values())] if spec.tasks else []
    return shlex.join([*words, "--dtype", spec.dtype])


def _score_line(name: str, score: Score) -> str:
    perplexity = f"{score.ppl:.3f}"
    if math.isfinite(score.ppl):
        low, high = perplexity_interval(score.window_nll, score.window_weight)
        perplexity += f" [{low:.3f}, {high:.3f}]"
    found = score.divergence
    return f"| {name} | {perplexity} | " + (f"{found.kld:.4f} | {found.top1:.4f} |" if found else "| |")


def _task_lines(result: TaskResult | None) -> list[str]:
    metrics = result.metrics.items() if result else ()
    return [f"| {result.task.name} | {n} | {m.value:.4f} | {m.stderr:.4f} |" for n, m in metrics if result]
