"""Zero-shot tasks: against lm-eval's own wrapper and command line, against plain sums of log-softmax, and as a user
types them.

The opt-in test (HARNESS_ONLINE_TESTS=1) needs the hub: it proves that pinned and hub documents give the same requests.
"""

import hashlib
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from harness.cli import main
from harness.data.task_documents import load_task, write_task_file
from harness.data.tasks import GROUPS, OFFICIAL, Task, parse_tasks
from harness.evaluate import branches
from harness.evaluate.branches import Text, follows_branches, log_likelihoods, plant
from harness.evaluate.zero_shot import open_lm, requests_sha256, score_task
from harness.model import load_reference
from harness.report.baseline import read_rows
from harness.report.stats import (
    MIN_WINDOWS,
    accuracy_difference,
    accuracy_interval,
    accuracy_ranks,
    interval,
    resampled_means,
    resampled_shares,
)
from harness.report.task_pages import fill_tasks
from harness.store.results import Accuracy, TaskResult
from tests.helpers import SMALL, run_harness

HASHES = json.loads((Path(__file__).parent / "request_hashes.json").read_text())
SAMPLE = 5  # first items of every task whose requests are known by their hash
ONLINE = pytest.mark.skipif(
    "HARNESS_ONLINE_TESTS" not in os.environ, reason="needs the hub: set HARNESS_ONLINE_TESTS=1"
)


# Thousands of documents: read once, for all tests that ask for requests.
loaded_once = cache(load_task)


def requests(task, limit=None):
    loaded = loaded_once(task)
    loaded.build_all_requests(limit=limit, rank=0, world_size=1)
    return loaded, [instance.args for instance in loaded.instances]


@pytest.fixture(scope="module")
def reference(truncated):
    return load_reference(truncated.path, "cpu", torch.float32)


@pytest.fixture(scope="module")
def lm(reference, short_tokenizer):
    return open_lm(reference, short_tokenizer)


# --- texts that share a beginning


def alone(model, text):
    with torch.inference_mode():
        log_p = model(torch.tensor([text.tokens])).logits[0, :-1].double().log_softmax(-1)[-text.count :]
    target = torch.tensor(text.tokens[-text.count :])
    return log_p.gather(1, target[:, None]).sum().item(), bool((log_p.argmax(-1) == target).all())


def test_texts_with_one_trunk_get_the_numbers_they_have_alone(reference, monkeypatch):
    source = random.Random(0)
    ids = lambda n: tuple(source.randrange(reference.config.vocab_size) for _ in range(n))  # noqa: E731
    trunk, other = ids(30), ids(11)
    with torch.inference_mode():
        said = reference(torch.tensor([trunk])).logits[0, -1].argmax().item()
    groups = [
        [Text(trunk + ids(5), 5), Text(trunk + ids(9), 9), Text((*trunk, said), 1)],
        [
            Text(other[:5] + ids(3) + other[5:], 6),
            Text(other[:5] + ids(1) + other[5:], 6),
        ],  # contexts differ, what is scored does not
        [Text(trunk[:2], 1), Text(trunk[:3], 1), Text(trunk[:4], 3)],  # one begins the other
        [Text(other, 10)],
        [Text((*trunk, 1), 1), Text((*trunk, 2), 1)],  # one token each: no branch at all
    ]
    trees = [plant(group) for group in groups]
    assert [len(tree.tokens) for tree in trees] == [30 + 4 + 8, 5 + (3 + 5) + (1 + 5), 1 + 1 + 2, 10, 30]
    for tokens in (10, 4096):  # a row at a time, and all padded to one length
        monkeypatch.setattr(branches, "BATCH_TOKENS", tokens)
        for group, found in zip(groups, log_likelihoods(reference, trees), strict=True):
            for text, (value, first) in zip(group, found, strict=True):
                expected, is_first = alone(reference, text)
                assert value == pytest.approx(expected, abs=2e-4) and first == is_first
    assert log_likelihoods(reference, trees[:1])[0][2][1]


