"""`compare` on a run's folder written by hand: two methods, two seeds, numbers whose ratios are known."""

import csv
import json
import math

import pytest

from harness.cli import main
from harness.data.protocols import parse_protocol
from harness.store.results import Divergence, Score

P = "wiki-mini@512"
COLUMNS = ("method", "variant", "budget_bpw", "seed", "status", "stored_bpw", "cell", f"ppl_{P}")


def score_of(losses: list[float], divergences: list[float]) -> Score:
    return Score(
        window_nll=tuple(losses),
        scored_tokens=100,
        divergence=Divergence(0.2, 0.2, 0.2, 0.2, 0.2, 0.9, 0, tuple(divergences)),
        protocol=parse_protocol(P),
        tokens_sha256="",
        seconds=1.0,
        peak_ram_gib=1.0,
        kind="fused",
        resident_bpw=3.25,
    )


@pytest.fixture
def folder(tmp_path):
    """nf loses 0.1 to gptq in every window and diverges twice as much; rtn is as good on average, but not window by
    window."""
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
            score = score_of([x + shift for x in losses], [divergence * x for x in base])
            (tmp_path / "cells" / f"{cell}.json").write_text(
                json.dumps({"row": {"stored_bpw": 3.25, f"ppl_{P}": 30.0 + seed}, "scores": {P: score.to_json()}})
            )
    with open(tmp_path / "leaderboard.csv", "w", newline="") as handle:
        csv.writer(handle).writerows([COLUMNS, *lines])
    return tmp_path


def test_ratios_are_paired(folder, capsys):
    assert main(["compare", str(folder), "--to", "gptq", "--markdown"]) == 0
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()[2:]]
    table = {line[0]: line[1:] for line in lines}
    ratio = math.exp(0.1)
    assert table["gptq"] == ["3.25", "3.2500", "30.50", "1", "1"]
    assert table["nf"][3:] == [f"{ratio:.3f} [{ratio:.3f}, {ratio:.3f}]", "2.000 [2.000, 2.000]"]
    assert (
        table["rtn"][3].startswith("1.000 [0.") and table["rtn"][3].endswith("tie") and table["rtn"][4].endswith("tie")
    )


def test_a_row_outside_any_budget_is_compared_with_those_of_all(folder, capsys):
    """fp16-lora, say: what compression costs when everybody is trained alike."""
    text = (folder / "leaderboard.csv").read_text().replace("gptq,,3.25,", "gptq,,,")
    (folder / "leaderboard.csv").write_text(text)
    assert main(["compare", str(folder), "--to", "gptq", "--markdown"]) == 0
    out = capsys.readouterr().out
    assert (
        "| gptq |  | 3.2500 | 30.50 | 1 | 1 |" in out and f"| nf | 3.25 | 3.2500 | 30.50 | {math.exp(0.1):.3f} [" in out
    )


def test_what_cannot_be_compared_is_said_in_a_line(folder, capsys):
    assert main(["compare", str(folder), "--to", "gtpq"]) == 2
    assert "one of gptq, nf, rtn" in capsys.readouterr().err
    (folder / "cells" / "nf1.json").unlink()
    assert main(["compare", str(folder), "--to", "gptq"]) == 2
    assert "writes it again" in capsys.readouterr().err
    assert main(["compare", str(folder / "nowhere"), "--to", "gptq"]) == 2
    assert main(["compare", str(folder / "leaderboard.csv"), "--to", "gptq"]) == 2
    assert "no folder" in capsys.readouterr().err


def test_a_row_without_a_partner_or_a_divergence_is_left_empty(folder, capsys):
    text = (folder / "leaderboard.csv").read_text().replace("rtn,,3.25", "rtn,,2.25")
    (folder / "leaderboard.csv").write_text(text)
    cell = folder / "cells" / "nf0.json"
    record = json.loads(cell.read_text())
    record["scores"][P]["divergence"] = None
    cell.write_text(json.dumps(record))
    assert main(["compare", str(folder), "--to", "gptq", "--markdown"]) == 0
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()[2:]]
    table = {line[0]: line[1:] for line in lines}
    assert table["rtn"][3:] == ["", ""] and table["nf"][3].startswith("1.105 [") and table["nf"][4] == ""


def test_seeds_must_match_unless_none_can_change_a_row(folder, capsys):
    text = (folder / "leaderboard.csv").read_text().replace("nf,,3.25,1,ok", "nf,,3.25,1,failed")
    (folder / "leaderboard.csv").write_text(text)
    assert main(["compare", str(folder), "--to", "gptq"]) == 2
    assert "different seeds" in capsys.readouterr().err
    cell = folder / "cells" / "nf0.json"
    cell.write_text(json.dumps(json.loads(cell.read_text()) | {"seeded": False}))
    assert main(["compare", str(folder), "--to", "gptq"]) == 0
