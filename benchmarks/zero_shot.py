"""Zero-shot items scored per second: this harness against lm-eval's own HFLM wrapper, on the same model, items and
threads, interleaved.

    python benchmarks/zero_shot.py [--model NAME] [--tasks piqa,arc_easy,hellaswag,winogrande] [--items 50] [--rounds 3]
    [--device cpu]

Both answer through lm_eval.evaluate. Prints for every task both accuracies, the largest difference of a log-likelihood,
and the medians of the seconds and of the rounds' ratios; stops when a log-likelihood differs by more than rounding
explains."""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import time
from typing import Any

import torch

from harness.data.assets import DEFAULT_MODEL, resolve_model
from harness.data.checkpoint import load_tokenizer
from harness.data.task_documents import load_task
from harness.data.tasks import parse_tasks
from harness.evaluate.zero_shot import open_lm
from harness.model import load_reference

ROUNDING = 0.01  # nats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--tasks", default="piqa,arc_easy,hellaswag,winogrande")
    parser.add_argument("--items", type=int, default=50, help="of every task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="batch size of HFLM; ours decides for itself")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    import lm_eval
    from lm_eval.models.huggingface import HFLM

    tasks = parse_tasks(arguments.tasks, limit=arguments.items)
    resolved = resolve_model(arguments.model)
    model = load_reference(
        resolved.path, arguments.device, torch.float32 if arguments.device == "cpu" else torch.float16
    )
    tokenizer = load_tokenizer(resolved.path)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    models = {
        "harness": open_lm(model, tokenizer),
        "HFLM": HFLM(pretrained=model, tokenizer=tokenizer, batch_size=arguments.batch),
    }
    threads = torch.get_num_threads()
    print(
        f"{resolved.name}, {arguments.items} items a task, {arguments.device}, {threads} threads, "
        f"{arguments.rounds} rounds"
    )
    print(f"{'task':16}{'harness':>18}{'HFLM':>18}{'nats apart':>12}{'harness s':>11}{'HFLM s':>9}{'ratio':>16}")
    totals: dict[str, list[float]] = {name: [0.0] * arguments.rounds for name in models}
    for task in tasks:
        seconds: dict[str, list[float]] = {name: [] for name in models}
        found: dict[str, dict[str, Any]] = {}
        for turn in range(arguments.rounds):
            order = list(models.items())
            for name, lm in order if turn % 2 == 0 else reversed(order):
                loaded = load_task(task)
                start = time.perf_counter()
                found[name] = lm_eval.evaluate(lm, {"tasks": {task.name: loaded}}, limit=task.limit, bootstrap_iters=0)
                seconds[name].append(time.perf_counter() - start)
                totals[name][turn] += seconds[name][-1]
        ours, theirs = (found[name]["samples"][task.name] for name in models)
        worst = _compare(ours, theirs, task.metrics)
        marks = [
            "/".join(f"{found[name]['results'][task.name][f'{metric},none']:.3f}" for metric in task.metrics)
            for name in models
        ]
        print(f"{task.name:16}{marks[0]:>18}{marks[1]:>18}{worst:12.1e}{_line(seconds)}", flush=True)
    print(f"{'all':64}{_line(totals)}")


def _compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], metrics: tuple[str, ...]) -> float:
    """Largest difference of a log-likelihood, in nats."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        assert a["doc_hash"] == b["doc_hash"] and a["arguments"] == b["arguments"], "not the same items"
        apart = max(abs(x - y) for (x, _), (y, _) in zip(a["filtered_resps"], b["filtered_resps"], strict=True))
        worst = max(worst, apart)
        if any(a[metric] != b[metric] for metric in metrics):
            print(
                f"item {a['doc_id']} is marked differently; its answers: "
                f"{a['filtered_resps']} and {b['filtered_resps']}"
            )
    assert worst < ROUNDING, f"log-likelihoods differ by {worst}"
    return worst


def _line(seconds: dict[str, list[float]]) -> str:
    ratios = [theirs / ours for ours, theirs in zip(seconds["harness"], seconds["HFLM"], strict=True)]
    medians = [statistics.median(values) for values in seconds.values()]
    return f"{medians[0]:11.1f}{medians[1]:9.1f}{statistics.median(ratios):7.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


if __name__ == "__main__":
    main()
