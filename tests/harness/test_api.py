"""The harness from Python: the same cells and numbers as from the command line, with the same refusals."""

import inspect
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console

import harness
from harness import api
from harness.cli import run as runs
from harness.cli.options import read_request
from harness.cli.request import Given, Options, words
from harness.data.checkpoint import load_tokenizer
from harness.report.sinks import Entry, Sinks
from harness.store.cells import CellStore
from tests.helpers import SMALL, run_harness

PLANNED = dict(calibration="c4-mini@128x4", protocols=["wiki-mini@128/4", "c4-mini@128/4"], bench=False)


@pytest.fixture
def logged(monkeypatch) -> list[Entry]:
    """What a run's sinks are given."""
    entries: list[Entry] = []
    monkeypatch.setattr(runs, "open_sinks", lambda text: Sinks({text: entries.append}))
    return entries


def test_it_is_the_leaderboard_of_the_command_line(truncated, finished, finished_cache, logged, tmp_path):
    board = harness.compare(truncated.path, ["rtn", "gptq"], [2.25, 3.25], out=tmp_path / "out", **PLANNED)
    written = (finished / "out" / "leaderboard.csv").read_bytes()
    assert (tmp_path / "out" / "leaderboard.csv").read_bytes() == written
    assert isinstance(board, harness.Leaderboard) and board.folder == tmp_path / "out"
    pd.testing.assert_frame_equal(board, harness.load_results(finished / "out"))
    assert board.to_csv(index=False, lineterminator="\n").encode() == written
    assert "<td>gptq</td><td>2.25</td>" in board._repr_html_()
    # What was found is logged too, with the numbers of its row.
    assert {entry.key for entry in logged} == set(board["cell"]) and len(logged) == 5
    for entry in logged:
        row = board.set_index("cell").loc[entry.key]
        assert entry.numbers["ppl_wiki-mini@128/4"] == row["ppl_wiki-mini@128/4"]
        assert entry.config["method"] == row["method"] and entry.status == "ok"


def test_a_compressed_model_is_the_stored_cell_and_generates(truncated, finished_cache, capsys):
    model = harness.compress(truncated.path, "gptq", 3.25, **PLANNED)
    assert "gptq 3.25: found, not repeated" in capsys.readouterr().err
    tokenizer = load_tokenizer(Path(model.name_or_path))
    tokens = tokenizer("The capital of France", return_tensors="pt").input_ids
    with torch.no_grad():
        assert model(tokens).logits.shape == (1, tokens.shape[1], model.config.vocab_size)
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, tokens.shape[1] + 3)


def test_a_model_that_is_not_there_yet_is_compressed_once_and_not_scored(narrow, cache, logged, tmp_path, capsys):
    harness.compress(str(narrow), "rtn", bits="3.25")
    (cell,) = (folder.name for folder in (cache / "cells").iterdir() if folder.is_dir())
    assert CellStore(cell).artifact() is not None and not list((cache / "cells" / cell).glob("score_*"))
    assert "not repeated" not in capsys.readouterr().err
    harness.compress(str(narrow), "rtn", bits=3.25)
    assert "not repeated" in capsys.readouterr().err
    done = run_harness("run", "--model", str(narrow), "--methods", "rtn", *SMALL, "--out", str(tmp_path / "o"))
    assert done.returncode == 0 and cell in (tmp_path / "o" / "leaderboard.csv").read_text()
    assert {entry.name for entry in logged} == {"fp16", "rtn 3.25"}  # when they ended
    assert all("ppl_wiki-mini@128/4" in entry.numbers for entry in logged)


def test_a_script_needs_no_guard(narrow, cache, tmp_path):
    (tmp_path / "script.py").write_text(
        "import harness\n"
        f"board = harness.compare({str(narrow)!r}, 'rtn', protocols='wiki-mini@64/5', bench=False)\n"
        "print(board['status'].tolist())\n"
    )
    root = str(Path(__file__).parents[2])
    environment = {"PYTHONPATH": root, "HARNESS_CACHE": str(cache), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout == "['ok', 'ok']\n", done.stderr


@pytest.mark.parametrize(
    "wrong, say",
    [
        (dict(protocol="wiki-mini@64"), "no option 'protocol': write protocols="),
        (dict(zzz=1), "no option 'zzz': there are model, methods"),
        (dict(methods="nonsense"), "nonsense"),
        (dict(bits="many"), "write for example --bits 3.25"),
        (dict(bits=[]), "write for example --bits 3.25"),
        (dict(allocate="best"), "invalid choice: 'best'"),
        (dict(limit="all"), "invalid int value"),
        (dict(jobs=0), "--jobs must be at least 1"),
        (dict(seeds=-1), "write for example --seeds 0,1,2"),
        (dict(device="abacus"), "try --device cpu"),
        (dict(bench_seconds=0), "write for example 3"),
        (dict(log="floppy:a"), "write for example --log tensorboard:runs"),
        (dict(model="./nowhere"), "nowhere"),
    ],
)
def test_bad_input_is_one_line(wrong, say, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as refused:
        harness.compare(**{"methods": "rtn", **wrong})
    assert say in str(refused.value) and "\n" not in str(refused.value)


def test_a_model_is_made_by_one_method():
    with pytest.raises(ValueError, match="one method"):
        harness.compress("smollm2-135m-instruct", "rtn,gptq")
    with pytest.raises(ValueError, match="give the folder a run wrote"):
        harness.load_results("nowhere")


def test_every_option_of_a_run_can_be_given_in_python():
    fields = set(inspect.get_annotations(Options)) - {"model", "methods", "bits"}
    fields -= {"shapes", "typed", "json", "wide"}  # of other verbs, and of what is printed
    assert fields == set(inspect.get_annotations(Given))
    given = dict(
        protocols=("wiki-mini@64/5",), seeds=range(2), fresh=True, strict=False, bench=True, timeout=9.5, jobs=None
    )
    typed = api._options("smollm2-135m-instruct", ["gptq:group=128,act_order=false", "rtn"], (2.0, "13/4"), given)
    assert (typed.methods, typed.bits, typed.seeds) == ("gptq:group=128,act_order=false,rtn", "2,13/4", "0,1")
    assert (typed.fresh, typed.strict, typed.bench, typed.timeout, typed.jobs) == (True, False, True, 9.5, None)
    assert [text for text, _ in read_request(typed).methods] == ["gptq:group=128,act_order=false", "rtn"]
    assert words({"bench": False}) == ["--no-bench"]


def test_in_a_notebook_the_bars_move(monkeypatch):
    pytest.importorskip("ipywidgets", reason="ipywidgets is not installed")
    monkeypatch.setattr(api, "open_console", lambda quiet: Console(force_jupyter=True))
    assert api._console().is_terminal


def test_what_is_not_offered_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing"):
        harness.nothing  # noqa: B018
    assert {"compare", "compress", "load_results", "Leaderboard"} <= set(dir(harness))
