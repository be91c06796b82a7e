"""Rows whose layers round their inputs: beside the others, ranked apart, and the same layers but for that."""

import torch

from harness.compressed import CompressedModel
from harness.report.baseline import read_rows
from harness.report.frame import Leaderboard
from tests.helpers import SMALL, run_harness


def test_rows_of_every_width_stand_beside_each_other(truncated, finished_cache, tmp_path):
    run = ("run", "--model", str(truncated.path), "--methods", "rtn,gptq,svd:bits=4", "--bits", "3.25", *SMALL)
    done = run_harness(*run, "--act-bits", "16,4", "--out", str(tmp_path))
    assert done.returncode == 1 and done.stderr.count("found, not repeated") == 3, done.stderr
    rows = read_rows(tmp_path)
    assert set(rows) == {"fp16", "svd:bits=4 3.25", *(f"{m} 3.25{a}" for m in ("rtn", "gptq") for a in ("", " a4"))} | {
        "svd:bits=4 3.25 a4"
    }
    refused = rows.pop("svd:bits=4 3.25 a4")
    assert refused["status"] == "refused" and "round no inputs: write --act-bits 16" in refused["reason"]
    name = "wiki-mini@128/4"
    for label, row in rows.items():
        assert row["act_bits"] == ("4" if label.endswith("a4") else "16")
        assert row["kind"] != "fused" or row["act_bits"] == "16"
    for method in ("rtn", "gptq"):
        plain, rounded = rows[f"{method} 3.25"], rows[f"{method} 3.25 a4"]
        assert plain["stored_bpw"] == rounded["stored_bpw"]  # nothing of it is stored
        assert float(rounded[f"kld_{name}"]) > 1.5 * float(plain[f"kld_{name}"])
    assert rows["gptq 3.25"][f"rank_{name}"] == rows["gptq 3.25 a4"][f"rank_{name}"] == "1"  # each in its own group
    folders = (finished_cache / "cells" / rows[f"rtn 3.25{a}"]["cell"] for a in ("", " a4"))
    stored = [CompressedModel.load(folder, "cpu", torch.float32) for folder in folders]
    for plain, rounded in zip(*(model.packed.values() for model in stored), strict=True):
        assert rounded.spec() == {**plain.spec(), "act_bits": 4}
        assert rounded.codes.equal(plain.codes)
    page = (tmp_path / "report.html").read_text()
    assert "activations of 4 bits" in page and "gptq a4" in page
    board = Leaderboard.read(tmp_path)
    assert board["act_bits"].tolist().count(4) == 3 and "gptq a4" in board._repr_html_()
