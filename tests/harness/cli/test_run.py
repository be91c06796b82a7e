"""`run` and `plan` as a user types them, on the first blocks of the real model."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from harness.cli import main
from harness.report.baseline import read_rows
from harness.report.leaderboard import TIME_COLUMNS
from harness.store.files import CACHE_VARIABLE
from tests.helpers import linked_cache, run_harness

PLANNED = ("--calibration", "c4-mini@128x4", "--protocols", "wiki-mini@128/4,c4-mini@128/4")
SMALL = (*PLANNED, "--no-bench")
# The columns the first version had: later ones may be added, none renamed.
COLUMNS = [
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
    "ppl_wiki-mini@128/4",
    "ppl_c4-mini@128/4",
    "compress_s",
    "eval_s",
    "peak_ram_gib",
    "seed",
    "harness_version",
    "cell",
]


def steady(rows):
    return {label: {k: v for k, v in row.items() if k not in TIME_COLUMNS} for label, row in rows.items()}


def test_a_run_reuses_what_is_finished_and_writes_the_same_leaderboard(truncated, cache, tmp_path):
    arguments = ("run", "--model", str(truncated.path), "--methods", "rtn,gptq", "--bits", "2.25,3.25", *SMALL)
    first = run_harness(*arguments, "--out", str(tmp_path / "first"))
    assert first.returncode == 0, first.stderr
    rows = read_rows(tmp_path / "first")
    assert list(rows)[0] == "fp16" and set(rows) == {"fp16", "rtn 2.25", "rtn 3.25", "gptq 2.25", "gptq 3.25"}
    header = (tmp_path / "first" / "leaderboard.csv").read_text().splitlines()[0].split(",")
    assert [column for column in header if column in COLUMNS] == COLUMNS
    assert all(row["status"] == "ok" for row in rows.values())
    for label, row in rows.items():
        budget = 16 if label == "fp16" else float(label.split()[1])
        assert budget - 0.02 < float(row["stored_bpw"]) <= budget
    assert 0 < float(rows["fp16"]["kld_wiki-mini@128/4"]) < 1e-3 < float(rows["gptq 3.25"]["kld_wiki-mini@128/4"])
    for row in rows.values():
        low, value, high = (float(row[f"ppl_wiki-mini@128/4{suffix}"]) for suffix in ("_lo", "", "_hi"))
        assert low < value < high
        record = json.loads((tmp_path / "first" / "cells" / f"{row['cell']}.json").read_text())
        assert len(record["scores"]["wiki-mini@128/4"]["window_nll"]) == 4
        assert record["artifact"]["environment"]["torch"]

    again = run_harness(*arguments, "--out", str(tmp_path / "again"))
    assert again.stderr.count("found, not repeated") == 5
    assert (tmp_path / "again" / "leaderboard.csv").read_bytes() == (
        tmp_path / "first" / "leaderboard.csv"
    ).read_bytes()

    plan = run_harness("plan", "--model", str(truncated.path), "--methods", "gptq", *PLANNED)
    assert plan.stdout.count("model.layers.") == 28 and "predicted divergence" in plan.stdout
    uniform = run_harness(
        "run", *arguments[1:3], "--methods", "gptq", "--allocate", "uniform", *SMALL, "--out", str(tmp_path / "uniform")
    )
    assert uniform.returncode == 0, uniform.stderr
    row = read_rows(tmp_path / "uniform")["gptq 3.25"]
    assert float(row["stored_bpw"]) == 3.25 and float(row["code_bpw"]) == 3 and row["cell"] != rows["gptq 3.25"]["cell"]

    fewer = run_harness("run", "--model", str(truncated.path), "--methods", "rtn", *SMALL, cwd=tmp_path)
    assert fewer.stderr.count("found, not repeated") == 2
    assert len(list((tmp_path / "results").iterdir())) == 1

    fresh = run_harness(*arguments, "--out", str(tmp_path / "fresh"), "--fresh")
    assert "found" not in fresh.stderr
    assert steady(read_rows(tmp_path / "fresh")) == steady(rows)


def test_killed_at_five_random_moments_the_same_command_goes_on(truncated, assets_cache, tmp_path):
    arguments = [sys.executable, "-m", "harness", "run", "--model", str(truncated.path), "--methods", "gptq", *SMALL]
    caches = {name: linked_cache(assets_cache, tmp_path / name) for name in ("whole", "killed")}

    def start(name, out):
        environment = os.environ | {CACHE_VARIABLE: str(caches[name])}
        return subprocess.Popen(
            [*arguments, "--out", str(tmp_path / out)],
            env=environment,
            start_new_session=True,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(process):
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors

    begin = time.monotonic()
    finish(start("whole", "a"))
    duration = time.monotonic() - begin

    moments = sorted(random.SystemRandom().uniform(0.1, 0.75) * duration for _ in range(5))
    print(
        "killed after", [round(moment, 2) for moment in moments], "s of", round(duration, 2)
    )  # shown when the test fails
    seen = set()
    for moment in moments:
        process = start("killed", "b")
        time.sleep(moment)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        found = {path for path in caches["killed"].glob("cells/*/**/*") if path.suffix in (".json", ".safetensors")}
        done = {path for path in found if ".tmp" not in path.name and path.parent.name != "blocks"}
        assert seen <= found  # nothing finished is ever lost
        seen = done
    finish(start("killed", "b"))
    assert steady(read_rows(tmp_path / "b")) == steady(read_rows(tmp_path / "a"))


def test_one_crash_is_one_failed_row(truncated, cache, tmp_path):
    arguments = ["run", "--model", str(truncated.path), "--methods", "rtn,gptq", *SMALL, "--out", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-m", "harness", *arguments], stderr=subprocess.PIPE, text=True)
    victim = None
    deadline = time.time() + 300
    while victim is None and time.time() < deadline:
        time.sleep(0.02)
        if list(cache.glob("cells/*/blocks/block_0000.safetensors")):
            # Of all processes below it, the cells: they are children of the server they were forked from.
            family = psutil.Process(process.pid).children(recursive=True)
            victim = next((p for p in family if p.parent().pid != process.pid), None)
    assert victim is not None, process.stderr.read()
    victim.kill()
    _, errors = process.communicate()
    assert process.returncode == 1, errors
    rows = read_rows(tmp_path / "out")
    assert sorted(row["status"] for row in rows.values()) == ["failed", "ok", "ok"]
    assert "killed by SIGKILL" in next(row["reason"] for row in rows.values() if row["status"] == "failed")
    assert run_harness(*arguments).returncode == 0  # the same command mends it


def test_spawned_cells_do_the_same_work(truncated, cache, tmp_path, monkeypatch):
    """As they start beside an accelerator: a fresh interpreter, which must store the same bytes as a forked one."""
    arguments = ("run", "--model", str(truncated.path), "--methods", "rtn", *SMALL)
    assert run_harness(*arguments, "--out", str(tmp_path / "forked")).returncode == 0
    monkeypatch.setattr("harness.engine.local.START", {})
    assert run_harness(*arguments, "--out", str(tmp_path / "spawned"), "--fresh").returncode == 0
    assert steady(read_rows(tmp_path / "spawned")) == steady(read_rows(tmp_path / "forked"))


def test_a_budget_out_of_reach_is_a_refused_row(truncated, cache, tmp_path):
    done = run_harness(
        "run",
        "--model",
        str(truncated.path),
        "--methods",
        "rtn:bits=4,gptq",
        "--bits",
        "3.25",
        *SMALL,
        "--out",
        str(tmp_path),
    )
    assert done.returncode == 1
    rows = read_rows(tmp_path)
    assert rows["rtn:bits=4 3.25"]["status"] == "refused" and "at least 4.0" in rows["rtn:bits=4 3.25"]["reason"]
    assert rows["gptq 3.25"]["status"] == rows["fp16"]["status"] == "ok"


def test_when_all_are_refused_nothing_is_loaded(truncated, cache, tmp_path):
    done = run_harness(
        "run",
        "--model",
        str(truncated.path),
        "--methods",
        "gptq",
        "--bits",
        "3/2",
        "--seeds",
        "1",
        *SMALL,
        "--out",
        str(tmp_path),
    )
    assert done.returncode == 1 and "at least 2.0" in done.stderr
    assert not list(cache.glob("cells/*/*"))
    assert {row["status"] for row in read_rows(tmp_path).values()} == {"refused", "skipped"}


@pytest.mark.parametrize(
    "arguments, hint",
    [
        (["--methods", "gtpq"], "did you mean 'gptq'"),
        (["--methods", ""], "--methods reallm,gptq"),
        (["--bits", "3,25x"], "not a number of bits"),
        (["--model", "./nowhere"], "no folder"),
        (["--protocols", "wikitext103@512"], "TEXT@CONTEXT"),
        (["--calibration", "pile@512x4"], "TEXT@CONTEXTxSEQUENCES"),
        (["--device", "cuda:7"], "try --device cpu"),
        (["--device", "meta"], "try --device cpu"),
        (["--dtype", "bfloat16", "--model", "MODEL"], "use float16 or float32"),
        (["--seeds", "a"], "--seeds 0,1,2"),
        (["--jobs", "0"], "at least 1"),
        (["--methods", "fp16:dtype=bfloat16", "--model", "MODEL"], "takes its type from the checkpoint"),
        (["--calibration", "c4-mini@2048x500", "--model", "MODEL", "--methods", "gptq"], "holds 7[0-9] windows"),
        (["--protocols", "wikitext2@512", "--data", "/nowhere", "--model", "MODEL"], "no wiki.test.raw"),
    ],
)
def test_bad_input_is_one_line_and_a_non_zero_exit(arguments, hint, truncated, cache, tmp_path, capsys):
    arguments = [str(truncated.path) if a == "MODEL" else a for a in arguments]
    assert main(["run", *arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(hint, error.splitlines()[-1]), error
    assert not list(tmp_path.glob("*.csv"))


def test_an_unknown_verb_or_option_is_refused(capsys):
    for arguments in (["rum"], ["run", "--bitz", "3"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)


def test_plan_counts_without_weights():
    done = run_harness("plan", "--model", "llama2-7b", "--methods", "gptq:group=128,reallm", "--bits", "3.25", "--all")
    assert done.returncode == 0, done.stderr
    assert "6,476,005,376 weights" in done.stdout and "3.148" in done.stdout and "adapters" in done.stdout
    refused = run_harness("plan", "--model", "smollm2-135m", "--methods", "gptq", "--bits", "1")
    assert refused.returncode == 1 and "refused: gptq stores at least 2.0234" in refused.stdout
