import csv
from pathlib import Path

import pytest

from harness.cli import main

COLUMNS = (
    "method",
    "variant",
    "budget_bpw",
    "seed",
    "status",
    "reason",
    "stored_bpw",
    "ppl_wiki-mini@512",
    "ppl_wiki-mini@512_lo",
)


def write(path: Path, *rows: tuple) -> Path:
    with open(path, "w", newline="") as handle:
        csv.writer(handle).writerows([COLUMNS, *rows])
    return path


REFERENCE = ("fp16", "", "", 0, "ok", "", 16.0, 20.0, 18.0)
GPTQ = ("gptq", "", "3.25", 0, "ok", "", 3.25, 30.0, 27.0)


@pytest.fixture
def baseline(tmp_path) -> Path:
    leaderboard = write(tmp_path / "first.csv", REFERENCE, GPTQ)
    assert main(["check", str(leaderboard), str(tmp_path / "base.csv"), "--update"]) == 0
    return tmp_path / "base.csv"


@pytest.mark.parametrize(
    "rows, found",
    [
        ([REFERENCE, GPTQ], None),
        ([REFERENCE, (*GPTQ[:7], 31.0, 1)], None),
        ([REFERENCE, (*GPTQ[:7], 33.0, 1)], "worse"),
        ([REFERENCE, (*GPTQ[:7], 25.0, 1)], "better, which needs an explanation"),
        ([(*REFERENCE[:7], 20.1, 1), GPTQ], "fp16: ppl_wiki-mini@512 is 20.1"),
        ([REFERENCE, (*GPTQ[:6], 3.24, 30.0, 1)], "stores 3.24"),
        ([REFERENCE, (*GPTQ[:4], "failed", "killed", "", "", "")], "failed (killed)"),
        ([REFERENCE, (*GPTQ[:7], "nan", 1)], "worse"),
        ([REFERENCE], "gptq 3.25: not in this leaderboard"),
    ],
)
def test_both_sides_are_watched(baseline, tmp_path, capsys, rows, found):
    code = main(["check", str(write(tmp_path / "now.csv", *rows)), str(baseline)])
    printed = capsys.readouterr().out
    assert (code, found is None) in ((0, True), (1, False)) and (found or "as in") in printed


def test_what_is_no_leaderboard_is_refused(tmp_path, baseline, capsys):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert main(["check", str(tmp_path / "other.csv"), str(baseline)]) == 2
    assert main(["check", str(tmp_path / "nowhere"), str(baseline)]) == 2
    assert "no leaderboard" in capsys.readouterr().err
