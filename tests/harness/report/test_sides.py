"""`compare A B` on tables of real cells, some of them altered by a known amount."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from harness.cli import main
from harness.report.board import Board
from harness.report.leaderboard import write_leaderboard
from tests.harness.report.boards import stored

P = "wiki-mini@128/4"


def changed(board: Board, method: str, **values: object) -> Board:
    """The board with other values in the scores of P of a method's rows, at 3.25 bits."""
    reports = dict(board.reports)
    for key, report in reports.items():
        if report.row["method"] == method and report.row["budget_bpw"] in ("3.25", ""):
            given = {name: value(report.scores[P]) for name, value in values.items()}
            reports[key] = replace(report, scores={**report.scores, P: replace(report.scores[P], **given)})
    return replace(board, reports=reports)


def without(board: Board, method: str) -> Board:
    return replace(board, reports={k: r for k, r in board.reports.items() if r.row["method"] != method})


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A as it is; B without nf, each window of gptq 3.25 worse by 0.1, those of qlora by as much to either side."""
    root = tmp_path_factory.mktemp("sides")
    worse = changed(stored(), "gptq", window_nll=lambda score: tuple(x + 0.1 for x in score.window_nll))
    worse = changed(worse, "qlora", window_nll=lambda s: tuple(x + 0.1 * (-1) ** n for n, x in enumerate(s.window_nll)))
    write_leaderboard(stored(), root / "a")
    write_leaderboard(without(worse, "nf"), root / "b")
    return root / "a", root / "b"


def test_two_runs_stand_side_by_side(folders, capsys):
    assert main(["compare", *map(str, folders), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["only_a"], found["only_b"]) == (["nf 4.25"], [])
    rows = {row["row"]: row for row in found["rows"]}
    gptq = rows["gptq 3.25"]["ppl"][P]
    assert gptq["ratio"] == pytest.approx(math.exp(0.1)) and gptq["tie"] is False
    assert gptq["b"] / gptq["a"] == pytest.approx(gptq["ratio"]) and gptq["low"] == pytest.approx(math.exp(0.1))
    assert rows["qlora 3.25"]["ppl"][P]["tie"] is True and rows["gptq 4.25"]["ppl"][P]["ratio"] == 1
    assert rows["gptq 3.25"]["kld"][P]["tie"] is True  # the same in both
    assert rows["fp16"]["status"] == {"a": "ok", "b": "ok"}


def test_people_see_ratios_ties_and_what_is_in_one_alone(folders, capsys):
    assert main(["compare", *map(str, folders)]) == 0
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if line.startswith("gptq 3.25") and P in line]
    assert "1.105 [1.105, 1.105]  " in line and "only in A: nf 4.25" in shown and f"B is {folders[1]}" in shown
    assert main(["compare", *map(str, folders), "--markdown"]) == 0
    assert "| row | protocol | ppl A |" in capsys.readouterr().out


def test_other_tokens_are_refused_by_name(folders, tmp_path, capsys):
    alone = without(without(without(without(stored(), "fp16"), "qlora"), "nf"), "reallm")
    alone = replace(alone, reports={k: r for k, r in alone.reports.items() if r.row["budget_bpw"] == "3.25"})
    write_leaderboard(changed(alone, "gptq", tokens_sha256=lambda score: "other"), tmp_path)
    assert main(["compare", str(folders[0]), str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{P} was scored on different tokens" in error and error.count("\n") == 1


@pytest.mark.parametrize("typed", [["A"], ["A", "B", "--to", "gptq"], ["A", "nowhere"], ["nowhere", "A"]])
def test_bad_input_is_one_line(folders, typed, capsys):
    assert main(["compare", *(str(folders["AB".index(word)]) if word in "AB" else word for word in typed)]) == 2
    error = capsys.readouterr().err
    assert ("give two folders" in error or "give the one a run wrote" in error) and error.count("\n") == 1
