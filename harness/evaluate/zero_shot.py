"""Zero-shot tasks, item by item: lm-eval asks and marks, the model in memory answers, and every item's outcome is kept
(harness.store.results.TaskResult).

Requests are known by the sha256 of their texts, so rows that were asked different questions cannot share a column."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from harness.data.assets import ResolvedModel
from harness.data.checkpoint import load_tokenizer
from harness.data.files import canonical
from harness.data.task_documents import load_task
from harness.data.tasks import Task
from harness.progress import Progress, Say
from harness.store.results import Accuracy, TaskResult

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from harness.evaluate.lm import BranchingLM


def requests_sha256(requests: Iterable[tuple[str, str]]) -> str:
    """sha256 over (context, continuation) pairs, in order."""
    return hashlib.sha256("\n".join(canonical(list(pair)) for pair in requests).encode()).hexdigest()


def open_lm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> BranchingLM:
    """lm-eval's view of a model in memory, for `score_task`. Raises ImportError without lm-eval."""
    from harness.evaluate.lm import BranchingLM

    return BranchingLM(model, tokenizer)


def score_task(lm: BranchingLM, task: Task) -> TaskResult:
    """All items of a task (the first `limit`), by lm-eval's own evaluation."""
    import lm_eval

    loaded = load_task(task)
    start = time.perf_counter()
    # Without resampling: intervals are ours.
    results = lm_eval.evaluate(lm, {"tasks": {task.name: loaded}}, limit=task.limit, bootstrap_iters=0)
    samples = sorted(results["samples"][task.name], key=lambda sample: sample["doc_id"])
    correct = {metric: [int(sample[metric]) for sample in samples] for metric in task.metrics}
    likelihoods = tuple(tuple(value for value, _ in sample["filtered_resps"]) for sample in samples)
    return TaskResult(
        task=task,
        lm_eval=metadata.version("lm_eval"),
        items=len(samples),
        of_items=len(loaded.eval_docs),
        requests_sha256=requests_sha256(arguments for sample in samples for arguments in sample["arguments"]),
        metrics={
            metric: Accuracy(math.fsum(marks) / len(marks), standard_error(marks)) for metric, marks in correct.items()
        },
        correct={metric: "".join(map(str, marks)) for metric, marks in correct.items()},
        answers={metric: tuple(_answer(loaded, sample, metric) for sample in samples) for metric in task.metrics},
        nonfinite_items=sum(not all(map(math.isfinite, values)) for values in likelihoods),
        loglikelihoods=likelihoods,
        branching=lm.branching,
        seconds=time.perf_counter() - start,
    )


def standard_error(values: Sequence[float]) -> float:
    """The standard error of a mean: sample standard deviation / sqrt(n), as lm-eval has it; not a number for a single
    value."""
    count = len(values)
    mean = math.fsum(values) / count
    return (
        math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count) if count > 1 else math.nan
    )


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
    resolved: ResolvedModel,
    tasks: Mapping[str, Task],
    put: Callable[[str, TaskResult], None],
    progress: Progress,
) -> None:
    """Score tasks one after the other and hand each result to `put(key, result)` at once, so that a later death costs
    one task. `progress` counts tokens."""
    if not tasks:
        return
    lm = open_lm(model, load_tokenizer(resolved.path, resolved.fingerprint))
    lm.progress = progress
    for key, task in tasks.items():
        lm.phase = f"{task.name} (tokens)"
        progress(lm.phase, 0, 1)
        put(key, score_task(lm, task))
