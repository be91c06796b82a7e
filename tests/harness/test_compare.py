"""`compare` on a run's folder written by hand: two methods, two seeds, numbers whose ratios are known."""

import csv
import json
import math

import pytest

from harness.cli import main

P = "wiki-mini@512"
COLUMNS = ("method", "variant", "budget_bpw", "seed", "status", "stored_bpw", "cell", f"ppl_{P}")


@pytest.fixture
def folder(tmp_path):
    """nf loses 0.1 to gptq in every window and diverges twice as much; rtn is as good on average, but not window by window."""
    base = [3.0, 3.5, 2.5, 4.0, 3.2]
    noise = [0.2, -0.2, 0.1, -0.1, 0.0]
    (tmp_path / "cells").mkdir()
    lines = [("fp16", "", "", 0, "ok", 16.0, "ref", 20.0)]
    for method, losses, divergence in (
        ("gptq", base, 0.2),
        ("nf", [x + 0.1 for x in base], 0.4),
        ("rtn", [x + d for x, d in zip(base, noise, strict=True)], 0.2),
    ):
        for seed, shift in ((0, -0.01), (1, 0.01)):
            cell = f"{method}{seed}"
            lines.append((method, "", "3.25", seed, "ok", 3.25, cell, 30.0))
            score = {"window_nll": [x + shift for x in losses], "divergence": {"window_kld": [divergence * x for x in base]}}
            (tmp_path / "cells" / f"{cell}.json").write_text(json.dumps({"row": {"stored_bpw": 3.25}, "scores": {P: score}}))
    with open(tmp_path / "leaderboard.csv", "w", newline="") as handle:
        csv.writer(handle).writerows([COLUMNS, *lines])
    return tmp_path


def test_ratios_are_paired(folder, capsys):
    assert main(["compare", str(folder), "--to", "gptq", "--markdown"]) == 0
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()[2:]]
    table = {line[0]: line[1:] for line in lines}
    perplexity, ratio = math.exp(sum([3.0, 3.5, 2.5, 4.0, 3.2]) / 5), math.exp(0.1)
    assert table["gptq"] == ["3.25", "3.2500", f"{perplexity:.2f}", "1", "1"]
    assert table["nf"][3:] == [f"{ratio:.3f} [{ratio:.3f}, {ratio:.3f}]", "2.000 [2.000, 2.000]"]
    assert table["rtn"][3].startswith("1.000 [0.") and table["rtn"][3].endswith("tie") and table["rtn"][4].endswith("tie")


def test_what_cannot_be_compared_is_said_in_a_line(folder, capsys):
    assert main(["compare", str(folder), "--to", "gtpq"]) == 2
    assert "one of gptq, nf, rtn" in capsys.readouterr().err
    (folder / "cells" / "nf1.json").unlink()
    assert main(["compare", str(folder), "--to", "gptq"]) == 2
    assert "writes it again" in capsys.readouterr().err
    assert main(["compare", str(folder / "nowhere"), "--to", "gptq"]) == 2
