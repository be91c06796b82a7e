"""Zero-shot tasks, item by item: lm-eval asks and marks, the model in memory answers, and every item's outcome is kept.

A result holds, for every item in the order of lm-eval's documents and for every metric, `correct` ("1" right, "0"
wrong) and `answers` (index of the chosen answer; of lambada whether greedy decoding says the word), and the
log-likelihood of every answer. Requests are known by the sha256 of their texts, so rows that were asked different
questions cannot share a column."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from harness.data.assets import Say
from harness.data.task_documents import load_task
from harness.data.tasks import Task
from harness.model import load_tokenizer
from harness.report.stats import standard_error
from harness.store.files import canonical

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

    from harness.evaluate.lm import BranchingLM

Progress = Callable[[str, int, int], None]  # (what is going on, done, total), in tokens


def requests_sha256(requests: Iterable[tuple[str, str]]) -> str:
    """sha256 over (context, continuation) pairs, in order."""
    return hashlib.sha256("\n".join(canonical(list(pair)) for pair in requests).encode()).hexdigest()


def open_lm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> BranchingLM:
    """lm-eval's view of a model in memory, for `score_task`. Raises ImportError without lm-eval."""
    from harness.evaluate.lm import BranchingLM

    return BranchingLM(model, tokenizer)


def score_task(lm: BranchingLM, task: Task) -> dict[str, Any]:
    """All items of a task (the first `limit`), by lm-eval's own evaluation; the module's description says what is in
    the result."""
    import lm_eval

    loaded = load_task(task)
    start = time.perf_counter()
    results = lm_eval.evaluate(
        lm, {"tasks": {task.name: loaded}}, limit=task.limit, bootstrap_iters=0
    )  # intervals are ours
    samples = sorted(results["samples"][task.name], key=lambda sample: sample["doc_id"])
    correct = {metric: [int(sample[metric]) for sample in samples] for metric in task.metrics}
    likelihoods = [[value for value, _ in sample["filtered_resps"]] for sample in samples]
    return {
        "task": task.to_json(),
        "lm_eval": metadata.version("lm_eval"),
        "items": len(samples),
        "of_items": len(loaded.eval_docs),
        "requests_sha256": requests_sha256(arguments for sample in samples for arguments in sample["arguments"]),
        "metrics": {
            m: {"value": math.fsum(values) / len(values), "stderr": standard_error(values)}
            for m, values in correct.items()
        },
        "correct": {metric: "".join(map(str, values)) for metric, values in correct.items()},
        "answers": {metric: [_answer(loaded, sample, metric) for sample in samples] for metric in task.metrics},
        "nonfinite_items": sum(not all(map(math.isfinite, values)) for values in likelihoods),
        "loglikelihoods": likelihoods,
        "branching": lm.branching,
        "seconds": time.perf_counter() - start,
    }


def prepare(tasks: Iterable[Task], say: Say) -> None:
    """Load every task before any cell starts: documents that cannot be had should cost seconds, not a finished
    compression."""
    for task in tasks:
        load_task(task, say)


def _answer(task: ConfigurableTask, sample: Mapping[str, Any], metric: str) -> int:
    """Index of the most likely answer, the first of equals; divided by its characters for acc_norm, as lm-eval does."""
    responses = sample["filtered_resps"]
    if task.OUTPUT_TYPE == "loglikelihood":
        return int(responses[0][1])
    lengths = (
        [len(choice) for choice in task.doc_to_choice(sample["doc"])] if metric == "acc_norm" else [1] * len(responses)
    )
    values = [value / length for (value, _), length in zip(responses, lengths, strict=True)]
    return max(range(len(values)), key=values.__getitem__)


def score_tasks(
    model: PreTrainedModel,
    tokenizer_path: Path,
    tasks: Mapping[str, Task],
    put: Callable[[str, dict[str, Any]], None],
    progress: Progress,
) -> None:
    """Score tasks one after the other and hand each result to `put(key, result)` at once, so that a later death costs
    one task."""
    if not tasks:
        return
    lm = open_lm(model, load_tokenizer(tokenizer_path))
    for key, task in tasks.items():
        phase = f"{task.name} (tokens)"
        progress(phase, 0, 1)
        lm.progress = lambda done, total, phase=phase: progress(phase, done, total)
        put(key, score_task(lm, task))