def test_a_refused_mask_is_no_branch_and_a_broken_model_is_an_error(reference, monkeypatch):
    forward = reference.base_model.forward

    def refuses(*args, attention_mask=None, **kwargs):
        if attention_mask is not None:
            raise ValueError("no mask of four dimensions")
        return forward(*args, attention_mask=attention_mask, **kwargs)

    def broken(*args, **kwargs):
        raise RuntimeError("no such weight")

    monkeypatch.setattr(reference.base_model, "forward", refuses)
    assert not follows_branches(reference)
    monkeypatch.setattr(reference.base_model, "forward", broken)
    with pytest.raises(RuntimeError, match="no such weight"):
        follows_branches(reference)


def test_a_model_that_ignores_the_mask_is_scored_text_by_text(reference, short_tokenizer, monkeypatch):
    assert follows_branches(reference)
    monkeypatch.setattr(branches, "_mask", lambda branch_BL, dtype: None)
    assert not follows_branches(reference)
    plain = open_lm(reference, short_tokenizer)
    assert not plain.branching
    (task,) = parse_tasks("winogrande", limit=4)
    found = score_task(plain, task)
    monkeypatch.undo()
    together = score_task(open_lm(reference, short_tokenizer), task)
    assert found.correct == together.correct and not found.branching and together.branching
    for a, b in zip(found.loglikelihoods, together.loglikelihoods, strict=True):
        assert a == pytest.approx(b, abs=1e-3)


# --- against lm-eval


@pytest.mark.parametrize("name", ["arc_easy", "winogrande", "lambada_openai", "commonsense_qa"])
def test_items_get_the_answers_of_lm_evals_own_wrapper(name, lm, reference, short_tokenizer, assets_cache):
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    (task,) = parse_tasks(name, limit=8)
    ours = score_task(lm, task)
    wrapper = HFLM(pretrained=reference, tokenizer=short_tokenizer, batch_size=4)
    theirs = lm_eval.evaluate(
        wrapper, {"tasks": {name: load_task(task)}}, limit=8, bootstrap_iters=1 if name != "lambada_openai" else 0
    )
    for metric in task.metrics:
        assert ours.metrics[metric].value == theirs["results"][name][f"{metric},none"]
        assert ours.correct[metric] == "".join(str(int(sample[metric])) for sample in theirs["samples"][name])
        if name != "lambada_openai":
            assert ours.metrics[metric].stderr == pytest.approx(theirs["results"][name][f"{metric}_stderr,none"])
    for values, sample in zip(ours.loglikelihoods, theirs["samples"][name], strict=True):
        assert list(values) == pytest.approx([value for value, _ in sample["filtered_resps"]], abs=1e-3)
    if name == "arc_easy":  # answers are kept by index: the target is one too
        for metric in task.metrics:
            marks = [int(a == s["target"]) for a, s in zip(ours.answers[metric], theirs["samples"][name], strict=True)]
            assert "".join(map(str, marks)) == ours.correct[metric]


