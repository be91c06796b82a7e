"""Every Python block of docs/python.md runs, in order, on a model of two blocks."""

from __future__ import annotations

import ast

import pandas
import pytest

import harness
from harness.data.files import CACHE_VARIABLE, cache_dir
from harness.measure import machine
from tests.docs.test_shell_lines import ROOT, blocks
from tests.helpers import linked_cache, run_harness

PAGE = ROOT / "docs" / "python.md"


@pytest.fixture(scope="module")
def folder(two_blocks, tmp_path_factory):
    """Where a model lies under the name that the page uses, beside a cache without results."""
    found = tmp_path_factory.mktemp("python")
    (found / "my-model").symlink_to(two_blocks.path)
    linked_cache(cache_dir().resolve(), found / "cache")
    return found


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.setattr(machine, "lock_path", lambda: folder / "machine.lock")
    monkeypatch.setenv(CACHE_VARIABLE, str(folder / "cache"))
    monkeypatch.chdir(folder)
    return folder


def test_every_block_runs_and_python_and_the_command_line_find_each_others_cells(here, capsys):
    names: dict[str, object] = {}
    for language, lines in blocks(PAGE):
        if language == "python":
            exec(compile(ast.parse("\n".join(lines)), str(PAGE), "exec"), names)
    said = capsys.readouterr().out
    assert "write for example" in said and "report.html" in said and "The budget is" in said
    board = names["board"]
    options = "--methods rtn,gptq --bits 2.75,3.25 --protocols wiki-mini@128/4 --calibration c4-mini@128x4 --no-bench"
    done = run_harness("run", "--model", "./my-model", *options.split(), "--out", "again")
    assert done.returncode == 0 and done.stderr.count("found, not repeated") == 5
    assert (here / "again" / "leaderboard.csv").read_bytes() == (board.folder / "leaderboard.csv").read_bytes()
    assert board["method"].dtype == "category" and str(board["rank_wiki-mini@128/4"].dtype) == "Int64"
    assert isinstance(board, pandas.DataFrame) and isinstance(board[board["budget_bpw"] > 3], harness.api.Leaderboard)


def test_a_notebook_shows_what_decides_and_escapes_it(here):
    board = harness.load_results(ROOT / "results" / "cpu-smollm2-135m")
    shown = board._repr_html_()
    assert shown.count("<tr>") == len(board) + 1 and "kld wiki-mini@512" in shown
    hostile = board.assign(variant="<script>alert(1)</script>", status="failed", reason="<b>no</b>")
    assert "<script>" not in hostile._repr_html_() and "&lt;b&gt;no" in hostile._repr_html_()
    assert "<td" in board[["stored_bpw"]]._repr_html_()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: harness.compare("./my-model", methods="gtpq"), "gptq"),
        (lambda: harness.compare("./nowhere", methods="rtn"), "nowhere"),
        (lambda: harness.compare("./my-model", methods="rtn", bit=3), "no such option: bit"),
        (lambda: harness.compress("./my-model", "rtn", bits=[2, 3]), "give one method"),
        (lambda: harness.compress("./my-model", "rtn", bits=0.5), "at least"),
        (lambda: harness.load_results("nowhere"), "folder a run wrote"),
    ],
)
def test_bad_input_is_one_line(here, call, says):
    with pytest.raises(ValueError, match=says) as found:
        call()
    assert "\n" not in str(found.value).strip()
