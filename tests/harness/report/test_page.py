"""The page as text and data: what it says of who wins, and that nothing from outside is markup."""

from __future__ import annotations

import json
import re

import pytest

from harness.report.board import stored_board
from harness.report.leaderboard import ranked_rows, write_leaderboard
from harness.report.page import contents, figures, page_of, paretos
from harness.report.page.verdict import headlines, verdicts
from tests.harness.report.boards import HOSTILE, STORED, altered, empty, many, single, stored, timed
from tests.helpers import run_harness

WIKI, C4 = "wiki-mini@128/4", "c4-mini@128/4"


def page_data(page: str) -> dict:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_page_says_who_wins_as_the_ranks_do():
    board = stored()
    rows = ranked_rows(board)
    found = {(v.budget, v.track, v.protocol): v for v in verdicts(contents.page_rows(rows), board.protocols)}
    calibrated = [row for row in rows if row["budget_bpw"] == "3.25" and row["track"] == "calibrated"]
    best = min(calibrated, key=lambda row: row[f"ppl_{WIKI}"])
    verdict = found["3.25", "calibrated", WIKI]
    assert verdict.ppl == best[f"ppl_{WIKI}"] and verdict.rows == len(calibrated) == 2
    tied = [row for row in calibrated if row[f"rank_{WIKI}"] == 1 and row is not best]
    assert len(verdict.ties) == len(tied)
    assert "is the only" not in page_of(board, rows, []) and "the only row" in page_of(board, rows, [])


def test_differences_are_ranked_by_divergence():
    """Not by a perplexity that may fall when the model is missed."""
    rows = [row for row in ranked_rows(altered(track="delta")) if row["budget_bpw"] == "3.25"]
    nearest = min(rows, key=lambda row: row[f"kld_{WIKI}"])
    assert len(rows) >= 3 and nearest[f"rank_{WIKI}"] == 1
    assert [row[f"rank_{WIKI}"] for row in sorted(rows, key=lambda row: row[f"kld_{WIKI}"])] == sorted(
        row[f"rank_{WIKI}"] for row in rows
    )


def test_a_headline_names_every_budget_once_and_no_loser():
    def row(method, budget, rank, ppl):
        return {
            "method": method,
            "variant": "",
            "budget_bpw": budget,
            "seed": 0,
            "track": "calibrated",
            "status": "ok",
        } | {
            "rank_a": rank,
            "ppl_a": ppl,
        }

    rows = [
        row("x", "2", 1, 5.0),
        row("y", "2", 2, 6.0),
        row("x", "3", 1, 4.0),
        row("y", "3", 1, 4.1),
        row("y", "4", 1, 3.0),
    ]
    rows += [row("x", "4", 2, 3.5)]
    assert headlines(verdicts(rows, ["a"])) == [
        "calibrated: x leads at 2 and 3 bits, in a tie with y at 3; y leads at 3 and 4 bits, in a tie with x at 3"
    ]


def test_what_comes_from_outside_is_never_markup():
    board = altered(reason=HOSTILE, status="failed", model_note=HOSTILE, variant=HOSTILE, model=HOSTILE)
    page = page_of(board, ranked_rows(board), [])
    assert HOSTILE not in page and "<img src=x" not in page
    assert page.count("<script") == page.count("</script") == 3
    assert any(HOSTILE in str(row) for row in page_data(page)["data"]["rows"]["columns"]["reason"]["names"])


def test_the_page_loads_nothing_and_inlines_its_script_once():
    page = page_of(stored(), ranked_rows(stored()), [])
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    assert page.count("window.vegaEmbed=") == 1 and "default-src 'none'" in page


def test_three_hundred_rows_stay_below_eight_megabytes():
    board = many(300)
    page = page_of(board, ranked_rows(board), [])
    assert len(page.encode()) < 8_000_000
    assert page_data(page)["data"]["layers"]["count"] == 299 * 210


@pytest.mark.parametrize("board", [empty(), single()], ids=["none", "one"])
def test_a_page_of_next_to_nothing(board):
    page = page_of(board, ranked_rows(board), [])
    assert "No row has a budget and numbers" in page and page_data(page)["pareto"] == []


def test_every_pair_that_was_measured_has_a_picture():
    board = timed()
    lines = contents.page_rows(ranked_rows(board))
    pairs = {(quality.column, against.column) for quality, against, _ in paretos(board, lines)}
    qualities = {f"{what}_{name}" for what in ("kld", "ppl") for name in (WIKI, C4)} | {"acc_average"}
    assert pairs == {(q, a) for q in qualities for a in ("stored_bpw", "resident_gib", "decode_tok_s_b1")}


def test_columns_come_back_as_lines():
    lines = [{"a": "x", "b": 1, "c": 0.123456789}, {"a": "y", "b": None, "c": 2.0}, {"a": "x", "c": float("nan")}]
    found = contents.columnar(lines)
    assert found == {
        "count": 3,
        "columns": {
            "a": {"names": ["x", "y"], "values": [0, 1, 0]},
            "b": {"values": [1, None, None]},
            "c": {"values": [0.123457, 2.0, None]},
        },
    }


def test_a_report_made_again_is_the_same(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    write_leaderboard(stored(), first)
    done = run_harness("report", str(first), "--out", str(second))
    assert done.returncode == 0, done.stderr
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_runs_with_other_rows_become_one_board(tmp_path):
    board = stored()
    for part, keys in enumerate((list(board.reports)[:3], list(board.reports)[3:])):
        for key in keys:
            (tmp_path / str(part) / "cells").mkdir(parents=True, exist_ok=True)
            source = STORED / "cells" / f"{key}.json"
            (tmp_path / str(part) / "cells" / source.name).write_bytes(source.read_bytes())
    both = stored_board([tmp_path / "0", tmp_path / "1"])
    assert both.reports.keys() == board.reports.keys()
    assert ranked_rows(both) == ranked_rows(board)


def test_pictures_in_the_style_of_a_paper(tmp_path):
    done = run_harness("report", str(STORED), "--out", str(tmp_path), "--paper")
    assert done.returncode == 0, done.stderr
    written = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert "kld_wiki-mini-128-4-stored_bpw.svg" in written and "training.png" in written
    assert "serif" in (tmp_path / "plots" / "stored-bits.svg").read_text()
    assert all((tmp_path / "plots" / name).stat().st_size > 1000 for name in written)


def test_a_folder_without_a_run_is_refused(tmp_path):
    done = run_harness("report", str(tmp_path))
    assert done.returncode == 2 and "give a folder that a run wrote" in done.stderr
    done = run_harness("report", cwd=tmp_path)
    assert done.returncode == 2 and "`run` first" in done.stderr


def test_methods_that_stand_in_one_picture_have_colours_of_their_own():
    of_differences = {"delta-come", "bitdelta", "base"}  # which no method stands beside that packs no difference
    named = [name for name in figures.COLOURS if name not in of_differences and not name.startswith("fp16")]
    assert len({figures.colour(name) for name in named}) == len(named) >= 14
