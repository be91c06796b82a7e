"""`run` as a user types it, on the first blocks of the real model."""

import json

from harness.report.baseline import read_rows
from tests.helpers import SMALL, run_harness, steady

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


def test_a_leaderboard_has_a_row_for_every_cell(finished):
    rows = read_rows(finished / "out")
    assert list(rows)[0] == "fp16" and set(rows) == {"fp16", "rtn 2.25", "rtn 3.25", "gptq 2.25", "gptq 3.25"}
    header = (finished / "out" / "leaderboard.csv").read_text().splitlines()[0].split(",")
    assert [column for column in header if column in COLUMNS] == COLUMNS
    assert all(row["status"] == "ok" for row in rows.values())
    for label, row in rows.items():
        budget = 16 if label == "fp16" else float(label.split()[1])
        assert budget - 0.02 < float(row["stored_bpw"]) <= budget
    assert 0 < float(rows["fp16"]["kld_wiki-mini@128/4"]) < 1e-3 < float(rows["gptq 3.25"]["kld_wiki-mini@128/4"])
    for row in rows.values():
        low, value, high = (float(row[f"ppl_wiki-mini@128/4{suffix}"]) for suffix in ("_lo", "", "_hi"))
        assert low < value < high
        record = json.loads((finished / "out" / "cells" / f"{row['cell']}.json").read_text())
        assert len(record["scores"]["wiki-mini@128/4"]["window_nll"]) == 4
        assert record["artifact"]["environment"]["torch"]


def test_a_run_reuses_what_is_finished_and_writes_the_same_leaderboard(truncated, finished, finished_cache, tmp_path):
    run, rows = ("run", "--model", str(truncated.path)), read_rows(finished / "out")
    all_cells = ("--methods", "rtn,gptq", "--bits", "2.25,3.25", *SMALL)
    again = run_harness(*run, *all_cells, "--out", str(tmp_path / "again"))
    assert again.stderr.count("found, not repeated") == 5
    assert (tmp_path / "again" / "leaderboard.csv").read_bytes() == (finished / "out" / "leaderboard.csv").read_bytes()

    one = ("--methods", "gptq", *SMALL)
    uniform = run_harness(*run, *one, "--allocate", "uniform", "--out", str(tmp_path / "uniform"))
    assert uniform.returncode == 0, uniform.stderr
    row = read_rows(tmp_path / "uniform")["gptq 3.25"]
    assert float(row["stored_bpw"]) == 3.25 and float(row["code_bpw"]) == 3 and row["cell"] != rows["gptq 3.25"]["cell"]

    fewer = run_harness(*run, *one, cwd=tmp_path)
    assert fewer.stderr.count("found, not repeated") == 2
    (folder,) = (tmp_path / "results").iterdir()

    fresh = run_harness(*run, *one, "--out", str(tmp_path / "fresh"), "--fresh")
    assert "found" not in fresh.stderr
    assert steady(read_rows(tmp_path / "fresh")) == steady(read_rows(folder))


def test_a_budget_out_of_reach_is_a_refused_row(truncated, finished_cache, tmp_path):
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