def test_lm_evals_command_line_gives_the_same_answers(lm, truncated, assets_cache, tmp_path):
    (task,) = parse_tasks("piqa", limit=10)
    (tmp_path / "tasks").mkdir()
    write_task_file(task, tmp_path / "tasks")
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={truncated.path},dtype=float32",
    ]
    command += [
        "--tasks",
        str(tmp_path / "tasks" / "piqa.yaml"),
        "--limit",
        "10",
        "--device",
        "cpu",
        "--batch_size",
        "4",
    ]
    command += ["--log_samples", "--output_path", str(tmp_path / "out")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("samples_piqa_*.jsonl")
    samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    ours = score_task(lm, task)
    for metric in task.metrics:
        assert ours.correct[metric] == "".join(str(int(sample[metric])) for sample in samples)
    for values, sample in zip(ours.loglikelihoods, samples, strict=True):
        assert list(values) == pytest.approx([float(value) for value, _ in sample["filtered_resps"]], abs=1e-3)


@pytest.mark.parametrize("name", OFFICIAL)
def test_pinned_documents_give_the_requests_they_always_gave(name, assets_cache):
    (task,) = parse_tasks(name)
    loaded, found = requests(task, SAMPLE)
    known = {key: HASHES[name][key] for key in ("items", "first")}
    assert {"items": len(loaded.eval_docs), "first": requests_sha256(found)} == known, (
        "guard: tests/harness/evaluate/request_hashes.json"
    )
    assert task.version == str(loaded.VERSION) and set(task.metrics) == set(loaded.aggregation()) & {"acc", "acc_norm"}


@pytest.mark.parametrize("name", [name for name, known in HASHES.items() if "lm_eval_2021" in known])
def test_pinned_documents_give_the_requests_that_lm_eval_once_recorded(name, assets_cache):
    """lm-eval's repository (tests/testdata/<task>-v0-loglikelihood, boolq v1, commits 121b7096 and 6fbfcc5b) holds
    hashes of all requests of these splits, made from the data sets themselves and in an order shuffled with seed 42. No
    request has changed since, but for two traits: "yes" came first, and an answer of copa had one space in front."""
    (task,) = parse_tasks(name)
    loaded, _ = requests(task)
    documents = [
        [list(i.args) for i in group] for _, group in itertools.groupby(loaded.instances, key=lambda i: i.doc_id)
    ]
    random.Random(42).shuffle(documents)
    if name == "boolq":
        documents = [[yes, no] for no, yes in documents]
    if name == "copa":
        documents = [[[context, answer[1:]] for context, answer in document] for document in documents]
    text = json.dumps([request for document in documents for request in document])
    assert hashlib.sha256(text.encode()).hexdigest() == HASHES[name]["lm_eval_2021"]


@ONLINE
@pytest.mark.parametrize("name", [name for name in OFFICIAL if name != "sciq"])  # of sciq the wheel has another split
def test_pinned_and_hub_documents_give_the_same_requests(name):
    (pinned,), (hub,) = parse_tasks(name), parse_tasks(name, "hub")
    assert pinned.split == hub.split
    (_, ours), (_, theirs) = requests(pinned), requests(hub)
    assert len(ours) == len(theirs)
    assert [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b] == []


# --- statistics over items


def test_resampled_counts_are_the_bootstrap():
    source = random.Random(1)
    values = [source.choice((-1, 0, 0, 0, 1, 1)) for _ in range(200)]
    drawn, indexed = resampled_shares(values), resampled_means(values)
    assert drawn.mean().item() == pytest.approx(sum(values) / 200, abs=2e-3)
    assert drawn.std().item() == pytest.approx(indexed.std().item(), rel=0.03)
    assert interval(drawn) == pytest.approx(interval(indexed), abs=0.0101)
    assert resampled_shares([1] * 9).tolist() == [1.0] * 10_000 and resampled_shares([0] * 9).sum() == 0
    assert resampled_shares([-1] * 9).tolist() == [-1.0] * 10_000


def test_accuracies_are_paired_item_by_item():
    source = random.Random(2)
    base = [int(source.random() < 0.6) for _ in range(1000)]
    better = [1 if mark or source.random() < 0.1 else 0 for mark in base]
    assert accuracy_interval([base])[1] > sum(better) / 1000 - 0.03  # alone, their intervals overlap
    difference, low, high = accuracy_difference([better], [base])
    assert difference == pytest.approx((sum(better) - sum(base)) / 1000) and 0 < low < difference < high
    assert accuracy_difference([base], [base]) == (0.0, 0.0, 0.0)
    few = [mark if i >= 4 else 1 - mark for i, mark in enumerate(base)]
    assert accuracy_ranks([[base], [better], [few]]) == [2, 1, 2]
    assert accuracy_ranks([[[1] * (MIN_WINDOWS - 1)], [[0] * (MIN_WINDOWS - 1)]]) == [1, 1]


def test_an_average_weighs_tasks_alike_and_its_interval_is_narrower():
    small, large = [1, 0] * 50, [1] * 1000
    low, high = accuracy_interval([small, large])
    assert low < 0.75 < high and high - low == pytest.approx(
        (accuracy_interval([small])[1] - accuracy_interval([small])[0]) / 2, abs=0.02
    )
    low_both, high_both = accuracy_interval([small, small])
    alone = accuracy_interval([small])
    assert high_both - low_both == pytest.approx((alone[1] - alone[0]) / math.sqrt(2), rel=0.1)


# --- as a user types them

ARGUMENTS = ("--methods", "rtn", *SMALL, "--limit", "6")


def test_a_run_with_tasks(truncated, finished_cache, tmp_path):
    cache, arguments = finished_cache, ("run", "--model", str(truncated.path), *ARGUMENTS)
    bare = run_harness(*arguments, "--out", str(tmp_path / "bare"))
    assert bare.returncode == 0, bare.stderr
    written = {path: path.stat().st_mtime_ns for path in cache.glob("cells/*/artifact.json")}
    done = run_harness(*arguments, "--tasks", "piqa,winogrande", "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert {
        path: path.stat().st_mtime_ns for path in cache.glob("cells/*/artifact.json")
    } == written  # nothing compressed again
    rows = read_rows(tmp_path / "two")
    before = read_rows(tmp_path / "bare")
    for label, row in rows.items():
        # Cells and scores are as they were.
        assert all(row[name] == value for name, value in before[label].items() if name != "peak_ram_gib")
        assert row["provisional"] == "first 6 items of every task" and row["status"] == "ok"
        assert float(row["acc_average"]) == pytest.approx(
            (float(row["acc_norm_piqa"]) + float(row["acc_winogrande"])) / 2
        )
        assert (
            float(row["acc_piqa_lo"]) <= float(row["acc_piqa"]) <= float(row["acc_piqa_hi"]) and row["acc_piqa_stderr"]
        )
    assert not any("piqa" in column or column == "provisional" for column in before["fp16"])
    record = {
        label: json.loads((tmp_path / "two" / "cells" / f"{row['cell']}.json").read_text())["tasks"]
        for label, row in rows.items()
    }
    mine, base = (record[label]["piqa"] for label in ("rtn 3.25", "fp16"))
    assert (
        mine["requests_sha256"] == base["requests_sha256"]
        and mine["of_items"] == 1838
        and mine["task"]["few_shot"] == 0
    )
    flips = sum(a != b for a, b in zip(mine["correct"]["acc_norm"], base["correct"]["acc_norm"], strict=True)) / 6
    assert float(rows["rtn 3.25"]["flips_piqa"]) == pytest.approx(flips) and rows["fp16"]["flips_piqa"] == ""
    assert rows["rtn 3.25"]["rank_piqa"] == "1" and rows["rtn 3.25"]["rank_average"] == "1"
    page = (tmp_path / "two" / "tasks" / "piqa.md").read_text()
    assert (
        "provisional: the first 6 of 1838 items" in page and "| rtn 3.25 |" in page and mine["requests_sha256"] in page
    )
    assert "acc_norm piqa (first 6)" in (tmp_path / "two" / "leaderboard.md").read_text()

    # One task more, and one that was lost: only these two are scored.
    kept = {path: path.stat().st_mtime_ns for path in cache.glob("cells/*/task_*.json")}
    assert len(kept) == 4
    lost = next(
        path
        for path in kept
        if json.loads(path.read_text())["task"]["name"] == "piqa" and path.parent.name == rows["fp16"]["cell"]
    )
    lost.unlink()
    more = run_harness(*arguments, "--tasks", "piqa,winogrande,copa", "--out", str(tmp_path / "three"))
    assert more.returncode == 0 and "copa (tokens)" in more.stderr and "winogrande (tokens)" not in more.stderr
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items() if path != lost)
    again = read_rows(tmp_path / "three")
    assert all(
        again[label][name] == row[name]
        for label, row in rows.items()
        for name in ("acc_piqa", "acc_norm_piqa", "flips_piqa")
    )
    assert (
        run_harness(*arguments, "--tasks", "piqa", "--out", str(tmp_path / "one")).stderr.count("found, not repeated")
        == 2
    )


@pytest.mark.parametrize(
    "arguments, hint",
    [
        (["--tasks", "pika"], "did you mean 'piqa'"),
        (["--tasks", "xyzzy"], "choose from piqa, .*commonsense, all"),
        (["--tasks", "piqa", "--limit", "0"], "--limit 100"),
        (["--tasks", "piqa", "--few-shot", "5"], "--few-shot with --task-source hub"),
    ],
)
def test_bad_input_is_one_line(arguments, hint, capsys):
    assert main(["run", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and re.search(hint, error), error


def result_of(task: Task, marks: list[int], requests: str = "x") -> TaskResult:
    return TaskResult(
        task=task,
        lm_eval="0",
        items=len(marks),
        of_items=len(marks),
        requests_sha256=requests,
        metrics={metric: Accuracy(sum(marks) / len(marks), 0.0) for metric in task.metrics},
        correct={metric: "".join(map(str, marks)) for metric in task.metrics},
        answers={metric: tuple(marks) for metric in task.metrics},
        nonfinite_items=0,
        loglikelihoods=(),
        branching=True,
        seconds=1.0,
    )


def test_rows_that_were_asked_other_questions_share_no_column():
    (task,) = parse_tasks("copa", limit=4)
    results = {cell: {"copa": result_of(task, [1], cell)} for cell in ("a", "b")}
    with pytest.raises(ValueError, match="copa was asked in two different wordings"):
        fill_tasks([], results, [task], "a")


def test_ranks_averages_and_flips_of_rows():
    tasks = parse_tasks("copa,rte")
    source = random.Random(3)
    base = [int(source.random() < 0.7) for _ in range(300)]

    def results_of(wrong):
        marks = [mark if i >= wrong else 0 for i, mark in enumerate(base)]
        return {task.name: result_of(task, marks) for task in tasks}

    wrong = {"fp16": 0, "good": 3, "also": 2, "bad": 150}
    results = {cell: results_of(count) for cell, count in wrong.items()}
    rows = [
        {"cell": cell, "budget_bpw": "" if cell == "fp16" else "3.25", "track": "data-free", "seed": 0, "status": "ok"}
        for cell in results
    ]
    fill_tasks(rows, results, tasks, "fp16")
    by_cell = {row["cell"]: row for row in rows}
    assert [by_cell[cell]["rank_average"] for cell in ("good", "also", "bad")] == [1, 1, 3]
    assert [by_cell[cell]["tie_copa"] for cell in ("good", "also", "bad")] == ["tie", "tie", ""]
    assert by_cell["bad"]["flips_rte"] == sum(base[:150]) / 300 and "flips_rte" not in by_cell["fp16"]
    assert by_cell["bad"]["acc_average_lo"] < by_cell["bad"]["acc_average"] < by_cell["bad"]["acc_average_hi"]
    assert by_cell["fp16"]["provisional"] == "" and by_cell["fp16"]["tasks_s"] == 2.0


def test_without_lm_eval_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr("harness.data.tasks.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install 'lm-eval"):
        parse_tasks("piqa")


def test_groups_and_keys():
    names = [task.name for task in parse_tasks("winogrande,commonsense")]
    assert names == ["winogrande", *(name for name in GROUPS["commonsense"] if name != "winogrande")]
    assert {task.name for task in parse_tasks("all")} == set(OFFICIAL) and parse_tasks("") == ()
    variants = [
        parse_tasks("piqa"),
        parse_tasks("piqa", limit=5),
        parse_tasks("piqa", "hub"),
        parse_tasks("piqa", "hub", 5),
    ]
    assert len({task.key for (task,) in variants}) == 4
    assert all(type(task).from_json(task.to_json()) == task for (task,) in variants)


def test_hub_documents_are_asked_for_by_their_official_names(monkeypatch):
    import datasets

    asked = []

    def refuse(path, name, **more):
        asked.append((path, name, more))
        raise ConnectionError("no network here")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    (task,) = parse_tasks("arc_easy", "hub")
    with pytest.raises(ValueError, match="cannot get arc_easy from the hub .* --task-source pinned"):
        load_task(task)
    assert asked == [("allenai/ai2_arc", "ARC-Easy", {})] and task.split == "test"
